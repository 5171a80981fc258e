//! Second moments of a layer's inputs.

use rayon::prelude::*;

use super::columns::{TILE, rows_at_once};
use super::error::FeedbackError;
use crate::compute::{GemmOperand, Precision, accumulate_second_moment, gemm_f32};

/// Inputs longer than this many times the median length of their block are scaled down to it: a few tokens, such as
/// the first of a text, reach hundreds of times the length of all others and would own the sum.
const LONGEST: f64 = 3.0;

/// Rows needed for a median of their lengths.
const ROWS_FOR_MEDIAN: usize = 32;

/// Rows scaled at a time.
const CHUNK_TOKENS: usize = 2048;

/// Sums of `x x^T` over the inputs `x` of a weight matrix.
#[doc(alias = "Hessian")]
#[doc(alias = "covariance")]
#[doc(alias = "Gram matrix")]
#[derive(Clone, Debug)]
pub struct SecondMoment {
    n: usize,
    /// Arithmetic of the products.
    precision: Precision,
    /// Row-major `[n, n]`; what is below the diagonal counts for nothing.
    sums: Vec<f32>,
    /// Sum of the weights of all tokens.
    weight: f64,
    tokens: u64,
    skipped: u64,
    capped: u64,
    /// `None` where inputs are added as they are.
    cap: Option<Cap>,
}

/// Which inputs are too long.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cap {
    /// Longest input that is left alone, from the last block that had enough rows.
    limit: Option<f64>,
}

impl Cap {
    /// Goes by the median of these lengths, if they are enough.
    pub(super) fn update(&mut self, lengths: &[f64]) {
        if let Some(median) = median(lengths) {
            self.limit = Some(LONGEST * median);
        }
    }

    /// What inputs of this length are multiplied with: less than 1 where they are too long.
    pub(super) fn factor(self, length: f64) -> f64 {
        let limit = self.limit.filter(|&limit| limit > 0.0).unwrap_or(f64::INFINITY);
        if length > limit { limit / length } else { 1.0 }
    }
}

impl SecondMoment {
    /// Sums of no inputs yet, for rows of `n` weights. Takes `4 n^2` bytes.
    ///
    /// # Errors
    /// [`FeedbackError::TooLarge`] when there is no memory for them.
    pub fn new(n: usize) -> Result<SecondMoment, FeedbackError> {
        SecondMoment::with_precision(n, Precision::Accurate)
    }

    /// As [`Self::new`], with products of this precision: the fast ones round inputs to bfloat16 where the CPU can
    /// multiply it, so that the sums depend on the CPU.
    ///
    /// # Errors
    /// Those of [`Self::new`].
    pub fn with_precision(n: usize, precision: Precision) -> Result<SecondMoment, FeedbackError> {
        let sums = zeros(n)?;
        Ok(SecondMoment {
            n,
            precision,
            sums,
            weight: 0.0,
            tokens: 0,
            skipped: 0,
            capped: 0,
            cap: Some(Cap::default()),
        })
    }

    /// The same moment, still empty, that adds inputs of any length as they are.
    pub fn uncapped(self) -> SecondMoment {
        SecondMoment { cap: None, ..self }
    }

    /// Adds the inputs `rows`, row-major `[tokens, n]`; `weights`, when given, says how much each token counts (not
    /// negative).
    ///
    /// A row longer than three times the median length of this call's rows is scaled down to that; with fewer than 32
    /// rows, the median of an earlier call serves, if there was one. Rows that are not finite are left out and
    /// counted in [`Self::skipped`]. Sums are f32, in blocks of tokens (see
    /// [`accumulate_second_moment`]); the same calls give the same sums for any number of threads.
    ///
    /// # Panics
    /// When `rows` is not whole rows or `weights` has another length than there are rows.
    pub fn accumulate(&mut self, rows: &[f32], weights: Option<&[f32]>) {
        let n = self.n;
        assert!(n > 0 && rows.len().is_multiple_of(n), "{} values are not rows of {n}", rows.len());
        let tokens = rows.len() / n;
        assert!(weights.is_none_or(|weights| weights.len() == tokens), "one weight per token");
        let lengths = lengths(rows, n);
        if let Some(cap) = &mut self.cap {
            cap.update(&lengths);
        }
        let mut factors = Vec::with_capacity(tokens);
        for (token, &length) in lengths.iter().enumerate() {
            let weight = weights.map_or(1.0, |weights| f64::from(weights[token]));
            let counts = length.is_finite() && weight.is_finite() && weight >= 0.0;
            self.skipped += u64::from(!counts);
            let cap = self.cap.map_or(1.0, |cap| cap.factor(length));
            self.capped += u64::from(counts && cap < 1.0);
            self.tokens += u64::from(counts);
            self.weight += if counts { weight } else { 0.0 };
            factors.push(counts.then_some((weight.sqrt() * cap) as f32));
        }
        if factors.iter().all(|factor| *factor == Some(1.0)) {
            accumulate_second_moment(self.precision, rows, tokens, n, n, &mut self.sums);
            return;
        }
        let mut scaled = Vec::new();
        for (rows, factors) in rows.chunks(CHUNK_TOKENS * n).zip(factors.chunks(CHUNK_TOKENS)) {
            scaled.clear();
            for (row, factor) in rows.chunks_exact(n).zip(factors) {
                match factor {
                    Some(factor) => scaled.extend(row.iter().map(|x| x * factor)),
                    None => scaled.resize(scaled.len() + n, 0.0),
                }
            }
            accumulate_second_moment(self.precision, &scaled, factors.len(), n, n, &mut self.sums);
        }
    }

