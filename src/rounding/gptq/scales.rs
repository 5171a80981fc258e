//! The choice of scales: those of a block when its first column comes up, those of a group when the group does.
//!
//! All errors are weighed sums of squares on the values that readers decode, super-scales on the grid of binary16
//! included. Sums run over the columns in eight interleaved parts, which are added up in a fixed order.

use super::grid::{Grid, Nearest, Table, Whole, inverse, neighbour, snap};
use super::layout::Layout;
use crate::quant::round::nearest_small;
use crate::quant::shape::ScaleShape;
use crate::quant::types::parts::MAX_GROUPS;

/// Groups whose largest magnitude is below this are zeros: no binary16 scale reaches down there.
const NEGLIGIBLE: f32 = 1e-20;

/// Scales of a block, on the grid of binary16.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct BlockScales {
    pub d: f32,
    /// Scale of minima, or value of level 0.
    pub dmin: f32,
}

/// What a group stores and the values that gives it.
#[derive(Clone, Copy, Debug)]
pub(super) struct GroupChoice {
    pub grid: Grid,
    pub scale: i16,
    pub min: u8,
    /// Weighed sum of squared errors.
    pub error: f32,
}

/// The real-valued optimum of a group, before its scales are put onto the grid of the block's.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct GroupFit {
    /// Distance of levels.
    step: f32,
    /// Minus the value of level 0.
    min: f32,
    /// Sums of `w l^2`, `w l`, `w`, `w l v`, `w v` over the group, with the levels `l` of the optimum.
    sums: [f32; 5],
}

/// Sizes of a super-scale that are tried.
const CANDIDATES: usize = 13;

/// These, as parts of the one that just reaches the largest group.
const FACTORS: [f32; CANDIDATES] = [1.0, 0.9, 0.92, 0.94, 0.96, 0.98, 1.02, 1.04, 1.06, 1.08, 1.1, 0.85, 0.8];

/// Candidates for the scales of a block that are tried in earnest, after all have been ranked by an estimate.
const FINALISTS: usize = 4;

/// The same where feedback will still change the weights before most groups come up: for Q4_K of a model of 4 million
/// weights, four left no less divergence and took a tenth more time.
const FINALISTS_WITH_FEEDBACK: usize = 2;

/// Steps to either side of the least-squares scale of a group that are tried.
const REACH: i32 = 2;

/// Sums of the components of `f(v, w)` over the columns.
#[inline(always)]
fn sums<const N: usize>(v: &[f32], w: &[f32], f: impl Fn(f32, f32) -> [f32; N]) -> [f32; N] {
    let mut lanes = [[0.0f32; 8]; N];
    for (v, w) in v.as_chunks::<8>().0.iter().zip(w.as_chunks::<8>().0) {
        for k in 0..8 {
            let terms = f(v[k], w[k]);
            for i in 0..N {
                lanes[i][k] += terms[i];
            }
        }
    }
    lanes.map(|l| ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7])))
}

/// Weighed squared error of rounding to `step * level + shift`.
#[inline(always)]
fn error<L: Nearest>(v: &[f32], w: &[f32], levels: L, step: f32, shift: f32) -> f32 {
    let inverse = inverse(step);
    let [error] = sums(v, w, |v, w| {
        let difference = v - (step * levels.nearest((v - shift) * inverse) + shift);
        [w * difference * difference]
    });
    error
}

/// Sums of `w v l` and `w l^2` for the levels `l` nearest to `v * inverse`.
#[inline(always)]
fn products<L: Nearest>(v: &[f32], w: &[f32], levels: L, inverse: f32) -> [f32; 2] {
    sums(v, w, |v, w| {
        let level = levels.nearest(v * inverse);
        let weighed = w * level;
        [weighed * v, weighed * level]
    })
}

