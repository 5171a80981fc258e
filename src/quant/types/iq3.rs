//! IQ3_XXS and IQ3_S: four weights as one point of a 4-dimensional lattice of eight levels, with signs beside it.
//!
//! Blocks of 256 weights; `d` is a binary16. Every 32 weights have a 4-bit scale code `s`.
//!
//! | type    | bytes                                                                                        |
//! |---------|----------------------------------------------------------------------------------------------|
//! | IQ3_XXS | `d`, 64 points of 8 bits, 8 u32: four 7-bit sign codes, `s` on top; scale `d * (2 s + 1) / 4` |
//! | IQ3_S   | `d`, 64 low bytes of points, 8 bytes of ninth bits, 32 sign bytes, 4 bytes of `s`; scale `d * (2 s + 1)` |

use super::runs::SignedRun;
use super::superblock::{error_weights_or, lattice_encoder};
use super::{decode_blocks, get_f16, put_f16, sum_of_squares};
use crate::quant::grid::fit::{FitSteps, Group, Refine, Signs, Trials, fit, scale_code};
use crate::quant::grid::{self, Lattice, even_signs};

const BLOCK: usize = 256;
const LEVELS: i32 = 8;
const TOP: i32 = 15;

/// The fitted groups of a block.
struct Groups {
    points: [[u16; 8]; 8],
    signs: [[u8; 4]; 8],
    scales: [f32; 8],
    max_scale: f32,
    /// False for groups that were left zero.
    fitted: [bool; 8],
}

impl Groups {
    /// Groups with no magnitude of at least `smallest` stay zero.
    #[inline(always)]
    fn fit(
        steps: impl FitSteps,
        x: &[f32; BLOCK],
        importance: Option<&[f32; BLOCK]>,
        lattice: &Lattice<4>,
        rule: Signs,
        smallest: f32,
        trials: &Trials,
    ) -> Groups {
        let variance = 2.0 * sum_of_squares(x) / BLOCK as f32;
        let mut groups =
            Groups { points: [[0; 8]; 8], signs: [[0; 4]; 8], scales: [0.0; 8], max_scale: 0.0, fitted: [false; 8] };
        for (ib, values) in x.as_chunks::<32>().0.iter().enumerate() {
            let importance = importance.map(|w| &w.as_chunks::<32>().0[ib]);
            let mut group = Group::new(values, error_weights_or(values, importance, variance, |x| x * x), rule);
            let max = group.max();
            if max < smallest {
                continue;
            }
            let found = fit::<32, 4, 8, 2>(steps, lattice, &mut group, max, max / (2 * LEVELS - 1) as f32, trials);
            groups.points[ib] = found.points;
            groups.signs[ib] = group.signs;
            groups.fitted[ib] = true;
            groups.scales[ib] = found.scale;
            groups.max_scale = if groups.max_scale > found.scale { groups.max_scale } else { found.scale };
        }
        groups
    }
}

lattice_encoder! {
    /// Encodes IQ3_XXS.
    quantize_iq3_xxs, quantize_iq3_xxs_with: FitSteps, encode_xxs
}

#[inline(always)]
fn encode_xxs(steps: impl FitSteps, x: &[f32; BLOCK], importance: Option<&[f32; BLOCK]>, out: &mut [u8; 98]) {
    const TRIALS: Trials = Trials { tries: 15, step: 0.2, levels: LEVELS, refine: Refine::OffLattice };
    let groups = Groups::fit(steps, x, importance, grid::iq3_xxs(), Signs::Even, 1e-8, &TRIALS);
    out.fill(0);
    if groups.max_scale == 0.0 {
        return;
    }
    let d = groups.max_scale / 31.0;
    let inverse = 1.0 / d;
    // The factor makes up for what rounding the group scales loses on average.
    put_f16(out, 0, d * 1.0125);
    for ib in 0..8 {
        for (byte, &point) in out[2 + 8 * ib..][..8].iter_mut().zip(&groups.points[ib]) {
            *byte = point as u8;
        }
        let mut word = u32::from(scale_code(inverse, groups.scales[ib], TOP)) << 28;
        for (k, &signs) in groups.signs[ib].iter().enumerate() {
            word |= u32::from(signs & 127) << (7 * k);
        }
        out[66 + 4 * ib..][..4].copy_from_slice(&word.to_le_bytes());
    }
}

