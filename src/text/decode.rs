//! From the bytes of a file to text in UTF-8.
//!
//! Tokenizers take any bytes, so a file in another encoding, or one that is no text at all, would give figures that nobody
//! notices to be wrong. What can be decoded without a doubt is, with a remark; everything else is refused.

use std::borrow::Cow;
use std::ops::Range;

use encoding_rs::{DecoderResult, Encoding, UTF_16BE, UTF_16LE};

/// Bytes from which it is told what a file is.
pub(super) const HEAD: usize = 64 << 10;

/// The byte order mark in UTF-8.
pub(crate) const UTF8_MARK: &[u8] = b"\xef\xbb\xbf";

/// Why bytes are not taken as a text. Messages follow the name of the file and a colon.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotText {
    /// A file of another kind.
    #[error("is {found}, no text; {advice}")]
    OtherFile {
        /// What it is.
        found: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// Bytes that no text has.
    #[error("byte {offset} is NUL; this is binary data, no text")]
    Binary {
        /// Place of the first one.
        offset: usize,
    },
    /// Text in an encoding that cannot be told.
    #[error(
        "byte {offset} (0x{byte:02x}, in line {line}) is not valid UTF-8; convert the text, from Windows-1252 for example with `iconv -f WINDOWS-1252 -t UTF-8`"
    )]
    NotUtf8 {
        /// Place of the first byte that is wrong.
        offset: usize,
        /// That byte.
        byte: u8,
        /// Its line, from 1.
        line: usize,
    },
    /// UTF-16 with a surrogate that stands alone.
    #[error(
        "byte {offset} is not valid {encoding}, which the text begins as; it is damaged, make it again or convert it to UTF-8"
    )]
    BadUtf16 {
        /// Place of the first code unit that is wrong.
        offset: usize,
        /// UTF-16LE or UTF-16BE.
        encoding: &'static str,
    },
    /// UTF-16 where only UTF-8 is read.
    #[error("is {encoding}; save it as UTF-8")]
    Utf16 {
        /// UTF-16LE or UTF-16BE.
        encoding: &'static str,
    },
}

/// Something that people should know of a text that was taken. Messages follow the name of the file and a colon.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Remark {
    /// It had another encoding.
    #[error("is {0}; decoded")]
    Utf16(&'static str),
    /// It has another encoding by all signs.
    #[error("looks like {0} without a byte order mark; decoded as such")]
    BareUtf16(&'static str),
    /// It had a mark that says nothing.
    #[error("the byte order mark at its beginning is left out")]
    Mark,
    /// Its last character is incomplete: so many bytes.
    #[error("ends in the middle of a character; its last bytes ({0}) are left out")]
    CutShort(usize),
    /// So many lines end as Windows ends them.
    #[error("lines end in CRLF ({0} of them); the carriage returns are kept and become tokens")]
    Crlf(usize),
}

impl Remark {
    /// True where something was lost or guessed.
    pub(crate) fn is_warning(&self) -> bool {
        matches!(self, Remark::BareUtf16(_) | Remark::CutShort(_))
    }
}

/// Where the text of some bytes is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// These bytes of them.
    Within(Range<usize>),
    /// What they were decoded to.
    Decoded(String),
}

/// The text of some bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Decoded {
    pub place: Place,
    pub remarks: Vec<Remark>,
}

/// The text of bytes that are a whole file, and what is to be said of it.
///
/// # Errors
/// When they are no text, or in an encoding that cannot be told.
pub(crate) fn decode(bytes: &[u8]) -> Result<(Cow<'_, [u8]>, Vec<Remark>), NotText> {
    let Decoded { place, remarks } = place_of_text(bytes)?;
    let text = match place {
        Place::Within(range) => Cow::Borrowed(&bytes[range]),
        Place::Decoded(text) => Cow::Owned(text.into_bytes()),
    };
    Ok((text, remarks))
}

/// The text of a file that is to be UTF-8, such as JSON, without a byte order mark.
///
/// # Errors
/// When it is something else.
pub(crate) fn utf8(bytes: &[u8]) -> Result<&str, NotText> {
    if let Some(other) = other_kind(bytes) {
        return Err(other);
    }
    if let Some((encoding, _)) = utf16_mark(bytes).or_else(|| Some((bare_utf16(bytes)?, 0))) {
        return Err(NotText::Utf16 { encoding: encoding.name() });
    }
    let start = if bytes.starts_with(UTF8_MARK) { UTF8_MARK.len() } else { 0 };
    std::str::from_utf8(&bytes[start..]).map_err(|error| not_utf8(bytes, start + error.valid_up_to()))
}