/// The best step for the levels nearest to `v * inverse`, with what it takes off the weighed sum of squares. (A function,
/// as closures are not compiled for the vectors of their callers.)
#[inline(always)]
fn step_for<L: Nearest>(v: &[f32], w: &[f32], levels: L, inverse: f32) -> (f32, GroupFit) {
    let [level_v, level_2] = products(v, w, levels, inverse);
    let fit = GroupFit { step: level_v / level_2, sums: [level_2, 0.0, 0.0, 0.0, 0.0], min: 0.0 };
    (level_v * level_v / level_2, fit)
}

/// The step of a group around zero that loses least: the largest weight is tried at every level of `bounds`, and the
/// best least-squares step is refined by rounding with it again.
#[inline(always)]
fn fit_step<L: Nearest>(v: &[f32], w: &[f32], levels: L, bounds: &[f32]) -> GroupFit {
    let peak = v.iter().fold(0.0f32, |peak, &v| if v.abs() > peak.abs() { v } else { peak });
    if peak.abs() < NEGLIGIBLE || !peak.is_finite() {
        return GroupFit::default();
    }
    let (mut best, mut fit) = (0.0, GroupFit::default());
    for bound in bounds {
        let (gain, found) = step_for(v, w, levels, bound / peak);
        // NaN, where all levels are zero, is never more.
        if gain > best {
            (best, fit) = (gain, found);
        }
    }
    for _ in 0..3 {
        let (gain, found) = step_for(v, w, levels, inverse(fit.step));
        if gain > best {
            (best, fit) = (gain, found);
        } else {
            break;
        }
    }
    fit
}

/// The best line for the levels nearest to `(v + min) * inverse`, with its weighed squared error. `known` holds the sums
/// of `w`, `w v` and `w v^2`.
#[inline(always)]
fn line_for(v: &[f32], w: &[f32], whole: Whole, known: [f32; 3], inverse: f32, min: f32) -> (f32, GroupFit) {
    let [sum_w, sum_wv, sum_wv2] = known;
    let [level_2, level_1, level_v] = sums(v, w, |v, w| {
        let level = whole.nearest((v + min) * inverse);
        let weighed = w * level;
        [weighed * level, weighed, weighed * v]
    });
    let determinant = level_2 * sum_w - level_1 * level_1;
    let mut step = (level_v * sum_w - level_1 * sum_wv) / determinant;
    let mut min = (level_1 * level_v - level_2 * sum_wv) / determinant;
    // NaN, where all weights have the same level, takes this way too.
    if !(determinant > 0.0 && min >= 0.0) {
        (step, min) = (level_v / level_2, 0.0);
    }
    let error = if step > 0.0 { sum_wv2 - step * level_v + min * sum_wv } else { f32::INFINITY };
    (error, GroupFit { step, min, sums: [level_2, level_1, sum_w, level_v, sum_wv] })
}

/// Deviations from the highest level that a group's range is divided into, in tenths.
const LINE_TENTHS: std::ops::RangeInclusive<i32> = -9..=9;

/// The line of a group that loses least, with its value of level 0 at or below zero: the range of the group is divided
/// into a number of steps around the highest level, and the best least-squares line is refined by rounding with it
/// again.
#[inline(always)]
fn fit_line(v: &[f32], w: &[f32], whole: Whole) -> GroupFit {
    let (mut low, mut high) = (0.0f32, v[0]);
    for &v in v {
        low = if v < low { v } else { low };
        high = if v > high { v } else { high };
    }
    let range = high - low;
    if range < NEGLIGIBLE || !range.is_finite() {
        // All weights are alike and at or below zero.
        return GroupFit { min: -low, sums: [0.0, 0.0, 1.0, 0.0, low], ..GroupFit::default() };
    }
    let sums = sums(v, w, |v, w| [w, w * v, w * v * v]);
    let (mut best, mut fit, mut base) = (f32::INFINITY, GroupFit::default(), -low);
    for tenths in LINE_TENTHS {
        let (error, found) = line_for(v, w, whole, sums, (whole.highest + 0.1 * tenths as f32) / (high + base), base);
        if error < best {
            // What follows divides the range above the better line's start.
            (best, fit, base) = (error, found, found.min);
        }
    }
    for _ in 0..3 {
        let (error, found) = line_for(v, w, whole, sums, inverse(fit.step), fit.min);
        if error < best {
            (best, fit) = (error, found);
        } else {
            break;
        }
    }
    fit
}

