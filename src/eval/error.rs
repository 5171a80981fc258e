//! What can be wrong with an evaluation.

use std::path::PathBuf;

use crate::atomic_file::OutputError;
use crate::model::ModelError;

/// Errors of evaluating models.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// The forward pass failed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A model of several failed.
    #[error("{model}: {source}")]
    OneModel {
        /// `model N`: its place among the models of the run, from 1; the reference counts as none.
        model: String,
        /// Why.
        source: ModelError,
    },
    /// Too little text.
    #[error(
        "the text has {found} tokens; at least two windows of {n_ctx} are needed, {needed}; give a longer text or a smaller context"
    )]
    TextTooShort {
        /// Tokens found.
        found: usize,
        /// Tokens of a window.
        n_ctx: usize,
        /// Tokens needed.
        needed: usize,
    },
    /// A window in which nothing can be scored.
    #[error("{reason}")]
    BadWindow {
        /// What is wrong.
        reason: String,
    },
    /// Models of other vocabularies cannot be compared.
    #[error(
        "{model} has a vocabulary of {found} tokens, the reference one of {expected}; only models of one vocabulary can be compared"
    )]
    VocabularySize {
        /// The model, named as in [`EvalError::OneModel`].
        model: String,
        /// Its size.
        found: usize,
        /// The size of the reference.
        expected: usize,
    },
    /// A file of saved logits is damaged or of another model.
    #[error("{}: {field} {found}; {advice}", path.display())]
    BadLogitsFile {
        /// The file.
        path: PathBuf,
        /// What was looked at.
        field: String,
        /// What was found.
        found: String,
        /// What to do.
        advice: String,
    },
    /// A file of kept windows is damaged or none.
    #[error("{}: {found}; name another --state file", path.display())]
    BadState {
        /// The file.
        path: PathBuf,
        /// What was found.
        found: String,
    },
    /// A file could not be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A file could not be written.
    #[error(transparent)]
    Output(#[from] OutputError),
}
