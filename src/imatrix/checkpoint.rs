//! State of an unfinished collection: what a later run of the same command needs to end with the same file.
//!
//! A checkpoint is a GGUF file beside the output, see [`partial_path`](crate::unfinished::partial_path). Its metadata hold
//! the conditions that the result depends on; its tensors are the sums in double precision.

use std::path::Path;

use byteorder::{ByteOrder, LittleEndian};

use super::ImatrixError;
use super::collect::{ImportanceCollector, InputSums};
use crate::atomic_file::{AtomicFile, OutputError};
use crate::eval::Perplexity;
use crate::gguf::{Array, Gguf, GgufLayout, GgufWriter, Metadata, NewTensor, TensorType};
use crate::unfinished::{Conditions, key};

const KIND: &str = "lwq imatrix checkpoint";
const SUMS: &str = ".sums";
const COUNTS: &str = ".counts";

/// What was done when a checkpoint was written.
#[derive(Debug, Clone)]
pub(super) struct CollectionState {
    /// Chunks whose inputs are in the sums.
    pub chunks_done: u32,
    /// Perplexity sums of these chunks.
    pub perplexity: Perplexity,
    /// The sums.
    pub collector: ImportanceCollector,
}

/// Writes a checkpoint in place of an earlier one, atomically.
///
/// # Errors
/// When the file cannot be written.
pub(super) fn save(path: &Path, conditions: &Conditions, state: &CollectionState) -> Result<(), ImatrixError> {
    let mut metadata = Metadata::new(path.display().to_string());
    metadata.set("general.type", KIND);
    conditions.write(&mut metadata);
    metadata.set(&key("chunks_done"), state.chunks_done);
    let ppl = &state.perplexity;
    metadata.set(&key("scored_tokens"), ppl.tokens as u64);
    metadata.set(&key("nll"), ppl.sum);
    metadata.set(&key("nll_squares"), ppl.sum_of_squares);
    let mut tensors = Vec::new();
    for (index, input) in state.collector.inputs().enumerate() {
        metadata.set(&key(&format!("weights.{index}")), Array::of_strings(&input.weights));
        let shape = |len: usize| vec![len as u64];
        // Short names: the weights' own names with a suffix may exceed the 63 bytes that a tensor name has.
        tensors.push(NewTensor { name: format!("{index}{SUMS}"), shape: shape(input.sums.len()), ty: TensorType::F64 });
        tensors.push(NewTensor {
            name: format!("{index}{COUNTS}"),
            shape: shape(input.counts.len()),
            ty: TensorType::I64,
        });
    }
    let layout = GgufLayout::new(&path.display().to_string(), &metadata, tensors)?;
    let mut writer = GgufWriter::new(AtomicFile::create(path, true)?, layout)?;
    for (index, input) in state.collector.inputs().enumerate() {
        let (mut sums, mut counts) = (vec![0; 8 * input.sums.len()], vec![0; 8 * input.counts.len()]);
        LittleEndian::write_f64_into(&input.sums, &mut sums);
        LittleEndian::write_u64_into(&input.counts, &mut counts);
        writer.write(2 * index, &sums)?;
        writer.write(2 * index + 1, &counts)?;
    }
    writer.finish()?.commit()?;
    Ok(())
}

/// Reads a checkpoint; `None` if there is none.
///
/// # Errors
/// When the file is damaged, or was made under other conditions: the message says what changed.
pub(super) fn load(
    path: &Path,
    conditions: &Conditions,
    process_output: bool,
) -> Result<Option<CollectionState>, ImatrixError> {
    if !path.exists() {
        return Ok(None);
    }
    let file = path.display().to_string();
    let gguf = Gguf::open(path)?;
    let metadata = gguf.metadata();
    let damaged = |problem: &str| ImatrixError::Checkpoint {
        file: file.clone(),
        problem: format!("{problem}; delete it or add --force to start over"),
    };
    if metadata.str("general.type")? != Some(KIND) {
        return Err(damaged("is no checkpoint of lwq imatrix"));
    }
    if let Some(difference) = conditions.difference(metadata) {
        return Err(damaged(&format!("was made with {difference}")));
    }
    let number = |name: &str| metadata.u64(&key(name))?.ok_or_else(|| damaged("lacks a key"));
    let float = |name: &str| match metadata.get(&key(name)) {
        Some(crate::gguf::Value::F64(value)) => Ok(*value),
        _ => Err(damaged("lacks a sum")),
    };
    let chunks_done = u32::try_from(number("chunks_done")?).map_err(|_| damaged("has a damaged count"))?;
    let perplexity = Perplexity {
        tokens: usize::try_from(number("scored_tokens")?).map_err(|_| damaged("has a damaged count"))?,
        sum: float("nll")?,
        sum_of_squares: float("nll_squares")?,
    };
    let mut inputs = Vec::new();
    for index in 0..gguf.tensors().len() / 2 {
        let weights = metadata.array(&key(&format!("weights.{index}")))?.ok_or_else(|| damaged("lacks names"))?;
        let weights: Vec<String> = weights.iter_str()?.map(|name| String::from_utf8_lossy(name).into_owned()).collect();
        let tensor = |suffix: &str, ty| {
            let tensor = gguf.tensor(&format!("{index}{suffix}")).filter(|tensor| tensor.ty == ty);
            gguf.data(tensor.ok_or_else(|| damaged("lacks sums"))?).map_err(ImatrixError::from)
        };
        let sums: Vec<f64> = tensor(SUMS, TensorType::F64)?.chunks_exact(8).map(LittleEndian::read_f64).collect();
        let counts: Vec<u64> = tensor(COUNTS, TensorType::I64)?.chunks_exact(8).map(LittleEndian::read_u64).collect();
        if weights.is_empty() || counts.is_empty() || !sums.len().is_multiple_of(counts.len()) {
            return Err(damaged("has sums of a wrong length"));
        }
        inputs.push(InputSums { weights, sums, counts });
    }
    let collector = ImportanceCollector::resume(inputs, process_output);
    Ok(Some(CollectionState { chunks_done, perplexity, collector }))
}

/// Removes a checkpoint that is not needed any more.
///
/// # Errors
/// When it is there and cannot be removed.
pub(super) fn remove(path: &Path) -> Result<(), OutputError> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(OutputError::Io { path: path.to_path_buf(), action: "cannot remove the checkpoint", source: e })
        }
        _ => Ok(()),
    }
}
