//! IQ1_S and IQ1_M: eight weights as one of 2048 points with coordinates -1, 0 and 1, all shifted by +-1/8.
//!
//! Blocks of 256 weights; `d` is a binary16. A weight is `d * (2 s + 1) * (coordinate + shift)` with a 3-bit `s`.
//!
//! | type  | bytes                                                                                           |
//! |-------|-------------------------------------------------------------------------------------------------|
//! | IQ1_S | `d`, 32 low bytes of points, per 32 weights a u16: four times 3 high bits, `s`, bit 15 set for shift -1/8 |
//! | IQ1_M | 32 low bytes of points, 16 bytes with two times 3 high bits and the shift bit, 4 u16 with four `s` (16 weights each) and 4 bits of `d` on top |

use super::runs::ShiftedRun;
use super::superblock::{error_weights_or, lattice_encoder};
use super::{decode_blocks, get_f16, largest_magnitude, put_f16, sum_of_squares};
use crate::quant::float16::{f16_to_f32, f32_to_f16};
use crate::quant::grid::fit::scale_code;
use crate::quant::grid::{self, Chooser, InOrder, Lattice, repeat, spread, squared_errors};

const BLOCK: usize = 256;
/// Highest scale code.
const TOP: i32 = 7;
/// `IQ1S_DELTA`, `IQ1M_DELTA`.
pub(in crate::quant) const DELTA: f32 = 0.125;
/// The values of levels 0, 1, 2 when shifted up and when shifted down.
pub(in crate::quant) const SHIFTED: [[f32; 3]; 2] =
    [[-1.0 + DELTA, DELTA, 1.0 + DELTA], [-1.0 - DELTA, -DELTA, 1.0 - DELTA]];
pub(in crate::quant) const UP: usize = 0;
pub(in crate::quant) const DOWN: usize = 1;

/// A split of the sorted weights of a group: the first `low` get level 0, the last ones from `high` on level 2.
#[derive(Clone, Copy)]
pub(in crate::quant) struct Split {
    pub low: usize,
    pub high: usize,
    /// Which of the type's combinations of shifts.
    pub shifts: usize,
    pub scale: f32,
}

/// Steps of the encoders that an instruction set may do in another way, with the same outcome.
pub(in crate::quant) trait Steps: Chooser {
    /// Positions of the values in ascending order; equal values keep their order.
    #[inline(always)]
    fn ascending<const N: usize>(self, values: &[f32; N]) -> [u8; N] {
        ascending(values)
    }

    /// Tries all splits of 32 sorted weights with the shift up and the shift down.
    #[inline(always)]
    fn best_split_s(self, sums: &PrefixSums) -> Option<Split> {
        best_split_s(sums)
    }
}

impl Steps for InOrder {}

/// Room behind the sums of 32 weights, for vectors that reach beyond them.
pub(in crate::quant) const SUMS: usize = 33 + 15;

/// Sums over the first `n` weights of a group in ascending order, for `n` in `0..=32`.
pub(in crate::quant) struct PrefixSums {
    /// Of `w x`.
    pub x: [f32; SUMS],
    /// Of `w`.
    pub w: [f32; SUMS],
}

impl PrefixSums {
    #[inline(always)]
    fn new(x: &[f32; 32], weights: &[f32; 32], order: &[u8; 32]) -> Self {
        let mut sums = PrefixSums { x: [0.0; SUMS], w: [0.0; SUMS] };
        for (j, &i) in order.iter().enumerate() {
            sums.x[j + 1] = sums.x[j] + weights[i as usize] * x[i as usize];
            sums.w[j + 1] = sums.w[j] + weights[i as usize];
        }
        sums
    }
}

/// Positions of the values in ascending order; equal values keep their order (`qsort` of glibc is a merge sort).
#[inline(always)]
fn ascending<const N: usize>(values: &[f32; N]) -> [u8; N] {
    let mut order: [u8; N] = std::array::from_fn(|i| i as u8);
    for end in 1..N {
        let moved = order[end];
        let mut at = end;
        while at > 0 && values[order[at - 1] as usize] > values[moved as usize] {
            order[at] = order[at - 1];
            at -= 1;
        }
        order[at] = moved;
    }
    order
}

/// Keeps the candidate with the greatest `(sum w x q)^2 / (sum w q^2)`, the first of equals.
pub(in crate::quant) struct Best {
    pub score: f32,
    pub split: Option<Split>,
}

impl Best {
    pub(crate) const NONE: Best = Best { score: -f32::MAX, split: None };

