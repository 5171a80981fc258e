//! Inputs that rounded weights are judged by.

use rayon::prelude::*;

use super::corrected::CorrectedRows;
use super::moment::{Cap, SecondMoment, lengths};
use super::two_sided::OutputFactor;
use crate::compute::{GemmOperand, gemm_f32};

/// Inputs of one or several weights that had no part in their rounding.
#[derive(Clone, Debug)]
pub enum JudgedInputs {
    /// Their second moment.
    Moment(SecondMoment),
    /// The inputs themselves: less than their second moment where they are fewer than the width.
    Rows(InputRows),
    /// The inputs in the model and in what is rounded of it so far.
    Corrected(CorrectedRows),
}

impl JudgedInputs {
    /// Inputs that were added, without those left out.
    pub fn tokens(&self) -> u64 {
        match self {
            JudgedInputs::Moment(moment) => moment.tokens(),
            JudgedInputs::Rows(rows) => rows.tokens() as u64,
            JudgedInputs::Corrected(rows) => rows.tokens() as u64,
        }
    }

    /// Mean square of each input; zeros without tokens.
    pub fn diagonal(&self) -> Vec<f32> {
        match self {
            JudgedInputs::Moment(moment) => moment.diagonal(),
            JudgedInputs::Rows(rows) => rows.diagonal(),
            JudgedInputs::Corrected(rows) => rows.diagonal(),
        }
    }

    /// Mean square change of the outputs by rounding weights `original` to `rounded`, both row-major `[rows, n]`, see
    /// [`SecondMoment::loss`]. `first` is the number of the first row in its matrix.
    ///
    /// # Panics
    /// When the two have different lengths or are not whole rows.
    pub fn loss(&self, first: usize, original: &[f32], rounded: &[f32]) -> f64 {
        match self {
            JudgedInputs::Moment(moment) => moment.loss(original, rounded),
            JudgedInputs::Rows(rows) => rows.loss(original, rounded),
            JudgedInputs::Corrected(rows) => rows.loss(first, original, rounded),
        }
    }

    /// As [`Self::loss`] for all rows of a matrix, with the squares of outputs as `outputs` weighs them: the mean of
    /// `e^T H_O e` over the changes `e` of all outputs.
    ///
    /// # Panics
    /// When there are other rows than outputs, or as [`Self::loss`].
    pub fn weighed_loss(&self, outputs: &OutputFactor, original: &[f32], rounded: &[f32]) -> f64 {
        if let JudgedInputs::Corrected(rows) = self {
            return rows.weighed_loss(outputs, original, rounded);
        }
        assert_eq!(original.len(), rounded.len(), "weights and rounded weights");
        let errors: Vec<f32> = original.par_iter().zip(rounded).map(|(w, q)| w - q).collect();
        let weighed = outputs.weighed(&errors);
        self.loss(0, &weighed, &vec![0.0; weighed.len()])
    }
}

impl From<SecondMoment> for JudgedInputs {
    fn from(moment: SecondMoment) -> JudgedInputs {
        JudgedInputs::Moment(moment)
    }
}

/// Inputs, scaled down where [`SecondMoment::accumulate`] would do it and without those that it would leave out.
#[derive(Clone, Debug)]
pub struct InputRows {
    n: usize,
    /// Row-major `[tokens, n]`.
    rows: Vec<f32>,
    cap: Cap,
}

impl InputRows {
    /// No inputs yet, of `n` values.
    ///
    /// # Panics
    /// When `n` is 0.
    pub fn new(n: usize) -> InputRows {
        assert!(n > 0, "inputs without values");
        InputRows { n, rows: Vec::new(), cap: Cap::default() }
    }

    /// Adds the inputs `rows`, row-major `[tokens, n]`.
    ///
    /// # Panics
    /// When `rows` is not whole rows.
    pub fn accumulate(&mut self, rows: &[f32]) {
        let n = self.n;
        assert!(rows.len().is_multiple_of(n), "{} values are not rows of {n}", rows.len());
        let lengths = lengths(rows, n);
        self.cap.update(&lengths);
        let first = self.rows.len();
        self.rows.extend_from_slice(rows);
        cap_rows(self.cap, n, &mut self.rows, first);
    }

    /// Inputs that were added, without those left out.
    pub fn tokens(&self) -> usize {
        self.rows.len() / self.n
    }

    /// The inputs, row-major `[tokens, n]`.
    pub fn rows(&self) -> &[f32] {
        &self.rows
    }

