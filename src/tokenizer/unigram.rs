//! SentencePiece's unigram model (`t5`): the sequence of tokens whose scores have the highest sum.

use super::prefix_index::PrefixIndex;
use super::unicode;
use super::vocab::{Vocab, attr};
use super::{SPACE, TokenizerError};
use crate::gguf::{Metadata, ValueType};

const KEY_CHARSMAP: &str = "tokenizer.ggml.precompiled_charsmap";

/// How much worse than the worst token an unknown character is.
const UNKNOWN_PENALTY: f32 = 10.0;

pub(super) struct Unigram {
    tokens: PrefixIndex,
    /// Kept as they are by normalization.
    user_defined: PrefixIndex,
    /// By token id; user-defined tokens cost nothing.
    scores: Vec<f64>,
    unknown: u32,
    unknown_score: f64,
    replacements: Replacements,
    add_space_prefix: bool,
    merge_spaces: bool,
}

/// The best way to reach a position.
#[derive(Clone, Copy)]
struct Best {
    score: f64,
    token: u32,
    /// Where the token begins.
    from: u32,
}

impl Unigram {
    pub(crate) fn new(metadata: &Metadata, vocab: &Vocab) -> Result<Unigram, TokenizerError> {
        let entries = |accepted: u8| {
            let is_accepted = move |id: &u32| vocab.file_attrs[*id as usize] & accepted != 0;
            let ids = (0..vocab.len() as u32).filter(is_accepted);
            PrefixIndex::new(ids.map(|id| (vocab.texts[id as usize].clone(), id)).collect())
        };
        let normal = (0..vocab.len() as u32).filter(|id| vocab.file_attrs[*id as usize] & attr::NORMAL != 0);
        let worst = normal.map(|id| vocab.score(id)).fold(f32::MAX, f32::min);
        let score = |id: u32| {
            if vocab.attrs[id as usize] & attr::USER_DEFINED != 0 { 0.0 } else { f64::from(vocab.score(id)) }
        };
        let replacements = Replacements::read(metadata)?;
        Ok(Unigram {
            tokens: entries(attr::NORMAL | attr::USER_DEFINED | attr::UNUSED),
            user_defined: entries(attr::USER_DEFINED),
            scores: (0..vocab.len() as u32).map(score).collect(),
            unknown: vocab.special.unk.unwrap_or_default(),
            unknown_score: f64::from(worst - UNKNOWN_PENALTY),
            replacements,
            add_space_prefix: vocab.add_space_prefix,
            merge_spaces: vocab.remove_extra_whitespaces,
        })
    }

    /// Appends the tokens of a text without special tokens.
    pub(crate) fn encode(&self, text: &[u8], out: &mut Vec<u32>) {
        // Positions are 32 bits wide; llama.cpp takes no longer texts.
        for part in self.normalize(text).chunks(i32::MAX as usize) {
            self.encode_normalized(part, out);
        }
    }

    fn encode_normalized(&self, text: &[u8], out: &mut Vec<u32>) {
        let unreached = Best { score: f64::MIN, token: self.unknown, from: 0 };
        let mut best = vec![unreached; text.len() + 1];
        best[0].score = 0.0;
        let mut at = 0;
        while at < text.len() {
            let char_len = unicode::announced_len(text[at]).min(text.len() - at);
            let here = best[at].score;
            let mut offer = |end: usize, token: u32, token_score: f64| {
                let score = here + token_score;
                if score > best[end].score {
                    best[end] = Best { score, token, from: at as u32 };
                }
            };
            let mut char_is_token = false;
            if let Some(mut walk) = self.tokens.walk(text[at]) {
                let mut end = at + 1;
                loop {
                    if let Some(token) = walk.value() {
                        char_is_token |= end - at == char_len;
                        offer(end, token, self.scores[token as usize]);
                    }
                    match text.get(end) {
                        Some(byte) if walk.step(*byte) => end += 1,
                        _ => break,
                    }
                }
            }
            if !char_is_token {
                offer(at + char_len, self.unknown, self.unknown_score);
            }
            at += char_len;
        }
        let start = out.len();
        let mut end = text.len();
        let mut after_unknown = false;
        while end > 0 {
            let step = best[end];
            let is_unknown = step.token == self.unknown;
            // A run of unknown characters is one token.
            if !(is_unknown && after_unknown) {
                out.push(step.token);
            }
            after_unknown = is_unknown;
            end = step.from as usize;
        }
        out[start..].reverse();
    }

