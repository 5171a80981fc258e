//! Searches for the scale (and offset) of a group that loses least, shared by the block formats.
//!
//! All of them weigh the error of each weight, try a handful of scales around the obvious one and keep the best.
//! The order of the float operations is ggml's: a sum that is rounded differently may prefer another candidate and
//! change the bytes. Candidates run side by side in [`Lanes`]; each one's sums still run over the weights in order,
//! and they are compared in order.

use super::lanes::{Lanes, fold_halves};
use super::round::{nearest_int, nearest_small};

/// Groups whose largest magnitude is below this are stored as zeros (ggml's `GROUP_MAX_EPS`).
pub(super) const NEGLIGIBLE: f32 = 1e-15;

/// How an affine search counts the error of one weight before weighing it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ErrorMeasure {
    /// Magnitude of the difference.
    Absolute,
    /// Square of the difference.
    Squared,
}

/// What an affine search tries: the group's range is divided by `max_level + first + step * i` for `i` in
/// `0..=steps`, besides `max_level` itself.
#[derive(Debug, Clone, Copy)]
pub(super) struct AffineSearch {
    /// Highest level; the lowest is 0.
    pub max_level: f32,
    /// First deviation from `max_level` (ggml's `rmin`).
    pub first: f32,
    /// Distance between candidates (`rdelta`).
    pub step: f32,
    /// Index of the last candidate (`nstep`).
    pub steps: usize,
    /// What is minimized.
    pub error: ErrorMeasure,
}

/// A group as `weight = scale * level - min`.
#[derive(Debug, Clone, Copy)]
pub(super) struct AffineFit {
    /// Distance between levels.
    pub scale: f32,
    /// What to subtract: minus the value of level 0, not negative.
    pub min: f32,
    /// How its weights become levels.
    pub level_map: LevelMap,
}

/// Fits scale and minimum of a group (`make_qkx2_quants`, `make_qkx3_quants`): for each candidate, weights are
/// rounded to levels, then the weighted least-squares line through (level, weight) is taken and its error summed.
///
/// A line that is better than all before becomes the base of the candidates after it: they divide the range above
/// its minimum. Several candidates are tried at once on the guess that none of them is better, which is mostly so;
/// those after a better one are tried again.
pub(super) fn fit_affine<const N: usize>(x: &[f32; N], weights: &[f32; N], search: &AffineSearch) -> AffineFit {
    let (mut lowest, mut highest) = (x[0], x[0]);
    let mut sum_w = weights[0];
    let mut sum_x = sum_w * x[0];
    for i in 1..N {
        if x[i] < lowest {
            lowest = x[i];
        }
        if x[i] > highest {
            highest = x[i];
        }
        sum_w += weights[i];
        sum_x += weights[i] * x[i];
    }
    let mut min = if lowest > 0.0 { 0.0 } else { lowest };
    if highest <= min {
        return AffineFit { scale: 0.0, min: -min, level_map: LevelMap::TO_ZERO };
    }
    let group = AffineGroup { x, weights, sum_w, sum_x, lowest, highest };
    let mut best = LevelMap { inverse: search.max_level / (highest - min), min };
    let mut scale = 1.0 / best.inverse;
    let mut best_error = 0.0;
    for i in 0..N {
        let difference = scale * best.level(x[i], search.max_level) as f32 + min - x[i];
        best_error += weights[i] * search.error.of(difference);
    }
    let mut next = 0;
    while next <= search.steps {
        let lines = group.lines_above(min, next, search);
        let base = min;
        let count = AFFINE_LANES.min(search.steps + 1 - next);
        next += count;
        for k in 0..count {
            if lines.determinant.0[k] > 0.0 && lines.error.0[k] < best_error {
                best_error = lines.error.0[k];
                best = LevelMap { inverse: lines.inverse.0[k], min: base };
                scale = lines.slope.0[k];
                min = lines.intercept.0[k];
                if min.to_bits() != base.to_bits() {
                    next -= count - (k + 1);
                    break;
                }
            }
        }
    }
    AffineFit { scale, min: -min, level_map: best }
}

