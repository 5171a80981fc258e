//! The descent of [`search`](crate::quant::search::fit_symmetric_by_descent) for the groups of Q3_K without importance,
//! one group per lane. Few groups move a level at all, so those that may are told from the others first.

use super::search::peak;
use super::{Batch, Floats, Isa, LANES, Mask};
use crate::quant::search::NEGLIGIBLE;
use crate::quant::types::q3_k;

/// Vectors of groups that descend together.
const DESCENTS: usize = 4;

/// Descents of the groups of sixteen blocks.
pub(super) struct Descents {
    /// Scales of each group's blocks side by side.
    pub scales: [[f32; LANES]; q3_k::GROUPS],
    /// Group and lane of those that have not settled.
    active: Vec<(usize, usize)>,
}

impl Descents {
    pub(super) fn new() -> Self {
        Self { scales: [[0.0; LANES]; q3_k::GROUPS], active: Vec::with_capacity(LANES * q3_k::GROUPS) }
    }

    /// Most groups change nothing after the start. The others are collected, so that no lane waits for them.
    #[inline(always)]
    pub(super) fn run<I: Isa>(&mut self, isa: I, batch: &Batch<'_, 256>, x: &[I::Floats; 256]) {
        self.active.clear();
        for (j, x) in x.as_chunks::<{ q3_k::GROUP }>().0.iter().enumerate() {
            let start = start_descent(isa, x, q3_k::HALF);
            self.scales[j] = start.scale.to_array();
            let mut unsettled = !start.settled.bits();
            while unsettled != 0 {
                self.active.push((j, unsettled.trailing_zeros() as usize));
                unsettled &= unsettled - 1;
            }
        }
        let mut x = [[isa.splat(0.0); q3_k::GROUP]; DESCENTS];
        for active in self.active.chunks(DESCENTS * LANES) {
            for (v, x) in x.iter_mut().enumerate() {
                let mut rows = [&[0.0; q3_k::GROUP]; LANES];
                for (k, row) in rows.iter_mut().enumerate() {
                    // Lanes that are left over repeat the last group.
                    let (j, lane) = active[(v * LANES + k).min(active.len() - 1)];
                    *row = &q3_k::groups(batch.blocks[lane])[j];
                }
                *x = isa.transpose(rows);
            }
            let scales = fit_symmetric_by_descent(isa, &x, q3_k::HALF);
            for (v, scales) in scales.iter().enumerate() {
                for (&(j, lane), scale) in active.iter().skip(v * LANES).zip(scales.to_array()) {
                    self.scales[j][lane] = scale;
                }
            }
        }
    }
}

/// Where the descent of each lane begins.
struct Start<F: Floats> {
    /// The scale, if the descent changes nothing.
    scale: F,
    /// Where it certainly changes nothing, which is so of most groups.
    settled: F::Mask,
}

/// The first scale of [`fit_symmetric_by_descent`], and whether the descent would leave the levels alone: that is known
/// by products alone, of all weights at once, unless a quotient comes close to the border between two levels.
#[inline(always)]
fn start_descent<I: Isa, const N: usize>(isa: I, x: &[I::Floats; N], half: i32) -> Start<I::Floats> {
    let select = <I::Floats as Floats>::select;
    let zero = isa.splat(0.0);
    let (lowest, highest) = (isa.splat(-half as f32), isa.splat((half - 1) as f32));
    let peak = peak(x, zero);
    let inverse = lowest / peak;
    let (mut sum_xl, mut sum_l2) = (zero, zero);
    let (mut levels, mut parts_xl, mut parts_l2) = ([zero; N], [zero; N], [zero; N]);
    for i in 0..N {
        let square = x[i] * x[i];
        let level = (inverse * x[i]).nearest_any().greater(lowest).lesser(highest);
        levels[i] = level;
        parts_xl[i] = square * x[i] * level;
        parts_l2[i] = square * level * level;
        sum_xl = sum_xl + parts_xl[i];
        sum_l2 = sum_l2 + parts_l2[i];
    }
    // A little less than half a level, for what rounding may do. Products near the smallest floats may be off by more.
    let (reach, tiny) = (isa.splat(0.499), isa.splat(1e-30));
    // Far below and far above, levels are limited.
    let far = isa.splat(1e6);
    let mut settled = zero.equals(zero);
    for i in 0..N {
        let rest_xl = sum_xl - parts_xl[i];
        let product = x[i] * (sum_l2 - parts_l2[i]);
        let low = select(levels[i].equals(lowest), far.negated(), levels[i] - reach);
        let high = select(levels[i].equals(highest), far, levels[i] + reach);
        let same = product.above(low * rest_xl) & product.below(high * rest_xl) & rest_xl.above(tiny);
        // The descent skips sums that are not positive: all of a group with a positive peak.
        settled = settled & (same | rest_xl.above(zero).negated());
    }
    let negligible = peak.abs().below(isa.splat(NEGLIGIBLE));
    let scale = select(sum_l2.above(zero), sum_xl / sum_l2, zero);
    Start { scale: select(negligible, zero, scale), settled: settled | negligible }
}

