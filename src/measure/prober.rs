//! The divergence that replaced tensors cause, by running only what comes after them.
//!
//! All probes see the same tokens, so their differences are paired. The model runs once for the reference
//! distributions; then layer by layer, and every probe of a layer starts at the states that enter it. On average a
//! probe costs half a forward pass and the logits of the scored positions.

use std::sync::Arc;

use rayon::prelude::*;

use crate::model::math::{divergence_sum, log_sum_exp};
use crate::model::{
    ForwardOptions, HiddenStates, Model, ModelError, NoTaps, Overrides, Pass, RouteFlips, Routes, TokenGroup,
};
use crate::os;
use crate::text::Sequences;

/// Share of the free memory that reference logits may take; beyond it they are computed again for every probe.
const LOGITS_SHARE: u64 = 4;

/// The divergence of a changed model from the original on the probe text.
#[derive(Clone, Debug, PartialEq)]
pub struct ProbeResult {
    /// Mean KL divergence of every sequence of the text, nats a token.
    pub sequences: Vec<f64>,
    /// What became of the routing, in models with experts.
    pub routing: Option<ProbeRouting>,
}

/// The part of a divergence that changed routes have in it.
#[derive(Clone, Debug, PartialEq)]
pub struct ProbeRouting {
    /// Layers that sent a scored token to other experts, a token.
    pub flips: f64,
    /// For every sequence the divergences of the tokens whose experts all stayed, over the number of all tokens.
    pub steady: Vec<f64>,
}

impl ProbeResult {
    /// Mean KL divergence, nats a token.
    pub fn mean(&self) -> f64 {
        mean(&self.sequences)
    }

    /// The part of [`Self::mean`] that tokens with unchanged experts have in it: all, in models without experts.
    pub fn steady(&self) -> f64 {
        self.routing.as_ref().map_or_else(|| self.mean(), |routing| mean(&routing.steady))
    }

    /// The mean as plans take it: a token whose experts change diverges by hundreds of times what others do, so such tokens
    /// are counted, and each count stands for `flip_cost`, what a changed layer costs on average over many probes.
    pub fn robust_mean(&self, flip_cost: Option<f64>) -> f64 {
        match (&self.routing, flip_cost) {
            (Some(routing), Some(cost)) => self.steady() + cost * routing.flips,
            _ => self.mean(),
        }
    }

    /// Standard error of [`Self::steady`], from the scatter of the sequences.
    pub fn error(&self) -> f64 {
        let sequences = self.routing.as_ref().map_or(&self.sequences, |routing| &routing.steady);
        let n = sequences.len() as f64;
        if n < 2.0 {
            return 0.0;
        }
        let mean = mean(sequences);
        let squares: f64 = sequences.iter().map(|v| (v - mean).powi(2)).sum();
        (squares / (n - 1.0) / n).sqrt()
    }
}

