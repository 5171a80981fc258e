//! `H = (I + A) D (I + A)^T`: what an error in one column asks of the columns after it.
//!
//! This is the Cholesky factorisation of H with rows and columns in reverse order, scaled to a unit diagonal. It runs
//! in blocks from the last columns to the first: a block on the diagonal is factored in f64, the panel above it is
//! solved against it, and the rest is updated by a matrix product. A linear algebra crate would do the same, but such
//! crates pick their kernels, and with them the order of their sums, by what the CPU offers; the products here are
//! those of [`compute`](crate::compute), which give the same bytes on every instruction set.

use rayon::prelude::*;

use super::columns::TILE;
use super::error::FeedbackError;
use super::moment::{SecondMoment, zeros};
use super::scaled::{FLOOR, Scaled};
use crate::compute::{GemmOperand, gemm_f32};
use crate::vectorized::vectorized;

/// The part of each off-diagonal moment that is given up where nothing tells how much would be best. On a model of 4
/// million weights and 57,000 tokens, .005 to .1 differ by less than two per cent of the loss on other text.
#[doc(alias = "percdamp")]
#[doc(alias = "damp_percent")]
pub const DEFAULT_DAMPING: f64 = 0.02;

/// Columns of a block of the factorisation.
const BLOCK: usize = 256;

/// Rows that one task updates: as many as a matrix product packs at a time. Each task packs the panel for itself.
const TASK_ROWS: usize = 140;

/// Rows that are solved together.
const SOLVED_ROWS: usize = 8;

/// Least pivot of a sound factorisation, in units of the diagonal of its column.
const LEAST_PIVOT: f64 = 1e-6;

/// How much the damping grows after a factorisation that failed.
const GROWTH: f64 = 3.0;

/// Second moments in the form that rounding needs. Units do not matter: the mean of the diagonal is one.
#[doc(alias = "Cholesky")]
#[doc(alias = "LDL")]
#[doc(alias = "inverse Hessian")]
#[derive(Clone, Debug)]
pub struct Factor {
    n: usize,
    /// Strictly upper triangular, row-major `[n, n]`, zeros elsewhere; empty when all of it is zero.
    feedback: Vec<f32>,
    /// D.
    weights: Vec<f32>,
    /// Diagonal of the damped and repaired moment.
    plain: Vec<f32>,
    /// What the damped moment has beyond `1 - damping` times the moment itself.
    excess: Vec<f32>,
    damping: f64,
    /// Tiles on the diagonal of the damped moment, each `[columns, columns]`; none without feedback.
    tiles: Vec<Vec<f32>>,
    /// The input that stands at each place, where they stand in another order.
    order: Option<Vec<usize>>,
}

impl Factor {
    /// Factors the mean second moment of `moment` after damping: off-diagonal elements are multiplied with
    /// `1 - damping`, a millionth of the mean is added to the diagonal. Inputs that were always zero get the mean and
    /// take part in no feedback. Where the factorisation fails, damping is multiplied by three and it is tried again;
    /// once damping reaches 1, and without any tokens, nothing but the diagonal is left, so there is always a result.
    ///
    /// Takes `4 n^2` bytes. Runs on rayon's current pool, with the same result for any number of threads.
    ///
    /// # Errors
    /// [`FeedbackError::TooLarge`] when there is no memory for it.
    pub fn new(moment: &SecondMoment, damping: f64) -> Result<Factor, FeedbackError> {
        let n = moment.n();
        let Some(scaled) = Scaled::new(moment) else { return Ok(Factor::diagonal(&vec![1.0; n])) };
        let mut feedback = zeros(n)?;
        let mut damping = if damping.is_finite() { damping.clamp(0.0, 1.0) } else { DEFAULT_DAMPING };
        while damping < 1.0 {
            scaled.damped(damping, &mut feedback);
            let tiles = (0..n).step_by(TILE).map(|start| diagonal_tile(&feedback, n, start)).collect();
            if let Some(weights) = factor_in_place(&mut feedback, n) {
                let excess = scaled.excess(damping);
                if feedback.par_iter().all(|a| *a == 0.0) {
                    return Ok(Factor { damping, ..Factor::diagonal(&weights) });
                }
                let plain = scaled.plain;
                return Ok(Factor { n, feedback, weights, plain, excess, damping, tiles, order: None });
            }
            damping = (damping * GROWTH).max(DEFAULT_DAMPING);
        }
        Ok(Factor { damping: 1.0, excess: vec![0.0; n], ..Factor::diagonal(&scaled.plain) })
    }

