//! The lattice types: what costs most in them, choosing among neighbours and sorting and splitting weights, with
//! sixteen candidates side by side. The rest is the scalar text compiled for the instruction set.

use super::{Floats, Isa, LANES, Mask, Wide};
use crate::quant::grid::fit::{FitSteps, MOST_TRIALS, TrialValues};
use crate::quant::grid::{Chooser, CostTable, LOOKAHEAD, Lattice};
use crate::quant::types::iq1::{self, Best, DOWN, PrefixSums, SHIFTED, Split, Steps, UP};
use crate::quant::types::{iq2, iq3};

const _: () = assert!(LOOKAHEAD == LANES);

const LANE_NUMBERS: [f32; LANES] =
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];

impl<I: Isa> Chooser for Wide<I> {
    #[inline(always)]
    fn cheapest<const D: usize>(self, points: &[u16], count: usize, costs: &CostTable) -> usize {
        let Wide(isa) = self;
        if count == 1 {
            return 0;
        }
        if let (2..=8, Some(points)) = (count, points.first_chunk()) {
            return isa.cheapest_of_eight::<D>(points, count, costs);
        }
        let lanes = isa.load(&LANE_NUMBERS);
        let highest = isa.splat(f32::MAX);
        if count <= LANES
            && let Some(points) = points.first_chunk()
        {
            let valid = lanes.below(isa.splat(count as f32));
            let cost = I::Floats::select(valid, isa.costs::<D>(points, costs), highest).lesser(highest);
            return cost.equals(isa.splat(cost.lowest())).first().unwrap_or(0);
        }
        let mut best = highest;
        let mut position = lanes;
        for (n, points) in points.as_chunks::<LANES>().0[..count.div_ceil(LANES)].iter().enumerate() {
            let first = n * LANES;
            let cost = isa.costs::<D>(points, costs);
            let better = cost.below(best) & lanes.below(isa.splat((count - first) as f32));
            best = I::Floats::select(better, cost, best);
            position = I::Floats::select(better, lanes + isa.splat(first as f32), position);
        }
        // Each lane holds its first cheapest point; the first of all is the lowest position among the cheapest lanes.
        let cheapest = best.equals(isa.splat(best.lowest()));
        I::Floats::select(cheapest, position, highest).lowest() as usize
    }
}

