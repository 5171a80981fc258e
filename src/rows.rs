//! Rows of a tensor as floats: read, decoded and checked. Whoever rounds weights begins here.

use crate::gguf::{Gguf, GgufError, TensorInfo};
use crate::quant::{self, QuantError};

/// Why rows cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RowError {
    /// The file could not be read.
    #[error(transparent)]
    Read(#[from] GgufError),
    /// The source type has no decoder.
    #[error("tensor {tensor}: {source}")]
    Codec {
        /// The tensor's name.
        tensor: String,
        /// The codec's answer.
        source: QuantError,
    },
    /// A source weight is NaN or infinite.
    #[error("tensor {tensor}: weight {index} is {value}; such a model cannot be quantized, make the source file again")]
    NonFinite {
        /// The tensor's name.
        tensor: String,
        /// Index of the weight in the tensor, row-major.
        index: u64,
        /// The weight.
        value: f32,
    },
}

/// The rows `first..first + count` of a tensor, `[count, row_len]` row-major; rows of stacked matrices are counted through.
///
/// # Errors
/// When they cannot be read or decoded, or a weight is not finite.
pub(crate) fn read_rows(gguf: &Gguf, tensor: &TensorInfo, first: u64, count: u64) -> Result<Vec<f32>, RowError> {
    let data = gguf.read_rows(tensor, first, count)?;
    let mut weights = vec![0.0; (count * tensor.row_len()) as usize];
    decode(tensor, first, &data, &mut weights)?;
    Ok(weights)
}

/// Decodes the bytes of the rows from `first` on into `weights` and checks them.
///
/// # Errors
/// When they cannot be decoded, or a weight is not finite.
pub(crate) fn decode(tensor: &TensorInfo, first: u64, data: &[u8], weights: &mut [f32]) -> Result<(), RowError> {
    decode_any(tensor, data, weights)?;
    match quant::first_non_finite(weights) {
        Some(at) => Err(RowError::NonFinite {
            tensor: tensor.shown_name(),
            index: first * tensor.row_len() + at as u64,
            value: weights[at],
        }),
        None => Ok(()),
    }
}

/// As [`decode`], without a check of the weights.
///
/// # Errors
/// When they cannot be decoded.
pub(crate) fn decode_any(tensor: &TensorInfo, data: &[u8], weights: &mut [f32]) -> Result<(), RowError> {
    quant::dequantize(tensor.ty, data, weights)
        .map_err(|source| RowError::Codec { tensor: tensor.shown_name(), source })
}