pub(super) fn place_of_text(bytes: &[u8]) -> Result<Decoded, NotText> {
    check_head(bytes)?;
    let mut remarks = Vec::new();
    if let Some((encoding, mark)) = utf16_mark(bytes) {
        remarks.push(Remark::Utf16(encoding.name()));
        return utf16(bytes, encoding, mark, remarks);
    }
    let start = if bytes.starts_with(UTF8_MARK) { UTF8_MARK.len() } else { 0 };
    let body = &bytes[start..];
    let valid = std::str::from_utf8(body);
    if let Some(nul) = memchr::memchr(0, body) {
        return match bare_utf16(bytes) {
            Some(encoding) => {
                remarks.push(Remark::BareUtf16(encoding.name()));
                utf16(bytes, encoding, 0, remarks)
            }
            None => Err(NotText::Binary { offset: start + nul }),
        };
    }
    let mut end = bytes.len();
    if let Err(error) = valid {
        let at = start + error.valid_up_to();
        if error.error_len().is_some() || error.valid_up_to() == 0 {
            return Err(not_utf8(bytes, at));
        }
        remarks.push(Remark::CutShort(end - at));
        end = at;
    }
    if start > 0 {
        remarks.push(Remark::Mark);
    }
    remarks.extend(carriage_returns(&bytes[start..end]));
    Ok(Decoded { place: Place::Within(start..end), remarks })
}

/// What can be told from the beginning of a file: refuses other kinds of files before they are read whole.
pub(super) fn check_head(bytes: &[u8]) -> Result<(), NotText> {
    if let Some(other) = other_kind(bytes) {
        return Err(other);
    }
    let head = &bytes[..bytes.len().min(HEAD)];
    match memchr::memchr(0, head) {
        Some(offset) if utf16_mark(bytes).is_none() && bare_utf16(bytes).is_none() => Err(NotText::Binary { offset }),
        _ => Ok(()),
    }
}

fn not_utf8(bytes: &[u8], offset: usize) -> NotText {
    let line = 1 + memchr::memchr_iter(b'\n', &bytes[..offset]).count();
    NotText::NotUtf8 { offset, byte: bytes.get(offset).copied().unwrap_or_default(), line }
}

fn carriage_returns(text: &[u8]) -> Option<Remark> {
    let lines = memchr::memmem::find_iter(text, b"\r\n").count();
    (lines > 0).then_some(Remark::Crlf(lines))
}

fn utf16_mark(bytes: &[u8]) -> Option<(&'static Encoding, usize)> {
    match bytes {
        [0xff, 0xfe, ..] => Some((UTF_16LE, 2)),
        [0xfe, 0xff, ..] => Some((UTF_16BE, 2)),
        _ => None,
    }
}

/// Decodes all after the mark. What is cut off in the middle of a character at the end is left out.
fn utf16(bytes: &[u8], encoding: &'static Encoding, mark: usize, mut remarks: Vec<Remark>) -> Result<Decoded, NotText> {
    let (text, end) = decode_utf16(&bytes[mark..], encoding);
    let offset = mark + end;
    let unit = |pair: [u8; 2]| if encoding == UTF_16LE { u16::from_le_bytes(pair) } else { u16::from_be_bytes(pair) };
    match bytes[offset..] {
        [] => {}
        [_] => remarks.push(Remark::CutShort(1)),
        [a, b] | [a, b, _] if (0xd800..0xdc00).contains(&unit([a, b])) => {
            remarks.push(Remark::CutShort(bytes.len() - offset))
        }
        _ => return Err(NotText::BadUtf16 { offset, encoding: encoding.name() }),
    }
    if text.contains('\0') {
        return Err(NotText::Binary { offset: mark + 2 * text.encode_utf16().position(|unit| unit == 0).unwrap_or(0) });
    }
    remarks.extend(carriage_returns(text.as_bytes()));
    Ok(Decoded { place: Place::Decoded(text), remarks })
}

/// The text up to the first code unit that is wrong, and the place of that one or the end.
fn decode_utf16(bytes: &[u8], encoding: &'static Encoding) -> (String, usize) {
    let mut decoder = encoding.new_decoder_without_bom_handling();
    let mut text = String::with_capacity(bytes.len() / 2 + 16);
    let mut at = 0;
    loop {
        let (result, read) = decoder.decode_to_string_without_replacement(&bytes[at..], &mut text, true);
        at += read;
        match result {
            DecoderResult::InputEmpty => return (text, at),
            DecoderResult::OutputFull => text.reserve(text.len() / 2 + 64),
            DecoderResult::Malformed(length, after) => {
                return (text, at.saturating_sub(usize::from(length) + usize::from(after)));
            }
        }
    }
}

