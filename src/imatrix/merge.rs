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
        for (name, entry) in imatrix.stored_entries() {
            self.add_entry(&name, entry, scale, origin)
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
            merged.insert_stored(name, Entry { sums, counts: accumulated.counts });
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
    for (name, entry) in imatrix.stored_entries() {
        name.hash(&mut hasher);
        entry.counts.hash(&mut hasher);
        for sum in &entry.sums {
            hasher.write_u32(sum.to_bits());
        }
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn imatrix(entries: &[(&str, &[f32], &[u64])]) -> Imatrix {
        Imatrix {
            entries: entries
                .iter()
                .map(|(name, sums, counts)| {
                    ((*name).to_owned(), Entry { sums: sums.to_vec(), counts: counts.to_vec() })
                })
                .collect(),
            datasets: vec!["text".into()],
            chunk_size: Some(16),
            chunk_count: Some(1),
            ..Imatrix::default()
        }
    }

    fn legacy(entries: &[(&str, &[f32], &[u64])]) -> Imatrix {
        Imatrix { form: Form::Dat, chunk_size: None, ..imatrix(entries) }
    }

    fn merge(inputs: &[Imatrix]) -> Result<(Imatrix, Vec<Warning>), ImatrixError> {
        let mut merger = Merger::new(MergeOptions { legacy_chunk_size: 10 });
        let mut warnings = Vec::new();
        for (number, input) in inputs.iter().enumerate() {
            warnings.extend(merger.add(&format!("part{number}"), input)?);
        }
        let merged = merger.finish()?;
        warnings.extend(merged.warnings.clone());
        Ok((merged, warnings))
    }

    #[track_caller]
    fn refused(inputs: &[Imatrix], expected: &str) {
        let error = merge(inputs).expect_err("contradicting files were merged").to_string();
        assert!(error.contains(expected) && error.contains("part") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn sums_and_counts_are_added_per_expert() {
        let a = imatrix(&[("w", &[1.0, 2.0, 0.0, 0.0], &[10, 0])]);
        let b = imatrix(&[("w", &[0.5, 0.5, 3.0, 4.0], &[30, 5])]);
        let (merged, warnings) = merge(&[a, b]).unwrap();
        assert_eq!(merged.entries["w"], Entry { sums: vec![1.5, 2.5, 3.0, 4.0], counts: vec![40, 5] });
        assert_eq!((merged.chunk_count, merged.chunk_size), (Some(2), Some(16)));
        assert_eq!(merged.datasets, ["text"]);
        assert_eq!(warnings, []);
    }

    #[test]
    fn shards_give_the_values_of_a_single_run() {
        // Squares of many magnitudes; each shard rounds its own sum to f32 once.
        let squares: Vec<f64> = (0..4096).map(|i| (f64::from(i) * 0.7).sin().powi(2) * 10f64.powi(i % 7 - 3)).collect();
        let total: f64 = squares.iter().sum();
        for shards in [2, 8, 64] {
            let inputs: Vec<_> = squares
                .chunks(4096 / shards)
                .map(|part| imatrix(&[("w", &[part.iter().sum::<f64>() as f32], &[part.len() as u64])]))
                .collect();
            let (merged, _) = merge(&inputs).unwrap();
            let relative = (f64::from(merged.entries["w"].sums[0]) - total).abs() / total;
            assert!(relative < 1.2e-7, "{shards} shards: {relative}");
            assert_eq!(merged.entries["w"].counts, [4096]);
        }
    }

    #[test]
    fn one_input_comes_out_as_it_was() {
        let a = imatrix(&[("v", &[0.1, 1e-30, 3e38], &[7]), ("w", &[0.0], &[0])]);
        let (merged, warnings) = merge(std::slice::from_ref(&a)).unwrap();
        assert_eq!((merged.entries, warnings), (a.entries, vec![]));
    }

    #[test]
    fn legacy_inputs_count_their_calls_in_chunks() {
        let a = legacy(&[("w", &[6.0, 2.0], &[2])]);
        let b = imatrix(&[("w", &[30.0, 10.0], &[80])]);
        let (merged, warnings) = merge(&[a, b]).unwrap();
        assert_eq!(merged.entries["w"], Entry { sums: vec![90.0, 30.0], counts: vec![100] });
        assert_eq!(warnings[0], Warning::AssumedChunkSize { file: "part0".into(), chunk_size: 10 });
        assert_eq!(warnings[1], Warning::ChunkSizes { file: "part1".into(), found: 16, kept: 10 });
    }

    #[test]
    fn a_single_count_serves_all_experts_but_fillers_weigh_nothing() {
        let single = legacy(&[("w", &[6.0, 2.0, 2.0, 2.0], &[2])]);
        let counted = imatrix(&[("w", &[3.0, 4.0, 5.0, 6.0], &[10, 20])]);
        let expected = Entry { sums: vec![63.0, 24.0, 5.0, 6.0], counts: vec![30, 20] };
        let (merged, warnings) = merge(&[single.clone(), counted.clone()]).unwrap();
        assert_eq!(merged.entries["w"], expected);
        assert!(warnings.contains(&Warning::SingleCounts { entries: 1, first: "w".into() }), "{warnings:?}");
        let (merged, _) = merge(&[counted, single]).unwrap();
        assert_eq!(merged.entries["w"], expected);
    }

    #[test]
    fn files_of_other_models_are_refused() {
        let a = imatrix(&[("w", &[1.0, 2.0], &[10])]);
        refused(&[a.clone(), imatrix(&[("w", &[1.0, 2.0, 3.0], &[10])])], "\"w\" has 3 values, 2 in part0");
        let six = |counts: &[u64]| imatrix(&[("w", &[1.0; 6], counts)]);
        refused(&[six(&[1, 1]), six(&[1, 1, 1])], "\"w\" has 3 counts, 2 in part0");
        assert!(matches!(merge(&[]), Err(ImatrixError::Merge { problem: MergeProblem::NoInput, .. })));
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        let large = imatrix(&[("w", &[1.0], &[MOST_TOKENS])]);
        assert!(merge(std::slice::from_ref(&large)).is_ok());
        refused(&[large, imatrix(&[("w", &[2.0], &[1])])], "the count of weight \"w\" would pass 2^53");
        let legacy_large = legacy(&[("w", &[1.0], &[u64::from(u32::MAX) << 22])]);
        refused(&[legacy_large], "would pass 2^53");
        let full = imatrix(&[("w", &[f32::MAX], &[1])]);
        refused(&[full.clone(), full], "value 0 of weight \"w\" would pass the range of f32");
    }

    #[test]
    fn odd_inputs_are_warned_about() {
        let a = imatrix(&[("v", &[1.0], &[10]), ("w", &[1.0], &[10])]);
        let (_, warnings) = merge(&[a.clone(), a.clone()]).unwrap();
        assert_eq!(warnings, [Warning::SameContent { file: "part1".into(), earlier: "part0".into() }]);
        let mut b = imatrix(&[("w", &[2.0], &[10])]);
        b.chunk_size = Some(32);
        b.datasets = vec!["text".into(), "more".into()];
        let (merged, warnings) = merge(&[a, b]).unwrap();
        assert_eq!(
            warnings,
            [
                Warning::ChunkSizes { file: "part1".into(), found: 32, kept: 16 },
                Warning::PartlyPresent { entries: 1, first: "v".into() },
            ]
        );
        assert_eq!(merged.datasets, ["text", "more"]);
    }

    #[test]
    fn entries_for_plans_are_summed_and_stay_apart() {
        let mut a = imatrix(&[("w", &[1.0, 2.0], &[4])]);
        a.planning = imatrix(&[("output.weight", &[3.0, 5.0], &[4])]).entries;
        let mut merger = Merger::new(MergeOptions::default());
        merger.add("a", &a).unwrap();
        let mut b = a.clone();
        b.planning.get_mut("output.weight").unwrap().sums[0] = 4.0;
        merger.add("b", &b).unwrap();
        let merged = merger.finish().unwrap();
        assert_eq!(merged.planning["output.weight"], Entry { sums: vec![7.0, 10.0], counts: vec![8] });
        let mut bytes = Vec::new();
        merged.write(Form::Gguf, &mut bytes).unwrap();
        let read = Imatrix::from_bytes(&bytes, "merged").unwrap();
        assert_eq!((&read.planning, &read.entries), (&merged.planning, &merged.entries));
        assert!(read.with_planning().entries.contains_key("output.weight"));
    }
}
