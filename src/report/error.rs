//! What can be wrong with a comparison.

use crate::eval::EvalError;
use crate::gguf::GgufError;
use crate::progress::Interrupted;
use crate::quant::QuantError;

/// Why files could not be compared.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// Data could not be read.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The same tensor has different shapes: the files are of different models.
    #[error("{file}: tensor {tensor} has shape {found}, the base's {expected}; the files are of different models")]
    Shape {
        /// The file.
        file: String,
        /// Tensor name, quoted.
        tensor: String,
        /// Shape found.
        found: String,
        /// Shape in the base.
        expected: String,
    },
    /// A tensor's type has no decoder.
    #[error("{file}: tensor {tensor}: {source}")]
    Decode {
        /// The file.
        file: String,
        /// Tensor name, quoted.
        tensor: String,
        /// Why.
        source: QuantError,
    },
    /// The run was stopped.
    #[error("interrupted")]
    Interrupted(#[from] Interrupted),
    /// A model, the text or a task file is not usable.
    #[error(transparent)]
    Eval(#[from] EvalError),
    /// The folder of tasks cannot be read.
    #[error("{folder}: the folder of tasks cannot be read: {source}")]
    TaskFolder {
        /// The folder.
        folder: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The folder of tasks holds none.
    #[error("{folder}: holds no task files (.txt HellaSwag, .csv WinoGrande, .bin or .jsonl)")]
    NoTasks {
        /// The folder.
        folder: String,
    },
    /// A plot could not be drawn.
    #[error("a plot cannot be drawn: {0}")]
    Plot(String),
}
