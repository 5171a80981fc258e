//! Collecting importance: sums of squares of the inputs of every weight matrix.

use std::collections::BTreeMap;

use rayon::prelude::*;

use super::{Entry, Form, Imatrix};
use crate::model::{ModelError, TapInput, Taps};
use crate::recipe::roles::{self, OUTPUT_WEIGHT, TOKEN_EMBD_WEIGHT};

/// Columns per task. Each column is summed by one thread, in the order of the tokens, so that neither the number of
/// threads nor the size of a group changes a sum.
const COLUMNS_PER_TASK: usize = 256;

/// Sums of one input, shared by all weights that it feeds.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct InputSums {
    /// The weights that have this input, such as q, k and v of a layer.
    pub weights: Vec<String>,
    /// Σ x² per column, `[matrices, row_len]` row-major.
    pub sums: Vec<f64>,
    /// Rows that entered, per matrix.
    pub counts: Vec<u64>,
}

/// A tap that adds up the squares of all inputs of block weights (llama-imatrix's `collect_imatrix`), in double
/// precision: a run that was stopped and continued ends with the same sums.
#[derive(Debug, Clone, Default)]
pub struct ImportanceCollector {
    /// Sums by the first weight that the input feeds.
    inputs: BTreeMap<String, InputSums>,
    process_output: bool,
}

impl ImportanceCollector {
    /// A collector of block weights and, for plans, of the output matrix. With `process_output` the entry of
    /// `output.weight` is an ordinary one, as llama-imatrix makes it.
    pub fn new(process_output: bool) -> ImportanceCollector {
        ImportanceCollector { inputs: BTreeMap::new(), process_output }
    }

    /// Goes on from sums that were saved.
    pub(super) fn resume(inputs: Vec<InputSums>, process_output: bool) -> ImportanceCollector {
        let keyed = inputs.into_iter().filter_map(|input| Some((input.weights.first()?.clone(), input)));
        ImportanceCollector { inputs: keyed.collect(), process_output }
    }

    /// The sums so far.
    pub(super) fn inputs(&self) -> impl ExactSizeIterator<Item = &InputSums> {
        self.inputs.values()
    }

    /// The importance matrix of everything seen so far.
    pub fn to_imatrix(&self, datasets: Vec<String>, chunk_count: u32, chunk_size: u32) -> Imatrix {
        let mut imatrix = Imatrix {
            datasets,
            chunk_count: Some(chunk_count),
            chunk_size: Some(chunk_size),
            form: Form::Gguf,
            ..Imatrix::default()
        };
        for input in self.inputs.values() {
            let sums: Vec<f32> = input.sums.iter().map(|sum| *sum as f32).collect();
            for weight in &input.weights {
                let entry = Entry { sums: sums.clone(), counts: input.counts.clone() };
                let ordinary = roles::is_in_block(weight) || (self.process_output && weight == OUTPUT_WEIGHT);
                let entries = if ordinary { &mut imatrix.entries } else { &mut imatrix.planning };
                entries.insert(weight.clone(), entry);
            }
        }
        imatrix
    }
}

impl Taps for ImportanceCollector {
    fn wants(&self, tensor: &str) -> bool {
        roles::is_in_block(tensor) || tensor == OUTPUT_WEIGHT || tensor == TOKEN_EMBD_WEIGHT
    }

