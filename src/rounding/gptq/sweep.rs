//! Improving rows that have been rounded: coordinate descent over levels and scales.
//!
//! With errors `E` of a row, the damped moment H and `g = E H`, changing the error of column `j` alone by `c` changes
//! the row's loss by `2 c g[j] + c^2 H[j, j]`, so the weight is best rounded as if it were its rounded value plus
//! `g[j] / H[j, j]`. In the same way the scales of a group or block move all its weights along one or two directions,
//! and five sums say what any step along them is worth. Steps are only taken when they lower the loss.
//!
//! H is not at hand but for tiles on its diagonal: the `g` of a tile's columns comes from the factor, as
//! `(u D) (I + A)^T`, and the tile's changes go back into `u` by another product. What is done within a tile depends on
//! the format: here for weights that are rounded one by one, in [`lattice`](super::lattice) for eight at a time.

use super::columns::TILE;
use super::factor::Factor;
use super::grid::{inverse, neighbour, snap};
use super::layout::Layout;
use crate::compute::{GemmOperand, gemm_f32};
use crate::quant::shape::ScaleShape;
use crate::quant::types::parts::{MAX_LEN, Parts};
use crate::vectorized::vectorized;

/// How far the whole-number scales of a group may move at once.
const REACH: i32 = 3;

/// Rows that are being rounded, row-major: `[rows, n]` floats, `[rows, n / block]` parts.
pub(in crate::rounding) struct Rounded<'a, P> {
    pub weights: &'a [f32],
    /// Weights minus rounded weights.
    pub errors: &'a mut [f32],
    /// Errors with their feedback, `E (I + A)`.
    pub u: &'a mut [f32],
    pub parts: &'a mut [P],
}

/// Goes through all columns once, in blocks of `len`: `descend` takes the number of a tile, one row of it, and the
/// row's blocks.
pub(in crate::rounding) fn sweep_tiles<P>(
    len: usize,
    rows: Rounded<'_, P>,
    factor: &Factor,
    feedback: &[f32],
    descend: impl Fn(usize, TileState<'_>, &mut [P]),
) {
    let Rounded { weights, errors, u, parts } = rows;
    let n = factor.n();
    let count = weights.len() / n;
    let blocks = n / len;
    let mut gradient = vec![0.0f32; count * TILE];
    let mut change = vec![0.0f32; count * TILE];
    for (index, (start, tile)) in (0..n).step_by(TILE).zip(factor.tiles()).enumerate() {
        let columns = TILE.min(n - start);
        tile_gradient(factor, feedback, u, start, &mut gradient);
        for row in 0..count {
            let at = row * n + start..row * n + start + columns;
            let (gradient, change) = (&mut gradient[row * TILE..][..columns], &mut change[row * TILE..][..columns]);
            change.copy_from_slice(&errors[at.clone()]);
            let first = row * blocks + start / len;
            let tile =
                TileState { weights: &weights[at.clone()], errors: &mut errors[at.clone()], gradient, moment: tile };
            descend(index, tile, &mut parts[first..first + columns / len]);
            for (change, error) in change.iter_mut().zip(&errors[at]) {
                *change = error - *change;
            }
        }
        pass_changes_on(feedback, &change, start, u, n);
    }
}

/// The gradient of the loss by the errors of a tile's columns, halved: `(u D) (I + A)^T` there. `u` is `[rows, n]`,
/// `gradient` `[rows, 256]`; `start` is the first column.
pub(super) fn tile_gradient(factor: &Factor, feedback: &[f32], u: &[f32], start: usize, gradient: &mut [f32]) {
    let n = factor.n();
    let (count, columns, rest) = (u.len() / n, TILE.min(n - start), n - start);
    let mut weighed = vec![0.0f32; count * rest];
    for (weighed, u) in weighed.chunks_exact_mut(rest).zip(u.chunks_exact(n)) {
        for ((weighed, u), cost) in weighed.iter_mut().zip(&u[start..]).zip(&factor.weights()[start..]) {
            *weighed = u * cost;
        }
    }
    let transposed = GemmOperand::Transposed { data: &feedback[start * n + start..], stride: n };
    gemm_f32(count, columns, rest, &weighed, rest, transposed, gradient, TILE, false);
    for (gradient, weighed) in gradient.chunks_exact_mut(TILE).zip(weighed.chunks_exact(rest)) {
        gradient.iter_mut().zip(&weighed[..columns]).for_each(|(gradient, weighed)| *gradient += weighed);
    }
}

/// Adds what changes of the errors of a tile's columns, `[rows, 256]`, do to `u`, `[rows, n]`: `change (I + A)`.
pub(super) fn pass_changes_on(feedback: &[f32], change: &[f32], start: usize, u: &mut [f32], n: usize) {
    let (count, columns) = (u.len() / n, TILE.min(n - start));
    for (u, change) in u.chunks_exact_mut(n).zip(change.chunks_exact(TILE)) {
        u[start..].iter_mut().zip(&change[..columns]).for_each(|(u, change)| *u += change);
    }
    let plain = GemmOperand::Plain { data: &feedback[start * n + start..], stride: n };
    gemm_f32(count, n - start, columns, change, TILE, plain, &mut u[start..], n, true);
}

/// One row of a tile: all slices have one element per column, `moment` is `[columns, columns]`.
pub(in crate::rounding) struct TileState<'a> {
    pub weights: &'a [f32],
    pub errors: &'a mut [f32],
    /// The errors times the damped moment.
    pub gradient: &'a mut [f32],
    pub moment: &'a [f32],
}

