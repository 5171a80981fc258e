//! Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: blocks of 32 weights with one binary16 scale `d`, in the `_1` types also a
//! binary16 minimum `m`. Weight = `d * (level - half)`, `d * level + m` or `d * level`.
//!
//! Levels of 4 bits are packed as nibbles, weight `j` below and weight `j + 16` above in byte `j`; the fifth bits of
//! Q5 stand in a little-endian word, weight `j` at bit `j`.

use super::{decode_blocks, encode_blocks, encode_by_importance, error_weights, get_f16, put_f16, sum_of_squares};
use crate::quant::lanes::fold_halves;
use crate::quant::levels::{Scalar, ToLevels};
use crate::quant::round::{round_away, round_away_small, truncate, truncate_small};
use crate::quant::search::{self, AffineSearch, ErrorMeasure, fit_affine, fit_symmetric};

/// Weights per block.
const LEN: usize = 32;
const HALF: usize = LEN / 2;

/// `1 / d`, or 0 for an empty block.
#[inline(always)]
pub(in crate::quant) fn inverse(d: f32) -> f32 {
    if d != 0.0 { 1.0 / d } else { 0.0 }
}

/// Levels `0..=top` of weights that `scaled` maps to levels and a fraction. `tame` promises values of `0..2^22`;
/// others become C's `(int8_t) value`, the low byte of the truncated number.
#[inline(always)]
fn truncate_levels(x: &[f32; LEN], top: u8, tame: bool, scaled: impl Fn(f32) -> f32) -> [u8; LEN] {
    if tame {
        let limit = f32::from(top) + 0.5;
        x.map(|v| {
            let level = scaled(v);
            truncate_small(if level < limit { level } else { limit }) as u8
        })
    } else {
        x.map(|v| (truncate(scaled(v)) as i8).min(top as i8) as u8)
    }
}

#[inline(always)]
fn put_nibbles(levels: &[u8; LEN], out: &mut [u8]) {
    for j in 0..HALF {
        out[j] = (levels[j] & 0x0f) | (levels[j + HALF] << 4);
    }
}

#[inline(always)]
fn fifth_bits(levels: &[u8; LEN]) -> u32 {
    let mut bits = 0;
    for (n, eight) in levels.as_chunks::<8>().0.iter().enumerate() {
        let fifth = (u64::from_le_bytes(*eight) >> 4) & 0x0101_0101_0101_0101;
        // The product has the bit of byte `j` at 56 + j; all others fall out above or stay below.
        bits |= ((fifth.wrapping_mul(0x0102_0408_1020_4080) >> 56) as u32) << (8 * n);
    }
    bits
}

/// Level `0..16` of weights `j` and `j + 16`, as `weight` makes of them.
#[inline(always)]
fn decode_nibbles(packed: &[u8; HALF], x: &mut [f32; LEN], weight: impl Fn(u8) -> f32) {
    let (low, high) = x.split_at_mut(HALF);
    for (v, byte) in low.iter_mut().zip(packed) {
        *v = weight(byte & 0x0f);
    }
    for (v, byte) in high.iter_mut().zip(packed) {
        *v = weight(byte >> 4);
    }
}

/// Levels with their fifth bits.
#[inline(always)]
fn five_bits(fifth: &[u8; 4], packed: &[u8; HALF]) -> [u8; LEN] {
    let mut levels = [0; LEN];
    for j in 0..HALF {
        levels[j] = packed[j] & 0x0f;
        levels[j + HALF] = packed[j] >> 4;
    }
    for (levels, bits) in levels.as_chunks_mut::<8>().0.iter_mut().zip(fifth) {
        for (j, level) in levels.iter_mut().enumerate() {
            *level |= ((bits >> j) & 1) << 4;
        }
    }
    levels
}

/// Mean of the squares of a row.
#[inline(always)]
pub(in crate::quant) fn mean_square(row: &[f32]) -> f32 {
    sum_of_squares(row) / row.len() as f32
}

/// Scale and levels around zero without importance: the peak becomes level 0.
#[inline(always)]
fn round_symmetric(x: &[f32; LEN], half: u8) -> (f32, [u8; LEN]) {
    let d = search::peak(x) / -f32::from(half);
    let inverse = inverse(d);
    let offset = f32::from(half) + 0.5;
    (d, truncate_levels(x, 2 * half - 1, inverse.is_finite(), |v| v * inverse + offset))
}