impl<I: Isa> FitSteps for Wide<I> {
    #[inline(always)]
    fn tuples<const N: usize, const D: usize, const RUNS: usize>(
        self,
        magnitudes: &[f32; N],
        inverses: &[f32; MOST_TRIALS],
        count: usize,
        top: i32,
        tuples: &mut [[u16; MOST_TRIALS]; RUNS],
    ) {
        /// Whole numbers added to this stand in the low bits.
        const WHOLE: f32 = 8_388_608.0;
        let Wide(isa) = self;
        let (zero, half, one, top) = (isa.splat(0.0), isa.splat(0.5), isa.splat(1.0), isa.splat(top as f32));
        for (batch, inverses) in inverses.as_chunks::<LANES>().0[..count.div_ceil(LANES)].iter().enumerate() {
            let inverses = isa.load(inverses);
            for (tuples, run) in tuples.iter_mut().zip(magnitudes.as_chunks::<D>().0) {
                let mut tuple = isa.splat(WHOLE);
                for (i, &x) in run.iter().enumerate() {
                    let level = (half * (inverses * isa.splat(x) - one)).nearest_any().greater(zero).lesser(top);
                    tuple = tuple + level * isa.splat(Lattice::<D>::LEVELS.pow(i as u32) as f32);
                }
                let tuple = tuple.to_array();
                for (out, tuple) in tuples[batch * LANES..][..LANES].iter_mut().zip(tuple) {
                    *out = tuple.to_bits() as u16;
                }
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
        let Wide(isa) = self;
        let mut sums = [[0.0; MOST_TRIALS]; 2];
        for first in (0..count).step_by(LANES) {
            let (mut sum_qx, mut sum_q2) = (isa.splat(0.0), isa.splat(0.0));
            let chunks = weights.as_chunks::<LANES>().0.iter().zip(weighted.as_chunks::<LANES>().0);
            for ((weights, weighted), values) in chunks.zip(values) {
                let mut rows = [&values[0]; LANES];
                for (lane, row) in rows.iter_mut().enumerate() {
                    *row = &values[first + lane];
                }
                let q = isa.transpose(rows);
                for i in 0..LANES {
                    sum_qx = sum_qx + isa.splat(weighted[i]) * q[i];
                    sum_q2 = sum_q2 + isa.splat(weights[i]) * q[i] * q[i];
                }
            }
            sums[0][first..][..LANES].copy_from_slice(&sum_qx.to_array());
            sums[1][first..][..LANES].copy_from_slice(&sum_q2.to_array());
        }
        sums
    }
}

impl<I: Isa> Steps for Wide<I> {
    /// The rank of a value is the number of values that are smaller, or equal and before it.
    #[inline(always)]
    fn ascending<const N: usize>(self, values: &[f32; N]) -> [u8; N] {
        let Wide(isa) = self;
        let (zero, one) = (isa.splat(0.0), isa.splat(1.0));
        let lanes = isa.load(&LANE_NUMBERS);
        let mut order = [0; N];
        for (chunk, sixteen) in values.as_chunks::<LANES>().0.iter().enumerate() {
            let own = isa.load(sixteen);
            let mut ranks = zero;
            let first = chunk * LANES;
            for (j, &value) in values.iter().enumerate() {
                let other = isa.splat(value);
                let before = if j < first {
                    other.below(own) | other.equals(own)
                } else if j < first + LANES {
                    other.below(own) | (other.equals(own) & lanes.above(isa.splat((j - first) as f32)))
                } else {
                    other.below(own)
                };
                ranks = I::Floats::select(before, ranks + one, ranks);
            }
            for (lane, rank) in ranks.to_array().into_iter().enumerate() {
                // At most N, but equal ranks of values that are not numbers must not lead outside.
                order[(rank as usize).min(N - 1)] = (chunk * LANES + lane) as u8;
            }
        }
        order
    }

    #[inline(always)]
    fn best_split_s(self, sums: &PrefixSums) -> Option<Split> {
        let Wide(isa) = self;
        let zero = isa.splat(0.0);
        let (all_x, all_w) = (isa.splat(sums.x[32]), isa.splat(sums.w[32]));
        let mut best = Best::NONE;
        for low in 0..=32 {
            let (below_x, below_w) = (isa.splat(sums.x[low]), isa.splat(sums.w[low]));
            let mut first = low;
            while first <= 32 {
                let (Some(sum_x), Some(sum_w)) = (sums.x[first..].first_chunk(), sums.w[first..].first_chunk()) else {
                    break;
                };
                let (sum_x, sum_w) = (isa.load(sum_x), isa.load(sum_w));
                let mut candidates = [[zero; 2]; 2];
                let mut better = [0; 2];
                let valid = u16::MAX >> (LANES - LANES.min(33 - first));
                for shift in [UP, DOWN] {
                    let [v0, v1, v2] = SHIFTED[shift];
                    let (v1, v2) = (isa.splat(v1), isa.splat(v2));
                    let low_qx = isa.splat(sums.x[low] * v0);
                    let low_q2 = isa.splat(sums.w[low] * v0 * v0);
                    let sum_qx = low_qx + (sum_x - below_x) * v1 + (all_x - sum_x) * v2;
                    let sum_q2 = low_q2 + (sum_w - below_w) * v1 * v1 + (all_w - sum_w) * v2 * v2;
                    candidates[shift] = [sum_qx, sum_q2];
                    let above = sum_q2.above(zero) & (sum_qx * sum_qx).above(isa.splat(best.score) * sum_q2);
                    better[shift] = above.bits() & valid;
                }
                // Few candidates are better than all before. The order decides among them, so they go one by one.
                let mut pending = better[UP] | better[DOWN];
                if pending != 0 {
                    let sums = candidates.map(|[sum_qx, sum_q2]| [sum_qx.to_array(), sum_q2.to_array()]);
                    while pending != 0 {
                        let lane = pending.trailing_zeros() as usize;
                        pending &= pending - 1;
                        for shift in [UP, DOWN] {
                            if better[shift] >> lane & 1 == 0 {
                                continue;
                            }
                            let before = best.score;
                            best.offer(low, first + lane, shift, sums[shift][0][lane], sums[shift][1][lane]);
                            if best.score < before {
                                // By rounding. Now those that were no better than the score before may be, too.
                                better = [valid; 2];
                                pending = valid & (u16::MAX << lane << 1);
                            }
                        }
                    }
                }
                first += LANES;
            }
        }
        best.split
    }
}

macro_rules! encoders {
    ($($name:ident: $encode:path;)*) => {$(
        /// The encoder of the name.
        #[inline(always)]
        pub(crate) fn $name<I: Isa>(isa: I, src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]) {
            $encode(Wide(isa), src, row_len, importance, dst);
        }
    )*};
}

encoders! {
    iq1_s: iq1::quantize_iq1_s_with;
    iq1_m: iq1::quantize_iq1_m_with;
    iq2_xxs: iq2::quantize_iq2_xxs_with;
    iq2_xs: iq2::quantize_iq2_xs_with;
    iq2_s: iq2::quantize_iq2_s_with;
    iq3_xxs: iq3::quantize_iq3_xxs_with;
    iq3_s: iq3::quantize_iq3_s_with;
}
