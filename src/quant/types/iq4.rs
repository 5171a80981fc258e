//! IQ4_NL and IQ4_XS: 4-bit codes for sixteen values that are spaced more closely near zero.
//!
//! IQ4_NL: blocks of 32 weights, a binary16 `d` and 16 bytes of codes (weight `i` low, `i + 16` high); a weight is
//! `d * value[code]`. IQ4_XS: blocks of 256 weights, `d`, a u16 with the two high bits of eight scales, 4 bytes with
//! their low 4 bits, and the codes of 32 weights in 16 bytes as before; a weight is `d * (s - 32) * value[code]`.

use super::superblock::{blocks, error_weights_or};
use super::{decode_blocks, get_f16, put_f16, sum_of_squares};
use crate::quant::round::nearest_int;

/// `kvalues_iq4nl`.
pub(crate) const VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Where a number stops being nearest to one value and starts being nearest to the next; a number on the border
/// goes to the upper value. All of them are exact.
pub(crate) const BORDERS: [f32; 15] = {
    let mut borders = [0f32; 15];
    let mut i = 0;
    while i < 15 {
        borders[i] = (VALUES[i] as f32 + VALUES[i + 1] as f32) / 2.0;
        i += 1;
    }
    borders
};

/// Trials on each side of the scale that fits the largest weight.
pub(in crate::quant) const TRIES: i32 = 7;

/// Codes of the values nearest to `x * inverse_scale` (`best_index_int8`); NaN gets the last.
#[inline(always)]
fn nearest_codes(x: &[f32; 32], inverse_scale: f32) -> [u8; 32] {
    let mut codes = [0i32; 32];
    for (code, x) in codes.iter_mut().zip(x) {
        let scaled = inverse_scale * x;
        for border in BORDERS {
            // Not `scaled >= border`: NaN has to pass.
            #[allow(clippy::neg_cmp_op_on_partial_ord)]
            let passed = !(scaled < border);
            *code += i32::from(passed);
        }
    }
    codes.map(|code| code as u8)
}

/// The values nearest to `x * inverse_scale`, by adding up the distances between the values that are passed.
#[inline(always)]
fn nearest_values(x: &[f32; 32], inverse_scale: f32) -> [f32; 32] {
    let mut nearest = [f32::from(VALUES[0]); 32];
    for (value, x) in nearest.iter_mut().zip(x) {
        let scaled = inverse_scale * x;
        for (i, &border) in BORDERS.iter().enumerate() {
            let gap = f32::from(VALUES[i + 1]) - f32::from(VALUES[i]);
            *value += if scaled < border { 0.0 } else { gap };
        }
    }
    nearest
}

/// `(sum w q x, sum w q^2)` in order, for the values nearest to `x * inverse_scale`.
#[inline(always)]
fn sums(x: &[f32; 32], weights: &[f32; 32], inverse_scale: f32) -> (f32, f32) {
    let nearest = nearest_values(x, inverse_scale);
    let (mut sum_qx, mut sum_q2) = (0f32, 0f32);
    for i in 0..32 {
        let weighted = weights[i] * nearest[i];
        sum_qx += weighted * x[i];
        sum_q2 += weighted * nearest[i];
    }
    (sum_qx, sum_q2)
}

/// The scale that loses least among the least-squares scales of 16 assignments; zero for weights that are all
/// nearly zero.
#[inline(always)]
fn best_scale(x: &[f32; 32], weights: &[f32; 32]) -> f32 {
    let (mut magnitude, mut max) = (0f32, 0f32);
    for &x in x {
        if x.abs() > magnitude {
            (magnitude, max) = (x.abs(), x);
        }
    }
    if magnitude < 1e-15 {
        return 0.0;
    }
    let lowest = f32::from(VALUES[0]);
    let (sum_qx, sum_q2) = sums(x, weights, 1.0 / (-max / lowest));
    let mut scale = if sum_q2 > 0.0 { sum_qx / sum_q2 } else { 0.0 };
    let mut best = scale * sum_qx;
    for n in -TRIES..=TRIES {
        let (sum_qx, sum_q2) = sums(x, weights, (n as f32 + lowest) / max);
        if sum_q2 > 0.0 && sum_qx * sum_qx > best * sum_q2 {
            scale = sum_qx / sum_q2;
            best = scale * sum_qx;
        }
    }
    scale
}

/// `1 / scale`, and 0 for 0.
#[inline(always)]
fn inverse_or_zero(scale: f32) -> f32 {
    if scale != 0.0 { 1.0 / scale } else { 0.0 }
}

#[inline(always)]
fn pack(codes: &[u8; 32]) -> [u8; 16] {
    std::array::from_fn(|i| codes[i] | codes[i + 16] << 4)
}

#[inline(always)]
fn unpack(codes: &[u8; 16], scale: f32, out: &mut [f32; 32]) {
    for (i, byte) in codes.iter().enumerate() {
        out[i] = scale * f32::from(VALUES[(byte & 15) as usize]);
        out[i + 16] = scale * f32::from(VALUES[(byte >> 4) as usize]);
    }
}

