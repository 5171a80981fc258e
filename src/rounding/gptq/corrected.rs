//! Targets that make up for what was rounded before.
//!
//! By the time a matrix W is rounded, its inputs are no longer the model's x but the y that the matrices before it, rounded
//! already, give; and where its outputs are added to a stream r, that stream has become s. What the rounded matrix should give
//! for y is `W x + (r - s)`. The weights that come nearest to that over all inputs are
//!
//! ```text
//! W* = W + (W C + R) H^-1,  C = sum (x - y) y^T,  R = sum (r - s) y^T,  H = sum y y^T
//! ```
//!
//! least squares as in GPTAQ (Li et al., arXiv 2504.02692), with the stream's part added. How
//! much of the difference to W is taken is chosen on inputs that had no part in the sums: with few tokens a column, full
//! strength does harm.

use rayon::prelude::*;

use super::error::FeedbackError;
use super::factor::factor_in_place;
use super::moment::{Cap, SecondMoment, lengths, zeros};
use super::two_sided::OutputFactor;
use crate::compute::{GemmOperand, gemm_f32};

/// Part of the off-diagonal of H that is given up before it is solved with: a ridge, smaller than the damping of feedback.
const RIDGE: f64 = 0.05;

/// Added to the diagonal of H, in units of its mean.
const FLOOR: f64 = 1e-6;

/// Columns that are solved together.
const BLOCK: usize = 128;

/// Rows that a task handles.
const TASK_ROWS: usize = 128;

/// Inputs of a matrix in the model and in the rounded one, of the same tokens.
#[derive(Clone, Copy, Debug)]
pub struct InputPair<'a> {
    /// In the model, `[tokens, n]`.
    pub exact: &'a [f32],
    /// In the rounded one, `[tokens, n]`.
    pub rounded: &'a [f32],
    /// The stream's difference, the model's minus the rounded one's, `[tokens, outputs]`, where the outputs are added to it.
    pub stream: Option<&'a [f32]>,
}

/// Sums over pairs of inputs.
#[derive(Clone, Debug)]
pub struct CorrectedMoment {
    /// Of the rounded inputs.
    moment: SecondMoment,
    /// `[n, n]`.
    cross: Vec<f32>,
    /// `[outputs, n]`.
    stream: Option<Vec<f32>>,
    cap: Cap,
}

impl CorrectedMoment {
    /// Sums of no inputs yet: those of `moment`, which must be empty, and differences; `outputs` is the number of rows of the
    /// matrix where these are added to the stream. Takes `4 n (n + outputs)` bytes more than the moment.
    ///
    /// # Errors
    /// [`FeedbackError::TooLarge`] when there is no memory for them.
    pub fn new(moment: SecondMoment, outputs: Option<usize>) -> Result<CorrectedMoment, FeedbackError> {
        let n = moment.n();
        let stream = outputs.map(|outputs| vec![0.0; outputs * n]);
        Ok(CorrectedMoment { cross: zeros(n)?, moment, stream, cap: Cap::default() })
    }

