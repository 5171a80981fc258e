//! How a text is cut and which predictions are scored.

use std::ops::Range;

use super::EvalError;

/// Shortest window in which two predictions can be scored.
const SHORTEST: usize = 4;

/// Windows of several texts in turn, the first of each, then the second of each, as one text: a run that ends early or
/// has a limit has seen something of all, and no window holds the end of one and the beginning of another. What fills
/// no window of `n_ctx` tokens is left out. A single text stays as it is.
pub(crate) fn texts_in_turn(mut texts: Vec<Vec<u32>>, n_ctx: usize) -> Vec<u32> {
    if texts.len() == 1 {
        return texts.remove(0);
    }
    let mut cut: Vec<_> = texts.iter().map(|text| text.chunks_exact(n_ctx.max(1))).collect();
    let mut joined = Vec::new();
    loop {
        let before = joined.len();
        cut.iter_mut().filter_map(Iterator::next).for_each(|window| joined.extend(window));
        if joined.len() == before {
            return joined;
        }
    }
}

/// A text cut into windows of equal length, as llama-perplexity cuts it.
#[derive(Clone, Debug)]
pub struct Windows {
    tokens: Vec<u32>,
    /// First token of every window.
    starts: Vec<usize>,
    n_ctx: usize,
    /// Positions whose predictions are scored, the same in every window.
    scored: Range<usize>,
    bos: Option<u32>,
}

impl Windows {
    /// Windows of `n_ctx` tokens side by side; the tail that fills none is dropped. The predictions made at
    /// positions `n_ctx / 2` to `n_ctx - 2` are scored. `bos` replaces the first token of every window: give the BOS
    /// id of a vocabulary that adds BOS. At most `limit` windows are used.
    ///
    /// # Errors
    /// When the text is shorter than two windows, or a window too short to score.
    pub fn chunks(
        tokens: Vec<u32>,
        n_ctx: usize,
        limit: Option<usize>,
        bos: Option<u32>,
    ) -> Result<Windows, EvalError> {
        check_length(&tokens, n_ctx)?;
        Windows::whole_chunks(tokens, n_ctx, limit, bos)
    }

    /// Windows of a file of saved logits: as [`Self::chunks`], but a single one will do.
    pub(super) fn whole_chunks(
        tokens: Vec<u32>,
        n_ctx: usize,
        limit: Option<usize>,
        bos: Option<u32>,
    ) -> Result<Windows, EvalError> {
        if n_ctx < SHORTEST {
            return Err(EvalError::BadWindow { reason: format!("a context of {n_ctx} tokens is too short to score") });
        }
        let count = limit.unwrap_or(usize::MAX).min(tokens.len() / n_ctx);
        let starts = (0..count).map(|i| i * n_ctx).collect();
        Ok(Windows { tokens, starts, n_ctx, scored: n_ctx / 2..n_ctx - 1, bos })
    }

    /// Overlapping windows: each is `stride` tokens after the one before it and scores the last `stride`
    /// predictions (`--ppl-stride`). As in llama-perplexity a window has `n_ctx + stride / 2` tokens, and none is
    /// replaced by BOS.
    ///
    /// # Errors
    /// When the text is shorter than two windows, or `stride` is 0 or longer than what a window can score.
    pub fn strided(tokens: Vec<u32>, n_ctx: usize, stride: usize, limit: Option<usize>) -> Result<Windows, EvalError> {
        let n_ctx = n_ctx.saturating_add(stride / 2);
        if stride == 0 || stride >= n_ctx {
            let reason =
                format!("a stride of {stride} tokens does not fit into windows of {n_ctx}; give a smaller one");
            return Err(EvalError::BadWindow { reason });
        }
        check_length(&tokens, n_ctx)?;
        let count = limit.unwrap_or(usize::MAX).min((tokens.len() - n_ctx).div_ceil(stride));
        let starts = (0..count).map(|i| i * stride).collect();
        Ok(Windows { tokens, starts, n_ctx, scored: n_ctx - stride - 1..n_ctx - 1, bos: None })
    }

    /// The same windows with the predictions scored from `position` on instead of from the middle: more of them for the
    /// same work, made from less context.
    ///
    /// # Errors
    /// When `position` leaves nothing to score.
    pub fn score_from(self, position: usize) -> Result<Windows, EvalError> {
        let scored = position..self.n_ctx - 1;
        if scored.is_empty() {
            let reason = format!(
                "windows of {} tokens have no prediction to score from position {position} on; give a smaller one",
                self.n_ctx
            );
            return Err(EvalError::BadWindow { reason });
        }
        Ok(Windows { scored, ..self })
    }

