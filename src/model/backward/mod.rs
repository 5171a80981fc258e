//! The way back: gradients of a loss, from the logits through one layer after the other to the embeddings.
//!
//! A layer keeps nothing of its forward pass. Given the hidden states that entered it and the gradient at what left it, its
//! inside is computed again, a tile of whole sequences at a time, and the gradient at what entered it comes out; on the way
//! [`GradientTaps`] see the gradients at the outputs of its weight matrices. So a model larger than memory goes backward as it
//! goes forward, each weight read once a group and given back after its layer.
//!
//! Gradients of the residual stream, and of keys and values that later layers use, have the form of what they belong to:
//! [`HiddenStates`].
//!
//! Every part of the architecture table has its way back. Experts are chosen as in the forward pass; their weights, and with
//! them the router, have gradients, the choice has none. Inputs of each layer beside the stream come from the embedding and end
//! there: the matrices that make them have no gradients here. Arithmetic is f32 throughout, and the result the same for any
//! number of threads and on every instruction set.

mod attend;
mod attention;
mod delta_net;
mod derivatives;
mod feed_forward;
mod head;
mod layer_input;
mod loss;
mod mixture;
mod recurrence;
mod taps;

use std::ops::Range;

use rayon::prelude::*;

pub use loss::{OutputLoss, SampledLabels};
pub use taps::{GradientTaps, TapGradient};

use super::error::ModelError;
use super::feed_forward::ROUTED_ROWS;
use super::group::{HiddenStates, Kept, Tile};
use super::hparams::Mixer;
use super::math;
use super::mixer::MIXER_TILE;
use super::pass::{Activations, Pass, Place, ROWS_PER_TASK};
use super::rope::RopeTable;
use super::taps::{Expert, NoTaps, Rows};
use super::weights::{FeedForwardWeights, Layer, Linear, MixerWeights, Weight};
use crate::compute::{PackedActivations, Precision, matmul_transposed};
use attention::AttentionRun;
use delta_net::DeltaRun;

/// What the parts of a layer on the way back share.
struct Back<'a, 't> {
    place: Place<'a>,
    taps: &'t mut dyn GradientTaps,
}

/// Keys and values of an earlier layer in a tile, and the gradients at them so far.
struct Earlier<'a> {
    k: &'a [f32],
    v: &'a [f32],
    d_k: &'a mut [f32],
    d_v: &'a mut [f32],
}

/// What a mixer keeps of its forward pass over a tile until its gradient comes.
enum MixerRun<'a, 'm, 'g, 'o> {
    Attention(Box<AttentionRun<'a, 'm, 'g, 'o>>),
    DeltaNet(Box<DeltaRun<'a, 'g>>),
}

/// A layer, and where in the group a tile of it lies.
struct LayerTile<'a, 'g> {
    il: usize,
    layer: &'a Layer<'g>,
    tile: &'a Tile,
    tokens: &'a [u32],
    /// Positions of its rows.
    positions: Vec<usize>,
    rope: Option<&'a RopeTable>,
}

impl<'g> Pass<'_, 'g, '_> {
    /// The gradient at what entered layer `il`, the one before `gradient.next_layer()`, given `input`, which did, and
    /// `gradient` at what left it. `input` must have the keys and values of earlier layers that the layer uses. Afterwards none
    /// of its weights is resident.
    ///
    /// # Errors
    /// When the two do not belong together, a group has continuations, activations are rounded, a value is not finite, a tap
    /// fails or the run is cancelled.
    pub fn layer_gradient(
        &self,
        input: &HiddenStates,
        mut gradient: HiddenStates,
        taps: &mut dyn GradientTaps,
    ) -> Result<HiddenStates, ModelError> {
        let model = self.model;
        self.check_backward(input, &gradient)?;
        let il = input.next_layer;
        let layer = &model.weights.layers[il];
        if let Some(before) = il.checked_sub(1) {
            model.layer_tensors[before].iter().for_each(|t| model.gguf.prefetch_rows(t, 0, t.rows()));
        }
        let result = self.layer_back(il, layer, input, &mut gradient, taps);
        model.layer_tensors[il].iter().for_each(|t| model.gguf.release(t));
        result?;
        gradient.next_layer = il;
        Ok(gradient)
    }