/// UTF-16 that begins without a byte order mark, where that is plain to see: in one byte order the beginning is valid, has
/// no control characters, and blanks and line feeds of ASCII are as frequent as in a text; in the other it is not so.
fn bare_utf16(bytes: &[u8]) -> Option<&'static Encoding> {
    let head = &bytes[..bytes.len().min(HEAD) & !1];
    memchr::memchr(0, head)?;
    match (is_plain(head, u16::from_le_bytes), is_plain(head, u16::from_be_bytes)) {
        (true, false) => Some(UTF_16LE),
        (false, true) => Some(UTF_16BE),
        _ => None,
    }
}

fn is_plain(head: &[u8], unit: fn([u8; 2]) -> u16) -> bool {
    let pairs = head.as_chunks::<2>().0;
    // Two letters of ASCII make one character of Chinese: text of single bytes with a NUL in it is no UTF-16.
    let is_letter = |byte: &u8| (b' '..=b'~').contains(byte);
    let letters = pairs.iter().filter(|pair| pair.iter().all(is_letter)).count();
    if 2 * letters >= pairs.len() {
        return false;
    }
    let (mut blanks, mut ascii) = (0usize, 0usize);
    let mut seen = 0usize;
    for decoded in char::decode_utf16(pairs.iter().map(|pair| unit(*pair))) {
        seen += decoded.as_ref().map_or(1, |c| c.len_utf16());
        match decoded {
            Ok(' ' | '\n' | '\r' | '\t') => blanks += 1,
            Ok(c) if c.is_control() || ('\u{e000}'..='\u{f8ff}').contains(&c) || u32::from(c) & 0xfffe == 0xfffe => {
                return false;
            }
            Ok(c) => ascii += usize::from(c.is_ascii()),
            // The beginning may end between two surrogates; elsewhere one of them alone is wrong.
            Err(_) if seen < pairs.len() => return false,
            Err(_) => {}
        }
    }
    100 * blanks >= pairs.len() || 2 * (ascii + blanks) >= pairs.len()
}

