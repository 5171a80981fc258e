//! The searches of [`search`](crate::quant::search), one group per lane.

use super::{Floats, Isa, Mask};
use crate::quant::search::{AffineSearch, ErrorMeasure, NEGLIGIBLE, POSITIVE_TENTHS, SYMMETRIC_TENTHS};

/// Scaled weights below this are rounded right by [`Floats::nearest_small`].
const TAME: f32 = 4_000_000.0;

/// [`AffineFit`](crate::quant::search::AffineFit) of each lane.
#[derive(Clone, Copy)]
pub struct AffineFits<F> {
    pub scale: F,
    pub min: F,
    /// Inverse and minimum of the rounding to levels.
    pub inverse: F,
    pub base: F,
}

/// What all candidates of a group share.
struct Groups<'a, F, const N: usize> {
    x: &'a [F; N],
    weights: &'a [F; N],
    sum_w: F,
    sum_x: F,
    lowest: F,
    highest: F,
    zero: F,
    top: F,
    /// [`TAME`].
    tame: F,
}

/// One candidate in each lane, see `Lines` of the scalar search.
struct Line<F> {
    determinant: F,
    slope: F,
    intercept: F,
    error: F,
}

/// [`fit_affine`](crate::quant::search::fit_affine) in every lane. Each lane keeps its own minimum, so no candidate is
/// tried twice.
#[inline(always)]
pub fn fit_affine<I: Isa, const N: usize>(
    isa: I,
    x: &[I::Floats; N],
    weights: &[I::Floats; N],
    search: &AffineSearch,
) -> AffineFits<I::Floats> {
    let select = <I::Floats as Floats>::select;
    let zero = isa.splat(0.0);
    let (mut lowest, mut highest) = (x[0], x[0]);
    let mut sum_w = weights[0];
    let mut sum_x = sum_w * x[0];
    for i in 1..N {
        lowest = x[i].lesser(lowest);
        highest = x[i].greater(highest);
        sum_w = sum_w + weights[i];
        sum_x = sum_x + weights[i] * x[i];
    }
    let mut min = select(lowest.above(zero), zero, lowest);
    // Lanes without a range compute along and are left out at the end.
    let live = highest.above(min);
    let (top, tame) = (isa.splat(search.max_level), isa.splat(TAME));
    let groups = Groups { x, weights, sum_w, sum_x, lowest, highest, zero, top, tame };
    let mut base = min;
    let mut inverse = select(live, top / (highest - min), zero);
    let mut scale = isa.splat(1.0) / inverse;
    let mut best_error = match (search.error, groups.are_tame(inverse, min)) {
        (ErrorMeasure::Absolute, true) => groups.error::<false, false>(inverse, min, scale),
        (ErrorMeasure::Absolute, false) => groups.error::<false, true>(inverse, min, scale),
        (ErrorMeasure::Squared, true) => groups.error::<true, false>(inverse, min, scale),
        (ErrorMeasure::Squared, false) => groups.error::<true, true>(inverse, min, scale),
    };
    for candidate in 0..=search.steps {
        let tried = select(live, isa.splat(search.divisor(candidate)) / (highest - min), zero);
        let line = match (search.error, groups.are_tame(tried, min)) {
            (ErrorMeasure::Absolute, true) => groups.line::<false, false>(tried, min),
            (ErrorMeasure::Absolute, false) => groups.line::<false, true>(tried, min),
            (ErrorMeasure::Squared, true) => groups.line::<true, false>(tried, min),
            (ErrorMeasure::Squared, false) => groups.line::<true, true>(tried, min),
        };
        let better = line.determinant.above(zero) & line.error.below(best_error) & live;
        best_error = select(better, line.error, best_error);
        inverse = select(better, tried, inverse);
        base = select(better, min, base);
        scale = select(better, line.slope, scale);
        min = select(better, line.intercept, min);
    }
    AffineFits { scale: select(live, scale, zero), min: min.negated(), inverse, base }
}

/// Weighs one difference as [`ErrorMeasure`] says.
#[inline(always)]
fn measured<F: Floats, const SQUARED: bool>(difference: F) -> F {
    if SQUARED { difference * difference } else { difference.abs() }
}

