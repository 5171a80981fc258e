//! PLaMo 2's tokenizer: the sequence of tokens whose scores have the highest sum, found from the end of the text.
//! A character without token costs much and becomes byte tokens.

use super::TokenizerError;
use super::prefix_index::PrefixIndex;
use super::unicode;
use super::vocab::{Vocab, attr};

/// Scores are compared in units of 1/10000.
const SCORE_UNITS: f64 = 1e4;
const UNKNOWN_SCORE: i64 = -10_000_000;
/// Tokens of this score or less are never used.
const INVALID_SCORE: i64 = -20_000_000;

const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

pub(super) struct Plamo {
    tokens: PrefixIndex,
    /// By token id, in units.
    scores: Vec<i64>,
    byte_tokens: Vec<u32>,
}

/// The best way from a position to the end.
#[derive(Clone, Copy)]
struct Best {
    cost: i64,
    /// Bytes of the first token.
    len: u32,
    token: Option<u32>,
}

impl Plamo {
    pub(crate) fn new(vocab: &Vocab) -> Result<Plamo, TokenizerError> {
        let is_byte = |id: u32| vocab.file_attrs[id as usize] & attr::BYTE != 0;
        let byte_token = |byte: u8| {
            vocab.byte_token(byte).filter(|id| is_byte(*id)).ok_or_else(|| {
                let problem = format!("has no byte token <0x{byte:02X}>, but all 256 are needed");
                TokenizerError::key(&vocab.file, "tokenizer.ggml.tokens", problem)
            })
        };
        // Others could end inside a character.
        let is_text = |id: &u32| std::str::from_utf8(&vocab.texts[*id as usize]).is_ok();
        let ids = (0..vocab.len() as u32).filter(|id| !is_byte(*id)).filter(is_text);
        let scaled = |id: u32| i64::from((f64::from(vocab.score(id)) * SCORE_UNITS).round() as i32);
        Ok(Plamo {
            tokens: PrefixIndex::new(ids.map(|id| (vocab.texts[id as usize].clone(), id)).collect()),
            scores: (0..vocab.len() as u32).map(scaled).collect(),
            byte_tokens: (0..=255).map(byte_token).collect::<Result<_, _>>()?,
        })
    }

    /// Appends the tokens of a text without special tokens.
    pub(crate) fn encode(&self, text: &[u8], out: &mut Vec<u32>) {
        let text = unicode::normalized_utf8(text);
        let text = text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&text);
        // Lengths are 32 bits wide; llama.cpp takes no longer texts.
        for part in text.chunks(i32::MAX as usize) {
            self.encode_part(part, out);
        }
    }

    fn encode_part(&self, text: &[u8], out: &mut Vec<u32>) {
        let end = Best { cost: 0, len: 0, token: None };
        let mut best = vec![end; text.len() + 1];
        let is_start = |at: &usize| text[*at] & 0xC0 != 0x80;
        for at in (0..text.len()).rev().filter(is_start) {
            let char_len = unicode::announced_len(text[at]).min(text.len() - at);
            let mut here = Best { cost: i64::MAX, ..end };
            let mut offer = |len: usize, score: i64, token: Option<u32>| {
                let cost = best[at + len].cost - score;
                // Of equal costs the longest token wins, and any token over none.
                if cost < here.cost || (cost == here.cost && token.is_some()) {
                    here = Best { cost, len: len as u32, token };
                }
            };
            if let Some(mut walk) = self.tokens.walk(text[at]) {
                let mut len = 1;
                loop {
                    if let Some(token) = walk.value()
                        && let score = self.scores[token as usize]
                        && score > INVALID_SCORE
                    {
                        offer(len, score, Some(token));
                    }
                    match text.get(at + len) {
                        Some(byte) if walk.step(*byte) => len += 1,
                        _ => break,
                    }
                }
            }
            offer(char_len, UNKNOWN_SCORE, None);
            best[at] = here;
        }
        let mut at = 0;
        while at < text.len() {
            let step = best[at];
            let next = at + (step.len as usize).max(1);
            match step.token {
                Some(token) => out.push(token),
                None => out.extend(text[at..next].iter().map(|byte| self.byte_tokens[usize::from(*byte)])),
            }
            at = next;
        }
    }
}
