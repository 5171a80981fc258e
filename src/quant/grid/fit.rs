//! The scale search that IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS and IQ3_S share.
//!
//! Such a type splits a block into groups of 16 or 32 weights with one scale each, takes the signs out, and
//! stores the magnitudes of 8 or 4 weights at a time as one lattice point. The encoder tries a row of scales
//! around the one that fits the largest magnitude, keeps the best by `(sum w x q)^2 / (sum w q^2)`, and moves what
//! was off the lattice once more with the scale found.
//!
//! Every sum runs over the weights of its group in order, from zero, in single precision: the bytes depend on it.

use super::{Chooser, CostTable, InOrder, Lattice, repeat, spread, squared_errors};
use crate::quant::round::nearest_int;

/// How a type stores the signs of eight weights.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signs {
    /// All eight bits.
    Free,
    /// Seven bits; the eighth makes the number of minus signs even. Where it is odd, the weight that costs least
    /// gives its sign up and enters the search with a negative magnitude.
    Even,
}

/// One group of weights, split into signs and magnitudes.
pub(crate) struct Group<const N: usize> {
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
    pub(crate) fn new(values: &[f32; N], weights: [f32; N], rule: Signs) -> Self {
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
    pub(crate) fn max(&self) -> f32 {
        self.magnitudes.iter().fold(f32::NEG_INFINITY, |max, &x| if max > x { max } else { x })
    }
}

/// Which lattice points are chosen anew once the best scale is known.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refine {
    /// All (IQ2_XXS).
    Always,
    /// All if one of them had to be moved onto the lattice, or if no scale was better than none (IQ3_S).
    AllIfAny,
    /// Those that had to be moved onto the lattice.
    OffLattice,
}

/// The scales that a type tries: `(2 * levels - 1 + n * step) / reach` for `n` in `-tries..=tries`.
pub(crate) struct Trials {
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
pub(crate) struct Fit {
    /// Scale of the magnitudes `2 * level + 1`; never negative, as its sign went into the group's signs.
    pub scale: f32,
    /// Index of the lattice point of each run of 8 or 4 weights.
    pub points: [u16; 8],
}

/// Most trials of any type, rounded up to whole vectors.
pub(crate) const MOST_TRIALS: usize = 32;

/// The lattice values of 16 weights for each trial, for as many times 16 weights as a group has.
pub(crate) type TrialValues<const CHUNKS: usize> = [[[f32; 16]; MOST_TRIALS]; CHUNKS];

/// Steps of [`fit`] that are the same for all trials.
pub(crate) trait FitSteps: Chooser {
    /// The tuple of nearest levels ([`Lattice::nearest_to_tuple`]) of each run of `D` weights, for each of the first
    /// `count` trials of inverse scales. What the others get does not matter.
    fn tuples<const N: usize, const D: usize, const RUNS: usize>(
        self,
        magnitudes: &[f32; N],
        inverses: &[f32; MOST_TRIALS],
        count: usize,
        top: i32,
        tuples: &mut [[u16; MOST_TRIALS]; RUNS],
    );

    /// `sum weighted q` and `sum weights q^2` of each of the first `count` trials; other entries hold anything.
    fn sums<const N: usize, const CHUNKS: usize>(
        self,
        weights: &[f32; N],
        weighted: &[f32; N],
        values: &TrialValues<CHUNKS>,
        count: usize,
    ) -> [[f32; MOST_TRIALS]; 2];
}

impl FitSteps for InOrder {
    #[inline(always)]
    fn tuples<const N: usize, const D: usize, const RUNS: usize>(
        self,
        magnitudes: &[f32; N],
        inverses: &[f32; MOST_TRIALS],
        count: usize,
        top: i32,
        tuples: &mut [[u16; MOST_TRIALS]; RUNS],
    ) {
        for (n, inverse) in inverses[..count].iter().enumerate() {
            let levels = nearest_levels(magnitudes, *inverse, top);
            for (tuples, levels) in tuples.iter_mut().zip(levels.as_chunks::<D>().0) {
                tuples[n] = Lattice::tuple(levels) as u16;
            }
        }
    }

