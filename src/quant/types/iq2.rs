//! IQ2_XXS, IQ2_XS and IQ2_S: eight weights as one point of an 8-dimensional lattice, with signs beside it.
//!
//! Blocks of 256 weights; `d` is a binary16. A group of 16 weights (32 for IQ2_XXS) has a scale
//! `d * (2 s + 1) / 8` with a 4-bit `s`, and a lattice point gives each weight one of the magnitudes 8, 25 and 43,
//! which the encoder treats as 8 times the levels 1, 3 and 5.
//!
//! | type    | bytes                                                                                   |
//! |---------|-----------------------------------------------------------------------------------------|
//! | IQ2_XXS | `d`, then per 32 weights four 8-bit points and a u32: four 7-bit sign codes, `s` on top   |
//! | IQ2_XS  | `d`, 32 u16 (9-bit point, 7-bit sign code), 8 bytes with the `s` of two groups each       |
//! | IQ2_S   | `d`, 32 low bytes of points, 32 sign bytes, 8 bytes with two high bits of four points each, 8 bytes of `s` |

use super::runs::SignedRun;
use super::superblock::{error_weights_or, lattice_encoder};
use super::{decode_blocks, get_f16, put_f16, sum_of_squares};
use crate::quant::grid::fit::{FitSteps, Group, Refine, Signs, Trials, fit, scale_code};
use crate::quant::grid::{self, even_signs};
use crate::quant::search::fit_positive;

const BLOCK: usize = 256;
/// Highest level plus one.
const LEVELS: i32 = 3;
/// Highest scale code.
const TOP: i32 = 15;

lattice_encoder! {
    /// Encodes IQ2_XXS. ggml has no rule for weights of equal importance and aborts; here `None` means equal.
    quantize_iq2_xxs, quantize_iq2_xxs_with: FitSteps, encode_xxs
}

#[inline(always)]
fn encode_xxs(steps: impl FitSteps, x: &[f32; BLOCK], importance: Option<&[f32; BLOCK]>, out: &mut [u8; 66]) {
    const TRIALS: Trials = Trials { tries: 6, step: 0.1, levels: LEVELS, refine: Refine::Always };
    let lattice = grid::iq2_xxs();
    let variance = sum_of_squares(x) / BLOCK as f32;
    let (groups, _) = x.as_chunks::<32>();
    let mut scales = [0f32; 8];
    let mut words = [[0u32; 2]; 8];
    let mut max_scale = 0f32;
    for (ib, values) in groups.iter().enumerate() {
        let importance = importance.map(|w| &w.as_chunks::<32>().0[ib]);
        let weights = error_weights_or(values, importance, variance, |x| (variance + x * x).sqrt());
        let mut group = Group::new(values, weights, Signs::Even);
        if group.max() < 1e-15 {
            continue;
        }
        // The first guess is the best scale of levels 0 to 4 without a lattice.
        let start = fit_positive(&group.magnitudes, &group.weights, LEVELS + 1).scale;
        let reach = start * LEVELS as f32;
        if reach <= 0.0 {
            continue;
        }
        let found = fit::<32, 8, 4, 2>(steps, lattice, &mut group, reach, start, &TRIALS);
        for k in 0..4 {
            words[ib][0] |= u32::from(found.points[k]) << (8 * k);
            words[ib][1] |= u32::from(group.signs[k] & 127) << (7 * k);
        }
        scales[ib] = found.scale;
        max_scale = if max_scale > found.scale { max_scale } else { found.scale };
    }
    out.fill(0);
    if max_scale == 0.0 {
        return;
    }
    let d = max_scale / 31.0;
    let inverse = 1.0 / d;
    let (head, body) = out.split_at_mut(2);
    put_f16(head, 0, d);
    for (ib, bytes) in body.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let [points, signs] = words[ib];
        let signs = signs | u32::from(scale_code(inverse, scales[ib], TOP)) << 28;
        bytes[..4].copy_from_slice(&points.to_le_bytes());
        bytes[4..].copy_from_slice(&signs.to_le_bytes());
    }
}

