//! The scale search that IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS and IQ3_S share.
//!
//! Such a type splits a block into groups of 16 or 32 weights with one scale each, takes the signs out, and
//! stores the magnitudes of 8 or 4 weights at a time as one lattice point. The encoder tries a row of scales
//! around the one that fits the largest magnitude, keeps the best by `(sum w x q)^2 / (sum w q^2)`, and moves what
//! was off the lattice once more with the scale found.
//!
//! Every sum runs over the weights of its group in order, from zero, in single precision: the bytes depend on it.

use super::{Chooser, CostTable, Lattice, repeat, spread, squared_errors};
use crate::quant::round::nearest_int;

/// How a type stores the signs of eight weights.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Signs {
    /// All eight bits.
    Free,
    /// Seven bits; the eighth makes the number of minus signs even. Where it is odd, the weight that costs least
    /// gives its sign up and enters the search with a negative magnitude.
    Even,
}

/// One group of weights, split into signs and magnitudes.
pub struct Group<const N: usize> {
    /// Weight of each squared error.
    pub weights: [f32; N],
    /// Square root of `weights`; what the choice among neighbours is weighted with.
    roots: [f32; N],
    /// Absolute values, but for the sign flips of [`Signs::Even`].
    pub magnitudes: [f32; N],
    /// `weights * magnitudes`.
    weighted: [f32; N],
    /// Bit `i` of byte `k`: weight `8 k + i` is negative. The first `N / 8` bytes are in use.
    pub signs: [u8; 4],
}

impl<const N: usize> Group<N> {
    /// Splits `values`.
    #[inline(always)]
    pub fn new(values: &[f32; N], weights: [f32; N], rule: Signs) -> Self {
        let mut magnitudes = values.map(|x| if x >= 0.0 { x } else { -x });
        let mut signs = [0u8; 4];
        for (k, values) in values.as_chunks::<8>().0.iter().enumerate() {
            for (i, &x) in values.iter().enumerate() {
                // Not the sign bit: minus zero counts as positive.
                signs[k] |= u8::from(x < 0.0) << i;
            }
            if rule == Signs::Even && signs[k].count_ones() % 2 == 1 {
                let cost = |i: usize| weights[8 * k + i] * values[i] * values[i];
                let cheapest = (1..8).fold(0, |best, i| if cost(i) < cost(best) { i } else { best });
                magnitudes[8 * k + cheapest] = -magnitudes[8 * k + cheapest];
                signs[k] ^= 1 << cheapest;
            }
        }
        let roots = weights.map(f32::sqrt);
        let weighted = std::array::from_fn(|i| weights[i] * magnitudes[i]);
        Group { weights, roots, magnitudes, weighted, signs }
    }

    /// The largest magnitude.
    #[inline(always)]
    pub fn max(&self) -> f32 {
        self.magnitudes.iter().fold(f32::NEG_INFINITY, |max, &x| if max > x { max } else { x })
    }
}

/// Which lattice points are chosen anew once the best scale is known.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Refine {
    /// All (IQ2_XXS).
    Always,
    /// All if one of them had to be moved onto the lattice, or if no scale was better than none (IQ3_S).
    AllIfAny,
    /// Those that had to be moved onto the lattice.
    OffLattice,
}

/// The scales that a type tries: `(2 * levels - 1 + n * step) / reach` for `n` in `-tries..=tries`.
pub struct Trials {
    /// Trials on each side.
    pub tries: i32,
    /// Distance between trials.
    pub step: f32,
    /// Highest level plus one; the level `l` stands for `2 l + 1`.
    pub levels: i32,
    /// What is chosen anew at the end.
    pub refine: Refine,
}

/// A group's scale and points.
pub struct Fit {
    /// Scale of the magnitudes `2 * level + 1`; never negative, as its sign went into the group's signs.
    pub scale: f32,
    /// Index of the lattice point of each run of 8 or 4 weights.
    pub points: [u16; 8],
}

