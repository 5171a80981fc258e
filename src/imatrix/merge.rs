//! Adding up importance matrices of one model: shards of a text, or different texts.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry as Slot;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::error::{ImatrixError, MergeProblem, Quoted, Warning};
use super::{DEFAULT_CHUNK_SIZE, Entry, Form, Imatrix, MOST_TOKENS};

/// How inputs are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MergeOptions {
    /// Tokens behind one call of a legacy input, which does not store it.
    pub legacy_chunk_size: u32,
}

impl Default for MergeOptions {
    fn default() -> Self {
        MergeOptions { legacy_chunk_size: DEFAULT_CHUNK_SIZE }
    }
}

/// Adds up sums and counts, input by input.
///
/// Sums are kept in f64 and rounded to f32 once, at the end, so the result carries one rounding whatever the number
/// of inputs, and their order matters only below that rounding. Memory: 8 bytes per value and one input at a time.
#[derive(Debug, Default)]
pub struct Merger {
    options: MergeOptions,
    inputs: Vec<Input>,
    entries: BTreeMap<String, Accumulated>,
    datasets: Vec<String>,
    chunk_size: Option<u32>,
    single_counts: BTreeMap<String, ()>,
}

#[derive(Debug)]
struct Input {
    file: String,
    fingerprint: u64,
}

#[derive(Debug)]
struct Accumulated {
    /// `[matrices, row_len]`, row-major.
    sums: Vec<f64>,
    counts: Vec<u64>,
    /// Index of the input that brought it.
    origin: usize,
    /// How many inputs have it.
    inputs: usize,
}

impl Merger {
    /// Nothing added yet.
    pub fn new(options: MergeOptions) -> Merger {
        Merger { options, ..Merger::default() }
    }

    /// Adds `imatrix`, read from `file`. Returns what is odd about it. After an error the merger is of no use.
    ///
    /// # Errors
    /// When an entry does not fit what was added before, or a count passes 2^53.
    pub fn add(&mut self, file: &str, imatrix: &Imatrix) -> Result<Vec<Warning>, ImatrixError> {
        let mut warnings = Vec::new();
        let fingerprint = fingerprint(imatrix);
        if let Some(earlier) = self.inputs.iter().find(|input| input.fingerprint == fingerprint) {
            warnings.push(Warning::SameContent { file: file.to_owned(), earlier: earlier.file.clone() });
        }
        let (scale, chunk_size) = match imatrix.form {
            Form::Dat => {
                let chunk_size = self.options.legacy_chunk_size;
                warnings.push(Warning::AssumedChunkSize { file: file.to_owned(), chunk_size });
                (chunk_size, chunk_size)
            }
            Form::Gguf => (1, imatrix.chunk_size_or_default()),
        };
        let kept = *self.chunk_size.get_or_insert(chunk_size);
        if kept != chunk_size {
            warnings.push(Warning::ChunkSizes { file: file.to_owned(), found: chunk_size, kept });
        }

        let origin = self.inputs.len();
        self.inputs.push(Input { file: file.to_owned(), fingerprint });
        for (name, entry) in &imatrix.entries {
            self.add_entry(name, entry, scale, origin)
                .map_err(|problem| ImatrixError::Merge { file: file.to_owned(), problem })?;
        }
        for dataset in &imatrix.datasets {
            if !self.datasets.contains(dataset) {
                self.datasets.push(dataset.clone());
            }
        }
        Ok(warnings)
    }

    fn add_entry(&mut self, name: &str, entry: &Entry, scale: u32, origin: usize) -> Result<(), MergeProblem> {
        let accumulated = match self.entries.entry(name.to_owned()) {
            Slot::Vacant(slot) => {
                let (sums, counts) = (vec![0.0; entry.sums.len()], vec![0; entry.counts.len()]);
                slot.insert(Accumulated { sums, counts, origin, inputs: 0 })
            }
            Slot::Occupied(slot) => slot.into_mut(),
        };
        let earlier = || self.inputs[accumulated.origin].file.clone();
        let (found, expected) = (entry.sums.len(), accumulated.sums.len());
        if found != expected {
            return Err(MergeProblem::Length { tensor: name.into(), found, expected, earlier: earlier() });
        }
        let (found, expected) = (entry.counts.len(), accumulated.counts.len());
        if found != expected {
            if found != 1 && expected != 1 {
                return Err(MergeProblem::Counts { tensor: name.into(), found, expected, earlier: earlier() });
            }
            self.single_counts.insert(name.to_owned(), ());
            if expected == 1 {
                accumulated.split_count(found);
            }
        }
        accumulated.inputs += 1;
        accumulated.add(entry, scale).map_err(|_| MergeProblem::CountOverflow { tensor: name.into() })
    }

