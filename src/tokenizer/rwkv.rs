//! RWKV's world tokenizer: the longest token that the rest of the text begins with.

use super::prefix_index::PrefixIndex;
use super::vocab::Vocab;

pub(super) struct Rwkv {
    index: PrefixIndex,
    unknown: Option<u32>,
}

impl Rwkv {
    pub(crate) fn new(vocab: &Vocab) -> Rwkv {
        let entries = vocab.texts.iter().zip(0..).map(|(text, id)| (unescape(text).into(), id)).collect();
        Rwkv { index: PrefixIndex::new(entries), unknown: vocab.special.unk }
    }

    /// Appends the tokens of a text.
    pub(crate) fn encode(&self, text: &[u8], out: &mut Vec<u32>) {
        let mut rest = text;
        while !rest.is_empty() {
            let len = match self.index.longest_match(rest) {
                Some((len, id)) => {
                    out.push(id);
                    len
                }
                None => {
                    out.extend(self.unknown);
                    1
                }
            };
            rest = &rest[len..];
        }
    }
}

/// Bytes of a token, which is written like a Python literal: `\n`, `\t`, `\r`, `\xHH`, any other character after a
/// backslash for itself.
pub(super) fn unescape(text: &[u8]) -> Vec<u8> {
    let hex = |digit: u8| if digit >= b'a' { digit - b'a' + 10 } else { digit.wrapping_sub(b'0') };
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.iter().copied();
    while let Some(byte) = bytes.next() {
        if byte != b'\\' {
            out.push(byte);
            continue;
        }
        match bytes.next() {
            Some(b't') => out.push(b'\t'),
            Some(b'n') => out.push(b'\n'),
            Some(b'r') => out.push(b'\r'),
            Some(b'x') => {
                if let (Some(high), Some(low)) = (bytes.next(), bytes.next()) {
                    out.push((hex(high) << 4).wrapping_add(hex(low)));
                }
            }
            Some(other) => out.push(other),
            None => {}
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_bytes() {
        assert_eq!(unescape(br"a\n\t\x00\xff\\'\'"), b"a\n\t\x00\xff\\''");
        assert_eq!(unescape(br"cut\x4"), b"cut");
    }
}
