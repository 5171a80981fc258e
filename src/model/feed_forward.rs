//! The feed-forward half of a layer: one network, a router and many, or both.

use rayon::prelude::*;

use super::arch::Activation;
use super::error::ModelError;
use super::math;
use super::pass::{Pass, Place, ProductInput};
use super::routing::Choice;
use super::taps::{ChosenExperts, Expert, Taps};
use super::weights::{Beside, FeedForwardWeights, GateUp, Layer, Linear, MixtureWeights, Network};

/// Bytes that gate and up values of one tile may take; together with the width they fix the rows per tile.
const TILE_BYTES: usize = 96 << 20;

/// Rows that are routed to experts together: many, since each expert sees a fraction of them.
pub(super) const ROUTED_ROWS: usize = 8192;

/// Rows of a tile for a network of width `n_ff`.
pub(super) fn tile_rows(n_ff: usize) -> usize {
    (TILE_BYTES / (8 * n_ff.max(1))).clamp(256, 2048) / 64 * 64
}

impl<'g> Pass<'_, 'g, '_> {
    /// Adds to the residual stream what the feed-forward part of layer `il` gives.
    pub(super) fn feed_forward_block(
        &self,
        il: usize,
        layer: &Layer<'g>,
        data: &mut [f32],
        taps: &mut dyn Taps,
    ) -> Result<(), ModelError> {
        let h = &self.model.hparams;
        let norm = self.decode_optional(layer.ffn_norm.as_ref())?;
        let rows = match &layer.feed_forward {
            FeedForwardWeights::Dense(network) => tile_rows(network.n_ff),
            FeedForwardWeights::Experts(_) | FeedForwardWeights::Both { .. } => ROUTED_ROWS,
        };
        for (tile, residual) in data.chunks_mut(rows * h.n_embd).enumerate() {
            self.check_cancelled()?;
            let place = Place { layer: Some(il), token: &|row| tile * rows + row };
            let normed = norm.as_ref().map(|norm| self.normed(residual, norm));
            let input = normed.as_deref().unwrap_or(residual);
            let mut output = match &layer.feed_forward {
                FeedForwardWeights::Dense(network) => self.in_tiles(network, None, input, place, taps)?,
                FeedForwardWeights::Experts(mixture) => self.mixture(mixture, input, input, place, taps)?,
                FeedForwardWeights::Both { dense, mixture, beside } => {
                    let mut output = self.in_tiles(dense, None, input, place, taps)?;
                    self.norm_rows(&mut output, &beside.post_dense_norm.decode(&self.overrides, 0)?);
                    let experts = self.beside(mixture, beside, residual, place, taps)?;
                    math::add(&mut output, &experts);
                    output
                }
            };
            drop(normed);
            self.add_to_residual(residual, &mut output, layer.post_ffn_norm.as_ref())?;
        }
        Ok(())
    }

    /// Experts that stand beside a dense network: they and their router see the residual stream through norms of their own.
    fn beside(
        &self,
        mixture: &MixtureWeights<'g>,
        beside: &Beside<'g>,
        residual: &[f32],
        place: Place<'_>,
        taps: &mut dyn Taps,
    ) -> Result<Vec<f32>, ModelError> {
        let mut scale = beside.router_scale.decode(&self.overrides, 0)?;
        math::scale(&mut scale, 1.0 / (self.model.hparams.n_embd as f32).sqrt());
        let router_input = self.normed(residual, &scale);
        let input = self.normed(residual, &beside.experts_norm.decode(&self.overrides, 0)?);
        let mut output = self.mixture(mixture, &router_input, &input, place, taps)?;
        self.norm_rows(&mut output, &beside.post_experts_norm.decode(&self.overrides, 0)?);
        Ok(output)
    }