    fn check_backward(&self, input: &HiddenStates, gradient: &HiddenStates) -> Result<(), ModelError> {
        let bad = |reason: &str| Err(ModelError::BadInput { reason: reason.to_owned() });
        let n_embd = self.model.hparams.n_embd;
        if gradient.next_layer != input.next_layer + 1 || input.next_layer >= self.model.n_layer() {
            return bad("a gradient is of what leaves the layer that the hidden states enter");
        }
        let len = input.group.len() * n_embd;
        if input.data.len() != len || gradient.data.len() != len || input.group != gradient.group {
            return bad("hidden states and their gradient are of different tokens or another width than the model");
        }
        self.check_differentiable(input)
    }

    /// Refuses what has no way back.
    fn check_differentiable(&self, states: &HiddenStates) -> Result<(), ModelError> {
        let bad = |reason: &str| Err(ModelError::BadInput { reason: reason.to_owned() });
        if states.group.has_continuations() {
            return bad("gradients are of whole sequences; a group with continuations has none");
        }
        if self.options.activations != Activations::Unrounded || self.options.all_experts {
            return bad(
                "gradients are of the model with unrounded activations and the experts that its router chooses",
            );
        }
        Ok(())
    }

    fn layer_back(
        &self,
        il: usize,
        layer: &Layer<'g>,
        input: &HiddenStates,
        gradient: &mut HiddenStates,
        taps: &mut dyn GradientTaps,
    ) -> Result<(), ModelError> {
        let h = &self.model.hparams;
        let group = std::sync::Arc::clone(&input.group);
        let rope = self.rope_table(il, &group)?;
        let (keys_of, is_kept) = match &h.layers[il].mixer {
            Mixer::Attention(shape) => (shape.keys_of, shape.keys_are_kept),
            Mixer::DeltaNet(_) => (None, false),
        };
        let earlier = input.kept(keys_of)?;
        let mut d_earlier = keys_of.map(|of| gradient.take_kept(of)).transpose()?;
        let own = if is_kept { Some(gradient.take_kept(il)?) } else { None };
        let rows = match &layer.feed_forward {
            FeedForwardWeights::Dense(_) => MIXER_TILE,
            FeedForwardWeights::Experts(_) | FeedForwardWeights::Both { .. } => ROUTED_ROWS,
        };
        let n = group.len();
        for tile in &group.tiles(rows) {
            self.check_cancelled()?;
            let start = tile.rows.start;
            let mut back = Back { place: Place { layer: Some(il), token: &|row| start + row }, taps: &mut *taps };
            let stream = start * h.n_embd..tile.rows.end * h.n_embd;
            let earlier = match (earlier, &mut d_earlier) {
                (Some(kept), Some(gradient)) => {
                    let (k, v) = kept.rows(tile.rows.clone(), n);
                    let (d_k, d_v) = gradient.rows_mut(tile.rows.clone(), n);
                    Some(Earlier { k, v, d_k, d_v })
                }
                _ => None,
            };
            let positions = group.positions(tile.rows.clone());
            let tokens = &group.tokens()[tile.rows.clone()];
            let layer_tile = LayerTile { il, layer, tile, tokens, positions, rope: rope.as_ref() };
            let own = own.as_ref().map(|own| own.rows(tile.rows.clone(), n));
            self.tile_back(
                &layer_tile,
                &input.data[stream.clone()],
                &mut gradient.data[stream],
                earlier,
                own,
                &mut back,
            )?;
        }
        if let (Some(of), Some(kept)) = (keys_of, d_earlier) {
            gradient.keep(of, kept);
            gradient.kept.sort_by_key(|(of, _)| *of);
        }
        Ok(())
    }

