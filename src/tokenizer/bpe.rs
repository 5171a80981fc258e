//! Byte-pair encoding: words are cut to characters, then neighbours are merged, the merge of the lowest rank first and
//! the leftmost of equal rank.
//!
//! Byte-level vocabularies are kept as the bytes that their alphabet stands for, so that a character is a byte.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::byte_alphabet::{self, Decoder};
use super::pretokenize::{Flags, WordSplitter};
use super::unicode::{self, CharClass};
use super::vocab::{DNA_MARKER, Model, Vocab};
use super::{Map, TokenizerError, replace_spaces};
use crate::gguf::{Metadata, shown};

const KEY_MERGES: &str = "tokenizer.ggml.merges";

/// A character that is neither a token nor part of a merge.
const NO_PIECE: u32 = u32::MAX;

/// Words up to this many bytes are remembered within a text.
const MAX_CACHED_WORD: usize = 64;

/// Words up to this many characters are merged by scanning for the best pair, longer ones with a heap.
const MAX_SCANNED: usize = 24;

/// Words are cut here so that positions fit 32 bits; llama.cpp takes no longer texts.
const MAX_WORD: usize = i32::MAX as usize;

pub(super) struct BytePair {
    splitter: WordSplitter,
    flags: Flags,
    /// Texts of tokens (the piece is the token's id) and of merges' parts and results that are no tokens (pieces
    /// from the number of tokens on).
    pieces: Map<Box<[u8]>, u32>,
    token_count: u32,
    byte_pieces: [u32; 256],
    /// Rank and result by pair of pieces.
    merges: Map<u64, (u32, u32)>,
    /// What a byte of a piece without token becomes.
    byte_fallback: Vec<Vec<u32>>,
    lowercase_words: Option<bool>,
    dna: Option<Dna>,
}

