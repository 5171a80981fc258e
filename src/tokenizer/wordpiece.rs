//! BERT's WordPiece: text is normalized and cut to words; each word is the longest token that it begins with, then the
//! longest that the rest begins with, and so on. A word that does not come out is unknown as a whole.

use super::SPACE;
use super::unicode::{self, CharClass};
use super::vocab::Vocab;

pub(super) struct WordPiece {
    lowercase: bool,
    strip_accents: bool,
    unknown: Option<u32>,
    /// Lengths that tokens have, in bytes, descending.
    token_lens: Vec<usize>,
}

/// Characters that are words of their own. One range of the CJK extensions is what Hugging Face's implementation has
/// instead of the block's.
fn is_cjk(code_point: u32) -> bool {
    matches!(code_point,
        0x3400..=0x4DBF | 0x4E00..=0x9FFF | 0xF900..=0xFAFF | 0x2_0000..=0x2_A6DF | 0x2_A700..=0x2_B81F
        | 0x2_B920..=0x2_CEAF | 0x2_F800..=0x2_FA1F)
}

impl WordPiece {
    pub(crate) fn new(vocab: &Vocab) -> WordPiece {
        let mut token_lens: Vec<usize> = vocab.texts.iter().map(|text| text.len()).collect();
        token_lens.sort_unstable_by(|a, b| b.cmp(a));
        token_lens.dedup();
        WordPiece {
            lowercase: vocab.lowercase,
            strip_accents: vocab.strip_accents,
            unknown: vocab.special.unk,
            token_lens,
        }
    }

    /// Appends the tokens of a text without special tokens.
    pub(crate) fn encode(&self, vocab: &Vocab, text: &[u8], out: &mut Vec<u32>) {
        let mut word = SPACE.to_vec();
        let mut finish = |word: &mut Vec<u8>| {
            if word.len() > SPACE.len() {
                self.encode_word(vocab, word, out);
                word.truncate(SPACE.len());
            }
        };
        for mut code_point in unicode::code_points(text) {
            if self.strip_accents {
                code_point = unicode::base_character(code_point);
            }
            let class = unicode::class_of(code_point);
            if class == CharClass::Whitespace {
                finish(&mut word);
                continue;
            }
            let is_accent = self.strip_accents && class == CharClass::Mark;
            if is_accent || code_point == unicode::REPLACEMENT || class == CharClass::Control {
                continue;
            }
            let is_ascii_symbol = code_point < 0x7F && class == CharClass::Symbol;
            let stands_alone = class == CharClass::Punctuation || is_ascii_symbol || is_cjk(code_point);
            if stands_alone {
                finish(&mut word);
            }
            unicode::encode(if self.lowercase { unicode::lowercase(code_point) } else { code_point }, &mut word);
            if stands_alone {
                finish(&mut word);
            }
        }
        finish(&mut word);
    }

    /// `word` begins with the mark of a word's beginning.
    fn encode_word(&self, vocab: &Vocab, word: &[u8], out: &mut Vec<u32>) {
        let before = out.len();
        let mut rest = word;
        while !rest.is_empty() {
            let fitting = self.token_lens.partition_point(|len| *len > rest.len());
            let longest = self.token_lens[fitting..].iter().find_map(|len| Some((vocab.id(&rest[..*len])?, *len)));
            let Some((id, len)) = longest else {
                out.truncate(before);
                out.extend(self.unknown);
                return;
            };
            out.push(id);
            rest = &rest[len..];
        }
    }
}