    /// Turns `d`, the gradient at what left a tile, into that at `residual`, which entered it. `own` is that at the layer's
    /// keys and values from later layers.
    fn tile_back(
        &self,
        layer_tile: &LayerTile<'_, 'g>,
        residual: &[f32],
        d: &mut [f32],
        mut earlier: Option<Earlier<'_>>,
        own: Option<(&[f32], &[f32])>,
        back: &mut Back<'_, '_>,
    ) -> Result<(), ModelError> {
        let LayerTile { il, layer, tile, .. } = *layer_tile;
        let norm = self.decode_optional(layer.mixer_norm.as_ref())?;
        let normed = norm.as_ref().map(|norm| self.normed(residual, norm));
        let input = normed.as_deref().unwrap_or(residual);
        let place = back.place;
        let run = match (&self.model.hparams.layers[il].mixer, &layer.mixer) {
            (Mixer::Attention(shape), MixerWeights::Attention(weights)) => {
                let heads = super::mixer::attention::Heads { pass: self, shape, weights, tile, place };
                let kept = earlier.as_ref().map(|earlier| (earlier.k, earlier.v));
                MixerRun::Attention(Box::new(AttentionRun::new(heads, input, layer_tile, kept)?))
            }
            (Mixer::DeltaNet(shape), MixerWeights::DeltaNet(weights)) => {
                MixerRun::DeltaNet(Box::new(self.delta_run(*shape, weights, tile, input, place)?))
            }
            _ => unreachable!("weights were loaded by these parameters"),
        };
        let (output, mixed) = match &run {
            MixerRun::Attention(run) => (run.output(), run.mixed()),
            MixerRun::DeltaNet(run) => (run.output(), run.mixed()),
        };
        let mut added = self.mixer_output(output, mixed, residual.len(), place, &mut NoTaps)?;
        let value_scale = self.value_scale(il);
        if let Some(scale) = value_scale {
            added.par_chunks_mut(self.model.hparams.n_embd).for_each(|row| math::scale(row, scale));
        }
        let mut between = residual.to_vec();
        let unnormed = layer.post_mixer_norm.as_ref().map(|_| added.clone());
        self.add_to_residual(&mut between, &mut added, layer.post_mixer_norm.as_ref())?;
        drop(added);

        self.behind_mixer_back(layer_tile, &between, d, back)?;
        drop(between);

        let mut d_added = d.to_vec();
        self.added_back(&mut d_added, unnormed.as_deref(), layer.post_mixer_norm.as_ref())?;
        if let Some(scale) = value_scale {
            d_added.par_chunks_mut(self.model.hparams.n_embd).for_each(|row| math::scale(row, scale));
        }
        let d_mixed = self.product_back(output, 0, None, d_added, back)?;
        let mut d_input = vec![0.0; residual.len()];
        match run {
            MixerRun::Attention(run) => run.back(d_mixed, earlier.as_mut(), own, &mut d_input, back)?,
            MixerRun::DeltaNet(run) => self.delta_back(*run, d_mixed, &mut d_input, back)?,
        }
        self.norm_back(residual, norm.as_deref(), &mut d_input);
        add_rows(d, &d_input);
        Ok(())
    }

    /// Everything behind the mixer: turns the gradient at what left the layer into that at `between`, the stream between mixer
    /// and feed-forward network.
    fn behind_mixer_back(
        &self,
        layer_tile: &LayerTile<'_, 'g>,
        between: &[f32],
        d: &mut [f32],
        back: &mut Back<'_, '_>,
    ) -> Result<(), ModelError> {
        let LayerTile { il, layer, .. } = *layer_tile;
        if layer.input.is_some() || layer.output_scale.is_some() {
            let mut behind = between.to_vec();
            if layer.input.is_some() {
                self.feed_forward_block(il, layer, &mut behind, &mut NoTaps)?;
            }
            self.layer_input_back(layer_tile, &behind, d, back)?;
        }
        self.feed_forward_back(layer, between, d, back)
    }

    /// Turns the gradient at the stream into that at what was added to it, before norm and scale; `unnormed` is what was
    /// normed.
    fn added_back(&self, d: &mut [f32], unnormed: Option<&[f32]>, norm: Option<&Weight<'g>>) -> Result<(), ModelError> {
        let h = &self.model.hparams;
        if let Some(scale) = h.residual_scale {
            d.par_chunks_mut(h.n_embd).for_each(|row| math::scale(row, scale));
        }
        let norm = self.decode_optional(norm)?;
        if let Some(x) = unnormed {
            self.norm_back(x, norm.as_deref(), d);
        }
        Ok(())
    }