/// The best of a few whole-number scales around `middle`, with its error.
#[inline(always)]
fn search_step<L: Nearest>(v: &[f32], w: &[f32], levels: L, d: f32, middle: i32, range: [i32; 2]) -> (f32, i32) {
    let (mut best, mut scale) = (f32::INFINITY, middle);
    for candidate in (middle - REACH).max(range[0])..=(middle + REACH).min(range[1]) {
        let error = error(v, w, levels, d * candidate as f32, 0.0);
        if error < best {
            (best, scale) = (error, candidate);
        }
    }
    (best, scale)
}

/// The best of a few whole-number scales around those of `fit`, each with the minima that suit it, with its error.
#[inline(always)]
fn search_line(v: &[f32], w: &[f32], whole: Whole, scales: BlockScales, fit: &GroupFit, top: i32) -> (f32, i32, i32) {
    let [_, _, sum_w, _, sum_wv] = fit.sums;
    let inverse_dmin = inverse(scales.dmin);
    let middle = whole_number(fit.step * inverse(scales.d)).clamp(0, top);
    let first_min = whole_number(fit.min * inverse_dmin).clamp(0, top);
    let mut best = (f32::INFINITY, middle, first_min);
    for candidate in (middle - REACH).max(0)..=(middle + REACH).min(top) {
        let step = scales.d * candidate as f32;
        let inverse = inverse(step);
        let mut min = first_min;
        // Rounds with a minimum, takes the best minimum for these levels, rounds again.
        for _ in 0..3 {
            let shift = -(scales.dmin * min as f32);
            let [error, sum_wl] = sums(v, w, |v, w| {
                let level = whole.nearest((v - shift) * inverse);
                let difference = v - (step * level + shift);
                [w * difference * difference, w * level]
            });
            if error < best.0 {
                best = (error, candidate, min);
            }
            let next = whole_number((step * sum_wl - sum_wv) / sum_w * inverse_dmin).clamp(0, top);
            if next == min {
                break;
            }
            min = next;
        }
    }
    best
}

/// The loops over columns, compiled for the widest vectors that are worth it.
mod vectorized {
    use super::{BlockScales, CANDIDATES, GroupFit, Table, Whole};
    use crate::vectorized::vectorized;

    vectorized! {
        at most avx2;

        pub(super) fn whole_error(v: &[f32], w: &[f32], levels: Whole, step: f32, shift: f32) -> f32 {
            super::error(v, w, levels, step, shift)
        }

        pub(super) fn table_error(v: &[f32], w: &[f32], levels: Table, step: f32, shift: f32) -> f32 {
            super::error(v, w, levels, step, shift)
        }

        pub(super) fn fit_whole_step(v: &[f32], w: &[f32], levels: Whole, bounds: &[f32]) -> GroupFit {
            super::fit_step(v, w, levels, bounds)
        }

        pub(super) fn fit_table_step(v: &[f32], w: &[f32], levels: Table, bounds: &[f32]) -> GroupFit {
            super::fit_step(v, w, levels, bounds)
        }

        pub(super) fn fit_line(v: &[f32], w: &[f32], whole: Whole) -> GroupFit {
            super::fit_line(v, w, whole)
        }

        pub(super) fn search_whole_step(
            v: &[f32],
            w: &[f32],
            levels: Whole,
            d: f32,
            middle: i32,
            range: [i32; 2],
        ) -> (f32, i32) {
            super::search_step(v, w, levels, d, middle, range)
        }

        pub(super) fn search_table_step(
            v: &[f32],
            w: &[f32],
            levels: Table,
            d: f32,
            middle: i32,
            range: [i32; 2],
        ) -> (f32, i32) {
            super::search_step(v, w, levels, d, middle, range)
        }

        pub(super) fn line_estimates(
            fits: &[GroupFit],
            d: f32,
            dmins: &[f32; CANDIDATES],
            top: f32,
        ) -> [f32; CANDIDATES] {
            super::line_estimates(fits, d, dmins, top)
        }

        pub(super) fn search_line(
            v: &[f32],
            w: &[f32],
            whole: Whole,
            scales: BlockScales,
            fit: &GroupFit,
            top: i32,
        ) -> (f32, i32, i32) {
            super::search_line(v, w, whole, scales, fit, top)
        }
    }
}

