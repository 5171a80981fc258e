//! The searches of [`search`](crate::quant::search), one group per lane.

use super::{Floats, Isa, Mask};
use crate::quant::search::{AffineSearch, ErrorMeasure, NEGLIGIBLE, POSITIVE_TENTHS, SYMMETRIC_TENTHS};

/// Scaled weights below this are rounded right by [`Floats::nearest_small`].
const TAME: f32 = 4_000_000.0;

/// [`AffineFit`](crate::quant::search::AffineFit) of each lane.
#[derive(Clone, Copy)]
pub(crate) struct AffineFits<F> {
    pub scale: F,
    pub min: F,
    /// Inverse and minimum of the [`LevelMap`](crate::quant::search::LevelMap).
    pub inverse: F,
    pub base: F,
}

/// What all candidates of `GROUPS` vectors of groups share.
struct Groups<'a, F, const N: usize, const GROUPS: usize> {
    x: &'a [[F; N]; GROUPS],
    weights: &'a [[F; N]; GROUPS],
    sum_w: [F; GROUPS],
    sum_x: [F; GROUPS],
    lowest: [F; GROUPS],
    highest: [F; GROUPS],
    zero: F,
    top: F,
    /// [`TAME`].
    tame: F,
}

/// One candidate in each lane, see `Lines` of the scalar search.
#[derive(Clone, Copy)]
struct Line<F> {
    determinant: F,
    slope: F,
    intercept: F,
    error: F,
}

/// [`fit_affine`](crate::quant::search::fit_affine) in every lane, for `GROUPS` vectors of groups at once: a candidate
/// begins where the one before it ended, so one vector alone would leave the CPU idle. Each lane keeps its own minimum,
/// so no candidate is tried twice. `levels` is room for one candidate's levels.
#[inline(always)]
pub(crate) fn fit_affine<I: Isa, const N: usize, const GROUPS: usize>(
    isa: I,
    x: &[[I::Floats; N]; GROUPS],
    weights: &[[I::Floats; N]; GROUPS],
    search: &AffineSearch,
    levels: &mut [[I::Floats; N]; GROUPS],
) -> [AffineFits<I::Floats>; GROUPS] {
    let select = <I::Floats as Floats>::select;
    let zero = isa.splat(0.0);
    let (mut lowest, mut highest, mut sum_w, mut sum_x) =
        ([zero; GROUPS], [zero; GROUPS], [zero; GROUPS], [zero; GROUPS]);
    for g in 0..GROUPS {
        (lowest[g], highest[g]) = (x[g][0], x[g][0]);
        sum_w[g] = weights[g][0];
        sum_x[g] = sum_w[g] * x[g][0];
    }
    for i in 1..N {
        for g in 0..GROUPS {
            let (v, w) = (x[g][i], weights[g][i]);
            lowest[g] = v.lesser(lowest[g]);
            highest[g] = v.greater(highest[g]);
            sum_w[g] = sum_w[g] + w;
            sum_x[g] = sum_x[g] + w * v;
        }
    }
    let (top, tame) = (isa.splat(search.max_level), isa.splat(TAME));
    // Lanes without a range compute along and are left out at the end.
    let mut live = [zero.below(zero); GROUPS];
    let (mut min, mut inverse, mut scale) = ([zero; GROUPS], [zero; GROUPS], [zero; GROUPS]);
    for g in 0..GROUPS {
        min[g] = select(lowest[g].above(zero), zero, lowest[g]);
        live[g] = highest[g].above(min[g]);
        inverse[g] = select(live[g], top / (highest[g] - min[g]), zero);
        scale[g] = isa.splat(1.0) / inverse[g];
    }
    let groups = Groups { x, weights, sum_w, sum_x, lowest, highest, zero, top, tame };
    let mut base = min;
    let mut best_error = match (search.error, groups.are_tame(&inverse, &min)) {
        (ErrorMeasure::Absolute, true) => groups.errors::<false, false>(&inverse, &min, &scale),
        (ErrorMeasure::Absolute, false) => groups.errors::<false, true>(&inverse, &min, &scale),
        (ErrorMeasure::Squared, true) => groups.errors::<true, false>(&inverse, &min, &scale),
        (ErrorMeasure::Squared, false) => groups.errors::<true, true>(&inverse, &min, &scale),
    };
    for candidate in 0..=search.steps {
        let divisor = isa.splat(search.divisor(candidate));
        let mut tried = [zero; GROUPS];
        for g in 0..GROUPS {
            tried[g] = select(live[g], divisor / (highest[g] - min[g]), zero);
        }
        let lines = match (search.error, groups.are_tame(&tried, &min)) {
            (ErrorMeasure::Absolute, true) => groups.lines::<false, false>(&tried, &min, levels),
            (ErrorMeasure::Absolute, false) => groups.lines::<false, true>(&tried, &min, levels),
            (ErrorMeasure::Squared, true) => groups.lines::<true, false>(&tried, &min, levels),
            (ErrorMeasure::Squared, false) => groups.lines::<true, true>(&tried, &min, levels),
        };
        for g in 0..GROUPS {
            let line = lines[g];
            let better = line.determinant.above(zero) & line.error.below(best_error[g]) & live[g];
            best_error[g] = select(better, line.error, best_error[g]);
            inverse[g] = select(better, tried[g], inverse[g]);
            base[g] = select(better, min[g], base[g]);
            scale[g] = select(better, line.slope, scale[g]);
            min[g] = select(better, line.intercept, min[g]);
        }
    }
    let mut fits = [AffineFits { scale: zero, min: zero, inverse: zero, base: zero }; GROUPS];
    for g in 0..GROUPS {
        let scale = select(live[g], scale[g], zero);
        fits[g] = AffineFits { scale, min: min[g].negated(), inverse: inverse[g], base: base[g] };
    }
    fits
}

