//! Rounding with error feedback on these grids, see [`gptq`](crate::rounding::gptq): the factor of the second moment, the
//! tiled order, coordinate descent and the rule that no row ends worse are those of GGUF's types; the levels and scales are
//! other ones.
//!
//! Scales of a group are chosen when its first column comes up, by error, from weights that already carry the feedback;
//! those of a row, and of blocks of several rows, before. A sweep then refits scales, by the damped moment, and every
//! level. The scale of a whole row moves along its levels `L`, which changes `u` by `L (I + A)`: one more product gives
//! the best step exactly.

use rayon::prelude::*;

use super::numbers::{Levels, Nearest, with_levels};
use super::{Groups, Layout, Rounded};
use crate::compute::{GemmOperand, gemm_f32};
use crate::rounding::gptq::{
    self, Directions, Factor, FeedbackError, TILE, TileState, column_weights, inverse, losses, sweep_tiles, task_rows,
};
use crate::vectorized::vectorized;

/// Passes of coordinate descent after rounding.
const SWEEPS: usize = 3;

/// Columns that pass their errors on together.
const BATCH: usize = 32;

/// One rounded weight: `step * level`, with the scale as stored.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cell {
    /// Number of the code minus the zero point.
    pub level: f32,
    pub scale: f32,
    pub zero: f32,
}

/// What does not change from row to row.
#[derive(Clone, Copy)]
pub(super) struct Grids<'a> {
    pub layout: &'a Layout,
    pub levels: Levels,
    pub global: f32,
    /// Columns of a group whose scale is chosen when it comes up; `None` where all scales are given.
    pub chosen: Option<usize>,
}