    /// Adds inputs; those whose rounded form is too long count as in [`SecondMoment::accumulate`].
    ///
    /// # Panics
    /// When the parts are not whole rows of the same tokens.
    pub fn accumulate(&mut self, pair: InputPair<'_>) {
        let n = self.moment.n();
        let tokens = pair.rounded.len() / n;
        assert_eq!(pair.exact.len(), pair.rounded.len(), "inputs of both models");
        let lengths = lengths(pair.rounded, n);
        self.cap.update(&lengths);
        let counts: Vec<f32> = lengths.iter().map(|length| self.count(*length)).collect();
        // Transposed, so that a row of the sums is a product of its own.
        let mut differences = vec![0.0f32; tokens * n];
        differences.par_chunks_mut(tokens.max(1)).enumerate().for_each(|(column, out)| {
            for (token, (value, count)) in out.iter_mut().zip(&counts).enumerate() {
                let at = token * n + column;
                *value = if *count > 0.0 { count * (pair.exact[at] - pair.rounded[at]) } else { 0.0 };
            }
        });
        let rounded: Vec<f32> = if counts.contains(&0.0) {
            let kept = |(row, count): (&[f32], &f32)| if *count > 0.0 { row.to_vec() } else { vec![0.0; n] };
            pair.rounded.chunks_exact(n).zip(&counts).flat_map(kept).collect()
        } else {
            pair.rounded.to_vec()
        };
        add_products(&differences, &rounded, tokens, &mut self.cross, n);
        if let (Some(sums), Some(stream)) = (&mut self.stream, pair.stream) {
            let outputs = sums.len() / n;
            assert_eq!(stream.len(), tokens * outputs, "differences of the stream");
            let mut moved = vec![0.0f32; stream.len()];
            moved.par_chunks_mut(tokens.max(1)).enumerate().for_each(|(output, out)| {
                for (token, (value, count)) in out.iter_mut().zip(&counts).enumerate() {
                    *value = if *count > 0.0 { count * stream[token * outputs + output] } else { 0.0 };
                }
            });
            add_products(&moved, &rounded, tokens, sums, n);
        }
        self.moment.accumulate(pair.rounded, None);
    }

    /// How much a row of this length counts: the square of what it is scaled by.
    fn count(&self, length: f64) -> f32 {
        if length.is_finite() { self.cap.factor(length).powi(2) as f32 } else { 0.0 }
    }

    /// The moment of the rounded inputs, and the correction at full strength; `None` where H cannot be solved with.
    ///
    /// # Errors
    /// [`FeedbackError::TooLarge`] when there is no memory for a factor.
    pub fn finish(self) -> Result<(SecondMoment, Option<Correction>), FeedbackError> {
        let CorrectedMoment { moment, mut cross, mut stream, .. } = self;
        let n = moment.n();
        let diagonal: Vec<f64> = (0..n).map(|j| f64::from(moment.upper_row(j)[0])).collect();
        let mean = diagonal.iter().sum::<f64>() / n as f64;
        if !(mean.is_finite() && mean > 0.0) {
            return Ok((moment, None));
        }
        let mut factor = zeros(n)?;
        let keep = (1.0 - RIDGE) as f32;
        factor.par_chunks_exact_mut(n).enumerate().for_each(|(i, row)| {
            let upper = moment.upper_row(i);
            row[i] = (f64::from(upper[0]) + FLOOR * mean) as f32;
            row[i + 1..].iter_mut().zip(&upper[1..]).for_each(|(target, sum)| *target = keep * sum);
        });
        let Some(pivots) = factor_in_place(&mut factor, n) else { return Ok((moment, None)) };
        solve_rows(&mut cross, &factor, &pivots);
        if let Some(stream) = &mut stream {
            solve_rows(stream, &factor, &pivots);
        }
        let is_finite = cross.par_iter().chain(stream.par_iter().flatten()).all(|value| value.is_finite());
        let correction = is_finite.then_some(Correction { n, shift: cross, stream, strength: 1.0 });
        Ok((moment, correction))
    }
}

/// `sums[i, j] += sum over t of left[i, t] * right[t, j]`, with `left` `[_, tokens]` and `right` `[tokens, n]`.
fn add_products(left: &[f32], right: &[f32], tokens: usize, sums: &mut [f32], n: usize) {
    if tokens == 0 {
        return;
    }
    sums.par_chunks_mut(TASK_ROWS * n).zip(left.par_chunks(TASK_ROWS * tokens)).for_each(|(sums, left)| {
        let rows = left.len() / tokens;
        gemm_f32(rows, n, tokens, left, tokens, GemmOperand::Plain { data: right, stride: n }, sums, n, true);
    });
}