/// Weighs one difference as [`ErrorMeasure`] says.
#[inline(always)]
fn measured<F: Floats, const SQUARED: bool>(difference: F) -> F {
    if SQUARED { difference * difference } else { difference.abs() }
}

impl<F: Floats, const N: usize, const GROUPS: usize> Groups<'_, F, N, GROUPS> {
    /// Whether [`Floats::nearest_small`] rounds all scaled weights right.
    #[inline(always)]
    fn are_tame(&self, inverse: &[F; GROUPS], min: &[F; GROUPS]) -> bool {
        let mut tame = self.zero.equals(self.zero);
        for g in 0..GROUPS {
            let low = (inverse[g] * (self.lowest[g] - min[g])).abs();
            let high = (inverse[g] * (self.highest[g] - min[g])).abs();
            tame = tame & low.below(self.tame) & high.below(self.tame);
        }
        tame.all()
    }

    /// The level of weight `i` of group `g`. `EXACT` rounds numbers out of reach by the bits that they happen to have.
    #[inline(always)]
    fn level<const EXACT: bool>(&self, g: usize, i: usize, inverse: F, min: F) -> F {
        let scaled = inverse * (self.x[g][i] - min);
        let level = if EXACT { scaled.nearest_any() } else { scaled.nearest_small() };
        level.lesser(self.top).greater(self.zero)
    }

    /// Errors of `scale * level + min`.
    #[inline(always)]
    fn errors<const SQUARED: bool, const EXACT: bool>(
        &self,
        inverse: &[F; GROUPS],
        min: &[F; GROUPS],
        scale: &[F; GROUPS],
    ) -> [F; GROUPS] {
        let mut errors = [self.zero; GROUPS];
        for i in 0..N {
            for g in 0..GROUPS {
                let level = self.level::<EXACT>(g, i, inverse[g], min[g]);
                let difference = scale[g] * level + min[g] - self.x[g][i];
                errors[g] = errors[g] + self.weights[g][i] * measured::<F, SQUARED>(difference);
            }
        }
        errors
    }

    #[inline(always)]
    fn lines<const SQUARED: bool, const EXACT: bool>(
        &self,
        inverse: &[F; GROUPS],
        min: &[F; GROUPS],
        levels: &mut [[F; N]; GROUPS],
    ) -> [Line<F>; GROUPS] {
        let &Self { x, weights, sum_w, sum_x, zero, .. } = self;
        let (mut sum_l, mut sum_l2, mut sum_xl) = ([zero; GROUPS], [zero; GROUPS], [zero; GROUPS]);
        for i in 0..N {
            for g in 0..GROUPS {
                let l = self.level::<EXACT>(g, i, inverse[g], min[g]);
                levels[g][i] = l;
                let weighted = l * weights[g][i];
                sum_l[g] = sum_l[g] + weighted;
                sum_l2[g] = sum_l2[g] + weighted * l;
                sum_xl[g] = sum_xl[g] + weighted * x[g][i];
            }
        }
        let mut lines = [Line { determinant: zero, slope: zero, intercept: zero, error: zero }; GROUPS];
        for g in 0..GROUPS {
            let determinant = sum_l2[g] * sum_w[g] - sum_l[g] * sum_l[g];
            let slope = (sum_xl[g] * sum_w[g] - sum_l[g] * sum_x[g]) / determinant;
            let intercept = (sum_l2[g] * sum_x[g] - sum_l[g] * sum_xl[g]) / determinant;
            let above_zero = intercept.above(zero);
            let slope = F::select(above_zero, sum_xl[g] / sum_l2[g], slope);
            let intercept = F::select(above_zero, zero, intercept);
            lines[g] = Line { determinant, slope, intercept, error: zero };
        }
        for i in 0..N {
            for g in 0..GROUPS {
                let line = &mut lines[g];
                let difference = line.slope * levels[g][i] + line.intercept - x[g][i];
                line.error = line.error + measured::<F, SQUARED>(difference) * weights[g][i];
            }
        }
        lines
    }
}

