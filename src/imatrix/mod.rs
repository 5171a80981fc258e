//! Importance matrices: how strongly each input column of each weight matrix is used.
//!
//! For a weight with rows of `row_len` columns, calibration text gives the sum of squared activations per column
//! (Σ x²) and the number of tokens. Their quotient, the mean square, weighs the rounding error of that column.
//! Stacked tensors (experts) hold `matrices` such rows of sums, and one count per expert.
//!
//! [`Collection`] makes one, [`Merger`] adds up several, [`ImatrixStats`] describes one.
//!
//! Two file forms exist, told apart by content: the legacy binary `.dat` and a GGUF file with a pair of tensors
//! `NAME.in_sum2`, `NAME.counts` per weight. Floats are treated in the order and precision of llama.cpp
//! (`common_imatrix_load`, `load_imatrix` of llama-quantize, `save_imatrix` of llama-imatrix), because the bytes of
//! quantized models depend on them.

mod checkpoint;
mod collect;
mod collection;
mod error;
mod experts;
mod fingerprint;
mod gguf_form;
mod heatmap;
mod legacy;
mod matching;
mod merge;
mod serving;
mod stats;
mod stats_text;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;

use crate::atomic_file::AtomicFile;
use crate::gguf::{Gguf, Value};

pub use collect::ImportanceCollector;
pub use collection::{Collection, CollectionReport, Shard, default_path};
pub use error::{ImatrixError, MergeProblem, Problem, Quoted, Warning, WriteProblem};
pub use experts::{FEW_TOKENS, LayerExperts};
pub use heatmap::{HeatmapStyle, heatmap};
pub use matching::{
    EntryFilter, MatchError, MatchReport, MatchedEntry, ModelTensor, Need, WrongLength, match_to_model,
};
pub use merge::{MergeOptions, Merger};
pub use serving::Served;
pub use stats::{ImatrixStats, LayerStats, SortBy, TensorStats};

/// Tokens per chunk that llama-imatrix assumes of legacy files, its default context size.
pub const DEFAULT_CHUNK_SIZE: u32 = 512;
/// Largest token count that is taken at face value: beyond it, f64 no longer holds every integer.
pub(crate) const MOST_TOKENS: u64 = 1 << 53;

/// The two file forms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Form {
    /// Legacy binary: values are mean squares times the number of calls, counts are calls.
    Dat,
    /// GGUF: values are sums of squares, counts are tokens.
    #[default]
    Gguf,
}

impl Form {
    /// The form that a file name asks for: legacy if it ends in `.dat`, else GGUF.
    pub fn of_name(path: &Path) -> Form {
        let dat = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("dat"));
        if dat { Form::Dat } else { Form::Gguf }
    }

    /// Name for messages.
    pub fn name(self) -> &'static str {
        match self {
            Form::Dat => ".dat",
            Form::Gguf => "GGUF",
        }
    }
}

/// An importance matrix, and what files that are made with it call it.
#[derive(Clone, Copy, Debug)]
pub struct Named<'a> {
    /// The name, as a rule that of its file.
    pub name: &'a str,
    /// The matrix.
    pub imatrix: &'a Imatrix,
}

/// Sums and counts of one weight.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Entry {
    /// Σ x² per column, `[matrices, row_len]` row-major; in a legacy file mean(x²) times the number of calls.
    /// Finite and not negative.
    pub sums: Vec<f32>,
    /// Tokens per matrix, in a legacy file calls. At least one count; the length divides that of `sums`.
    pub counts: Vec<u64>,
}

/// Column weights of one tensor, as the quantizers take them.
#[derive(Debug, Clone, PartialEq)]
pub struct Importance {
    /// Mean squares, `[matrices, row_len]` row-major; ones for matrices that no token reached.
    pub values: Vec<f32>,
    /// How many matrices no token reached.
    pub neutral_matrices: usize,
}

impl Entry {
    /// An entry without data.
    pub fn new(row_len: usize, matrices: usize) -> Entry {
        Entry { sums: vec![0.0; row_len * matrices], counts: vec![0; matrices] }
    }

    /// Number of counts: experts of a stacked tensor, else 1 (also for stacked dense tensors).
    pub fn matrices(&self) -> usize {
        self.counts.len()
    }

