//! Characters as llama.cpp's tokenizers see them: lenient UTF-8, and the classes of Unicode 15.1.

mod tables;

use std::borrow::Cow;
use std::sync::OnceLock;

/// General category, merged as llama.cpp merges them (`unicode_cpt_flags`); white space is a class of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum CharClass {
    /// Not assigned.
    Undefined,
    /// `\p{N}`.
    Number,
    /// `\p{L}`.
    Letter,
    /// `\p{M}`.
    Mark,
    /// `\p{P}`.
    Punctuation,
    /// `\p{S}`.
    Symbol,
    /// `\p{C}` without white space.
    Control,
    /// The property White_Space.
    Whitespace,
}

// Short names for the table.
const U: CharClass = CharClass::Undefined;
const N: CharClass = CharClass::Number;
const L: CharClass = CharClass::Letter;
const M: CharClass = CharClass::Mark;
const P: CharClass = CharClass::Punctuation;
const S: CharClass = CharClass::Symbol;
const C: CharClass = CharClass::Control;
const W: CharClass = CharClass::Whitespace;

/// What stands for bytes that are not UTF-8.
pub(crate) const REPLACEMENT: u32 = 0xFFFD;

const CODE_POINTS: usize = 0x11_0000;

/// The class of a code point; anything above U+10FFFF is undefined.
pub(crate) fn class_of(code_point: u32) -> CharClass {
    static CLASSES: OnceLock<Vec<CharClass>> = OnceLock::new();
    let classes = CLASSES.get_or_init(|| {
        let mut classes = vec![U; CODE_POINTS];
        for (i, &(first, class)) in tables::CLASS_RUNS.iter().enumerate() {
            let end = tables::CLASS_RUNS.get(i + 1).map_or(CODE_POINTS, |next| next.0 as usize);
            classes[first as usize..end].fill(class);
        }
        classes
    });
    classes.get(code_point as usize).copied().unwrap_or(U)
}

/// Simple lower case: one code point for one.
pub(crate) fn lowercase(code_point: u32) -> u32 {
    let runs = tables::LOWERCASE_RUNS;
    let after = runs.partition_point(|run| run.0 <= code_point);
    match after.checked_sub(1).map(|i| runs[i]) {
        Some((first, last, step, mapped)) if code_point <= last && (code_point - first).is_multiple_of(step) => {
            mapped + (code_point - first)
        }
        _ => code_point,
    }
}

/// The first character of the canonical decomposition: an accented letter without its accents.
pub(crate) fn base_character(code_point: u32) -> u32 {
    let runs = tables::DECOMPOSITION_RUNS;
    let after = runs.partition_point(|run| run.0 <= code_point);
    match after.checked_sub(1).map(|i| runs[i]) {
        Some((_, last, base)) if code_point <= last => base,
        _ => code_point,
    }
}

/// Length in bytes that a first byte announces (`unicode_len_utf8`): 1 also for continuation bytes.
pub(crate) fn announced_len(first: u8) -> usize {
    match first {
        0xC0..=0xDF => 2,
        0xE0..=0xEF => 3,
        0xF0.. => 4,
        _ => 1,
    }
}

/// Reads one code point as leniently as llama.cpp does: surrogates and overlong forms pass. `None` for bytes that
/// cannot be read that way, and for values above U+10FFFF, at which llama.cpp would abort.
pub(crate) fn decode(bytes: &[u8]) -> Option<(u32, usize)> {
    let first = *bytes.first()?;
    let (len, lead) = match first {
        0x00..=0x7F => return Some((first.into(), 1)),
        0xC0..=0xDF => (2, first & 0x1F),
        0xE0..=0xEF => (3, first & 0x0F),
        0xF0..=0xF7 => (4, first & 0x07),
        _ => return None,
    };
    let mut code_point = u32::from(lead);
    for &byte in bytes.get(1..len)? {
        if byte & 0xC0 != 0x80 {
            return None;
        }
        code_point = code_point << 6 | u32::from(byte & 0x3F);
    }
    ((code_point as usize) < CODE_POINTS).then_some((code_point, len))
}