    /// A network over rows of any number, `[n, n_embd]` to `[n, n_embd]`, with the sigmoid of `gate` as factor of each row.
    fn in_tiles(
        &self,
        network: &Network<'g>,
        gate: Option<&Linear<'g>>,
        input: &[f32],
        place: Place<'_>,
        taps: &mut dyn Taps,
    ) -> Result<Vec<f32>, ModelError> {
        let n_embd = self.model.hparams.n_embd;
        let rows = tile_rows(network.n_ff);
        let mut output = vec![0.0; input.len()];
        let tiles = input.chunks(rows * n_embd).zip(output.chunks_mut(rows * n_embd));
        for (tile, (x, out)) in tiles.enumerate() {
            self.check_cancelled()?;
            let inner = Place { layer: place.layer, token: &|row| (place.token)(tile * rows + row) };
            let mut shares = Vec::new();
            if let Some(gate) = gate {
                self.tap(&[gate.weight.name], place.layer, None, x, n_embd, taps)?;
                shares.resize(x.len() / n_embd, 0.0);
                let mut input = ProductInput::new(x, n_embd, self.options.precision);
                self.linear(gate, 0, &mut input, &mut shares, inner)?;
                shares.iter_mut().for_each(|share| *share = math::sigmoid(*share));
            }
            self.network(network, None, x, out, inner, taps)?;
            out.par_chunks_mut(n_embd).zip(&shares).for_each(|(out, &share)| math::scale(out, share));
        }
        Ok(output)
    }

    /// One gated network over rows `x`, `[n, n_embd]` to `[n, n_embd]`.
    fn network(
        &self,
        network: &Network<'g>,
        expert: Option<Expert>,
        x: &[f32],
        out: &mut [f32],
        place: Place<'_>,
        taps: &mut dyn Taps,
    ) -> Result<(), ModelError> {
        let h = &self.model.hparams;
        let mat = expert.map_or(0, |e| e.index);
        let n_ff = network.n_ff;
        let rows = x.len() / h.n_embd;
        let mut input = ProductInput::new(x, h.n_embd, self.options.precision);
        let mut up = vec![0.0; rows * n_ff];
        match &network.gate_up {
            GateUp::Separate { gate: w_gate, up: w_up } => {
                self.tap(&[w_gate.weight.name, w_up.weight.name], place.layer, expert, x, h.n_embd, taps)?;
                let mut gate = vec![0.0; rows * n_ff];
                self.linear(w_gate, mat, &mut input, &mut gate, place)?;
                self.linear(w_up, mat, &mut input, &mut up, place)?;
                let rows = gate.par_chunks(n_ff).zip(up.par_chunks_mut(n_ff));
                rows.for_each(|(gate, up)| self.activate(gate, up, network.clamp));
            }
            GateUp::Fused(both) => {
                self.tap(&[both.weight.name], place.layer, expert, x, h.n_embd, taps)?;
                let mut gate_up = vec![0.0; rows * 2 * n_ff];
                self.linear(both, mat, &mut input, &mut gate_up, place)?;
                gate_up.par_chunks(2 * n_ff).zip(up.par_chunks_mut(n_ff)).for_each(|(both, up)| {
                    up.copy_from_slice(&both[n_ff..]);
                    self.activate(&both[..n_ff], up, network.clamp);
                });
            }
        }
        drop(input);
        if expert.is_none() {
            // Taps may need much memory, and mapped pages count as the process's. Those of the next tile cost next to
            // nothing to map again.
            self.model.release(&network.gate_up.names());
        }
        self.tap(&[network.down.weight.name], place.layer, expert, &up, n_ff, taps)?;
        let mut input = ProductInput::new(&up, n_ff, self.options.precision);
        self.linear(&network.down, mat, &mut input, out, place)
    }

    pub(super) fn activate(&self, gate: &[f32], up: &mut [f32], clamp: Option<f32>) {
        match (self.model.hparams.arch.feed_forward.activation, clamp) {
            (Activation::Silu, None) => math::silu_mul(gate, up),
            (Activation::Silu, Some(limit)) => math::silu_clamped_mul(gate, up, limit),
            (Activation::Gelu, _) => self.gelu_mul(gate, up),
            (Activation::SwigluOai, _) => math::swiglu_oai_mul(gate, up),
        }
    }