    /// A factor without feedback: each column's errors count `weights`, and no column answers for another.
    pub fn diagonal(weights: &[f32]) -> Factor {
        Factor {
            n: weights.len(),
            feedback: Vec::new(),
            weights: weights.to_vec(),
            plain: weights.to_vec(),
            excess: vec![0.0; weights.len()],
            damping: 0.0,
            tiles: Vec::new(),
            order: None,
        }
    }

    /// As [`Factor::new`], with the inputs by descending mean square (`actorder`): for grids whose scales are there before
    /// the first column is rounded. Blocks of GGUF's types get their scales on the way and want the inputs in their own
    /// order.
    ///
    /// # Errors
    /// As [`Factor::new`].
    #[doc(alias = "actorder")]
    #[doc(alias = "desc_act")]
    pub fn descending(moment: SecondMoment, damping: f64) -> Result<Factor, FeedbackError> {
        let order = moment.descending();
        let factor = Factor::new(&moment.permuted(&order)?, damping)?;
        Ok(Factor { order: Some(order), ..factor })
    }

    /// The factor of the same inputs, each multiplied with its entry of `by`, none of which is zero. For powers of two this is
    /// exact: with C their diagonal, `C H C = (I + C A C^-1) (C D C) (I + C A C^-1)^T`.
    ///
    /// # Panics
    /// When `by` has another length than there are inputs.
    pub fn scaled(&self, by: &[f32]) -> Factor {
        assert_eq!(by.len(), self.n, "inputs");
        let by: Vec<f32> = match &self.order {
            Some(order) => order.iter().map(|&at| by[at]).collect(),
            None => by.to_vec(),
        };
        let squared = |values: &[f32]| values.iter().zip(&by).map(|(value, by)| value * by * by).collect::<Vec<_>>();
        let mut feedback = self.feedback.clone();
        feedback.par_chunks_exact_mut(self.n.max(1)).zip(&by).for_each(|(row, of_row)| {
            row.iter_mut().zip(&by).for_each(|(a, by)| *a *= of_row / by);
        });
        let tiles = self.tiles.iter().zip(by.chunks(TILE)).map(|(tile, by)| {
            let rows = tile.chunks_exact(by.len()).zip(by);
            rows.flat_map(|(row, of_row)| row.iter().zip(by).map(move |(h, by)| h * of_row * by)).collect()
        });
        Factor {
            n: self.n,
            feedback,
            weights: squared(&self.weights),
            plain: squared(&self.plain),
            excess: squared(&self.excess),
            damping: self.damping,
            tiles: tiles.collect(),
            order: self.order.clone(),
        }
    }

    /// The input that stands at each place of all else, where they stand in another order than their own.
    pub(in crate::rounding) fn order(&self) -> Option<&[usize]> {
        self.order.as_deref()
    }

    /// Inputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// D: what an error in each column costs once all columns after it have made up for it as well as they can.
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// The damping that led to success: that asked for, or three times it, and so on; 1 when only the diagonal is left.
    pub fn damping_used(&self) -> f64 {
        self.damping
    }

    /// Diagonal of the damped moment: what an error in each column costs as long as no other column answers for it.
    pub(in crate::rounding) fn plain(&self) -> &[f32] {
        &self.plain
    }

    /// A, row-major `[n, n]`, or nothing where it is zero.
    pub(in crate::rounding) fn feedback(&self) -> Option<&[f32]> {
        (!self.feedback.is_empty()).then_some(&self.feedback)
    }