impl AffineSearch {
    /// The number of steps that candidate `index` divides the range into.
    #[inline(always)]
    pub(super) fn divisor(&self, index: usize) -> f32 {
        self.first + self.step * index as f32 + self.max_level
    }
}

impl ErrorMeasure {
    #[inline(always)]
    fn of(self, difference: f32) -> f32 {
        match self {
            ErrorMeasure::Absolute => difference.abs(),
            ErrorMeasure::Squared => difference * difference,
        }
    }
}

/// How weights become levels: the nearest to `inverse * (x - min)`.
#[derive(Debug, Clone, Copy)]
pub(super) struct LevelMap {
    /// Inverse of the distance between levels.
    pub inverse: f32,
    /// Where level 0 is.
    pub min: f32,
}

impl LevelMap {
    /// Level 0 for every weight.
    const TO_ZERO: Self = Self { inverse: 0.0, min: 0.0 };

    #[inline(always)]
    pub(super) fn level(&self, x: f32, max_level: f32) -> i32 {
        nearest_int(self.inverse * (x - self.min)).clamp(0, max_level as i32)
    }
}

/// Candidates tried at once.
const AFFINE_LANES: usize = 8;
type AffineLanes = Lanes<AFFINE_LANES>;

/// A group with what all candidates share.
struct AffineGroup<'a, const N: usize> {
    x: &'a [f32; N],
    weights: &'a [f32; N],
    sum_w: f32,
    sum_x: f32,
    lowest: f32,
    highest: f32,
}

/// Consecutive candidates: rounded with `inverse`, then `weight = slope * level + intercept`, if `determinant` is
/// positive.
struct Lines {
    inverse: AffineLanes,
    determinant: AffineLanes,
    slope: AffineLanes,
    intercept: AffineLanes,
    error: AffineLanes,
}

impl<const N: usize> AffineGroup<'_, N> {
    /// The lines of candidates `first..`, with the range above `min`.
    #[inline(always)]
    fn lines_above(&self, min: f32, first: usize, search: &AffineSearch) -> Lines {
        let inverse = AffineLanes::from_fn(|k| search.divisor(first + k) / (self.highest - min));
        let steepest = inverse.0[AFFINE_LANES - 1];
        let tame = |x: f32| (steepest * (x - min)).abs() < 4_000_000.0;
        let top = search.max_level;
        if tame(self.lowest) && tame(self.highest) {
            let level = |t| {
                let level = nearest_small(t);
                let level = if level < top { level } else { top };
                if level > 0.0 { level } else { 0.0 }
            };
            match search.error {
                ErrorMeasure::Absolute => self.lines(min, inverse, level, |d| ErrorMeasure::Absolute.of(d)),
                ErrorMeasure::Squared => self.lines(min, inverse, level, |d| ErrorMeasure::Squared.of(d)),
            }
        } else {
            // Scaled weights out of reach, infinite or NaN are rounded by the bits they happen to have.
            self.lines(min, inverse, |t| nearest_int(t).clamp(0, top as i32) as f32, |d| search.error.of(d))
        }
    }

    #[inline(always)]
    fn lines(
        &self,
        min: f32,
        inverse: AffineLanes,
        level: impl Fn(f32) -> f32 + Copy,
        measure: impl Fn(f32) -> f32 + Copy,
    ) -> Lines {
        let &Self { x, weights, sum_w, sum_x, .. } = self;
        let mut levels = [AffineLanes::ZERO; N];
        let (mut sum_l, mut sum_l2, mut sum_xl) = (AffineLanes::ZERO, AffineLanes::ZERO, AffineLanes::ZERO);
        for i in 0..N {
            let l = (inverse * (x[i] - min)).map(level);
            levels[i] = l;
            let weighted = l * weights[i];
            sum_l += weighted;
            sum_l2 += weighted * l;
            sum_xl += weighted * x[i];
        }
        let determinant = sum_l2 * sum_w - sum_l * sum_l;
        let slope = (sum_xl * sum_w - sum_l * sum_x) / determinant;
        let intercept = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        // A line that starts above zero is replaced by the best one through zero.
        let through_zero = sum_xl / sum_l2;
        let slope = Lanes::from_fn(|k| if intercept.0[k] > 0.0 { through_zero.0[k] } else { slope.0[k] });
        let intercept = intercept.map(|m| if m > 0.0 { 0.0 } else { m });
        let mut error = AffineLanes::ZERO;
        for i in 0..N {
            error += (slope * levels[i] + intercept - x[i]).map(measure) * weights[i];
        }
        Lines { inverse, determinant, slope, intercept, error }
    }
}

