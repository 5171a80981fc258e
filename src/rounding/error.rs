//! What can stop a pass that rounds a model.

use std::path::PathBuf;

use crate::atomic_file::OutputError;
use crate::feedback::FeedbackError;
use crate::gguf::{GgufError, TensorType};
use crate::model::ModelError;
use crate::quant::QuantError;

/// Errors of rounding with the model's own inputs.
#[derive(Debug, thiserror::Error)]
pub enum RoundingError {
    /// The forward pass failed or was interrupted.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A file could not be read or laid out.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// An output file could not be made.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// Second moments could not be made.
    #[error(transparent)]
    Feedback(#[from] FeedbackError),
    /// The text is too short for two sequences.
    #[error(
        "{name}: {tokens} tokens, but at least two sequences of {n_ctx} are needed; give a longer text or a smaller --calibration-ctx"
    )]
    TextTooShort {
        /// The text's name.
        name: String,
        /// Tokens that it has.
        tokens: usize,
        /// Tokens of a sequence.
        n_ctx: usize,
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
    /// A tensor cannot be rounded.
    #[error("tensor {tensor}: {problem}")]
    Rounding {
        /// The tensor's name.
        tensor: String,
        /// What refused it.
        problem: String,
    },
    /// No way of rounding gave sound blocks.
    #[error("tensor {tensor}: the weights are too large for {ty} ({source}); give it another type with --tensor-type")]
    Overflow {
        /// The tensor's name.
        tensor: String,
        /// The wanted type.
        ty: TensorType,
        /// Which block is wrong.
        source: QuantError,
    },
    /// What an earlier run left is damaged or belongs to another run.
    #[error("{}: {problem}", path.display())]
    Checkpoint {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// The system refused.
    #[error("{}: {action}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// Whoever looks at the inputs cannot go on.
    #[error("{0}")]
    Visitor(String),
}

impl RoundingError {
    /// True if the run was interrupted.
    pub fn is_interrupt(&self) -> bool {
        matches!(self, RoundingError::Model(ModelError::Interrupted))
    }
}
