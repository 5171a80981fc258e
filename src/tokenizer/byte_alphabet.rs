//! GPT-2's printable alphabet for bytes, in which byte-level vocabularies are written.
//!
//! Printable Latin-1 characters stand for themselves; the other 68 bytes, in order, are U+0100 and following.

use super::unicode;

const fn is_printable(byte: u8) -> bool {
    matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF)
}

/// Code point of each byte.
static CODE_POINTS: [u16; 256] = {
    let mut table = [0; 256];
    let (mut byte, mut next) = (0usize, 256);
    while byte < 256 {
        if is_printable(byte as u8) {
            table[byte] = byte as u16;
        } else {
            table[byte] = next;
            next += 1;
        }
        byte += 1;
    }
    table
};

/// The character that stands for a byte, in UTF-8.
pub(crate) fn char_bytes(byte: u8) -> Vec<u8> {
    let mut out = Vec::with_capacity(2);
    unicode::encode(CODE_POINTS[byte as usize].into(), &mut out);
    out
}

/// The byte that a code point stands for.
pub(crate) fn byte_of(code_point: u32) -> Option<u8> {
    match code_point {
        0..=0xFF if is_printable(code_point as u8) => Some(code_point as u8),
        0x100..=0x143 => (0..=255u8).filter(|byte| !is_printable(*byte)).nth(code_point as usize - 0x100),
        _ => None,
    }
}

/// Maps code points U+0000 to U+01FF to bytes, for many look-ups.
pub(crate) struct Decoder([Option<u8>; 0x200]);

impl Decoder {
    /// Builds the table.
    pub(crate) fn new() -> Decoder {
        Decoder(std::array::from_fn(|code_point| byte_of(code_point as u32)))
    }

    /// Sets `out` to the bytes that a text in this alphabet stands for; false if the text has any other character or
    /// is not UTF-8.
    pub(crate) fn decode_into(&self, text: &[u8], out: &mut Vec<u8>) -> bool {
        out.clear();
        let Ok(text) = std::str::from_utf8(text) else { return false };
        for c in text.chars() {
            match self.0.get(c as usize) {
                Some(Some(byte)) => out.push(*byte),
                _ => return false,
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_its_own_character() {
        let decoder = Decoder::new();
        let decoded = |text: &[u8]| {
            let mut out = Vec::new();
            decoder.decode_into(text, &mut out).then_some(out)
        };
        for byte in 0..=255u8 {
            assert_eq!(decoded(&char_bytes(byte)), Some(vec![byte]));
        }
        assert_eq!(char_bytes(b' '), "Ġ".as_bytes());
        assert_eq!(char_bytes(b'\n'), "Ċ".as_bytes());
        assert_eq!(decoded("Ġworld".as_bytes()), Some(b" world".to_vec()));
        assert_eq!(decoded("▁x".as_bytes()), None);
        assert_eq!(decoded(b" "), None);
    }
}
