//! What can go wrong with a measurement.

use super::WeightErrorProblem;
use crate::model::ModelError;

/// Errors of measuring a model.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// The forward pass failed or was interrupted.
    #[error(transparent)]
    Model(#[from] ModelError),
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
