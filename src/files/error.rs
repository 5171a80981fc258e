//! Why a file cannot be split, merged, compared, edited or taken apart.

use std::io;
use std::path::PathBuf;

use crate::atomic_file::OutputError;
use crate::gguf::GgufError;
use crate::progress::Interrupted;
use crate::quantize::QuantizeError;
use crate::rows::RowError;
use crate::workers;

/// Errors of the verbs over whole files. Each is one line that names the file, tensor or key and says what to do.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// A file cannot be read, or its content is wrong.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// An output cannot be made.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// An output cannot be written.
    #[error("{}: cannot write: {source}; check the free space of the disk", .file.display())]
    Write {
        /// The file.
        file: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// What was asked for does not go with this file.
    #[error("{file}: {problem}")]
    Refused {
        /// The file, as it is shown.
        file: String,
        /// What was found, and what to do.
        problem: String,
    },
    /// Weights cannot be decoded.
    #[error("{file}: {source}")]
    Rows {
        /// The file, as it is shown.
        file: String,
        /// Which tensor, and why.
        source: RowError,
    },
    /// A value cannot be what readers of its key expect.
    #[error("{file}: {source}")]
    Value {
        /// The file, as it is shown.
        file: String,
        /// Which key, and what it takes.
        source: Box<QuantizeError>,
    },
    /// The run was stopped.
    #[error("{0}")]
    Interrupted(#[from] Interrupted),
    /// A worker thread panicked; a bug of this program.
    #[error("{}", workers::PANICKED)]
    Panicked,
}

impl FilesError {
    /// A refusal that names the file.
    pub(super) fn refused(file: &str, problem: impl Into<String>) -> FilesError {
        FilesError::Refused { file: crate::display::printable(file), problem: problem.into() }
    }
}

impl From<workers::Panicked> for FilesError {
    fn from(_: workers::Panicked) -> FilesError {
        FilesError::Panicked
    }
}
