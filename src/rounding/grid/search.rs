//! Scales by squared error: candidates around the min-max scale, and the least-squares scale of what they round to.
//!
//! Every candidate is a number of the scales' type, and its error is that of the values which readers decode. Plain
//! rounding is a candidate, so that no group ends worse than there. Sums run over the columns in eight interleaved parts,
//! which are added up in a fixed order.

use rayon::prelude::*;

use super::numbers::{Levels, with_levels};
use super::plain::{Range, round_to_scales, zero_point};
use super::{Grid, Groups, Layout, Rounded, ScaleType};
use crate::rounding::gptq::{Nearest, Whole, column_weights};
use crate::vectorized::vectorized;

/// A scale as stored, and a zero point, with the weighed squared error that they leave.
#[derive(Clone, Copy, Debug)]
pub(super) struct Choice {
    pub scale: f32,
    pub zero: f32,
    error: f32,
    /// Sums of `w l v` and `w l^2` over the group, with its levels `l`.
    sums: [f32; 2],
}

/// Sizes of the scale of 4-bit whole numbers that are tried, as parts of the min-max scale.
const FOUR_BITS: [f32; 23] = [
    1.0, 0.98, 0.96, 0.94, 0.92, 0.9, 0.88, 0.86, 0.84, 0.82, 0.8, 0.78, 0.76, 0.74, 0.72, 1.02, 1.04, 1.06, 1.08, 1.1,
    1.12, 1.14, 1.16,
];

/// The same for 8 bits: a step is so small that only cutting off outliers or the very peak changes much.
const EIGHT_BITS: [f32; 15] = [1.0, 0.995, 0.99, 0.98, 0.96, 0.93, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 1.004, 1.008];

/// The same for FP8, whose numbers repeat with every power of two: the eighths of one.
const FP8: [f32; 10] = [1.0, 1.09, 1.19, 1.3, 1.41, 1.54, 1.68, 1.83, 2.0, 0.92];

/// Places of E4M3 beside the min-max scale that are tried for NVFP4: from a peak that is cut off to one at 4 instead of 6.
const NVFP4: std::ops::RangeInclusive<i32> = -3..=6;

/// Ends of the range of an asymmetric group that are tried, as parts of its own.
const ENDS: [f32; 5] = [1.0, 0.94, 0.88, 0.8, 1.06];

/// Rounds of least squares.
const REFINEMENTS: usize = 4;

vectorized! {
    at most avx2;

    /// Weighed squared error of rounding to `step * (level - zero)`, and the sums of `w l v` and `w l^2`.
    fn sums(v: &[f32], w: &[f32], levels: Levels, step: f32, zero: f32) -> [f32; 3] {
        with_levels!(levels, set => sums_of(v, w, set, step, zero))
    }
}

#[inline(always)]
fn sums_of<L: Nearest>(v: &[f32], w: &[f32], set: L, step: f32, zero: f32) -> [f32; 3] {
    let terms = |v: f32, w: f32| {
        let level = set.nearest(v / step + zero) - zero;
        let difference = v - step * level;
        let weighed = w * level;
        [w * difference * difference, weighed * v, weighed * level]
    };
    let mut lanes = [[0.0f32; 8]; 3];
    let ((v, v_rest), (w, w_rest)) = (v.as_chunks::<8>(), w.as_chunks::<8>());
    for (v, w) in v.iter().zip(w) {
        for k in 0..8 {
            let terms = terms(v[k], w[k]);
            for i in 0..3 {
                lanes[i][k] += terms[i];
            }
        }
    }
    for (k, (v, w)) in v_rest.iter().zip(w_rest).enumerate() {
        let terms = terms(*v, *w);
        for i in 0..3 {
            lanes[i][k] += terms[i];
        }
    }
    lanes.map(|l| ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7])))
}

/// The search for one group.
struct Search<'a> {
    layout: &'a Layout,
    levels: Levels,
    global: f32,
    v: &'a [f32],
    w: &'a [f32],
    best: Choice,
}

