//! Block formats: rows of floats to bytes and back, exactly as ggml's x86-64 reference does.
//!
//! Knows blocks, not files. Every type is a [`Codec`] row in one table; the functions work on whole rows so
//! that a kernel may put many blocks of one or several rows into its lanes at once.

use crate::gguf::TensorType;

/// Quantizes `src` (rows of `row_len` weights each, row-major) into `dst`. `importance`, when given, holds
/// `row_len` non-negative weights, one per column, shared by all rows.
pub type QuantizeFn = fn(src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]);

/// Decodes consecutive blocks of `src` into `dst`.
pub type DequantizeFn = fn(src: &[u8], dst: &mut [f32]);

/// The encoder and decoder of one tensor type.
pub struct Codec {
    /// The type that this row encodes and decodes.
    pub ty: TensorType,
    /// `None` for types that are only read, such as Q8_K.
    pub quantize: Option<QuantizeFn>,
    /// Decoder; exactly the floats of ggml's `to_float`.
    pub dequantize: DequantizeFn,
}