/// Encodes IQ4_NL.
#[inline(always)]
pub(crate) fn quantize_iq4_nl(src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]) {
    for (x, importance, out) in blocks(src, row_len, importance, dst) {
        encode_nl(x, importance, out);
    }
}

#[inline(always)]
fn encode_nl(x: &[f32; 32], importance: Option<&[f32; 32]>, out: &mut [u8; 18]) {
    let variance = sum_of_squares(x) * (2.0 / 32.0);
    finish_nl(x, best_scale(x, &error_weights_or(x, importance, variance, |x| x * x)), out);
}

/// Writes a block of IQ4_NL for its scale.
#[inline(always)]
pub(in crate::quant) fn finish_nl(x: &[f32; 32], scale: f32, out: &mut [u8; 18]) {
    put_f16(out, 0, scale);
    out[2..].copy_from_slice(&pack(&nearest_codes(x, inverse_or_zero(scale))));
}

/// Writes a block of IQ4_NL from its numbers.
pub(super) fn put_nl(d: f32, codes: &[u8; 32], out: &mut [u8; 18]) {
    put_f16(out, 0, d);
    out[2..].copy_from_slice(&pack(codes));
}

/// Decodes IQ4_NL.
pub(crate) fn dequantize_iq4_nl(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &[u8; 18], out: &mut [f32; 32]| {
        let [_, _, codes @ ..] = block;
        unpack(codes, get_f16(block, 0), out);
    });
}

/// Encodes IQ4_XS.
#[inline(always)]
pub(crate) fn quantize_iq4_xs(src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]) {
    for (x, importance, out) in blocks(src, row_len, importance, dst) {
        encode_xs(x, importance, out);
    }
}

#[inline(always)]
fn encode_xs(x: &[f32; 256], importance: Option<&[f32; 256]>, out: &mut [u8; 136]) {
    let variance = sum_of_squares(x) * (2.0 / 256.0);
    let mut scales = [0f32; 8];
    for (ib, values) in x.as_chunks::<32>().0.iter().enumerate() {
        let importance = importance.map(|w| &w.as_chunks::<32>().0[ib]);
        scales[ib] = best_scale(values, &error_weights_or(values, importance, variance, |x| x * x));
    }
    finish_xs(x, &scales, out);
}

/// Writes a block of IQ4_XS for the scales of its groups.
#[inline(always)]
pub(in crate::quant) fn finish_xs(x: &[f32; 256], scales: &[f32; 8], out: &mut [u8; 136]) {
    let groups = x.as_chunks::<32>().0;
    let (mut magnitude, mut max) = (0f32, 0f32);
    for scale in scales {
        if scale.abs() > magnitude {
            (magnitude, max) = (scale.abs(), *scale);
        }
    }
    let d = -max / 32.0;
    let inverse = inverse_or_zero(d);
    let (head, body) = out.split_at_mut(8);
    let mut high = 0u16;
    head.fill(0);
    for (ib, bytes) in body.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let code = nearest_int(inverse * scales[ib]).clamp(-32, 31);
        *bytes = pack(&nearest_codes(&groups[ib], inverse_or_zero(d * code as f32)));
        let code = (code + 32) as u16;
        head[4 + ib / 2] |= ((code & 15) as u8) << (4 * (ib % 2));
        high |= (code >> 4) << (2 * ib);
    }
    put_f16(head, 0, d);
    head[2..4].copy_from_slice(&high.to_le_bytes());
}

/// Writes a block of IQ4_XS from its numbers; scales count from zero.
pub(super) fn put_xs(d: f32, scales: &[u8; 8], codes: &[u8; 256], out: &mut [u8; 136]) {
    let (head, body) = out.split_at_mut(8);
    head.fill(0);
    let mut high = 0u16;
    for (ib, (codes, bytes)) in codes.as_chunks().0.iter().zip(body.as_chunks_mut::<16>().0).enumerate() {
        *bytes = pack(codes);
        head[4 + ib / 2] |= (scales[ib] & 15) << (4 * (ib % 2));
        high |= u16::from(scales[ib] >> 4) << (2 * ib);
    }
    put_f16(head, 0, d);
    head[2..4].copy_from_slice(&high.to_le_bytes());
}

/// Decodes IQ4_XS.
pub(crate) fn dequantize_iq4_xs(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &[u8; 136], out: &mut [f32; 256]| {
        let d = get_f16(block, 0);
        let high = u16::from_le_bytes([block[2], block[3]]);
        let codes = block[8..].as_chunks::<16>().0;
        for (ib, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let low = block[4 + ib / 2] >> (4 * (ib % 2)) & 15;
            let code = i32::from(low) | i32::from(high >> (2 * ib) & 3) << 4;
            unpack(&codes[ib], d * (code - 32) as f32, out);
        }
    });
}
