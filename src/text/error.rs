//! What can be wrong with a text.

use std::io;
use std::path::PathBuf;

use super::NotText;
use crate::tokenizer::TokenizerError;

/// Errors of reading a text and of cutting it into tokens.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A file could not be read.
    #[error("{}: cannot read the text: {source}; check the path and its permissions", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A file is no text, or one in another encoding.
    #[error("{name}: {source}")]
    NotText {
        /// The file.
        name: String,
        /// What it is.
        source: NotText,
    },
    /// The text is too short for two sequences.
    #[error(
        "{name}: {tokens} tokens, but at least two sequences of {n_ctx} are needed; give a longer text or a smaller --calibration-ctx"
    )]
    TooShort {
        /// The text's name.
        name: String,
        /// Tokens that it has.
        tokens: usize,
        /// Tokens of a sequence.
        n_ctx: usize,
    },
    /// The model has no vocabulary that is known.
    #[error("{file}: {source}")]
    Tokenizer {
        /// The model.
        file: String,
        /// What is wrong.
        source: TokenizerError,
    },
    /// The vocabulary and the embedding do not belong together.
    #[error("{file}: the vocabulary has {tokens} tokens, but the embedding only {rows} rows; the file is damaged")]
    Vocabulary {
        /// The model.
        file: String,
        /// Tokens of the vocabulary.
        tokens: usize,
        /// Rows of the embedding.
        rows: usize,
    },
}
