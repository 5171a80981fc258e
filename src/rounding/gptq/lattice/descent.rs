//! Coordinate descent over the points and scales of rounded blocks, see [`sweep`](super::super::sweep).
//!
//! With the errors of eight columns and their gradient `g`, the loss of other values `q` in these columns alone is
//! `(q - t) H (q - t)^T` plus what no choice changes, for `t = rounded + g H^-1` and the eight columns' own part of the
//! damped moment H: the search for the nearest point serves here, too.

use super::super::columns::TILE;
use super::super::grid::{neighbour, snap};
use super::super::sweep::{Directions, TileState};
use super::nearest::Octet;
use super::points::{Costs, NO_COSTS};
use super::{LEN, LatticeLayout, Metric, REACH, TOP};
use crate::quant::types::parts::{LatticeParts, OCTETS};
use crate::vectorized::vectorized;

/// The part of the damped moment that belongs to eight columns.
pub(super) struct Descent {
    metric: Metric,
    /// Its inverse, symmetric.
    inverse: [[f32; 8]; 8],
}

impl Descent {
    /// One for each eight columns of a tile on the diagonal of the damped moment, `[256, 256]`.
    pub(super) fn of_tile(tile: &[f32]) -> Vec<Descent> {
        let element = |first: usize, i: usize, j: usize| tile[(first + i) * TILE + first + j];
        let of = |first: usize| {
            let matrix: [[f32; 8]; 8] = std::array::from_fn(|i| std::array::from_fn(|j| element(first, i, j)));
            Descent { inverse: inverse(&matrix), metric: Metric::of_moment(matrix) }
        };
        (0..LEN).step_by(8).map(of).collect()
    }

    /// `g H^-1`: how far the rounded values are from those that lose least.
    #[inline(always)]
    pub(super) fn step(&self, gradient: &[f32; 8]) -> [f32; 8] {
        let mut step = [0.0f32; 8];
        for (gradient, row) in gradient.iter().zip(&self.inverse) {
            for (step, inverse) in step.iter_mut().zip(row) {
                *step += gradient * inverse;
            }
        }
        step
    }
}

/// The inverse of a positive definite matrix, by Gauss-Jordan elimination, which needs no pivoting there.
fn inverse(matrix: &[[f32; 8]; 8]) -> [[f32; 8]; 8] {
    let mut left = matrix.map(|row| row.map(f64::from));
    let mut right: [[f64; 8]; 8] = std::array::from_fn(|i| std::array::from_fn(|j| f64::from(u8::from(i == j))));
    for k in 0..8 {
        let pivot = 1.0 / left[k][k];
        left[k] = left[k].map(|v| v * pivot);
        right[k] = right[k].map(|v| v * pivot);
        for i in (0..8).filter(|&i| i != k) {
            let factor = left[i][k];
            for j in 0..8 {
                left[i][j] -= factor * left[k][j];
                right[i][j] -= factor * right[k][j];
            }
        }
    }
    right.map(|row| row.map(|v| v as f32))
}

vectorized! {
    /// One pass over a row of a tile, which is one block.
    pub(super) fn descend(
        layout: &LatticeLayout,
        tile: TileState<'_>,
        descents: &[Descent],
        parts: &mut LatticeParts,
    ) {
        descend_block(layout, tile, descents, parts);
    }
}

#[inline(always)]
fn descend_block(layout: &LatticeLayout, mut tile: TileState<'_>, descents: &[Descent], parts: &mut LatticeParts) {
    let mut costs: Costs = NO_COSTS;
    let mut magnitudes = [0.0f32; LEN];
    for octet in 0..OCTETS {
        layout.read_octet(parts, octet, &mut magnitudes);
    }
    refit_block(layout, &mut tile, parts, &magnitudes);
    for (group, first) in (0..LEN).step_by(layout.group).enumerate() {
        if layout.group == 16 {
            refit_group::<16>(layout, &mut tile, parts, group, &magnitudes);
        } else {
            refit_group::<32>(layout, &mut tile, parts, group, &magnitudes);
        }
        let scale = layout.scale(parts.d, parts.scales[group]);
        let octets = first / 8..(first + layout.group) / 8;
        for (octet, descent) in octets.clone().zip(&descents[octets]) {
            choose_octet(layout, &mut tile, descent, parts, octet, scale, &mut costs);
        }
    }
}

