//! What can stop a run that rounds with feedback.

use std::path::PathBuf;

use super::super::write::Overflow;
use crate::atomic_file::OutputError;
use crate::gguf::GgufError;
use crate::moments::{GradientsError, MomentsError};
use crate::progress::Interrupted;
use crate::rows::RowError;

/// Errors of rounding with the model's own inputs.
#[derive(Debug, thiserror::Error)]
pub enum RoundingError {
    /// The pass over the layers failed.
    #[error(transparent)]
    Moments(MomentsError),
    /// Moments of gradients could not be read.
    #[error(transparent)]
    Gradients(#[from] GradientsError),
    /// The run was stopped.
    #[error("{0}")]
    Interrupted(#[from] Interrupted),
    /// Rows could not be read.
    #[error(transparent)]
    Rows(#[from] RowError),
    /// Unfinished work could not be read or laid out.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// An output file could not be made.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// A tensor cannot be rounded.
    #[error("tensor {tensor}: {problem}")]
    Rounding {
        /// The tensor's name.
        tensor: String,
        /// What refused it.
        problem: String,
    },
    /// No way of rounding gave sound blocks.
    #[error("{0}")]
    Overflow(Overflow),
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
}

impl From<MomentsError> for RoundingError {
    fn from(error: MomentsError) -> RoundingError {
        match error {
            MomentsError::Interrupted(interrupted) => RoundingError::Interrupted(interrupted),
            other => RoundingError::Moments(other),
        }
    }
}
