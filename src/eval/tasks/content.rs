//! The bytes of a task file made ready for its format.

use std::borrow::Cow;

use super::{ReadOptions, TaskError, TaskFormat, TaskKind};
use crate::text::{Remark, UTF8_MARK, decode};

/// What a task file holds.
pub(super) struct Content<'b> {
    /// UTF-8, or the file's own bytes where its format is binary.
    pub text: Cow<'b, [u8]>,
    pub format: TaskFormat,
    /// What was guessed or left out, one line each.
    pub warnings: Vec<String>,
    /// What else was made of the file, one line each.
    pub notes: Vec<String>,
}

impl<'b> Content<'b> {
    /// # Errors
    /// When a format of text is asked for or found, and the bytes are no text.
    pub(super) fn of(
        file: &str,
        bytes: &'b [u8],
        kind: TaskKind,
        options: &ReadOptions,
    ) -> Result<Content<'b>, TaskError> {
        let decoded = decode(bytes);
        let format = options.format.unwrap_or_else(|| match &decoded {
            Ok((text, _)) => format_of(text),
            Err(_) => format_of(bytes),
        });
        if (format, kind) == (TaskFormat::Llama, TaskKind::MultipleChoice) {
            return Ok(Content { text: Cow::Borrowed(bytes), format, warnings: Vec::new(), notes: Vec::new() });
        }
        let wrong = |problem: String| TaskError::File { file: file.to_owned(), problem };
        let (mut text, remarks) = decoded.map_err(|error| wrong(error.to_string()))?;
        let keeps_bytes = options.llama_compat && format == TaskFormat::Llama;
        let (mut warnings, mut notes) = (Vec::new(), Vec::new());
        for remark in remarks {
            let line = match &remark {
                Remark::Mark if keeps_bytes => {
                    text = Cow::Owned([UTF8_MARK, &text].concat());
                    "the byte order mark is kept, as in llama-perplexity".to_owned()
                }
                Remark::Crlf(_) if keeps_bytes => remark.to_string(),
                Remark::Crlf(lines) => {
                    format!("lines end in CRLF ({lines} of them); the carriage returns are left out")
                }
                other => other.to_string(),
            };
            let list = if remark.is_warning() { &mut warnings } else { &mut notes };
            list.push(format!("{file}: {line}"));
        }
        Ok(Content { text, format, warnings, notes })
    }
}

/// JSON lines begin with an object. A binary file with the same first four bytes would count half a billion tasks.
fn format_of(bytes: &[u8]) -> TaskFormat {
    let text = bytes.trim_ascii_start();
    let printable = text.iter().take(4).all(|byte| (b' '..=b'~').contains(byte));
    if text.first() == Some(&b'{') && printable { TaskFormat::JsonLines } else { TaskFormat::Llama }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(bytes: &[u8], kind: TaskKind, llama_compat: bool) -> Result<Content<'_>, String> {
        let options = ReadOptions { llama_compat, ..ReadOptions::default() };
        Content::of("t", bytes, kind, &options).map_err(|error| error.to_string())
    }

    #[test]
    fn json_lines_are_recognized() {
        assert_eq!(format_of(b"\n{\"context\":"), TaskFormat::JsonLines);
        assert_eq!(format_of(&123u32.to_le_bytes()), TaskFormat::Llama);
        assert_eq!(format_of(b"0,\"a _\",b,c,1"), TaskFormat::Llama);
    }

    #[test]
    fn encodings_and_line_ends_are_told() {
        let wide: Vec<u8> = "\u{feff}{\"question\": \"é\"}\n".encode_utf16().flat_map(u16::to_le_bytes).collect();
        let found = content(&wide, TaskKind::MultipleChoice, false).unwrap();
        assert_eq!((found.format, &found.text[..]), (TaskFormat::JsonLines, "{\"question\": \"é\"}\n".as_bytes()));
        assert_eq!(found.notes, ["t: is UTF-16LE; decoded"]);
        let marked = b"\xef\xbb\xbfa\r\nb";
        let found = content(marked, TaskKind::HellaSwag, false).unwrap();
        assert!(&found.text[..] == b"a\r\nb" && found.notes[1].contains("are left out"), "{:?}", found.notes);
        let found = content(marked, TaskKind::HellaSwag, true).unwrap();
        assert!(&found.text[..] == marked && found.notes[0].contains("is kept"), "{:?}", found.notes);
    }

    #[test]
    fn only_formats_of_text_refuse_what_is_none() {
        let latin = b"caf\xe9\n0\nb\nc\nd\ne\n";
        for kind in [TaskKind::HellaSwag, TaskKind::WinoGrande] {
            let error = content(latin, kind, false).err().unwrap();
            assert!(error.starts_with("t: byte 3 (0xe9, in line 1) is not valid UTF-8"), "{error}");
        }
        assert_eq!(content(latin, TaskKind::MultipleChoice, false).unwrap().format, TaskFormat::Llama);
        assert!(content(b"{\"question\": \"caf\xe9\"}", TaskKind::MultipleChoice, false).is_err());
    }
}