    #[inline(always)]
    pub(crate) fn offer(&mut self, low: usize, high: usize, shifts: usize, sum_qx: f32, sum_q2: f32) {
        if sum_q2 > 0.0 && sum_qx * sum_qx > self.score * sum_q2 {
            let scale = sum_qx / sum_q2;
            self.score = scale * sum_qx;
            self.split = Some(Split { low, high, shifts, scale });
        }
    }
}

/// The levels that a split gives.
#[inline(always)]
fn split_levels<const N: usize>(order: &[u8; N], split: &Split) -> [u8; N] {
    let mut levels = [1u8; N];
    for &i in &order[..split.low] {
        levels[i as usize] = 0;
    }
    for &i in &order[split.high..] {
        levels[i as usize] = 2;
    }
    levels
}

/// Puts the levels of a group onto the lattice. `values(k)` are the values of the levels in run `k` of eight.
/// Returns the points and the scale, which is solved for again if anything had to move.
#[inline(always)]
fn onto_lattice<const N: usize>(
    steps: impl Steps,
    lattice: &Lattice<8>,
    x: &[f32; N],
    weights: &[f32; N],
    levels: &[u8; N],
    scale: f32,
    values: impl Fn(usize) -> &'static [f32; 3],
) -> ([u16; 4], f32) {
    let (x, weights) = (x.as_chunks::<8>().0, weights.as_chunks::<8>().0);
    let mut points = [0u16; 4];
    let mut moved = false;
    for (k, levels) in levels.as_chunks::<8>().0.iter().enumerate() {
        let (point, on) = lattice.nearest(steps, levels, || {
            squared_errors(&repeat::<8, 3>(values(k)), scale, &spread::<8>(&x[k]), &spread::<8>(&weights[k]))
        });
        points[k] = point;
        moved |= !on;
    }
    if moved {
        let (mut sum_qx, mut sum_q2) = (0f32, 0f32);
        for k in 0..N / 8 {
            for (i, &level) in lattice.levels(points[k]).iter().enumerate() {
                let q = values(k)[level as usize];
                sum_qx += weights[k][i] * q * x[k][i];
                sum_q2 += weights[k][i] * q * q;
            }
        }
        if sum_qx > 0.0 && sum_q2 > 0.0 {
            return (points, sum_qx / sum_q2);
        }
    }
    (points, scale)
}

#[inline(always)]
fn best_split_s(sums: &PrefixSums) -> Option<Split> {
    let PrefixSums { x: sum_x, w: sum_w } = sums;
    let mut best = Best::NONE;
    for low in 0..=32 {
        // The sums of all candidates first, so that they can be computed side by side.
        let mut candidates = [[[0f32; 33]; 2]; 2];
        for shift in [UP, DOWN] {
            let [v0, v1, v2] = SHIFTED[shift];
            let [sums_qx, sums_q2] = &mut candidates[shift];
            let (low_qx, low_q2) = (sum_x[low] * v0, sum_w[low] * v0 * v0);
            for high in low..=32 {
                sums_qx[high] = low_qx + (sum_x[high] - sum_x[low]) * v1 + (sum_x[32] - sum_x[high]) * v2;
                sums_q2[high] = low_q2 + (sum_w[high] - sum_w[low]) * v1 * v1 + (sum_w[32] - sum_w[high]) * v2 * v2;
            }
        }
        for high in low..=32 {
            for (shift, [sums_qx, sums_q2]) in candidates.iter().enumerate() {
                best.offer(low, high, shift, sums_qx[high], sums_q2[high]);
            }
        }
    }
    best.split
}

lattice_encoder! {
    /// Encodes IQ1_S. ggml has no rule for weights of equal importance and aborts; here `None` means equal.
    quantize_iq1_s, quantize_iq1_s_with: Steps, encode_s
}