/// Smallest and largest weight, the first of equals (which matters for zeros of either sign).
#[inline(always)]
fn extremes(x: &[f32; LEN]) -> (f32, f32) {
    let (mut low, mut high) = ([f32::MAX; 8], [f32::MIN; 8]);
    for chunk in x.as_chunks::<8>().0 {
        for k in 0..8 {
            low[k] = if chunk[k] < low[k] { chunk[k] } else { low[k] };
            high[k] = if chunk[k] > high[k] { chunk[k] } else { high[k] };
        }
    }
    let low = fold_halves(low, |min, v| if v < min { v } else { min });
    let high = fold_halves(high, |max, v| if v > max { v } else { max });
    let first_equal = |value: f32| if value == 0.0 { x.iter().copied().find(|&v| v == 0.0) } else { None };
    (first_equal(low).unwrap_or(low), first_equal(high).unwrap_or(high))
}

/// Scale, minimum and levels without importance: the range of the block, divided evenly.
#[inline(always)]
fn round_affine(x: &[f32; LEN], top: u8) -> (f32, f32, [u8; LEN]) {
    let (min, max) = extremes(x);
    let d = (max - min) / f32::from(top);
    let inverse = inverse(d);
    let tame = d.is_finite() && inverse.is_finite();
    (d, min, truncate_levels(x, top, tame, |v| (v - min) * inverse + 0.5))
}

const fn affine_search(max_level: f32) -> AffineSearch {
    AffineSearch { max_level, first: -0.9, step: 0.05, steps: 36, error: ErrorMeasure::Squared }
}

/// What is tried with importance.
pub(in crate::quant) const Q4_1_SEARCH: AffineSearch = affine_search(15.0);
pub(in crate::quant) const Q5_1_SEARCH: AffineSearch = affine_search(31.0);
/// Levels on either side of zero.
pub(in crate::quant) const Q4_HALF: i32 = 8;
pub(in crate::quant) const Q5_HALF: i32 = 16;

#[inline(always)]
pub(in crate::quant) fn put_q4_0(d: f32, levels: &[u8; LEN], block: &mut [u8; 18]) {
    put_f16(block, 0, d);
    put_nibbles(levels, &mut block[2..]);
}

/// One block without importance.
#[inline(always)]
pub(in crate::quant) fn encode_q4_0(x: &[f32; LEN], block: &mut [u8; 18]) {
    let (d, levels) = round_symmetric(x, 8);
    put_q4_0(d, &levels, block);
}

/// Q4_0: `d`, 16 bytes of nibbles; weight = `d * (level - 8)` (`quantize_q4_0`).
#[inline(always)]
pub(crate) fn quantize_q4_0(src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]) {
    encode_by_importance(src, row_len, importance, dst, encode_q4_0, mean_square, |&sigma2, x, importance, block| {
        let fit = fit_symmetric(x, &error_weights(x, importance, sigma2), Q4_HALF);
        put_q4_0(fit.scale, &Scalar.of_products(x, fit.inverse, Q4_HALF), block);
    });
}

/// Decodes Q4_0.
pub(crate) fn dequantize_q4_0(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &[u8; 18], x: &mut [f32; LEN]| {
        let d = get_f16(block, 0);
        if let Some(packed) = block[2..].first_chunk() {
            decode_nibbles(packed, x, |level| f32::from(level as i8 - 8) * d);
        }
    });
}

#[inline(always)]
pub(in crate::quant) fn put_q4_1(d: f32, m: f32, levels: &[u8; LEN], block: &mut [u8; 20]) {
    put_f16(block, 0, d);
    put_f16(block, 2, m);
    put_nibbles(levels, &mut block[4..]);
}

/// One block without importance.
#[inline(always)]
pub(in crate::quant) fn encode_q4_1(x: &[f32; LEN], block: &mut [u8; 20]) {
    let (d, m, levels) = round_affine(x, 15);
    put_q4_1(d, m, &levels, block);
}

/// Q4_1: `d`, `m`, 16 bytes of nibbles; weight = `d * level + m` (`quantize_q4_1`).
#[inline(always)]
pub(crate) fn quantize_q4_1(src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]) {
    encode_by_importance(src, row_len, importance, dst, encode_q4_1, mean_square, |&sigma2, x, importance, block| {
        let fit = fit_affine(x, &error_weights(x, importance, sigma2), &Q4_1_SEARCH);
        put_q4_1(fit.scale, -fit.min, &Scalar.of_search(x, fit.level_map, Q4_1_SEARCH.max_level), block);
    });
}

/// Decodes Q4_1.
pub(crate) fn dequantize_q4_1(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &[u8; 20], x: &mut [f32; LEN]| {
        let (d, m) = (get_f16(block, 0), get_f16(block, 2));
        if let Some(packed) = block[4..].first_chunk() {
            decode_nibbles(packed, x, |level| f32::from(level) * d + m);
        }
    });
}