impl<F: Floats, const N: usize> Groups<'_, F, N> {
    /// Whether [`Floats::nearest_small`] rounds all scaled weights right.
    #[inline(always)]
    fn are_tame(&self, inverse: F, min: F) -> bool {
        let low = (inverse * (self.lowest - min)).abs();
        let high = (inverse * (self.highest - min)).abs();
        (low.below(self.tame) & high.below(self.tame)).all()
    }

    /// The level of weight `i`. `EXACT` rounds numbers out of reach by the bits that they happen to have.
    #[inline(always)]
    fn level<const EXACT: bool>(&self, i: usize, inverse: F, min: F) -> F {
        let scaled = inverse * (self.x[i] - min);
        let level = if EXACT { scaled.nearest_any() } else { scaled.nearest_small() };
        level.lesser(self.top).greater(self.zero)
    }

    /// Error of `scale * level + min`.
    #[inline(always)]
    fn error<const SQUARED: bool, const EXACT: bool>(&self, inverse: F, min: F, scale: F) -> F {
        let mut error = self.zero;
        for i in 0..N {
            let difference = scale * self.level::<EXACT>(i, inverse, min) + min - self.x[i];
            error = error + self.weights[i] * measured::<F, SQUARED>(difference);
        }
        error
    }

    #[inline(always)]
    fn line<const SQUARED: bool, const EXACT: bool>(&self, inverse: F, min: F) -> Line<F> {
        let &Self { x, weights, sum_w, sum_x, zero, .. } = self;
        let mut levels = [zero; N];
        let (mut sum_l, mut sum_l2, mut sum_xl) = (zero, zero, zero);
        for i in 0..N {
            let l = self.level::<EXACT>(i, inverse, min);
            levels[i] = l;
            let weighted = l * weights[i];
            sum_l = sum_l + weighted;
            sum_l2 = sum_l2 + weighted * l;
            sum_xl = sum_xl + weighted * x[i];
        }
        let determinant = sum_l2 * sum_w - sum_l * sum_l;
        let slope = (sum_xl * sum_w - sum_l * sum_x) / determinant;
        let intercept = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        let above_zero = intercept.above(zero);
        let slope = F::select(above_zero, sum_xl / sum_l2, slope);
        let intercept = F::select(above_zero, zero, intercept);
        let mut error = zero;
        for i in 0..N {
            let difference = slope * levels[i] + intercept - x[i];
            error = error + measured::<F, SQUARED>(difference) * weights[i];
        }
        Line { determinant, slope, intercept, error }
    }
}

/// [`SymmetricFit`](crate::quant::search::SymmetricFit) of each lane.
#[derive(Clone, Copy)]
pub struct SymmetricFits<F> {
    pub scale: F,
    /// NaN in negligible groups.
    pub inverse: F,
}

/// The weight of largest magnitude of each group, see [`peak`](crate::quant::search::peak).
#[inline(always)]
fn peak<F: Floats, const N: usize>(x: &[F; N], zero: F) -> F {
    let (mut magnitude, mut peak) = (zero, zero);
    for &v in x {
        let higher = v.abs().above(magnitude);
        magnitude = F::select(higher, v.abs(), magnitude);
        peak = F::select(higher, v, peak);
    }
    peak
}

/// [`fit_symmetric`](crate::quant::search::fit_symmetric) in every lane.
#[inline(always)]
pub fn fit_symmetric<I: Isa, const N: usize>(
    isa: I,
    x: &[I::Floats; N],
    weights: &[I::Floats; N],
    half: i32,
) -> SymmetricFits<I::Floats> {
    let infinity = isa.splat(f32::INFINITY);
    let mut finite = x[0].abs().below(infinity);
    for v in x {
        finite = finite & v.abs().below(infinity);
    }
    if finite.all() {
        best_symmetric::<I, N, false>(isa, x, weights, half)
    } else {
        best_symmetric::<I, N, true>(isa, x, weights, half)
    }
}

#[inline(always)]
fn best_symmetric<I: Isa, const N: usize, const EXACT: bool>(
    isa: I,
    x: &[I::Floats; N],
    weights: &[I::Floats; N],
    half: i32,
) -> SymmetricFits<I::Floats> {
    let select = <I::Floats as Floats>::select;
    let zero = isa.splat(0.0);
    let (lowest, highest) = (isa.splat(-half as f32), isa.splat((half - 1) as f32));
    let peak = peak(x, zero);
    let mut weighted = [zero; N];
    for i in 0..N {
        weighted[i] = weights[i] * x[i];
    }
    let (mut best_inverse, mut scale, mut best) = (zero, zero, zero);
    // The last candidate repeats the one before it.
    for (candidate, tenths) in SYMMETRIC_TENTHS[..SYMMETRIC_TENTHS.len() - 1].iter().enumerate() {
        let inverse = isa.splat(-(half as f32 + 0.1 * tenths)) / peak;
        let (mut sum_xl, mut sum_l2) = (zero, zero);
        for i in 0..N {
            let scaled = inverse * x[i];
            let l = if EXACT { scaled.nearest_any() } else { scaled.nearest_small() };
            let l = l.lesser(highest).greater(lowest);
            sum_xl = sum_xl + l * weighted[i];
            sum_l2 = sum_l2 + l * weights[i] * l;
        }
        let fitted = sum_xl / sum_l2;
        if candidate == 0 {
            best_inverse = inverse;
            scale = select(sum_l2.equals(zero), zero, fitted);
            best = scale * sum_xl;
        } else {
            let better = sum_l2.above(zero) & (sum_xl * sum_xl).above(best * sum_l2);
            best_inverse = select(better, inverse, best_inverse);
            scale = select(better, fitted, scale);
            best = select(better, fitted * sum_xl, best);
        }
    }
    let negligible = peak.abs().below(isa.splat(NEGLIGIBLE));
    SymmetricFits {
        scale: select(negligible, zero, scale),
        inverse: select(negligible, isa.splat(f32::NAN), best_inverse),
    }
}