    /// Turns the gradient at the norm of rows `x` into that at them.
    fn norm_back(&self, x: &[f32], norm: Option<&[f32]>, d: &mut [f32]) {
        let Some(norm) = norm else { return };
        let epsilon = self.model.hparams.norm_epsilon;
        d.par_chunks_mut(norm.len())
            .zip(x.par_chunks(norm.len()))
            .with_min_len(ROWS_PER_TASK)
            .for_each(|(d, x)| derivatives::rms_norm(x, norm, epsilon, d));
    }

    /// The gradient at the inputs of a product, `[n, n_in]`, given that at its outputs, behind scale and bias.
    fn product_back(
        &self,
        linear: &Linear<'g>,
        mat: usize,
        expert: Option<Expert>,
        d: Vec<f32>,
        back: &mut Back<'_, '_>,
    ) -> Result<Vec<f32>, ModelError> {
        let mut d_input = vec![0.0; d.len() / linear.weight.n_out * linear.weight.n_in];
        self.add_product_back(linear, mat, expert, d, &mut d_input, back)?;
        Ok(d_input)
    }

    /// Adds to `d_input` the gradient at the inputs of a product.
    fn add_product_back(
        &self,
        linear: &Linear<'g>,
        mat: usize,
        expert: Option<Expert>,
        mut d: Vec<f32>,
        d_input: &mut [f32],
        back: &mut Back<'_, '_>,
    ) -> Result<(), ModelError> {
        let Weight { name, n_in, n_out, .. } = linear.weight;
        if let Some(scales) = self.decode_optional(linear.scale.as_ref())? {
            d.par_chunks_mut(n_out).for_each(|row| math::scale(row, scales[mat]));
        }
        self.check_finite(&d, n_out, name, back.place)?;
        if !d.is_empty() && back.taps.wants(name) {
            back.taps.gradient(&TapGradient {
                tensor: name,
                layer: back.place.layer,
                expert,
                rows: Rows::new(&d, n_out),
            })?;
        }
        let matrix = self.matrix(&linear.weight, mat)?;
        let mut packed = PackedActivations::new(Precision::Accurate);
        packed.pack(&d, d.len() / n_out, n_out, n_out);
        drop(d);
        matmul_transposed(&packed, &matrix, d_input, n_in, true);
        Ok(())
    }

    /// What the output matrix of layer `il`'s attention gives is multiplied by this.
    fn value_scale(&self, il: usize) -> Option<f32> {
        match &self.model.hparams.layers[il].mixer {
            Mixer::Attention(shape) => shape.value_scale,
            Mixer::DeltaNet(_) => None,
        }
    }
}

/// Adds row by row, all threads together.
fn add_rows(x: &mut [f32], y: &[f32]) {
    const PART: usize = 1 << 14;
    x.par_chunks_mut(PART).zip(y.par_chunks(PART)).for_each(|(x, y)| math::add(x, y));
}

impl HiddenStates {
    /// Takes out the gradient at the keys and values of `layer`.
    fn take_kept(&mut self, layer: usize) -> Result<Kept, ModelError> {
        let missing = || ModelError::BadInput {
            reason: format!("this gradient is without that of layer {layer}'s keys and values, which later layers use"),
        };
        let at = self.kept.iter().position(|(of, _)| *of == layer).ok_or_else(missing)?;
        let (_, kept) = self.kept.remove(at);
        Ok(std::sync::Arc::unwrap_or_clone(kept))
    }
}

impl Kept {
    /// Keys and values of `rows`, of a group of `n` tokens, to be changed.
    fn rows_mut(&mut self, rows: Range<usize>, n: usize) -> (&mut [f32], &mut [f32]) {
        let of = |len: usize| rows.start * (len / n.max(1))..rows.end * (len / n.max(1));
        let (k, v) = (of(self.k.len()), of(self.v.len()));
        (&mut self.k[k], &mut self.v[v])
    }
}
