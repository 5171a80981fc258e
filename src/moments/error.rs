//! What can stop a pass that shows second moments.

use std::path::PathBuf;

use crate::atomic_file::OutputError;
use crate::gguf::GgufError;
use crate::model::ModelError;
use crate::progress::Interrupted;
use crate::rounding::gptq::FeedbackError;
use crate::rows::RowError;
use crate::text::TextError;

/// Errors of a pass over the layers.
#[derive(Debug, thiserror::Error)]
pub enum MomentsError {
    /// The forward pass failed.
    #[error(transparent)]
    Model(ModelError),
    /// The forward pass does not know the model.
    #[error("{file}: {source}; --rounding feedback runs the model, use --rounding search")]
    CannotRun {
        /// The model.
        file: String,
        /// What is wrong.
        source: Box<ModelError>,
    },
    /// A text is not usable.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The pass was stopped.
    #[error("{0}")]
    Interrupted(#[from] Interrupted),
    /// Rows of a matrix could not be read.
    #[error(transparent)]
    Rows(#[from] RowError),
    /// The file of hidden states could not be made.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// Second moments could not be made.
    #[error(transparent)]
    Feedback(#[from] FeedbackError),
    /// Moments of gradients cannot be used.
    #[error(transparent)]
    Gradients(#[from] GradientsError),
    /// The two texts show different inputs; a bug of this program.
    #[error("inputs of {tensor} differ between the texts; this is a bug, please report it")]
    Inputs {
        /// A weight that has the input.
        tensor: String,
    },
    /// The hidden states of an earlier run are not those of this one.
    #[error("{}: {problem}", path.display())]
    States {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// The system refused.
    #[error("{}: {action}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
}

/// Errors of files of gradients' moments.
#[derive(Debug, thiserror::Error)]
pub enum GradientsError {
    /// It is no readable container.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// It cannot be written.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// It holds something else.
    #[error("{}: {reason}", path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// A matrix's moment is unsound.
    #[error("{}: tensor {tensor} {problem}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The matrix, quoted.
        tensor: String,
        /// What is wrong.
        problem: String,
    },
    /// It belongs to another model.
    #[error("{}: was made with another model ({found}); measure the gradients of {model}", path.display())]
    OtherModel {
        /// The file.
        path: PathBuf,
        /// The model that it names, quoted.
        found: String,
        /// The model at hand.
        model: String,
    },
}

impl From<ModelError> for MomentsError {
    fn from(error: ModelError) -> MomentsError {
        match error {
            ModelError::Interrupted => MomentsError::Interrupted(Interrupted),
            other => MomentsError::Model(other),
        }
    }
}