    #[inline(always)]
    fn sums<const N: usize, const CHUNKS: usize>(
        self,
        weights: &[f32; N],
        weighted: &[f32; N],
        values: &TrialValues<CHUNKS>,
        count: usize,
    ) -> [[f32; MOST_TRIALS]; 2] {
        let [mut sum_qx, mut sum_q2] = [[0f32; MOST_TRIALS]; 2];
        for n in 0..count {
            for i in 0..N {
                let q = values[i / 16][n][i % 16];
                sum_qx[n] += weighted[i] * q;
                sum_q2[n] += weights[i] * q * q;
            }
        }
        [sum_qx, sum_q2]
    }
}

/// What a level stands for.
#[inline(always)]
fn odd(level: u8) -> f32 {
    (2 * i32::from(level) + 1) as f32
}

/// Fits `group`, `RUNS` runs of `D` weights. `reach` is the magnitude that the top level should meet, `start` the scale if no trial is better
/// than none at all. A negative scale turns all signs around, including those in `group.signs`.
#[inline(always)]
pub(crate) fn fit<const N: usize, const D: usize, const RUNS: usize, const CHUNKS: usize>(
    steps: impl FitSteps,
    lattice: &Lattice<D>,
    group: &mut Group<N>,
    reach: f32,
    start: f32,
    trials: &Trials,
) -> Fit {
    const { assert!(N == RUNS * D && N == CHUNKS * 16 && RUNS <= 8) };
    // The tables of the costs differ by the scale only.
    let (mut targets, mut weights) = ([[0f32; 32]; RUNS], [[0f32; 32]; RUNS]);
    for k in 0..RUNS {
        targets[k] = spread::<D>(&group.magnitudes.as_chunks().0[k]);
        weights[k] = spread::<D>(&group.roots.as_chunks().0[k]);
    }
    let count = (2 * trials.tries + 1) as usize;
    let mut inverses = [0f32; MOST_TRIALS];
    for (n, inverse) in (-trials.tries..=trials.tries).zip(&mut inverses) {
        *inverse = ((2 * trials.levels - 1) as f32 + n as f32 * trials.step) / reach;
    }
    let mut tuples = [[0u16; MOST_TRIALS]; RUNS];
    steps.tuples::<N, D, RUNS>(&group.magnitudes, &inverses, count, trials.levels - 1, &mut tuples);
    let mut found = [[0u16; RUNS]; MOST_TRIALS];
    let mut found_off = [0u8; MOST_TRIALS];
    let mut values = [[[0f32; 16]; MOST_TRIALS]; CHUNKS];
    for n in 0..count {
        let scale = 1.0 / inverses[n];
        for k in 0..RUNS {
            let (point, on) = place(steps, lattice, tuples[k][n].into(), scale, &targets[k], &weights[k]);
            found[n][k] = point;
            found_off[n] |= u8::from(!on) << k;
            for (value, &level) in values[k * D / 16][n][k * D % 16..][..D].iter_mut().zip(lattice.levels(point)) {
                *value = odd(level);
            }
        }
    }
    let sums_of_trials = steps.sums(&group.weights, &group.weighted, &values, count);
    let mut scale = start;
    let mut best = 0f32;
    let mut points = [0u16; 8];
    let mut off = if trials.refine == Refine::AllIfAny { 0xff } else { 0 };
    for n in 0..count {
        let (sum_qx, sum_q2) = (sums_of_trials[0][n], sums_of_trials[1][n]);
        if sum_q2 > 0.0 && sum_qx * sum_qx > best * sum_q2 {
            scale = sum_qx / sum_q2;
            best = scale * sum_qx;
            points[..RUNS].copy_from_slice(&found[n]);
            off = found_off[n];
        }
    }
    let off: [bool; 8] = std::array::from_fn(|k| off >> k & 1 == 1);
    let again = match trials.refine {
        Refine::Always => [true; 8],
        Refine::AllIfAny => [off[..RUNS].contains(&true); 8],
        Refine::OffLattice => off,
    };
    if scale > 0.0 && again[..RUNS].contains(&true) {
        let levels = nearest_levels(&group.magnitudes, 1.0 / scale, trials.levels - 1);
        for k in (0..RUNS).filter(|&k| again[k]) {
            let tuple = Lattice::<D>::tuple(&levels.as_chunks().0[k]);
            points[k] = place(steps, lattice, tuple, scale, &targets[k], &weights[k]).0;
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

/// The point for a tuple of levels, and whether they were that point. Targets and weights are spread over the levels.
#[inline(always)]
fn place<const D: usize>(
    chooser: impl Chooser,
    lattice: &Lattice<D>,
    tuple: usize,
    scale: f32,
    targets: &CostTable,
    weights: &CostTable,
) -> (u16, bool) {
    lattice.nearest_to_tuple(chooser, tuple, || {
        squared_errors(if D == 8 { &ODD_3 } else { &ODD_8 }, scale, targets, weights)
    })
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
            let q = odd(level);
            sum_qx += weighted[i] * q;
            sum_q2 += weights[i] * q * q;
        }
    }
    (sum_qx, sum_q2)
}

/// `scale / unit` as one of 16 steps `2 s + 1`, clamped (the block scale of all these types).
#[inline(always)]
pub(crate) fn scale_code(inverse_unit: f32, scale: f32, top: i32) -> u8 {
    nearest_int(0.5 * (inverse_unit * scale - 1.0)).clamp(0, top) as u8
}
