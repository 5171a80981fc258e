//! What can be wrong with a call into this module, or with the blocks it is given.

use thiserror::Error;

use crate::gguf::TensorType;

/// Errors of the checked front functions. The caller adds the name of the tensor.
#[derive(Debug, Error, Clone, PartialEq)]
pub enum QuantError {
    /// Neither encoder nor decoder exists.
    #[error("type {ty} cannot be converted to or from floats")]
    NoCodec {
        /// The type asked for.
        ty: TensorType,
    },
    /// The type can be read but is no storage type to write.
    #[error("type {ty} can be read but not written; choose another target type")]
    NoEncoder {
        /// The type asked for.
        ty: TensorType,
    },
    /// A row is not a whole number of blocks.
    #[error(
        "a row of {row_len} weights does not divide into {ty} blocks of {block_len}; choose a type with smaller blocks"
    )]
    RowLength {
        /// The type asked for.
        ty: TensorType,
        /// Weights per row.
        row_len: usize,
        /// Weights per block.
        block_len: usize,
    },
    /// The weights are not a whole number of rows.
    #[error("{weights} weights for {ty} are not a whole number of rows of {row_len}")]
    PartialRow {
        /// The type asked for.
        ty: TensorType,
        /// Weights given.
        weights: usize,
        /// Weights per row.
        row_len: usize,
    },
    /// The format is too coarse to be of use without knowing which weights matter.
    #[error("type {ty} needs importance weights; give an imatrix or choose another target type")]
    NeedsImportance {
        /// The type asked for.
        ty: TensorType,
    },
    /// Importance weights do not cover the row.
    #[error("{found} importance weights for {ty} rows of {row_len} weights; one per column is needed")]
    ImportanceLength {
        /// The type asked for.
        ty: TensorType,
        /// Importance weights given.
        found: usize,
        /// Weights per row.
        row_len: usize,
    },
    /// The buffer of encoded bytes has the wrong length.
    #[error("{weights} weights of type {ty} take {expected} bytes, but the buffer has {found}")]
    EncodedLength {
        /// The type asked for.
        ty: TensorType,
        /// Number of weights.
        weights: usize,
        /// Bytes that they take.
        expected: usize,
        /// Bytes that the buffer has.
        found: usize,
    },
    /// A stored scale or value is not a finite number.
    #[error("{ty} block {block}: {field} is {value}, not a finite number; the source is damaged")]
    NonFinite {
        /// The type of the data.
        ty: TensorType,
        /// Index of the block, counted from 0 (of the value for F32, F16, BF16).
        block: usize,
        /// ggml's name of the field.
        field: &'static str,
        /// `NaN`, `inf` or `-inf` (or the raw exponent of MXFP4).
        value: String,
    },
}
