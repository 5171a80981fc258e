//! F32, F16 and BF16: plain numbers, little-endian, no blocks. Importance plays no part.

use crate::quant::float16::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};

/// Stores each weight as it is.
pub(crate) fn quantize_f32(src: &[f32], _row_len: usize, _importance: Option<&[f32]>, dst: &mut [u8]) {
    for (out, v) in dst.as_chunks_mut::<4>().0.iter_mut().zip(src) {
        *out = v.to_le_bytes();
    }
}

/// Reads each weight as it is.
pub(crate) fn dequantize_f32(src: &[u8], dst: &mut [f32]) {
    for (v, bytes) in dst.iter_mut().zip(src.as_chunks::<4>().0) {
        *v = f32::from_le_bytes(*bytes);
    }
}

/// Rounds each weight to binary16 (`ggml_fp32_to_fp16_row`).
#[inline(always)]
pub(crate) fn quantize_f16(src: &[f32], _row_len: usize, _importance: Option<&[f32]>, dst: &mut [u8]) {
    for (out, &v) in dst.as_chunks_mut::<2>().0.iter_mut().zip(src) {
        *out = f32_to_f16(v).to_le_bytes();
    }
}

/// Widens each binary16 (`ggml_fp16_to_fp32_row`).
pub(crate) fn dequantize_f16(src: &[u8], dst: &mut [f32]) {
    for (v, bytes) in dst.iter_mut().zip(src.as_chunks::<2>().0) {
        *v = f16_to_f32(u16::from_le_bytes(*bytes));
    }
}

/// Rounds each weight to bfloat16 (`ggml_fp32_to_bf16_row_ref`).
#[inline(always)]
pub(crate) fn quantize_bf16(src: &[f32], _row_len: usize, _importance: Option<&[f32]>, dst: &mut [u8]) {
    for (out, &v) in dst.as_chunks_mut::<2>().0.iter_mut().zip(src) {
        *out = f32_to_bf16(v).to_le_bytes();
    }
}

/// Widens each bfloat16 (`ggml_bf16_to_fp32_row`).
pub(crate) fn dequantize_bf16(src: &[u8], dst: &mut [f32]) {
    for (v, bytes) in dst.iter_mut().zip(src.as_chunks::<2>().0) {
        *v = bf16_to_f32(u16::from_le_bytes(*bytes));
    }
}