/// The candidates of a search with the least estimated errors, best first.
struct Ranking {
    entries: [(f32, BlockScales); FINALISTS],
    len: usize,
}

impl Ranking {
    fn new() -> Self {
        Ranking { entries: [(f32::INFINITY, BlockScales { d: 0.0, dmin: 0.0 }); FINALISTS], len: 0 }
    }

    fn add(&mut self, estimate: f32, scales: BlockScales) {
        if self.entries[..self.len].iter().any(|(_, known)| *known == scales) {
            return;
        }
        // NaN is never less.
        let place = self.entries[..self.len].iter().position(|(known, _)| estimate < *known).unwrap_or(self.len);
        if place < FINALISTS {
            self.len = (self.len + 1).min(FINALISTS);
            self.entries[place..self.len].rotate_right(1);
            self.entries[place] = (estimate, scales);
        }
    }

    fn scales(&self) -> impl Iterator<Item = BlockScales> {
        self.entries[..self.len].iter().map(|(_, scales)| *scales)
    }
}

impl Layout {
    /// Chooses the scales of a block for weights `v` whose errors weigh `w`; `fed_back` says whether feedback will still
    /// change them. Beside them stand the optima of its groups, if it has any.
    pub(super) fn block_scales(&self, v: &[f32], w: &[f32], fed_back: bool) -> (BlockScales, [GroupFit; MAX_GROUPS]) {
        let mut fits = [GroupFit::default(); MAX_GROUPS];
        let scales = match self.kind {
            ScaleShape::Step => self.block_step(v, w),
            ScaleShape::Line => self.block_line(v, w),
            ScaleShape::GroupSteps { .. } | ScaleShape::GroupLines { .. } => {
                let groups = self.len / self.group;
                for (fit, (v, w)) in fits.iter_mut().zip(v.chunks_exact(self.group).zip(w.chunks_exact(self.group))) {
                    *fit = self.fit(v, w);
                }
                let fits = &fits[..groups];
                let ranking = match self.kind {
                    ScaleShape::GroupLines { top } => rank_lines(fits, f32::from(top)),
                    ScaleShape::GroupSteps { lowest, highest } => rank_steps(fits, lowest.into(), highest.into()),
                    ScaleShape::Step | ScaleShape::Line => unreachable!("handled above"),
                };
                let mut best = (f32::INFINITY, BlockScales { d: 0.0, dmin: 0.0 });
                let finalists = if fed_back { FINALISTS_WITH_FEEDBACK } else { FINALISTS };
                for scales in ranking.scales().take(finalists) {
                    let groups = v.chunks_exact(self.group).zip(w.chunks_exact(self.group)).zip(fits);
                    let error = groups.map(|((v, w), fit)| self.choose(scales, fit, v, w).error).sum();
                    if error < best.0 {
                        best = (error, scales);
                    }
                }
                best.1
            }
        };
        (scales, fits)
    }

    /// Chooses what a group stores under the scales of its block, for weights `v` whose errors weigh `w`. `fit` is the
    /// group's optimum, if it is known already.
    pub(super) fn group_choice(
        &self,
        scales: BlockScales,
        fit: Option<&GroupFit>,
        v: &[f32],
        w: &[f32],
    ) -> GroupChoice {
        match self.kind {
            ScaleShape::Step | ScaleShape::Line => {
                let grid = Grid::new(scales.d, scales.dmin, self.whole);
                GroupChoice { grid, scale: 0, min: 0, error: self.error(v, w, scales.d, scales.dmin) }
            }
            ScaleShape::GroupSteps { .. } | ScaleShape::GroupLines { .. } => match fit {
                Some(fit) => self.choose(scales, fit, v, w),
                None => self.choose(scales, &self.fit(v, w), v, w),
            },
        }
    }

