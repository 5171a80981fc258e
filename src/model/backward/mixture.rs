//! The way back through a router and its experts, with the choice as it was.

use rayon::prelude::*;

use super::{Back, derivatives};
use crate::model::arch::Gating;
use crate::model::error::ModelError;
use crate::model::feed_forward::tile_rows;
use crate::model::hparams::Experts;
use crate::model::math;
use crate::model::pass::{Pass, Place, ProductInput};
use crate::model::routing::{Choice, LEAST_WEIGHT_SUM, Routing};
use crate::model::taps::Expert;
use crate::model::weights::{Linear, MixtureWeights, Network};

/// What a mixture keeps of its forward pass over some rows.
pub(super) struct MixtureRun {
    /// The router's outputs, `[n, count]`.
    logits: Vec<f32>,
    /// The gating function of each, without the sum's rule.
    scores: Vec<f32>,
    routing: Routing,
}

/// The experts of a layer on the way back: what they saw, and the gradient at their weighed sum.
#[derive(Clone, Copy)]
struct Mixed<'a, 'g> {
    network: &'a Network<'g>,
    input: &'a [f32],
    d: &'a [f32],
    run: &'a MixtureRun,
}

impl<'g> Pass<'_, 'g, '_> {
    /// Runs the router over rows `router_input`.
    pub(super) fn mixture_run(
        &self,
        mixture: &MixtureWeights<'g>,
        router_input: &[f32],
        place: Place<'_>,
    ) -> Result<MixtureRun, ModelError> {
        let h = &self.model.hparams;
        let params = self.experts()?;
        let mut logits = vec![0.0; router_input.len() / h.n_embd * params.count];
        let mut product = ProductInput::new(router_input, h.n_embd, self.options.precision);
        self.linear(&mixture.router, 0, &mut product, &mut logits, place)?;
        let bias = self.decode_optional(mixture.selection_bias.as_ref())?;
        let by_logits = h.arch.feed_forward.weighs_inputs;
        let choice = Choice { params, bias: bias.as_deref(), by_logits, forced: None };
        let mut scores = logits.clone();
        let routing = choice.route(&mut scores);
        Ok(MixtureRun { logits, scores, routing })
    }

    fn experts(&self) -> Result<Experts, ModelError> {
        let missing = || ModelError::BadInput { reason: "a model without experts has a router".to_owned() };
        self.model.hparams.experts.ok_or_else(missing)
    }

    /// Adds to `d_input` the gradient at the experts' input, and gives that at the router's, given `d` at the mixture's output.
    pub(super) fn mixture_back(
        &self,
        mixture: &MixtureWeights<'g>,
        input: &[f32],
        run: &MixtureRun,
        d: &[f32],
        d_input: &mut [f32],
        back: &mut Back<'_, '_>,
    ) -> Result<Vec<f32>, ModelError> {
        let params = self.experts()?;
        let mut d_weights = vec![0.0; input.len() / self.model.hparams.n_embd * params.used];
        let mixed = Mixed { network: &mixture.experts, input, d, run };
        let tile = tile_rows(mixture.experts.n_ff);
        for (index, assigned) in run.routing.per_expert(params.count, false).iter().enumerate() {
            let expert = Expert { index, count: params.count };
            for part in assigned.chunks(tile) {
                self.check_cancelled()?;
                self.expert_back(&mixed, expert, part, [&mut d_weights, &mut *d_input], back)?;
            }
        }
        if let Some((gate, network)) = &mixture.shared {
            self.shared_back(network, gate.as_ref(), [input, d], d_input, back)?;
        }
        let d_logits = routing_back(params, run, &d_weights);
        self.product_back(&mixture.router, 0, None, d_logits, back)
    }

