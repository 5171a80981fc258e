//! Finding added and special tokens in text, before it is tokenized.

use aho_corasick::AhoCorasick;
use memchr::memmem::Finder;

use super::vocab::{Vocab, attr};

/// A part of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fragment<'t> {
    /// Still to be tokenized; never empty.
    Text(&'t [u8]),
    /// A token that was found.
    Token(u32),
}

/// The tokens that are looked for: longest first, as a longer token wins wherever it stands.
pub(super) struct SpecialTokens {
    tokens: Vec<Special>,
    /// Finds which of the tokens occur at all; absent where the automaton would be huge.
    present: Option<AhoCorasick>,
}

struct Special {
    id: u32,
    text: Box<[u8]>,
    attrs: u8,
}

/// Texts longer than this in sum are searched one by one.
const MAX_AUTOMATON_TEXT: usize = 1 << 22;

impl SpecialTokens {
    pub(crate) fn new(vocab: &Vocab) -> SpecialTokens {
        let mut tokens: Vec<Special> = vocab
            .special_tokens()
            .into_iter()
            .map(|id| Special { id, text: vocab.texts[id as usize].clone(), attrs: vocab.attrs[id as usize] })
            .collect();
        tokens.sort_by_key(|token| std::cmp::Reverse(token.text.len()));
        let total: usize = tokens.iter().map(|token| token.text.len()).sum();
        let present = (!tokens.is_empty() && total <= MAX_AUTOMATON_TEXT)
            .then(|| AhoCorasick::new(tokens.iter().map(|token| &token.text)).ok())
            .flatten();
        SpecialTokens { tokens, present }
    }

    /// Cuts a text at special tokens; control and unknown tokens count only with `parse_special`.
    pub(crate) fn partition<'t>(&self, text: &'t [u8], parse_special: bool) -> Vec<Fragment<'t>> {
        if text.is_empty() {
            return Vec::new();
        }
        let mut fragments = vec![Fragment::Text(text)];
        for (token, occurs) in self.tokens.iter().zip(self.occurring(text)) {
            let is_markup = token.attrs & (attr::CONTROL | attr::UNKNOWN) != 0;
            if occurs && (parse_special || !is_markup) {
                fragments = token.cut(&fragments);
            }
        }
        fragments
    }

    /// For each token whether the text has it somewhere.
    fn occurring(&self, text: &[u8]) -> Vec<bool> {
        let Some(automaton) = &self.present else { return vec![true; self.tokens.len()] };
        let mut seen = vec![false; self.tokens.len()];
        let mut unseen = seen.len();
        for found in automaton.find_overlapping_iter(text) {
            let flag = &mut seen[found.pattern().as_usize()];
            if !*flag {
                *flag = true;
                unseen -= 1;
                if unseen == 0 {
                    break;
                }
            }
        }
        seen
    }
}

impl Special {
    fn cut<'t>(&self, fragments: &[Fragment<'t>]) -> Vec<Fragment<'t>> {
        let finder = Finder::new(&self.text);
        let mut out = Vec::with_capacity(fragments.len() + 2);
        for fragment in fragments {
            let &Fragment::Text(mut rest) = fragment else {
                out.push(*fragment);
                continue;
            };
            while let Some(at) = finder.find(rest) {
                let mut left = &rest[..at];
                if self.attrs & attr::LSTRIP != 0 {
                    left = &left[..left.iter().rposition(|byte| !is_c_space(*byte)).map_or(0, |last| last + 1)];
                }
                if !left.is_empty() {
                    out.push(Fragment::Text(left));
                }
                out.push(Fragment::Token(self.id));
                rest = &rest[at + self.text.len()..];
                if self.attrs & attr::RSTRIP != 0 {
                    rest = &rest[rest.iter().position(|byte| !is_c_space(*byte)).unwrap_or(rest.len())..];
                }
            }
            if !rest.is_empty() {
                out.push(Fragment::Text(rest));
            }
        }
        out
    }
}

/// C's `isspace`, which includes the vertical tab.
fn is_c_space(byte: u8) -> bool {
    matches!(byte, b'\t'..=b'\r' | b' ')
}
