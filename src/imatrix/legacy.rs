//! The legacy binary form (`.dat`): no magic, little-endian, entries followed by an optional trailer.
//!
//! ```text
//! i32 n_entries >= 1
//! n_entries times: i32 name_len, name, i32 ncall, i32 nval >= 1, f32 value[nval]   (value = mean(x²)·ncall)
//! optional trailer: i32 chunk_count, i32 dataset_len, dataset
//! ```
//!
//! An entry holds all matrices of a stacked tensor one after the other and one `ncall` for all of them.

use std::io::{self, Read, Write};

use byteorder::{LittleEndian, ReadBytesExt, WriteBytesExt};

use super::error::{ImatrixError, Problem, Quoted, Warning, WriteProblem};
use super::{Entry, Form, Imatrix};

/// Bytes of the shortest entry: a name of one byte and a single value.
const SHORTEST_ENTRY: u64 = 4 + 1 + 4 + 4 + 4;

/// Reads `len` bytes of `input`; `file` names it in messages.
pub(super) fn read(input: impl Read, len: u64, file: &str) -> Result<Imatrix, ImatrixError> {
    let mut cursor = Cursor { input, offset: 0, left: len, file };
    let n_entries = cursor.i32(|| "the number of entries".to_owned())?;
    let most = cursor.left / SHORTEST_ENTRY;
    if n_entries < 1 || n_entries as u64 > most {
        let problem = Problem::EntryCount { entries: n_entries, left: cursor.left, most };
        return Err(ImatrixError::content(file, problem));
    }

    let mut imatrix = Imatrix { form: Form::Dat, ..Imatrix::default() };
    let mut without_calls = (0, None);
    for number in 1..=n_entries {
        let (name, ncall, sums) = read_entry(&mut cursor, number)?;
        if ncall == 0 {
            without_calls.0 += 1;
            without_calls.1.get_or_insert_with(|| Quoted::from(&name));
        }
        // A value without calls is used as it stands, which is what dividing by one call gives.
        let entry = Entry { sums, counts: vec![ncall.max(1) as u64] };
        if imatrix.entries.insert(name.clone(), entry).is_some() {
            return Err(ImatrixError::content(file, Problem::Duplicate(Quoted(name))));
        }
    }
    if let (entries, Some(first)) = without_calls {
        imatrix.warnings.push(Warning::NoCalls { entries, first });
    }
    read_trailer(&mut cursor, &mut imatrix)?;
    Ok(imatrix)
}

/// Name, call count and values of entry `number` (from 1).
fn read_entry<R: Read>(cursor: &mut Cursor<'_, R>, number: i32) -> Result<(String, i32, Vec<f32>), ImatrixError> {
    let name_len = cursor.i32(|| format!("the name length of entry {number}"))?;
    if name_len < 1 {
        return Err(cursor.field(format!("the name length of entry {number}"), name_len, "at least 1"));
    }
    let offset = cursor.offset;
    let name = cursor.bytes(name_len as u64, || format!("the name of entry {number}"))?;
    let name = String::from_utf8(name)
        .ok()
        .filter(|name| !name.contains('\0'))
        .ok_or_else(|| ImatrixError::content(cursor.file, Problem::Name { entry: number, offset }))?;

    let ncall = cursor.i32(|| format!("the call count of {}", Quoted::from(&name)))?;
    if ncall < 0 {
        return Err(cursor.field(format!("the call count of {}", Quoted::from(&name)), ncall, "at least 0"));
    }
    let nval = cursor.i32(|| format!("the number of values of {}", Quoted::from(&name)))?;
    if nval < 1 {
        return Err(cursor.field(format!("the number of values of {}", Quoted::from(&name)), nval, "at least 1"));
    }
    let sums = cursor.f32s(nval as usize, &name)?;
    Ok((name, ncall, sums))
}

fn read_trailer<R: Read>(cursor: &mut Cursor<'_, R>, imatrix: &mut Imatrix) -> Result<(), ImatrixError> {
    if cursor.left == 0 {
        return Ok(());
    }
    let chunk_count = cursor.i32(|| "the number of chunks (trailer)".to_owned())?;
    match u32::try_from(chunk_count) {
        Ok(count) => imatrix.chunk_count = Some(count),
        Err(_) => imatrix.warnings.push(Warning::ChunkCount(chunk_count)),
    }
    if cursor.left == 0 {
        return Ok(());
    }
    let dataset_len = cursor.i32(|| "the length of the dataset name (trailer)".to_owned())?;
    if dataset_len < 0 {
        return Err(cursor.field("the length of the dataset name (trailer)".to_owned(), dataset_len, "at least 0"));
    }
    let dataset = cursor.bytes(dataset_len as u64, || "the dataset name (trailer)".to_owned())?;
    if !dataset.is_empty() {
        imatrix.datasets.push(String::from_utf8_lossy(&dataset).into_owned());
    }
    if cursor.left > 0 {
        let problem = Problem::TrailingBytes { offset: cursor.offset, left: cursor.left };
        return Err(ImatrixError::content(cursor.file, problem));
    }
    Ok(())
}

/// Reads fields in order and never asks for more than the file still has.
struct Cursor<'a, R> {
    input: R,
    offset: u64,
    left: u64,
    file: &'a str,
}