    /// One expert over the tokens, with their weights, that were routed to it; the gradients at these weights go to
    /// `d_weights`, `[n, used]`.
    fn expert_back(
        &self,
        mixed: &Mixed<'_, 'g>,
        expert: Expert,
        part: &[(usize, f32)],
        [d_weights, d_input]: [&mut [f32]; 2],
        back: &mut Back<'_, '_>,
    ) -> Result<(), ModelError> {
        let Mixed { network, input, d, run } = *mixed;
        let n_embd = self.model.hparams.n_embd;
        let weighs_inputs = self.model.hparams.arch.feed_forward.weighs_inputs;
        let outer = back.place;
        let place = Place { layer: outer.layer, token: &|row| (outer.token)(part[row].0) };
        let mut back = Back { place, taps: &mut *back.taps };
        let gathered = |rows: &[f32], weighed: bool| -> Vec<f32> {
            let mut out = Vec::with_capacity(part.len() * n_embd);
            for &(token, weight) in part {
                let factor = if weighed { weight } else { 1.0 };
                out.extend(rows[token * n_embd..][..n_embd].iter().map(|x| x * factor));
            }
            out
        };
        let x = gathered(input, weighs_inputs);
        let network_run = self.network_run(network, Some(expert), &x, place)?;
        let slot = |token: usize| token * run.routing.used() + run.routing.slot(token, expert.index);
        if !weighs_inputs {
            let y = self.network_output(network, Some(expert), &network_run, place)?;
            for (y, &(token, _)) in y.chunks_exact(n_embd).zip(part) {
                d_weights[slot(token)] = derivatives::dot(y, &d[token * n_embd..][..n_embd]) as f32;
            }
        }
        let mut d_x = vec![0.0; x.len()];
        self.network_back(network, Some(expert), network_run, gathered(d, !weighs_inputs), &mut d_x, &mut back)?;
        for (d_x, &(token, weight)) in d_x.chunks_exact(n_embd).zip(part) {
            let rows = token * n_embd..(token + 1) * n_embd;
            if weighs_inputs {
                d_weights[slot(token)] = derivatives::dot(d_x, &input[rows.clone()]) as f32;
            }
            math::add_scaled(&mut d_input[rows], d_x, if weighs_inputs { weight } else { 1.0 });
        }
        Ok(())
    }

    /// Adds to `d_input` the gradient at what the shared expert saw.
    fn shared_back(
        &self,
        network: &Network<'g>,
        gate: Option<&Linear<'g>>,
        [input, d]: [&[f32]; 2],
        d_input: &mut [f32],
        back: &mut Back<'_, '_>,
    ) -> Result<(), ModelError> {
        let n_embd = self.model.hparams.n_embd;
        let rows = tile_rows(network.n_ff);
        let outer = back.place;
        let tiles = input.chunks(rows * n_embd).zip(d.chunks(rows * n_embd)).zip(d_input.chunks_mut(rows * n_embd));
        for (tile, ((x, d), d_x)) in tiles.enumerate() {
            self.check_cancelled()?;
            let place = Place { layer: outer.layer, token: &|row| (outer.token)(tile * rows + row) };
            let mut back = Back { place, taps: &mut *back.taps };
            let run = self.network_run(network, None, x, place)?;
            let mut d_output = d.to_vec();
            if let Some(gate) = gate {
                let mut shares = vec![0.0; x.len() / n_embd];
                let mut product = ProductInput::new(x, n_embd, self.options.precision);
                self.linear(gate, 0, &mut product, &mut shares, place)?;
                let y = self.network_output(network, None, &run, place)?;
                for ((share, y), d) in
                    shares.iter_mut().zip(y.chunks_exact(n_embd)).zip(d_output.chunks_exact_mut(n_embd))
                {
                    let factor = math::sigmoid(*share);
                    *share = derivatives::dot(y, d) as f32 * factor * (1.0 - factor);
                    math::scale(d, factor);
                }
                self.add_product_back(gate, 0, None, shares, d_x, &mut back)?;
            }
            self.network_back(network, None, run, d_output, d_x, &mut back)?;
        }
        Ok(())
    }
}

