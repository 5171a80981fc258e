//! Q1_0 and Q2_0: one and two bits per weight with a single binary16 scale `d` at the start. Importance plays no
//! part.
//!
//! Q1_0: 128 weights, 16 bytes with the sign bits (1 = not negative), weight `j` at bit `j % 8` of byte `j / 8`.
//! Q2_0: 64 weights, 16 bytes, weight `j` at bit `2 (j % 4)` of byte `j / 4`, weight = `d * (level - 1)`.

use super::{decode_blocks, encode_blocks, get_f16, largest_magnitude, put_f16};
use crate::quant::round::{round_away, round_away_small};

const Q1_0_LEN: usize = 128;
const Q2_0_LEN: usize = 64;
const BYTES: usize = 2 + 16;

/// Encodes Q1_0 (`quantize_q1_0`): the scale is the mean magnitude, summed in order.
#[inline(always)]
pub(crate) fn quantize_q1_0(src: &[f32], _row_len: usize, _importance: Option<&[f32]>, dst: &mut [u8]) {
    encode_blocks(src, dst, |x: &[f32; Q1_0_LEN], block: &mut [u8; BYTES]| {
        let sum = x.iter().fold(0.0, |sum, v| sum + v.abs());
        put_f16(block, 0, sum / Q1_0_LEN as f32);
        for (out, x) in block[2..].iter_mut().zip(x.as_chunks::<8>().0) {
            *out = x.iter().enumerate().fold(0, |bits, (j, &v)| bits | (u8::from(v >= 0.0) << j));
        }
    });
}

/// Decodes Q1_0 (`dequantize_row_q1_0`).
pub(crate) fn dequantize_q1_0(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &[u8; BYTES], x: &mut [f32; Q1_0_LEN]| {
        let d = get_f16(block, 0);
        for (x, bits) in x.as_chunks_mut::<8>().0.iter_mut().zip(&block[2..]) {
            for (j, v) in x.iter_mut().enumerate() {
                *v = if (bits >> j) & 1 == 1 { d } else { -d };
            }
        }
    });
}

/// Encodes Q2_0 (`quantize_q2_0`): the scale is the largest magnitude, so the encoder never uses level 3.
#[inline(always)]
pub(crate) fn quantize_q2_0(src: &[f32], _row_len: usize, _importance: Option<&[f32]>, dst: &mut [u8]) {
    encode_blocks(src, dst, encode_q2_0);
}

/// One block of Q2_0.
#[inline(always)]
pub(in crate::quant) fn encode_q2_0(x: &[f32; Q2_0_LEN], block: &mut [u8; BYTES]) {
    let d = largest_magnitude(x);
    let inverse = if d > 0.0 { 1.0 / d } else { 0.0 };
    let levels = if inverse.is_finite() {
        x.map(|v| (round_away_small(v * inverse) + 1).clamp(0, 3) as u8)
    } else {
        x.map(|v| round_away(v * inverse).wrapping_add(1).clamp(0, 3) as u8)
    };
    put_q2_0(d, &levels, block);
}

/// Writes a block of Q2_0.
#[inline(always)]
pub(in crate::quant) fn put_q2_0(d: f32, levels: &[u8; Q2_0_LEN], block: &mut [u8; BYTES]) {
    put_f16(block, 0, d);
    for (out, levels) in block[2..].iter_mut().zip(levels.as_chunks::<4>().0) {
        // Levels fill two bits of their byte each; shifted by six bits less, they stand side by side.
        let four = u32::from_le_bytes(*levels);
        *out = (four | four >> 6 | four >> 12 | four >> 18) as u8;
    }
}

/// Decodes Q2_0 (`dequantize_row_q2_0`).
pub(crate) fn dequantize_q2_0(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &[u8; BYTES], x: &mut [f32; Q2_0_LEN]| {
        let d = get_f16(block, 0);
        for (x, bits) in x.as_chunks_mut::<4>().0.iter_mut().zip(&block[2..]) {
            for (j, v) in x.iter_mut().enumerate() {
                *v = f32::from(((bits >> (2 * j)) & 3) as i8 - 1) * d;
            }
        }
    });
}