    fn error(&self, v: &[f32], w: &[f32], step: f32, shift: f32) -> f32 {
        match self.whole {
            Some(whole) => vectorized::whole_error(v, w, whole, step, shift),
            None => vectorized::table_error(v, w, Table, step, shift),
        }
    }

    fn fit(&self, v: &[f32], w: &[f32]) -> GroupFit {
        match (self.kind, self.whole) {
            (ScaleShape::Line | ScaleShape::GroupLines { .. }, Some(whole)) => vectorized::fit_line(v, w, whole),
            (_, Some(whole)) => vectorized::fit_whole_step(v, w, whole, &self.bounds),
            (_, None) => vectorized::fit_table_step(v, w, Table, &self.bounds),
        }
    }

    /// The best of a few whole-number scales around those of `fit`.
    fn choose(&self, scales: BlockScales, fit: &GroupFit, v: &[f32], w: &[f32]) -> GroupChoice {
        match (self.kind, self.whole) {
            (ScaleShape::GroupLines { top }, Some(whole)) => {
                let (error, scale, min) = vectorized::search_line(v, w, whole, scales, fit, top.into());
                let grid = Grid::new(scales.d * scale as f32, -(scales.dmin * min as f32), self.whole);
                GroupChoice { grid, scale: scale as i16, min: min as u8, error }
            }
            (ScaleShape::GroupSteps { lowest, highest }, _) => {
                let range = [lowest.into(), highest.into()];
                let middle = whole_number(fit.step * inverse(scales.d)).clamp(range[0], range[1]);
                let (error, scale) = match self.whole {
                    Some(whole) => vectorized::search_whole_step(v, w, whole, scales.d, middle, range),
                    None => vectorized::search_table_step(v, w, Table, scales.d, middle, range),
                };
                let grid = Grid::new(scales.d * scale as f32, 0.0, self.whole);
                GroupChoice { grid, scale: scale as i16, min: 0, error }
            }
            _ => unreachable!("such blocks have no scales of groups"),
        }
    }

    /// The step of a block without groups, on the grid of binary16.
    fn block_step(&self, v: &[f32], w: &[f32]) -> BlockScales {
        let fit = self.fit(v, w);
        let mut best = (f32::INFINITY, BlockScales { d: 0.0, dmin: 0.0 });
        let nearest = snap(fit.step);
        for count in [0, 1, -1, 2, -2] {
            if let Some(d) = neighbour(nearest, count) {
                let error = self.error(v, w, d, 0.0);
                if error < best.0 {
                    best = (error, BlockScales { d, dmin: 0.0 });
                }
            }
        }
        best.1
    }

    /// The line of a block without groups, on the grid of binary16.
    fn block_line(&self, v: &[f32], w: &[f32]) -> BlockScales {
        let highest = self.whole.map_or(0.0, |whole| whole.highest);
        let whole = Whole { lowest: 0.0, highest };
        let (low, high) =
            v.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), &v| (low.min(v), high.max(v)));
        // The search wants level 0 at or below zero: move the weights so that this leaves it free.
        let base = low + 0.15 * (high - low);
        let mut moved = [0.0f32; 32];
        for (moved, v) in moved.iter_mut().zip(v) {
            *moved = v - base;
        }
        let fit = vectorized::fit_line(&moved[..v.len()], w, whole);
        let mut best = (f32::INFINITY, BlockScales { d: 0.0, dmin: snap(low) });
        let (mut step, mut shift) = (fit.step, base - fit.min);
        for _ in 0..3 {
            let before = best.0;
            let (nearest, nearest_shift) = (snap(step), snap(shift));
            for count in [0, 1, -1] {
                for shift_count in [0, 1, -1] {
                    let (Some(d), Some(dmin)) = (neighbour(nearest, count), neighbour(nearest_shift, shift_count))
                    else {
                        continue;
                    };
                    let error = vectorized::whole_error(v, w, whole, d, dmin);
                    if error < best.0 {
                        best = (error, BlockScales { d, dmin });
                    }
                }
            }
            if best.0 >= before {
                break;
            }
            // The least-squares line for the levels that these scales give.
            let inverse = inverse(best.1.d);
            let [level_2, level_1, sum_w, level_v, sum_v] = sums(v, w, |v, w| {
                let level = whole.nearest((v - best.1.dmin) * inverse);
                let weighed = w * level;
                [weighed * level, weighed, w, weighed * v, w * v]
            });
            let determinant = level_2 * sum_w - level_1 * level_1;
            if determinant <= 0.0 {
                break;
            }
            step = (level_v * sum_w - level_1 * sum_v) / determinant;
            shift = (level_2 * sum_v - level_1 * level_v) / determinant;
        }
        best.1
    }
}