/// Replaces rows b of `rows`, `[_, n]`, by the z with `z (I + A) D (I + A)^T = b`, for the strictly upper triangular `a`,
/// `[n, n]`, and the diagonal `d`.
fn solve_rows(rows: &mut [f32], a: &[f32], d: &[f32]) {
    let n = d.len();
    rows.par_chunks_mut(TASK_ROWS * n).for_each(|rows| {
        let count = rows.len() / n;
        let mut update = vec![0.0f32; count * BLOCK];
        let subtract = |rows: &mut [f32], update: &[f32], start: usize, columns: usize| {
            for (row, update) in rows.chunks_exact_mut(n).zip(update.chunks_exact(columns)) {
                row[start..start + columns].iter_mut().zip(update).for_each(|(value, update)| *value -= update);
            }
        };
        for start in (0..n).step_by(BLOCK).rev() {
            let columns = BLOCK.min(n - start);
            let end = start + columns;
            if end < n {
                let right = GemmOperand::Transposed { data: &a[start * n + end..], stride: n };
                let update = &mut update[..count * columns];
                gemm_f32(count, columns, n - end, &rows[end..], n, right, update, columns, false);
                subtract(rows, update, start, columns);
            }
            for row in rows.chunks_exact_mut(n) {
                for j in (start..end).rev() {
                    let sum: f32 = (j + 1..end).map(|k| a[j * n + k] * row[k]).sum();
                    row[j] -= sum;
                }
            }
        }
        for row in rows.chunks_exact_mut(n) {
            row.iter_mut().zip(d).for_each(|(value, d)| *value /= d);
        }
        for start in (0..n).step_by(BLOCK) {
            let columns = BLOCK.min(n - start);
            if start > 0 {
                let right = GemmOperand::Plain { data: &a[start..], stride: n };
                let update = &mut update[..count * columns];
                gemm_f32(count, columns, start, rows, n, right, update, columns, false);
                subtract(rows, update, start, columns);
            }
            for row in rows.chunks_exact_mut(n) {
                for k in start..start + columns {
                    let (done, rest) = row.split_at_mut(k + 1);
                    let own = done[k];
                    let of_row = &a[k * n + k + 1..k * n + start + columns];
                    rest.iter_mut().zip(of_row).for_each(|(value, a)| *value -= own * a);
                }
            }
        }
    });
}

/// What targets differ from weights by.
#[derive(Clone, Debug)]
pub struct Correction {
    n: usize,
    /// `C H^-1`, `[n, n]`.
    shift: Vec<f32>,
    /// `R H^-1`, `[outputs, n]`.
    stream: Option<Vec<f32>>,
    strength: f32,
}

impl Correction {
    /// The part of the correction that is taken, 0 to 1.
    pub fn strength(&self) -> f32 {
        self.strength
    }

    /// Targets of the rows `weights`, `[.., n]`, the first of which is row `first` of its matrix.
    ///
    /// # Panics
    /// When these are not whole rows of the matrix.
    pub fn targets(&self, first: usize, weights: &[f32]) -> Vec<f32> {
        let mut targets = self.differences(weights, |row| first + row);
        targets.par_iter_mut().zip(weights).for_each(|(target, weight)| *target = weight + self.strength * *target);
        targets
    }

    /// `W C H^-1 + R H^-1` of some rows, whose numbers in the matrix `number` gives.
    fn differences(&self, weights: &[f32], number: impl Fn(usize) -> usize) -> Vec<f32> {
        let n = self.n;
        assert!(weights.len().is_multiple_of(n), "{} values are not rows of {n}", weights.len());
        let mut differences = vec![0.0f32; weights.len()];
        let shift = GemmOperand::Plain { data: &self.shift, stride: n };
        differences.par_chunks_mut(TASK_ROWS * n).zip(weights.par_chunks(TASK_ROWS * n)).for_each(|(out, weights)| {
            gemm_f32(weights.len() / n, n, n, weights, n, shift, out, n, false);
        });
        if let Some(stream) = &self.stream {
            for (row, differences) in differences.chunks_exact_mut(n).enumerate() {
                let of_stream = &stream[number(row) * n..][..n];
                differences.iter_mut().zip(of_stream).for_each(|(difference, own)| *difference += own);
            }
        }
        differences
    }