/// Decodes IQ2_XXS.
#[inline(always)]
pub(crate) fn dequantize_iq2_xxs(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &[u8; 66], out: &mut [f32; BLOCK]| {
        runs_xxs(block, |n, run| run.store(&mut out.as_chunks_mut::<16>().0[n]));
    });
}

/// Takes a block of IQ2_XXS apart.
#[inline(always)]
pub(crate) fn runs_xxs(block: &[u8; 66], mut emit: impl FnMut(usize, SignedRun)) {
    let d = get_f16(block, 0);
    for (ib, bytes) in block[2..].as_chunks::<8>().0.iter().enumerate() {
        let word = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
        let scale = d * (0.5 + (word >> 28) as f32) * 0.25;
        for half in 0..2 {
            let codes = word >> (14 * half);
            emit(
                2 * ib + half,
                SignedRun {
                    scale,
                    magnitudes: [bytes[2 * half], bytes[2 * half + 1]]
                        .map(|point| grid::IQ2_XXS_POINTS[point as usize]),
                    signs: u16::from_le_bytes([even_signs(codes as u8), even_signs((codes >> 7) as u8)]),
                },
            );
        }
    }
}

/// The two types with groups of 16 differ in lattice, constants and layout only.
struct Pairs {
    groups: [[u16; 2]; 16],
    signs: [[u8; 2]; 16],
    scales: [f32; 16],
    max_scale: f32,
}

impl Pairs {
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn fit(
        steps: impl FitSteps,
        x: &[f32; BLOCK],
        importance: Option<&[f32; BLOCK]>,
        lattice: &grid::Lattice<8>,
        rule: Signs,
        smallest: f32,
        variance: f32,
        otherwise: impl Fn(f32) -> f32 + Copy,
    ) -> Pairs {
        const TRIALS: Trials = Trials { tries: 9, step: 0.1, levels: LEVELS, refine: Refine::OffLattice };
        let mut pairs = Pairs { groups: [[0; 2]; 16], signs: [[0; 2]; 16], scales: [0.0; 16], max_scale: 0.0 };
        for (ib, values) in x.as_chunks::<16>().0.iter().enumerate() {
            let importance = importance.map(|w| &w.as_chunks::<16>().0[ib]);
            let mut group = Group::new(values, error_weights_or(values, importance, variance, otherwise), rule);
            let max = group.max();
            if max < smallest {
                continue;
            }
            let found = fit::<16, 8, 2, 1>(steps, lattice, &mut group, max, max / (2 * LEVELS - 1) as f32, &TRIALS);
            pairs.groups[ib] = [found.points[0], found.points[1]];
            pairs.signs[ib] = [group.signs[0], group.signs[1]];
            pairs.scales[ib] = found.scale;
            pairs.max_scale = if pairs.max_scale > found.scale { pairs.max_scale } else { found.scale };
        }
        pairs
    }

    /// The scale codes of all groups in units of `max_scale / 31`, two to a byte.
    #[inline(always)]
    fn scale_codes(&self, unit: f32) -> [u8; 8] {
        let inverse = 1.0 / unit;
        let code = |ib: usize| scale_code(inverse, self.scales[ib], TOP);
        std::array::from_fn(|i| code(2 * i) | code(2 * i + 1) << 4)
    }
}

lattice_encoder! {
    /// Encodes IQ2_XS. ggml has no rule for weights of equal importance and aborts; here `None` means equal.
    quantize_iq2_xs, quantize_iq2_xs_with: FitSteps, encode_xs
}

#[inline(always)]
fn encode_xs(steps: impl FitSteps, x: &[f32; BLOCK], importance: Option<&[f32; BLOCK]>, out: &mut [u8; 74]) {
    let variance = sum_of_squares(x) / BLOCK as f32;
    let equal = |x: f32| (variance + x * x).sqrt();
    let pairs = Pairs::fit(steps, x, importance, grid::iq2_xs(), Signs::Even, 1e-15, variance, equal);
    out.fill(0);
    if pairs.max_scale == 0.0 {
        return;
    }
    let d = pairs.max_scale / 31.0;
    put_f16(out, 0, d);
    for (n, bytes) in out[2..66].as_chunks_mut::<2>().0.iter_mut().enumerate() {
        let signs = u16::from(pairs.signs[n / 2][n % 2] & 127);
        *bytes = (pairs.groups[n / 2][n % 2] | signs << 9).to_le_bytes();
    }
    out[66..].copy_from_slice(&pairs.scale_codes(d));
}