/// A group as `weight = scale * (level - half)`.
#[derive(Debug, Clone, Copy)]
pub(super) struct SymmetricFit {
    /// Distance between levels; negative when the largest magnitude is a positive weight.
    pub scale: f32,
    /// Weights were rounded after multiplying them with this; NaN in a negligible group.
    pub inverse: f32,
}

impl SymmetricFit {
    const NOTHING: Self = Self { scale: 0.0, inverse: f32::NAN };
}

/// The weight of largest magnitude, the first of equals, or +0.0 if all are zero (or NaN).
#[inline(always)]
pub(super) fn peak<const N: usize>(x: &[f32; N]) -> f32 {
    // Extremes do not depend on the order of comparisons, so they are taken side by side.
    let (chunks, rest) = x.as_chunks::<8>();
    let (mut low, mut high) = ([0.0f32; 8], [0.0f32; 8]);
    for chunk in chunks {
        for k in 0..8 {
            high[k] = if chunk[k] > high[k] { chunk[k] } else { high[k] };
            low[k] = if chunk[k] < low[k] { chunk[k] } else { low[k] };
        }
    }
    let higher = |max: f32, v: f32| if v > max { v } else { max };
    let lower = |min: f32, v: f32| if v < min { v } else { min };
    let high = rest.iter().copied().fold(fold_halves(high, higher), higher);
    let low = rest.iter().copied().fold(fold_halves(low, lower), lower);
    if high > -low {
        high
    } else if high < -low {
        low
    } else {
        x.iter().copied().find(|v| v.abs() == high && high > 0.0).unwrap_or(0.0)
    }
}

/// Fits the scale of a group with levels on both sides of zero (`make_qx_quants` with `rmse_type` 1): the peak goes
/// to level `-half`, or to a little less or more in 18 further candidates; the one whose least-squares scale explains
/// most of the weighted energy wins.
pub(super) fn fit_symmetric<const N: usize>(x: &[f32; N], weights: &[f32; N], half: i32) -> SymmetricFit {
    let peak = peak(x);
    if peak.abs() < NEGLIGIBLE {
        return SymmetricFit::NOTHING;
    }
    let (lowest, highest) = (-half as f32, (half - 1) as f32);
    if x.iter().all(|v| v.is_finite()) {
        // Every scaled weight lies in +-(half + 1).
        best_symmetric(x, weights, half, peak, |t| {
            let level = nearest_small(t);
            let level = if level < highest { level } else { highest };
            if level > lowest { level } else { lowest }
        })
    } else {
        best_symmetric(x, weights, half, peak, |t| nearest_int(t).clamp(-half, half - 1) as f32)
    }
}

/// Tenths of a level that the peak of a symmetric search moves, in the order in which candidates are compared. The
/// last one is there twice to fill the lanes, which changes nothing.
pub(super) const SYMMETRIC_TENTHS: [f32; 20] =
    [0.0, -9.0, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 9.0];