    /// Takes the part of the correction that leaves the least squared error of outputs on `held_out`, for the rows
    /// `weights` of a matrix, whose numbers are `rows`.
    ///
    /// # Panics
    /// When `weights` are not so many rows.
    pub fn choose_strength(&mut self, weights: &[f32], rows: &[usize], held_out: &CorrectedRows) {
        let n = self.n;
        assert_eq!(weights.len(), rows.len() * n, "one number for each row");
        let difference = self.differences(weights, |row| rows[row]);
        let wanted = held_out.outputs_wanted(weights, |row| rows[row]);
        let has = held_out.outputs(&held_out.rounded, weights);
        let moved = held_out.outputs(&held_out.rounded, &difference);
        let (mut along, mut length) = (0.0f64, 0.0f64);
        for ((wanted, has), moved) in wanted.iter().zip(&has).zip(&moved) {
            along += f64::from(wanted - has) * f64::from(*moved);
            length += f64::from(*moved).powi(2);
        }
        let strength = along / length;
        self.strength = if strength.is_finite() { strength.clamp(0.0, 1.0) as f32 } else { 0.0 };
    }
}

/// Pairs of inputs that had no part in a rounding, to judge it by.
#[derive(Clone, Debug)]
pub struct CorrectedRows {
    n: usize,
    exact: Vec<f32>,
    rounded: Vec<f32>,
    /// `[tokens, outputs]`, and the number of outputs.
    stream: Option<(Vec<f32>, usize)>,
    cap: Cap,
}

impl CorrectedRows {
    /// No inputs yet, of `n` values, for a matrix of so many `outputs` where these are added to the stream.
    pub fn new(n: usize, outputs: Option<usize>) -> CorrectedRows {
        let stream = outputs.map(|outputs| (Vec::new(), outputs));
        CorrectedRows { n, exact: Vec::new(), rounded: Vec::new(), stream, cap: Cap::default() }
    }

    /// Adds inputs, scaled down or left out as in [`CorrectedMoment::accumulate`].
    pub fn accumulate(&mut self, pair: InputPair<'_>) {
        let n = self.n;
        let lengths = lengths(pair.rounded, n);
        self.cap.update(&lengths);
        for (token, length) in lengths.into_iter().enumerate().filter(|(_, length)| length.is_finite()) {
            let factor = self.cap.factor(length) as f32;
            let scaled = |rows: &[f32], width: usize| -> Vec<f32> {
                rows[token * width..][..width].iter().map(|value| value * factor).collect()
            };
            self.exact.extend(scaled(pair.exact, n));
            self.rounded.extend(scaled(pair.rounded, n));
            if let (Some((kept, outputs)), Some(stream)) = (&mut self.stream, pair.stream) {
                kept.extend(scaled(stream, *outputs));
            }
        }
    }

    /// Inputs that were added, without those left out.
    pub fn tokens(&self) -> usize {
        self.rounded.len() / self.n
    }

    /// The rounded inputs, `[tokens, n]`.
    pub fn into_rounded(self) -> Vec<f32> {
        self.rounded
    }

