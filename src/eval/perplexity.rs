//! Perplexity: the exponential of the mean negative log-likelihood of the tokens that follow.

use rayon::prelude::*;

use crate::model::math::log_sum_exp;
use crate::model::{HiddenStates, ModelError, Pass, Taps};

/// Sums of negative log-likelihoods, and what follows from them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Perplexity {
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
        self.ppl() * self.log_error()
    }

    /// Standard error of the mean negative log-likelihood.
    pub fn log_error(&self) -> f64 {
        if self.tokens < 2 {
            return 0.0;
        }
        let n = self.tokens as f64;
        let mean = self.sum / n;
        let variance = (self.sum_of_squares / n - mean * mean).max(0.0);
        (variance / (n - 1.0)).sqrt()
    }
}

/// Adds the predictions made in the second half of every chunk of `n_ctx` tokens in `hidden`, which must have passed
/// all layers. Taps see the inputs of the output matrix at the scored positions.
///
/// # Errors
/// Those of the output product.
pub(crate) fn score_chunks(
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
