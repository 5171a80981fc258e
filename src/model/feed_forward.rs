//! The feed-forward half of a layer: one network, or a router and many.

use rayon::prelude::*;

use super::arch::Activation;
use super::error::ModelError;
use super::hparams::Experts;
use super::math;
use super::pass::{Pass, Place, ProductInput};
use super::taps::{Expert, Taps};
use super::weights::{FeedForwardWeights, GateUp, Layer, Linear, Network};

/// Bytes that gate and up values of one tile may take; together with the width they fix the rows per tile.
const TILE_BYTES: usize = 96 << 20;

/// Rows that are routed to experts together: many, since each expert sees a fraction of them.
pub(super) const ROUTED_ROWS: usize = 8192;

/// Smallest normal binary16 number, below which llama.cpp does not let the sum of expert weights fall.
const LEAST_WEIGHT_SUM: f32 = 6.103_515_6e-5;

/// Rows of a tile for a network of width `n_ff`.
pub(super) fn tile_rows(n_ff: usize) -> usize {
    (TILE_BYTES / (8 * n_ff.max(1))).clamp(256, 2048) / 64 * 64
}

/// Which experts a token goes to, and with what weights.
struct Routing {
    /// Tokens and weights per expert, tokens ascending.
    per_expert: Vec<Vec<(usize, f32)>>,
}