    /// The columns by descending mean square: errors of those that matter most are made up for by all others.
    pub(in crate::rounding) fn descending(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.n).collect();
        let square = |j: usize| self.sums[j * self.n + j];
        order.sort_by(|&i, &j| square(j).total_cmp(&square(i)));
        order
    }

    /// The moment of inputs whose column `j` is column `order[j]` of these.
    pub(in crate::rounding) fn permuted(self, order: &[usize]) -> Result<SecondMoment, FeedbackError> {
        let n = self.n;
        let mut sums = zeros(n)?;
        sums.par_chunks_exact_mut(n.max(1)).enumerate().for_each(|(i, row)| {
            for (j, sum) in row.iter_mut().enumerate().skip(i) {
                *sum = self.sums[order[i].min(order[j]) * n + order[i].max(order[j])];
            }
        });
        Ok(SecondMoment { sums, ..self })
    }

    /// How [`Self::accumulate`] would scale inputs down when adding them to what is here.
    pub(super) fn cap(&self) -> Cap {
        self.cap.unwrap_or_default()
    }

    /// Mixes in the mean second moment of `all` as if it came from `k` tokens more: for experts that few tokens were
    /// routed to. `2 n` is a good `k`. Does nothing when `all` is empty.
    ///
    /// # Panics
    /// When the two are of different inputs.
    pub fn shrink_towards(&mut self, all: &SecondMoment, k: f64) {
        assert_eq!(self.n, all.n, "second moments of different inputs");
        if all.weight <= 0.0 || !k.is_finite() || k <= 0.0 {
            return;
        }
        let factor = (k / all.weight) as f32;
        self.sums.par_iter_mut().zip(&all.sums).for_each(|(sum, all)| *sum += factor * all);
        self.weight += k;
    }

    /// Inputs that were added, without those left out.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Inputs that were left out because they were not finite.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Inputs that were scaled down because they were much longer than others.
    pub fn capped(&self) -> u64 {
        self.capped
    }

    /// Length of an input, which is that of a row of weights.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Mean square of each input; zeros without tokens.
    pub fn diagonal(&self) -> Vec<f32> {
        let mean = |j: usize| if self.weight > 0.0 { f64::from(self.sums[j * self.n + j]) / self.weight } else { 0.0 };
        (0..self.n).map(|j| mean(j) as f32).collect()
    }

    /// Mean square change of the outputs: `tr(E H E^T)` with `E = original - rounded`, both row-major `[rows, n]`, and
    /// H the mean of `x x^T`. The products are f32, their sum f64; uses rayon's current pool, with the same result
    /// for any number of threads. Zero without tokens.
    ///
    /// # Panics
    /// When the two have different lengths or are not whole rows.
    pub fn loss(&self, original: &[f32], rounded: &[f32]) -> f64 {
        let n = self.n;
        assert_eq!(original.len(), rounded.len(), "weights and rounded weights");
        assert!(original.len().is_multiple_of(n.max(1)), "{} values are not rows of {n}", original.len());
        if self.weight <= 0.0 {
            return 0.0;
        }
        let diagonals: Vec<Vec<f32>> = (0..n).step_by(TILE).map(|start| self.halved_diagonal_tile(start)).collect();
        let sums: Vec<f64> = original
            .par_chunks(rows_at_once(n) * n)
            .zip(rounded.par_chunks(rows_at_once(n) * n))
            .map(|(original, rounded)| {
                let errors: Vec<f32> = original.iter().zip(rounded).map(|(w, q)| w - q).collect();
                self.quadratic_form(&errors, &diagonals)
            })
            .collect();
        sums.iter().sum::<f64>() / self.weight
    }

    /// `sum over rows of e S e^T` for rows `e`, from what lies on and above the diagonal of S.
    fn quadratic_form(&self, errors: &[f32], diagonals: &[Vec<f32>]) -> f64 {
        let n = self.n;
        let rows = errors.len() / n;
        let mut products = vec![0.0f32; rows * TILE];
        let mut sum = 0.0;
        for (start, diagonal) in (0..n).step_by(TILE).zip(diagonals) {
            let columns = TILE.min(n - start);
            let above = GemmOperand::Plain { data: &self.sums[start..], stride: n };
            gemm_f32(rows, columns, start, errors, n, above, &mut products, TILE, false);
            let diagonal = GemmOperand::Plain { data: diagonal, stride: columns };
            gemm_f32(rows, columns, columns, &errors[start..], n, diagonal, &mut products, TILE, true);
            for (products, errors) in products.chunks_exact(TILE).zip(errors.chunks_exact(n)) {
                let row: f64 = errors[start..]
                    .iter()
                    .zip(&products[..columns])
                    .map(|(error, product)| f64::from(*error) * f64::from(*product))
                    .sum();
                sum += 2.0 * row;
            }
        }
        sum
    }

    /// The part of S above the diagonal of one tile on the diagonal, and half of the diagonal.
    fn halved_diagonal_tile(&self, start: usize) -> Vec<f32> {
        let columns = TILE.min(self.n - start);
        let mut tile = vec![0.0; columns * columns];
        for (i, row) in tile.chunks_exact_mut(columns).enumerate() {
            row[i..].copy_from_slice(&self.sums[(start + i) * self.n + start + i..][..columns - i]);
            row[i] /= 2.0;
        }
        tile
    }

    /// Row `i` of the sums from the diagonal on.
    pub(crate) fn upper_row(&self, i: usize) -> &[f32] {
        &self.sums[i * self.n + i..(i + 1) * self.n]
    }

    /// The same, for moments that come from elsewhere.
    pub(crate) fn upper_row_mut(&mut self, i: usize) -> &mut [f32] {
        &mut self.sums[i * self.n + i..(i + 1) * self.n]
    }

    /// Sum of the weights of all tokens.
    pub(crate) fn weight(&self) -> f64 {
        self.weight
    }

    /// Says how much the sums stand for, where they come from elsewhere.
    pub(crate) fn set_counts(&mut self, weight: f64, tokens: u64) {
        (self.weight, self.tokens) = (weight, tokens);
    }
}

