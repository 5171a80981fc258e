//! The best point and signs for eight weights.

use super::points::{Costs, Lookup, Portable};
use super::{LatticeLayout, Metric};
#[cfg(target_arch = "x86_64")]
use crate::cpu::{Avx2, Avx512};

/// Points of eight dimensions that are compared with all of M.
const SHORTLIST: usize = 12;

/// Points of each half of eight weights whose pairs are compared with all of M.
const HALF_SHORTLIST: usize = 4;

impl LatticeLayout {
    /// The point and signs that lose least for target `t`, compiled for wide vectors where there are some.
    /// `costs` is room for the search.
    pub(super) fn nearest(&self, t: &[f32; 8], metric: &Metric, scale: f32, costs: &mut Costs) -> Nearest {
        #[cfg(target_arch = "x86_64")]
        {
            macro_rules! compiled_for {
                ($isa:ident, $feature:literal) => {
                    if let Some(isa) = $isa::new() {
                        #[target_feature(enable = $feature)]
                        fn nearest(
                            isa: $isa,
                            layout: &LatticeLayout,
                            t: &[f32; 8],
                            metric: &Metric,
                            scale: f32,
                            costs: &mut Costs,
                        ) -> Nearest {
                            layout.find_nearest(isa, t, metric, scale, costs)
                        }
                        // SAFETY: the value proves that the CPU has the feature.
                        return unsafe { nearest(isa, self, t, metric, scale, costs) };
                    }
                };
            }
            compiled_for!(Avx512, "avx512f");
            compiled_for!(Avx2, "avx2");
        }
        self.find_nearest(Portable, t, metric, scale, costs)
    }

    #[inline(always)]
    fn find_nearest<L: Lookup>(
        &self,
        lookup: L,
        t: &[f32; 8],
        metric: &Metric,
        scale: f32,
        costs: &mut Costs,
    ) -> Nearest {
        if metric.diagonal_only && !self.shape.even_signs {
            // The list is in the right order then.
            self.find_nearest_of::<1, 1, L>(lookup, t, metric, scale, costs)
        } else {
            self.find_nearest_of::<SHORTLIST, HALF_SHORTLIST, L>(lookup, t, metric, scale, costs)
        }
    }

    /// Compares the `K` nearest points of eight dimensions, or all pairs of the `H` nearest of four.
    #[inline(always)]
    fn find_nearest_of<const K: usize, const H: usize, L: Lookup>(
        &self,
        lookup: L,
        t: &[f32; 8],
        metric: &Metric,
        scale: f32,
        costs: &mut Costs,
    ) -> Nearest {
        let mut nearest = Nearest { best: f32::INFINITY, octet: Octet::default(), values: [0.0; 8] };
        let (mut linear, mut square, mut signs) = ([0.0; 8], [0.0; 8], 0u8);
        for i in 0..8 {
            linear[i] = -2.0 * scale * metric.diagonal[i] * t[i].abs();
            square[i] = scale * scale * metric.diagonal[i];
            signs |= u8::from(t[i] < 0.0) << i;
        }
        let odd = signs.count_ones() % 2 == 1;
        let turns = if !self.shape.even_signs {
            Turns::Free
        } else if odd {
            Turns::One
        } else {
            Turns::None
        };
        if self.points.dims == 8 {
            let (list, count) = self.points.shortlist::<K, L>(lookup, &linear, &square, costs);
            for &point in &list[..count] {
                let candidate = self.candidate::<0, 8>(point, signs, t, metric, scale);
                nearest.consider(lookup, [point, 0], signs, &candidate, metric, turns);
            }
        } else {
            let (list, count) = self.points.shortlist::<H, L>(lookup, &linear[..4], &square[..4], costs);
            let (second, second_count) = self.points.shortlist::<H, L>(lookup, &linear[4..], &square[4..], costs);
            let mut halves = [Candidate::ZERO; H];
            for (half, &point) in halves.iter_mut().zip(&second[..second_count]) {
                *half = self.candidate::<4, 4>(point, signs, t, metric, scale);
            }
            for &first in &list[..count] {
                let half = self.candidate::<0, 4>(first, signs, t, metric, scale);
                for (other, &second) in halves.iter().zip(&second[..second_count]) {
                    nearest.consider(lookup, [first, second], signs, &half.plus(other), metric, turns);
                }
            }
        }
        nearest
    }

    /// A point as the weights `FIRST..FIRST + DIMS`, the other weights being left out.
    #[inline(always)]
    fn candidate<const FIRST: usize, const DIMS: usize>(
        &self,
        point: u16,
        signs: u8,
        t: &[f32; 8],
        metric: &Metric,
        scale: f32,
    ) -> Candidate {
        let mut candidate = Candidate::ZERO;
        let row = self.points.row(point);
        for i in FIRST..FIRST + DIMS {
            let magnitude = scale * f32::from(row[i - FIRST]);
            let value = if signs >> i & 1 == 1 { -magnitude } else { magnitude };
            let difference = t[i] - value;
            (candidate.values[i], candidate.difference[i]) = (value, difference);
            for (pull, m) in candidate.pull.iter_mut().zip(&metric.matrix[i]) {
                *pull += difference * m;
            }
        }
        candidate
    }
}

/// Whether signs may deviate from those of the target.
#[derive(Clone, Copy, PartialEq)]
enum Turns {
    None,
    /// One has to.
    One,
    /// One may.
    Free,
}

/// A point in units of weights, with `difference = t - values` and `pull = M difference`.
#[derive(Clone, Copy)]
struct Candidate {
    values: [f32; 8],
    difference: [f32; 8],
    pull: [f32; 8],
}

impl Candidate {
    const ZERO: Candidate = Candidate { values: [0.0; 8], difference: [0.0; 8], pull: [0.0; 8] };

    /// Two halves of eight weights together.
    #[inline(always)]
    fn plus(&self, other: &Candidate) -> Candidate {
        let mut sum = *self;
        for i in 0..8 {
            sum.values[i] += other.values[i];
            sum.difference[i] += other.difference[i];
            sum.pull[i] += other.pull[i];
        }
        sum
    }
}

impl Nearest {
    /// Compares a point, with the signs of the target or one of them turned, with the best so far.
    #[inline(always)]
    fn consider<L: Lookup>(
        &mut self,
        lookup: L,
        points: [u16; 2],
        signs: u8,
        candidate: &Candidate,
        metric: &Metric,
        turns: Turns,
    ) {
        let Candidate { values, difference, pull } = candidate;
        let loss = lookup.dot(difference, pull);
        let (mut best, mut turn) = if turns == Turns::One { (f32::INFINITY, Some(0)) } else { (loss, None) };
        if turns != Turns::None {
            // Turning sign i adds 2 values[i] to the difference.
            let (turned, place) = lookup.least_turn(loss, values, pull, &metric.diagonal);
            if turned < best {
                (best, turn) = (turned, Some(place));
            }
        }
        if best < self.best {
            self.best = best;
            self.values = *values;
            self.octet = Octet { points, signs };
            if let Some(i) = turn {
                self.values[i] = -self.values[i];
                self.octet.signs ^= 1 << i;
            }
        }
    }
}

/// What eight weights store.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Octet {
    pub points: [u16; 2],
    pub signs: u8,
}

/// A search among points.
pub(super) struct Nearest {
    pub best: f32,
    pub octet: Octet,
    pub values: [f32; 8],
}
