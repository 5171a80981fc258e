//! What can go wrong while a folder is exported or checked.

use std::io;
use std::path::PathBuf;

use crate::atomic_file::OutputError;
use crate::convert::ConvertError;
use crate::gguf::GgufError;
use crate::measure::MeasureError;
use crate::moments::MomentsError;
use crate::quantize::QuantizeError;
use crate::workers;

/// Why an export failed. Every message is one line: the file or tensor, what was found, what to do.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The source folder cannot be read.
    #[error(transparent)]
    Source(#[from] ConvertError),
    /// The output cannot be made.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// A folder is not what it should be.
    #[error("{}: {problem}", .path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A file or folder cannot be read or written.
    #[error("{}: {action}: {source}", .path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// A choice that does not go with the scheme or the model.
    #[error("{0}")]
    Choice(String),
    /// The model cannot be run over the calibration text.
    #[error(transparent)]
    Moments(MomentsError),
    /// A GGUF that was to be made as well cannot be.
    #[error(transparent)]
    Quantize(Box<QuantizeError>),
    /// What bits are worth could not be measured.
    #[error(transparent)]
    Measure(Box<MeasureError>),
    /// The 16-bit model beside the output is damaged.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A matrix cannot be rounded.
    #[error("{module}: {problem}")]
    Rounding {
        /// Name of the module.
        module: String,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A worker thread panicked; a bug of this program.
    #[error("{}", workers::PANICKED)]
    Panicked,
    /// The run was stopped.
    #[error("{0}")]
    Interrupted(#[from] crate::progress::Interrupted),
}

impl From<workers::Panicked> for ExportError {
    fn from(_: workers::Panicked) -> ExportError {
        ExportError::Panicked
    }
}

impl From<QuantizeError> for ExportError {
    fn from(error: QuantizeError) -> ExportError {
        match error {
            QuantizeError::Interrupted(interrupted) => ExportError::Interrupted(interrupted),
            other => ExportError::Quantize(Box::new(other)),
        }
    }
}

impl From<MeasureError> for ExportError {
    fn from(error: MeasureError) -> ExportError {
        match error {
            MeasureError::Interrupted(interrupted) => ExportError::Interrupted(interrupted),
            MeasureError::NoPredictions { source, .. } => {
                ExportError::Choice(format!("{source}; nothing tells which matrices need 8 bits: leave --like-bpw out"))
            }
            other => ExportError::Measure(Box::new(other)),
        }
    }
}

impl From<MomentsError> for ExportError {
    fn from(error: MomentsError) -> ExportError {
        match error {
            MomentsError::Interrupted(interrupted) => ExportError::Interrupted(interrupted),
            other => ExportError::Moments(other),
        }
    }
}