/// Directions in which errors can be moved, as negative changes of the errors: along `steps`, and along `shifts`.
pub(in crate::rounding) struct Directions<const N: usize> {
    pub steps: [f32; N],
    pub shifts: [f32; N],
}

/// What moving by `a` along the steps and `b` along the shifts does to the loss:
/// `-2 (a s + b t) + a^2 ss + 2 a b st + b^2 tt`.
pub(in crate::rounding) struct Slopes {
    pub s: f32,
    pub t: f32,
    pub ss: f32,
    pub st: f32,
    pub tt: f32,
}

impl Slopes {
    pub(in crate::rounding) fn change(&self, a: f32, b: f32) -> f32 {
        a * (a * self.ss + 2.0 * (b * self.st - self.s)) + b * (b * self.tt - 2.0 * self.t)
    }
}

impl TileState<'_> {
    /// Sets the error of column `j` and keeps the gradient in step.
    #[inline(always)]
    pub(in crate::rounding) fn set_error(&mut self, j: usize, error: f32) {
        let change = error - self.errors[j];
        if change != 0.0 {
            self.errors[j] = error;
            let columns = self.gradient.len();
            add_scaled(self.gradient, change, &self.moment[j * columns..][..columns]);
        }
    }

    /// What moving the errors of the columns from `start` on along `directions` does.
    #[inline(always)]
    pub(in crate::rounding) fn slopes<const N: usize>(&self, directions: &Directions<N>, start: usize) -> Slopes {
        let columns = self.gradient.len();
        let (mut by_steps, mut by_shifts) = ([0.0f32; N], [0.0f32; N]);
        for k in 0..N {
            let moment = &self.moment[(start + k) * columns + start..][..N];
            add_scaled(&mut by_steps, directions.steps[k], moment);
            add_scaled(&mut by_shifts, directions.shifts[k], moment);
        }
        let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).fold(0.0f32, |sum, (x, y)| sum + x * y);
        let gradient = &self.gradient[start..start + N];
        Slopes {
            s: dot(&directions.steps, gradient),
            t: dot(&directions.shifts, gradient),
            ss: dot(&directions.steps, &by_steps),
            st: dot(&directions.steps, &by_shifts),
            tt: dot(&directions.shifts, &by_shifts),
        }
    }

    /// Sets the errors of a group from its scales and levels as stored.
    #[inline(always)]
    fn restore_group(&mut self, layout: &Layout, parts: &Parts, block: usize, group: usize) {
        let grid = layout.grid(parts, group);
        for k in group * layout.group..(group + 1) * layout.group {
            let j = block * layout.len + k;
            self.set_error(j, self.weights[j] - grid.value(parts.levels[k]));
        }
    }
}

/// `sums[k] += factor * values[k]`.
#[inline(always)]
fn add_scaled(sums: &mut [f32], factor: f32, values: &[f32]) {
    for (sum, value) in sums.iter_mut().zip(values) {
        *sum += factor * value;
    }
}

vectorized! {
    /// One pass over a row of a tile.
    pub(super) fn descend(layout: &Layout, tile: TileState<'_>, parts: &mut [Parts]) {
        descend_blocks(layout, tile, parts);
    }
}

