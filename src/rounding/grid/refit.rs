//! Scales moved to where the levels lose least.
//!
//! Moving the step of a group by `a` changes the errors by `-a L`, with its levels `L`, and so `u` by `-a L (I + A)`: with
//! `V = L (I + A)` the loss changes by `a^2 (V D V^T) - 2 a (u D V^T)`, which is exact for any order of the columns. Where
//! a group lies in a tile whose moment is at hand, that says the same at less cost.

use super::cells::{Cell, Grids};
use super::numbers::Levels;
use super::{Groups, Layout};
use crate::compute::{GemmOperand, gemm_f32};
use crate::rounding::gptq::{Directions, Factor, TileState};

/// What moving the step by `a` and all values of the group by `b` does to the loss:
/// `a^2 ss + 2 a b st + b^2 tt - 2 (a s + b t)`.
#[derive(Clone, Copy, Debug, Default)]
struct Slopes {
    s: f64,
    t: f64,
    ss: f64,
    st: f64,
    tt: f64,
}

/// A scale as stored, with a zero point.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Scale {
    scale: f32,
    zero: f32,
}

impl Grids<'_> {
    /// The scale near the least loss, if it is better than that of `from`.
    fn better(&self, from: Scale, slopes: Slopes) -> Option<Scale> {
        let Slopes { s, t, ss, st, tt } = slopes;
        if ss.is_nan() || ss <= 0.0 {
            return None;
        }
        let ty = self.layout.scale_type;
        let step_of = |scale: f32| f64::from(scale / self.global);
        let (step, sign) = (step_of(from.scale), from.scale.signum());
        let moves: &[f32] = if self.layout.has_zero_points() { &[0.0, 1.0, -1.0] } else { &[0.0] };
        let mut best = (0.0, from);
        for &moved in moves {
            let zero = from.zero + moved;
            if let Levels::Whole(whole) = self.levels
                && !(whole.lowest..=whole.highest).contains(&zero)
            {
                continue;
            }
            let wanted = step + (s + f64::from(moved) * step * st) / ss;
            let nearest = ty.nearest(sign * (wanted * f64::from(self.global)) as f32);
            for scale in [0, 1, -1].into_iter().filter_map(|count| ty.neighbour(nearest, count)).map(|to| sign * to) {
                let to = step_of(scale);
                let (a, b) = (to - step, -f64::from(moved) * to);
                let change = a * (a * ss + 2.0 * (b * st - s)) + b * (b * tt - 2.0 * t);
                if change < best.0 {
                    best = (change, Scale { scale, zero });
                }
            }
        }
        (best.0 < 0.0).then_some(best.1)
    }
}

impl Cell {
    /// The same code under another scale.
    fn under(self, to: Scale) -> Cell {
        Cell { level: self.level + self.zero - to.zero, scale: to.scale, zero: to.zero }
    }
}

/// Moves the scale and the zero point of a group that lies in a tile.
#[inline(always)]
pub(super) fn refit_group<const N: usize>(
    grids: Grids<'_>,
    tile: &mut TileState<'_>,
    cells: &mut [Cell],
    first: usize,
) {
    let Cell { scale, zero, .. } = cells[first];
    let shifts = if grids.layout.has_zero_points() { [1.0; N] } else { [0.0; N] };
    let directions = Directions { steps: std::array::from_fn(|k| cells[first + k].level), shifts };
    let found = tile.slopes(&directions, first);
    let [s, t, ss, st, tt] = [found.s, found.t, found.ss, found.st, found.tt].map(f64::from);
    let Some(to) = grids.better(Scale { scale, zero }, Slopes { s, t, ss, st, tt }) else { return };
    let step = to.scale / grids.global;
    for (j, cell) in (first..).zip(&mut cells[first..first + N]) {
        *cell = cell.under(to);
        tile.set_error(j, tile.weights[j] - cell.level * step);
    }
}

