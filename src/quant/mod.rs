//! Block formats: rows of floats to bytes and back, exactly as ggml's x86-64 reference does.
//!
//! Knows blocks, not files. Every type is a [`Codec`] row in one table; the functions work on whole rows so
//! that a kernel may put many blocks of one or several rows into its lanes at once.
//!
//! The bytes are those of `ggml_quantize_chunk` at llama.cpp b10605, which is compiled without fused
//! multiply-add: every sum is a single-precision sum in the order of the weights, every product is rounded.
//! Rust never contracts or reorders float operations by itself, so plain code keeps that promise.

mod error;
pub mod float16;
pub mod grid;
pub mod round;
pub mod search;
pub mod types;
mod validate;

use crate::gguf::{TensorType, TypeInfo};

pub use error::QuantError;
pub use validate::{ScaleField, ScaleFormat, first_non_finite, validate};

use types::{float, iq1, iq2, iq3, iq4};

/// Quantizes `src` (rows of `row_len` weights each, row-major) into `dst`. `importance`, when given, holds
/// `row_len` non-negative weights, one per column, shared by all rows.
///
/// The lengths are the caller's promise (see [`quantize_rows`], which checks them); a wrong length panics or
/// leaves blocks unwritten, it is never undefined behaviour.
pub type QuantizeFn = fn(src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]);

/// Decodes consecutive blocks of `src` into `dst`.
pub type DequantizeFn = fn(src: &[u8], dst: &mut [f32]);

/// The encoder and decoder of one tensor type.
#[derive(Debug)]
pub struct Codec {
    /// The type that this row encodes and decodes.
    pub ty: TensorType,
    /// `None` for types that are only read, such as Q8_K.
    pub quantize: Option<QuantizeFn>,
    /// Decoder; exactly the floats of ggml's `to_float`.
    pub dequantize: DequantizeFn,
    /// The floats inside a block that must be finite in sound data, see [`validate`].
    pub scales: &'static [ScaleField],
}

/// Shorthand for the table: a little-endian binary16 at byte `offset` of the block, called `name` in ggml.
const fn f16(name: &'static str, offset: usize) -> ScaleField {
    ScaleField { name, offset, format: ScaleFormat::F16 }
}

/// One row per type, in the order of the ids.
pub static CODECS: &[Codec] = &[
    Codec {
        ty: TensorType::F32,
        quantize: Some(float::quantize_f32),
        dequantize: float::dequantize_f32,
        scales: &[ScaleField { name: "value", offset: 0, format: ScaleFormat::F32 }],
    },
    Codec {
        ty: TensorType::F16,
        quantize: Some(float::quantize_f16),
        dequantize: float::dequantize_f16,
        scales: &[f16("value", 0)],
    },
    Codec {
        ty: TensorType::IQ2_XXS,
        quantize: Some(iq2::quantize_iq2_xxs),
        dequantize: iq2::dequantize_iq2_xxs,
        scales: &[f16("d", 0)],
    },
    Codec {
        ty: TensorType::IQ2_XS,
        quantize: Some(iq2::quantize_iq2_xs),
        dequantize: iq2::dequantize_iq2_xs,
        scales: &[f16("d", 0)],
    },
    Codec {
        ty: TensorType::IQ3_XXS,
        quantize: Some(iq3::quantize_iq3_xxs),
        dequantize: iq3::dequantize_iq3_xxs,
        scales: &[f16("d", 0)],
    },
    Codec {
        ty: TensorType::IQ1_S,
        quantize: Some(iq1::quantize_iq1_s),
        dequantize: iq1::dequantize_iq1_s,
        scales: &[f16("d", 0)],
    },
    Codec {
        ty: TensorType::IQ4_NL,
        quantize: Some(iq4::quantize_iq4_nl),
        dequantize: iq4::dequantize_iq4_nl,
        scales: &[f16("d", 0)],
    },
    Codec {
        ty: TensorType::IQ3_S,
        quantize: Some(iq3::quantize_iq3_s),
        dequantize: iq3::dequantize_iq3_s,
        scales: &[f16("d", 0)],
    },
    Codec {
        ty: TensorType::IQ2_S,
        quantize: Some(iq2::quantize_iq2_s),
        dequantize: iq2::dequantize_iq2_s,
        scales: &[f16("d", 0)],
    },
    Codec {
        ty: TensorType::IQ4_XS,
        quantize: Some(iq4::quantize_iq4_xs),
        dequantize: iq4::dequantize_iq4_xs,
        scales: &[f16("d", 0)],
    },
    Codec {
        ty: TensorType::IQ1_M,
        quantize: Some(iq1::quantize_iq1_m),
        dequantize: iq1::dequantize_iq1_m,
        scales: &[ScaleField { name: "d", offset: 48, format: ScaleFormat::Iq1mNibbles }],
    },
    Codec {
        ty: TensorType::BF16,
        quantize: Some(float::quantize_bf16),
        dequantize: float::dequantize_bf16,
        scales: &[ScaleField { name: "value", offset: 0, format: ScaleFormat::Bf16 }],
    },
];

