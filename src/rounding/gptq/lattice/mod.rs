//! Rounding by groups of eight weights: IQ2 and IQ3, whose weights are points of a lattice with signs beside them.
//!
//! Within eight columns `g` feedback cannot be passed on from weight to weight, as all are chosen at once. With the
//! feedback F that has arrived, the loss is `(t - c) M (t - c)^T` for `t = w + F (I + A_g)^-1` and
//! `M = (I + A_g) D_g (I + A_g)^T`, A_g being the part of A on the diagonal. The points that are nearest by the
//! diagonal of M are compared with all of M, with signs that may deviate from those of t.

use super::columns::{TILE, TileRow, pass_on};
use super::format::{TileColumns, TileFormat};
use super::sweep::TileState;
use crate::gguf::TensorType;
use crate::quant::shape::{BlockShape, LatticeShape};
use crate::quant::types::parts::{LatticeParts, OCTETS};
use crate::quant::{self, CODECS, Codec, QuantError, codec};
use descent::{Descent, descend};
use nearest::{Nearest, Octet};
use points::{Costs, NO_COSTS, Points};
use std::sync::OnceLock;

mod descent;
mod nearest;
mod points;
#[cfg(test)]
mod tests;

/// Weights of a block.
const LEN: usize = 256;
const _: () = assert!(OCTETS * 8 == LEN && LEN == TILE);

/// Bytes of the largest block.
const MOST_BYTES: usize = 128;

/// Highest scale code.
const TOP: i32 = 15;

/// Steps to either side of the first scale code that are tried.
const REACH: i32 = 1;

/// What rounding a tile goes by.
pub(super) struct LatticeTile {
    /// One for each eight columns.
    metrics: Vec<Metric>,
    descents: Vec<Descent>,
}

impl TileFormat for LatticeLayout {
    type Parts = LatticeParts;
    type Tile = LatticeTile;

    const ZERO: LatticeParts = LatticeParts::ZERO;

    fn block_len(&self) -> usize {
        LEN
    }

    fn tile(&self, columns: TileColumns<'_>) -> LatticeTile {
        let feedback = Some((columns.feedback, columns.stride));
        LatticeTile {
            metrics: (0..LEN).step_by(8).map(|first| Metric::new(columns.cost, feedback, first)).collect(),
            descents: Descent::of_tile(columns.moment),
        }
    }

    /// The first guess of all scales is what ggml would choose for the targets.
    fn round(
        &self,
        tile: &LatticeTile,
        columns: TileColumns<'_>,
        row: TileRow<'_, LatticeParts>,
    ) -> Result<(), QuantError> {
        let mut guess = [0; MOST_BYTES];
        let guess = &mut guess[..self.bytes];
        quant::quantize_rows(self.ty, row.targets, LEN, Some(columns.cost), guess)?;
        row.parts[0].read_scales(self.ty, guess);
        self.round_tile(row, &tile.metrics, Some((columns.feedback, columns.stride)));
        Ok(())
    }

    fn descend(&self, tile: &LatticeTile, state: TileState<'_>, parts: &mut [LatticeParts]) {
        descend(self, state, &tile.descents, &mut parts[0]);
    }

    fn write(&self, parts: &[LatticeParts], bytes: &mut [u8]) {
        for (parts, block) in parts.iter().zip(bytes.chunks_exact_mut(self.bytes)) {
            parts.write(self.ty, block);
        }
    }
}