    /// The sum of all inputs, in tokens. `chunk_count` is the largest count over the chunk size, as llama-imatrix
    /// computes it; a dataset that several inputs name stands once.
    ///
    /// # Errors
    /// When nothing was added, or a sum passes the range of f32.
    pub fn finish(self) -> Result<Imatrix, ImatrixError> {
        let last = self.inputs.last().map_or_else(String::new, |input| input.file.clone());
        let fail = |problem| ImatrixError::Merge { file: last.clone(), problem };
        let chunk_size = self.chunk_size.ok_or_else(|| fail(MergeProblem::NoInput))?;
        let mut merged =
            Imatrix { datasets: self.datasets, chunk_size: Some(chunk_size), form: Form::Gguf, ..Imatrix::default() };
        let mut partly = (0, None);
        for (name, accumulated) in self.entries {
            if accumulated.inputs < self.inputs.len() {
                partly.0 += 1;
                partly.1.get_or_insert_with(|| Quoted::from(&name));
            }
            let sums: Vec<f32> = accumulated.sums.iter().map(|&sum| sum as f32).collect();
            if let Some(index) = sums.iter().position(|sum| !sum.is_finite()) {
                return Err(fail(MergeProblem::SumOverflow { tensor: (&name).into(), index }));
            }
            merged.entries.insert(name, Entry { sums, counts: accumulated.counts });
        }
        let chunks = merged.most_tokens() / u64::from(chunk_size.max(1));
        merged.chunk_count = Some(u32::try_from(chunks).unwrap_or(u32::MAX));
        if let (entries, Some(first)) = partly {
            merged.warnings.push(Warning::PartlyPresent { entries, first });
        }
        if let Some((first, ())) = self.single_counts.first_key_value() {
            merged.warnings.push(Warning::SingleCounts { entries: self.single_counts.len(), first: first.into() });
        }
        Ok(merged)
    }
}

struct CountOverflow;

impl Accumulated {
    /// Adds an entry with as many counts, or with a single one for all matrices. `scale` turns calls into tokens.
    fn add(&mut self, entry: &Entry, scale: u32) -> Result<(), CountOverflow> {
        let row_len = self.sums.len() / self.counts.len();
        let single = entry.counts.len() == 1 && self.counts.len() > 1;
        for (matrix, (sums, count)) in self.sums.chunks_exact_mut(row_len).zip(&mut self.counts).enumerate() {
            let added = &entry.sums[matrix * row_len..][..row_len];
            let calls = if single { entry.counts[0] } else { entry.counts[matrix] };
            if single && is_filler(added.iter().map(|&sum| sum.into()), calls) {
                continue;
            }
            let tokens = calls.checked_mul(scale.into()).and_then(|tokens| count.checked_add(tokens));
            *count = tokens.filter(|&tokens| tokens <= MOST_TOKENS).ok_or(CountOverflow)?;
            for (sum, &value) in sums.iter_mut().zip(added) {
                *sum += f64::from(value) * f64::from(scale);
            }
        }
        Ok(())
    }

    /// Gives each of `matrices` matrices the count that stood for all of them.
    fn split_count(&mut self, matrices: usize) {
        let count = self.counts[0];
        let row_len = self.sums.len() / matrices;
        self.counts = vec![count; matrices];
        for (sums, count) in self.sums.chunks_exact_mut(row_len).zip(&mut self.counts) {
            if is_filler(sums.iter().copied(), *count) {
                sums.fill(0.0);
                *count = 0;
            }
        }
    }
}

/// True for a matrix whose mean squares are all exactly 1: what llama-imatrix writes into a legacy file for an
/// expert that saw no token. Where counts per expert are known again, such a matrix must not weigh in.
fn is_filler(mut sums: impl Iterator<Item = f64>, count: u64) -> bool {
    sums.all(|sum| sum == count as f64)
}

fn fingerprint(imatrix: &Imatrix) -> u64 {
    let mut hasher = DefaultHasher::new();
    for (name, entry) in &imatrix.entries {
        name.hash(&mut hasher);
        entry.counts.hash(&mut hasher);
        for sum in &entry.sums {
            hasher.write_u32(sum.to_bits());
        }
    }
    hasher.finish()
}
