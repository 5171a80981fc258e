//! The way back through the feed-forward half of a layer.

use rayon::prelude::*;

use super::{Back, add_rows, derivatives};
use crate::model::arch::Activation;
use crate::model::error::ModelError;
use crate::model::feed_forward::tile_rows;
use crate::model::math;
use crate::model::pass::{Pass, Place, ProductInput};
use crate::model::taps::{Expert, NoTaps};
use crate::model::weights::{Beside, FeedForwardWeights, GateUp, Layer, Linear, MixtureWeights, Network};

/// What a network keeps of its forward pass over some rows: gate and up, `[n, n_ff]` each.
pub(super) struct NetworkRun {
    gate: Vec<f32>,
    up: Vec<f32>,
}

impl<'g> Pass<'_, 'g, '_> {
    /// Turns the gradient at what left the feed-forward half into that at `residual`, which entered it.
    pub(super) fn feed_forward_back(
        &self,
        layer: &Layer<'g>,
        residual: &[f32],
        d: &mut [f32],
        back: &mut Back<'_, '_>,
    ) -> Result<(), ModelError> {
        let n_embd = self.model.hparams.n_embd;
        let norm = self.decode_optional(layer.ffn_norm.as_ref())?;
        let rows = match &layer.feed_forward {
            FeedForwardWeights::Dense(network) => tile_rows(network.n_ff),
            FeedForwardWeights::Experts(_) | FeedForwardWeights::Both { .. } => residual.len().div_ceil(n_embd).max(1),
        };
        let outer = back.place;
        for (tile, (residual, d)) in residual.chunks(rows * n_embd).zip(d.chunks_mut(rows * n_embd)).enumerate() {
            self.check_cancelled()?;
            let place = Place { layer: outer.layer, token: &|row| (outer.token)(tile * rows + row) };
            let mut back = Back { place, taps: &mut *back.taps };
            let normed = norm.as_ref().map(|norm| self.normed(residual, norm));
            let input = normed.as_deref().unwrap_or(residual);
            let mut d_output = d.to_vec();
            let mut d_input = vec![0.0; d.len()];
            match &layer.feed_forward {
                FeedForwardWeights::Dense(network) => {
                    let run = self.network_run(network, None, input, place)?;
                    let unnormed = match &layer.post_ffn_norm {
                        Some(_) => Some(self.network_output(network, None, &run, place)?),
                        None => None,
                    };
                    self.added_back(&mut d_output, unnormed.as_deref(), layer.post_ffn_norm.as_ref())?;
                    self.network_back(network, None, run, d_output, &mut d_input, &mut back)?;
                }
                FeedForwardWeights::Experts(mixture) => {
                    let run = self.mixture_run(mixture, input, place)?;
                    let unnormed = match &layer.post_ffn_norm {
                        Some(_) => Some(self.mixture(mixture, input, input, place, &mut NoTaps)?),
                        None => None,
                    };
                    self.added_back(&mut d_output, unnormed.as_deref(), layer.post_ffn_norm.as_ref())?;
                    let d_router = self.mixture_back(mixture, input, &run, &d_output, &mut d_input, &mut back)?;
                    add_rows(&mut d_input, &d_router);
                }
                FeedForwardWeights::Both { dense, mixture, beside } => {
                    let both = BothParts { dense, mixture, beside };
                    let d_stream =
                        self.both_back(layer, &both, [residual, input], d_output, &mut d_input, &mut back)?;
                    add_rows(d, &d_stream);
                }
            }
            self.norm_back(residual, norm.as_deref(), &mut d_input);
            add_rows(d, &d_input);
        }
        Ok(())
    }