/// Takes the point and signs that lose least with a scale, where they are better than what is there.
#[inline(always)]
fn choose_octet(
    layout: &LatticeLayout,
    tile: &mut TileState<'_>,
    descent: &Descent,
    parts: &mut LatticeParts,
    octet: usize,
    scale: f32,
    costs: &mut Costs,
) {
    let first = 8 * octet;
    let gradient: [f32; 8] = std::array::from_fn(|i| tile.gradient[first + i]);
    let step = descent.step(&gradient);
    let wanted = std::array::from_fn(|i| tile.weights[first + i] - tile.errors[first + i] + step[i]);
    let present = step.iter().zip(&gradient).fold(0.0f32, |sum, (x, g)| sum + x * g);
    let found = layout.nearest(&wanted, &descent.metric, scale, costs);
    if found.best < present {
        let Octet { points, signs } = found.octet;
        (parts.points[octet], parts.signs[octet]) = (points, signs);
        for (i, value) in found.values.into_iter().enumerate() {
            tile.set_error(first + i, tile.weights[first + i] - value);
        }
    }
}

/// Moves the scale of a block to where its points lose least.
#[inline(always)]
fn refit_block(layout: &LatticeLayout, tile: &mut TileState<'_>, parts: &mut LatticeParts, magnitudes: &[f32; LEN]) {
    let mut directions = Directions { steps: [0.0; LEN], shifts: [0.0; LEN] };
    for (k, (step, magnitude)) in directions.steps.iter_mut().zip(magnitudes).enumerate() {
        *step = layout.scale(1.0, parts.scales[k / layout.group]) * magnitude;
    }
    let slopes = tile.slopes(&directions, 0);
    let d = parts.d;
    let mut best = (0.0, d);
    for count in [0, 1, -1] {
        let Some(to) = neighbour(snap(d + slopes.s / slopes.ss), count) else { continue };
        let change = slopes.change(to - d, 0.0);
        if change < best.0 {
            best = (change, to);
        }
    }
    if best.0 < 0.0 {
        parts.d = best.1;
        for group in 0..LEN / layout.group {
            restore_group(layout, tile, parts, group, magnitudes);
        }
    }
}

/// Moves the scale code of a group to where its points lose least.
#[inline(always)]
fn refit_group<const N: usize>(
    layout: &LatticeLayout,
    tile: &mut TileState<'_>,
    parts: &mut LatticeParts,
    group: usize,
    magnitudes: &[f32; LEN],
) {
    let first = group * N;
    let steps = std::array::from_fn(|k| magnitudes[first + k]);
    let slopes = tile.slopes(&Directions { steps, shifts: [0.0; N] }, first);
    let code = parts.scales[group];
    let scale = layout.scale(parts.d, code);
    let mut best = (0.0, code);
    for to in (i32::from(code) - REACH).max(0)..=(i32::from(code) + REACH).min(TOP) {
        let change = slopes.change(layout.scale(parts.d, to as u8) - scale, 0.0);
        if change < best.0 {
            best = (change, to as u8);
        }
    }
    if best.0 < 0.0 {
        parts.scales[group] = best.1;
        restore_group(layout, tile, parts, group, magnitudes);
    }
}

/// Sets the errors of a group from its scales as stored.
#[inline(always)]
fn restore_group(
    layout: &LatticeLayout,
    tile: &mut TileState<'_>,
    parts: &LatticeParts,
    group: usize,
    magnitudes: &[f32; LEN],
) {
    let scale = layout.scale(parts.d, parts.scales[group]);
    let columns = group * layout.group..(group + 1) * layout.group;
    for (j, magnitude) in columns.clone().zip(&magnitudes[columns]) {
        tile.set_error(j, tile.weights[j] - scale * magnitude);
    }
}

impl LatticeLayout {
    /// The signed magnitudes that eight weights store.
    #[inline(always)]
    fn read_octet(&self, parts: &LatticeParts, octet: usize, magnitudes: &mut [f32; LEN]) {
        for (i, magnitude) in magnitudes[8 * octet..][..8].iter_mut().enumerate() {
            let point = parts.points[octet][i / self.points.dims];
            let value = f32::from(self.points.row(point)[i % self.points.dims]);
            *magnitude = if parts.signs[octet] >> i & 1 == 1 { -value } else { value };
        }
    }
}