/// [`fit_symmetric_by_descent`](crate::quant::search::fit_symmetric_by_descent) in every lane, for `GROUPS` vectors of
/// groups at once: each step waits for the one before it, so one vector alone would leave the CPU idle. Returns the
/// scales.
#[inline(always)]
fn fit_symmetric_by_descent<I: Isa, const N: usize, const GROUPS: usize>(
    isa: I,
    x: &[[I::Floats; N]; GROUPS],
    half: i32,
) -> [I::Floats; GROUPS] {
    let select = <I::Floats as Floats>::select;
    let zero = isa.splat(0.0);
    let (lowest, highest) = (isa.splat(-half as f32), isa.splat((half - 1) as f32));
    let mut peaks = [zero; GROUPS];
    let mut squares = [[zero; N]; GROUPS];
    let mut cubes = [[zero; N]; GROUPS];
    let mut levels = [[zero; N]; GROUPS];
    let (mut sum_xl, mut sum_l2) = ([zero; GROUPS], [zero; GROUPS]);
    for g in 0..GROUPS {
        peaks[g] = peak(&x[g], zero);
        let inverse = lowest / peaks[g];
        for i in 0..N {
            let v = x[g][i];
            squares[g][i] = v * v;
            cubes[g][i] = squares[g][i] * v;
            let level = (inverse * v).nearest_any().greater(lowest).lesser(highest);
            levels[g][i] = level;
            sum_xl[g] = sum_xl[g] + cubes[g][i] * level;
            sum_l2[g] = sum_l2[g] + squares[g][i] * level * level;
        }
    }
    for _ in 0..5 {
        // A lane in which nothing changed repeats a round without effect, as scalar code would.
        let mut changed = zero.below(zero);
        for i in 0..N {
            for g in 0..GROUPS {
                let (square, cube, old) = (squares[g][i], cubes[g][i], levels[g][i]);
                let rest_xl = sum_xl[g] - cube * old;
                let rest_l2 = sum_l2[g] - square * old * old;
                let level = (x[g][i] * rest_l2 / rest_xl).nearest_any().greater(lowest).lesser(highest);
                let moved_xl = rest_xl + cube * level;
                let moved_l2 = rest_l2 + square * level * level;
                let better = rest_xl.above(zero)
                    & level.equals(old).negated()
                    & moved_l2.above(zero)
                    & (moved_xl * moved_xl * sum_l2[g]).above(sum_xl[g] * sum_xl[g] * moved_l2);
                // A sum, exact, and not a choice: that would become a masked store, which Zen 4 takes long over.
                levels[g][i] = old + select(better, level - old, zero);
                sum_xl[g] = select(better, moved_xl, sum_xl[g]);
                sum_l2[g] = select(better, moved_l2, sum_l2[g]);
                changed = changed | better;
            }
        }
        if !changed.any() {
            break;
        }
    }
    let mut scales = [zero; GROUPS];
    for g in 0..GROUPS {
        let negligible = peaks[g].abs().below(isa.splat(NEGLIGIBLE));
        let scale = select(sum_l2[g].above(zero), sum_xl[g] / sum_l2[g], zero);
        scales[g] = select(negligible, zero, scale);
    }
    scales
}
