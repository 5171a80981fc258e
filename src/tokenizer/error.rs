//! What can be wrong with a file's vocabulary.

use crate::gguf::{GgufError, shown};

/// Why no tokenizer could be made from a file's metadata. Each message is one line.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A key of another type than the format says.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A kind of tokenizer that is not implemented.
    #[error("{file}: tokenizer.ggml.model is {found}, which lwq does not support; supported are {supported}")]
    Model {
        /// The file.
        file: String,
        /// The value, quoted.
        found: String,
        /// The values that would do.
        supported: String,
    },
    /// A pre-tokenizer that is not in the table.
    #[error(
        "{file}: unknown pre-tokenizer {found} from {origin}; choose the one that the model was trained with by --pre \
         NAME, known are {known}"
    )]
    PreTokenizer {
        /// The file.
        file: String,
        /// The name, quoted.
        found: String,
        /// Where the name came from: the metadata key or the override.
        origin: &'static str,
        /// All names.
        known: String,
    },
    /// Values that contradict each other or themselves.
    #[error("{file}: {key} {problem}; {advice}")]
    Key {
        /// The file.
        file: String,
        /// The metadata key.
        key: String,
        /// What was found and what was expected.
        problem: String,
        /// What to do.
        advice: &'static str,
    },
}

const CONVERT_AGAIN: &str = "the vocabulary is damaged, convert the model again";

impl TokenizerError {
    pub(super) fn key(file: &str, key: &str, problem: impl Into<String>) -> TokenizerError {
        TokenizerError::Key { file: file.into(), key: key.into(), problem: problem.into(), advice: CONVERT_AGAIN }
    }

    pub(super) fn pre_tokenizer(file: &str, name: &[u8], origin: &'static str) -> TokenizerError {
        let known: Vec<_> = super::pretokenize::known_names().collect();
        TokenizerError::PreTokenizer { file: file.into(), found: shown(name), origin, known: known.join(" ") }
    }
}