#[inline(always)]
fn encode_s(steps: impl Steps, x: &[f32; BLOCK], importance: Option<&[f32; BLOCK]>, out: &mut [u8; 50]) {
    let lattice = grid::iq1();
    let variance = 2.0 * sum_of_squares(x) / BLOCK as f32;
    let mut scales = [0f32; 8];
    let mut words = [0u16; 8];
    let mut max_scale = 0f32;
    out.fill(0);
    for (ib, values) in x.as_chunks::<32>().0.iter().enumerate() {
        if largest_magnitude(values) < 1e-12 {
            continue;
        }
        let importance = importance.map(|w| &w.as_chunks::<32>().0[ib]);
        let weights = error_weights_or(values, importance, variance, |x| (variance + x * x).sqrt());
        let order = steps.ascending(values);
        let Some(mut split) = steps.best_split_s(&PrefixSums::new(values, &weights, &order)) else { continue };
        let mut levels = split_levels(&order, &split);
        if split.scale < 0.0 {
            levels = levels.map(|l| 2 - l);
            split.scale = -split.scale;
            split.shifts = 1 - split.shifts;
        }
        let (points, scale) =
            onto_lattice(steps, lattice, values, &weights, &levels, split.scale, |_| &SHIFTED[split.shifts]);
        for (k, &point) in points.iter().enumerate() {
            out[2 + 4 * ib + k] = point as u8;
            words[ib] |= (point >> 8) << (3 * k);
        }
        words[ib] |= (split.shifts as u16) << 15;
        scales[ib] = scale;
        max_scale = if max_scale > scale { max_scale } else { scale };
    }
    let inverse = if max_scale == 0.0 {
        // ggml leaves the points in place but writes neither scales nor shifts.
        words = words.map(|w| w & 0x0fff);
        None
    } else {
        let d = max_scale / 15.0;
        // The factor makes up for what rounding the group scales loses on average.
        put_f16(out, 0, d * 1.125);
        Some(1.0 / d)
    };
    for (ib, bytes) in out[34..].as_chunks_mut::<2>().0.iter_mut().enumerate() {
        let code = inverse.map_or(0, |inverse| u16::from(scale_code(inverse, scales[ib], TOP)));
        *bytes = (words[ib] | code << 12).to_le_bytes();
    }
}

/// Decodes IQ1_S.
#[inline(always)]
pub(crate) fn dequantize_iq1_s(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &[u8; 50], out: &mut [f32; BLOCK]| {
        runs_s(block, |n, run| run.store(&mut out.as_chunks_mut::<16>().0[n]));
    });
}

/// Takes a block of IQ1_S apart.
#[inline(always)]
pub(crate) fn runs_s(block: &[u8; 50], mut emit: impl FnMut(usize, ShiftedRun)) {
    let d = get_f16(block, 0);
    for n in 0..16 {
        let word = u16::from_le_bytes([block[34 + n / 2 * 2], block[35 + n / 2 * 2]]);
        let high = usize::from(word >> (6 * (n % 2)));
        let [first, second] = [usize::from(block[2 + 2 * n]), usize::from(block[3 + 2 * n])];
        emit(
            n,
            ShiftedRun {
                scale: d * f32::from(2 * (word >> 12 & 7) + 1),
                values: [first | (high & 7) << 8, second | (high >> 3 & 7) << 8].map(|point| grid::IQ1_POINTS[point]),
                shifts: [if word & 0x8000 != 0 { -DELTA } else { DELTA }; 2],
            },
        );
    }
}

/// Combinations of shifts of the two runs of 8 in a group of IQ1_M: bit 1 for the first, bit 0 for the second;
/// a set bit shifts down.
#[inline(always)]
fn run_values(shifts: usize, k: usize) -> &'static [f32; 3] {
    &SHIFTED[shifts >> (1 - k) & 1]
}

/// What one weight adds to the sums of the four combinations: lanes 0 to 3 are `w q x`, 4 to 7 `w q^2`.
type Terms = [f32; 8];

#[inline(always)]
fn add(sums: &Terms, terms: &Terms) -> Terms {
    std::array::from_fn(|lane| sums[lane] + terms[lane])
}

/// Tries all splits of 16 sorted weights with four combinations of shifts. Every candidate is summed in sorted
/// order from zero; what candidates have in common at their front is summed once.
#[inline(always)]
fn best_split_m(x: &[f32; 16], weights: &[f32; 16], order: &[u8; 16]) -> Option<Split> {
    let terms: [[Terms; 3]; 16] = order.map(|i| {
        let (i, run) = (i as usize, i as usize / 8);
        std::array::from_fn(|level| {
            std::array::from_fn(|lane| {
                let q = run_values(lane % 4, run)[level];
                weights[i] * q * if lane < 4 { x[i] } else { q }
            })
        })
    });
    let mut best = Best::NONE;
    let mut below = [0f32; 8];
    for low in 0..=16 {
        let mut middle = below;
        for high in low..=16 {
            let sums = terms[high..].iter().fold(middle, |sums, terms| add(&sums, &terms[2]));
            for shifts in 0..4 {
                best.offer(low, high, shifts, sums[shifts], sums[4 + shifts]);
            }
            if high < 16 {
                middle = add(&middle, &terms[high][1]);
            }
        }
        if low < 16 {
            below = add(&below, &terms[low][0]);
        }
    }
    best.split
}

lattice_encoder! {
    /// Encodes IQ1_M.
    quantize_iq1_m, quantize_iq1_m_with: Steps, encode_m
}