/// Sums over a group of `w x l` and `w l^2`, for each candidate. Kept out of line: inlined, the lanes are taken apart
/// again by what follows, at half the speed.
#[inline(never)]
fn symmetric_sums<const N: usize, const LANES: usize>(
    x: &[f32; N],
    weights: &[f32; N],
    inverse: Lanes<LANES>,
    level: impl Fn(f32) -> f32 + Copy,
) -> (Lanes<LANES>, Lanes<LANES>) {
    let (mut sum_xl, mut sum_l2) = (Lanes::ZERO, Lanes::ZERO);
    for i in 0..N {
        let l = (inverse * x[i]).map(level);
        sum_xl += l * (weights[i] * x[i]);
        sum_l2 += l * weights[i] * l;
    }
    (sum_xl, sum_l2)
}

#[inline(always)]
fn best_symmetric<const N: usize>(
    x: &[f32; N],
    weights: &[f32; N],
    half: i32,
    peak: f32,
    level: impl Fn(f32) -> f32 + Copy,
) -> SymmetricFit {
    const LANES: usize = 4;
    let mut best_inverse = 0.0;
    let mut scale = 0.0;
    let mut best = 0.0;
    for (batch, tenths) in SYMMETRIC_TENTHS.as_chunks::<LANES>().0.iter().enumerate() {
        let inverse = Lanes(tenths.map(|tenths| -(half as f32 + 0.1 * tenths) / peak));
        let (sum_xl, sum_l2) = symmetric_sums(x, weights, inverse, level);
        for k in 0..LANES {
            let (sum_xl, sum_l2) = (sum_xl.0[k], sum_l2.0[k]);
            let plain = batch == 0 && k == 0;
            if plain {
                best_inverse = inverse.0[k];
                scale = if sum_l2 != 0.0 { sum_xl / sum_l2 } else { 0.0 };
                best = scale * sum_xl;
            } else if sum_l2 > 0.0 && sum_xl * sum_xl > best * sum_l2 {
                best_inverse = inverse.0[k];
                scale = sum_xl / sum_l2;
                best = scale * sum_xl;
            }
        }
    }
    SymmetricFit { scale, inverse: best_inverse }
}

/// Fits the scale of a group with few levels (`make_q3_quants`, errors weighed by the squared weights): starts with
/// the peak at level `-half` and moves one weight at a time to the level that suits the scale of the others, up to
/// five rounds, as long as that helps. Returns the scale and the levels `0..2 * half`, all 0 in a negligible group.
pub(super) fn fit_symmetric_by_descent<const N: usize>(x: &[f32; N], half: i32) -> (f32, [u8; N]) {
    let peak = peak(x);
    if peak.abs() < NEGLIGIBLE {
        return (0.0, [0; N]);
    }
    let inverse = -half as f32 / peak;
    let (lowest, highest) = (-half as f32, (half - 1) as f32);
    let mut levels = [0.0f32; N];
    let (mut sum_xl, mut sum_l2) = (0.0f32, 0.0f32);
    // Errors weigh by the square, so the products are the cube and the square.
    let square = x.map(|v| v * v);
    let cube: [f32; N] = std::array::from_fn(|i| square[i] * x[i]);
    for i in 0..N {
        levels[i] = (nearest_int(inverse * x[i]) as f32).clamp(lowest, highest);
        sum_xl += cube[i] * levels[i];
        sum_l2 += square[i] * levels[i] * levels[i];
    }
    for _ in 0..5 {
        let mut changed = false;
        for i in 0..N {
            let old = levels[i];
            let mut rest_xl = sum_xl - cube[i] * old;
            if rest_xl > 0.0 {
                let mut rest_l2 = sum_l2 - square[i] * old * old;
                let level = (nearest_int(x[i] * rest_l2 / rest_xl) as f32).clamp(lowest, highest);
                if level != old {
                    rest_xl += cube[i] * level;
                    rest_l2 += square[i] * level * level;
                    if rest_l2 > 0.0 && rest_xl * rest_xl * sum_l2 > sum_xl * sum_xl * rest_l2 {
                        levels[i] = level;
                        (sum_xl, sum_l2) = (rest_xl, rest_l2);
                        changed = true;
                    }
                }
            }
        }
        if !changed {
            break;
        }
    }
    let scale = if sum_l2 > 0.0 { sum_xl / sum_l2 } else { 0.0 };
    (scale, levels.map(|l| (nearest_int(l) + half) as u8))
}

