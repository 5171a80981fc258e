//! Texts: built-in ones and files, their tokens in a model's vocabulary, and the sequences that a model sees.
//!
//! A [`Text`] is bytes with a name; files are read by [`read_text`], which takes UTF-8 and what can be made it.
//! [`open_tokenizer`] cuts it as the model wants it, and [`Sequences`] are what passes
//! over the layers run on. `lwq eval` cuts its windows itself, as llama-perplexity does.

mod built_in;
mod decode;
mod error;
mod read;
mod sequences;

use std::path::PathBuf;

pub use built_in::Set;
pub use decode::NotText;
pub(crate) use decode::{Remark, UTF8_MARK, decode, known_kind, utf8};
pub use error::TextError;
pub use read::{read_text, read_text_from};
pub use sequences::Sequences;

use crate::display::printable;
use crate::model::Model;
use crate::progress::Watch;
use crate::tokenizer::Tokenizer;

/// Tokens of a sequence or window where nothing else is asked for and the model's context is not shorter.
pub(crate) const DEFAULT_CONTEXT: usize = 512;

/// One or several documents with the names that messages and records call them.
#[derive(Clone, Debug)]
pub struct Text {
    parts: Vec<Part>,
}

/// A document.
#[derive(Clone, Debug)]
struct Part {
    name: String,
    bytes: Vec<u8>,
    built_in: bool,
}

impl Text {
    /// One that is compiled in.
    pub fn built_in(set: Set) -> Text {
        Text {
            parts: vec![Part { name: set.name().to_owned(), bytes: set.text().as_bytes().to_vec(), built_in: true }],
        }
    }

    /// A document of your own; its bytes are taken as they are.
    pub fn new(name: impl Into<String>, bytes: impl Into<Vec<u8>>) -> Text {
        Text { parts: vec![Part { name: name.into(), bytes: bytes.into(), built_in: false }] }
    }

    /// Files, each a document; `watch` gets what [`read_text`] says of them.
    ///
    /// # Errors
    /// When one cannot be read or is no text.
    pub fn read(files: &[PathBuf], watch: &dyn Watch) -> Result<Text, TextError> {
        let part = |path: &PathBuf| {
            let bytes = read_text(path, watch)?;
            Ok(Part { name: path.display().to_string(), bytes, built_in: false })
        };
        Ok(Text { parts: files.iter().map(part).collect::<Result<_, TextError>>()? })
    }

    /// Files, or where there are none the text that is compiled in.
    ///
    /// # Errors
    /// When a file cannot be read or is no text.
    pub fn read_or(files: &[PathBuf], set: Set, watch: &dyn Watch) -> Result<Text, TextError> {
        if files.is_empty() { Ok(Text::built_in(set)) } else { Text::read(files, watch) }
    }

    /// The names of all documents in one line.
    pub fn name(&self) -> String {
        self.parts.iter().map(|part| part.name.as_str()).collect::<Vec<_>>().join(", ")
    }

    /// The same under the names of the files without their folders, as files that are passed on name them.
    #[must_use]
    pub fn without_folders(mut self) -> Text {
        for part in self.parts.iter_mut().filter(|part| !part.built_in) {
            if let Some(name) = std::path::Path::new(&part.name).file_name() {
                part.name = name.to_string_lossy().into_owned();
            }
        }
        self
    }

    /// The documents with the SHA-256 of all their bytes, in hexadecimal.
    pub fn digests(&self) -> impl Iterator<Item = (&str, String)> {
        use sha2::{Digest, Sha256};
        self.parts.iter().map(|part| (part.name.as_str(), format!("{:x}", Sha256::digest(&part.bytes))))
    }

    /// True if it is compiled in.
    pub fn is_built_in(&self) -> bool {
        self.parts.iter().all(|part| part.built_in)
    }

    /// The documents with their names, each as llama.cpp's tools read a text file: without one final newline.
    pub fn documents(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.parts.iter().map(|part| (part.name.as_str(), part.bytes.strip_suffix(b"\n").unwrap_or(&part.bytes)))
    }

    /// All documents, one after the other with a newline between. A built-in text stands as it is, with its final newline:
    /// digests in files that were made with it depend on that.
    pub fn joined(&self) -> Vec<u8> {
        if let [Part { bytes, built_in: true, .. }] = self.parts.as_slice() {
            return bytes.clone();
        }
        let mut text = Vec::new();
        for (_, bytes) in self.documents() {
            if !text.is_empty() {
                text.push(b'\n');
            }
            text.extend_from_slice(bytes);
        }
        text
    }
}

/// The tokenizer in a model's file, checked against the size of the embedding; `watch` gets its warnings. `pre` is used
/// instead of the pre-tokenizer that the file names.
///
/// # Errors
/// When the file has none that is known, or one of more tokens than the embedding has rows.
pub fn open_tokenizer(model: &Model<'_>, pre: Option<&str>, watch: &dyn Watch) -> Result<Tokenizer, TextError> {
    let file = || printable(model.gguf().label());
    let tokenizer = Tokenizer::from_gguf(model.gguf().metadata(), pre)
        .map_err(|source| TextError::Tokenizer { file: file(), source })?;
    tokenizer.warnings().iter().for_each(|line| watch.warn(line));
    if tokenizer.len() > model.n_vocab() {
        return Err(TextError::Vocabulary { file: file(), tokens: tokenizer.len(), rows: model.n_vocab() });
    }
    Ok(tokenizer)
}

/// Tokens of a piece of calibration text, which may be longer than what the model was trained for; `what` names such
/// pieces in the warning about that.
pub(crate) fn calibration_context(asked: Option<usize>, model: &Model<'_>, what: &str, watch: &dyn Watch) -> usize {
    let trained = model.hparams().n_ctx_train;
    let Some(asked) = asked else { return DEFAULT_CONTEXT.min(trained.max(8)) };
    if asked > trained {
        watch.warn(&format!("{what} of {asked} tokens are longer than the model's context of {trained}"));
    }
    asked
}

/// BOS of a vocabulary that adds it.
pub(crate) fn leading_bos(tokenizer: &Tokenizer) -> Option<u32> {
    tokenizer.adds_bos().then(|| tokenizer.bos()).flatten()
}