    /// Number of windows.
    pub fn len(&self) -> usize {
        self.starts.len()
    }

    /// True without windows.
    pub fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    /// Tokens per window.
    pub fn n_ctx(&self) -> usize {
        self.n_ctx
    }

    /// Predictions scored in a window.
    pub fn scored_per_window(&self) -> usize {
        self.scored.len()
    }

    /// Positions of a window whose predictions are scored.
    pub fn scored(&self) -> Range<usize> {
        self.scored.clone()
    }

    /// The token that replaces the first of every window.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The whole text, BOS not put in.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens of window `index` as the model sees them.
    ///
    /// # Panics
    /// When `index` is not below [`Self::len`].
    pub fn sequence(&self, index: usize) -> Vec<u32> {
        let start = self.starts[index];
        let mut tokens = self.tokens[start..start + self.n_ctx].to_vec();
        if let Some(bos) = self.bos {
            tokens[0] = bos;
        }
        tokens
    }

    /// The token that the prediction made at `position` of window `index` should have given.
    ///
    /// # Panics
    /// When window or position are not there.
    pub fn target(&self, index: usize, position: usize) -> u32 {
        self.tokens[self.starts[index] + position + 1]
    }
}

fn check_length(tokens: &[u32], n_ctx: usize) -> Result<(), EvalError> {
    if n_ctx < SHORTEST {
        return Err(EvalError::BadWindow { reason: format!("a context of {n_ctx} tokens is too short to score") });
    }
    let needed = n_ctx.saturating_mul(2);
    match tokens.len() < needed {
        true => Err(EvalError::TextTooShort { found: tokens.len(), n_ctx, needed }),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(n: u32) -> Vec<u32> {
        (0..n).collect()
    }

    #[test]
    fn chunks_score_their_second_half_and_start_with_bos() {
        let windows = Windows::chunks(text(26), 8, None, Some(99)).unwrap();
        assert_eq!((windows.len(), windows.scored()), (3, 4..7));
        assert_eq!(windows.sequence(1), [99, 9, 10, 11, 12, 13, 14, 15]);
        assert_eq!(windows.target(1, 6), 15);
        assert_eq!(Windows::chunks(text(26), 8, Some(2), None).unwrap().len(), 2);
    }

    #[test]
    fn windows_of_several_texts_take_turns_and_hold_one_text_each() {
        let texts = vec![text(9), (100..112).collect(), (200..203).collect()];
        assert_eq!(
            texts_in_turn(texts, 4),
            [0, 1, 2, 3, 100, 101, 102, 103, 4, 5, 6, 7, 104, 105, 106, 107, 108, 109, 110, 111]
        );
        assert_eq!(texts_in_turn(vec![text(9)], 4), text(9));
        assert!(texts_in_turn(Vec::new(), 4).is_empty());
    }

    #[test]
    fn scoring_can_begin_at_any_position_that_leaves_a_prediction() {
        let windows = Windows::chunks(text(26), 8, None, None).unwrap().score_from(1).unwrap();
        assert_eq!((windows.scored(), windows.scored_per_window()), (1..7, 6));
        assert_eq!(windows.target(1, 1), 10);
        assert_eq!(windows.clone().score_from(6).unwrap().scored_per_window(), 1);
        let refused = windows.score_from(7).unwrap_err().to_string();
        assert!(refused.contains("position 7"), "{refused}");
    }

    #[test]
    fn strided_windows_score_every_token_after_the_first_window_once() {
        let windows = Windows::strided(text(40), 8, 4, None).unwrap();
        assert_eq!((windows.n_ctx(), windows.len()), (10, 8));
        let targets: Vec<u32> = (0..windows.len())
            .flat_map(|i| windows.scored().map(move |p| (i, p)))
            .map(|(i, p)| windows.target(i, p))
            .collect();
        assert_eq!(targets, (6..38).collect::<Vec<u32>>());
    }

    #[test]
    fn texts_and_windows_that_cannot_be_scored_are_refused() {
        assert!(matches!(Windows::chunks(text(15), 8, None, None), Err(EvalError::TextTooShort { needed: 16, .. })));
        assert!(matches!(Windows::chunks(Vec::new(), 8, None, None), Err(EvalError::TextTooShort { .. })));
        assert!(matches!(Windows::chunks(text(15), 3, None, None), Err(EvalError::BadWindow { .. })));
        assert!(Windows::strided(text(100), 8, 0, None).is_err());
        assert!(Windows::strided(text(100), 8, 17, None).is_err());
    }
}