    /// Values per count.
    pub fn row_len(&self) -> usize {
        self.sums.len() / self.counts.len().max(1)
    }

    /// True if no token reached any of its matrices.
    pub fn is_empty(&self) -> bool {
        self.counts.iter().all(|&count| count == 0)
    }

    /// How many of its matrices no token reached.
    pub(crate) fn neutral_matrices(&self) -> usize {
        self.counts.iter().filter(|&&count| count == 0).count()
    }

    /// Column weights, computed with llama-quantize's operations: single-precision sum divided by the count
    /// rounded to single precision; ones where the count is zero.
    pub fn importance(&self) -> Importance {
        self.clone().into_importance()
    }

    /// As [`Entry::importance`], in the memory of the sums.
    pub fn into_importance(self) -> Importance {
        let (neutral_matrices, row_len) = (self.neutral_matrices(), self.row_len().max(1));
        let mut values = self.sums;
        for (values, &count) in values.chunks_exact_mut(row_len).zip(&self.counts) {
            if count > 0 {
                let count = count as f32;
                values.iter_mut().for_each(|value| *value /= count);
            } else {
                values.fill(1.0);
            }
        }
        Importance { values, neutral_matrices }
    }
}

/// What the names of entries for plans begin with in a file.
pub(crate) const PLANNING_PREFIX: &str = "lwq.plan.";

/// The planning entry whose sums are no squares but counts: how often the text has each token of the vocabulary, one value
/// a row of an embedding that is not the output matrix, too.
pub(crate) const TOKEN_COUNTS: &str = "token_embd.rows";

/// An importance matrix in memory.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Imatrix {
    /// Entries by weight name, such as `blk.0.attn_q.weight`.
    pub entries: BTreeMap<String, Entry>,
    /// Entries for plans only, by weight name: the output matrix, also where the token embedding takes its part. The
    /// standard recipes round it without importance, and llama.cpp's tools do not look for it; so in a file these
    /// names begin with `lwq.plan.`. The legacy form has no place for them.
    pub planning: BTreeMap<String, Entry>,
    /// Names of the calibration files, oldest first.
    pub datasets: Vec<String>,
    /// Chunks of text that were evaluated; absent in old legacy files.
    pub chunk_count: Option<u32>,
    /// Tokens per chunk; legacy files do not store it.
    pub chunk_size: Option<u32>,
    /// The form it was read from, which says what sums and counts mean.
    pub form: Form,
    /// What was odd in the file.
    pub warnings: Vec<Warning>,
}

