//! What reaches the residual stream as it comes, and how many rows a layer handles at once.

use super::Model;
use super::feed_forward::tile_rows;
use super::hparams::{AttentionShape, Mixer};
use super::mixer::MIXER_TILE;
use super::weights::{DeltaInputs, FeedForwardWeights, MixerWeights, Projections};

impl Model<'_> {
    /// True if the product with this matrix of layer `il` is added to the residual stream without a norm or a scale between.
    pub(crate) fn adds_to_stream(&self, il: usize, tensor: &str) -> bool {
        let Some((layer, params)) = self.weights.layers.get(il).zip(self.hparams.layers.get(il)) else { return false };
        if self.hparams.residual_scale.is_some() {
            return false;
        }
        let output = match &layer.mixer {
            MixerWeights::Attention(attention) => &attention.output,
            MixerWeights::DeltaNet(delta) => &delta.output,
        };
        let is_scaled = matches!(params.mixer, Mixer::Attention(AttentionShape { value_scale: Some(_), .. }));
        let plain = |linear: &super::weights::Linear<'_>| linear.weight.name == tensor && linear.scale.is_none();
        if plain(output) {
            return layer.post_mixer_norm.is_none() && !is_scaled;
        }
        match &layer.feed_forward {
            FeedForwardWeights::Dense(network) => plain(&network.down) && layer.post_ffn_norm.is_none(),
            FeedForwardWeights::Experts(_) | FeedForwardWeights::Both { .. } => false,
        }
    }

    /// The matrices whose outputs have the gradients that rounding can use best: queries, keys and values, and those that write
    /// to the residual stream, of attention and of dense networks; in the order of layers.
    pub fn gradient_matrices(&self) -> Vec<&str> {
        let mut names = Vec::new();
        for layer in &self.weights.layers {
            if let MixerWeights::Attention(attention) = &layer.mixer {
                match &attention.projections {
                    Projections::Separate { q, k, v } => {
                        names.extend([Some(q), k.as_ref(), v.as_ref()].into_iter().flatten().map(|l| l.weight.name));
                    }
                    Projections::Fused(qkv) => names.push(qkv.weight.name),
                }
                names.push(attention.output.weight.name);
            }
            match &layer.feed_forward {
                FeedForwardWeights::Dense(network) | FeedForwardWeights::Both { dense: network, .. } => {
                    names.push(network.down.weight.name);
                }
                FeedForwardWeights::Experts(_) => {}
            }
        }
        names
    }

    /// Further matrices at whose outputs the way back shows gradients of every token: gates, the inputs of delta nets, the wide
    /// ones of dense networks, and the output matrix; in the order of layers.
    pub fn further_gradient_matrices(&self) -> Vec<&str> {
        let mut names = Vec::new();
        for layer in &self.weights.layers {
            match &layer.mixer {
                MixerWeights::Attention(attention) => names.extend(attention.gate.iter().map(|gate| gate.weight.name)),
                MixerWeights::DeltaNet(delta) => {
                    match &delta.inputs {
                        DeltaInputs::Separate { qkv, gate } => names.extend([qkv.weight.name, gate.weight.name]),
                        DeltaInputs::Fused(all) => names.push(all.weight.name),
                    }
                    names.push(delta.output.weight.name);
                }
            }
            match &layer.feed_forward {
                FeedForwardWeights::Dense(network) | FeedForwardWeights::Both { dense: network, .. } => {
                    names.extend(network.gate_up.names());
                }
                FeedForwardWeights::Experts(_) => {}
            }
        }
        names.push(self.weights.output.weight.name);
        names
    }

    /// Rows that layer `il` runs from its start to its end before it begins with others.
    pub(crate) fn rows_at_once(&self, il: usize) -> usize {
        match self.weights.layers.get(il).map(|layer| &layer.feed_forward) {
            Some(FeedForwardWeights::Dense(network) | FeedForwardWeights::Both { dense: network, .. }) => {
                MIXER_TILE.min(tile_rows(network.n_ff))
            }
            _ => MIXER_TILE,
        }
    }
}