    /// Tiles on the diagonal of the damped moment, `[columns, columns]` each.
    pub(in crate::rounding) fn tiles(&self) -> &[Vec<f32>] {
        &self.tiles
    }

    /// Loss of one row on the moment as it was before damping, from the row's errors and its `u`.
    pub(in crate::rounding) fn loss(&self, errors: &[f32], u: &[f32]) -> f64 {
        let weighed = |values: &[f32], weights: &[f32]| -> f64 {
            values.iter().zip(weights).map(|(v, w)| f64::from(*v) * f64::from(*v) * f64::from(*w)).sum()
        };
        let keep = (1.0 - self.damping).max(f64::MIN_POSITIVE);
        let excess = if self.damping < 1.0 { weighed(errors, &self.excess) } else { 0.0 };
        let damped = weighed(u, &self.weights);
        if self.damping < 1.0 { (damped - excess) / keep } else { damped }
    }
}

/// Replaces the upper triangle of a symmetric matrix, row-major `[n, n]`, by A, with zeros elsewhere, and gives D;
/// `None` when the matrix is not safely positive.
pub(in crate::rounding) fn factor_in_place(matrix: &mut [f32], n: usize) -> Option<Vec<f32>> {
    let mut pivots = vec![0.0f32; n];
    for start in (0..n).step_by(BLOCK).rev() {
        let columns = BLOCK.min(n - start);
        let block = factor_block(matrix, n, start, columns)?;
        for (pivot, found) in pivots[start..].iter_mut().zip(&block.pivots) {
            *pivot = *found as f32;
        }
        let (above, rest) = matrix.split_at_mut(start * n);
        for (i, row) in rest.chunks_exact_mut(n).take(columns).enumerate() {
            row[start..start + columns].fill(0.0);
            for j in i + 1..columns {
                row[start + j] = block.unit[i * columns + j] as f32;
            }
        }
        let (scaled, negated) = solve_panel(above, n, start, columns, &block);
        above.par_chunks_mut(TASK_ROWS * n).enumerate().for_each(|(task, rows)| {
            let first = task * TASK_ROWS;
            let count = rows.len() / n;
            let b = GemmOperand::Transposed { data: &scaled[first * columns..], stride: columns };
            let a = &negated[first * columns..];
            gemm_f32(count, start - first, columns, a, columns, b, &mut rows[first..], n, true);
            for (i, row) in rows.chunks_exact_mut(n).enumerate() {
                row[..first + i].fill(0.0);
            }
        });
    }
    Some(pivots)
}

/// A tile on the diagonal of a symmetric matrix of which the upper triangle is given, whole.
fn diagonal_tile(upper: &[f32], n: usize, start: usize) -> Vec<f32> {
    let columns = TILE.min(n - start);
    let mut tile = vec![0.0; columns * columns];
    for i in 0..columns {
        for j in i..columns {
            let value = upper[(start + i) * n + start + j];
            tile[i * columns + j] = value;
            tile[j * columns + i] = value;
        }
    }
    tile
}

/// A factored block on the diagonal.
struct Block {
    /// `I + A` of the block, row-major.
    unit: Vec<f64>,
    pivots: Vec<f64>,
}

fn factor_block(matrix: &[f32], n: usize, start: usize, columns: usize) -> Option<Block> {
    let mut unit = vec![0.0f64; columns * columns];
    let mut pivots = vec![0.0f64; columns];
    for (i, row) in unit.chunks_exact_mut(columns).enumerate() {
        for j in i..columns {
            row[j] = f64::from(matrix[(start + i) * n + start + j]);
        }
    }
    let mut column = vec![0.0f64; columns];
    for j in (0..columns).rev() {
        let pivot = unit[j * columns + j];
        let least = LEAST_PIVOT * f64::from(matrix[(start + j) * n + start + j]).max(FLOOR);
        if !pivot.is_finite() || pivot < least {
            return None;
        }
        pivots[j] = pivot;
        for i in 0..j {
            column[i] = unit[i * columns + j];
            unit[i * columns + j] /= pivot;
        }
        for i in 0..j {
            let factor = unit[i * columns + j];
            for (target, value) in unit[i * columns + i..][..j - i].iter_mut().zip(&column[i..j]) {
                *target -= factor * value;
            }
        }
        unit[j * columns + j] = 1.0;
    }
    Some(Block { unit, pivots })
}

