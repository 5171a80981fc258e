//! What can be wrong with an evaluation.

use std::path::PathBuf;

use super::tasks::TaskError;
use crate::atomic_file::OutputError;
use crate::gguf::GgufError;
use crate::model::ModelError;
use crate::progress::Interrupted;
use crate::text::TextError;

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
        source: Box<ModelError>,
    },
    /// A file holds no model that can be run.
    #[error("{file}: {source}")]
    OpenModel {
        /// The file.
        file: String,
        /// Why.
        source: Box<ModelError>,
    },
    /// The metadata of a model cannot be read.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The text or the tokenizer is not usable.
    #[error(transparent)]
    Text(#[from] TextError),
    /// Something is wrong with what this file holds or does.
    #[error("{file}: {source}")]
    InFile {
        /// The file, or the names of several.
        file: String,
        /// What is wrong.
        source: Box<EvalError>,
    },
    /// Windows are longer than what the model was trained for.
    #[error("{file}: windows of {n_ctx} tokens are longer than the model's context of {trained}; give a smaller --ctx")]
    LongWindows {
        /// The model.
        file: String,
        /// Tokens of a window.
        n_ctx: usize,
        /// Tokens of the model's context.
        trained: usize,
    },
    /// Tasks were to be allowed more tokens than the model was trained for.
    #[error("{file}: --ctx {n_ctx} is longer than the model's context of {trained}")]
    LongTasks {
        /// The model.
        file: String,
        /// Tokens asked for.
        n_ctx: usize,
        /// Tokens of the model's context.
        trained: usize,
    },
    /// Models have other tokens.
    #[error("{file}: the vocabulary {difference} as in {base}; only models of one vocabulary can be compared")]
    OtherTokens {
        /// The model.
        file: String,
        /// Where it differs.
        difference: String,
        /// The model that it is compared with.
        base: String,
    },
    /// Embeddings have another number of rows.
    #[error(
        "{file}: the embedding has {found} rows, that of {base} has {expected}; only models of one vocabulary can be compared"
    )]
    OtherEmbedding {
        /// The model.
        file: String,
        /// Its rows.
        found: usize,
        /// The model that it is compared with.
        base: String,
        /// That one's rows.
        expected: usize,
    },
    /// Saved logits have another vocabulary than the model.
    #[error("{logits}: n_vocab is {found}, {file} has {expected}; the logits are those of another model")]
    OtherLogits {
        /// The file of logits.
        logits: String,
        /// Its vocabulary.
        found: usize,
        /// The model.
        file: String,
        /// That one's vocabulary.
        expected: usize,
    },
    /// Tasks cannot be scored.
    #[error(transparent)]
    Tasks(#[from] TaskError),
    /// The run was stopped before anything was scored.
    #[error("interrupted")]
    Interrupted(#[from] Interrupted),
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

impl EvalError {
    /// The same error with the file that it is about.
    pub(crate) fn in_file(self, file: impl Into<String>) -> EvalError {
        EvalError::InFile { file: file.into(), source: Box::new(self) }
    }

    /// Whether a forward pass was cancelled.
    pub(super) fn is_cancelled(&self) -> bool {
        let cancelled = |error: &ModelError| matches!(error, ModelError::Interrupted);
        match self {
            EvalError::Model(error) => cancelled(error),
            EvalError::OneModel { source, .. } => cancelled(source),
            _ => false,
        }
    }
}