/// The gradient at the router's outputs, `[n, count]`, given that at the weights of the chosen experts, `[n, used]`.
fn routing_back(params: Experts, run: &MixtureRun, d_weights: &[f32]) -> Vec<f32> {
    let Experts { count, used, gating, .. } = params;
    let mut d_logits = vec![0.0; run.logits.len()];
    let rows = d_logits.par_chunks_mut(count).zip(run.logits.par_chunks(count)).zip(run.scores.par_chunks(count));
    let chosen = run.routing.chosen().par_chunks(used).zip(run.routing.weights().par_chunks(used));
    rows.zip(chosen.zip(d_weights.par_chunks(used))).for_each(
        |(((d, logits), scores), ((chosen, weights), d_weights))| {
            let mut d_chosen = d_weights.to_vec();
            weights_back(params, scores, chosen, weights, &mut d_chosen);
            for (&expert, d_chosen) in chosen.iter().zip(d_chosen) {
                d[expert as usize] = d_chosen;
            }
            match gating {
                Gating::SoftmaxOfChosen => {}
                Gating::Softmax | Gating::SoftmaxNormalized => derivatives::soft_max(scores, d),
                Gating::Sigmoid | Gating::SigmoidNormalized => {
                    d.iter_mut().zip(scores).for_each(|(d, s)| *d *= s * (1.0 - s));
                }
                Gating::SqrtSoftplus | Gating::SqrtSoftplusNormalized => {
                    // Of experts that were not chosen the slope may be infinite, and the gradient is zero.
                    for ((d, s), &logit) in d.iter_mut().zip(scores).zip(logits).filter(|((d, _), _)| **d != 0.0) {
                        *d *= math::sigmoid(logit) / (2.0 * s);
                    }
                }
            }
        },
    );
    d_logits
}

/// Back through the scale and the sum's rule: turns the gradient at one token's weights into that at the scores, or logits, of
/// the chosen experts.
fn weights_back(params: Experts, scores: &[f32], chosen: &[u32], weights: &[f32], d: &mut [f32]) {
    math::scale(d, params.scale);
    let shares: Vec<f32> = weights.iter().map(|w| if params.scale == 0.0 { 0.0 } else { w / params.scale }).collect();
    if params.gating == Gating::SoftmaxOfChosen {
        derivatives::soft_max(&shares, d);
    } else if params.gating.is_normalized() {
        let sum = chosen.iter().map(|&expert| scores[expert as usize]).sum::<f32>();
        let mean = if sum > LEAST_WEIGHT_SUM { derivatives::dot(&shares, d) as f32 } else { 0.0 };
        d.iter_mut().for_each(|d| *d = (*d - mean) / sum.max(LEAST_WEIGHT_SUM));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routers_have_the_slopes_of_every_gating_rule() {
        use Gating::*;
        let logits = [0.3f32, -0.8, 1.4, 0.1, -0.2, 0.9];
        let c = [0.7f32, -1.3, 0.4];
        for gating in [
            Softmax,
            SoftmaxNormalized,
            SoftmaxOfChosen,
            Sigmoid,
            SigmoidNormalized,
            SqrtSoftplus,
            SqrtSoftplusNormalized,
        ] {
            let params = Experts { count: 6, used: 3, n_ff: None, shared_n_ff: None, gating, scale: 1.7, groups: None };
            let choice = Choice { params, bias: None, by_logits: false, forced: Some(&[2, 0, 4]) };
            let loss = |logits: &[f32]| -> f64 {
                let routing = choice.route(&mut logits.to_vec());
                routing.weights().iter().zip(&c).map(|(w, c)| f64::from(*w) * f64::from(*c)).sum()
            };
            let mut scores = logits.to_vec();
            let routing = choice.route(&mut scores);
            let run = MixtureRun { logits: logits.to_vec(), scores, routing };
            for (i, found) in routing_back(params, &run, &c).iter().enumerate() {
                let moved = |by: f32| {
                    let mut moved = logits;
                    moved[i] += by;
                    loss(&moved)
                };
                let expected = (moved(0.005) - moved(-0.005)) / 0.01;
                assert!((f64::from(*found) - expected).abs() < 1e-3, "{gating:?} {i}: {found} {expected}");
            }
        }
    }
}
