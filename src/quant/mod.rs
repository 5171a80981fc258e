//! Block formats: rows of floats to bytes and back, exactly as ggml's x86-64 reference does.
//!
//! Knows blocks, not files. Every type is a [`Codec`] row in one table; the functions work on whole rows so
//! that a kernel may put many blocks of one or several rows into its lanes at once.
//!
//! The bytes are those of `ggml_quantize_chunk` at llama.cpp b10605, which is compiled without fused
//! multiply-add: every sum is a single-precision sum in the order of the weights, every product is rounded.
//! Rust never contracts or reorders float operations by itself, so plain code keeps that promise.

mod error;
pub(crate) mod float16;
mod grid;
pub mod kernels;
mod lanes;
mod levels;
pub(crate) mod round;
mod search;
pub(crate) mod shape;
#[cfg(test)]
mod tests;
pub(crate) mod types;
mod validate;

use crate::gguf::{TensorType, TypeInfo};

pub use error::QuantError;
pub use validate::validate;

pub(crate) use validate::first_non_finite;
use validate::{ScaleField, ScaleFormat};

use shape::BlockShape;
use types::{float, fp4, iq1, iq2, iq3, iq4, legacy, low_bit, q2_k, q3_k, q4_k, q5_k, q6_k, q8_k, ternary};

/// Quantizes `src` (rows of `row_len` weights each, row-major) into `dst`. `importance`, when given, holds
/// `row_len` non-negative weights, one per column, shared by all rows.
///
/// The lengths are the caller's promise (see [`quantize_rows`], which checks them); a wrong length panics or
/// leaves blocks unwritten, it is never undefined behaviour.
pub type QuantizeFn = fn(src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]);

/// Decodes consecutive blocks of `src` into `dst`.
pub type DequantizeFn = fn(src: &[u8], dst: &mut [f32]);

/// The encoder and decoder of one tensor type.
#[doc(alias = "ggml_type_traits")]
#[derive(Debug)]
pub struct Codec {
    /// The type that this row encodes and decodes.
    pub ty: TensorType,
    /// `None` for types that are only read, such as Q8_K.
    pub quantize: Option<QuantizeFn>,
    /// Decoder; exactly the floats of ggml's `to_float`.
    pub dequantize: DequantizeFn,
    /// The floats inside a block that must be finite in sound data, see [`validate`].
    scales: &'static [ScaleField],
    needs_importance: bool,
    /// How weights follow from what a block stores, where its scales are at hand.
    pub(crate) shape: Option<BlockShape>,
}

/// Shorthand for the table: a little-endian binary16 at byte `offset` of the block, called `name` in ggml.
const fn f16(name: &'static str, offset: usize) -> ScaleField {
    ScaleField { name, offset, format: ScaleFormat::F16 }
}

/// A row for a type that is read but not written.
const fn read_only(ty: TensorType, dequantize: DequantizeFn, scales: &'static [ScaleField]) -> Codec {
    Codec { ty, quantize: None, dequantize, scales, needs_importance: false, shape: None }
}

/// A row for a type with encoder and decoder.
const fn both(ty: TensorType, quantize: QuantizeFn, dequantize: DequantizeFn, scales: &'static [ScaleField]) -> Codec {
    Codec { quantize: Some(quantize), ..read_only(ty, dequantize, scales) }
}

const D: &[ScaleField] = &[f16("d", 0)];
const D_AND_M: &[ScaleField] = &[f16("d", 0), f16("m", 2)];
const D_AND_DMIN: &[ScaleField] = &[f16("d", 0), f16("dmin", 2)];
const F32_VALUE: ScaleField = ScaleField { name: "value", offset: 0, format: ScaleFormat::F32 };
const BF16_VALUE: ScaleField = ScaleField { name: "value", offset: 0, format: ScaleFormat::Bf16 };
const MXFP4_EXPONENT: ScaleField = ScaleField { name: "e", offset: 0, format: ScaleFormat::E8m0 };
const IQ1_M_SCALE: ScaleField = ScaleField { name: "d", offset: 48, format: ScaleFormat::Iq1mNibbles };
const Q8_K_SCALE: ScaleField = ScaleField { name: "d", offset: 0, format: ScaleFormat::F32 };