/// Rounds a few rows, `[rows, n]` with `n` elements of `cost`, without feedback. `guesses` holds ggml's bytes for them.
/// Gives the blocks.
pub(super) fn search_task(layout: &LatticeLayout, rows: &[f32], cost: &[f32], guesses: &[u8]) -> Vec<LatticeParts> {
    let mut parts = vec![LatticeParts::ZERO; rows.len() / LEN];
    let metrics: Vec<Metric> = (0..cost.len()).step_by(8).map(|first| Metric::new(cost, None, first)).collect();
    let (mut targets, mut errors) = ([0.0; LEN], [0.0; LEN]);
    let blocks = rows.as_chunks::<LEN>().0.iter().zip(guesses.chunks_exact(layout.bytes));
    for (index, (parts, (weights, guess))) in parts.chunks_exact_mut(1).zip(blocks).enumerate() {
        parts[0].read_scales(layout.ty, guess);
        targets.copy_from_slice(weights);
        let octet = index * OCTETS % metrics.len();
        let row = TileRow { weights, targets: &mut targets, errors: &mut errors, parts };
        layout.round_tile(row, &metrics[octet..octet + OCTETS], None);
    }
    parts
}

/// One format.
pub(super) struct LatticeLayout {
    pub ty: TensorType,
    /// Bytes per block.
    pub bytes: usize,
    /// Weights that share a scale.
    pub group: usize,
    points: &'static Points,
    shape: LatticeShape,
}

impl LatticeLayout {
    /// The format of `ty`, if its weights are points of a lattice.
    pub(super) fn of(ty: TensorType) -> Option<LatticeLayout> {
        let Some(BlockShape::Lattice(shape)) = codec(ty)?.shape else { return None };
        static POINTS: OnceLock<Vec<(TensorType, Points)>> = OnceLock::new();
        let points = POINTS.get_or_init(|| {
            let points = |codec: &Codec| match codec.shape {
                Some(BlockShape::Lattice(shape)) => Some((codec.ty, Points::new(shape.points))),
                _ => None,
            };
            CODECS.iter().filter_map(points).collect()
        });
        let (_, points) = points.iter().find(|(of, _)| *of == ty)?;
        Some(LatticeLayout { ty, bytes: ty.info()?.block_bytes, group: shape.group, points, shape })
    }

    /// The number that magnitudes are multiplied with, rounded as in decoding.
    #[inline(always)]
    fn scale(&self, d: f32, code: u8) -> f32 {
        self.shape.scale(d, code)
    }

    /// Rounds a row of a tile, which is one block, see [`super::layout::Layout::round_tile`]. `parts` holds first
    /// guesses of the scales; `metrics` one M for each eight columns.
    pub(super) fn round_tile(
        &self,
        row: TileRow<'_, LatticeParts>,
        metrics: &[Metric],
        feedback: Option<(&[f32], usize)>,
    ) {
        let TileRow { weights, targets, errors, parts } = row;
        let parts = &mut parts[0];
        parts.d = if parts.d.is_finite() { parts.d } else { 0.0 };
        for (group, first) in (0..LEN).step_by(self.group).enumerate() {
            let columns = first..first + self.group;
            let choice = self.group_choice(parts.d, parts.scales[group], weights, targets, first, metrics, feedback);
            parts.scales[group] = choice.code;
            for (index, octet) in (first / 8..columns.end / 8).enumerate() {
                (parts.points[octet], parts.signs[octet]) = (choice.octets[index].points, choice.octets[index].signs);
            }
            errors[columns.clone()].copy_from_slice(&choice.errors[..self.group]);
            targets[columns.clone()].copy_from_slice(&choice.targets[..self.group]);
            if let Some((a, stride)) = feedback {
                pass_on(
                    &errors[columns.clone()],
                    &a[first * stride..],
                    stride,
                    &mut targets[columns.end..],
                    columns.end,
                );
            }
        }
    }