/// A group of values that are not negative, as `value = scale * level`.
#[derive(Debug, Clone, Copy)]
pub(super) struct PositiveFit<const N: usize> {
    /// Distance between levels.
    pub scale: f32,
    /// Level of each value. A value that rounding made negative wraps around, as it does in ggml.
    pub levels: [u8; N],
}

/// Tenths of a level that the top of [`fit_positive`] moves, after the candidate that does not.
pub(super) const POSITIVE_TENTHS: [f32; 8] = [-4.0, -3.0, -2.0, -1.0, 1.0, 2.0, 3.0, 4.0];

/// Fits the scale of positive values, the scales and minima of a super-block (`make_qp_quants`): nine candidates by
/// squared error, then up to five rounds of moving single levels.
pub(super) fn fit_positive<const N: usize>(x: &[f32; N], weights: &[f32; N], max_level: i32) -> PositiveFit<N> {
    const LANES: usize = POSITIVE_TENTHS.len();
    let mut max = 0.0;
    for &v in x {
        // Not f32::max: a NaN must replace what was there and be replaced by what follows.
        max = if max > v { max } else { v };
    }
    if max < NEGLIGIBLE {
        return PositiveFit { scale: 0.0, levels: [0; N] };
    }
    let top = max_level as f32;
    let mut best_inverse = top / max;
    let scale = 1.0 / best_inverse;
    let mut best_error = 0.0;
    for i in 0..N {
        let difference = x[i] - scale * f32::from(nearest_int(best_inverse * x[i]) as u8);
        best_error += weights[i] * difference * difference;
    }
    let inverse = Lanes(POSITIVE_TENTHS.map(|tenths| (0.1 * tenths + top) / max));
    let scales = inverse.map(|inverse| 1.0 / inverse);
    let mut error = Lanes::<LANES>::ZERO;
    for i in 0..N {
        let level = (inverse * x[i]).map(|t| nearest_int(t).min(max_level) as f32);
        let difference = (scales * level).map(|rounded| x[i] - rounded);
        error += difference * weights[i] * difference;
    }
    for k in 0..LANES {
        if error.0[k] < best_error {
            best_error = error.0[k];
            best_inverse = inverse.0[k];
        }
    }

    let mut levels = [0u8; N];
    let (mut sum_xl, mut sum_l2) = (0.0f32, 0.0f32);
    for i in 0..N {
        let level = nearest_int(best_inverse * x[i]).min(max_level);
        levels[i] = level as u8;
        let l = level as f32;
        sum_xl += weights[i] * x[i] * l;
        sum_l2 += weights[i] * l * l;
    }
    for _ in 0..5 {
        let mut changed = false;
        for i in 0..N {
            let w = weights[i];
            let old = f32::from(levels[i]);
            let mut rest_xl = sum_xl - w * x[i] * old;
            let mut rest_l2 = sum_l2 - w * old * old;
            if rest_xl > 0.0 && rest_l2 > 0.0 {
                let level = nearest_int(x[i] * rest_l2 / rest_xl).min(max_level);
                if level != i32::from(levels[i]) {
                    let new = level as f32;
                    rest_xl += w * x[i] * new;
                    rest_l2 += w * new * new;
                    if rest_xl * rest_xl * sum_l2 > sum_xl * sum_xl * rest_l2 {
                        levels[i] = level as u8;
                        (sum_xl, sum_l2) = (rest_xl, rest_l2);
                        changed = true;
                    }
                }
            }
        }
        if !changed {
            break;
        }
    }
    PositiveFit { scale: if sum_l2 > 0.0 { sum_xl / sum_l2 } else { 0.0 }, levels }
}