/// Rows that are being rounded, in the factor's order: `[rows, n]`.
pub(super) struct Rows<'a> {
    pub weights: &'a [f32],
    /// Weights minus rounded weights.
    pub errors: &'a mut [f32],
    /// Errors with their feedback.
    pub u: &'a mut [f32],
    pub cells: &'a mut [Cell],
}

/// Places of the columns of each group in the order of a factor; none where scales belong to more than a row.
pub(super) fn group_places(layout: &Layout, factor: &Factor) -> Vec<Vec<usize>> {
    if matches!(layout.groups, Groups::Blocks { .. }) {
        return Vec::new();
    }
    let n = factor.n();
    let group = layout.group_columns(n);
    let mut places = vec![Vec::with_capacity(group); n.div_ceil(group)];
    for place in 0..n {
        let column = factor.order().map_or(place, |order| order[place]);
        places[column / group].push(place);
    }
    places
}

/// Moves the scales of groups whose columns stand at `places`.
pub(super) fn refit_places(grids: Grids<'_>, rows: &mut Rows<'_>, factor: &Factor, a: &[f32], places: &[Vec<usize>]) {
    let n = factor.n();
    let count = rows.weights.len() / n;
    let asymmetric = grids.layout.has_zero_points();
    let (mut unit, mut levels, mut along) = (Vec::new(), Vec::new(), vec![0.0f32; count * n]);
    for places in places {
        let (size, first) = (places.len(), places[0]);
        // The group's rows of I + A, which have nothing before their own column.
        unit.clear();
        for &place in places {
            unit.extend_from_slice(&a[place * n..][..n]);
            let start = unit.len() - n;
            unit[start + place] += 1.0;
        }
        levels.clear();
        for cells in rows.cells.chunks_exact(n) {
            levels.extend(places.iter().map(|&place| cells[place].level));
        }
        let behind = GemmOperand::Plain { data: &unit[first..], stride: n };
        gemm_f32(count, n - first, size, &levels, size, behind, &mut along[first..], n, false);
        let shift: Vec<f32> = match asymmetric {
            true => (first..n).map(|j| (0..size).fold(0.0, |sum, k| sum + unit[k * n + j])).collect(),
            false => Vec::new(),
        };
        let weights = &factor.weights()[first..];
        for row in 0..count {
            let at = row * n..(row + 1) * n;
            let cells = &mut rows.cells[at.clone()];
            let Cell { scale, zero, .. } = cells[first];
            let from = Scale { scale, zero };
            let (u, v) = (&mut rows.u[at.clone()][first..], &along[at.clone()][first..]);
            let Some(to) = grids.better(from, slopes(u, v, &shift, weights)) else { continue };
            let step = to.scale / grids.global;
            for &place in places {
                cells[place] = cells[place].under(to);
                rows.errors[row * n + place] = rows.weights[row * n + place] - cells[place].level * step;
            }
            let (by, shifted) = (step - from.scale / grids.global, -(to.zero - from.zero) * step);
            u.iter_mut().zip(v).for_each(|(u, v)| *u -= by * v);
            u.iter_mut().zip(&shift).for_each(|(u, v)| *u -= shifted * v);
        }
    }
}

/// The slopes along `v`, and along `shift` if there is any, by the weights of the columns. Sums are f64, in eight parts.
fn slopes(u: &[f32], v: &[f32], shift: &[f32], weights: &[f32]) -> Slopes {
    let dot = |x: &[f32], y: &[f32]| {
        let mut lanes = [0.0f64; 8];
        for (k, ((x, y), w)) in x.iter().zip(y).zip(weights).enumerate() {
            lanes[k % 8] += f64::from(x * w) * f64::from(*y);
        }
        lanes.iter().sum::<f64>()
    };
    let alone = Slopes { s: dot(u, v), ss: dot(v, v), ..Slopes::default() };
    match shift.is_empty() {
        true => alone,
        false => Slopes { t: dot(u, shift), st: dot(v, shift), tt: dot(shift, shift), ..alone },
    }
}
