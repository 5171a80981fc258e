//! The GGUF form: per weight `W.in_sum2` (`[matrices, row_len]`, F32) and `W.counts` (`[matrices, 1]`, F32).

use std::collections::BTreeMap;
use std::io::Write;

use byteorder::{ByteOrder, LittleEndian, WriteBytesExt};

use super::error::{ImatrixError, Problem, Quoted, Warning, WriteProblem};
use super::{Entry, Form, Imatrix, MOST_TOKENS};
use crate::gguf::{
    Array, Gguf, GgufLayout, GgufWriter, MAX_TENSOR_NAME, Metadata, NewTensor, TensorInfo, TensorType, Value,
};

const SUMS: &str = ".in_sum2";
const COUNTS: &str = ".counts";

const TYPE: &str = "general.type";
const DATASETS: &str = "imatrix.datasets";
const CHUNK_COUNT: &str = "imatrix.chunk_count";
pub(super) const CHUNK_SIZE: &str = "imatrix.chunk_size";

/// Floats are turned into bytes in pieces of this size, a multiple of 4.
const BYTES_PER_WRITE: usize = 1 << 16;

/// The two tensors of one weight.
#[derive(Default)]
struct Pair<'a> {
    sums: Option<&'a TensorInfo>,
    counts: Option<&'a TensorInfo>,
}

/// Reads an open GGUF file; `file` names it in messages.
pub(super) fn read(gguf: &Gguf, file: &str) -> Result<Imatrix, ImatrixError> {
    let fail = |problem| ImatrixError::content(file, problem);
    let mut pairs: BTreeMap<&str, Pair<'_>> = BTreeMap::new();
    let mut ignored = (0, None);
    for tensor in gguf.tensors() {
        if let Some(weight) = tensor.name.strip_suffix(SUMS) {
            pairs.entry(weight).or_default().sums = Some(tensor);
        } else if let Some(weight) = tensor.name.strip_suffix(COUNTS) {
            pairs.entry(weight).or_default().counts = Some(tensor);
        } else {
            ignored.0 += 1;
            ignored.1.get_or_insert(tensor);
        }
    }
    if pairs.is_empty() {
        return Err(fail(match gguf.metadata().bytes("general.architecture") {
            Ok(Some(architecture)) => Problem::IsModel(Quoted(String::from_utf8_lossy(architecture).into_owned())),
            _ => Problem::NoEntries { tensors: gguf.tensors().len() },
        }));
    }

    let mut imatrix = read_metadata(gguf.metadata()).map_err(fail)?;
    if let (tensors, Some(first)) = ignored {
        imatrix.warnings.push(Warning::IgnoredTensors { tensors, first: (&first.name).into() });
    }
    let mut oddities = Oddities::default();
    for (weight, pair) in pairs {
        let (sums, counts) = both(weight, &pair).map_err(fail)?;
        let (sums, counts) = (floats(gguf, sums, file)?, floats(gguf, counts, file)?);
        let entry = entry(weight, sums, &counts, &mut oddities).map_err(fail)?;
        imatrix.insert_stored(weight.to_owned(), entry);
    }
    imatrix.warnings.extend(oddities.into_warnings());
    Ok(imatrix)
}

fn read_metadata(metadata: &Metadata) -> Result<Imatrix, Problem> {
    let wrong = |key, value: &Value, expected| Problem::Key { key, found: value.describe(), expected };
    let u32_of = |key| match metadata.get(key) {
        Some(&Value::U32(number)) => Ok(number),
        Some(other) => Err(wrong(key, other, "a u32")),
        None => Err(Problem::MissingKey(key)),
    };
    let value = metadata.get(DATASETS).ok_or(Problem::MissingKey(DATASETS))?;
    let strings = match value {
        Value::Array(array) => array.iter_str().ok(),
        _ => None,
    };
    let datasets = strings.ok_or_else(|| wrong(DATASETS, value, "an array of str"))?;
    let chunk_size = u32_of(CHUNK_SIZE)?;
    if chunk_size == 0 {
        return Err(Problem::Key { key: CHUNK_SIZE, found: "0".to_owned(), expected: "at least 1 token" });
    }
    Ok(Imatrix {
        datasets: datasets.map(|name| String::from_utf8_lossy(name).into_owned()).collect(),
        chunk_count: Some(u32_of(CHUNK_COUNT)?),
        chunk_size: Some(chunk_size),
        form: Form::Gguf,
        ..Imatrix::default()
    })
}

fn both<'a>(weight: &str, pair: &Pair<'a>) -> Result<(&'a TensorInfo, &'a TensorInfo), Problem> {
    let unpaired = |present, absent| Err(Problem::Unpaired { tensor: weight.into(), present, absent });
    match (pair.sums, pair.counts) {
        (Some(sums), Some(counts)) => Ok((sums, counts)),
        (_, None) => unpaired(SUMS, COUNTS),
        (None, _) => unpaired(COUNTS, SUMS),
    }
}

fn floats(gguf: &Gguf, tensor: &TensorInfo, file: &str) -> Result<Vec<f32>, ImatrixError> {
    if tensor.ty != TensorType::F32 {
        let problem = Problem::TensorType { tensor: (&tensor.name).into(), found: tensor.ty.to_string() };
        return Err(ImatrixError::content(file, problem));
    }
    Ok(gguf.tensor_data(tensor)?.chunks_exact(4).map(LittleEndian::read_f32).collect())
}

