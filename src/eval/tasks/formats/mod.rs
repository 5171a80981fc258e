//! The files that hold tasks: llama-perplexity's three formats, and JSON lines.
//!
//! JSON lines: one object per line; blank lines and unknown fields are passed over.
//!
//! | kind | fields |
//! |---|---|
//! | HellaSwag | `context` (string), `endings` (four strings), `label` (index of the right one, 0 to 3) |
//! | WinoGrande | `sentence` (string with one `_`), `option1`, `option2` (strings), `answer` (1 or 2) |
//! | multiple choice | `question` (string), `choices` (2 to 100 strings), `answer` (index from 0, or a list of them) |
//!
//! Numbers may also be written as strings, as some data sets do.

mod binary;
mod hellaswag;
mod json_lines;
mod winogrande;

pub(super) use binary::multiple_choice;
pub(super) use hellaswag::hellaswag;
pub(super) use json_lines::{json_lines, kind_of};
pub(super) use winogrande::winogrande;

use super::TaskError;
use crate::gguf::shown;

/// Most answers that a task may have, as in llama-perplexity.
pub(super) const MOST_ANSWERS: usize = 100;

/// Bytes of a foreign text that a message quotes.
const QUOTED_BYTES: usize = 60;

/// What the parsers need to know beside the bytes.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    /// Path for messages.
    pub file: &'a str,
    /// The whole file.
    pub bytes: &'a [u8],
    /// Reproduce what llama-perplexity makes of the file.
    pub llama_compat: bool,
}

impl Source<'_> {
    pub(crate) fn error(&self, problem: impl Into<String>) -> TaskError {
        TaskError::File { file: self.file.to_owned(), problem: problem.into() }
    }

    /// `line` counts from 0.
    pub(crate) fn line_error(&self, line: usize, problem: impl Into<String>) -> TaskError {
        TaskError::Line { file: self.file.to_owned(), line: line + 1, problem: problem.into() }
    }
}

/// Cuts at line feeds; a line feed at the end begins no further line. A byte order mark and carriage returns before
/// line feeds are dropped.
fn lines(bytes: &[u8]) -> Vec<&[u8]> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    raw_lines(bytes).into_iter().map(|line| line.strip_suffix(b"\r").unwrap_or(line)).collect()
}

/// As [`lines`], every other byte kept.
fn raw_lines(bytes: &[u8]) -> Vec<&[u8]> {
    if bytes.is_empty() {
        return Vec::new();
    }
    bytes.strip_suffix(b"\n").unwrap_or(bytes).split(|&byte| byte == b'\n').collect()
}

/// A foreign text in quotes, shortened for a message.
fn quoted(text: &[u8]) -> String {
    if text.len() <= QUOTED_BYTES { shown(text) } else { format!("{}...", shown(&text[..QUOTED_BYTES])) }
}

/// A small number written in digits, blanks around it allowed.
fn small_number(text: &[u8]) -> Option<u32> {
    std::str::from_utf8(text).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_end_at_line_feeds() {
        assert!(lines(b"").is_empty());
        assert_eq!(lines(b"\xef\xbb\xbfa\r\n\nb"), [&b"a"[..], b"", b"b"]);
        assert_eq!(lines(b"a\n\n"), [&b"a"[..], b""]);
        assert_eq!(raw_lines(b"a\r\nb\n"), [&b"a\r"[..], b"b"]);
    }

    #[test]
    fn quotes_are_short_and_one_line() {
        assert_eq!(quoted(b"a\nb"), shown(b"a\nb"));
        assert!(quoted(&[b'x'; 5000]).len() < 100);
    }
}
