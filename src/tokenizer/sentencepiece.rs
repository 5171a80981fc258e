//! SentencePiece's BPE (`llama`): neighbours whose text is a token are merged, the highest score first and the
//! leftmost of equal score. Characters without token become byte tokens.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet};

use super::unicode;
use super::vocab::Vocab;
use super::{Map, SPACE, replace_spaces};

/// Chunks up to this many bytes are remembered within a text.
const MAX_CACHED_CHUNK: usize = 64;

/// Chunks are cut here so that positions fit 32 bits; llama.cpp takes no longer texts.
const MAX_CHUNK: usize = i32::MAX as usize;

pub(super) struct SentencePiece {
    byte_tokens: [Option<u32>; 256],
    /// Scores as integers of the same order.
    score_order: Vec<u32>,
    /// Characters that stand before `▁` inside a token, packed; before any other `▁` text can be cut.
    before_space: HashSet<u32>,
}

#[derive(Clone, Copy)]
struct Symbol {
    start: u32,
    /// Bytes; 0 once merged into the symbol before.
    len: u32,
    prev: u32,
    next: u32,
}

const NO_SYMBOL: u32 = u32::MAX;

/// A possible merge; the largest is done first.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    score: u32,
    left: Reverse<u32>,
    right: u32,
    /// Bytes of both when found: differs once one of them has grown.
    len: u32,
}

/// Length of the character at the beginning of a text; the text is not empty.
fn char_len(text: &[u8]) -> usize {
    unicode::announced_len(text[0]).min(text.len())
}

/// Up to four bytes as one number; the length is part of it, as no character begins with byte 0 but NUL.
fn packed(character: &[u8]) -> u32 {
    character.iter().fold(0, |packed, byte| packed << 8 | u32::from(*byte))
}

/// Maps floats to integers of the same order, with -0 = 0.
fn ordered(score: f32) -> u32 {
    let bits = (score + 0.0).to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

impl SentencePiece {
    pub(crate) fn new(vocab: &Vocab) -> SentencePiece {
        let byte_token =
            |byte: usize| vocab.byte_token(byte as u8).or_else(|| vocab.id(&[byte as u8])).or(vocab.special.unk);
        let mut before_space = HashSet::new();
        for text in &vocab.texts {
            let mut rest = &text[..];
            while !rest.is_empty() {
                let (character, after) = rest.split_at(char_len(rest));
                if after.starts_with(SPACE) {
                    before_space.insert(packed(character));
                }
                rest = after;
            }
        }
        SentencePiece {
            byte_tokens: std::array::from_fn(byte_token),
            score_order: (0..vocab.len() as u32).map(|id| ordered(vocab.score(id))).collect(),
            before_space,
        }
    }

    /// Appends the tokens of a text without special tokens, in which the space in front is already set.
    pub(crate) fn encode(&self, vocab: &Vocab, text: &[u8], out: &mut Vec<u32>) {
        let text = replace_spaces(text);
        let mut symbols = Vec::new();
        // Where the tokens of a chunk stand in `out`.
        let mut cache: Map<&[u8], (usize, usize)> = Map::default();
        let mut rest = &text[..];
        while !rest.is_empty() {
            let (chunk, after) = rest.split_at(self.chunk_len(rest));
            rest = after;
            if chunk.len() > MAX_CACHED_CHUNK {
                self.encode_chunk(vocab, chunk, &mut symbols, out);
            } else if let Some(&(start, end)) = cache.get(chunk) {
                out.extend_from_within(start..end);
            } else {
                let start = out.len();
                self.encode_chunk(vocab, chunk, &mut symbols, out);
                cache.insert(chunk, (start, out.len()));
            }
        }
    }

    /// Bytes to the next place that no token can span.
    fn chunk_len(&self, text: &[u8]) -> usize {
        let mut at = 0;
        while at < text.len().min(MAX_CHUNK) {
            let len = char_len(&text[at..]);
            let character = &text[at..at + len];
            at += len;
            if text[at..].starts_with(SPACE) && !self.before_space.contains(&packed(character)) {
                break;
            }
        }
        at
    }

    fn encode_chunk(&self, vocab: &Vocab, text: &[u8], symbols: &mut Vec<Symbol>, out: &mut Vec<u32>) {
        symbols.clear();
        let mut at = 0;
        while at < text.len() {
            let len = char_len(&text[at..]);
            let index = symbols.len() as u32;
            let next = if at + len == text.len() { NO_SYMBOL } else { index + 1 };
            symbols.push(Symbol { start: at as u32, len: len as u32, prev: index.wrapping_sub(1), next });
            at += len;
        }
        let token_at = |start: u32, len: u32| {
            let text = &text[start as usize..][..len as usize];
            if text.len() <= vocab.max_token_len { vocab.id(text) } else { None }
        };
        let candidate = |symbols: &[Symbol], left: u32, right: u32| {
            let (l, r) = (symbols.get(left as usize)?, symbols.get(right as usize)?);
            let len = l.len + r.len;
            let score = self.score_order[token_at(l.start, len)? as usize];
            Some(Candidate { score, left: Reverse(left), right, len })
        };
        let first: Vec<_> = (1..symbols.len() as u32).filter_map(|i| candidate(symbols, i - 1, i)).collect();
        let mut queue = BinaryHeap::from(first);
        while let Some(Candidate { left: Reverse(left), right, len, .. }) = queue.pop() {
            let (l, r) = (symbols[left as usize], symbols[right as usize]);
            if l.len == 0 || r.len == 0 || l.len + r.len != len {
                continue;
            }
            symbols[left as usize] = Symbol { len, next: r.next, ..l };
            symbols[right as usize].len = 0;
            if let Some(after) = symbols.get_mut(r.next as usize) {
                after.prev = left;
            }
            queue.extend(candidate(symbols, l.prev, left));
            queue.extend(candidate(symbols, left, r.next));
        }
        for symbol in symbols.iter().filter(|symbol| symbol.len > 0) {
            match token_at(symbol.start, symbol.len) {
                Some(id) => out.push(id),
                None => {
                    let bytes = &text[symbol.start as usize..][..symbol.len as usize];
                    out.extend(bytes.iter().filter_map(|byte| self.byte_tokens[usize::from(*byte)]));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordered_integers_sort_like_floats() {
        let scores = [f32::NEG_INFINITY, -1e9, -2.0, -0.5, 0.0, 1e-20, 3.0, f32::INFINITY];
        assert!(scores.windows(2).all(|pair| ordered(pair[0]) < ordered(pair[1])));
        assert_eq!(ordered(-0.0), ordered(0.0));
    }
}