    fn diagonal(&self) -> Vec<f32> {
        let mut squares = vec![0.0f64; self.n];
        for row in self.rows.chunks_exact(self.n) {
            squares.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x) * f64::from(*x));
        }
        squares.iter().map(|sum| (sum / self.tokens().max(1) as f64) as f32).collect()
    }

    fn loss(&self, original: &[f32], rounded: &[f32]) -> f64 {
        assert_eq!(original.len(), rounded.len(), "weights and rounded weights");
        assert!(original.len().is_multiple_of(self.n), "{} values are not rows of {}", original.len(), self.n);
        let errors: Vec<f32> = original.par_iter().zip(rounded).map(|(w, q)| w - q).collect();
        squared_outputs(&errors, &self.rows, self.n) / self.tokens().max(1) as f64
    }
}

/// Scales rows `[.., n]` down that are too long, and drops those that are not finite, from the value `first` on.
pub(super) fn cap_rows(cap: Cap, n: usize, rows: &mut Vec<f32>, first: usize) {
    let mut kept = first;
    for (at, length) in (first..).step_by(n).zip(lengths(&rows[first..], n)) {
        if length.is_finite() {
            let factor = cap.factor(length) as f32;
            rows[at..at + n].iter_mut().for_each(|x| *x *= factor);
            rows.copy_within(at..at + n, kept);
            kept += n;
        }
    }
    rows.truncate(kept);
}

/// Tokens of one task.
const TASK_TOKENS: usize = 512;

/// Rows of errors that they are multiplied with at once.
const ROWS_AT_ONCE: usize = 256;

/// Sum of the squares of all products of rows of `errors` with rows of `tokens`, both `[.., n]`. Uses rayon's current
/// pool, with the same result for any number of threads.
pub(super) fn squared_outputs(errors: &[f32], tokens: &[f32], n: usize) -> f64 {
    let of_tokens = |tokens: &[f32]| -> f64 {
        let count = tokens.len() / n;
        let mut outputs = vec![0.0f32; count * ROWS_AT_ONCE.min(errors.len() / n)];
        let of_rows = |errors: &[f32]| -> f64 {
            let rows = errors.len() / n;
            let outputs = &mut outputs[..count * rows];
            let transposed = GemmOperand::Transposed { data: errors, stride: n };
            gemm_f32(count, rows, n, tokens, n, transposed, outputs, rows, false);
            outputs.iter().map(|y| f64::from(*y) * f64::from(*y)).sum()
        };
        errors.chunks(ROWS_AT_ONCE * n).map(of_rows).sum()
    };
    let sums: Vec<f64> = tokens.par_chunks(TASK_TOKENS * n).map(of_tokens).collect();
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{inputs, noise};
    use super::*;

    #[test]
    fn outputs_are_those_of_a_plain_loop() {
        for (n, rows, count) in [(40, 19, 33), (8, 2 * ROWS_AT_ONCE + 3, 2 * TASK_TOKENS + 5)] {
            let (errors, x) = (noise(rows * n, 11), noise(count * n, 12));
            let mut expected = 0.0;
            for error in errors.chunks_exact(n) {
                for x in x.chunks_exact(n) {
                    let y: f64 = error.iter().zip(x).map(|(e, x)| f64::from(*e) * f64::from(*x)).sum();
                    expected += y * y;
                }
            }
            let found = squared_outputs(&errors, &x, n);
            assert!((found / expected - 1.0).abs() < 1e-5, "{found} for {expected}");
        }
    }

    #[test]
    fn rows_judge_as_their_moment_does() {
        let n = 64;
        let mut x = inputs(90, n, 1);
        // One that is too long, and one that is not finite.
        x[3 * n..4 * n].iter_mut().for_each(|x| *x *= 100.0);
        x[50 * n] = f32::NAN;
        let (mut moment, mut rows) = (SecondMoment::new(n).unwrap(), InputRows::new(n));
        // The second part is too small for a median of its own.
        for part in [&x[..70 * n], &x[70 * n..]] {
            moment.accumulate(part, None);
            rows.accumulate(part);
        }
        assert!(moment.capped() > 0 && moment.skipped() == 1);
        let (moment, rows) = (JudgedInputs::from(moment), JudgedInputs::Rows(rows));
        assert_eq!((moment.tokens(), rows.tokens()), (89, 89));
        for (a, b) in moment.diagonal().iter().zip(rows.diagonal()) {
            assert!((a / b - 1.0).abs() < 1e-5, "{a} {b}");
        }
        let (w, q) = (noise(300 * n, 2), noise(300 * n, 3));
        let (a, b) = (moment.loss(0, &w, &q), rows.loss(0, &w, &q));
        assert!((a / b - 1.0).abs() < 1e-5, "{a} {b}");
    }

    #[test]
    fn no_inputs_judge_nothing() {
        let rows = JudgedInputs::Rows(InputRows::new(8));
        assert_eq!((rows.tokens(), rows.loss(0, &[1.0; 8], &[0.0; 8]), rows.diagonal()), (0, 0.0, vec![0.0; 8]));
    }
}