/// Fits `group`. `reach` is the magnitude that the top level should meet, `start` the scale if no trial is better
/// than none at all. A negative scale turns all signs around, including those in `group.signs`.
#[inline(always)]
pub fn fit<const N: usize, const D: usize>(
    chooser: impl Chooser,
    lattice: &Lattice<D>,
    group: &mut Group<N>,
    reach: f32,
    start: f32,
    trials: &Trials,
) -> Fit {
    let runs = N / D;
    // The tables of the costs differ by the scale only.
    let (mut targets, mut weights) = ([[0f32; 32]; 8], [[0f32; 32]; 8]);
    for k in 0..runs {
        targets[k] = spread::<D>(&group.magnitudes.as_chunks().0[k]);
        weights[k] = spread::<D>(&group.roots.as_chunks().0[k]);
    }
    let mut scale = start;
    let mut best = 0f32;
    let mut points = [0u16; 8];
    let mut off = [trials.refine == Refine::AllIfAny; 8];
    for n in -trials.tries..=trials.tries {
        let inverse = ((2 * trials.levels - 1) as f32 + n as f32 * trials.step) / reach;
        let levels = nearest_levels(&group.magnitudes, inverse, trials.levels - 1);
        let mut found = [0u16; 8];
        let mut found_off = [false; 8];
        for k in 0..runs {
            let (point, on) =
                place(chooser, lattice, &levels.as_chunks().0[k], 1.0 / inverse, &targets[k], &weights[k]);
            found[k] = point;
            found_off[k] = !on;
        }
        let (sum_qx, sum_q2) = sums(lattice, group, &found);
        if sum_q2 > 0.0 && sum_qx * sum_qx > best * sum_q2 {
            scale = sum_qx / sum_q2;
            best = scale * sum_qx;
            points = found;
            off = found_off;
        }
    }
    let again = match trials.refine {
        Refine::Always => [true; 8],
        Refine::AllIfAny => [off[..runs].contains(&true); 8],
        Refine::OffLattice => off,
    };
    if scale > 0.0 && again[..runs].contains(&true) {
        let levels = nearest_levels(&group.magnitudes, 1.0 / scale, trials.levels - 1);
        for k in (0..runs).filter(|&k| again[k]) {
            points[k] = place(chooser, lattice, &levels.as_chunks().0[k], scale, &targets[k], &weights[k]).0;
        }
        let (sum_qx, sum_q2) = sums(lattice, group, &points);
        if sum_q2 > 0.0 {
            scale = sum_qx / sum_q2;
        }
    }
    if scale < 0.0 {
        scale = -scale;
        group.signs = group.signs.map(|s| !s);
    }
    Fit { scale, points }
}

/// The level of each magnitude: nearest to `2 * level + 1` after division by the scale, which is given inverse.
#[inline(always)]
fn nearest_levels<const N: usize>(magnitudes: &[f32; N], inverse_scale: f32, top: i32) -> [u8; N] {
    let mut levels = [0u8; N];
    for (level, &x) in levels.iter_mut().zip(magnitudes) {
        *level = nearest_int(0.5 * (inverse_scale * x - 1.0)).clamp(0, top) as u8;
    }
    levels
}

/// The point for the levels of a run, and whether they were that point. Targets and weights are spread over the levels.
#[inline(always)]
fn place<const D: usize>(
    chooser: impl Chooser,
    lattice: &Lattice<D>,
    levels: &[u8; D],
    scale: f32,
    targets: &CostTable,
    weights: &CostTable,
) -> (u16, bool) {
    lattice.nearest(chooser, levels, || squared_errors(if D == 8 { &ODD_3 } else { &ODD_8 }, scale, targets, weights))
}

/// What the levels stand for.
const ODD_3: CostTable = repeat::<8, 3>(&[1.0, 3.0, 5.0]);
const ODD_8: CostTable = repeat::<4, 8>(&[1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0]);

/// `(sum w x q, sum w q^2)` over the group.
#[inline(always)]
fn sums<const N: usize, const D: usize>(lattice: &Lattice<D>, group: &Group<N>, points: &[u16; 8]) -> (f32, f32) {
    let (weights, weighted) = (group.weights.as_chunks::<D>().0, group.weighted.as_chunks::<D>().0);
    let (mut sum_qx, mut sum_q2) = (0f32, 0f32);
    for ((weights, weighted), &point) in weights.iter().zip(weighted).zip(points) {
        for (i, &level) in lattice.levels(point).iter().enumerate() {
            let q = (2 * i32::from(level) + 1) as f32;
            sum_qx += weighted[i] * q;
            sum_q2 += weights[i] * q * q;
        }
    }
    (sum_qx, sum_q2)
}

/// `scale / unit` as one of 16 steps `2 s + 1`, clamped (the block scale of all these types).
#[inline(always)]
pub fn scale_code(inverse_unit: f32, scale: f32, top: i32) -> u8 {
    nearest_int(0.5 * (inverse_unit * scale - 1.0)).clamp(0, top) as u8
}