/// [`SymmetricFit`](crate::quant::search::SymmetricFit) of each lane.
#[derive(Clone, Copy)]
pub(crate) struct SymmetricFits<F> {
    pub scale: F,
    /// NaN in negligible groups.
    pub inverse: F,
}

/// The weight of largest magnitude of each group, see [`peak`](crate::quant::search::peak).
#[inline(always)]
pub(crate) fn peak<F: Floats, const N: usize>(x: &[F; N], zero: F) -> F {
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
pub(crate) fn fit_symmetric<I: Isa, const N: usize>(
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

/// With the peak less than half a level beyond the lowest, no weight is rounded to less than the lowest: tenths below
/// this.
const SHALLOW: f32 = 4.5;

/// What all candidates of a symmetric search share.
struct SymmetricGroup<'a, F, const N: usize> {
    x: &'a [F; N],
    weights: &'a [F; N],
    /// Products of the two.
    weighted: &'a [F; N],
    zero: F,
    lowest: F,
    highest: F,
}

impl<F: Floats, const N: usize> SymmetricGroup<'_, F, N> {
    /// `sum w x l` and `sum w l^2` of some candidates. `EXACT` rounds numbers out of reach, too.
    #[inline(always)]
    fn sums<const EXACT: bool, const C: usize>(&self, inverse: &[F; C], shallow: bool) -> [[F; C]; 2] {
        if EXACT {
            self.sums_to::<true, true, C>(inverse)
        } else if shallow {
            self.sums_to::<false, false, C>(inverse)
        } else {
            self.sums_to::<false, true, C>(inverse)
        }
    }

    /// Without `DEEP`, no level is below the lowest.
    #[inline(always)]
    fn sums_to<const EXACT: bool, const DEEP: bool, const C: usize>(&self, inverse: &[F; C]) -> [[F; C]; 2] {
        let (mut sum_xl, mut sum_l2) = ([self.zero; C], [self.zero; C]);
        for i in 0..N {
            for c in 0..C {
                let scaled = inverse[c] * self.x[i];
                let l = if EXACT { scaled.nearest_any() } else { scaled.nearest_small() };
                let l = l.lesser(self.highest);
                let l = if DEEP { l.greater(self.lowest) } else { l };
                sum_xl[c] = sum_xl[c] + l * self.weighted[i];
                sum_l2[c] = sum_l2[c] + l * self.weights[i] * l;
            }
        }
        [sum_xl, sum_l2]
    }
}

