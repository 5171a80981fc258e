//! What the loss makes of errors at the outputs of a matrix.

use rayon::prelude::*;

use super::super::error::FeedbackError;
use super::super::factor::Factor;
use super::super::moment::{SecondMoment, zeros};
use super::super::scaled::damped_moment;
use crate::compute::{GemmOperand, gemm_f32};

/// Damping of the moments of gradients. On a model of 4 million weights .02 to .3 are within 2 per cent of each other.
pub const OUTPUT_DAMPING: f64 = 0.1;

/// Rows that a task handles.
const TASK_ROWS: usize = 64;

/// The second moment of the gradients at a matrix's outputs, `H_O = mean of g g^T`, damped and factored: an error `e` of the
/// outputs costs `e^T H_O e`. Units do not matter: the mean of the diagonal is one.
#[derive(Clone, Debug)]
pub struct OutputFactor {
    m: usize,
    /// `A^T` of `H_O = (I + A) D (I + A)^T`, row-major `[m, m]`, strictly lower triangular: element k of row i says how row i
    /// answers for an error of row k before it.
    before: Vec<f32>,
    /// D.
    weights: Vec<f32>,
    /// `H_O[i, k] / H_O[i, i]`, row-major `[m, m]`, zeros on the diagonal.
    others: Vec<f32>,
    damping: f64,
}

impl OutputFactor {
    /// Factors the moment of m gradients as [`Factor::new`] does. Takes `8 m^2` bytes.
    ///
    /// # Errors
    /// [`FeedbackError::TooLarge`] when there is no memory for it.
    pub fn new(moment: &SecondMoment, damping: f64) -> Result<OutputFactor, FeedbackError> {
        let m = moment.n();
        let factor = Factor::new(moment, damping)?;
        let (mut before, mut others) = (zeros(m)?, zeros(m)?);
        if let (Some(a), Some(damped)) = (factor.feedback(), damped_moment(moment, factor.damping_used())?) {
            let rows = before.par_chunks_exact_mut(m).zip(others.par_chunks_exact_mut(m)).enumerate();
            rows.for_each(|(i, (before, others))| {
                for (k, (before, other)) in before.iter_mut().zip(others).enumerate() {
                    *before = if k < i { a[k * m + i] } else { 0.0 };
                    *other = if k == i { 0.0 } else { damped[i.min(k) * m + i.max(k)] / damped[i * m + i] };
                }
            });
        }
        Ok(OutputFactor { m, before, weights: factor.weights().to_vec(), others, damping: factor.damping_used() })
    }

    /// Outputs.
    pub fn m(&self) -> usize {
        self.m
    }

    /// The damping that led to success.
    pub fn damping_used(&self) -> f64 {
        self.damping
    }

    /// D.
    pub(super) fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// What rows `first..first + rows` have of the errors `earlier` of rows before them, `[.., columns]`, added to `out`.
    pub(super) fn add_earlier(&self, first: usize, earlier: &[f32], columns: usize, out: &mut [f32]) {
        add_rows(&self.before, self.m, first, earlier, columns, out);
    }

    /// As [`Self::add_earlier`] with `H_O[i, k] / H_O[i, i]`.
    pub(super) fn add_changes(&self, first: usize, earlier: &[f32], columns: usize, out: &mut [f32]) {
        add_rows(&self.others, self.m, first, earlier, columns, out);
    }

    /// How row `row` answers for errors of the rows before it, in LDL order.
    pub(super) fn before(&self, row: usize) -> &[f32] {
        &self.before[row * self.m..][..row]
    }

    /// `H_O[i, k] / H_O[i, i]` for row i.
    pub(super) fn others(&self, row: usize) -> &[f32] {
        &self.others[row * self.m..][..self.m]
    }

    /// The rows of [`Self::others`] from `first` on.
    pub(super) fn others_from(&self, first: usize) -> &[f32] {
        &self.others[first * self.m..]
    }

    /// `(I + A)^T E` for the errors E of all rows, `[m, n]`.
    pub(super) fn carried(&self, errors: &[f32]) -> Vec<f32> {
        let n = errors.len() / self.m.max(1);
        let mut carried = errors.to_vec();
        carried.par_chunks_mut((TASK_ROWS * n).max(1)).enumerate().for_each(|(task, rows)| {
            let first = task * TASK_ROWS;
            let count = rows.len() / n;
            // What lies above the diagonal is zero.
            let earlier = GemmOperand::Plain { data: errors, stride: n };
            gemm_f32(count, n, first + count, &self.before[first * self.m..], self.m, earlier, rows, n, true);
        });
        carried
    }

    /// `sqrt(D) (I + A)^T E`: rows whose losses by themselves add up to that of E.
    pub(in crate::rounding::gptq) fn weighed(&self, errors: &[f32]) -> Vec<f32> {
        let n = errors.len() / self.m.max(1);
        let mut rows = self.carried(errors);
        for (row, weight) in rows.chunks_exact_mut(n.max(1)).zip(&self.weights) {
            let root = weight.sqrt();
            row.iter_mut().for_each(|value| *value *= root);
        }
        rows
    }

    /// `sum of e^T H_O e` over errors of outputs `e`, `[tokens, m]`.
    pub(in crate::rounding::gptq) fn squared(&self, errors: &[f32]) -> f64 {
        let m = self.m;
        let of_tokens = |errors: &[f32]| -> f64 {
            let mut carried = errors.to_vec();
            let right = GemmOperand::Transposed { data: &self.before, stride: m };
            gemm_f32(errors.len() / m, m, m, errors, m, right, &mut carried, m, true);
            let weighed = |row: &[f32]| -> f64 {
                row.iter().zip(&self.weights).map(|(e, d)| f64::from(*e) * f64::from(*e) * f64::from(*d)).sum()
            };
            carried.chunks_exact(m).map(weighed).sum()
        };
        let sums: Vec<f64> = errors.par_chunks((TASK_ROWS * m).max(1)).map(of_tokens).collect();
        sums.iter().sum()
    }
}

/// Adds rows `first..` of a matrix `[m, m]`, as far as they are of rows before `first`, times `earlier`, `[.., columns]`.
fn add_rows(matrix: &[f32], m: usize, first: usize, earlier: &[f32], columns: usize, out: &mut [f32]) {
    let rows = out.len() / columns;
    let earlier = GemmOperand::Plain { data: earlier, stride: columns };
    gemm_f32(rows, columns, first, &matrix[first * m..], m, earlier, out, columns, true);
}
