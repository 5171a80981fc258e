//! What can go wrong with a measurement.

use super::WeightErrorProblem;
use crate::model::ModelError;
use crate::moments::MomentsError;
use crate::progress::Interrupted;
use crate::rows::RowError;

/// Errors of measuring a model.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// The forward pass failed.
    #[error(transparent)]
    Model(ModelError),
    /// The pass that shows second moments failed.
    #[error(transparent)]
    Moments(MomentsError),
    /// The measurement was stopped.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
    /// Rows of a tensor could not be read.
    #[error(transparent)]
    Rows(#[from] RowError),
    /// A tensor does not fit its input.
    #[error("tensor {tensor}: {problem}")]
    Tensor {
        /// The tensor's name.
        tensor: String,
        /// What is wrong.
        problem: String,
    },
    /// A tensor could not be rounded.
    #[error(transparent)]
    Weights(#[from] WeightErrorProblem),
    /// A file of an earlier measurement is damaged.
    #[error("{}: {reason}", path.display())]
    BadFile {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// The result could not be saved.
    #[error(transparent)]
    Output(#[from] crate::atomic_file::OutputError),
}

impl From<ModelError> for MeasureError {
    fn from(error: ModelError) -> MeasureError {
        match error {
            ModelError::Interrupted => MeasureError::Interrupted(Interrupted),
            other => MeasureError::Model(other),
        }
    }
}

impl From<MomentsError> for MeasureError {
    fn from(error: MomentsError) -> MeasureError {
        match error {
            MomentsError::Interrupted(interrupted) => MeasureError::Interrupted(interrupted),
            other => MeasureError::Moments(other),
        }
    }
}