impl<R: Read> Cursor<'_, R> {
    fn field(&self, field: String, found: i32, expected: &'static str) -> ImatrixError {
        ImatrixError::content(self.file, Problem::Field { field, found: found.into(), expected })
    }

    /// Fails unless `needed` bytes are left; to be called before memory for them is taken.
    fn require(&self, needed: u64, field: impl FnOnce() -> String) -> Result<(), ImatrixError> {
        if needed <= self.left {
            return Ok(());
        }
        let problem = Problem::Truncated { field: field(), offset: self.offset, needed, left: self.left };
        Err(ImatrixError::content(self.file, problem))
    }

    /// Reads `len` bytes, which are left, by `read`.
    fn read<T>(&mut self, len: u64, read: impl FnOnce(&mut R) -> io::Result<T>) -> Result<T, ImatrixError> {
        let value =
            read(&mut self.input).map_err(|source| ImatrixError::Read { file: self.file.to_owned(), source })?;
        self.offset += len;
        self.left -= len;
        Ok(value)
    }

    fn i32(&mut self, field: impl FnOnce() -> String) -> Result<i32, ImatrixError> {
        self.require(4, field)?;
        self.read(4, |input| input.read_i32::<LittleEndian>())
    }

    fn bytes(&mut self, len: u64, field: impl FnOnce() -> String) -> Result<Vec<u8>, ImatrixError> {
        self.require(len, field)?;
        let mut bytes = vec![0; len as usize];
        self.read(len, |input| input.read_exact(&mut bytes))?;
        Ok(bytes)
    }

    fn f32s(&mut self, count: usize, tensor: &str) -> Result<Vec<f32>, ImatrixError> {
        let len = count as u64 * 4;
        self.require(len, || format!("the values of {}", Quoted::from(tensor)))?;
        let mut values = vec![0.0; count];
        self.read(len, |input| input.read_f32_into::<LittleEndian>(&mut values))?;
        super::check_sums(&values, 1, tensor).map_err(|problem| ImatrixError::content(self.file, problem))?;
        Ok(values)
    }
}

/// What one entry becomes in the legacy form.
struct LegacyEntry {
    ncall: i32,
    values: Vec<f32>,
}

/// Writes the legacy form as llama-imatrix does (`save_imatrix_legacy`): sorted by name, entries without any data
/// left out, trailer always present, with the last dataset in it.
pub(super) fn write(imatrix: &Imatrix, out: &mut impl Write) -> Result<Vec<Warning>, ImatrixError> {
    let mut warnings = Vec::new();
    let stored: Vec<(&String, &Entry)> = imatrix.entries.iter().filter(|(_, entry)| !entry.is_empty()).collect();
    let left_out = imatrix.entries.len() - stored.len();
    if stored.is_empty() {
        let problem = WriteProblem::NoData { entries: imatrix.entries.len() };
        return Err(ImatrixError::Unwritable { form: Form::Dat.name(), problem });
    }
    if left_out > 0 {
        let first = imatrix.entries.iter().find(|(_, entry)| entry.is_empty());
        warnings.extend(first.map(|(name, _)| Warning::LeftOut { entries: left_out, first: name.into() }));
    }
    warnings.extend(super::neutral_warning(stored.iter().copied()));

    put_i32(out, stored.len() as u64, || "the number of entries".to_owned())?;
    for (name, entry) in stored {
        let legacy = legacy_entry(imatrix, name, entry)?;
        super::check_written(Form::Dat, name, &legacy.values)?;
        put_i32(out, name.len() as u64, || format!("the name length of {}", Quoted::from(name)))?;
        out.write_all(name.as_bytes())?;
        out.write_i32::<LittleEndian>(legacy.ncall)?;
        put_i32(out, legacy.values.len() as u64, || format!("the number of values of {}", Quoted::from(name)))?;
        legacy.values.into_iter().try_for_each(|value| out.write_f32::<LittleEndian>(value))?;
    }
    put_i32(out, imatrix.chunk_count.unwrap_or(0).into(), || "the number of chunks".to_owned())?;
    let dataset = imatrix.datasets.last().map_or("", String::as_str);
    put_i32(out, dataset.len() as u64, || "the length of the dataset name".to_owned())?;
    out.write_all(dataset.as_bytes())?;
    Ok(warnings)
}

fn legacy_entry(imatrix: &Imatrix, name: &str, entry: &Entry) -> Result<LegacyEntry, ImatrixError> {
    let most = entry.counts.iter().copied().max().unwrap_or(0);
    // Rounded up, so that no entry with data gets a call count of zero.
    let calls = match imatrix.form {
        Form::Dat => most,
        Form::Gguf => most.div_ceil(imatrix.chunk_size_or_default().into()),
    };
    let ncall = to_i32(calls, || format!("the call count of {}", Quoted::from(name)))?;
    if imatrix.form == Form::Dat {
        return Ok(LegacyEntry { ncall, values: entry.sums.clone() });
    }
    let row_len = entry.row_len();
    let values = entry
        .sums
        .iter()
        .enumerate()
        .map(|(i, &sum)| match entry.counts[i / row_len] {
            0 => ncall as f32,
            count => (sum / count as f32) * ncall as f32,
        })
        .collect();
    Ok(LegacyEntry { ncall, values })
}

fn to_i32(value: u64, field: impl FnOnce() -> String) -> Result<i32, ImatrixError> {
    i32::try_from(value).map_err(|_| ImatrixError::Unwritable {
        form: Form::Dat.name(),
        problem: WriteProblem::TooLarge { field: field(), value },
    })
}

fn put_i32(out: &mut impl Write, value: u64, field: impl FnOnce() -> String) -> Result<(), ImatrixError> {
    Ok(out.write_i32::<LittleEndian>(to_i32(value, field)?)?)
}