/// Appends the UTF-8 form of a code point, surrogates included.
pub(crate) fn encode(code_point: u32, out: &mut Vec<u8>) {
    let tail = |shift: u32| 0x80 | (code_point >> shift & 0x3F) as u8;
    match code_point {
        0..=0x7F => out.push(code_point as u8),
        0x80..=0x7FF => out.extend([0xC0 | (code_point >> 6) as u8, tail(0)]),
        0x800..=0xFFFF => out.extend([0xE0 | (code_point >> 12) as u8, tail(6), tail(0)]),
        _ => out.extend([0xF0 | (code_point >> 18 & 7) as u8, tail(12), tail(6), tail(0)]),
    }
}

/// The code points of a text; a byte that cannot be read becomes U+FFFD.
pub(crate) fn code_points(text: &[u8]) -> impl Iterator<Item = u32> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let (code_point, len) = match decode(rest) {
            Some(read) => read,
            None if rest.is_empty() => return None,
            None => (REPLACEMENT, 1),
        };
        rest = &rest[len..];
        Some(code_point)
    })
}

/// The text as it reads after decoding and encoding: the same bytes if it is UTF-8.
pub(crate) fn normalized_utf8(text: &[u8]) -> Cow<'_, [u8]> {
    if std::str::from_utf8(text).is_ok() {
        return Cow::Borrowed(text);
    }
    let mut out = Vec::with_capacity(text.len() + 16);
    for code_point in code_points(text) {
        encode(code_point, &mut out);
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_lower_case_and_bases_follow_unicode_15_1() {
        assert_eq!(class_of('é' as u32), CharClass::Letter);
        assert_eq!(class_of('٣' as u32), CharClass::Number);
        assert_eq!(class_of(0x301), CharClass::Mark);
        assert_eq!(class_of(0x85), CharClass::Whitespace);
        assert_eq!(class_of(0x200B), CharClass::Control);
        assert_eq!(class_of(0x2FFC), CharClass::Symbol, "new in 15.1");
        assert_eq!(class_of(0x1C89), CharClass::Undefined, "new in 16.0");
        assert_eq!(class_of(u32::MAX), CharClass::Undefined);
        assert_eq!(lowercase('Ā' as u32), 'ā' as u32);
        assert_eq!(lowercase('ā' as u32), 'ā' as u32);
        assert_eq!(lowercase('İ' as u32), 'i' as u32);
        assert_eq!(lowercase('Ω' as u32), 'ω' as u32);
        assert_eq!(base_character('é' as u32), 'e' as u32);
        assert_eq!(base_character('ệ' as u32), 'e' as u32);
        assert_eq!(base_character('한' as u32), 0x1112);
        assert_eq!(base_character('x' as u32), 'x' as u32);
    }

    #[test]
    fn bad_bytes_become_replacement_characters_one_by_one() {
        let read = |bytes: &[u8]| code_points(bytes).collect::<Vec<_>>();
        assert_eq!(read(b"a\xffb"), [97, REPLACEMENT, 98]);
        assert_eq!(read(b"\xe2\x82"), [REPLACEMENT, REPLACEMENT]);
        assert_eq!(read(b"\xed\xa0\x80"), [0xD800], "surrogates pass");
        assert_eq!(read(b"\xc1\x81"), [0x41], "overlong forms pass");
        assert_eq!(read(b"\xf7\xbf\xbf\xbf").len(), 4, "above U+10FFFF");
        assert_eq!(&*normalized_utf8(b"\xc1\x81\xed\xa0\x80\x80"), b"A\xed\xa0\x80\xef\xbf\xbd");
    }

    #[test]
    fn encoding_is_the_inverse_of_decoding() {
        for code_point in [0, 0x7F, 0x80, 0x7FF, 0x800, 0xD800, 0xFFFF, 0x1_0000, 0x10_FFFF] {
            let mut bytes = Vec::new();
            encode(code_point, &mut bytes);
            assert_eq!(decode(&bytes), Some((code_point, bytes.len())));
        }
    }
}
