//! Why a run stopped.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::Overflow;
use crate::gguf::GgufError;
use crate::progress::Interrupted;
use crate::quant::QuantError;
use crate::rows::RowError;
use crate::workers;

/// Why a run stopped.
#[derive(Debug, Error)]
pub enum PipelineError {
    /// The source file could not be read.
    #[error(transparent)]
    Read(#[from] GgufError),
    /// Rows of the source cannot be used.
    #[error("{file}: {source}")]
    Rows {
        /// The source file.
        file: String,
        /// Which one and why.
        source: Box<RowError>,
    },
    /// The codec refused.
    #[error("{file}: tensor {tensor}: {source}")]
    Codec {
        /// The source file.
        file: String,
        /// The tensor's name.
        tensor: String,
        /// The codec's answer.
        source: QuantError,
    },
    /// Encoding gave numbers that are not finite, though the weights are: they are too large for the type.
    #[error("{file}: {overflow}")]
    Overflow {
        /// The source file.
        file: String,
        /// Which weight.
        overflow: Overflow,
    },
    /// The output could not be written.
    #[error("{}: cannot write: {source}", .file.display())]
    Write {
        /// The output file.
        file: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The output could not be read again.
    #[error("{}: cannot read what was written: {source}", .file.display())]
    ReadBack {
        /// The output file.
        file: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The run was stopped.
    #[error("{0}")]
    Interrupted(#[from] Interrupted),
    /// A worker thread panicked; a bug of this program.
    #[error("{}", workers::PANICKED)]
    Panicked,
}

impl From<workers::Panicked> for PipelineError {
    fn from(_: workers::Panicked) -> PipelineError {
        PipelineError::Panicked
    }
}