impl ProbeRouting {
    /// From the divergence and the changed layers of every scored token, `per_sequence` of them in a row.
    fn new(klds: &[f64], flips: &[u16], per_sequence: usize) -> ProbeRouting {
        let all: f64 = flips.iter().map(|&flips| f64::from(flips)).sum();
        let steady = |(klds, flips): (&[f64], &[u16])| {
            let of_steady = klds.iter().zip(flips).filter(|(_, flips)| **flips == 0);
            of_steady.map(|(kld, _)| kld).sum::<f64>() / per_sequence as f64
        };
        ProbeRouting {
            flips: all / flips.len().max(1) as f64,
            steady: klds.chunks_exact(per_sequence).zip(flips.chunks_exact(per_sequence)).map(steady).collect(),
        }
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// Sequences of a probe text and the predictions that are scored in each.
#[derive(Clone, Debug)]
pub struct ProbeText {
    group: Arc<TokenGroup>,
    rows: Vec<usize>,
    n_sequences: usize,
}

/// Predictions at the beginning of a sequence, which have little context, are not scored.
const UNSCORED: usize = 16;

impl ProbeText {
    /// Takes about `n_tokens` tokens in sequences of `n_ctx`, at equal distances over the text, so that many of its
    /// documents are seen. `bos` replaces the first token of every sequence. Every second prediction is scored: its
    /// neighbours say nearly the same, and logits are a large part of a probe.
    ///
    /// # Errors
    /// When the text is shorter than two sequences.
    pub fn new(tokens: &[u32], n_tokens: usize, n_ctx: usize, bos: Option<u32>) -> Result<ProbeText, ModelError> {
        let available = tokens.len() / n_ctx.max(1);
        if available < 2 || n_ctx < 2 * UNSCORED {
            let reason = format!(
                "the probe text has {} tokens; at least two sequences of {n_ctx} are needed, and {} tokens each",
                tokens.len(),
                2 * UNSCORED
            );
            return Err(ModelError::BadInput { reason });
        }
        let n_sequences = (n_tokens / n_ctx).clamp(2, available);
        let sequences = (0..n_sequences).map(|i| {
            let start = i * available / n_sequences * n_ctx;
            let mut sequence = tokens[start..start + n_ctx].to_vec();
            if let Some(bos) = bos {
                sequence[0] = bos;
            }
            sequence
        });
        let group = TokenGroup::from_sequences(sequences).with_context(n_ctx);
        Ok(ProbeText::scored(Arc::new(group), n_sequences, n_ctx, UNSCORED))
    }

    /// All of a text that is cut already; at most half of a sequence is not scored.
    pub(crate) fn of(text: &Sequences) -> ProbeText {
        let n_ctx = text.n_ctx();
        ProbeText::scored(text.group(), text.len() / n_ctx, n_ctx, UNSCORED.min(n_ctx / 2))
    }

    fn scored(group: Arc<TokenGroup>, n_sequences: usize, n_ctx: usize, unscored: usize) -> ProbeText {
        let rows = (0..n_sequences).flat_map(|i| (unscored..n_ctx - 1).step_by(2).map(move |at| i * n_ctx + at));
        ProbeText { rows: rows.collect(), group, n_sequences }
    }

    /// Tokens that every probe runs.
    pub fn tokens(&self) -> &[u32] {
        self.group.tokens()
    }

    /// Number of sequences.
    pub fn n_sequences(&self) -> usize {
        self.n_sequences
    }

    /// Number of predictions that are scored.
    pub fn n_scored(&self) -> usize {
        self.rows.len()
    }
}

/// Distributions of the original model, against which probes are scored.
pub struct Prober<'m, 'g> {
    model: &'m Model<'g>,
    options: ForwardOptions,
    text: ProbeText,
    /// Hidden states after the last layer of the original.
    last: HiddenStates,
    /// Logits of the scored rows, `[rows, n_vocab]`, where memory allows.
    logits: Option<Vec<f32>>,
    /// The experts of every token in the original, empty without experts.
    routes: Routes,
}

impl<'m, 'g> Prober<'m, 'g> {
    /// Runs the original model.
    ///
    /// # Errors
    /// Those of the forward pass.
    pub fn new(model: &'m Model<'g>, options: ForwardOptions, text: ProbeText) -> Result<Self, ModelError> {
        let memory = os::available_memory().unwrap_or(4 << 30) / LOGITS_SHARE;
        Prober::within(model, options, text, memory)
    }

    /// The same, keeping the original's logits only if they take no more than `memory` bytes.
    ///
    /// # Errors
    /// Those of the forward pass.
    pub(crate) fn within(
        model: &'m Model<'g>,
        options: ForwardOptions,
        text: ProbeText,
        memory: u64,
    ) -> Result<Self, ModelError> {
        let mut prober = {
            let pass = model.pass(options.clone(), Overrides::new())?;
            let mut last = pass.embed(text.group.clone())?;
            let mut routes = Routes::default();
            pass.run_remaining(&mut last, &mut routes)?;
            Prober { model, options, text, last, logits: None, routes }
        };
        let bytes = 4 * prober.text.n_scored() as u64 * model.n_vocab() as u64;
        if bytes <= memory {
            let mut logits = vec![0.0; prober.text.n_scored() * model.n_vocab()];
            let pass = prober.pass(Overrides::new())?;
            let tile_rows = pass.logits_tile_rows();
            let tiles = prober.text.rows.chunks(tile_rows).zip(logits.chunks_mut(tile_rows * model.n_vocab()));
            for (rows, out) in tiles {
                pass.logits_into(&prober.last, rows, out, &mut NoTaps)?;
            }
            model.release_output();
            prober.logits = Some(logits);
        }
        Ok(prober)
    }

    /// The text.
    pub fn text(&self) -> &ProbeText {
        &self.text
    }

    /// A pass with tensors replaced.
    ///
    /// # Errors
    /// When a replacement does not fit.
    pub fn pass<'o>(&self, overrides: Overrides<'o>) -> Result<Pass<'m, 'g, 'o>, ModelError> {
        self.model.pass(self.options.clone(), overrides)
    }