impl<'a> Grids<'a> {
    fn new(layout: &'a Layout, global: f32) -> Grids<'a> {
        let chosen = match layout.groups {
            Groups::Columns(group) if TILE.is_multiple_of(group) => Some(group),
            _ => None,
        };
        Grids { layout, levels: Levels::of(layout.grid), global, chosen }
    }
}

/// Improves `start`, which is `weights`, `[rows, columns]`, rounded in another way, such as by
/// [`search`](super::search), with the feedback of `factor`; a row that feedback does not make better on the moment that was
/// factored (before damping) stays as it is. The global scale is that of `start`.
///
/// Uses rayon's current pool. The result depends neither on the number of threads nor on the instruction set.
///
/// # Errors
/// [`FeedbackError`] when a weight is not finite or the factor is of other inputs.
///
/// # Panics
/// When `start` is no matrix of this layout and size.
#[doc(alias = "GPTQ")]
#[doc(alias = "LDLQ")]
#[doc(alias = "coordinate descent")]
pub fn feedback(
    layout: Layout,
    weights: &[f32],
    rows: usize,
    columns: usize,
    factor: &Factor,
    start: &Rounded,
) -> Result<Rounded, FeedbackError> {
    feedback_with(layout, weights, rows, columns, factor, start, true, SWEEPS)
}

#[allow(missing_docs)]
pub fn feedback_with(
    layout: Layout,
    weights: &[f32],
    rows: usize,
    columns: usize,
    factor: &Factor,
    start: &Rounded,
    pass: bool,
    sweeps: usize,
) -> Result<Rounded, FeedbackError> {
    layout.check(start, rows, columns);
    assert_eq!(weights.len(), rows * columns, "weights of {rows} rows of {columns}");
    if factor.n() != columns {
        return Err(FeedbackError::Inputs { row_len: columns, found: factor.n() });
    }
    if let Some(index) = crate::quant::first_non_finite(weights) {
        return Err(FeedbackError::NonFinite { index, value: weights[index] });
    }
    let (Some(a), false) = (factor.feedback(), weights.is_empty()) else { return Ok(start.clone()) };
    let grids = Grids::new(&layout, start.global_scale);
    let mut cells = layout.cells(start, rows, columns);
    let task = task_rows(columns, rows) * columns;
    weights.par_chunks(task).zip(cells.par_chunks_mut(task)).for_each(|(weights, kept)| {
        let mut cells = kept.to_vec();
        let mut errors = errors_of(weights, &cells, grids.global);
        let before = losses(&errors, columns, factor, a);
        let found = round_task(grids, weights, factor, a, &mut errors, &mut cells, pass, sweeps);
        let rows = kept.chunks_exact_mut(columns).zip(cells.chunks_exact(columns));
        for ((kept, cells), (found, before)) in rows.zip(found.iter().zip(&before)) {
            if found < before {
                kept.copy_from_slice(cells);
            }
        }
    });
    Ok(layout.rounded(&cells, rows, columns, start.global_scale))
}

/// Weights minus rounded weights.
fn errors_of(weights: &[f32], cells: &[Cell], global: f32) -> Vec<f32> {
    weights.iter().zip(cells).map(|(w, cell)| w - cell.level * (cell.scale / global)).collect()
}

/// Rounds a few rows; `errors` are those of `cells` as they come. Gives the losses of the rows.
fn round_task(
    grids: Grids<'_>,
    weights: &[f32],
    factor: &Factor,
    a: &[f32],
    errors: &mut [f32],
    cells: &mut [Cell],
    pass: bool,
    sweeps: usize,
) -> Vec<f64> {
    let n = factor.n();
    let cost = column_weights(Some(factor.weights()), n);
    let mut u = if pass {
        pass_over(grids, weights, &cost, a, errors, cells)
    } else {
        let mut u = errors.to_vec();
        for start in (0..n).step_by(TILE) {
            let columns = TILE.min(n - start);
            let a = GemmOperand::Plain { data: &a[start..], stride: n };
            gemm_f32(weights.len() / n, columns, start + columns, errors, n, a, &mut u[start..], n, true);
        }
        u
    };
    for _ in 0..sweeps {
        if grids.layout.groups == Groups::Channel {
            refit_rows(grids, weights, factor, a, errors, &mut u, cells);
        }
        let rounded = gptq::Rounded { weights, errors, u: &mut u, parts: cells };
        sweep_tiles(1, rounded, factor, a, |_, tile, cells| descend(grids, tile, cells));
    }
    errors.chunks_exact(n).zip(u.chunks_exact(n)).map(|(errors, u)| factor.loss(errors, u)).collect()
}

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

vectorized! {
    /// One pass of coordinate descent over a row of a tile.
    fn descend(grids: Grids<'_>, tile: TileState<'_>, cells: &mut [Cell]) {
        with_levels!(grids.levels, set => descend_to(grids, set, tile, cells))
    }
}

#[inline(always)]
fn descend_to<L: Nearest>(grids: Grids<'_>, set: L, mut tile: TileState<'_>, cells: &mut [Cell]) {
    let columns = cells.len();
    let group = grids.chosen.unwrap_or(columns);
    for first in (0..columns).step_by(group) {
        match grids.chosen {
            Some(16) => refit_group::<16>(grids, &mut tile, cells, first),
            Some(32) => refit_group::<32>(grids, &mut tile, cells, first),
            Some(64) => refit_group::<64>(grids, &mut tile, cells, first),
            Some(128) => refit_group::<128>(grids, &mut tile, cells, first),
            _ => {}
        }
        for j in first..first + group {
            let Cell { level, scale, zero } = cells[j];
            let step = scale / grids.global;
            let wanted = level * step + tile.gradient[j] * inverse(tile.moment[j * columns + j]);
            let to = set.nearest(wanted / step + zero) - zero;
            if to != level {
                cells[j].level = to;
                tile.set_error(j, tile.weights[j] - to * step);
            }
        }
    }
}

/// Moves the scale and the zero point of a group to where its codes lose least.
#[inline(always)]
fn refit_group<const N: usize>(grids: Grids<'_>, tile: &mut TileState<'_>, cells: &mut [Cell], first: usize) {
    let Cell { scale, zero, .. } = cells[first];
    let ty = grids.layout.scale_type;
    let asymmetric = grids.layout.has_zero_points();
    let shifts = if asymmetric { [1.0; N] } else { [0.0; N] };
    let directions = Directions { steps: std::array::from_fn(|k| cells[first + k].level), shifts };
    let slopes = tile.slopes(&directions, first);
    if slopes.ss.is_nan() || slopes.ss <= 0.0 {
        return;
    }
    let step = scale / grids.global;
    let mut best = (0.0, scale, zero);
    for moved in if asymmetric { &[0.0, 1.0, -1.0][..] } else { &[0.0] } {
        let to_zero = zero + moved;
        if let Levels::Whole(whole) = grids.levels
            && asymmetric
            && !(whole.lowest..=whole.highest).contains(&to_zero)
        {
            continue;
        }
        let wanted = step + (slopes.s + moved * step * slopes.st) / slopes.ss;
        let nearest = ty.nearest(wanted * grids.global);
        for count in [0, 1, -1] {
            let Some(to) = ty.neighbour(nearest, count) else { continue };
            let to_step = to / grids.global;
            let change = slopes.change(to_step - step, -moved * to_step);
            if change < best.0 {
                best = (change, to, to_zero);
            }
        }
    }
    if best.0 < 0.0 {
        let step = best.1 / grids.global;
        for (j, cell) in (first..).zip(&mut cells[first..first + N]) {
            *cell = Cell { level: cell.level + zero - best.2, scale: best.1, zero: best.2 };
            tile.set_error(j, tile.weights[j] - cell.level * step);
        }
    }
}

/// Moves the scale of each row to where its levels lose least, with `u` in step.
fn refit_rows(
    grids: Grids<'_>,
    weights: &[f32],
    factor: &Factor,
    a: &[f32],
    errors: &mut [f32],
    u: &mut [f32],
    cells: &mut [Cell],
) {
    let n = factor.n();
    let levels: Vec<f32> = cells.iter().map(|cell| cell.level).collect();
    let mut directions = levels.clone();
    for start in (0..n).step_by(TILE) {
        let columns = TILE.min(n - start);
        let of_tile = GemmOperand::Plain { data: &a[start..], stride: n };
        gemm_f32(weights.len() / n, columns, start + columns, &levels, n, of_tile, &mut directions[start..], n, true);
    }
    let ty = grids.layout.scale_type;
    let rows = weights.chunks_exact(n).zip(errors.chunks_exact_mut(n)).zip(cells.chunks_exact_mut(n));
    for (((weights, errors), cells), (u, v)) in rows.zip(u.chunks_exact_mut(n).zip(directions.chunks_exact(n))) {
        let (mut s, mut ss) = (0.0f64, 0.0f64);
        for ((u, v), d) in u.iter().zip(v).zip(factor.weights()) {
            let weighed = f64::from(*v) * f64::from(*d);
            s += weighed * f64::from(*u);
            ss += weighed * f64::from(*v);
        }
        let scale = cells[0].scale;
        let step = scale / grids.global;
        let nearest = ty.nearest((f64::from(step) + s / ss) as f32 * grids.global);
        let change = |to: f32| {
            let by = f64::from(to / grids.global) - f64::from(step);
            by * (by * ss - 2.0 * s)
        };
        let candidates = [0, 1, -1].into_iter().filter_map(|count| ty.neighbour(nearest, count));
        let Some(to) = candidates.min_by(|a, b| change(*a).total_cmp(&change(*b))) else { continue };
        // NaN, where all levels are zero, is never less.
        if change(to) < 0.0 {
            let (to_step, by) = (to / grids.global, to / grids.global - step);
            for (((error, w), cell), (u, v)) in errors.iter_mut().zip(weights).zip(cells).zip(u.iter_mut().zip(v)) {
                cell.scale = to;
                *error = w - cell.level * to_step;
                *u -= by * v;
            }
        }
    }
}

impl Layout {
    /// The weights of a matrix one by one.
    pub(super) fn cells(&self, rounded: &Rounded, rows: usize, columns: usize) -> Vec<Cell> {
        let [_, across] = self.scale_shape(rows, columns);
        let group = self.group_columns(columns);
        let levels = Levels::of(self.grid);
        let cell = |(at, code): (usize, &u8)| {
            let at = self.scale_row(at / columns) * across + at % columns / group;
            let zero = rounded.zero_points.get(at).map_or(0.0, |&zero| f32::from(zero));
            Cell { level: levels.value(*code) - zero, scale: rounded.scales[at], zero }
        };
        rounded.codes.par_iter().enumerate().map(cell).collect()
    }

    /// The matrix of these weights.
    pub(super) fn rounded(&self, cells: &[Cell], rows: usize, columns: usize, global_scale: f32) -> Rounded {
        let levels = Levels::of(self.grid);
        let codes = cells.par_iter().map(|cell| levels.code(cell.level + cell.zero)).collect();
        let (down, group) = match self.groups {
            Groups::Blocks { rows, columns } => (rows, columns),
            _ => (1, self.group_columns(columns)),
        };
        let firsts = (0..rows).step_by(down).flat_map(|row| (0..columns).step_by(group).map(move |at| (row, at)));
        let firsts: Vec<Cell> = firsts.map(|(row, at)| cells[row * columns + at]).collect();
        let zero_points =
            if self.has_zero_points() { firsts.iter().map(|cell| cell.zero as i8).collect() } else { Vec::new() };
        Rounded { codes, scales: firsts.iter().map(|cell| cell.scale).collect(), zero_points, global_scale }
    }
}