/// Decodes IQ3_XXS.
#[inline(always)]
pub(crate) fn dequantize_iq3_xxs(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &[u8; 98], out: &mut [f32; BLOCK]| {
        runs_xxs(block, |n, run| run.store(&mut out.as_chunks_mut::<16>().0[n]));
    });
}

/// Takes a block of IQ3_XXS apart.
#[inline(always)]
pub(crate) fn runs_xxs(block: &[u8; 98], mut emit: impl FnMut(usize, SignedRun)) {
    let d = get_f16(block, 0);
    let (points, words) = block[2..].split_at(64);
    for (n, points) in points.as_chunks::<4>().0.iter().enumerate() {
        let word = u32::from_le_bytes(words.as_chunks::<4>().0[n / 2]);
        let codes = word >> (14 * (n % 2));
        let [a, b, c, e] = points.map(|point| grid::IQ3_XXS_POINTS[point as usize]);
        emit(
            n,
            SignedRun {
                scale: d * (0.5 + (word >> 28) as f32) * 0.5,
                magnitudes: [joined(a, b), joined(c, e)],
                signs: u16::from_le_bytes([even_signs(codes as u8), even_signs((codes >> 7) as u8)]),
            },
        );
    }
}

lattice_encoder! {
    /// Encodes IQ3_S.
    quantize_iq3_s, quantize_iq3_s_with: FitSteps, encode_s
}

#[inline(always)]
fn encode_s(steps: impl FitSteps, x: &[f32; BLOCK], importance: Option<&[f32; BLOCK]>, out: &mut [u8; 110]) {
    const TRIALS: Trials = Trials { tries: 9, step: 0.2, levels: LEVELS, refine: Refine::AllIfAny };
    // Only a group of zeros is skipped.
    let groups = Groups::fit(steps, x, importance, grid::iq3_s(), Signs::Free, f32::from_bits(1), &TRIALS);
    out.fill(0);
    // ggml does not step over the bytes of a group of zeros: low bytes and signs of the groups that follow move
    // to the front, while ninth bits and scales stay in place, and such a block decodes to other weights than
    // were meant. Its bytes are reproduced all the same.
    let kept = (0..8).filter(|&ib| groups.fitted[ib]);
    for (at, ib) in kept.enumerate() {
        for (k, &point) in groups.points[ib].iter().enumerate() {
            out[2 + 8 * at + k] = point as u8;
            out[66 + ib] |= ((point >> 8) as u8) << k;
        }
        out[74 + 4 * at..][..4].copy_from_slice(&groups.signs[ib]);
    }
    if groups.max_scale == 0.0 {
        return;
    }
    let d = groups.max_scale / 31.0;
    let inverse = 1.0 / d;
    // The factor makes up for what rounding the group scales loses on average.
    put_f16(out, 0, d * 1.033);
    for i in 0..4 {
        let code = |ib: usize| scale_code(inverse, groups.scales[ib], TOP);
        out[106 + i] = code(2 * i) | code(2 * i + 1) << 4;
    }
}

/// Decodes IQ3_S.
#[inline(always)]
pub(crate) fn dequantize_iq3_s(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &[u8; 110], out: &mut [f32; BLOCK]| {
        runs_s(block, |n, run| run.store(&mut out.as_chunks_mut::<16>().0[n]));
    });
}

/// Takes a block of IQ3_S apart.
#[inline(always)]
pub(crate) fn runs_s(block: &[u8; 110], mut emit: impl FnMut(usize, SignedRun)) {
    let d = get_f16(block, 0);
    let (low, high, signs, scales) = (&block[2..66], &block[66..74], &block[74..106], &block[106..]);
    for (n, low) in low.as_chunks::<4>().0.iter().enumerate() {
        let high = usize::from(high[n / 2] >> (4 * (n % 2)));
        let point = |k: usize| grid::IQ3_S_POINTS[usize::from(low[k]) | (high >> k & 1) << 8];
        emit(
            n,
            SignedRun {
                scale: d * (1 + 2 * (scales[n / 4] >> (4 * (n / 2 % 2)) & 15)) as f32,
                magnitudes: [joined(point(0), point(1)), joined(point(2), point(3))],
                signs: u16::from_le_bytes([signs[2 * n], signs[2 * n + 1]]),
            },
        );
    }
}

/// Two points of four magnitudes as eight.
#[inline(always)]
fn joined(first: u32, second: u32) -> u64 {
    u64::from(first) | u64::from(second) << 32
}