    /// States that enter layer 0.
    ///
    /// # Errors
    /// Those of the forward pass.
    pub fn embed(&self, pass: &Pass<'_, '_, '_>) -> Result<HiddenStates, ModelError> {
        pass.embed(self.text.group.clone())
    }

    /// States after the last layer of the original model.
    pub fn last(&self) -> &HiddenStates {
        &self.last
    }

    /// Runs the layers that `states` has not passed with `pass` and scores the result.
    ///
    /// # Errors
    /// Those of the forward pass.
    pub fn score(&self, pass: &Pass<'_, '_, '_>, mut states: HiddenStates) -> Result<ProbeResult, ModelError> {
        let mut flips = RouteFlips::new(&self.routes, self.text.tokens().len());
        pass.run_remaining(&mut states, &mut flips)?;
        let n_vocab = self.model.n_vocab();
        let tile_rows = pass.logits_tile_rows();
        let original = match self.logits {
            Some(_) => None,
            None => Some(self.pass(Overrides::new())?),
        };
        let mut reference = vec![0.0f32; if original.is_some() { tile_rows * n_vocab } else { 0 }];
        let mut logits = vec![0.0f32; tile_rows.min(self.text.rows.len()) * n_vocab];
        let mut klds = Vec::with_capacity(self.text.rows.len());
        for (index, rows) in self.text.rows.chunks(tile_rows).enumerate() {
            let size = rows.len() * n_vocab;
            let logits = &mut logits[..size];
            pass.logits_into(&states, rows, logits, &mut NoTaps)?;
            let reference = match (&self.logits, &original) {
                (Some(all), _) => &all[index * tile_rows * n_vocab..][..size],
                (None, Some(original)) => {
                    original.logits_into(&self.last, rows, &mut reference[..size], &mut NoTaps)?;
                    &reference[..size]
                }
                (None, None) => unreachable!("a pass is made where logits are not stored"),
            };
            let pairs = reference.par_chunks_exact(n_vocab).zip(logits.par_chunks_exact(n_vocab));
            let tile: Vec<f64> = pairs
                .map(|(base, other)| {
                    let (base_lse, other_lse) = (log_sum_exp(base), log_sum_exp(other));
                    divergence_sum(base, base_lse as f32, other, (base_lse - other_lse) as f32, f32::NEG_INFINITY)
                })
                .collect();
            klds.extend(tile);
        }
        self.model.release_output();
        let per_sequence = self.text.rows.len() / self.text.n_sequences;
        let sequences = klds.chunks_exact(per_sequence).map(mean).collect();
        let flips: Vec<u16> = self.text.rows.iter().map(|&row| flips.flips()[row]).collect();
        let routing = (self.routes.n_layers() > 0).then(|| ProbeRouting::new(&klds, &flips, per_sequence));
        Ok(ProbeResult { sequences, routing })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_token_with_changed_experts_does_not_decide() {
        let klds = [0.1, 0.1, 0.1, 9.0];
        let routing = ProbeRouting::new(&klds, &[0, 0, 0, 2], 2);
        assert_eq!(routing.flips, 0.5);
        assert!((mean(&routing.steady) - 0.075).abs() < 1e-12);
        let result = ProbeResult { sequences: vec![0.1, 4.55], routing: Some(routing) };
        assert!((result.mean() - 2.325).abs() < 1e-12);
        assert!((result.robust_mean(Some(0.2)) - 0.175).abs() < 1e-12);
        assert_eq!(result.robust_mean(None), result.mean());
        assert!((result.error() - 0.025).abs() < 1e-12);
    }
}