impl Search<'_> {
    /// Takes a candidate if it is better than all before.
    fn try_scale(&mut self, scale: f32, zero: f32) -> bool {
        let [error, wlv, wll] = sums(self.v, self.w, self.levels, scale / self.global, zero);
        let better = error < self.best.error;
        if better {
            self.best = Choice { scale, zero, error, sums: [wlv, wll] };
        }
        better
    }

    /// Candidates around the scale and zero point at hand.
    fn try_around(&mut self) {
        let Choice { scale, zero, .. } = self.best;
        let ty = self.layout.scale_type;
        match (self.layout.grid, self.levels) {
            (Grid::Nvfp4, _) => {
                for scale in NVFP4.filter_map(|count| ty.neighbour(scale, count)) {
                    self.try_scale(scale, 0.0);
                }
            }
            (Grid::Mxfp4, _) => {
                for scale in [-1i32, 1].into_iter().filter_map(|count| ty.neighbour(scale, count)) {
                    self.try_scale(scale, 0.0);
                }
            }
            (Grid::Int { symmetric: false, .. }, Levels::Whole(whole)) => self.try_ends(whole),
            (Grid::Int { bits: 8.., .. }, _) => self.try_factors(&EIGHT_BITS, scale, zero),
            (Grid::Int { .. }, _) => {
                self.try_factors(&FOUR_BITS, scale, zero);
                // Under a negative scale the sixteenth level is on the other side of zero.
                self.try_factors(&FOUR_BITS, -scale, zero);
            }
            (Grid::Fp8, _) => self.try_factors(&FP8, scale, zero),
        }
    }

    fn try_factors(&mut self, factors: &[f32], scale: f32, zero: f32) {
        for factor in factors {
            self.try_scale(scale.signum() * self.layout.scale_type.round(scale.abs() * factor), zero);
        }
    }

    fn try_ends(&mut self, Whole { lowest, highest }: Whole) {
        let Range { low, high } = Range::default().with(self.v);
        for (low, high) in ENDS.into_iter().flat_map(|l| ENDS.map(|h| (l * low, h * high))) {
            let scale = self.layout.scale_type.round((high - low) / (highest - lowest));
            self.try_scale(scale, zero_point(lowest - low / scale, lowest, highest));
        }
    }

    /// Goes on from the best with the least-squares scale of its levels.
    fn refine(&mut self) {
        let ty = self.layout.scale_type;
        if ty == ScaleType::E8M0 {
            return;
        }
        for _ in 0..REFINEMENTS {
            let Choice { scale, zero, sums: [wlv, wll], .. } = self.best;
            let sign = scale.signum();
            let wanted = ty.round(sign * wlv / wll * self.global);
            let mut better = false;
            for to in [0, 1, -1].into_iter().filter_map(|count| ty.neighbour(wanted, count)).map(|to| sign * to) {
                better |= to != scale && self.try_scale(to, zero);
            }
            if let (true, Levels::Whole(whole)) = (self.layout.has_zero_points(), self.levels) {
                for zero in [zero - 1.0, zero + 1.0].into_iter().filter(|z| (whole.lowest..=whole.highest).contains(z))
                {
                    better |= self.try_scale(self.best.scale, zero);
                }
            }
            if !better {
                break;
            }
        }
    }
}

impl Layout {
    /// The best scale of a group of weights `v` whose errors weigh `w`.
    pub(super) fn best_scale(&self, v: &[f32], w: &[f32], global: f32) -> Choice {
        let range = Range::default().with(v);
        let (scale, zero) = self.min_max_scale(range, global);
        let unknown = Choice { scale, zero, error: f32::INFINITY, sums: [0.0; 2] };
        if range.peak() <= 0.0 {
            return unknown;
        }
        let mut search = Search { layout: self, levels: Levels::of(self.grid), global, v, w, best: unknown };
        search.try_scale(scale, zero);
        search.try_around();
        search.refine();
        search.best
    }
}

/// Rounds `weights`, `[rows, columns]`, by scales that leave the least squared error, each column's counting `importance`
/// (not negative) or all the same. No group is worse in that measure than with [`plain`](super::plain). `global` is NVFP4's
/// global scale where the tensor shares one with others.
///
/// The result does not depend on the number of threads of rayon's current pool.
///
/// # Panics
/// When `weights` is not whole rows, `importance` has another length than a row, or [`Layout::fits`] says no.
#[doc(alias = "scale search")]
#[doc(alias = "imatrix")]
pub fn search(
    layout: Layout,
    weights: &[f32],
    rows: usize,
    columns: usize,
    importance: Option<&[f32]>,
    global: Option<f32>,
) -> Rounded {
    assert_eq!(weights.len(), rows * columns, "weights of {rows} rows of {columns}");
    assert!(layout.fits(columns) || weights.is_empty(), "rows of {columns} weights do not fit {layout:?}");
    assert!(importance.is_none_or(|importance| importance.len() == columns), "importance of {columns} columns");
    let global = layout.global_scale(weights, global);
    if weights.is_empty() {
        return round_to_scales(layout, weights, rows, columns, Vec::new(), global);
    }
    let cost = column_weights(importance, columns);
    let group = layout.group_columns(columns);
    let scales: Vec<Vec<(f32, f32)>> = match layout.groups {
        Groups::Blocks { rows: of_block, .. } => {
            weights.par_chunks(of_block * columns).map(|block| block_scales(layout, block, &cost, global)).collect()
        }
        _ => {
            let of_row = |row: &[f32]| {
                let groups = row.chunks(group).zip(cost.chunks(group));
                groups.map(|(v, w)| layout.best_scale(v, w, global)).map(|found| (found.scale, found.zero)).collect()
            };
            weights.par_chunks(columns).map(of_row).collect()
        }
    };
    round_to_scales(layout, weights, rows, columns, scales.concat(), global)
}

/// The scales of one row of blocks.
fn block_scales(layout: Layout, block: &[f32], cost: &[f32], global: f32) -> Vec<(f32, f32)> {
    let (columns, group) = (cost.len(), layout.group_columns(cost.len()));
    let (mut v, mut w) = (Vec::new(), Vec::new());
    let starts = (0..columns).step_by(group);
    let found = starts.map(|start| {
        let range = start..columns.min(start + group);
        v.clear();
        w.clear();
        for row in block.chunks_exact(columns) {
            v.extend_from_slice(&row[range.clone()]);
            w.extend_from_slice(&cost[range.clone()]);
        }
        layout.best_scale(&v, &w, global)
    });
    found.map(|found| (found.scale, found.zero)).collect()
}