/// One row per type, in the order of the ids.
pub static CODECS: &[Codec] = &[
    both(TensorType::F32, float::quantize_f32, float::dequantize_f32, &[F32_VALUE]),
    both(TensorType::F16, float::quantize_f16, float::dequantize_f16, &[f16("value", 0)]),
    both(TensorType::Q4_0, legacy::quantize_q4_0, legacy::dequantize_q4_0, D).of_shape(shape::Q4_0),
    both(TensorType::Q4_1, legacy::quantize_q4_1, legacy::dequantize_q4_1, D_AND_M).of_shape(shape::Q4_1),
    both(TensorType::Q5_0, legacy::quantize_q5_0, legacy::dequantize_q5_0, D).of_shape(shape::Q5_0),
    both(TensorType::Q5_1, legacy::quantize_q5_1, legacy::dequantize_q5_1, D_AND_M).of_shape(shape::Q5_1),
    both(TensorType::Q8_0, legacy::quantize_q8_0, legacy::dequantize_q8_0, D).of_shape(shape::Q8_0),
    both(TensorType::Q2_K, q2_k::quantize, q2_k::dequantize, &[f16("d", q2_k::D), f16("dmin", q2_k::DMIN)])
        .of_shape(shape::Q2_K),
    both(TensorType::Q3_K, q3_k::quantize, q3_k::dequantize, &[f16("d", q3_k::D)]).of_shape(shape::Q3_K),
    both(TensorType::Q4_K, q4_k::quantize, q4_k::dequantize, D_AND_DMIN).of_shape(shape::Q4_K),
    both(TensorType::Q5_K, q5_k::quantize, q5_k::dequantize, D_AND_DMIN).of_shape(shape::Q5_K),
    both(TensorType::Q6_K, q6_k::quantize, q6_k::dequantize, &[f16("d", q6_k::D)]).of_shape(shape::Q6_K),
    read_only(TensorType::Q8_K, q8_k::dequantize, &[Q8_K_SCALE]),
    both(TensorType::IQ2_XXS, iq2::quantize_iq2_xxs, iq2::dequantize_iq2_xxs, D)
        .of_shape(shape::IQ2_XXS)
        .needing_importance(),
    both(TensorType::IQ2_XS, iq2::quantize_iq2_xs, iq2::dequantize_iq2_xs, D)
        .of_shape(shape::IQ2_XS)
        .needing_importance(),
    both(TensorType::IQ3_XXS, iq3::quantize_iq3_xxs, iq3::dequantize_iq3_xxs, D).of_shape(shape::IQ3_XXS),
    both(TensorType::IQ1_S, iq1::quantize_iq1_s, iq1::dequantize_iq1_s, D).needing_importance(),
    both(TensorType::IQ4_NL, iq4::quantize_iq4_nl, iq4::dequantize_iq4_nl, D).of_shape(shape::IQ4_NL),
    both(TensorType::IQ3_S, iq3::quantize_iq3_s, iq3::dequantize_iq3_s, D).of_shape(shape::IQ3_S),
    both(TensorType::IQ2_S, iq2::quantize_iq2_s, iq2::dequantize_iq2_s, D).of_shape(shape::IQ2_S),
    both(TensorType::IQ4_XS, iq4::quantize_iq4_xs, iq4::dequantize_iq4_xs, D).of_shape(shape::IQ4_XS),
    both(TensorType::IQ1_M, iq1::quantize_iq1_m, iq1::dequantize_iq1_m, &[IQ1_M_SCALE]),
    both(TensorType::BF16, float::quantize_bf16, float::dequantize_bf16, &[BF16_VALUE]),
    both(TensorType::TQ1_0, ternary::quantize_tq1_0, ternary::dequantize_tq1_0, &[f16("d", ternary::TQ1_0_D)]),
    both(TensorType::TQ2_0, ternary::quantize_tq2_0, ternary::dequantize_tq2_0, &[f16("d", ternary::TQ2_0_D)]),
    both(TensorType::MXFP4, fp4::quantize_mxfp4, fp4::dequantize_mxfp4, &[MXFP4_EXPONENT]),
    // Every byte is a sound scale of NVFP4.
    both(TensorType::NVFP4, fp4::quantize_nvfp4, fp4::dequantize_nvfp4, &[]),
    both(TensorType::Q1_0, low_bit::quantize_q1_0, low_bit::dequantize_q1_0, D),
    both(TensorType::Q2_0, low_bit::quantize_q2_0, low_bit::dequantize_q2_0, D),
];

impl Codec {
    /// True if there is no encoding without importance weights (`ggml_quantize_requires_imatrix`).
    #[doc(alias = "ggml_quantize_requires_imatrix")]
    pub fn needs_importance(&self) -> bool {
        self.needs_importance
    }

    /// The row of a type that has no encoding without importance.
    const fn needing_importance(self) -> Codec {
        Codec { needs_importance: true, ..self }
    }

    /// The row of a type whose blocks have a shape.
    const fn of_shape(self, shape: BlockShape) -> Codec {
        Codec { shape: Some(shape), ..self }
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
/// finite; others do not panic but yield useless blocks.
///
/// # Errors
/// [`QuantError`] when the type has no encoder or any length disagrees; nothing is written then.
#[doc(alias = "ggml_quantize_chunk")]
#[doc(alias = "encode")]
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
    kernels::quantizer(ty).unwrap_or(quantize)(src, row_len, importance, dst);
    Ok(())
}

/// Decodes `src` into `dst`, whole blocks; the checked way to a [`DequantizeFn`].
///
/// # Errors
/// [`QuantError`] when the type has no decoder or `src` is not exactly as long as `dst.len()` encoded weights.
#[doc(alias = "to_float")]
#[doc(alias = "decode")]
pub fn dequantize(ty: TensorType, src: &[u8], dst: &mut [f32]) -> Result<(), QuantError> {
    let (codec, info) = checked_codec(ty)?;
    let expected = encoded_bytes(ty, info, dst.len())?;
    if src.len() != expected {
        return Err(QuantError::EncodedLength { ty, weights: dst.len(), expected, found: src.len() });
    }
    kernels::dequantizer(ty).unwrap_or(codec.dequantize)(src, dst);
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