#[inline(always)]
fn encode_m(steps: impl Steps, x: &[f32; BLOCK], importance: Option<&[f32; BLOCK]>, out: &mut [u8; 56]) {
    let lattice = grid::iq1();
    let variance = 2.0 * sum_of_squares(x) / BLOCK as f32;
    let all_weights = error_weights_or(x, importance, variance, |x| x * x);
    let (groups, weights) = (x.as_chunks::<16>().0, all_weights.as_chunks::<16>().0);
    let mut points = [[0u16; 2]; 16];
    let mut shifts = [0usize; 16];
    let mut scales = [0f32; 16];
    let mut max_scale = 0f32;
    for ib in 0..16 {
        if largest_magnitude(&groups[ib]) < 1e-7 {
            continue;
        }
        let order = steps.ascending(&groups[ib]);
        let Some(mut split) = best_split_m(&groups[ib], &weights[ib], &order) else { continue };
        let mut levels = split_levels(&order, &split);
        if split.scale < 0.0 {
            levels = levels.map(|l| 2 - l);
            split.scale = -split.scale;
            split.shifts = 3 - split.shifts;
        }
        let (found, scale) = onto_lattice(steps, lattice, &groups[ib], &weights[ib], &levels, split.scale, |k| {
            run_values(split.shifts, k)
        });
        points[ib] = [found[0], found[1]];
        shifts[ib] = split.shifts;
        scales[ib] = scale;
        max_scale = if max_scale > scale { max_scale } else { scale };
    }
    out.fill(0);
    for ib in 0..16 {
        let [first, second] = points[ib];
        out[2 * ib] = first as u8;
        out[2 * ib + 1] = second as u8;
        out[32 + ib] = ((first >> 8) | (second >> 8) << 4) as u8;
    }
    if max_scale == 0.0 {
        return;
    }
    let mut d = max_scale / 15.0;
    let inverse = 1.0 / d;
    let mut words = [0u16; 4];
    // With all codes fixed, the block's scale is solved for once more.
    let (mut sum_qx, mut sum_q2) = (0f32, 0f32);
    for ib in 0..16 {
        let code = scale_code(inverse, scales[ib], TOP);
        words[ib / 4] |= u16::from(code) << (3 * (ib % 4));
        out[32 + ib] |= [0x00, 0x80, 0x08, 0x88][shifts[ib]];
        for k in 0..2 {
            for (i, &level) in lattice.levels(points[ib][k]).iter().enumerate() {
                let q = run_values(shifts[ib], k)[level as usize] * f32::from(2 * code + 1);
                let weight = weights[ib][8 * k + i];
                sum_qx += weight * q * groups[ib][8 * k + i];
                sum_q2 += weight * q * q;
            }
        }
    }
    if sum_q2 > 0.0 {
        d = sum_qx / sum_q2;
    }
    // The factor makes up for what the lattice loses on average.
    let half = f32_to_f16(d * 1.1125);
    for (i, bytes) in out[48..].as_chunks_mut::<2>().0.iter_mut().enumerate() {
        *bytes = (words[i] | (half >> (4 * i) & 15) << 12).to_le_bytes();
    }
}

/// Decodes IQ1_M.
#[inline(always)]
pub(crate) fn dequantize_iq1_m(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &[u8; 56], out: &mut [f32; BLOCK]| {
        runs_m(block, |n, run| run.store(&mut out.as_chunks_mut::<16>().0[n]));
    });
}

/// Takes a block of IQ1_M apart.
#[inline(always)]
pub(crate) fn runs_m(block: &[u8; 56], mut emit: impl FnMut(usize, ShiftedRun)) {
    let words: [u16; 4] = std::array::from_fn(|i| u16::from_le_bytes([block[48 + 2 * i], block[49 + 2 * i]]));
    let half = words.iter().rev().fold(0u16, |half, word| half << 4 | word >> 12);
    let d = f16_to_f32(half);
    for n in 0..16 {
        let high = block[32 + n];
        let point = |k: usize| usize::from(block[2 * n + k]) | usize::from(high >> (4 * k) & 7) << 8;
        let shift = |k: usize| f32::from_bits(DELTA.to_bits() | u32::from(high >> (4 * k + 3) & 1) << 31);
        emit(
            n,
            ShiftedRun {
                scale: d * f32::from(2 * (words[n / 4] >> (3 * (n % 4)) & 7) + 1),
                values: [grid::IQ1_POINTS[point(0)], grid::IQ1_POINTS[point(1)]],
                shifts: [shift(0), shift(1)],
            },
        );
    }
}
