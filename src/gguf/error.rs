//! What can be wrong with a GGUF file, each on one line: file, field or tensor, what was found, what to do.

use std::io;

use super::cursor::CutShort;

/// Why a GGUF file could not be read or written. Names are shown escaped and cut to a bearable length, so that
/// a hostile file cannot write to a terminal or flood it.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The system refused to open, map or write a file.
    #[error("{file}: cannot {action}: {source}; {advice}")]
    Io {
        /// The file.
        file: String,
        /// What was tried, such as `open the file`.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
        /// What to do.
        advice: &'static str,
    },
    /// The file became shorter while it was open.
    #[error("{file}: was cut short while in use; restore it and run again")]
    CutInUse {
        /// The file.
        file: String,
    },
    /// A path that names no regular file.
    #[error("{file}: is {found}, not a regular file; give the path of a GGUF file")]
    NotAFile {
        /// The path.
        file: String,
        /// What the path names.
        found: &'static str,
    },
    /// The first four bytes are not `GGUF`.
    #[error("{file}: not a GGUF file: {found}; {advice}")]
    NotGguf {
        /// The file.
        file: String,
        /// How it begins.
        found: String,
        /// What to do.
        advice: &'static str,
    },
    /// A version that is neither 2 nor 3.
    #[error("{file}: GGUF version {found} is not supported, only 2 and 3 are; {advice}")]
    Version {
        /// The file.
        file: String,
        /// The version, as a little-endian number.
        found: u32,
        /// What to do.
        advice: &'static str,
    },
    /// The file ends inside something.
    #[error(
        "{file}: cut short: {item} at byte {offset} needs {needed} bytes, {available} are left; \
         download or copy the file again"
    )]
    CutShort {
        /// The file.
        file: String,
        /// What was being read.
        item: String,
        /// Where it starts, in bytes from the start of the file.
        offset: u64,
        /// Bytes needed.
        needed: u64,
        /// Bytes left in the file.
        available: u64,
    },
    /// A count in the header that the file cannot hold or that no reader should follow.
    #[error("{file}: header field {field} is {found}, {problem}; download or convert the file again")]
    Header {
        /// The file.
        file: String,
        /// `n_tensors` or `n_kv`.
        field: &'static str,
        /// The count.
        found: i64,
        /// What is wrong with it.
        problem: String,
    },
    /// A metadata key or value that breaks the format.
    #[error("{file}: metadata key {key}: {problem}; {advice}")]
    Key {
        /// The file.
        file: String,
        /// The key, quoted and escaped, or its number where it has no usable name.
        key: String,
        /// What was found and what is allowed.
        problem: String,
        /// What to do.
        advice: &'static str,
    },
    /// A key that is absent where it is needed.
    #[error("{file}: metadata key {key:?} is missing; this file lacks what the command needs, convert the model again")]
    MissingKey {
        /// The file.
        file: String,
        /// The key.
        key: String,
    },
    /// A metadata value of another type than the caller needs.
    #[error(
        "{file}: metadata key {key} is of type {found}, expected {expected}; convert the model again or override the key"
    )]
    ValueType {
        /// The file.
        file: String,
        /// The key, quoted and escaped.
        key: String,
        /// The type, and the value where it matters.
        found: String,
        /// The types that would do.
        expected: &'static str,
    },
    /// A tensor's description that breaks the format.
    #[error("{file}: tensor {tensor}: {problem}; {advice}")]
    Tensor {
        /// The file.
        file: String,
        /// The name, quoted and escaped, or its number where it has no usable name.
        tensor: String,
        /// What was found and what is allowed.
        problem: String,
        /// What to do.
        advice: &'static str,
    },
    /// The shards of a split model do not fit together.
    #[error("{file}: {problem}; {advice}")]
    Split {
        /// The shard at fault.
        file: String,
        /// What was found and what was expected.
        problem: String,
        /// What to do.
        advice: String,
    },
    /// A writer was asked for something that the format or its plan does not allow.
    #[error("{file}: cannot write: {problem}")]
    Write {
        /// The file to be written.
        file: String,
        /// What does not fit, and what would.
        problem: String,
    },
}

/// Advice for bytes that no writer produces.
pub(crate) const DAMAGED: &str = "the file is damaged or hostile, download or convert it again";

/// Names longer than this many characters are cut in messages.
const SHOWN_CHARS: usize = 80;

/// A byte string as a quoted literal for messages: control characters and invalid UTF-8 escaped, long ones cut.
pub fn shown(bytes: &[u8]) -> String {
    // Four bytes are the longest UTF-8 character: a longer prefix cannot be needed.
    let prefix = &bytes[..bytes.len().min(SHOWN_CHARS * 4 + 4)];
    let mut text = String::from("\"");
    let mut chars = 0;
    'all: for chunk in prefix.utf8_chunks() {
        for c in chunk.valid().chars() {
            if chars == SHOWN_CHARS {
                break 'all;
            }
            text.extend(c.escape_debug());
            chars += 1;
        }
        for byte in chunk.invalid() {
            if chars == SHOWN_CHARS {
                break 'all;
            }
            text.push_str(&format!("\\x{byte:02x}"));
            chars += 1;
        }
    }
    text.push('"');
    if chars == SHOWN_CHARS && bytes.len() > SHOWN_CHARS {
        text.push_str(&format!("... ({} bytes)", bytes.len()));
    }
    text
}

/// A path for messages: as it is, control characters escaped.
pub(crate) fn shown_path(path: &std::path::Path) -> String {
    let text = path.to_string_lossy();
    if text.chars().any(char::is_control) { text.escape_debug().to_string() } else { text.into_owned() }
}

/// Names the thing that a short read was for.
pub(crate) trait During<T> {
    /// Turns a short read into an error about `item` of `file`.
    fn during(self, file: &str, item: impl FnOnce() -> String) -> Result<T, GgufError>;
}

impl<T> During<T> for Result<T, CutShort> {
    fn during(self, file: &str, item: impl FnOnce() -> String) -> Result<T, GgufError> {
        self.map_err(|cut| GgufError::CutShort {
            file: file.to_owned(),
            item: item(),
            offset: cut.offset,
            needed: cut.needed,
            available: cut.available,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_shown_without_control_characters_and_cut() {
        assert_eq!(shown(b"blk.0\x1b[2J\n"), r#""blk.0\u{1b}[2J\n""#);
        assert_eq!(shown(b"a\xffb"), r#""a\xffb""#);
        assert_eq!(shown("right\u{202e}left".as_bytes()), r#""right\u{202e}left""#);
        let long = shown(&vec![b'x'; 1 << 20]);
        assert!(long.len() < 120 && long.ends_with("... (1048576 bytes)"), "{long}");
        assert_eq!(shown(&[b'x'; 80]).len(), 82);
    }
}
