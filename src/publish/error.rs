//! What can go wrong on the way to a repository.

use std::path::{Path, PathBuf};

use crate::atomic_file::OutputError;
use crate::convert::ConvertError;
use crate::eval::EvalError;
use crate::export::ExportError;
use crate::gguf::GgufError;
use crate::imatrix::ImatrixError;
use crate::measure::MeasureError;
use crate::model::ModelError;
use crate::moments::MomentsError;
use crate::plan::PlanError;
use crate::progress::Interrupted;
use crate::quantize::QuantizeError;
use crate::report::ReportError;
use crate::text::TextError;

/// Errors of publishing a model. Each is one line that names the file and says what to do.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// What was asked for cannot be done.
    #[error("{0}")]
    Choice(String),
    /// A file or folder is not what it should be.
    #[error("{}: {problem}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong, and what to do.
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
    /// The template of the card is wrong.
    #[error("{file}: {problem}")]
    Template {
        /// The template.
        file: String,
        /// What is wrong, and where.
        problem: String,
    },
    /// The model cannot be run, so nothing can be measured.
    #[error("{file}: {source}; lwq publish measures what files lose, so it has to run the model")]
    CannotRun {
        /// The model.
        file: String,
        /// What is wrong.
        source: Box<ModelError>,
    },
    /// The run was stopped; the same command goes on.
    #[error("{0}")]
    Interrupted(#[from] Interrupted),
    /// The source could not be read.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The folder could not be converted.
    #[error(transparent)]
    Convert(#[from] ConvertError),
    /// The importance matrix could not be made or read.
    #[error(transparent)]
    Imatrix(#[from] ImatrixError),
    /// The model could not be measured.
    #[error(transparent)]
    Measure(Box<MeasureError>),
    /// A plan could not be made.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The pass for feedback could not be prepared.
    #[error(transparent)]
    Moments(#[from] MomentsError),
    /// A file could not be quantized.
    #[error(transparent)]
    Quantize(#[from] QuantizeError),
    /// A folder could not be exported.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// Files could not be compared.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// Files could not be evaluated.
    #[error(transparent)]
    Eval(#[from] EvalError),
    /// A text could not be read.
    #[error(transparent)]
    Text(#[from] TextError),
    /// A file could not be written.
    #[error(transparent)]
    Output(#[from] OutputError),
}

impl From<MeasureError> for PublishError {
    fn from(error: MeasureError) -> PublishError {
        PublishError::Measure(Box::new(error))
    }
}

impl PublishError {
    /// A file or folder that is not what it should be.
    pub(super) fn file(path: &Path, problem: impl Into<String>) -> PublishError {
        PublishError::File { path: path.to_owned(), problem: problem.into() }
    }

    /// An error of the system, for `map_err`.
    pub(super) fn io<'p>(path: &'p Path, action: &'static str) -> impl Fn(std::io::Error) -> PublishError + use<'p> {
        move |source| PublishError::Io { path: path.to_owned(), action, source }
    }
}