/// Decodes IQ2_XS.
#[inline(always)]
pub(crate) fn dequantize_iq2_xs(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &[u8; 74], out: &mut [f32; BLOCK]| {
        runs_xs(block, |n, run| run.store(&mut out.as_chunks_mut::<16>().0[n]));
    });
}

/// Takes a block of IQ2_XS apart.
#[inline(always)]
pub(crate) fn runs_xs(block: &[u8; 74], mut emit: impl FnMut(usize, SignedRun)) {
    let d = get_f16(block, 0);
    for (n, codes) in block[2..66].as_chunks::<4>().0.iter().enumerate() {
        let codes = [u16::from_le_bytes([codes[0], codes[1]]), u16::from_le_bytes([codes[2], codes[3]])];
        emit(
            n,
            SignedRun {
                scale: pair_scale(d, &block[66..], n),
                magnitudes: codes.map(|code| grid::IQ2_XS_POINTS[(code & 511) as usize]),
                signs: u16::from_le_bytes(codes.map(|code| even_signs((code >> 9) as u8))),
            },
        );
    }
}

lattice_encoder! {
    /// Encodes IQ2_S.
    quantize_iq2_s, quantize_iq2_s_with: FitSteps, encode_s
}

#[inline(always)]
fn encode_s(steps: impl FitSteps, x: &[f32; BLOCK], importance: Option<&[f32; BLOCK]>, out: &mut [u8; 82]) {
    let variance = 2.0 * sum_of_squares(x) / BLOCK as f32;
    let equal = |x: f32| 0.25 * variance + x * x;
    let pairs = Pairs::fit(steps, x, importance, grid::iq2_s(), Signs::Free, 1e-8, variance, equal);
    out.fill(0);
    for n in 0..32 {
        let point = pairs.groups[n / 2][n % 2];
        out[2 + n] = point as u8;
        out[34 + n] = pairs.signs[n / 2][n % 2];
        out[66 + n / 4] |= ((point >> 8) as u8) << (2 * (n % 4));
    }
    if pairs.max_scale == 0.0 {
        return;
    }
    let d = pairs.max_scale / 31.0;
    // The least squares scale is slightly too large once the group scales are rounded.
    put_f16(out, 0, d * 0.9875);
    out[74..].copy_from_slice(&pairs.scale_codes(d));
}

/// Decodes IQ2_S.
#[inline(always)]
pub(crate) fn dequantize_iq2_s(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &[u8; 82], out: &mut [f32; BLOCK]| {
        runs_s(block, |n, run| run.store(&mut out.as_chunks_mut::<16>().0[n]));
    });
}

/// Takes a block of IQ2_S apart.
#[inline(always)]
pub(crate) fn runs_s(block: &[u8; 82], mut emit: impl FnMut(usize, SignedRun)) {
    let d = get_f16(block, 0);
    for n in 0..16 {
        let high = usize::from(block[66 + n / 2] >> (4 * (n % 2)));
        let [first, second] = [usize::from(block[2 + 2 * n]), usize::from(block[3 + 2 * n])];
        emit(
            n,
            SignedRun {
                scale: pair_scale(d, &block[74..], n),
                magnitudes: [first | (high & 3) << 8, second | (high >> 2 & 3) << 8]
                    .map(|point| grid::IQ2_S_POINTS[point]),
                signs: u16::from_le_bytes([block[34 + 2 * n], block[35 + 2 * n]]),
            },
        );
    }
}

/// Scale of group `ib` of 16 weights, from codes packed two to a byte.
#[inline(always)]
fn pair_scale(d: f32, codes: &[u8], ib: usize) -> f32 {
    d * (0.5 + f32::from(codes[ib / 2] >> (4 * (ib % 2)) & 15)) * 0.25
}