/// Solves the panel above a block for A, in place. Gives, row-major `[start, columns]`, A with its columns multiplied
/// by D, and minus A: the two factors of the update.
fn solve_panel(above: &mut [f32], n: usize, start: usize, columns: usize, block: &Block) -> (Vec<f32>, Vec<f32>) {
    // Column j of I + A of the block, contiguous.
    let mut transposed = vec![0.0f32; columns * columns];
    for i in 0..columns {
        for j in i + 1..columns {
            transposed[j * columns + i] = block.unit[i * columns + j] as f32;
        }
    }
    let inverses: Vec<f32> = block.pivots.iter().map(|pivot| (1.0 / pivot) as f32).collect();
    let mut scaled = vec![0.0f32; start * columns];
    let mut negated = vec![0.0f32; start * columns];
    above
        .par_chunks_mut(SOLVED_ROWS * n)
        .zip(scaled.par_chunks_mut(SOLVED_ROWS * columns))
        .zip(negated.par_chunks_mut(SOLVED_ROWS * columns))
        .for_each(|((rows, scaled), negated)| {
            for (row, scaled) in rows.chunks_exact(n).zip(scaled.chunks_exact_mut(columns)) {
                scaled.copy_from_slice(&row[start..start + columns]);
            }
            solve_rows(scaled, columns, &transposed);
            let solved = scaled.chunks_exact(columns).zip(negated.chunks_exact_mut(columns));
            for (row, (scaled, negated)) in rows.chunks_exact_mut(n).zip(solved) {
                for (j, a) in row[start..start + columns].iter_mut().enumerate() {
                    *a = scaled[j] * inverses[j];
                    negated[j] = -*a;
                }
            }
        });
    (scaled, negated)
}