/// The best candidate of a symmetric search so far.
struct Best<F> {
    inverse: F,
    scale: F,
    /// The weighted energy that the scale explains.
    explained: F,
    zero: F,
}

impl<F: Floats> Best<F> {
    /// Compares candidates, in order. The first of all of them is taken as it is.
    #[inline(always)]
    fn offer<const C: usize>(&mut self, first: bool, inverses: &[F; C], [sums_xl, sums_l2]: [[F; C]; 2]) {
        for c in 0..C {
            let (inverse, sum_xl, sum_l2) = (inverses[c], sums_xl[c], sums_l2[c]);
            let fitted = sum_xl / sum_l2;
            if first && c == 0 {
                self.inverse = inverse;
                self.scale = F::select(sum_l2.equals(self.zero), self.zero, fitted);
                self.explained = self.scale * sum_xl;
            } else {
                let better = sum_l2.above(self.zero) & (sum_xl * sum_xl).above(self.explained * sum_l2);
                self.inverse = F::select(better, inverse, self.inverse);
                self.scale = F::select(better, fitted, self.scale);
                self.explained = F::select(better, fitted * sum_xl, self.explained);
            }
        }
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
    let mut best = Best { inverse: zero, scale: zero, explained: zero, zero };
    let mut candidates = [zero; SYMMETRIC_TENTHS.len()];
    for (candidate, tenths) in candidates.iter_mut().zip(SYMMETRIC_TENTHS) {
        *candidate = isa.splat(-(half as f32 + 0.1 * tenths)) / peak;
    }
    let group = SymmetricGroup { x, weights, weighted: &weighted, zero, lowest, highest };
    if I::MANY_REGISTERS {
        // Two candidates share what they load. The last one repeats the one before it, which changes nothing.
        let tenths = SYMMETRIC_TENTHS.as_chunks::<2>().0;
        for (n, (inverses, tenths)) in candidates.as_chunks::<2>().0.iter().zip(tenths).enumerate() {
            let shallow = tenths[0] < SHALLOW && tenths[1] < SHALLOW;
            best.offer(n == 0, inverses, group.sums::<EXACT, 2>(inverses, shallow));
        }
    } else {
        for (n, inverse) in candidates[..SYMMETRIC_TENTHS.len() - 1].iter().enumerate() {
            let inverse = &[*inverse];
            best.offer(n == 0, inverse, group.sums::<EXACT, 1>(inverse, SYMMETRIC_TENTHS[n] < SHALLOW));
        }
    }
    let negligible = peak.abs().below(isa.splat(NEGLIGIBLE));
    SymmetricFits {
        scale: select(negligible, zero, best.scale),
        inverse: select(negligible, isa.splat(f32::NAN), best.inverse),
    }
}

/// [`PositiveFit`](crate::quant::search::PositiveFit) of each lane.
pub(crate) struct PositiveFits<F, const N: usize> {
    pub scale: F,
    /// Bytes.
    pub levels: [F; N],
}

/// [`fit_positive`](crate::quant::search::fit_positive) in every lane.
#[inline(always)]
pub(crate) fn fit_positive<I: Isa, const N: usize>(
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
            // As above, a sum of small whole numbers.
            levels[i] = old + select(better, level.nearest_byte() - old, zero);
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