    /// Weighted sum of the chosen experts' outputs and those of the shared one, `[n, n_embd]`, added up in the order of the
    /// experts.
    pub(super) fn mixture(
        &self,
        mixture: &MixtureWeights<'g>,
        router_input: &[f32],
        input: &[f32],
        place: Place<'_>,
        taps: &mut dyn Taps,
    ) -> Result<Vec<f32>, ModelError> {
        let h = &self.model.hparams;
        let n_embd = h.n_embd;
        let mut output = vec![0.0; input.len()];
        let (Some(params), Some(layer)) = (h.experts, place.layer) else { return Ok(output) };
        let n = input.len() / n_embd;
        let router = &mixture.router;
        self.tap(&[router.weight.name], place.layer, None, router_input, n_embd, taps)?;
        let mut scores = vec![0.0; n * params.count];
        let mut product = ProductInput::new(router_input, n_embd, self.options.precision);
        self.linear(router, 0, &mut product, &mut scores, place)?;
        drop(product);

        let bias = self.decode_optional(mixture.selection_bias.as_ref())?;
        let first = (place.token)(0);
        let forced = taps.forced_experts(layer, first..first + n, params.used);
        let weighs_inputs = h.arch.feed_forward.weighs_inputs;
        let choice = Choice { params, bias: bias.as_deref(), by_logits: weighs_inputs, forced };
        let routing = choice.route(&mut scores);
        taps.chosen_experts(&ChosenExperts {
            layer,
            first_row: first,
            count: params.count,
            used: params.used,
            experts: routing.chosen(),
        });

        let tile = tile_rows(mixture.experts.n_ff);
        for (index, assigned) in routing.per_expert(params.count, self.options.all_experts).iter().enumerate() {
            let expert = Expert { index, count: params.count };
            for part in assigned.chunks(tile) {
                self.check_cancelled()?;
                let mut x = vec![0.0; part.len() * n_embd];
                for (row, &(token, weight)) in x.chunks_exact_mut(n_embd).zip(part) {
                    row.copy_from_slice(&input[token * n_embd..][..n_embd]);
                    if weighs_inputs {
                        // One that did not choose the expert is shown as it would be if it had.
                        let shown = if weight == 0.0 { scores[token * params.count + index] } else { weight };
                        math::scale(row, shown);
                    }
                }
                let mut y = vec![0.0; x.len()];
                let inner = Place { layer: place.layer, token: &|row| (place.token)(part[row].0) };
                self.network(&mixture.experts, Some(expert), &x, &mut y, inner, taps)?;
                for (row, &(token, weight)) in y.chunks_exact(n_embd).zip(part) {
                    let weight = if weighs_inputs && weight != 0.0 { 1.0 } else { weight };
                    if weight != 0.0 {
                        math::add_scaled(&mut output[token * n_embd..][..n_embd], row, weight);
                    }
                }
            }
        }
        if let Some((gate, network)) = &mixture.shared {
            let shared = self.in_tiles(network, gate.as_ref(), input, place, taps)?;
            output.par_chunks_mut(n_embd).zip(shared.par_chunks(n_embd)).for_each(|(out, y)| math::add(out, y));
        }
        Ok(output)
    }

    fn norm_rows(&self, rows: &mut [f32], norm: &[f32]) {
        let epsilon = self.model.hparams.norm_epsilon;
        rows.par_chunks_mut(norm.len()).for_each(|row| math::rms_norm_in_place(row, norm, epsilon));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_are_bounded_for_any_width() {
        for n_ff in [1, 100, 11_008, 28_672, 1 << 20] {
            assert!((256..=2048).contains(&tile_rows(n_ff)));
        }
    }
}
