//! State of an unfinished collection: what a later run of the same command needs to end with the same file.
//!
//! A checkpoint is a GGUF file beside the output, named `OUTPUT.partial`. Its metadata hold the fingerprints of
//! everything that the result depends on; its tensors are the sums in double precision.

use std::path::{Path, PathBuf};

use byteorder::{ByteOrder, LittleEndian};
use sha2::{Digest, Sha256};

use super::ImatrixError;
use super::collect::{Collector, InputSums};
use crate::atomic_file::{AtomicFile, OutputError};
use crate::eval::Perplexity;
use crate::gguf::{Array, Gguf, GgufLayout, GgufWriter, Metadata, NewTensor, TensorType};

const KIND: &str = "lwq imatrix checkpoint";
const SUMS: &str = ".sums";
const COUNTS: &str = ".counts";

/// What a result depends on, each part under the name that a message uses for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint {
    parts: Vec<(&'static str, String)>,
}

impl Fingerprint {
    /// A fingerprint of a model, the tokens of its text, and settings in words.
    pub fn new(model: &Gguf, tokens: &[u32], settings: String) -> Fingerprint {
        let mut text = Sha256::new();
        tokens.iter().for_each(|token| text.update(token.to_le_bytes()));
        let parts = vec![
            ("model", crate::gguf::fingerprint(model)),
            ("text", format!("{:x}", text.finalize())),
            ("settings", settings),
        ];
        Fingerprint { parts }
    }

    /// The first part in which `saved` differs, with both values.
    fn difference(&self, saved: &Metadata) -> Option<String> {
        self.parts.iter().find_map(|(name, value)| match saved.str(&key(name)) {
            Ok(Some(found)) if found == value => None,
            Ok(Some(found)) if *name == "settings" => Some(format!("other settings ({found}, now {value})")),
            _ => Some(format!("another {name}")),
        })
    }
}

fn key(part: &str) -> String {
    format!("lwq.checkpoint.{part}")
}

/// What was done when a checkpoint was written.
#[derive(Debug, Clone)]
pub struct Progress {
    /// Chunks whose inputs are in the sums.
    pub chunks_done: u32,
    /// Perplexity sums of these chunks.
    pub perplexity: Perplexity,
    /// The sums.
    pub collector: Collector,
}

/// Where the checkpoint of an output lies.
pub fn path_of(output: &Path) -> PathBuf {
    let mut name = output.as_os_str().to_owned();
    name.push(".partial");
    PathBuf::from(name)
}

/// Writes a checkpoint in place of an earlier one, atomically.
///
/// # Errors
/// When the file cannot be written.
pub fn save(path: &Path, fingerprint: &Fingerprint, progress: &Progress) -> Result<(), ImatrixError> {
    let mut metadata = Metadata::new(path.display().to_string());
    metadata.set("general.type", KIND);
    for (name, value) in &fingerprint.parts {
        metadata.set(&key(name), value.as_str());
    }
    metadata.set(&key("chunks_done"), progress.chunks_done);
    let ppl = &progress.perplexity;
    metadata.set(&key("scored_tokens"), ppl.tokens as u64);
    metadata.set(&key("nll"), ppl.sum);
    metadata.set(&key("nll_squares"), ppl.sum_of_squares);
    let mut tensors = Vec::new();
    for (index, input) in progress.collector.inputs().enumerate() {
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
    for (index, input) in progress.collector.inputs().enumerate() {
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
pub fn load(path: &Path, fingerprint: &Fingerprint, process_output: bool) -> Result<Option<Progress>, ImatrixError> {
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
    if let Some(difference) = fingerprint.difference(metadata) {
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
    Ok(Some(Progress { chunks_done, perplexity, collector: Collector::resume(inputs, process_output) }))
}

/// Removes a checkpoint that is not needed any more.
///
/// # Errors
/// When it is there and cannot be removed.
pub fn remove(path: &Path) -> Result<(), OutputError> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(OutputError::Io { path: path.to_path_buf(), action: "cannot remove the checkpoint", source: e })
        }
        _ => Ok(()),
    }
}