    /// The best scale code of a group around `code`, and what it makes of the group, with all feedback inside it.
    #[allow(clippy::too_many_arguments)] // a row of a tile with its surroundings
    fn group_choice(
        &self,
        d: f32,
        code: u8,
        weights: &[f32],
        targets: &[f32],
        first: usize,
        metrics: &[Metric],
        feedback: Option<(&[f32], usize)>,
    ) -> GroupChoice {
        let code = i32::from(code);
        let mut costs: Costs = NO_COSTS;
        let mut best: Option<GroupChoice> = None;
        for code in (code - REACH).max(0)..=(code + REACH).min(TOP) {
            let scale = self.scale(d, code as u8);
            let mut choice = GroupChoice {
                code: code as u8,
                octets: [Octet::default(); 4],
                errors: [0.0; 32],
                targets: [0.0; 32],
                loss: 0.0,
            };
            choice.targets[..self.group].copy_from_slice(&targets[first..first + self.group]);
            for index in 0..self.group / 8 {
                let columns = first + 8 * index..first + 8 * index + 8;
                let metric = &metrics[columns.start / 8];
                let wanted = metric.target(&weights[columns.clone()], &choice.targets[8 * index..8 * index + 8]);
                let Nearest { octet, values, .. } = self.nearest(&wanted, metric, scale, &mut costs);
                choice.octets[index] = octet;
                for (k, value) in values.into_iter().enumerate() {
                    let at = 8 * index + k;
                    let error = weights[first + at] - value;
                    choice.errors[at] = error;
                    let left = choice.targets[at] - value;
                    choice.loss += metric.cost[k] * left * left;
                    if let Some((a, stride)) = feedback {
                        let a = &a[(first + at) * stride..];
                        for (target, a) in choice.targets[at + 1..self.group].iter_mut().zip(&a[first + at + 1..]) {
                            *target += error * a;
                        }
                    }
                }
            }
            if best.as_ref().is_none_or(|best| choice.loss < best.loss) {
                best = Some(choice);
            }
        }
        match best {
            Some(best) => best,
            None => unreachable!("there is always a scale code"),
        }
    }
}

/// What a scale code makes of a group.
struct GroupChoice {
    code: u8,
    octets: [Octet; 4],
    errors: [f32; 32],
    /// Targets with all feedback up to each column.
    targets: [f32; 32],
    loss: f32,
}

/// M of eight columns, with what is needed to get there.
pub(super) struct Metric {
    /// M, symmetric.
    matrix: [[f32; 8]; 8],
    diagonal: [f32; 8],
    /// I + A_g.
    unit: [[f32; 8]; 8],
    cost: [f32; 8],
    /// Whether M has nothing beside its diagonal.
    diagonal_only: bool,
}

impl Metric {
    /// M of the tile's columns `first..first + 8`; see [`LatticeLayout::round_tile`] for `feedback`.
    pub(super) fn new(cost: &[f32], feedback: Option<(&[f32], usize)>, first: usize) -> Metric {
        let mut unit = [[0.0; 8]; 8];
        for i in 0..8 {
            unit[i][i] = 1.0;
            if let Some((a, stride)) = feedback {
                for j in i + 1..8 {
                    unit[i][j] = a[(first + i) * stride + first + j];
                }
            }
        }
        let cost: [f32; 8] = std::array::from_fn(|i| cost[first + i]);
        let element = |i: usize, j: usize| (i.max(j)..8).fold(0.0, |sum, k| sum + unit[i][k] * cost[k] * unit[j][k]);
        let matrix = std::array::from_fn(|i| std::array::from_fn(|j| element(i, j)));
        let diagonal = std::array::from_fn(|i| element(i, i));
        Metric { matrix, diagonal, unit, cost, diagonal_only: feedback.is_none() }
    }

    /// M as it is given, for a search without feedback.
    fn of_moment(matrix: [[f32; 8]; 8]) -> Metric {
        let diagonal = std::array::from_fn(|i| matrix[i][i]);
        let unit = std::array::from_fn(|i| std::array::from_fn(|j| f32::from(u8::from(i == j))));
        Metric { matrix, diagonal, unit, cost: diagonal, diagonal_only: false }
    }

    /// `w + F (I + A_g)^-1` for `targets = w + F`.
    fn target(&self, weights: &[f32], targets: &[f32]) -> [f32; 8] {
        let mut x = [0.0f32; 8];
        for j in 0..8 {
            x[j] = (0..j).fold(targets[j] - weights[j], |sum, k| sum - x[k] * self.unit[k][j]);
        }
        std::array::from_fn(|j| weights[j] + x[j])
    }
}