/// [`fit_symmetric_by_descent`](crate::quant::search::fit_symmetric_by_descent) in every lane, for `GROUPS` vectors of
/// groups at once: each step waits for the one before it, so one vector alone would leave the CPU idle. Returns the
/// scales; `levels` get `-half..half`, and `-half` throughout in negligible groups.
#[inline(always)]
pub fn fit_symmetric_by_descent<I: Isa, const N: usize, const GROUPS: usize>(
    isa: I,
    x: &[[I::Floats; N]; GROUPS],
    half: i32,
    levels: &mut [[I::Floats; N]; GROUPS],
) -> [I::Floats; GROUPS] {
    let select = <I::Floats as Floats>::select;
    let zero = isa.splat(0.0);
    let (lowest, highest) = (isa.splat(-half as f32), isa.splat((half - 1) as f32));
    let mut peaks = [zero; GROUPS];
    let mut squares = [[zero; N]; GROUPS];
    let mut cubes = [[zero; N]; GROUPS];
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
                levels[g][i] = select(better, level, old);
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
        for level in &mut levels[g] {
            *level = select(negligible, lowest, *level);
        }
    }
    scales
}

/// [`PositiveFit`](crate::quant::search::PositiveFit) of each lane.
pub struct PositiveFits<F, const N: usize> {
    pub scale: F,
    /// Bytes.
    pub levels: [F; N],
}

/// [`fit_positive`](crate::quant::search::fit_positive) in every lane.
#[inline(always)]
pub fn fit_positive<I: Isa, const N: usize>(
    isa: I,
    x: &[I::Floats; N],
    weights: &[I::Floats; N],
    max_level: u8,
) -> PositiveFits<I::Floats, N> {
    let select = <I::Floats as Floats>::select;
    let (zero, one) = (isa.splat(0.0), isa.splat(1.0));
    let top = isa.splat(max_level.into());
    let mut max = zero;
    for &v in x {
        max = max.greater(v);
    }
    let negligible = max.below(isa.splat(NEGLIGIBLE));
    let mut best_inverse = top / max;
    let scale = one / best_inverse;
    let mut best_error = zero;
    for i in 0..N {
        let difference = x[i] - scale * (best_inverse * x[i]).nearest_byte();
        best_error = best_error + weights[i] * difference * difference;
    }
    for tenths in POSITIVE_TENTHS {
        let inverse = isa.splat(0.1 * tenths + f32::from(max_level)) / max;
        let scale = one / inverse;
        let mut error = zero;
        for i in 0..N {
            let difference = x[i] - scale * (inverse * x[i]).nearest_any().lesser(top);
            error = error + difference * weights[i] * difference;
        }
        let better = error.below(best_error);
        best_error = select(better, error, best_error);
        best_inverse = select(better, inverse, best_inverse);
    }
    let mut levels = [zero; N];
    let (mut sum_xl, mut sum_l2) = (zero, zero);
    for i in 0..N {
        let l = (best_inverse * x[i]).nearest_any().lesser(top);
        levels[i] = l.nearest_byte();
        sum_xl = sum_xl + weights[i] * x[i] * l;
        sum_l2 = sum_l2 + weights[i] * l * l;
    }
    for _ in 0..5 {
        let mut changed = zero.below(zero);
        for i in 0..N {
            let (w, old) = (weights[i], levels[i]);
            let rest_xl = sum_xl - w * x[i] * old;
            let rest_l2 = sum_l2 - w * old * old;
            let level = (x[i] * rest_l2 / rest_xl).nearest_any().lesser(top);
            let moved_xl = rest_xl + w * x[i] * level;
            let moved_l2 = rest_l2 + w * level * level;
            let better = rest_xl.above(zero)
                & rest_l2.above(zero)
                & level.equals(old).negated()
                & (moved_xl * moved_xl * sum_l2).above(sum_xl * sum_xl * moved_l2);
            levels[i] = select(better, level.nearest_byte(), old);
            sum_xl = select(better, moved_xl, sum_xl);
            sum_l2 = select(better, moved_l2, sum_l2);
            changed = changed | better;
        }
        if !changed.any() {
            break;
        }
    }
    let scale = select(sum_l2.above(zero), sum_xl / sum_l2, zero);
    for level in &mut levels {
        *level = select(negligible, zero, *level);
    }
    PositiveFits { scale: select(negligible, zero, scale), levels }
}
