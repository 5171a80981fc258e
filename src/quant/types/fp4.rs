//! MXFP4 and NVFP4: 4-bit floats (E2M1) with a small shared scale. Importance plays no part.
//!
//! Codes 0..8 stand for 0, 0.5, 1, 1.5, 2, 3, 4, 6 and 8..16 for their negatives. The table holds twice the values
//! and the scales are halved instead, as in ggml. Packed as nibbles: of `2 n` weights under one scale, weight `j`
//! below and weight `j + n` above in byte `j`.
//!
//! MXFP4: 32 weights, 1 byte with a power of two (E8M0, bias 127), 16 bytes.
//! NVFP4: 64 weights in 4 groups of 16, 4 bytes with the groups' scales (UE4M3: 4 exponent bits with bias 7, 3
//! mantissa bits), then 8 bytes per group.

use super::{decode_blocks, encode_blocks, largest_magnitude};
use crate::quant::round::truncate;

/// Twice the value of each code. Code 8, minus zero, decodes to plus zero as it does in ggml.
pub(in crate::quant) const DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

const MXFP4_LEN: usize = 32;
const MXFP4_BYTES: usize = 17;
const NVFP4_LEN: usize = 64;
const NVFP4_BYTES: usize = 36;
const NVFP4_GROUP: usize = 16;

/// Halfway between the values of codes `n` and `n + 1`, doubled as they are.
const BORDERS: [f32; 7] = [0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0];

/// Code of each of 16 weights no greater than `peak`: the nearest value, the lowest code of equals
/// (`best_index_mxfp4`).
///
/// Scales have few bits, so values and borders are exact; so is the distance of a weight to the nearest value, by
/// Sterbenz' lemma, and rounding cannot make another distance smaller. Hence counting the borders below a weight gives
/// the code of the least distance, unless the weights are so much larger than the values that all distances round to
/// the same.
#[inline(always)]
fn nearest_codes(x: &[f32; 16], half_scale: f32, peak: f32) -> [u8; 16] {
    if !(half_scale > 0.0 && peak <= half_scale * 4096.0) {
        return least_distances(x, half_scale);
    }
    let mut codes = [0i32; 16];
    for (code, v) in codes.iter_mut().zip(x) {
        for border in BORDERS {
            *code += i32::from(v.abs() > border * half_scale);
        }
        *code |= if (*v < 0.0) & (*code > 0) { 8 } else { 0 };
    }
    codes.map(|code| code as u8)
}

/// [`nearest_codes`] of any weights, by comparing all distances.
#[inline(never)]
fn least_distances(x: &[f32; 16], half_scale: f32) -> [u8; 16] {
    let values = table(half_scale);
    let mut best = [0u32; 16];
    let mut best_error = x.map(|v| (values[0] - v).abs());
    for (code, value) in values.iter().enumerate().skip(1) {
        for i in 0..16 {
            let error = (value - x[i]).abs();
            let better = error < best_error[i];
            best[i] = if better { code as u32 } else { best[i] };
            best_error[i] = if better { error } else { best_error[i] };
        }
    }
    best.map(|code| code as u8)
}

/// Value of each code under a scale.
#[inline(always)]
fn table(half_scale: f32) -> [f32; 16] {
    DOUBLED.map(|v| f32::from(v) * half_scale)
}

/// Half of the power of two with biased exponent `e` (`ggml_e8m0_to_fp32_half`). 255 is not treated as NaN.
#[inline(always)]
pub(in crate::quant) fn e8m0_half(e: u8) -> f32 {
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { u32::from(e - 1) << 23 })
}

/// Encodes MXFP4 (`quantize_mxfp4`): the exponent puts the peak into `4..8`, of which 6 is the highest value.
#[inline(always)]
pub(crate) fn quantize_mxfp4(src: &[f32], _row_len: usize, _importance: Option<&[f32]>, dst: &mut [u8]) {
    encode_blocks(src, dst, |x: &[f32; MXFP4_LEN], block: &mut [u8; MXFP4_BYTES]| {
        let peak = largest_magnitude(x);
        // For peaks below 2^-125 the exponent is negative and wraps around, as it does in ggml.
        let e = if peak > 0.0 { (floor_log2(peak) - 2 + 127) as u8 } else { 0 };
        block[0] = e;
        if let [low, high] = x.as_chunks().0 {
            let (low, high) = (nearest_codes(low, e8m0_half(e), peak), nearest_codes(high, e8m0_half(e), peak));
            for j in 0..16 {
                block[1 + j] = low[j] | (high[j] << 4);
            }
        }
    });
}

