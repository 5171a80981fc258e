//! What can be wrong with a call into this module.

use thiserror::Error;

use crate::gguf::TensorType;
use crate::quant::QuantError;

/// Errors of rounding. The caller adds the name of the tensor.
#[derive(Debug, Error, Clone, PartialEq)]
pub enum FeedbackError {
    /// The type is not rounded with feedback.
    #[error("type {ty} cannot be rounded with feedback; round it by search")]
    NoFeedback {
        /// The type asked for.
        ty: TensorType,
    },
    /// Weights and second moments belong to different inputs.
    #[error("rows of {row_len} weights cannot be rounded with second moments of {found} inputs")]
    Inputs {
        /// Weights per row.
        row_len: usize,
        /// Inputs of the second moments.
        found: usize,
    },
    /// Rows and second moments of gradients belong to different outputs.
    #[error("{rows} rows of weights cannot be rounded with second moments of {found} gradients")]
    Outputs {
        /// Rows of weights.
        rows: usize,
        /// Gradients of the second moments.
        found: usize,
    },
    /// A weight is NaN or infinite.
    #[error("weight {index} is {value}, not a finite number; the source is damaged")]
    NonFinite {
        /// Index in the rows given.
        index: usize,
        /// The weight.
        value: f32,
    },
    /// The memory for the factor of the second moments cannot be had.
    #[error("second moments of {n} inputs do not fit into memory; use a smaller model or rounding by search")]
    TooLarge {
        /// Inputs.
        n: usize,
    },
    /// Lengths or types that no block format takes.
    #[error(transparent)]
    Quant(#[from] QuantError),
}