/// Files that people give by mistake, by what they begin with.
fn other_kind(bytes: &[u8]) -> Option<NotText> {
    const TEXT: &str = "give a text file";
    const UNPACK: &str = "unpack it first";
    const EXPORT: &str = "write its text to a file first";
    const KINDS: &[(usize, &[u8], &str, &str)] = &[
        (0, b"PK\x03\x04", "a zip archive (or a document or PyTorch file in one)", UNPACK),
        (0, b"PK\x05\x06", "an empty zip archive", UNPACK),
        (0, b"\x1f\x8b", "gzip data", UNPACK),
        (0, b"\x28\xb5\x2f\xfd", "zstd data", UNPACK),
        (0, b"\xfd7zXZ\0", "xz data", UNPACK),
        (0, b"\x04\x22\x4d\x18", "lz4 data", UNPACK),
        (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
        (0, b"Rar!\x1a\x07", "a rar archive", UNPACK),
        (257, b"ustar", "a tar archive", UNPACK),
        (0, b"SQLite format 3\0", "an SQLite database", EXPORT),
        (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", EXPORT),
        (0, b"\x93NUMPY", "a NumPy file", EXPORT),
        (0, b"%PDF-", "a PDF document", EXPORT),
        (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office document", EXPORT),
        (0, b"{\\rtf", "an RTF document", EXPORT),
        (0, b"\x89PNG\r\n\x1a\n", "a PNG picture", TEXT),
        (0, b"\xff\xd8\xff", "a JPEG picture", TEXT),
        (0, b"\x7fELF", "a program", TEXT),
        (0, b"\xff\xfe\0\0", "UTF-32 text", "convert it with `iconv -f UTF-32 -t UTF-8`"),
        (0, b"\0\0\xfe\xff", "UTF-32 text", "convert it with `iconv -f UTF-32 -t UTF-8`"),
    ];
    // Texts may begin with these letters, too; then text follows.
    const WORDS: &[(&[u8], &str, &str)] = &[
        (b"GGUF", "a GGUF file", TEXT),
        (b"tjgg", "an old ggml model file", TEXT),
        (b"lmgg", "an old ggml model file", TEXT),
        (b"_logits_", "a file of saved logits", TEXT),
        (b"PAR1", "a Parquet file", EXPORT),
        (b"ARROW1", "an Arrow file", EXPORT),
    ];
    let is_binary = |rest: &[u8]| {
        let odd = |byte: &u8| !byte.is_ascii() || (byte.is_ascii_control() && !byte.is_ascii_whitespace());
        rest.iter().take(16).any(odd)
    };
    let known = KINDS.iter().find(|(at, magic, ..)| bytes.get(*at..).is_some_and(|from| from.starts_with(magic)));
    let word = WORDS.iter().find(|(magic, ..)| bytes.strip_prefix(*magic).is_some_and(is_binary));
    let kind = known.map(|&(_, _, found, advice)| (found, advice)).or(word.map(|&(_, found, advice)| (found, advice)));
    let bzip2 = matches!(bytes, [b'B', b'Z', b'h', b'1'..=b'9', 0x31, 0x41, 0x59, 0x26, 0x53, 0x59, ..]);
    let safetensors = match bytes.first_chunk() {
        Some(length) => (2..1 << 32).contains(&u64::from_le_bytes(*length)) && bytes.get(8) == Some(&b'{'),
        None => false,
    };
    let kind = kind.or(bzip2.then_some(("bzip2 data", UNPACK)));
    let kind = kind.or(safetensors.then_some(("a safetensors file", TEXT)));
    kind.map(|(found, advice)| NotText::OtherFile { found, advice })
}

/// The kind of a binary file that was taken for another binary one.
pub(crate) fn known_kind(bytes: &[u8]) -> Option<NotText> {
    other_kind(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text_of(bytes: &[u8]) -> Result<(String, Vec<String>), String> {
        let (text, remarks) = decode(bytes).map_err(|error| error.to_string())?;
        let lines = remarks.iter().map(ToString::to_string).collect();
        Ok((String::from_utf8(text.into_owned()).unwrap(), lines))
    }

    fn encoded(text: &str, mark: bool, little: bool) -> Vec<u8> {
        let mark = if mark { "\u{feff}" } else { "" };
        let bytes = |unit: u16| if little { unit.to_le_bytes() } else { unit.to_be_bytes() };
        mark.encode_utf16().chain(text.encode_utf16()).flat_map(bytes).collect()
    }

    #[test]
    fn plain_utf8_is_taken_as_it_is() {
        for text in ["", "a", "naïve — 日本語 🦀\n", "tabs\tand\x1b[0m escapes\n", "GGUF is a format", "PAR1S"]
        {
            assert_eq!(text_of(text.as_bytes()), Ok((text.to_owned(), vec![])));
        }
    }

    #[test]
    fn utf16_is_decoded_with_and_without_a_mark() {
        let long = "Съешь же ещё этих мягких французских булок, да выпей чаю.\n".repeat(30);
        let chinese = "道可道，非常道。名可名，非常名。\n无名天地之始；有名万物之母。\n".repeat(3);
        for text in ["hi\n", "A naïve café 🦀\nand more\n", &long, &chinese] {
            for little in [true, false] {
                let name = if little { "UTF-16LE" } else { "UTF-16BE" };
                let (found, remarks) = text_of(&encoded(text, true, little)).unwrap();
                assert!(found == text && remarks == [format!("is {name}; decoded")], "{found:?} {remarks:?}");
                let (found, remarks) = text_of(&encoded(text, false, little)).unwrap();
                assert!(found == text && remarks.len() == 1 && remarks[0].contains(name), "{found:?} {remarks:?}");
            }
        }
        let (found, remarks) = text_of(&encoded("a\r\nb\r\n", true, true)).unwrap();
        assert!(found == "a\r\nb\r\n" && remarks[1].contains("CRLF"), "{remarks:?}");
    }

    #[test]
    fn utf16_that_is_cut_or_damaged_is_told_apart() {
        for little in [true, false] {
            let whole = encoded("some text 🦀", true, little);
            for cut in 1..=3 {
                let (found, remarks) = text_of(&whole[..whole.len() - cut]).unwrap();
                assert!(found == "some text " && remarks[1].contains("middle of a character"), "{found:?} {remarks:?}");
            }
            let mut broken = whole.clone();
            broken.drain(2 + 2 * 10..2 + 2 * 11);
            broken.extend(encoded(" and on", false, little));
            let error = text_of(&broken).unwrap_err();
            assert!(error.starts_with("byte 22 is not valid UTF-16"), "{error}");
            let error = text_of(&encoded("a\0b", true, little)).unwrap_err();
            assert!(error.starts_with("byte 4 is NUL"), "{error}");
        }
    }

    #[test]
    fn a_mark_is_dropped_and_carriage_returns_are_kept() {
        let (text, remarks) = text_of(b"\xef\xbb\xbfa\r\nb\r\nc").unwrap();
        assert_eq!(text, "a\r\nb\r\nc");
        assert!(remarks.len() == 2 && remarks[0].contains("byte order mark"), "{remarks:?}");
        assert!(remarks[1].starts_with("lines end in CRLF (2 of them)"), "{remarks:?}");
    }

    #[test]
    fn a_character_cut_off_at_the_end_is_left_out_and_others_are_refused() {
        let (text, remarks) = text_of("caf\u{e9} \u{20ac}".as_bytes().split_last().unwrap().1).unwrap();
        assert!(text == "café " && remarks[0].contains("last bytes (2)"), "{text:?} {remarks:?}");
        let error = text_of(b"one\ntwo caf\xe9 three\n").unwrap_err();
        assert!(error.starts_with("byte 11 (0xe9, in line 2) is not valid UTF-8"), "{error}");
        assert!(error.contains("iconv -f WINDOWS-1252 -t UTF-8"), "{error}");
        for bytes in [&b"\xc3"[..], b"\xed\xa0\x80 surrogate", b"\xc0\xaf overlong"] {
            assert!(text_of(bytes).unwrap_err().starts_with("byte 0 "));
        }
        let error = text_of(b"\xef\xbb\xbfa\xe9b").unwrap_err();
        assert!(error.starts_with("byte 4 "), "{error}");
    }

    #[test]
    fn binary_files_are_refused_by_name_or_for_their_nul_bytes() {
        for (bytes, expected) in [
            (&b"GGUF\x03\0\0\0"[..], "is a GGUF file, no text"),
            (b"PK\x03\x04rest", "is a zip archive"),
            (b"\x1f\x8b\x08rest", "is gzip data, no text; unpack it first"),
            (b"\x28\xb5\x2f\xfdrest", "is zstd data"),
            (b"BZh91AY&SY", "is bzip2 data"),
            (b"PAR1\x15\x04rest", "is a Parquet file"),
            (b"%PDF-1.7 rest", "is a PDF document"),
            (b"\x10\0\0\0\0\0\0\0{\"a\":{}}", "is a safetensors file"),
            (b"\xff\xfe\0\0a\0\0\0", "is UTF-32"),
            (b"text and \0 more", "byte 9 is NUL; this is binary data"),
            (b"text and\0 more", "byte 8 is NUL"),
            (b"a.txt\0bc.txt\0def.txt\0", "byte 5 is NUL"),
            (b"\0\0\x80\x3f\0\0\0\x40", "byte 0 is NUL"),
        ] {
            let error = text_of(bytes).unwrap_err();
            assert!(error.starts_with(expected), "{error}");
            assert!(check_head(bytes).is_err() || bytes.starts_with(b"text"), "{expected}");
        }
        // Token ids as 16-bit numbers have no control characters only by chance.
        let ids: Vec<u8> = (300u16..900).flat_map(u16::to_le_bytes).collect();
        assert!(text_of(&ids).is_err());
    }

    #[test]
    fn json_is_read_behind_a_mark_and_refused_in_utf16() {
        assert_eq!(utf8(b"\xef\xbb\xbf{}"), Ok("{}"));
        assert_eq!(utf8(b"{}"), Ok("{}"));
        for mark in [true, false] {
            let error = utf8(&encoded("{\"a\": 1}", mark, true)).unwrap_err().to_string();
            assert_eq!(error, "is UTF-16LE; save it as UTF-8");
        }
        assert!(utf8(b"{\"a\": \"\xe9\"}").unwrap_err().to_string().starts_with("byte 7 "));
        assert!(utf8(b"GGUF\x03\0\0\0").is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_give_utf8_or_an_error(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..64)) {
            let mut marked = b"\xff\xfe".to_vec();
            marked.extend_from_slice(&bytes);
            for bytes in [&bytes, &marked] {
                if let Ok((text, _)) = decode(bytes) {
                    proptest::prop_assert!(std::str::from_utf8(&text).is_ok_and(|text| !text.contains('\0')));
                }
                let _ = utf8(bytes);
            }
        }
    }
}