#[inline(always)]
fn descend_blocks(layout: &Layout, mut tile: TileState<'_>, parts: &mut [Parts]) {
    let columns = tile.gradient.len();
    for (block, parts) in parts.iter_mut().enumerate() {
        if layout.len == MAX_LEN {
            refit_block::<MAX_LEN>(layout, &mut tile, parts, block);
        } else {
            refit_block::<32>(layout, &mut tile, parts, block);
        }
        for group in 0..layout.len / layout.group {
            if layout.group == 16 {
                refit_group::<16>(layout, &mut tile, parts, block, group);
            } else {
                refit_group::<32>(layout, &mut tile, parts, block, group);
            }
            let grid = layout.grid(parts, group);
            for k in group * layout.group..(group + 1) * layout.group {
                let j = block * layout.len + k;
                let rounded = tile.weights[j] - tile.errors[j];
                let (value, level) = grid.round(rounded + tile.gradient[j] * inverse(tile.moment[j * columns + j]));
                if level != parts.levels[k] {
                    parts.levels[k] = level;
                    tile.set_error(j, tile.weights[j] - value);
                }
            }
        }
    }
}

/// Moves the binary16 scales of a block to where its levels lose least.
#[inline(always)]
fn refit_block<const N: usize>(layout: &Layout, tile: &mut TileState<'_>, parts: &mut Parts, block: usize) {
    let mut directions = Directions { steps: [0.0; N], shifts: [0.0; N] };
    for k in 0..N {
        let group = k / layout.group;
        let level = layout.level(parts.levels[k]);
        (directions.steps[k], directions.shifts[k]) = match layout.kind {
            ScaleShape::Step => (level, 0.0),
            ScaleShape::Line => (level, 1.0),
            ScaleShape::GroupSteps { .. } => (f32::from(parts.scales[group]) * level, 0.0),
            ScaleShape::GroupLines { .. } => (f32::from(parts.scales[group]) * level, -f32::from(parts.mins[group])),
        };
    }
    let slopes = tile.slopes(&directions, block * layout.len);
    let determinant = slopes.ss * slopes.tt - slopes.st * slopes.st;
    let alone = slopes.s / slopes.ss;
    let (a, b) = if determinant > 1e-4 * slopes.ss * slopes.tt {
        let a = (slopes.s * slopes.tt - slopes.t * slopes.st) / determinant;
        (a, (slopes.t * slopes.ss - slopes.s * slopes.st) / determinant)
    } else {
        (alone, 0.0)
    };
    let (d, dmin) = (parts.d, parts.dmin);
    let mut best = (0.0, d, dmin);
    let allowed = |dmin: f32| layout.kind == ScaleShape::Line || dmin >= 0.0;
    for (to_d, to_dmin) in [(d + a, dmin + b), (d + alone, dmin), (d, dmin + slopes.t / slopes.tt)] {
        for count in [0, 1, -1] {
            let (Some(to_d), to_dmin) = (neighbour(snap(to_d), count), snap(to_dmin)) else { continue };
            let change = slopes.change(to_d - d, to_dmin - dmin);
            if change < best.0 && allowed(to_dmin) {
                best = (change, to_d, to_dmin);
            }
        }
    }
    if best.0 < 0.0 {
        (parts.d, parts.dmin) = (best.1, best.2);
        for group in 0..layout.len / layout.group {
            tile.restore_group(layout, parts, block, group);
        }
    }
}

/// Moves the whole-number scales of a group to where its levels lose least.
#[inline(always)]
fn refit_group<const N: usize>(
    layout: &Layout,
    tile: &mut TileState<'_>,
    parts: &mut Parts,
    block: usize,
    group: usize,
) {
    let (scales, mins) = match layout.kind {
        ScaleShape::Step | ScaleShape::Line => return,
        ScaleShape::GroupSteps { lowest, highest } => ([lowest.into(), highest.into()], [0, 0]),
        ScaleShape::GroupLines { top } => ([0, top.into()], [0, top.into()]),
    };
    let first = group * layout.group;
    let mut directions = Directions { steps: [0.0; N], shifts: [0.0; N] };
    for k in 0..N {
        directions.steps[k] = layout.level(parts.levels[first + k]);
        directions.shifts[k] = -1.0;
    }
    let slopes = tile.slopes(&directions, block * layout.len + first);
    let around = |value: i32, range: [i32; 2]| (value - REACH).max(range[0])..=(value + REACH).min(range[1]);
    let (scale, min) = (i32::from(parts.scales[group]), i32::from(parts.mins[group]));
    let mut best = (0.0, scale, min);
    for to_scale in around(scale, scales) {
        for to_min in around(min, mins) {
            let change = slopes.change(parts.d * (to_scale - scale) as f32, parts.dmin * (to_min - min) as f32);
            if change < best.0 {
                best = (change, to_scale, to_min);
            }
        }
    }
    if best.0 < 0.0 {
        (parts.scales[group], parts.mins[group]) = (best.1 as i16, best.2 as u8);
        tile.restore_group(layout, parts, block, group);
    }
}