/// What is odd in the entries, counted over the file.
#[derive(Default)]
struct Oddities {
    fractional: (usize, Option<Quoted>),
    without_count: (usize, Option<Quoted>),
}

impl Oddities {
    fn into_warnings(self) -> impl Iterator<Item = Warning> {
        let (entries, first) = self.fractional;
        let fractional = first.map(|first| Warning::FractionalCounts { entries, first });
        let (matrices, first) = self.without_count;
        fractional.into_iter().chain(first.map(|first| Warning::SumsWithoutCount { matrices, first }))
    }
}

fn note(counter: &mut (usize, Option<Quoted>), weight: &str) {
    counter.0 += 1;
    counter.1.get_or_insert_with(|| weight.into());
}

fn entry(weight: &str, sums: Vec<f32>, counts: &[f32], oddities: &mut Oddities) -> Result<Entry, Problem> {
    if counts.is_empty() || sums.is_empty() || !sums.len().is_multiple_of(counts.len()) {
        let (sums, counts) = (sums.len() as u64, counts.len() as u64);
        return Err(Problem::Shape { tensor: weight.into(), sums, counts });
    }
    super::check_sums(&sums, counts.len(), weight)?;
    let row_len = sums.len() / counts.len();
    let mut whole = Vec::with_capacity(counts.len());
    for (matrix, &value) in counts.iter().enumerate() {
        if !(0.0..=MOST_TOKENS as f32).contains(&value) {
            return Err(Problem::Count { tensor: weight.into(), matrix, value });
        }
        // Half away from zero, as lround does.
        let count = value.round() as u64;
        if count == 0 && sums[matrix * row_len..][..row_len].iter().any(|&sum| sum > 0.0) {
            note(&mut oddities.without_count, weight);
        }
        whole.push(count);
    }
    if counts.iter().any(|count| count.fract() != 0.0) {
        note(&mut oddities.fractional, weight);
    }
    Ok(Entry { sums, counts: whole })
}

/// Writes the GGUF form as llama-imatrix does (`save_imatrix`): keys in its order, weights sorted by name, entries
/// without data kept. The counts of `imatrix` must be tokens.
pub(super) fn write(imatrix: &Imatrix, out: &mut impl Write) -> Result<Vec<Warning>, ImatrixError> {
    let mut metadata = Metadata::new("imatrix");
    metadata.set(TYPE, "imatrix");
    metadata.set(DATASETS, Array::of_strings(&imatrix.datasets));
    metadata.set(CHUNK_COUNT, imatrix.chunk_count.unwrap_or(0));
    metadata.set(CHUNK_SIZE, imatrix.chunk_size_or_default());

    let mut tensors = Vec::with_capacity(imatrix.entries.len() * 2);
    for (weight, entry) in imatrix.stored_entries() {
        let weight = weight.as_ref();
        let most = MAX_TENSOR_NAME - SUMS.len();
        if weight.len() > most {
            let problem = WriteProblem::LongName { tensor: weight.into(), found: weight.len(), most };
            return Err(ImatrixError::Unwritable { form: Form::Gguf.name(), problem });
        }
        check_range(weight, entry)?;
        let matrices = entry.matrices() as u64;
        tensors.push(tensor(weight, SUMS, [entry.row_len() as u64, matrices]));
        tensors.push(tensor(weight, COUNTS, [1, matrices]));
    }
    let mut writer = GgufWriter::new(out, GgufLayout::new("the imatrix", &metadata, tensors)?)?;
    for (number, (_, entry)) in imatrix.stored_entries().enumerate() {
        write_floats(&mut writer, 2 * number, entry.sums.iter().copied())?;
        write_floats(&mut writer, 2 * number + 1, entry.counts.iter().map(|&count| count as f32))?;
    }
    writer.finish()?;
    Ok(imatrix.neutral_warning().into_iter().collect())
}

/// Refuses what [`read`] would refuse; only a conversion can bring it about.
fn check_range(weight: &str, entry: &Entry) -> Result<(), ImatrixError> {
    if let Some(&count) = entry.counts.iter().find(|count| **count > MOST_TOKENS) {
        return Err(super::out_of_range(Form::Gguf, "a count".to_owned(), weight, count as f64));
    }
    super::check_written(Form::Gguf, weight, &entry.sums)
}

/// A tensor of up to two dimensions; ggml does not store a trailing one.
fn tensor(weight: &str, suffix: &str, shape: [u64; 2]) -> NewTensor {
    let dims = if shape[1] > 1 { 2 } else { 1 };
    NewTensor { name: format!("{weight}{suffix}"), shape: shape[..dims].to_vec(), ty: TensorType::F32 }
}

fn write_floats(
    writer: &mut GgufWriter<impl Write>,
    index: usize,
    values: impl Iterator<Item = f32>,
) -> Result<(), ImatrixError> {
    let mut raw = Vec::with_capacity(BYTES_PER_WRITE);
    for value in values {
        raw.write_f32::<LittleEndian>(value)?;
        if raw.len() == BYTES_PER_WRITE {
            writer.write(index, &raw)?;
            raw.clear();
        }
    }
    Ok(writer.write(index, &raw)?)
}