    /// Gate and up of a network over rows `x`.
    pub(super) fn network_run(
        &self,
        network: &Network<'g>,
        expert: Option<Expert>,
        x: &[f32],
        place: Place<'_>,
    ) -> Result<NetworkRun, ModelError> {
        let n_embd = self.model.hparams.n_embd;
        let (rows, n_ff) = (x.len() / n_embd, network.n_ff);
        let mat = expert.map_or(0, |e| e.index);
        let mut input = ProductInput::new(x, n_embd, self.options.precision);
        let mut multiplied = |linear: &Linear<'g>| -> Result<Vec<f32>, ModelError> {
            let mut out = vec![0.0; rows * linear.weight.n_out];
            self.linear(linear, mat, &mut input, &mut out, place)?;
            Ok(out)
        };
        Ok(match &network.gate_up {
            GateUp::Separate { gate, up } => NetworkRun { gate: multiplied(gate)?, up: multiplied(up)? },
            GateUp::Fused(both) => {
                let both = multiplied(both)?;
                let half =
                    |first: usize| both.chunks(2 * n_ff).flat_map(|row| &row[first..first + n_ff]).copied().collect();
                NetworkRun { gate: half(0), up: half(n_ff) }
            }
        })
    }

    /// What a network gives, `[n, n_embd]`.
    pub(super) fn network_output(
        &self,
        network: &Network<'g>,
        expert: Option<Expert>,
        run: &NetworkRun,
        place: Place<'_>,
    ) -> Result<Vec<f32>, ModelError> {
        let n_ff = network.n_ff;
        let mut up = run.up.clone();
        run.gate
            .par_chunks(n_ff)
            .zip(up.par_chunks_mut(n_ff))
            .for_each(|(gate, up)| self.activate(gate, up, network.clamp));
        let mut out = vec![0.0; up.len() / n_ff * self.model.hparams.n_embd];
        let mut input = ProductInput::new(&up, n_ff, self.options.precision);
        self.linear(&network.down, expert.map_or(0, |e| e.index), &mut input, &mut out, place)?;
        Ok(out)
    }

    /// Adds to `d_input` the gradient at the rows that a network saw, given `d` at what it gave.
    pub(super) fn network_back(
        &self,
        network: &Network<'g>,
        expert: Option<Expert>,
        run: NetworkRun,
        d: Vec<f32>,
        d_input: &mut [f32],
        back: &mut Back<'_, '_>,
    ) -> Result<(), ModelError> {
        let (n_ff, mat) = (network.n_ff, expert.map_or(0, |e| e.index));
        let NetworkRun { mut gate, mut up } = run;
        let d = self.product_back(&network.down, mat, expert, d, back)?;
        gate.par_chunks_mut(n_ff)
            .zip(up.par_chunks_mut(n_ff))
            .zip(d.par_chunks(n_ff))
            .for_each(|((gate, up), d)| self.activate_back(gate, up, d, network.clamp));
        drop(d);
        match &network.gate_up {
            GateUp::Separate { gate: w_gate, up: w_up } => {
                self.add_product_back(w_gate, mat, expert, gate, d_input, back)?;
                self.add_product_back(w_up, mat, expert, up, d_input, back)
            }
            GateUp::Fused(both) => {
                let joined = super::attention::join(&[(&gate, n_ff), (&up, n_ff)]);
                drop((gate, up));
                self.add_product_back(both, mat, expert, joined, d_input, back)
            }
        }
    }

    fn activate_back(&self, gate: &mut [f32], up: &mut [f32], d: &[f32], clamp: Option<f32>) {
        match (self.model.hparams.arch.feed_forward.activation, clamp) {
            (Activation::Silu, None) => derivatives::silu_mul(gate, up, d),
            (Activation::Silu, Some(limit)) => derivatives::silu_clamped_mul(gate, up, d, limit),
            (Activation::Gelu, _) => derivatives::gelu_mul(gate, up, d),
            (Activation::SwigluOai, _) => derivatives::swiglu_oai_mul(gate, up, d),
        }
    }

    /// Adds to `d_input` the gradient at the input of a dense network and gives that at the stream which the experts beside it
    /// see through norms of their own. `d` is the gradient at what was added to the stream, before a norm of both.
    fn both_back(
        &self,
        layer: &Layer<'g>,
        both: &BothParts<'_, 'g>,
        [residual, input]: [&[f32]; 2],
        mut d: Vec<f32>,
        d_input: &mut [f32],
        back: &mut Back<'_, '_>,
    ) -> Result<Vec<f32>, ModelError> {
        let BothParts { dense, mixture, beside } = *both;
        let weights = |weight: &crate::model::weights::Weight<'g>| weight.decode(&self.overrides, 0);
        let run = self.network_run(dense, None, input, back.place)?;
        let dense_output = self.network_output(dense, None, &run, back.place)?;
        let mut router_norm = weights(&beside.router_scale)?;
        math::scale(&mut router_norm, 1.0 / (self.model.hparams.n_embd as f32).sqrt());
        let experts_norm = weights(&beside.experts_norm)?;
        let experts_input = self.normed(residual, &experts_norm);
        let router_input = self.normed(residual, &router_norm);
        let run_experts = self.mixture_run(mixture, &router_input, back.place)?;
        let experts_output = self.mixture(mixture, &router_input, &experts_input, back.place, &mut NoTaps)?;
        let (dense_norm, output_norm) = (weights(&beside.post_dense_norm)?, weights(&beside.post_experts_norm)?);
        let unnormed = layer.post_ffn_norm.as_ref().map(|_| {
            let mut sum = self.normed(&dense_output, &dense_norm);
            add_rows(&mut sum, &self.normed(&experts_output, &output_norm));
            sum
        });
        self.added_back(&mut d, unnormed.as_deref(), layer.post_ffn_norm.as_ref())?;

        let mut d_experts = d.clone();
        self.norm_back(&dense_output, Some(&dense_norm), &mut d);
        self.network_back(dense, None, run, d, d_input, back)?;
        self.norm_back(&experts_output, Some(&output_norm), &mut d_experts);
        let mut d_stream = vec![0.0; residual.len()];
        let mut d_router = self.mixture_back(mixture, &experts_input, &run_experts, &d_experts, &mut d_stream, back)?;
        self.norm_back(residual, Some(&experts_norm), &mut d_stream);
        self.norm_back(residual, Some(&router_norm), &mut d_router);
        add_rows(&mut d_stream, &d_router);
        Ok(d_stream)
    }
}

/// A dense network and the experts beside it.
#[derive(Clone, Copy)]
struct BothParts<'a, 'g> {
    dense: &'a Network<'g>,
    mixture: &'a MixtureWeights<'g>,
    beside: &'a Beside<'g>,
}
