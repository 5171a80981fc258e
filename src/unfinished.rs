//! What an interrupted run leaves, and how the same command goes on with it.
//!
//! Unfinished work lies beside the output, as `OUTPUT.partial`: a file for `lwq imatrix` and `lwq measure`, a folder for
//! `lwq quantize --rounding feedback` and for `lwq export`. Files of it that hold numbers carry the [`Conditions`] under which
//! they were made, or the export's own form of them. The next run takes over what has the same conditions, refuses the rest with
//! what differs, and removes it when the output is there.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::gguf::{Gguf, Metadata, fingerprint};

/// Where the unfinished work of `output` lies.
pub fn partial_path(output: &Path) -> PathBuf {
    with_suffix(output, ".partial")
}

/// Folder of the hidden states of a run whose result is `output`.
pub(crate) fn states_folder(output: &Path) -> PathBuf {
    with_suffix(output, ".states")
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// The note of a run that goes on: `done` of `total` pieces, such as steps, are there.
pub(crate) fn going_on(done: usize, total: usize, pieces: &str) -> String {
    format!("going on after {done} of {total} {pieces} of an earlier run")
}

/// What a run that was stopped says.
pub(crate) const GOES_ON: &str = "interrupted: the same command goes on with what is done";

/// SHA-256 of tokens, in hexadecimal.
pub(crate) fn tokens_sha256(tokens: &[u32]) -> String {
    let mut hash = Sha256::new();
    tokens.iter().for_each(|token| hash.update(token.to_le_bytes()));
    format!("{:x}", hash.finalize())
}

/// Settings of so many bytes are shown when they differ.
const SHOWN_SETTINGS: usize = 80;

/// All that unfinished work depends on, each part under the name that a message uses for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conditions {
    parts: Vec<(&'static str, String)>,
}

impl Conditions {
    /// The conditions of a run: the model, its texts as pairs of a name and a digest, and settings in words.
    pub fn new(model: &Gguf, texts: &[(&'static str, String)], settings: String) -> Conditions {
        let mut parts = vec![("model", fingerprint(model))];
        parts.extend(texts.iter().cloned());
        parts.push(("settings", settings));
        Conditions { parts }
    }

    /// Adds a key for each part to the metadata of a file.
    pub fn write(&self, metadata: &mut Metadata) {
        for (name, value) in &self.parts {
            metadata.set(&key(name), value.as_str());
        }
    }

    /// The first part in which `saved` differs, in words that follow "was made with".
    pub fn difference(&self, saved: &Metadata) -> Option<String> {
        self.parts.iter().find_map(|(name, value)| match saved.str(&key(name)) {
            Ok(Some(found)) if found == value => None,
            // Long settings hold digests, which say nothing to people.
            Ok(Some(_)) if *name == "settings" && value.len() > SHOWN_SETTINGS => {
                Some("other settings or types".to_owned())
            }
            Ok(Some(found)) if *name == "settings" => Some(format!("other settings ({found}, now {value})")),
            _ => Some(format!("another {name}")),
        })
    }
}

/// The metadata key of a part, or of another value that unfinished work needs.
pub(crate) fn key(part: &str) -> String {
    format!("lwq.checkpoint.{}", part.replace(' ', "_"))
}
