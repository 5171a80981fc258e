//! Cells of a matrix: some rows of a tile of columns.

use rayon::prelude::*;

use super::super::columns::{TILE, TileRow};
use super::super::error::FeedbackError;
use super::super::format::{Prepared, TileFormat};
use super::super::round::decoded_errors;
use super::super::sweep::{TileState, pass_changes_on, tile_gradient};
use super::outputs::OutputFactor;
use super::pipeline;
use crate::compute::{GemmOperand, gemm_f32};
use crate::gguf::TensorType;
use crate::quant::QuantError;
use crate::vectorized::vectorized;

/// Rows of a cell: enough for products, few enough for several threads.
const ROWS: usize = 32;

/// A matrix that is being rounded.
pub(super) struct Matrix<'a, F: TileFormat> {
    pub ty: TensorType,
    pub prepared: &'a Prepared<'a, F>,
    pub outputs: &'a OutputFactor,
    /// `[m, n]`.
    pub weights: &'a [f32],
}

/// Some rows on their way through the tiles.
struct Block<P> {
    /// Number of the first.
    first: usize,
    /// Targets minus rounded weights, `[rows, n]`, as far as the tiles behind it go; in a sweep, everywhere.
    errors: Vec<f32>,
    /// In a sweep, the errors with their feedback, `[rows, n]`.
    u: Vec<f32>,
    parts: Vec<P>,
    failed: Option<QuantError>,
}

/// What a tile of columns knows of the rows that have passed: weights minus rounded weights, or in a sweep what has changed
/// of that, `[rows, columns]`.
type Passed = Vec<f32>;