fn length(row: &[f32]) -> f64 {
    row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt()
}

/// Lengths of rows `[.., n]`.
pub(super) fn lengths(rows: &[f32], n: usize) -> Vec<f64> {
    rows.par_chunks_exact(n).map(length).collect()
}

/// `n * n` zeros.
pub(in crate::rounding) fn zeros(n: usize) -> Result<Vec<f32>, FeedbackError> {
    let too_large = || FeedbackError::TooLarge { n };
    let len = n.checked_mul(n).ok_or_else(too_large)?;
    let mut zeros = Vec::new();
    zeros.try_reserve_exact(len).map_err(|_| too_large())?;
    zeros.resize(len, 0.0);
    Ok(zeros)
}

/// The middle of the finite lengths, where there are enough of them.
fn median(lengths: &[f64]) -> Option<f64> {
    let mut finite: Vec<f64> = lengths.iter().copied().filter(|length| length.is_finite()).collect();
    if finite.len() < ROWS_FOR_MEDIAN {
        return None;
    }
    let middle = finite.len() / 2;
    Some(*finite.select_nth_unstable_by(middle, f64::total_cmp).1)
}

#[cfg(test)]
mod tests {
    use super::super::judged::cap_rows;
    use super::super::tests::{inputs, noise};
    use super::*;

    impl SecondMoment {
        /// Adds a sum that no inputs have.
        pub(in crate::rounding::gptq) fn spoil(&mut self, i: usize, j: usize, amount: f32) {
            let mean = self.sums[0];
            self.sums[i * self.n + j] += amount * mean;
        }
    }