/// The nearest whole number; NaN gives 0.
#[inline(always)]
fn whole_number(value: f32) -> i32 {
    const FAR: f32 = 1e6;
    let value = if value < FAR { value } else { FAR };
    nearest_small(if value > -FAR { value } else { -FAR }) as i32
}

/// Ranks pairs of super-scales by the errors that the levels of `fits` would have under them.
fn rank_lines(fits: &[GroupFit], top: f32) -> Ranking {
    let largest = |of: fn(&GroupFit) -> f32| fits.iter().map(of).fold(0.0f32, |max, v| if v > max { v } else { max });
    let (d, dmin) = (largest(|fit| fit.step) / top, largest(|fit| fit.min) / top);
    let dmins = FACTORS.map(|factor| snap(dmin * factor));
    let mut ranking = Ranking::new();
    for factor in FACTORS {
        let d = snap(d * factor);
        for (estimate, dmin) in vectorized::line_estimates(fits, d, &dmins, top).into_iter().zip(dmins) {
            ranking.add(estimate, BlockScales { d, dmin });
        }
    }
    ranking
}

/// What the groups of `fits` would lose with `d` and each of `dmins`, without the part that no candidate changes.
#[inline(always)]
fn line_estimates(fits: &[GroupFit], d: f32, dmins: &[f32; CANDIDATES], top: f32) -> [f32; CANDIDATES] {
    let inverse_d = inverse(d);
    let inverse_dmins = dmins.map(inverse);
    let mut estimates = [0.0; CANDIDATES];
    for fit in fits {
        let [level_2, level_1, sum_w, level_v, sum_v] = fit.sums;
        let step = d * bounded(fit.step * inverse_d, top);
        let best_min = (step * level_1 - sum_v) / sum_w;
        for (estimate, (dmin, inverse_dmin)) in estimates.iter_mut().zip(dmins.iter().zip(&inverse_dmins)) {
            let min = dmin * bounded(best_min * inverse_dmin, top);
            // Sum of w (step l - min - v)^2.
            *estimate += step * (step * level_2 - 2.0 * (min * level_1 + level_v)) + min * (min * sum_w + 2.0 * sum_v);
        }
    }
    estimates
}

/// The whole number of `0..=top` nearest to `value`.
#[inline(always)]
fn bounded(value: f32, top: f32) -> f32 {
    Whole { lowest: 0.0, highest: top }.nearest(value)
}

/// Ranks super-scales by the errors that the steps of `fits` would get under them.
fn rank_steps(fits: &[GroupFit], lowest: f32, highest: f32) -> Ranking {
    let peak = fits.iter().fold(0.0f32, |peak, fit| if fit.step.abs() > peak.abs() { fit.step } else { peak });
    let range = Whole { lowest, highest };
    let mut ranking = Ranking::new();
    for factor in FACTORS {
        for end in [lowest, highest] {
            let d = snap(peak / end * factor);
            let inverse_d = inverse(d);
            let mut estimate = 0.0;
            for fit in fits {
                let difference = d * range.nearest(fit.step * inverse_d) - fit.step;
                estimate += fit.sums[0] * difference * difference;
            }
            ranking.add(estimate, BlockScales { d, dmin: 0.0 });
        }
    }
    ranking
}
