//! What can go wrong with a measurement.

use super::WeightErrorProblem;
use crate::imatrix::MatchError;
use crate::model::ModelError;
use crate::moments::{GradientsError, MomentsError};
use crate::progress::Interrupted;
use crate::recipe::RecipeError;
use crate::recipe::mtp::MtpError;
use crate::rows::RowError;
use crate::text::TextError;

/// Errors of measuring a model.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// The forward pass failed.
    #[error(transparent)]
    Model(ModelError),
    /// The model cannot be run.
    #[error("{file}: {source}")]
    OfModel {
        /// The model.
        file: String,
        /// What is wrong.
        source: ModelError,
    },
    /// The model predicts no next token.
    #[error("{file}: {source}; `lwq plan --method error` does without")]
    NoPredictions {
        /// The model.
        file: String,
        /// Why.
        source: ModelError,
    },
    /// The probe text is not usable.
    #[error("{name}: {source}")]
    Text {
        /// Its name.
        name: String,
        /// What is wrong.
        source: ModelError,
    },
    /// The file of gradients cannot be used.
    #[error(transparent)]
    Gradients(#[from] GradientsError),
    /// The model has no vocabulary that is known.
    #[error(transparent)]
    Vocabulary(#[from] TextError),
    /// The importance matrix does not fit the model.
    #[error(transparent)]
    Match(#[from] MatchError),
    /// A tensor is left without a type.
    #[error("{file}: {source}")]
    Types {
        /// The model.
        file: String,
        /// Which one and why.
        source: RecipeError,
    },
    /// The metadata do not say which blocks are layers.
    #[error("{file}: {source}")]
    Blocks {
        /// The model.
        file: String,
        /// What is wrong.
        source: MtpError,
    },
    /// No tensor's type can be chosen.
    #[error("{file}: holds no tensor that can be quantized; there is nothing to plan")]
    NothingToChoose {
        /// The model.
        file: String,
    },
    /// The pass that shows second moments failed.
    #[error(transparent)]
    Moments(MomentsError),
    /// The measurement was stopped.
    #[error("{0}")]
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
    /// The system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: std::path::PathBuf,
        /// The system's answer.
        source: std::io::Error,
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