    #[test]
    fn the_loss_is_the_mean_square_change_of_the_outputs() {
        for (n, tokens, rows) in [(3, 5, 2), (256, 40, 3), (600, 100, 70)] {
            let mut x = inputs(tokens, n, 1);
            // Equally long, so that none is scaled down.
            for row in x.chunks_exact_mut(n) {
                let length = row.iter().map(|x| x * x).sum::<f32>().sqrt();
                row.iter_mut().for_each(|x| *x /= length);
            }
            let mut moment = SecondMoment::new(n).unwrap();
            moment.accumulate(&x, None);
            let (w, q) = (noise(rows * n, 2), noise(rows * n, 3));
            let mut expected = 0.0;
            for (w, q) in w.chunks_exact(n).zip(q.chunks_exact(n)) {
                for x in x.chunks_exact(n) {
                    let change: f64 = (0..n).map(|j| f64::from(w[j] - q[j]) * f64::from(x[j])).sum();
                    expected += change * change / tokens as f64;
                }
            }
            let found = moment.loss(&w, &q);
            assert!((found / expected - 1.0).abs() < 1e-4, "{n}: {found} for {expected}");
        }
    }

    #[test]
    fn token_weights_count_as_repetitions() {
        let n = 16;
        let x = inputs(2, n, 4);
        let (mut weighted, mut repeated) = (SecondMoment::new(n).unwrap(), SecondMoment::new(n).unwrap());
        weighted.accumulate(&x, Some(&[3.0, 1.0]));
        for row in [0, 0, 0, 1] {
            repeated.accumulate(&x[row * n..][..n], None);
        }
        for (a, b) in weighted.diagonal().iter().zip(repeated.diagonal()) {
            assert!((a / b - 1.0).abs() < 1e-5);
        }
        assert_eq!((weighted.tokens(), repeated.tokens()), (2, 4));
    }

    #[test]
    fn attention_sinks_do_not_own_the_sum() {
        let n = 64;
        let mut rows = inputs(100, n, 5);
        let (plain, capped): (f32, u64) = {
            let mut moment = SecondMoment::new(n).unwrap();
            moment.accumulate(&rows, None);
            (moment.diagonal().iter().sum(), moment.capped())
        };
        rows[..n].iter_mut().for_each(|x| *x *= 1000.0);
        let mut moment = SecondMoment::new(n).unwrap();
        moment.accumulate(&rows, None);
        let ratio = moment.diagonal().iter().sum::<f32>() / plain;
        assert!(ratio < 3.0, "{ratio}");
        assert_eq!(moment.capped(), capped + 1);
        // The limit is remembered for blocks too short for a median.
        let mut alone = rows[..n].to_vec();
        alone.extend([f32::NAN; 64]);
        cap_rows(moment.cap(), n, &mut alone, 0);
        assert_eq!(alone.len(), n, "what is not finite is dropped");
        assert!(length(&alone) < 1e-2 * length(&rows[..n]));
        moment.accumulate(&rows[..n], None);
        assert_eq!(moment.capped(), capped + 2);
    }

    #[test]
    fn rows_that_are_not_finite_are_left_out() {
        let n = 8;
        let mut rows = inputs(50, n, 6);
        rows[3 * n] = f32::NAN;
        rows[9 * n + 1] = f32::INFINITY;
        let mut moment = SecondMoment::new(n).unwrap();
        moment.accumulate(&rows, None);
        assert_eq!((moment.tokens(), moment.skipped()), (48, 2));
        assert!(moment.diagonal().iter().all(|v| v.is_finite() && *v > 0.0));
    }

    #[test]
    fn rare_experts_lean_on_all_tokens() {
        let n = 8;
        let (mut rare, mut all) = (SecondMoment::new(n).unwrap(), SecondMoment::new(n).unwrap());
        all.accumulate(&inputs(400, n, 7), None);
        rare.shrink_towards(&all, 16.0);
        for (rare, all) in rare.diagonal().iter().zip(all.diagonal()) {
            assert!((rare / all - 1.0).abs() < 1e-5);
        }
        let mut known = SecondMoment::new(n).unwrap();
        known.accumulate(&inputs(16, n, 8), None);
        let before = known.diagonal();
        known.shrink_towards(&all, 16.0);
        for ((after, before), all) in known.diagonal().iter().zip(&before).zip(all.diagonal()) {
            assert!((after / ((before + all) / 2.0) - 1.0).abs() < 1e-5);
        }
        known.shrink_towards(&SecondMoment::new(n).unwrap(), 16.0);
    }
}