impl Codec {
    /// True if there is no encoding without importance weights (`ggml_quantize_requires_imatrix`).
    pub fn needs_importance(&self) -> bool {
        matches!(self.ty, TensorType::IQ2_XXS | TensorType::IQ2_XS | TensorType::IQ1_S)
    }
}

/// The codec of `ty`, or `None` for integers, F64, Q8_1 and unknown ids.
pub fn codec(ty: TensorType) -> Option<&'static Codec> {
    CODECS.iter().find(|row| row.ty == ty)
}

/// Quantizes whole rows; the checked way to a [`QuantizeFn`].
///
/// `src` is row-major, rows of `row_len` weights; `importance`, when given, holds one non-negative weight per
/// column and serves every row; `dst` must be exactly as long as the encoded rows. Weights are expected to be
/// finite ([`first_non_finite`] finds the one that is not); others do not panic but yield useless blocks.
///
/// # Errors
/// [`QuantError`] when the type has no encoder or any length disagrees; nothing is written then.
pub fn quantize_rows(
    ty: TensorType,
    src: &[f32],
    row_len: usize,
    importance: Option<&[f32]>,
    dst: &mut [u8],
) -> Result<(), QuantError> {
    let (codec, info) = checked_codec(ty)?;
    let quantize = codec.quantize.ok_or(QuantError::NoEncoder { ty })?;
    if row_len == 0 || !row_len.is_multiple_of(info.block_len) {
        return Err(QuantError::RowLength { ty, row_len, block_len: info.block_len });
    }
    if !src.len().is_multiple_of(row_len) {
        return Err(QuantError::PartialRow { ty, weights: src.len(), row_len });
    }
    if let Some(weights) = importance
        && weights.len() != row_len
    {
        return Err(QuantError::ImportanceLength { ty, found: weights.len(), row_len });
    }
    if importance.is_none() && codec.needs_importance() {
        return Err(QuantError::NeedsImportance { ty });
    }
    let expected = encoded_bytes(ty, info, src.len())?;
    if dst.len() != expected {
        return Err(QuantError::EncodedLength { ty, weights: src.len(), expected, found: dst.len() });
    }
    quantize(src, row_len, importance, dst);
    Ok(())
}

/// Decodes `src` into `dst`, whole blocks; the checked way to a [`DequantizeFn`].
///
/// # Errors
/// [`QuantError`] when the type has no decoder or `src` is not exactly as long as `dst.len()` encoded weights.
pub fn dequantize(ty: TensorType, src: &[u8], dst: &mut [f32]) -> Result<(), QuantError> {
    let (codec, info) = checked_codec(ty)?;
    let expected = encoded_bytes(ty, info, dst.len())?;
    if src.len() != expected {
        return Err(QuantError::EncodedLength { ty, weights: dst.len(), expected, found: src.len() });
    }
    (codec.dequantize)(src, dst);
    Ok(())
}

fn checked_codec(ty: TensorType) -> Result<(&'static Codec, &'static TypeInfo), QuantError> {
    match (codec(ty), ty.info()) {
        (Some(codec), Some(info)) => Ok((codec, info)),
        _ => Err(QuantError::NoCodec { ty }),
    }
}

/// Bytes of `weights` encoded weights.
fn encoded_bytes(ty: TensorType, info: &TypeInfo, weights: usize) -> Result<usize, QuantError> {
    info.row_bytes(weights as u64).and_then(|bytes| usize::try_from(bytes).ok()).ok_or(QuantError::RowLength {
        ty,
        row_len: weights,
        block_len: info.block_len,
    })
}
