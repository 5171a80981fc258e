//! The pass over the columns, each of which makes up for the errors of those before it.

use super::cells::{Cell, Grids};
use super::numbers::with_levels;
use crate::compute::{GemmOperand, gemm_f32};
use crate::rounding::gptq::{Nearest, TILE};
use crate::vectorized::vectorized;

/// Columns that pass their errors on together.
const BATCH: usize = 32;

/// Rounds rows column by column. Gives `u`: the errors with their feedback, `[rows, n]`.
pub(super) fn pass_over(
    grids: Grids<'_>,
    weights: &[f32],
    cost: &[f32],
    a: &[f32],
    errors: &mut [f32],
    cells: &mut [Cell],
) -> Vec<f32> {
    let n = cost.len();
    let count = weights.len() / n;
    let mut u = weights.to_vec();
    for start in (0..n).step_by(TILE) {
        let columns = start..n.min(start + TILE);
        let before = GemmOperand::Plain { data: &a[start..], stride: n };
        gemm_f32(count, columns.len(), start, errors, n, before, &mut u[start..], n, true);
        for row in 0..count {
            let at = row * n + start..row * n + columns.end;
            let row = TileRow {
                weights: &weights[at.clone()],
                targets: &mut u[at.clone()],
                errors: &mut errors[at.clone()],
                cells: &mut cells[at],
            };
            round_tile(grids, row, &cost[columns.clone()], &a[start * n + start..], n);
        }
    }
    // What is left of the targets after the rounded weights: target - rounded = target - (weight - error).
    for ((u, w), error) in u.iter_mut().zip(weights).zip(errors.iter()) {
        *u -= w - error;
    }
    u
}

/// One row of a tile: an element per column.
struct TileRow<'a> {
    weights: &'a [f32],
    /// The weights with the feedback from columns before the tile; afterwards, with all feedback.
    targets: &'a mut [f32],
    errors: &'a mut [f32],
    cells: &'a mut [Cell],
}

vectorized! {
    /// Rounds a row of a tile; element `j` of row `k` of `a`, whose rows are `stride` long, says what column `j` does for
    /// an error of column `k`.
    fn round_tile(grids: Grids<'_>, row: TileRow<'_>, cost: &[f32], a: &[f32], stride: usize) {
        with_levels!(grids.levels, set => round_tile_to(grids, set, row, cost, a, stride))
    }
}

#[inline(always)]
fn round_tile_to<L: Nearest>(grids: Grids<'_>, set: L, row: TileRow<'_>, cost: &[f32], a: &[f32], stride: usize) {
    let TileRow { weights, targets, errors, cells } = row;
    let columns = weights.len();
    let batch = grids.chosen.map_or(BATCH, |group| group.min(BATCH));
    for first in (0..columns).step_by(batch) {
        let end = columns.min(first + batch);
        if let Some(group) = grids.chosen.filter(|group| first.is_multiple_of(*group)) {
            let range = first..first + group;
            let found = grids.layout.best_scale(&targets[range.clone()], &cost[range.clone()], grids.global);
            cells[range].iter_mut().for_each(|cell| (cell.scale, cell.zero) = (found.scale, found.zero));
        }
        for j in first..end {
            let cell = &mut cells[j];
            let step = cell.scale / grids.global;
            cell.level = set.nearest(targets[j] / step + cell.zero) - cell.zero;
            errors[j] = weights[j] - cell.level * step;
            for (target, a) in targets[j + 1..end].iter_mut().zip(&a[j * stride + j + 1..]) {
                *target += errors[j] * a;
            }
        }
        if end < columns {
            pass_on(&errors[first..end], &a[first * stride + end..], stride, &mut targets[end..]);
        }
    }
}

/// Adds `errors[k] * a[k * stride + j]` to `targets[j]`, for each `k` in order.
#[inline(always)]
fn pass_on(errors: &[f32], a: &[f32], stride: usize, targets: &mut [f32]) {
    // Targets of a part stay in registers.
    const PART: usize = 16;
    let (parts, rest) = targets.as_chunks_mut::<PART>();
    let first_of_rest = parts.len() * PART;
    for (part, targets) in parts.iter_mut().enumerate() {
        let mut sums = *targets;
        for (error, a) in errors.iter().zip(a[part * PART..].chunks(stride)) {
            for (sum, a) in sums.iter_mut().zip(&a[..PART]) {
                *sum += error * a;
            }
        }
        *targets = sums;
    }
    for (error, a) in errors.iter().zip(a.get(first_of_rest..).unwrap_or(&[]).chunks(stride)) {
        for (target, a) in rest.iter_mut().zip(a) {
            *target += error * a;
        }
    }
}
