//! Rotary position embeddings: angle tables with linear, YaRN and factor scaling, and their application.
//!
//! Formulas as `ggml_rope_ext` (llama.cpp b10605, `ggml/src/ggml-cpu/ops.cpp`): the angle of pair `i` at position
//! `p` starts at `p` and is multiplied by `base^(-2/n_rot)` from pair to pair in f32, a fact that shows in the
//! last digits at large positions.

use rayon::prelude::*;

use super::arch::RopePairs;
use super::hparams::{LayerRope, RopeScaling, RopeSettings};

/// Cosines and sines for positions `0..n_positions`, `[n_positions, n_rot / 2]` each.
pub(super) struct RopeTable {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// The table of a kind of layer; `factors` divide the frequencies, one per pair.
    pub(super) fn new(settings: &RopeSettings, rope: LayerRope, factors: Option<&[f32]>, n_positions: usize) -> Self {
        let half = rope.n_rot / 2;
        let yarn = settings.scaling == RopeScaling::Yarn && !rope.plain;
        let ramp = yarn.then(|| yarn_ramp(settings, rope));
        let magnitude = magnitude(settings, rope, yarn);
        let step = rope.base.powf(-2.0 / rope.n_rot as f32);
        let is_fixed = |pair: usize| settings.fixed_pairs.get(pair).copied().unwrap_or(false);
        let mut cos = vec![0.0; n_positions * half];
        let mut sin = vec![0.0; n_positions * half];
        cos.par_chunks_mut(half).zip(sin.par_chunks_mut(half)).enumerate().for_each(|(position, (cos, sin))| {
            let mut angle = position as f32;
            for i in 0..half {
                let full = angle / factors.map_or(1.0, |f| f[i]);
                let stretched = rope.scale * full;
                let theta = match &ramp {
                    _ if is_fixed(i) => 0.0,
                    Some(ramp) => stretched * (1.0 - ramp[i]) + full * ramp[i],
                    None => stretched,
                };
                cos[i] = theta.cos() * magnitude;
                sin[i] = theta.sin() * magnitude;
                angle *= step;
            }
        });
        RopeTable { half, cos, sin }
    }

    /// Turns every head of one row in place.
    pub(super) fn apply(&self, pairs: RopePairs, position: usize, row: &mut [f32], head: usize) {
        self.turn(pairs, position, row, head, 1.0);
    }

    /// Turns the gradient at what [`Self::apply`] gave into that at what it took: back by the same angles.
    pub(super) fn apply_transposed(&self, pairs: RopePairs, position: usize, row: &mut [f32], head: usize) {
        self.turn(pairs, position, row, head, -1.0);
    }

    fn turn(&self, pairs: RopePairs, position: usize, row: &mut [f32], head: usize, direction: f32) {
        let cos = &self.cos[position * self.half..(position + 1) * self.half];
        let sin = &self.sin[position * self.half..(position + 1) * self.half];
        for values in row.chunks_exact_mut(head) {
            match pairs {
                RopePairs::Adjacent => {
                    for ((pair, &c), &s) in values[..2 * self.half].chunks_exact_mut(2).zip(cos).zip(sin) {
                        let (a, b, s) = (pair[0], pair[1], direction * s);
                        pair[0] = a * c - b * s;
                        pair[1] = a * s + b * c;
                    }
                }
                RopePairs::Halves => {
                    let (low, rest) = values.split_at_mut(self.half);
                    for (((a, b), &c), &s) in low.iter_mut().zip(rest).zip(cos).zip(sin) {
                        let (x, y, s) = (*a, *b, direction * s);
                        *a = x * c - y * s;
                        *b = x * s + y * c;
                    }
                }
            }
        }
    }
}

/// Factor on cosines and sines. llama.cpp cancels YaRN's own factor in the context and lets the rope operation
/// apply it again, so what remains is `1 + 0.1 ln(factor)` for factors above one, less what the weights have of it.
fn magnitude(settings: &RopeSettings, rope: LayerRope, yarn: bool) -> f32 {
    if rope.plain {
        return 1.0;
    }
    let mut magnitude = settings.attn_factor;
    if yarn {
        let factor = 1.0 / settings.scale;
        let sharpened = |share: f32| if factor <= 1.0 { 1.0 } else { 0.1 * share * factor.ln() + 1.0 };
        let weights = settings.yarn_log_multiplier;
        magnitude *= if weights == 0.0 { sharpened(1.0) } else { sharpened(1.0) / sharpened(weights) };
        magnitude *= 1.0 / (1.0 + 0.1 * factor.ln());
        magnitude *= 1.0 + 0.1 * (1.0 / rope.scale).ln();
    }
    magnitude
}

/// Share of the unscaled angle per pair: one for fast frequencies, falling to zero for slow ones.
fn yarn_ramp(settings: &RopeSettings, rope: LayerRope) -> Vec<f32> {
    let n_rot = rope.n_rot as f32;
    let pair_of = |turns: f32| {
        n_rot * (settings.n_ctx_original as f32 / (turns * 2.0 * std::f32::consts::PI)).ln() / (2.0 * rope.base.ln())
    };
    let low = pair_of(settings.yarn_beta.0).floor().max(0.0);
    let high = pair_of(settings.yarn_beta.1).ceil().min(n_rot - 1.0);
    (0..rope.n_rot / 2).map(|i| 1.0 - ((i as f32 - low) / (high - low).max(0.001)).clamp(0.0, 1.0)).collect()
}