    fn normalize(&self, text: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(text.len() + text.len() / 4 + SPACE.len());
        let mut has_prefix = false;
        let mut in_word = false;
        let mut rest = text;
        while !rest.is_empty() {
            let (normalized, consumed) = self.normalized_prefix(rest);
            rest = &rest[consumed..];
            for &byte in normalized {
                if byte == b' ' {
                    in_word = false;
                    if !self.merge_spaces {
                        out.extend_from_slice(SPACE);
                    }
                    continue;
                }
                if !in_word {
                    in_word = true;
                    if (self.add_space_prefix && !has_prefix) || self.merge_spaces {
                        out.extend_from_slice(SPACE);
                        has_prefix = true;
                    }
                }
                out.push(byte);
            }
        }
        out
    }

    /// What the beginning of a text becomes, and how many bytes of the text that is.
    fn normalized_prefix<'a>(&'a self, text: &'a [u8]) -> (&'a [u8], usize) {
        // llama.cpp keeps any beginning of a user-defined token, not only whole ones.
        let kept = self.user_defined.longest_shared_prefix(text);
        if kept > 0 {
            return (&text[..kept], kept);
        }
        if let Some(found) = self.replacements.longest(text) {
            return found;
        }
        match unicode::decode(text) {
            Some((_, len)) => (&text[..len], len),
            None => ("\u{fffd}".as_bytes(), 1),
        }
    }
}

/// SentencePiece's table of normalizations: an XOR-compressed double array (Kanda 2018) over what is replaced, then
/// the replacements, each ended by NUL.
#[derive(Default)]
struct Replacements {
    nodes: Vec<u32>,
    texts: Vec<u8>,
}

impl Replacements {
    fn read(metadata: &Metadata) -> Result<Replacements, TokenizerError> {
        let Some(array) = metadata.array(KEY_CHARSMAP)? else { return Ok(Replacements::default()) };
        let error = |problem: String| TokenizerError::key(metadata.file(), KEY_CHARSMAP, problem);
        if !matches!(array.elem_type(), ValueType::I8 | ValueType::U8) {
            return Err(error(format!("is an array of {}, expected i8 or u8", array.elem_type())));
        }
        let bytes = array.raw();
        let Some((len, rest)) = bytes.split_first_chunk::<4>() else {
            return Err(error(format!("has {} bytes, too few for its header", bytes.len())));
        };
        let len = u32::from_le_bytes(*len) as usize;
        if len >= rest.len() {
            return Err(error(format!("announces {len} bytes of nodes, but has {} in all", rest.len())));
        }
        let (nodes, texts) = rest.split_at(len);
        Ok(Replacements {
            nodes: nodes.as_chunks().0.iter().map(|node| u32::from_le_bytes(*node)).collect(),
            texts: texts.to_vec(),
        })
    }

    /// The replacement of the longest beginning of `text` that has one, and that beginning's length.
    fn longest(&self, text: &[u8]) -> Option<(&[u8], usize)> {
        // A node: bits 10.. the base, shifted by 8 if bit 9 is set; bit 8 says that a replacement ends here; bits 0..8
        // and 31 are the label.
        let base = |node: u32| (node >> 10) << ((node & 1 << 9) >> 6);
        let mut position = base(*self.nodes.first()?);
        let mut longest = None;
        for (i, &byte) in text.iter().enumerate() {
            if byte == 0 {
                break;
            }
            position ^= u32::from(byte);
            let Some(&node) = self.nodes.get(position as usize) else { break };
            if node & (1 << 31 | 0xFF) != u32::from(byte) {
                break;
            }
            position ^= base(node);
            if node >> 8 & 1 == 1 {
                let Some(&value) = self.nodes.get(position as usize) else { break };
                longest = Some((value & !(1 << 31), i + 1));
            }
        }
        let (start, consumed) = longest?;
        let replacement = self.texts.get(start as usize..)?;
        let end = memchr::memchr(0, replacement)?;
        Some((&replacement[..end], consumed))
    }
}