impl<'g> Pass<'_, 'g, '_> {
    pub(super) fn feed_forward_block(
        &self,
        il: usize,
        layer: &Layer<'g>,
        data: &mut [f32],
        taps: &mut dyn Taps,
    ) -> Result<(), ModelError> {
        let h = &self.model.hparams;
        let norm = layer.ffn_norm.decode(&self.overrides, 0)?;
        let rows = match &layer.feed_forward {
            FeedForwardWeights::Dense(network) => tile_rows(network.n_ff),
            FeedForwardWeights::Experts { .. } => ROUTED_ROWS,
        };
        for (tile, residual) in data.chunks_mut(rows * h.n_embd).enumerate() {
            self.check_cancelled()?;
            let place = Place { layer: Some(il), token: &|row| tile * rows + row };
            let normed = self.normed(residual, &norm);
            let mut output = match &layer.feed_forward {
                FeedForwardWeights::Dense(network) => {
                    let mut output = vec![0.0; residual.len()];
                    self.network(network, None, &normed, &mut output, place, taps)?;
                    output
                }
                FeedForwardWeights::Experts { router, selection_bias, experts, shared } => {
                    let bias = self.decode_optional(selection_bias.as_ref())?;
                    let mut output = self.routed((router, bias.as_deref()), experts, &normed, place, taps)?;
                    if let Some((gate, network)) = shared {
                        self.add_shared(gate.as_ref(), network, &normed, &mut output, place, taps)?;
                    }
                    output
                }
            };
            drop(normed);
            self.add_to_residual(residual, &mut output, layer.post_ffn_norm.as_ref())?;
        }
        Ok(())
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
                gate.par_chunks(n_ff).zip(up.par_chunks_mut(n_ff)).for_each(|(gate, up)| self.activate(gate, up));
            }
            GateUp::Fused(both) => {
                self.tap(&[both.weight.name], place.layer, expert, x, h.n_embd, taps)?;
                let mut gate_up = vec![0.0; rows * 2 * n_ff];
                self.linear(both, mat, &mut input, &mut gate_up, place)?;
                gate_up.par_chunks(2 * n_ff).zip(up.par_chunks_mut(n_ff)).for_each(|(both, up)| {
                    up.copy_from_slice(&both[n_ff..]);
                    self.activate(&both[..n_ff], up);
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

    fn activate(&self, gate: &[f32], up: &mut [f32]) {
        match self.model.hparams.arch.activation {
            Activation::Silu => math::silu_mul(gate, up),
            Activation::Gelu => math::gelu_mul(gate, up),
            Activation::SwigluOai => math::swiglu_oai_mul(gate, up),
        }
    }

    /// Weighted sum of the chosen experts' outputs, `[n, n_embd]`, added up in the order of the experts.
    fn routed(
        &self,
        (router, bias): (&Linear<'g>, Option<&[f32]>),
        experts: &Network<'g>,
        normed: &[f32],
        place: Place<'_>,
        taps: &mut dyn Taps,
    ) -> Result<Vec<f32>, ModelError> {
        let h = &self.model.hparams;
        let n_embd = h.n_embd;
        let mut output = vec![0.0; normed.len()];
        let Some(params) = h.experts else { return Ok(output) };
        self.tap(&[router.weight.name], place.layer, None, normed, n_embd, taps)?;
        let mut scores = vec![0.0; normed.len() / n_embd * params.count];
        let mut input = ProductInput::new(normed, n_embd, self.options.precision);
        self.linear(router, 0, &mut input, &mut scores, place)?;
        drop(input);
        let routing = route(&mut scores, bias, params);
        let tile = tile_rows(experts.n_ff);
        for (index, assigned) in routing.per_expert.iter().enumerate() {
            let expert = Expert { index, count: params.count };
            for part in assigned.chunks(tile) {
                self.check_cancelled()?;
                let mut x = vec![0.0; part.len() * n_embd];
                for (row, &(token, _)) in x.chunks_exact_mut(n_embd).zip(part) {
                    row.copy_from_slice(&normed[token * n_embd..][..n_embd]);
                }
                let mut y = vec![0.0; x.len()];
                let inner = Place { layer: place.layer, token: &|row| (place.token)(part[row].0) };
                self.network(experts, Some(expert), &x, &mut y, inner, taps)?;
                for (row, &(token, weight)) in y.chunks_exact(n_embd).zip(part) {
                    math::add_scaled(&mut output[token * n_embd..][..n_embd], row, weight);
                }
            }
        }
        Ok(output)
    }

    /// Adds the shared expert, scaled by the sigmoid of its own gate if it has one.
    fn add_shared(
        &self,
        gate: Option<&Linear<'g>>,
        network: &Network<'g>,
        normed: &[f32],
        output: &mut [f32],
        place: Place<'_>,
        taps: &mut dyn Taps,
    ) -> Result<(), ModelError> {
        let n_embd = self.model.hparams.n_embd;
        let rows = tile_rows(network.n_ff);
        let tiles = normed.chunks(rows * n_embd).zip(output.chunks_mut(rows * n_embd));
        for (tile, (x, out)) in tiles.enumerate() {
            self.check_cancelled()?;
            let inner = Place { layer: place.layer, token: &|row| (place.token)(tile * rows + row) };
            let mut shares = vec![1.0; x.len() / n_embd];
            if let Some(gate) = gate {
                self.tap(&[gate.weight.name], place.layer, None, x, n_embd, taps)?;
                let mut input = ProductInput::new(x, n_embd, self.options.precision);
                self.linear(gate, 0, &mut input, &mut shares, inner)?;
                shares.iter_mut().for_each(|share| *share = math::sigmoid(*share));
            }
            let mut y = vec![0.0; x.len()];
            self.network(network, None, x, &mut y, inner, taps)?;
            let rows = out.par_chunks_mut(n_embd).zip(y.par_chunks(n_embd)).zip(&shares);
            rows.for_each(|((out, y), &share)| math::add_scaled(out, y, share));
        }
        Ok(())
    }
}

/// Chooses the experts of every row of `scores`, `[n, count]`; equal scores go to the lower number. `bias` is added for the
/// choice only.
fn route(scores: &mut [f32], bias: Option<&[f32]>, params: Experts) -> Routing {
    use super::arch::Gating;
    let mut per_expert = vec![Vec::new(); params.count];
    let mut order: Vec<usize> = Vec::new();
    let mut biased: Vec<f32> = Vec::new();
    for (token, row) in scores.chunks_exact_mut(params.count).enumerate() {
        match params.gating {
            Gating::Softmax | Gating::SoftmaxNormalized => math::soft_max(row, None),
            Gating::Sigmoid | Gating::SigmoidNormalized => row.iter_mut().for_each(|x| *x = math::sigmoid(*x)),
            Gating::SoftmaxOfChosen => {}
        }
        biased.clear();
        biased.extend_from_slice(row);
        if let Some(bias) = bias {
            math::add(&mut biased, bias);
        }
        if let Some((groups, chosen)) = params.groups {
            keep_best_groups(&mut biased, groups, chosen);
        }
        order.clear();
        order.extend(0..params.count);
        order.sort_by(|&a, &b| biased[b].total_cmp(&biased[a]));
        let chosen = &order[..params.used];
        let mut weights: Vec<f32> = chosen.iter().map(|&e| row[e]).collect();
        match params.gating {
            Gating::Softmax | Gating::Sigmoid => {}
            Gating::SoftmaxNormalized | Gating::SigmoidNormalized => {
                let sum = weights.iter().sum::<f32>().max(LEAST_WEIGHT_SUM);
                weights.iter_mut().for_each(|w| *w /= sum);
            }
            Gating::SoftmaxOfChosen => math::soft_max(&mut weights, None),
        }
        for (&expert, weight) in chosen.iter().zip(weights) {
            per_expert[expert].push((token, weight * params.scale));
        }
    }
    Routing { per_expert }
}

/// Sets the scores of all but the `chosen` best of `groups` groups to minus infinity; a group is as good as its two best
/// experts together.
fn keep_best_groups(scores: &mut [f32], groups: usize, chosen: usize) {
    let size = scores.len() / groups;
    let best_two = |group: &[f32]| {
        let mut sorted = group.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        sorted.iter().take(2).sum::<f32>()
    };
    let sums: Vec<f32> = scores.chunks_exact(size).map(best_two).collect();
    let mut order: Vec<usize> = (0..groups).collect();
    order.sort_by(|&a, &b| sums[b].total_cmp(&sums[a]));
    for &group in &order[chosen..] {
        scores[group * size..][..size].fill(f32::NEG_INFINITY);
    }
}

#[cfg(test)]
mod tests {
    use super::super::arch::Gating;
    use super::*;

    #[test]
    fn routing_follows_the_gating_rule() {
        let scores = [0.0f32, 2f32.ln(), 0.0, 3f32.ln()];
        let params =
            |gating| Experts { count: 4, used: 2, n_ff: None, shared_n_ff: None, gating, scale: 1.0, groups: None };
        let chosen = |params: Experts, bias: Option<&[f32]>| {
            let routing = route(&mut scores.clone(), bias, params);
            let of = |e: usize| routing.per_expert[e].first().map_or(0.0, |&(_, w)| w);
            [of(0), of(1), of(2), of(3)]
        };
        let weights = |gating| chosen(params(gating), None);
        let close = |a: [f32; 4], b: [f32; 4]| a.iter().zip(&b).all(|(x, y)| (x - y).abs() < 1e-6);
        assert!(close(weights(Gating::Softmax), [0.0, 2.0 / 7.0, 0.0, 3.0 / 7.0]));
        assert!(close(weights(Gating::SoftmaxNormalized), [0.0, 0.4, 0.0, 0.6]));
        assert!(close(weights(Gating::SoftmaxOfChosen), [0.0, 0.4, 0.0, 0.6]));
        assert!(close(weights(Gating::Sigmoid), [0.0, 2.0 / 3.0, 0.0, 0.75]));
        assert!(close(weights(Gating::SigmoidNormalized), [0.0, 8.0 / 17.0, 0.0, 9.0 / 17.0]));
        let scaled = Experts { scale: 2.5, ..params(Gating::SigmoidNormalized) };
        assert!(close(chosen(scaled, None), [0.0, 20.0 / 17.0, 0.0, 22.5 / 17.0]));
        // The bias chooses, the score weighs.
        assert!(close(chosen(params(Gating::Sigmoid), Some(&[1.0, 0.0, 0.9, 0.0])), [0.5, 0.0, 0.5, 0.0]));
        // Of two groups of two the one with the better sum.
        let grouped = Experts { groups: Some((2, 1)), ..params(Gating::Sigmoid) };
        assert!(close(chosen(grouped, None), [0.0, 0.0, 0.5, 0.75]));
    }

    #[test]
    fn tiles_are_bounded_for_any_width() {
        for n_ff in [1, 100, 11_008, 28_672, 1 << 20] {
            assert!((256..=2048).contains(&tile_rows(n_ff)));
        }
    }
}
