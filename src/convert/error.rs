//! What can be wrong with a model folder.

use std::io;
use std::path::PathBuf;

use crate::gguf::GgufError;
use crate::quant::QuantError;
use crate::workers;

/// Why a folder cannot be converted. Every message is one line: the file, the field or tensor, what was found, what
/// to do.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The path is not a model folder.
    #[error("{}: {problem}", .path.display())]
    Folder {
        /// The path given.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A file cannot be read.
    #[error("{}: cannot read: {source}", .file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A file that should be JSON is not, or is not what its name says.
    #[error("{}: {problem}", .file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A field of a JSON file is missing, of another type, or out of range.
    #[error("{}: {field} {problem}", .file.display())]
    Field {
        /// The file.
        file: PathBuf,
        /// The field's path.
        field: String,
        /// What is wrong and what to do.
        problem: String,
    },
    /// The architecture is not in the table.
    #[error("{}: architectures is {found}, which lwq cannot convert; known: {known}", .file.display())]
    Architecture {
        /// The configuration file.
        file: PathBuf,
        /// Value found.
        found: String,
        /// All names of the table, comma separated.
        known: String,
    },
    /// A safetensors file or the index over several is damaged.
    #[error("{}: {problem}", .file.display())]
    Shard {
        /// The file.
        file: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A tensor is missing, unknown, or of another shape or type than the configuration implies.
    #[error("{}: tensor {tensor} {problem}", .file.display())]
    Tensor {
        /// The file that holds it, or the folder.
        file: PathBuf,
        /// The tensor's name, quoted.
        tensor: String,
        /// What is wrong and what to do.
        problem: String,
    },
    /// The architecture needs a tensor that is not there.
    #[error("{}: tensor {tensor} is missing; {class} needs it with shape {shape}, download the weights again", .file.display())]
    Missing {
        /// The folder.
        file: PathBuf,
        /// The tensor's name, quoted.
        tensor: String,
        /// The class that needs it.
        class: String,
        /// Its shape, rows first.
        shape: String,
    },
    /// The folder holds tensors that the architecture does not have.
    #[error(
        "{}: {} {tensors} {} not part of {class} with {layers} layers; {advice}", .path.display(),
        if *.plural { "tensors" } else { "tensor" }, if *.plural { "are" } else { "is" }
    )]
    Unknown {
        /// The folder.
        path: PathBuf,
        /// The first names, quoted, and how many there are besides.
        tensors: String,
        /// More than one.
        plural: bool,
        /// The class that `config.json` names.
        class: String,
        /// The layers that `config.json` names.
        layers: u64,
        /// What the folder seems to be, and what to do.
        advice: String,
    },
    /// The pre-tokenizer is none that the engine's tokenizer knows.
    #[error(
        "{}: this pre-tokenizer is not known; not understood: {parts}; name the right one with --pre NAME, one of: \
         {known}", .file.display()
    )]
    PreTokenizer {
        /// tokenizer.json.
        file: PathBuf,
        /// The parts that match no family, comma separated.
        parts: String,
        /// All names.
        known: String,
    },
    /// Weights could not be encoded.
    #[error("{}: tensor {tensor}: {source}", .file.display())]
    Codec {
        /// The file that holds it.
        file: PathBuf,
        /// The tensor's name, quoted.
        tensor: String,
        /// The codec's answer.
        source: QuantError,
    },
    /// The GGUF cannot be laid out or written.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A worker thread panicked; a bug of this program.
    #[error("{}", workers::PANICKED)]
    Panicked,
    /// The run was stopped.
    #[error("{0}")]
    Interrupted(#[from] crate::progress::Interrupted),
}

impl From<workers::Panicked> for ConvertError {
    fn from(_: workers::Panicked) -> ConvertError {
        ConvertError::Panicked
    }
}