#[inline(always)]
pub(in crate::quant) fn put_q5_0(d: f32, levels: &[u8; LEN], block: &mut [u8; 22]) {
    put_f16(block, 0, d);
    block[2..6].copy_from_slice(&fifth_bits(levels).to_le_bytes());
    put_nibbles(levels, &mut block[6..]);
}

/// One block without importance.
#[inline(always)]
pub(in crate::quant) fn encode_q5_0(x: &[f32; LEN], block: &mut [u8; 22]) {
    let (d, levels) = round_symmetric(x, 16);
    put_q5_0(d, &levels, block);
}

/// Q5_0: `d`, 4 bytes of fifth bits, 16 bytes of nibbles; weight = `d * (level - 16)` (`quantize_q5_0`).
#[inline(always)]
pub(crate) fn quantize_q5_0(src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]) {
    encode_by_importance(src, row_len, importance, dst, encode_q5_0, mean_square, |&sigma2, x, importance, block| {
        let fit = fit_symmetric(x, &error_weights(x, importance, sigma2), Q5_HALF);
        put_q5_0(fit.scale, &Scalar.of_products(x, fit.inverse, Q5_HALF), block);
    });
}

/// Decodes Q5_0.
pub(crate) fn dequantize_q5_0(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &[u8; 22], x: &mut [f32; LEN]| {
        let d = get_f16(block, 0);
        if let Some((fifth, packed)) = block[2..].split_first_chunk()
            && let Some(packed) = packed.first_chunk()
        {
            *x = five_bits(fifth, packed).map(|level| f32::from(level as i8 - 16) * d);
        }
    });
}

#[inline(always)]
pub(in crate::quant) fn put_q5_1(d: f32, m: f32, levels: &[u8; LEN], block: &mut [u8; 24]) {
    put_f16(block, 0, d);
    put_f16(block, 2, m);
    block[4..8].copy_from_slice(&fifth_bits(levels).to_le_bytes());
    put_nibbles(levels, &mut block[8..]);
}

/// One block without importance.
#[inline(always)]
pub(in crate::quant) fn encode_q5_1(x: &[f32; LEN], block: &mut [u8; 24]) {
    let (d, m, levels) = round_affine(x, 31);
    put_q5_1(d, m, &levels, block);
}

/// Q5_1: `d`, `m`, 4 bytes of fifth bits, 16 bytes of nibbles; weight = `d * level + m` (`quantize_q5_1`).
#[inline(always)]
pub(crate) fn quantize_q5_1(src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]) {
    encode_by_importance(src, row_len, importance, dst, encode_q5_1, mean_square, |&sigma2, x, importance, block| {
        let fit = fit_affine(x, &error_weights(x, importance, sigma2), &Q5_1_SEARCH);
        put_q5_1(fit.scale, -fit.min, &Scalar.of_search(x, fit.level_map, Q5_1_SEARCH.max_level), block);
    });
}

/// Decodes Q5_1.
pub(crate) fn dequantize_q5_1(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &[u8; 24], x: &mut [f32; LEN]| {
        let (d, m) = (get_f16(block, 0), get_f16(block, 2));
        if let Some((fifth, packed)) = block[4..].split_first_chunk()
            && let Some(packed) = packed.first_chunk()
        {
            *x = five_bits(fifth, packed).map(|level| f32::from(level) * d + m);
        }
    });
}

/// Q8_0: `d`, 32 signed bytes; weight = `d * level`, halves rounded away from zero (`quantize_q8_0`). Importance
/// plays no part.
#[inline(always)]
pub(crate) fn quantize_q8_0(src: &[f32], _row_len: usize, _importance: Option<&[f32]>, dst: &mut [u8]) {
    encode_blocks(src, dst, encode_q8_0);
}

/// One block.
#[inline(always)]
pub(in crate::quant) fn encode_q8_0(x: &[f32; LEN], block: &mut [u8; 34]) {
    let d = super::largest_magnitude(x) / 127.0;
    let inverse = inverse(d);
    let levels = if inverse.is_finite() {
        x.map(|v| round_away_small(v * inverse) as u8)
    } else {
        x.map(|v| round_away(v * inverse) as u8)
    };
    put_q8_0(d, &levels, block);
}

#[inline(always)]
pub(in crate::quant) fn put_q8_0(d: f32, levels: &[u8; LEN], block: &mut [u8; 34]) {
    put_f16(block, 0, d);
    block[2..].copy_from_slice(levels);
}

/// Decodes Q8_0.
pub(crate) fn dequantize_q8_0(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &[u8; 34], x: &mut [f32; LEN]| {
        let d = get_f16(block, 0);
        for (v, &level) in x.iter_mut().zip(&block[2..]) {
            *v = f32::from(level as i8) * d;
        }
    });
}