    /// Mean squares of the rounded inputs.
    pub(super) fn diagonal(&self) -> Vec<f32> {
        let mut squares = vec![0.0f64; self.n];
        for row in self.rounded.chunks_exact(self.n) {
            squares.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x).powi(2));
        }
        squares.iter().map(|sum| (sum / self.tokens().max(1) as f64) as f32).collect()
    }

    /// Products of all `inputs` with rows of weights, `[tokens, rows]`.
    fn outputs(&self, inputs: &[f32], weights: &[f32]) -> Vec<f32> {
        let (n, rows) = (self.n, weights.len() / self.n);
        let mut outputs = vec![0.0f32; inputs.len() / n * rows];
        let right = GemmOperand::Transposed { data: weights, stride: n };
        outputs.par_chunks_mut(TASK_ROWS * rows.max(1)).zip(inputs.par_chunks(TASK_ROWS * n)).for_each(
            |(out, inputs)| {
                gemm_f32(inputs.len() / n, rows, n, inputs, n, right, out, rows, false);
            },
        );
        outputs
    }

    /// What the outputs of rows of weights, whose numbers in the matrix `number` gives, should be: `[tokens, rows]`.
    fn outputs_wanted(&self, weights: &[f32], number: impl Fn(usize) -> usize) -> Vec<f32> {
        let mut wanted = self.outputs(&self.exact, weights);
        let rows = weights.len() / self.n;
        if let Some((stream, outputs)) = &self.stream {
            for (wanted, stream) in wanted.chunks_exact_mut(rows).zip(stream.chunks_exact(*outputs)) {
                wanted.iter_mut().enumerate().for_each(|(row, wanted)| *wanted += stream[number(row)]);
            }
        }
        wanted
    }

    /// Outputs wanted minus those of `rounded` weights, `[tokens, rows]`.
    fn output_errors(&self, first: usize, original: &[f32], rounded: &[f32]) -> Vec<f32> {
        assert_eq!(original.len(), rounded.len(), "weights and rounded weights");
        let mut wanted = self.outputs_wanted(original, |row| first + row);
        let found = self.outputs(&self.rounded, rounded);
        wanted.iter_mut().zip(&found).for_each(|(wanted, found)| *wanted -= found);
        wanted
    }

    /// Mean squared distance of the outputs of `rounded` weights from those wanted, summed over rows.
    pub(super) fn loss(&self, first: usize, original: &[f32], rounded: &[f32]) -> f64 {
        let errors = self.output_errors(first, original, rounded);
        errors.iter().map(|error| f64::from(*error).powi(2)).sum::<f64>() / self.tokens().max(1) as f64
    }

    /// The same of all rows, weighed by `outputs`.
    pub(super) fn weighed_loss(&self, outputs: &OutputFactor, original: &[f32], rounded: &[f32]) -> f64 {
        outputs.squared(&self.output_errors(0, original, rounded)) / self.tokens().max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{inputs, noise};
    use super::*;

    /// Inputs, the same moved by a part of each other, and a stream that is off.
    fn pair(tokens: usize, n: usize, outputs: usize, seed: u64) -> [Vec<f32>; 3] {
        let exact = inputs(tokens, n, seed);
        let mut rounded = exact.clone();
        for row in rounded.chunks_exact_mut(n) {
            for j in 1..n {
                row[j] += 0.1 * row[j - 1];
            }
        }
        let other = noise(tokens * n, seed + 1);
        rounded.iter_mut().zip(&other).for_each(|(x, e)| *x += 0.05 * e);
        let mut stream = noise(tokens * outputs, seed + 2);
        for (stream, x) in stream.chunks_exact_mut(outputs).zip(exact.chunks_exact(n)) {
            stream.iter_mut().enumerate().for_each(|(at, r)| *r = 0.3 * x[at] + 0.1 * *r);
        }
        [exact, rounded, stream]
    }

    fn of(parts: &[Vec<f32>; 3]) -> InputPair<'_> {
        InputPair { exact: &parts[0], rounded: &parts[1], stream: Some(&parts[2]) }
    }

    #[test]
    fn targets_give_the_outputs_that_are_wanted() {
        let (n, outputs) = (150, 20);
        let shown = pair(2000, n, outputs, 1);
        let mut moment = CorrectedMoment::new(SecondMoment::new(n).unwrap(), Some(outputs)).unwrap();
        moment.accumulate(of(&shown));
        let (sums, correction) = moment.finish().unwrap();
        let mut plain = SecondMoment::new(n).unwrap();
        plain.accumulate(&shown[1], None);
        assert_eq!(sums.diagonal(), plain.diagonal());
        let mut correction = correction.unwrap();
        let mut judge = CorrectedRows::new(n, Some(outputs));
        judge.accumulate(of(&pair(500, n, outputs, 7)));
        let weights = noise(outputs * n, 9);
        let rows: Vec<usize> = (0..outputs).collect();
        correction.choose_strength(&weights, &rows, &judge);
        assert!(correction.strength() > 0.9, "{}", correction.strength());
        let targets = correction.targets(0, &weights);
        let (before, after) = (judge.loss(0, &weights, &weights), judge.loss(0, &weights, &targets));
        assert!(after < 0.2 * before, "{after} of {before}");
        // Rows by themselves are those of the whole.
        assert_eq!(correction.targets(3, &weights[3 * n..5 * n]), targets[3 * n..5 * n]);
    }

    #[test]
    fn rows_are_solved() {
        let n = 300;
        let mut moment = SecondMoment::new(n).unwrap();
        moment.accumulate(&inputs(900, n, 3), None);
        let mean = moment.diagonal().iter().sum::<f32>() / n as f32 * moment.weight() as f32;
        let mut a = vec![0.0; n * n];
        for i in 0..n {
            a[i * n + i..][..n - i].copy_from_slice(moment.upper_row(i));
            a[i * n + i] += 0.01 * mean;
        }
        let full: Vec<f32> = (0..n * n).map(|at| a[(at / n).min(at % n) * n + (at / n).max(at % n)]).collect();
        let d = factor_in_place(&mut a, n).unwrap();
        let b = noise(3 * n, 5);
        let mut z = b.clone();
        solve_rows(&mut z, &a, &d);
        for (z, b) in z.chunks_exact(n).zip(b.chunks_exact(n)) {
            for j in 0..n {
                let found: f64 = (0..n).map(|k| f64::from(z[k]) * f64::from(full[k * n + j])).sum();
                assert!((found - f64::from(b[j])).abs() < 1e-3, "{found} for {}", b[j]);
            }
        }
    }

    #[test]
    fn unlike_text_takes_no_correction() {
        let n = 64;
        let mut moment = CorrectedMoment::new(SecondMoment::new(n).unwrap(), None).unwrap();
        let [exact, rounded, _] = pair(70, n, 1, 1);
        moment.accumulate(InputPair { exact: &exact, rounded: &rounded, stream: None });
        let mut correction = moment.finish().unwrap().1.unwrap();
        // Differences of the other sign.
        let mut judge = CorrectedRows::new(n, None);
        judge.accumulate(InputPair { exact: &rounded, rounded: &exact, stream: None });
        let weights = noise(4 * n, 9);
        correction.choose_strength(&weights, &[0, 1, 2, 3], &judge);
        assert_eq!(correction.strength(), 0.0);
        assert_eq!(correction.targets(0, &weights), weights);
    }

    #[test]
    fn inputs_that_are_not_finite_are_left_out() {
        let (n, outputs) = (40, 8);
        let clean = pair(90, n, outputs, 4);
        let mut spoilt = clean.clone();
        for (part, width) in spoilt.iter_mut().zip([n, n, outputs]) {
            part.extend(vec![f32::NAN; width]);
        }
        let sums = |parts: &[Vec<f32>; 3]| {
            let mut moment = CorrectedMoment::new(SecondMoment::new(n).unwrap(), Some(outputs)).unwrap();
            moment.accumulate(of(parts));
            moment.finish().unwrap().1.unwrap()
        };
        let (a, b) = (sums(&clean), sums(&spoilt));
        for (a, b) in a.shift.iter().zip(&b.shift) {
            assert!((a - b).abs() < 1e-4, "{a} {b}");
        }
        assert!(b.stream.unwrap().iter().all(|value| value.is_finite()));
    }
}
