//! Perplexity with the protocol of llama-perplexity.
//!
//! The tokens of a text are cut into chunks of `n_ctx`; the first token of every chunk is replaced by BOS when the
//! vocabulary adds one; the predictions made at positions `n_ctx / 2` to `n_ctx - 2` of each chunk are scored.

use std::ops::ControlFlow;
use std::sync::Arc;

use rayon::prelude::*;

use crate::model::math::log_sum_exp;
use crate::model::{HiddenStates, ModelError, NoTaps, Pass, Taps, TokenGroup};

/// Settings of a perplexity run.
#[derive(Clone, Debug)]
pub struct PerplexityOptions {
    /// Tokens per chunk.
    pub n_ctx: usize,
    /// Chunks to score; all that the text has when `None`.
    pub chunks: Option<usize>,
    /// Replaces the first token of every chunk: the BOS id of a vocabulary that adds BOS, otherwise `None`.
    pub bos: Option<u32>,
    /// Memory for activations in bytes; half of what is free when `None`.
    pub memory: Option<u64>,
}

/// Sums of negative log-likelihoods, and what follows from them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Perplexity {
    /// Chunks scored.
    pub chunks: usize,
    /// Predictions scored.
    pub tokens: usize,
    /// Sum of negative log-likelihoods, in nats.
    pub sum: f64,
    /// Sum of their squares.
    pub sum_of_squares: f64,
}

impl Perplexity {
    /// Adds one prediction with negative log-likelihood `nll`.
    pub fn add(&mut self, nll: f64) {
        self.tokens += 1;
        self.sum += nll;
        self.sum_of_squares += nll * nll;
    }

    /// `exp(mean nll)`.
    pub fn ppl(&self) -> f64 {
        (self.sum / self.tokens as f64).exp()
    }

    /// Standard error of the perplexity: `ppl * sqrt((mean(nll^2) - mean(nll)^2) / (n - 1))`.
    pub fn error(&self) -> f64 {
        if self.tokens < 2 {
            return 0.0;
        }
        let n = self.tokens as f64;
        let mean = self.sum / n;
        let variance = (self.sum_of_squares / n - mean * mean).max(0.0);
        self.ppl() * (variance / (n - 1.0)).sqrt()
    }
}

/// Scores `tokens`. `progress` sees the sums so far after every group of chunks and may stop the run; the result then
/// covers what was scored.
///
/// # Errors
/// [`ModelError::BadInput`] when the text is shorter than two chunks or a chunk shorter than 4 tokens; otherwise
/// those of the forward pass.
pub fn perplexity(
    pass: &Pass<'_, '_, '_>,
    tokens: &[u32],
    options: &PerplexityOptions,
    mut progress: impl FnMut(&Perplexity) -> ControlFlow<()>,
) -> Result<Perplexity, ModelError> {
    let n_ctx = options.n_ctx;
    if n_ctx < 4 {
        return Err(ModelError::BadInput { reason: format!("a context of {n_ctx} tokens is too short to score") });
    }
    if tokens.len() / 2 < n_ctx {
        let reason = format!(
            "the text has {} tokens; perplexity needs at least two contexts of {n_ctx}, {}",
            tokens.len(),
            n_ctx.saturating_mul(2)
        );
        return Err(ModelError::BadInput { reason });
    }
    let chunks = options.chunks.unwrap_or(usize::MAX).min(tokens.len() / n_ctx);
    let per_group = pass.model().group_tokens(options.memory, n_ctx) / n_ctx;
    let mut total = Perplexity::default();
    for first in (0..chunks).step_by(per_group) {
        let end = chunks.min(first + per_group);
        let sequences = tokens[first * n_ctx..end * n_ctx].chunks_exact(n_ctx).map(|chunk| {
            let mut chunk = chunk.to_vec();
            if let Some(bos) = options.bos {
                chunk[0] = bos;
            }
            chunk
        });
        let group = Arc::new(TokenGroup::from_sequences(sequences));
        let mut hidden = pass.embed(group.clone())?;
        pass.run_remaining(&mut hidden, &mut NoTaps)?;
        score_chunks(pass, &hidden, n_ctx, &mut NoTaps, &mut total)?;
        total.chunks = end;
        if progress(&total).is_break() {
            break;
        }
    }
    Ok(total)
}

/// Adds the predictions made in the second half of every chunk of `n_ctx` tokens in `hidden`, which must have passed
/// all layers. Taps see the inputs of the output matrix at the scored positions.
///
/// # Errors
/// Those of the output product.
pub fn score_chunks(
    pass: &Pass<'_, '_, '_>,
    hidden: &HiddenStates,
    n_ctx: usize,
    taps: &mut dyn Taps,
    total: &mut Perplexity,
) -> Result<(), ModelError> {
    let group = hidden.group().clone();
    let chunks = group.len() / n_ctx;
    let rows: Vec<usize> =
        (0..chunks).flat_map(|chunk| (n_ctx / 2..n_ctx - 1).map(move |row| chunk * n_ctx + row)).collect();
    pass.logits(hidden, &rows, taps, |tile| {
        let losses: Vec<f64> = tile
            .rows
            .par_iter()
            .zip(tile.logits.par_chunks_exact(tile.n_vocab))
            .map(|(&row, logits)| {
                let next = group.tokens()[row + 1] as usize;
                log_sum_exp(logits) - f64::from(logits[next])
            })
            .collect();
        losses.into_iter().for_each(|nll| total.add(nll));
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_follows_the_definition() {
        let mut sums = Perplexity::default();
        for nll in [1.0, 2.0, 3.0] {
            sums.add(nll);
        }
        assert!((sums.ppl() - 2f64.exp()).abs() < 1e-12);
        assert!((sums.error() - 2f64.exp() * (2.0f64 / 3.0 / 2.0).sqrt()).abs() < 1e-9);
    }
}