impl Imatrix {
    /// Reads a file of either form, told apart by its first bytes. A file with the GGUF magic is never retried as
    /// legacy, so that its own fault is reported. Memory: the values, once; nothing is allocated that the file
    /// cannot fill.
    ///
    /// # Errors
    /// When the file cannot be read or is no sound imatrix.
    pub fn open(path: &Path) -> Result<Imatrix, ImatrixError> {
        let name = path.display().to_string();
        let read_error = |source| ImatrixError::Read { file: name.clone(), source };
        let mut file = File::open(path).map_err(read_error)?;
        let found = file.metadata().map_err(read_error)?;
        if !found.is_file() {
            return Err(read_error(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file")));
        }
        let mut magic = Vec::with_capacity(4);
        Read::by_ref(&mut file).take(4).read_to_end(&mut magic).map_err(read_error)?;
        if magic == *b"GGUF" {
            return gguf_form::read(&Gguf::open(path)?, &name);
        }
        file.seek(SeekFrom::Start(0)).map_err(read_error)?;
        legacy::read(BufReader::new(file), found.len(), &name)
    }

    /// As [`Imatrix::open`], from memory; `name` stands for the file in messages.
    ///
    /// # Errors
    /// When the bytes are no sound imatrix.
    pub fn from_bytes(bytes: &[u8], name: &str) -> Result<Imatrix, ImatrixError> {
        if bytes.starts_with(b"GGUF") {
            return gguf_form::read(&Gguf::from_bytes(bytes.to_vec())?, name);
        }
        legacy::read(bytes, bytes.len() as u64, name)
    }

    /// Writes the file form `form`, byte for byte as llama-imatrix would. Legacy data that go to GGUF are counted
    /// in tokens first, see [`Imatrix::counted`].
    ///
    /// # Errors
    /// When a value does not fit the form, or writing fails.
    pub fn write(&self, form: Form, out: impl Write) -> Result<Vec<Warning>, ImatrixError> {
        let mut out = BufWriter::new(out);
        let warnings = match (form, self.form) {
            (Form::Dat, _) => legacy::write(self, &mut out)?,
            (Form::Gguf, Form::Gguf) => gguf_form::write(self, &mut out)?,
            (Form::Gguf, Form::Dat) => gguf_form::write(&self.counted(DEFAULT_CHUNK_SIZE), &mut out)?,
        };
        out.flush()?;
        Ok(warnings)
    }

    /// Writes `path` in the file form `form`; the name appears only when the file is whole.
    ///
    /// # Errors
    /// As [`Imatrix::write`], and when `path` exists and `replace` is false.
    pub fn save(&self, path: &Path, form: Form, replace: bool) -> Result<Vec<Warning>, ImatrixError> {
        let mut file = AtomicFile::create(path, replace)?;
        let warnings = self.write(form, &mut file)?;
        file.commit()?;
        Ok(warnings)
    }

    /// The same matrix with counts in tokens. Legacy entries become sums = value · `chunk_size` and
    /// counts = calls · `chunk_size`, as llama-imatrix converts them; others are returned as they are. Values may
    /// leave the range of f32 here; [`Imatrix::write`] refuses them.
    pub fn counted(&self, chunk_size: u32) -> Imatrix {
        let mut counted = self.clone();
        if self.form == Form::Gguf {
            return counted;
        }
        for entry in counted.entries.values_mut() {
            for sum in &mut entry.sums {
                *sum *= chunk_size as f32;
            }
            for count in &mut entry.counts {
                *count *= u64::from(chunk_size);
            }
        }
        counted.form = Form::Gguf;
        counted.chunk_size = Some(chunk_size);
        counted.chunk_count =
            Some(u32::try_from(counted.most_tokens() / u64::from(chunk_size.max(1))).unwrap_or(u32::MAX));
        counted
    }

    /// All entries under the names that they have in a file.
    pub(crate) fn stored_entries(&self) -> impl Iterator<Item = (Cow<'_, str>, &Entry)> {
        let planning = self.planning.iter().map(|(name, entry)| (format!("{PLANNING_PREFIX}{name}").into(), entry));
        self.entries.iter().map(|(name, entry)| (name.as_str().into(), entry)).chain(planning)
    }

    /// Adds an entry under the name that it has in a file.
    pub(crate) fn insert_stored(&mut self, name: String, entry: Entry) {
        match name.strip_prefix(PLANNING_PREFIX) {
            Some(tensor) => self.planning.insert(tensor.to_owned(), entry),
            None => self.entries.insert(name, entry),
        };
    }

    /// Makes the entries for plans that belong to a weight ordinary ones, where there are none of their name.
    pub fn with_planning(mut self) -> Imatrix {
        let counts = self.planning.remove_entry(TOKEN_COUNTS);
        for (name, entry) in std::mem::take(&mut self.planning) {
            self.entries.entry(name).or_insert(entry);
        }
        self.planning.extend(counts);
        self
    }

    /// Notes how often each of `n_vocab` tokens occurs in `tokens`.
    pub fn count_tokens(&mut self, tokens: &[u32], n_vocab: usize) {
        let mut counts = vec![0.0f32; n_vocab];
        for &token in tokens {
            if let Some(count) = counts.get_mut(token as usize) {
                *count += 1.0;
            }
        }
        self.planning.insert(TOKEN_COUNTS.to_owned(), Entry { sums: counts, counts: vec![tokens.len() as u64] });
    }

    /// How often each token of the vocabulary is to be expected, relative to the others: the counts of the text, and for
    /// tokens that it does not have the probability that Good and Turing give to all of them together, which is that of
    /// the tokens seen once. `None` when tokens were not counted.
    pub fn token_frequencies(&self) -> Option<Vec<f64>> {
        let counts = &self.planning.get(TOKEN_COUNTS)?.sums;
        let number = |wanted: f32| counts.iter().filter(|&&count| count == wanted).count() as f64;
        let unseen = (number(1.0) / number(0.0).max(1.0)).clamp(f64::MIN_POSITIVE, 1.0);
        Some(counts.iter().map(|&count| if count > 0.0 { f64::from(count) } else { unseen }).collect())
    }

    /// The largest count of all entries; tokens unless the form is legacy.
    pub(crate) fn most_tokens(&self) -> u64 {
        self.entries.values().flat_map(|entry| &entry.counts).copied().max().unwrap_or(0)
    }

    /// Tokens per chunk, or the default where the file does not say.
    pub(crate) fn chunk_size_or_default(&self) -> u32 {
        self.chunk_size.unwrap_or(DEFAULT_CHUNK_SIZE)
    }

    /// A warning that counts the matrices no token reached, if there are any.
    pub fn neutral_warning(&self) -> Option<Warning> {
        neutral_warning(self.entries.iter())
    }

    /// The `quantize.imatrix.*` pairs that llama-quantize appends to a model, in its order. `path` is written as
    /// given, `entries` counts the entries left after filtering. llama-quantize cuts both strings after 127 bytes,
    /// a limit of its override buffer that is not repeated here.
    pub fn quantize_metadata(&self, path: &str, entries: usize) -> Vec<(&'static str, Value)> {
        let mut pairs = vec![("quantize.imatrix.file", Value::String(path.into()))];
        if let Some(dataset) = self.datasets.first() {
            pairs.push(("quantize.imatrix.dataset", Value::String(dataset.as_str().into())));
        }
        pairs.push(("quantize.imatrix.entries_count", Value::U32(u32::try_from(entries).unwrap_or(u32::MAX))));
        // The reference holds the count in an i32 and writes it only if positive.
        let chunks = self.chunk_count.filter(|&count| count > 0 && i32::try_from(count).is_ok());
        pairs.extend(chunks.map(|count| ("quantize.imatrix.chunks_count", Value::U32(count))));
        pairs
    }
}

/// Tokens per chunk that the GGUF file `path` states, without reading its tensors; `None` for legacy files and for
/// anything that is no imatrix.
pub fn stored_chunk_size(path: &Path) -> Option<u32> {
    let mut magic = [0; 4];
    File::open(path).and_then(|mut file| file.read_exact(&mut magic)).ok()?;
    if magic != *b"GGUF" {
        return None;
    }
    Gguf::open(path).ok()?.metadata().u32(gguf_form::CHUNK_SIZE).ok()?
}

fn neutral_warning<'a>(entries: impl Iterator<Item = (&'a String, &'a Entry)>) -> Option<Warning> {
    let mut partial = entries.filter(|(_, entry)| entry.neutral_matrices() > 0);
    let (first, entry) = partial.next()?;
    let (mut matrices, mut entries) = (entry.neutral_matrices(), 1);
    for (_, entry) in partial {
        matrices += entry.neutral_matrices();
        entries += 1;
    }
    Some(Warning::Neutral { matrices, entries, first: first.into() })
}

/// Refuses sums that no sum of squares can be. `sums` is `[matrices, row_len]`, row-major.
fn check_sums(sums: &[f32], matrices: usize, tensor: &str) -> Result<(), Problem> {
    match sums.iter().position(|sum| !sum.is_finite() || *sum < 0.0) {
        None => Ok(()),
        Some(bad) => {
            let row_len = (sums.len() / matrices.max(1)).max(1);
            let (matrix, index) = (bad / row_len, bad % row_len);
            Err(Problem::Value { tensor: tensor.into(), matrix, index, value: sums[bad] })
        }
    }
}

/// Refuses to write values that could not be read back.
fn check_written(form: Form, tensor: &str, values: &[f32]) -> Result<(), ImatrixError> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(index) => Err(out_of_range(form, format!("value {index}"), tensor, values[index].into())),
    }
}

fn out_of_range(form: Form, field: String, tensor: &str, value: f64) -> ImatrixError {
    let problem = WriteProblem::OutOfRange { field, tensor: tensor.into(), value };
    ImatrixError::Unwritable { form: form.name(), problem }
}

#[cfg(test)]
mod build;
#[cfg(test)]
mod stats_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod writing_tests;