impl<F: TileFormat> Matrix<'_, F> {
    fn n(&self) -> usize {
        self.prepared.factor.n()
    }

    fn stages(&self) -> Vec<Passed> {
        vec![Passed::new(); self.prepared.tiles.len()]
    }

    /// Rounds all rows in order. Gives the blocks of each [`ROWS`] rows.
    pub(super) fn round(&self) -> Result<Vec<Vec<F::Parts>>, FeedbackError> {
        let n = self.n();
        let block = |(index, weights): (usize, &[f32])| Block {
            first: index * ROWS,
            errors: vec![0.0; weights.len()],
            u: Vec::new(),
            parts: vec![F::ZERO; weights.len() / n * self.prepared.blocks()],
            failed: None,
        };
        let blocks = self.weights.chunks(ROWS * n).enumerate().map(block).collect();
        let done = pipeline::run(self.stages(), blocks, |tile, passed, block| self.round_cell(tile, passed, block));
        finished(done)
    }

    /// Rounds the rows of a cell in order.
    fn round_cell(&self, tile: usize, passed: &mut Passed, block: &mut Block<F::Parts>) {
        let n = self.n();
        let start = tile * TILE;
        let width = TILE.min(n - start);
        let rows = block.errors.len() / n;
        let weights = &self.weights[block.first * n..][..rows * n];
        let mut wanted: Vec<f32> =
            weights.chunks_exact(n).flat_map(|row| &row[start..start + width]).copied().collect();
        self.outputs.add_earlier(block.first, passed, width, &mut wanted);
        let mut targets = wanted.clone();
        let a = GemmOperand::Plain { data: &self.prepared.feedback[start..], stride: n };
        gemm_f32(rows, width, start, &block.errors, n, a, &mut targets, width, true);
        let len = self.prepared.format.block_len();
        for row in 0..rows {
            let own = row * width..(row + 1) * width;
            let (wanted, targets) = (&mut wanted[own.clone()], &mut targets[own]);
            let before = self.outputs.before(block.first + row);
            for (errors, factor) in passed.chunks_exact(width).zip(before).skip(block.first) {
                add_scaled(wanted, *factor, errors);
                add_scaled(targets, *factor, errors);
            }
            let at = row * n + start..row * n + start + width;
            let first = row * self.prepared.blocks() + start / len;
            let row = TileRow {
                weights: wanted,
                targets,
                errors: &mut block.errors[at.clone()],
                parts: &mut block.parts[first..first + width / len],
            };
            let columns = self.prepared.columns(tile);
            if let Err(error) = self.prepared.format.round(&self.prepared.tiles[tile], columns, row) {
                block.failed.get_or_insert(error);
            }
            // Weights minus rounded weights, the latter being the target minus its error.
            let errors = weights[at.clone()].iter().zip(wanted.iter()).zip(&block.errors[at]);
            passed.extend(errors.map(|((weight, wanted), error)| weight - (wanted - error)));
        }
    }

    /// Goes through all columns of all rows once by coordinate descent.
    pub(super) fn sweep(&self, parts: Vec<Vec<F::Parts>>) -> Result<Vec<Vec<F::Parts>>, FeedbackError> {
        let errors = decoded_errors(self.ty, self.weights, &self.bytes(&parts)?)?;
        let blocks =
            parts.into_par_iter().enumerate().map(|(index, parts)| self.sweep_block(index * ROWS, parts, &errors));
        let blocks: Vec<_> = blocks.collect();
        let done = pipeline::run(self.stages(), blocks, |tile, passed, block| {
            self.sweep_cell(tile, &errors, passed, block);
        });
        finished(done)
    }

    /// Rows with the errors of all others in their own, as far as these are tied to them; `errors` are those of all rows.
    fn sweep_block(&self, first: usize, parts: Vec<F::Parts>, errors: &[f32]) -> Block<F::Parts> {
        let (n, m) = (self.n(), self.outputs.m());
        let rows = parts.len() / self.prepared.blocks();
        let mut own = errors[first * n..][..rows * n].to_vec();
        let all = GemmOperand::Plain { data: errors, stride: n };
        gemm_f32(rows, n, m, self.outputs.others_from(first), m, all, &mut own, n, true);
        let mut u = own.clone();
        for start in (0..n).step_by(TILE) {
            let width = TILE.min(n - start);
            let a = GemmOperand::Plain { data: &self.prepared.feedback[start..], stride: n };
            gemm_f32(rows, width, start + width, &own, n, a, &mut u[start..], n, true);
        }
        Block { first, errors: own, u, parts, failed: None }
    }

    /// Improves the rows of a cell in order; `original` are weights minus rounded weights before the sweep.
    fn sweep_cell(&self, tile: usize, original: &[f32], passed: &mut Passed, block: &mut Block<F::Parts>) {
        let n = self.n();
        let start = tile * TILE;
        let width = TILE.min(n - start);
        let rows = block.errors.len() / n;
        let moment = self.prepared.columns(tile).moment;
        let mut gradient = vec![0.0; rows * TILE];
        tile_gradient(self.prepared.factor, self.prepared.feedback, &block.u, start, &mut gradient);
        let mut moved = vec![0.0; rows * width];
        self.outputs.add_changes(block.first, passed, width, &mut moved);
        let mut change = vec![0.0; rows * TILE];
        let len = self.prepared.format.block_len();
        for row in 0..rows {
            let number = block.first + row;
            let moved = &mut moved[row * width..][..width];
            let others = self.outputs.others(number);
            for (changes, factor) in passed.chunks_exact(width).zip(others).skip(block.first) {
                add_scaled(moved, *factor, changes);
            }
            let gradient = &mut gradient[row * TILE..][..width];
            add_product(gradient, moved, moment);
            let errors = &mut block.errors[row * n + start..][..width];
            let change = &mut change[row * TILE..][..width];
            change.copy_from_slice(errors);
            errors.iter_mut().zip(moved.iter()).for_each(|(error, moved)| *error += moved);
            let before = errors.to_vec();
            let at = number * n + start..number * n + start + width;
            let rounded = self.weights[at.clone()].iter().zip(&original[at]).map(|(weight, error)| weight - error);
            let targets: Vec<f32> = rounded.zip(&before).map(|(rounded, error)| rounded + error).collect();
            let first = row * self.prepared.blocks() + start / len;
            let state = TileState { weights: &targets, errors: &mut *errors, gradient, moment };
            let parts = &mut block.parts[first..first + width / len];
            self.prepared.format.descend(&self.prepared.tiles[tile], state, parts);
            passed.extend(errors.iter().zip(&before).map(|(error, before)| error - before));
            change.iter_mut().zip(errors.iter()).for_each(|(change, error)| *change = error - *change);
        }
        pass_changes_on(self.prepared.feedback, &change, start, &mut block.u, n);
    }

    /// The bytes of all rows.
    pub(super) fn bytes(&self, parts: &[Vec<F::Parts>]) -> Result<Vec<u8>, FeedbackError> {
        let row_bytes = self.ty.info().and_then(|info| info.row_bytes(self.n() as u64)).unwrap_or(0) as usize;
        let mut bytes = vec![0; self.outputs.m() * row_bytes];
        let blocks = bytes.par_chunks_mut((ROWS * row_bytes).max(1)).zip(parts);
        blocks.for_each(|(bytes, parts)| self.prepared.format.write(parts, bytes));
        Ok(bytes)
    }
}

/// The blocks, or what went wrong first.
fn finished<P>(done: Vec<Block<P>>) -> Result<Vec<Vec<P>>, FeedbackError> {
    let parts = done.into_iter().map(|block| block.failed.map_or(Ok(block.parts), |error| Err(error.into())));
    parts.collect()
}

vectorized! {
    /// `sums[j] += factor * values[j]`.
    fn add_scaled(sums: &mut [f32], factor: f32, values: &[f32]) {
        sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += factor * value);
    }

    /// Adds a row times a symmetric matrix, `[columns, columns]`, to `sums`.
    fn add_product(sums: &mut [f32], row: &[f32], matrix: &[f32]) {
        for (factor, values) in row.iter().zip(matrix.chunks_exact(row.len())) {
            if *factor != 0.0 {
                sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += factor * value);
            }
        }
    }
}