vectorized! {
    /// Solves rows `[.., columns]` for A times D, from the last column to the first. Each column of a row waits for the
    /// one after it, so that it takes several rows to keep the CPU busy.
    fn solve_rows(rows: &mut [f32], columns: usize, transposed: &[f32]) {
        for j in (0..columns).rev() {
            for row in rows.chunks_exact_mut(columns) {
                let value = row[j];
                for (target, a) in row[..j].iter_mut().zip(&transposed[j * columns..][..j]) {
                    *target -= value * a;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{inputs, moment};
    use super::*;

    /// `(I + A) D (I + A)^T` and the damped moment, both dense.
    fn both(moment: &SecondMoment, factor: &Factor) -> (Vec<f64>, Vec<f64>) {
        let n = factor.n();
        let unit = |i: usize, j: usize| match factor.feedback() {
            _ if i == j => 1.0,
            Some(a) => f64::from(a[i * n + j]),
            None => 0.0,
        };
        let mut product = vec![0.0; n * n];
        let mut expected = vec![0.0; n * n];
        let mean = moment.diagonal().iter().map(|v| f64::from(*v)).sum::<f64>() / n as f64;
        for i in 0..n {
            for j in i..n {
                product[i * n + j] =
                    (j..n).map(|k| unit(i, k) * f64::from(factor.weights()[k]) * unit(j, k)).sum::<f64>();
                let sum = f64::from(moment.upper_row(i)[j - i]) / moment.weight() / mean;
                expected[i * n + j] = if i == j { sum + FLOOR } else { sum * (1.0 - factor.damping_used()) };
            }
        }
        (product, expected)
    }

    #[test]
    fn the_factors_multiply_to_the_damped_moment() {
        for (n, tokens) in [(1, 3), (31, 100), (256, 900), (300, 900), (700, 3000)] {
            let moment = moment(tokens, n, n as u64);
            let factor = Factor::new(&moment, 0.02).unwrap();
            assert_eq!(factor.damping_used(), 0.02);
            let (product, expected) = both(&moment, &factor);
            let largest = expected.iter().fold(0.0f64, |max, v| max.max(v.abs()));
            for (at, (product, expected)) in product.iter().zip(&expected).enumerate() {
                assert!((product - expected).abs() < 1e-5 * largest, "{n}: {product} for {expected} at {at}");
            }
        }
    }

    #[test]
    fn scaled_inputs_have_the_scaled_factor() {
        let n = 150;
        let by: Vec<f32> = (0..n).map(|j| 2f32.powi(j as i32 % 5 - 2)).collect();
        let rows = inputs(900, n, 3);
        let mut moment = SecondMoment::new(n).unwrap();
        moment.accumulate(&rows, None);
        let factor = Factor::descending(moment, 0.02).unwrap();
        let scaled = factor.scaled(&by);
        assert_eq!(scaled.order(), factor.order());
        let order = factor.order().unwrap();
        // The loss of errors on scaled inputs is that of scaled errors.
        let errors = super::super::tests::noise(n, 7);
        let of = |factor: &Factor, errors: &[f32]| {
            let a = factor.feedback().unwrap();
            let u: Vec<f32> =
                (0..n).map(|j| errors[j] + (0..j).map(|k| errors[k] * a[k * n + j]).sum::<f32>()).collect();
            factor.loss(errors, &u)
        };
        let moved: Vec<f32> = errors.iter().zip(order).map(|(error, &at)| error * by[at]).collect();
        let (found, expected) = (of(&scaled, &errors), of(&factor, &moved));
        assert!((found / expected - 1.0).abs() < 1e-4, "{found} for {expected}");
        assert_eq!(scaled.tiles()[0][1], factor.tiles()[0][1] * by[order[0]] * by[order[1]]);
        assert_eq!(Factor::diagonal(&[1.0, 3.0]).scaled(&[2.0, 0.5]).weights(), [4.0, 0.75]);
    }

    #[test]
    fn dead_inputs_take_no_part_and_cost_the_mean() {
        let n = 64;
        let mut rows = inputs(500, n, 1);
        rows.iter_mut().skip(5).step_by(n).for_each(|x| *x = 0.0);
        let mut moment = SecondMoment::new(n).unwrap();
        moment.accumulate(&rows, None);
        let factor = Factor::new(&moment, 0.02).unwrap();
        assert!((factor.weights()[5] - 1.0).abs() < 1e-5);
        let a = factor.feedback().unwrap();
        assert!((0..n).all(|j| a[5 * n + j] == 0.0 && a[j * n + 5] == 0.0));
    }

    #[test]
    fn without_tokens_or_with_absurd_ones_a_diagonal_is_left() {
        let factor = Factor::new(&SecondMoment::new(8).unwrap(), 0.02).unwrap();
        assert_eq!((factor.weights(), factor.feedback()), (&[1.0; 8][..], None));
        let mut moment = SecondMoment::new(8).unwrap();
        moment.accumulate(&[f32::NAN; 8], None);
        moment.accumulate(&[1e30; 8], None);
        let factor = Factor::new(&moment, 0.02).unwrap();
        assert!(factor.weights().iter().all(|w| w.is_finite() && *w > 0.0));
    }

    #[test]
    fn a_failed_factorisation_is_tried_again_with_more_damping() {
        // One token: rank one.
        let n = 40;
        let mut moment = SecondMoment::new(n).unwrap();
        moment.accumulate(&inputs(1, n, 2), None);
        let factor = Factor::new(&moment, 0.0).unwrap();
        assert!(factor.damping_used() > 0.0);
        assert!(factor.weights().iter().all(|w| w.is_finite() && *w > 0.0));
        // Not a moment at all: an off-diagonal beyond its diagonal.
        let mut broken = moment.clone();
        broken.spoil(3, 30, 1e6);
        let factor = Factor::new(&broken, 0.02).unwrap();
        assert!(factor.weights().iter().all(|w| w.is_finite() && *w > 0.0));
        assert_eq!(factor.damping_used(), 1.0);
    }
}