fn pair_key(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

/// Reads the text of a token or of a merge's part.
struct PieceReader {
    /// `None` for vocabularies in plain UTF-8.
    alphabet: Option<Decoder>,
}

impl PieceReader {
    /// Sets `out` to the bytes of a piece; false if no text can have it.
    fn read(&self, text: &[u8], out: &mut Vec<u8>) -> bool {
        match &self.alphabet {
            Some(alphabet) => alphabet.decode_into(text, out),
            None => {
                out.clear();
                out.extend_from_slice(text);
                true
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Symbol {
    piece: u32,
    /// Bytes; 0 once merged into the symbol before.
    len: u32,
    prev: u32,
    next: u32,
}

const NO_SYMBOL: u32 = u32::MAX;

/// A possible merge; the order of fields is the order of merging.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    rank: u32,
    left: u32,
    right: u32,
    /// Bytes of both when found: differs once one of them has grown.
    len: u32,
}

/// Memory that is used again from word to word.
#[derive(Default)]
struct Scratch {
    symbols: Vec<Symbol>,
    ranks: Vec<u32>,
}

impl BytePair {
    pub(crate) fn new(metadata: &Metadata, vocab: &mut Vocab) -> Result<BytePair, TokenizerError> {
        let pre = vocab.pre.expect("vocabularies with merges have a pre-tokenizer");
        let flags = pre.flags;
        let token_count = vocab.len() as u32;
        let reader = PieceReader { alphabet: (!flags.raw_utf8).then(Decoder::new) };
        let (mut first, mut second) = (Vec::new(), Vec::new());
        let mut pieces: Map<Box<[u8]>, u32> = Map::with_capacity_and_hasher(vocab.len(), Default::default());
        for (text, id) in vocab.texts.iter().zip(0..) {
            if reader.read(text, &mut first) {
                pieces.insert(first.as_slice().into(), id);
            }
        }
        let mut merges = Map::default();
        match metadata.array(KEY_MERGES)? {
            None if flags.merges_optional => {}
            None => return Err(metadata.missing(KEY_MERGES).into()),
            Some(array) => {
                merges.reserve(array.iter_str()?.size_hint().1.unwrap_or(0));
                let mut malformed = None;
                for (rank, text) in array.iter_str()?.enumerate() {
                    let Some(space) = text.iter().skip(1).position(|byte| *byte == b' ') else {
                        malformed.get_or_insert_with(|| (rank, shown(text)));
                        continue;
                    };
                    if !reader.read(&text[..space + 1], &mut first) || !reader.read(&text[space + 2..], &mut second) {
                        continue;
                    }
                    let mut piece = |bytes: &[u8]| match pieces.get(bytes) {
                        Some(piece) => *piece,
                        None => {
                            let free = pieces.len() as u64 + u64::from(token_count);
                            let piece = u32::try_from(free).unwrap_or(NO_PIECE);
                            pieces.insert(bytes.into(), piece);
                            piece
                        }
                    };
                    let pair = pair_key(piece(&first), piece(&second));
                    first.extend_from_slice(&second);
                    let result = piece(&first);
                    merges.entry(pair).or_insert((rank as u32, result));
                }
                if let Some((rank, text)) = malformed {
                    vocab.warnings.push(format!(
                        "{}: {KEY_MERGES} number {rank}, {text}, is not two parts with a space between; it is ignored",
                        vocab.file
                    ));
                }
            }
        }
        let byte_pieces = std::array::from_fn(|byte| pieces.get([byte as u8].as_slice()).copied().unwrap_or(NO_PIECE));
        let byte_fallback = (0..=255)
            .map(|byte| {
                if flags.raw_utf8 {
                    vocab.byte_token(byte).into_iter().collect()
                } else {
                    byte_alphabet::char_bytes(byte).iter().filter_map(|byte| vocab.id(&[*byte])).collect()
                }
            })
            .collect();
        Ok(BytePair {
            splitter: WordSplitter::new(pre.rules),
            flags,
            token_count,
            byte_pieces,
            merges,
            byte_fallback,
            lowercase_words: (vocab.model == Model::WhitespaceWords).then_some(vocab.lowercase),
            dna: (vocab.model == Model::HybridDna).then(|| Dna::new(vocab)).flatten(),
            pieces,
        })
    }

    /// Appends the tokens of a text without special tokens.
    pub(crate) fn encode(&self, text: &[u8], out: &mut Vec<u32>) {
        if let Some(dna) = &self.dna {
            dna.encode(text, out, |text, out| self.encode_plain(text, out));
        } else if let Some(lowercase) = self.lowercase_words {
            each_spaced_word(text, lowercase, |word| self.encode_plain(word, out));
        } else {
            self.encode_plain(text, out);
        }
    }

    fn encode_plain(&self, text: &[u8], out: &mut Vec<u32>) {
        let escaped = self.flags.escape_spaces.then(|| replace_spaces(text));
        let text = unicode::normalized_utf8(escaped.as_deref().unwrap_or(text));
        let mut scratch = Scratch::default();
        // Where the tokens of a word stand in `out`.
        let mut cache: Map<&[u8], (usize, usize)> = Map::default();
        self.splitter.split(&text, |word| {
            if word.len() > MAX_CACHED_WORD {
                for part in word.chunks(MAX_WORD) {
                    self.encode_word(part, &mut scratch, out);
                }
            } else if let Some(&(start, end)) = cache.get(word) {
                out.extend_from_within(start..end);
            } else {
                let start = out.len();
                self.encode_word(word, &mut scratch, out);
                cache.insert(word, (start, out.len()));
            }
        });
    }

    fn encode_word(&self, word: &[u8], scratch: &mut Scratch, out: &mut Vec<u32>) {
        let whole_word =
            self.flags.ignore_merges || (self.flags.newline_tokens && word.iter().all(|byte| *byte == b'\n'));
        if whole_word && let Some(&piece) = self.pieces.get(word).filter(|piece| **piece < self.token_count) {
            out.push(piece);
            return;
        }
        let Scratch { symbols, ranks } = scratch;
        self.cut_to_symbols(word, symbols);
        if symbols.len() <= MAX_SCANNED {
            self.merge_by_scanning(symbols, ranks);
        } else {
            self.merge_with_heap(symbols);
        }
        let mut at = 0;
        for symbol in symbols.iter().filter(|symbol| symbol.len > 0) {
            let end = at + symbol.len as usize;
            if symbol.piece < self.token_count {
                out.push(symbol.piece);
            } else {
                out.extend(word[at..end].iter().flat_map(|byte| &self.byte_fallback[usize::from(*byte)]));
            }
            at = end;
        }
    }

    fn cut_to_symbols(&self, word: &[u8], symbols: &mut Vec<Symbol>) {
        symbols.clear();
        let mut at = 0;
        while at < word.len() {
            let (len, piece) = if self.flags.raw_utf8 {
                let len = unicode::announced_len(word[at]).min(word.len() - at);
                (len, self.pieces.get(&word[at..at + len]).copied().unwrap_or(NO_PIECE))
            } else {
                (1, self.byte_pieces[usize::from(word[at])])
            };
            at += len;
            let index = symbols.len() as u32;
            let next = if at == word.len() { NO_SYMBOL } else { index + 1 };
            symbols.push(Symbol { piece, len: len as u32, prev: index.wrapping_sub(1), next });
        }
    }

    fn merge(&self, left: u32, right: u32) -> Option<(u32, u32)> {
        if left == NO_PIECE || right == NO_PIECE {
            return None;
        }
        self.merges.get(&pair_key(left, right)).copied()
    }

    /// Removes merged symbols from the list.
    fn merge_by_scanning(&self, symbols: &mut Vec<Symbol>, ranks: &mut Vec<u32>) {
        const NO_MERGE: u32 = u32::MAX;
        let rank =
            |left: &Symbol, right: &Symbol| self.merge(left.piece, right.piece).map_or(NO_MERGE, |found| found.0);
        ranks.clear();
        ranks.extend(symbols.windows(2).map(|pair| rank(&pair[0], &pair[1])));
        // min_by_key gives the first of equal ranks.
        while let Some((at, &lowest)) = ranks.iter().enumerate().min_by_key(|(_, rank)| **rank)
            && lowest != NO_MERGE
        {
            let right = symbols.remove(at + 1);
            ranks.remove(at);
            let left = &mut symbols[at];
            left.piece = self.merge(left.piece, right.piece).map_or(NO_PIECE, |found| found.1);
            left.len += right.len;
            if at > 0 {
                ranks[at - 1] = rank(&symbols[at - 1], &symbols[at]);
            }
            if at < ranks.len() {
                ranks[at] = rank(&symbols[at], &symbols[at + 1]);
            }
        }
    }

    /// Leaves merged symbols in the list, with length 0.
    fn merge_with_heap(&self, symbols: &mut [Symbol]) {
        let candidate = |symbols: &[Symbol], left: u32, right: u32| {
            let (l, r) = (symbols.get(left as usize)?, symbols.get(right as usize)?);
            let (rank, _) = self.merge(l.piece, r.piece)?;
            Some(Reverse(Candidate { rank, left, right, len: l.len + r.len }))
        };
        let first: Vec<_> = (1..symbols.len() as u32).filter_map(|i| candidate(symbols, i - 1, i)).collect();
        let mut queue = BinaryHeap::from(first);
        while let Some(Reverse(Candidate { left, right, len, .. })) = queue.pop() {
            let (l, r) = (symbols[left as usize], symbols[right as usize]);
            if l.len == 0 || r.len == 0 || l.len + r.len != len {
                continue;
            }
            let Some((_, piece)) = self.merge(l.piece, r.piece) else { continue };
            symbols[left as usize] = Symbol { piece, len, next: r.next, ..l };
            symbols[right as usize].len = 0;
            if let Some(after) = symbols.get_mut(r.next as usize) {
                after.prev = left;
            }
            queue.extend(candidate(symbols, l.prev, left));
            queue.extend(candidate(symbols, left, r.next));
        }
    }
}

/// Calls `word` for every run of characters that are not white space.
fn each_spaced_word(text: &[u8], lowercase: bool, mut word: impl FnMut(&[u8])) {
    let mut buffer = Vec::new();
    for code_point in unicode::code_points(text) {
        if unicode::class_of(code_point) != CharClass::Whitespace {
            let code_point = if lowercase { unicode::lowercase(code_point) } else { code_point };
            unicode::encode(code_point, &mut buffer);
        } else if !buffer.is_empty() {
            word(&buffer);
            buffer.clear();
        }
    }
    if !buffer.is_empty() {
        word(&buffer);
    }
}

/// DNA in text: between the tags every six letters are a token.
struct Dna {
    open: u32,
    close: u32,
    unknown: u32,
    words: Map<Box<[u8]>, u32>,
}

const DNA_OPEN: &[u8] = b"<dna>";
const DNA_CLOSE: &[u8] = b"</dna>";
const DNA_WORD: usize = 6;

impl Dna {
    /// `None` if the vocabulary lacks the tags: then DNA is text.
    fn new(vocab: &Vocab) -> Option<Dna> {
        let words = vocab.ids.iter().filter_map(|(text, id)| Some((text.strip_suffix(DNA_MARKER)?.into(), *id)));
        Some(Dna {
            open: vocab.id(DNA_OPEN)?,
            close: vocab.id(DNA_CLOSE)?,
            unknown: vocab.id(b"<oov>")?,
            words: words.collect(),
        })
    }

    fn encode(&self, text: &[u8], out: &mut Vec<u32>, encode_text: impl Fn(&[u8], &mut Vec<u32>)) {
        let mut rest = text;
        while let Some(start) = memchr::memmem::find(rest, DNA_OPEN) {
            encode_text(&rest[..start], out);
            out.push(self.open);
            rest = &rest[start + DNA_OPEN.len()..];
            let end = memchr::memmem::find(rest, DNA_CLOSE);
            for word in rest[..end.unwrap_or(rest.len())].chunks(DNA_WORD) {
                let mut word = word.to_ascii_uppercase();
                word.resize(DNA_WORD, b'A');
                out.push(self.words.get(word.as_slice()).copied().unwrap_or(self.unknown));
            }
            let Some(end) = end else { return };
            out.push(self.close);
            rest = &rest[end + DNA_CLOSE.len()..];
        }
        encode_text(rest, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::Array;
    use crate::testing::Random;

    /// Merges of letters a to d at random, with equal results by different ways.
    fn random_vocabulary(random: &mut Random) -> BytePair {
        let mut pieces: Vec<String> = ["a", "b", "c", "d"].map(String::from).into();
        let mut merges = Vec::new();
        for _ in 0..40 {
            let (left, right) = (random.below(pieces.len()), random.below(pieces.len()));
            let merged = format!("{}{}", pieces[left], pieces[right]);
            merges.push(format!("{} {}", pieces[left], pieces[right]));
            if merged.len() < 12 && !pieces.contains(&merged) {
                pieces.push(merged);
            }
        }
        let mut metadata = Metadata::new("random.gguf");
        metadata.set("tokenizer.ggml.model", "gpt2");
        metadata.set("tokenizer.ggml.pre", "gpt-2");
        metadata.set("tokenizer.ggml.tokens", Array::of_strings(&pieces));
        metadata.set(KEY_MERGES, Array::of_strings(&merges));
        let mut vocab = Vocab::read(&metadata, None).unwrap();
        BytePair::new(&metadata, &mut vocab).unwrap()
    }

    #[test]
    fn scanning_and_heap_merge_the_same() {
        let mut random = Random::new(1);
        for _ in 0..50 {
            let bpe = random_vocabulary(&mut random);
            for _ in 0..40 {
                let word: Vec<u8> = (0..1 + random.below(60)).map(|_| b"abcde"[random.below(5)]).collect();
                let mut scanned = Vec::new();
                bpe.cut_to_symbols(&word, &mut scanned);
                let mut queued = scanned.clone();
                bpe.merge_by_scanning(&mut scanned, &mut Vec::new());
                bpe.merge_with_heap(&mut queued);
                let pieces = |symbols: &[Symbol]| -> Vec<(u32, u32)> {
                    symbols.iter().filter(|s| s.len > 0).map(|s| (s.piece, s.len)).collect()
                };
                assert_eq!(pieces(&scanned), pieces(&queued), "{}", word.escape_ascii());
            }
        }
    }
}
