//! Reading texts: the one way from a file or a pipe to the bytes that are cut into tokens.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use super::TextError;
use super::decode::{HEAD, Place, Remark, check_head, place_of_text};
use crate::display::printable;
use crate::progress::Watch;

/// Reads a file that is to be text in UTF-8. UTF-16 is decoded and a byte order mark left out; `watch` gets a line about that
/// and about lines that end in CRLF, which stay as they are.
///
/// # Errors
/// When it cannot be read, is no text, or is in another encoding.
pub fn read_text(path: &Path, watch: &dyn Watch) -> Result<Vec<u8>, TextError> {
    let failed = |source| TextError::Read { path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    read(file, &path.display().to_string(), failed, watch)
}

/// Reads a text from anything that gives bytes, such as stdin; see [`read_text`]. `name` is what messages call it.
///
/// # Errors
/// As [`read_text`].
pub fn read_text_from(input: impl Read, name: &str, watch: &dyn Watch) -> Result<Vec<u8>, TextError> {
    read(input, name, |source| TextError::Read { path: name.into(), source }, watch)
}

fn read(
    mut input: impl Read,
    name: &str,
    failed: impl Fn(io::Error) -> TextError,
    watch: &dyn Watch,
) -> Result<Vec<u8>, TextError> {
    let no_text = |source| TextError::NotText { name: name.to_owned(), source };
    let mut bytes = Vec::new();
    // A model given by mistake may be larger than memory.
    input.by_ref().take(HEAD as u64).read_to_end(&mut bytes).map_err(&failed)?;
    check_head(&bytes).map_err(no_text)?;
    input.read_to_end(&mut bytes).map_err(&failed)?;
    let decoded = place_of_text(&bytes).map_err(no_text)?;
    say(&decoded.remarks, name, watch);
    Ok(match decoded.place {
        Place::Decoded(text) => text.into_bytes(),
        Place::Within(range) => {
            bytes.truncate(range.end);
            bytes.drain(..range.start);
            bytes
        }
    })
}

fn say(remarks: &[Remark], name: &str, watch: &dyn Watch) {
    for remark in remarks {
        let line = printable(&format!("{name}: {remark}"));
        if remark.is_warning() { watch.warn(&line) } else { watch.note(&line) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives a model's first bytes and then fails, as nothing should read on.
    struct Endless(usize);

    impl Read for Endless {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            self.0 += out.len();
            if self.0 > 4 * HEAD {
                return Err(io::Error::other("read too far"));
            }
            out.fill(0);
            Ok(out.len())
        }
    }

    #[test]
    fn binary_input_is_refused_from_its_beginning() {
        let error = read_text_from(Endless(0), "stdin", &()).unwrap_err().to_string();
        assert!(error.starts_with("stdin: byte 0 is NUL"), "{error}");
    }

    #[test]
    fn a_character_may_lie_across_the_end_of_the_beginning() {
        let text = format!("{}€ and on", "a".repeat(HEAD - 1));
        assert_eq!(read_text_from(text.as_bytes(), "t", &()).unwrap(), text.as_bytes());
        let text = format!("{}🦀 and on", "ab ".repeat(HEAD / 6)).replacen("ab", "b", 1);
        let wide: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert_eq!(read_text_from(wide.as_slice(), "t", &()).unwrap(), text.as_bytes());
    }
}