    fn input(&mut self, input: &TapInput<'_>) -> Result<(), ModelError> {
        let wanted: Vec<&str> = input.tensors.iter().copied().filter(|name| self.wants(name)).collect();
        let Some(first) = wanted.first() else { return Ok(()) };
        let (width, matrices) = (input.rows.width(), input.expert.map_or(1, |expert| expert.count));
        let slot = self.inputs.entry((*first).to_owned()).or_insert_with(|| InputSums {
            weights: wanted.iter().map(|name| (*name).to_owned()).collect(),
            sums: vec![0.0; width * matrices],
            counts: vec![0; matrices],
        });
        let matrix = input.expert.map_or(0, |expert| expert.index);
        let fits = slot.sums.len() == width * slot.counts.len() && matrix < slot.counts.len();
        if !fits || slot.counts.len() != matrices {
            let reason = format!("inputs of {first} changed their shape between two blocks");
            return Err(ModelError::BadInput { reason });
        }
        slot.counts[matrix] += input.rows.len() as u64;
        let sums = &mut slot.sums[matrix * width..][..width];
        sums.par_chunks_mut(COLUMNS_PER_TASK).enumerate().for_each(|(task, sums)| {
            let start = task * COLUMNS_PER_TASK;
            for row in input.rows.iter() {
                for (sum, x) in sums.iter_mut().zip(&row[start..]) {
                    *sum += f64::from(*x) * f64::from(*x);
                }
            }
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Expert, Rows};

    fn tap<'a>(tensors: &'a [&'a str], data: &'a [f32], width: usize, expert: Option<Expert>) -> TapInput<'a> {
        TapInput { tensors, layer: Some(0), expert, rows: Rows::new(data, width) }
    }

    #[test]
    fn shared_inputs_are_summed_once_and_listed_for_each_weight() {
        let mut collector = ImportanceCollector::new(false);
        let names = ["blk.0.attn_q.weight", "blk.0.attn_k.weight"];
        collector.input(&tap(&names, &[1.0, 2.0, 3.0, -4.0], 2, None)).unwrap();
        collector.input(&tap(&names, &[0.5, 0.0], 2, None)).unwrap();
        let imatrix = collector.to_imatrix(vec!["a.txt".into()], 1, 3);
        assert_eq!(imatrix.entries.len(), 2);
        for name in names {
            assert_eq!(imatrix.entries[name], Entry { sums: vec![10.25, 20.0], counts: vec![3] });
        }
    }

    #[test]
    fn experts_count_their_own_rows() {
        let mut collector = ImportanceCollector::new(false);
        let names = ["blk.0.ffn_up_exps.weight"];
        let expert = |index| Some(Expert { index, count: 3 });
        collector.input(&tap(&names, &[1.0, 1.0, 2.0, 2.0], 2, expert(2))).unwrap();
        collector.input(&tap(&names, &[3.0, 0.0], 2, expert(0))).unwrap();
        let entry = &collector.to_imatrix(Vec::new(), 1, 2).entries[names[0]];
        assert_eq!(entry.counts, [1, 0, 2]);
        assert_eq!(entry.sums, [9.0, 0.0, 0.0, 0.0, 5.0, 5.0]);
    }

    #[test]
    fn the_output_is_an_ordinary_entry_only_when_wanted() {
        for (name, wanted) in
            [(OUTPUT_WEIGHT, false), (OUTPUT_WEIGHT, true), (TOKEN_EMBD_WEIGHT, false), (TOKEN_EMBD_WEIGHT, true)]
        {
            let mut collector = ImportanceCollector::new(wanted);
            collector.input(&tap(&[name], &[1.0], 1, None)).unwrap();
            let imatrix = collector.to_imatrix(Vec::new(), 1, 8);
            let ordinary = wanted && name == OUTPUT_WEIGHT;
            assert_eq!((imatrix.entries.len(), imatrix.planning.len()), (ordinary.into(), (!ordinary).into()));
            assert_eq!(imatrix.with_planning().entries.len(), 1);
        }
    }

    #[test]
    fn block_boundaries_do_not_change_the_sums() {
        let data: Vec<f32> = (0..7 * 300).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.173).collect();
        let names = ["blk.1.ffn_down.weight"];
        let mut whole = ImportanceCollector::new(false);
        whole.input(&tap(&names, &data, 300, None)).unwrap();
        let mut parts = ImportanceCollector::new(false);
        for part in data.chunks(600) {
            parts.input(&tap(&names, part, 300, None)).unwrap();
        }
        assert_eq!(whole.inputs().next(), parts.inputs().next());
    }
}
