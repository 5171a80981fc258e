//! The text of a pass, cut into sequences.

use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::TextError;
use crate::model::TokenGroup;

/// Tokens that go through a layer together, unless one sequence is longer: hidden states of a batch stay below 200 MB
/// for all common widths, and every weight is decoded once for many tokens.
const BATCH_TOKENS: usize = 8192;

/// Sequences of tokens at equal distances over a text, so that many of its documents are seen.
#[derive(Clone, Debug)]
pub struct Sequences {
    /// What messages and records call it.
    name: String,
    n_ctx: usize,
    /// Tokens of all sequences, one after the other.
    tokens: Vec<u32>,
}

impl Sequences {
    /// Takes at most `most_tokens` of `tokens` in sequences of `n_ctx`. `bos` replaces the first token of each.
    ///
    /// # Errors
    /// When there are fewer tokens than two sequences, or sequences of less than two tokens were asked for.
    pub fn new(
        name: &str,
        tokens: &[u32],
        most_tokens: usize,
        n_ctx: usize,
        bos: Option<u32>,
    ) -> Result<Sequences, TextError> {
        let available = tokens.len() / n_ctx.max(1);
        if available < 2 || n_ctx < 2 {
            return Err(TextError::TooShort { name: name.to_owned(), tokens: tokens.len(), n_ctx });
        }
        let count = (most_tokens / n_ctx).clamp(2, available);
        let mut taken = Vec::with_capacity(count * n_ctx);
        for sequence in 0..count {
            let first = sequence * available / count * n_ctx;
            let start = taken.len();
            taken.extend_from_slice(&tokens[first..first + n_ctx]);
            if let Some(bos) = bos {
                taken[start] = bos;
            }
        }
        Ok(Sequences { name: name.to_owned(), n_ctx, tokens: taken })
    }

    /// What messages call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Tokens in all sequences.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// True without tokens, which [`Sequences::new`] never makes.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Tokens of a sequence.
    pub fn n_ctx(&self) -> usize {
        self.n_ctx
    }

    /// SHA-256 of the tokens and the length of their sequences, in hexadecimal.
    pub fn sha256(&self) -> String {
        let mut hash = Sha256::new();
        hash.update((self.n_ctx as u64).to_le_bytes());
        self.tokens.iter().for_each(|token| hash.update(token.to_le_bytes()));
        format!("{:x}", hash.finalize())
    }

    /// All sequences as one group.
    pub(crate) fn group(&self) -> Arc<TokenGroup> {
        let sequences = self.tokens.chunks_exact(self.n_ctx);
        Arc::new(TokenGroup::from_sequences(sequences).with_context(self.n_ctx))
    }

    /// The sequences in groups that go through a layer together. They depend on nothing but the text, so that sums over
    /// them come out the same on every machine.
    pub(crate) fn batches(&self) -> Vec<Arc<TokenGroup>> {
        self.groups_of(BATCH_TOKENS)
    }

    /// The sequences in groups of at most so many tokens, of one sequence where that is longer.
    pub(crate) fn groups_of(&self, tokens: usize) -> Vec<Arc<TokenGroup>> {
        let per_batch = (tokens / self.n_ctx).max(1) * self.n_ctx;
        let group = |tokens: &[u32]| {
            Arc::new(TokenGroup::from_sequences(tokens.chunks_exact(self.n_ctx)).with_context(self.n_ctx))
        };
        self.tokens.chunks(per_batch).map(group).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_are_spread_over_the_text_and_begin_with_bos() {
        let tokens: Vec<u32> = (100..180).collect();
        let text = Sequences::new("t", &tokens, 30, 10, Some(1)).unwrap();
        assert_eq!(text.len(), 30);
        let firsts: Vec<(u32, u32)> = text.tokens.chunks(10).map(|sequence| (sequence[0], sequence[1])).collect();
        assert_eq!(firsts, [(1, 101), (1, 121), (1, 151)]);
        let all = Sequences::new("t", &tokens, usize::MAX, 10, None).unwrap();
        assert_eq!(all.tokens, tokens);
        assert_ne!(text.sha256(), all.sha256());
    }

    #[test]
    fn batches_hold_whole_sequences() {
        let tokens: Vec<u32> = (0..20_000).collect();
        let batches = Sequences::new("t", &tokens, usize::MAX, 3000, None).unwrap().batches();
        assert_eq!(batches.iter().map(|batch| batch.len()).collect::<Vec<_>>(), [6000, 6000, 6000]);
        let long = Sequences::new("t", &tokens, usize::MAX, 10_000, None).unwrap().batches();
        assert_eq!(long.iter().map(|batch| batch.len()).collect::<Vec<_>>(), [10_000, 10_000]);
    }

    #[test]
    fn a_short_text_is_refused_with_what_is_needed() {
        let error = Sequences::new("a.txt", &[1; 19], 100, 10, None).unwrap_err().to_string();
        assert!(error.starts_with("a.txt: 19 tokens") && error.contains("two sequences of 10"), "{error}");
        assert!(Sequences::new("a.txt", &[1; 19], 100, 1, None).is_err());
    }
}