/// Decodes MXFP4 (`dequantize_row_mxfp4`).
pub(crate) fn dequantize_mxfp4(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &[u8; MXFP4_BYTES], x: &mut [f32; MXFP4_LEN]| {
        let values = table(e8m0_half(block[0]));
        for j in 0..MXFP4_LEN / 2 {
            x[j] = values[usize::from(block[1 + j] & 0x0f)];
            x[j + MXFP4_LEN / 2] = values[usize::from(block[1 + j] >> 4)];
        }
    });
}

/// Half of a UE4M3 scale (`ggml_ue4m3_to_fp32`). The codes 0 and 0x7f mean zero; the top bit is ignored otherwise.
#[inline(always)]
pub(in crate::quant) fn ue4m3_half(code: u8) -> f32 {
    if code == 0 || code == 0x7f {
        return 0.0;
    }
    let (exponent, mantissa) = (u32::from(code >> 3) & 0x0f, u32::from(code) & 7);
    if exponent == 0 {
        // Multiples of 2^-9, halved.
        mantissa as f32 / 1024.0
    } else {
        f32::from_bits(((exponent + 127 - 7 - 1) << 23) | (mantissa << 20))
    }
}

/// The nearest UE4M3 code, halves rounded up, at most 448 (`ggml_fp32_to_ue4m3`). Not positive gives 0.
#[inline(always)]
fn ue4m3(value: f32) -> u8 {
    const LARGEST: u8 = 0x7e;
    if value.is_nan() || value <= 0.0 {
        return 0;
    }
    let bits = value.min(448.0).to_bits();
    let exponent = (bits >> 23) as i32 - 127 + 7;
    if exponent <= 0 {
        return truncate(value * 512.0 + 0.5).min(7) as u8;
    }
    // The carry of a mantissa rounded up past 7 goes into the exponent.
    let code = (exponent << 3) + ((bits >> 20) & 7) as i32 + ((bits >> 19) & 1) as i32;
    if exponent >= 15 || code >= 15 << 3 { LARGEST } else { code as u8 }
}

/// Encodes NVFP4 (`quantize_nvfp4`): each group's scale puts its peak at 6.
#[inline(always)]
pub(crate) fn quantize_nvfp4(src: &[f32], _row_len: usize, _importance: Option<&[f32]>, dst: &mut [u8]) {
    encode_blocks(src, dst, |x: &[f32; NVFP4_LEN], block: &mut [u8; NVFP4_BYTES]| {
        let (scales, nibbles) = block.split_at_mut(4);
        let groups = x.as_chunks::<NVFP4_GROUP>().0;
        for ((x, scale), nibbles) in groups.iter().zip(scales).zip(nibbles.as_chunks_mut::<8>().0) {
            let peak = largest_magnitude(x);
            *scale = ue4m3(peak / 6.0);
            let codes = nearest_codes(x, ue4m3_half(*scale), peak);
            *nibbles = std::array::from_fn(|j| codes[j] | (codes[j + 8] << 4));
        }
    });
}

/// Decodes NVFP4 (`dequantize_row_nvfp4`).
pub(crate) fn dequantize_nvfp4(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &[u8; NVFP4_BYTES], x: &mut [f32; NVFP4_LEN]| {
        let (scales, nibbles) = block.split_at(4);
        let groups = x.as_chunks_mut::<NVFP4_GROUP>().0;
        for ((x, &scale), nibbles) in groups.iter_mut().zip(scales).zip(nibbles.as_chunks::<8>().0) {
            let values = table(ue4m3_half(scale));
            for j in 0..8 {
                x[j] = values[usize::from(nibbles[j] & 0x0f)];
                x[j + 8] = values[usize::from(nibbles[j] >> 4)];
            }
        }
    });
}

/// `floor(log2f(value))` of a positive finite value as glibc computes it: just below a power of two the logarithm
/// rounds up to the whole number.
#[inline(always)]
fn floor_log2(value: f32) -> i32 {
    let bits = value.to_bits();
    if value.is_normal() && bits & 0x007f_ff00 != 0x007f_ff00 {
        return (bits >> 23) as i32 - 127;
    }
    (f64::from(value).log2() as f32).floor() as i32
}
