//! What the tiled loops ask of a block format, and the loop over the tiles of a few rows.

use super::columns::{TILE, TileRow, column_weights};
use super::factor::Factor;
use super::sweep::{Rounded, TileState, sweep_tiles};
use crate::compute::{GemmOperand, gemm_f32};
use crate::quant::QuantError;

/// Some columns of a factor.
#[derive(Clone, Copy)]
pub(super) struct TileColumns<'a> {
    /// What an error of each column costs, with mean one over all columns of the factor.
    pub cost: &'a [f32],
    /// A from the tile's first row and column on, rows `stride` floats apart.
    pub feedback: &'a [f32],
    pub stride: usize,
    /// The damped moment of these columns, `[columns, columns]`.
    pub moment: &'a [f32],
}

/// A format with its way of rounding a tile and of improving what is rounded.
pub(super) trait TileFormat: Sync {
    /// A block.
    type Parts: Clone + Send + Sync;
    /// What is made once for all rows of a tile.
    type Tile: Send + Sync;

    /// A block of zeros.
    const ZERO: Self::Parts;

    /// Weights of a block.
    fn block_len(&self) -> usize;

    /// Prepares a tile.
    fn tile(&self, columns: TileColumns<'_>) -> Self::Tile;

    /// Rounds a row of a tile; afterwards its targets have all feedback, and less the rounded weights are `u` of the loss.
    fn round(
        &self,
        tile: &Self::Tile,
        columns: TileColumns<'_>,
        row: TileRow<'_, Self::Parts>,
    ) -> Result<(), QuantError>;

    /// One pass of coordinate descent over a row of a tile.
    fn descend(&self, tile: &Self::Tile, state: TileState<'_>, parts: &mut [Self::Parts]);

    /// Writes consecutive blocks.
    fn write(&self, parts: &[Self::Parts], bytes: &mut [u8]);
}

/// A factor's columns, prepared for a format once for all rows.
pub(super) struct Prepared<'a, F: TileFormat> {
    pub format: &'a F,
    pub factor: &'a Factor,
    /// A of the factor.
    pub feedback: &'a [f32],
    cost: Vec<f32>,
    pub tiles: Vec<F::Tile>,
}

impl<'a, F: TileFormat> Prepared<'a, F> {
    /// Of a factor whose A is `feedback`.
    pub(super) fn new(format: &'a F, factor: &'a Factor, feedback: &'a [f32]) -> Prepared<'a, F> {
        let cost = column_weights(Some(factor.weights()), factor.n());
        let mut prepared = Prepared { format, factor, feedback, cost, tiles: Vec::new() };
        prepared.tiles = (0..factor.tiles().len()).map(|index| format.tile(prepared.columns(index))).collect();
        prepared
    }

    /// Blocks of a row.
    pub(super) fn blocks(&self) -> usize {
        self.factor.n() / self.format.block_len()
    }

    /// The columns of tile `index`.
    pub(super) fn columns(&self, index: usize) -> TileColumns<'_> {
        let n = self.factor.n();
        let start = index * TILE;
        TileColumns {
            cost: &self.cost[start..n.min(start + TILE)],
            feedback: &self.feedback[start * n + start..],
            stride: n,
            moment: &self.factor.tiles()[index],
        }
    }

    /// Rounds a few rows with feedback, then improves them in so many `sweeps`; `errors`, `[rows, n]`, gets weights minus
    /// rounded weights. Gives the blocks and the losses of the rows.
    pub(super) fn round_task(
        &self,
        rows: &[f32],
        errors: &mut [f32],
        sweeps: usize,
    ) -> Result<(Vec<F::Parts>, Vec<f64>), QuantError> {
        let (format, factor, feedback) = (self.format, self.factor, self.feedback);
        let n = factor.n();
        let count = rows.len() / n;
        let (len, blocks) = (format.block_len(), self.blocks());
        let mut parts = vec![F::ZERO; count * blocks];
        let mut u = rows.to_vec();
        for (index, start) in (0..n).step_by(TILE).enumerate() {
            let columns = start..n.min(start + TILE);
            let a = GemmOperand::Plain { data: &feedback[start..], stride: n };
            gemm_f32(count, columns.len(), start, errors, n, a, &mut u[start..], n, true);
            for row in 0..count {
                let at = row * n + start..row * n + columns.end;
                let row = TileRow {
                    weights: &rows[at.clone()],
                    targets: &mut u[at.clone()],
                    errors: &mut errors[at],
                    parts: &mut parts[row * blocks..][start / len..columns.end / len],
                };
                format.round(&self.tiles[index], self.columns(index), row)?;
            }
        }
        // What is left of the targets after the rounded weights: target - rounded = target - (weight - error).
        for ((u, w), error) in u.iter_mut().zip(rows).zip(errors.iter()) {
            *u -= w - error;
        }
        for _ in 0..sweeps {
            let rounded = Rounded { weights: rows, errors, u: &mut u, parts: &mut parts };
            sweep_tiles(len, rounded, factor, feedback, |index, state, parts| {
                format.descend(&self.tiles[index], state, parts);
            });
        }
        let losses = errors.chunks_exact(n).zip(u.chunks_exact(n)).map(|(errors, u)| factor.loss(errors, u)).collect();
        Ok((parts, losses))
    }
}
