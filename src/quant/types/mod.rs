//! One file per family of formats: block layout, encoder, decoder. Scalar and readable; faster kernels are
//! tested against these.
//!
//! Quantizing functions follow [`QuantizeFn`](super::QuantizeFn), dequantizing ones
//! [`DequantizeFn`](super::DequantizeFn). All multi-byte fields are little-endian.

pub(in crate::quant) mod affine_k;
pub(crate) mod float;
pub(crate) mod fp4;
pub(crate) mod iq1;
pub(crate) mod iq2;
pub(crate) mod iq3;
pub(crate) mod iq4;
pub(crate) mod legacy;
pub(crate) mod lines;
pub(crate) mod low_bit;
mod pack;
pub(crate) mod parts;
pub(crate) mod q2_k;
pub(crate) mod q3_k;
pub(crate) mod q4_k;
pub(crate) mod q5_k;
pub(crate) mod q6_k;
pub(crate) mod q8_k;
pub(crate) mod runs;
mod superblock;
pub(crate) mod ternary;

#[cfg(test)]
mod iq_tests;

use super::float16::{f16_to_f32, f32_to_f16};
use super::lanes::fold_halves;

/// Encodes block after block where rows and importance make no difference.
#[inline(always)]
pub(crate) fn encode_blocks<const N: usize, const B: usize>(
    src: &[f32],
    dst: &mut [u8],
    encode: impl Fn(&[f32; N], &mut [u8; B]),
) {
    for (x, block) in src.as_chunks().0.iter().zip(dst.as_chunks_mut().0) {
        encode(x, block);
    }
}

/// Encodes block after block: with `plain`, or with `weighted` and the importance of the block's columns, where there
/// is importance. `row_fact` computes what all weighted blocks of a row share.
#[inline(always)]
pub(crate) fn encode_by_importance<const N: usize, const B: usize, R>(
    src: &[f32],
    row_len: usize,
    importance: Option<&[f32]>,
    dst: &mut [u8],
    plain: impl Fn(&[f32; N], &mut [u8; B]),
    row_fact: impl Fn(&[f32]) -> R,
    weighted: impl Fn(&R, &[f32; N], &[f32; N], &mut [u8; B]),
) {
    let Some(importance) = importance else { return encode_blocks(src, dst, plain) };
    let importance = importance.as_chunks().0;
    for (row, out) in src.chunks_exact(row_len).zip(dst.chunks_exact_mut(row_len / N * B)) {
        let fact = row_fact(row);
        for ((x, w), block) in row.as_chunks().0.iter().zip(importance).zip(out.as_chunks_mut().0) {
            weighted(&fact, x, w, block);
        }
    }
}

/// Decodes block after block.
#[inline(always)]
pub(crate) fn decode_blocks<const N: usize, const B: usize>(
    src: &[u8],
    dst: &mut [f32],
    decode: impl Fn(&[u8; B], &mut [f32; N]),
) {
    for (block, x) in src.as_chunks().0.iter().zip(dst.as_chunks_mut().0) {
        decode(block, x);
    }
}

/// Writes a binary16 at byte `offset`.
#[inline(always)]
pub(crate) fn put_f16(block: &mut [u8], offset: usize, value: f32) {
    block[offset..offset + 2].copy_from_slice(&f32_to_f16(value).to_le_bytes());
}

/// Reads the binary16 at byte `offset`.
#[inline(always)]
pub(crate) fn get_f16(block: &[u8], offset: usize) -> f32 {
    f16_to_f32(u16::from_le_bytes([block[offset], block[offset + 1]]))
}

/// Sum of squares in the order of the weights.
#[inline(always)]
pub(crate) fn sum_of_squares(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |sum, v| sum + v * v)
}

/// Importance weighed up by magnitude: `importance * sqrt(sigma2 + x^2)`, the weight of an error in most searches.
#[inline(always)]
pub(crate) fn error_weights<const N: usize>(x: &[f32; N], importance: &[f32; N], sigma2: f32) -> [f32; N] {
    std::array::from_fn(|i| importance[i] * (sigma2 + x[i] * x[i]).sqrt())
}

/// Largest magnitude, 0 for a block of zeros.
#[inline(always)]
pub(crate) fn largest_magnitude<const N: usize>(x: &[f32; N]) -> f32 {
    // Eight running maxima; the order of comparisons does not change a maximum.
    let mut lanes = [0.0f32; 8];
    for chunk in x.as_chunks::<8>().0 {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane = if *lane > v.abs() { *lane } else { v.abs() };
        }
    }
    fold_halves(lanes, |max, v| if max > v { max } else { v })
}
