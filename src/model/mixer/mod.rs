//! What mixes tokens: the first half of a layer, around a norm and a residual connection.

pub(super) mod attend;
pub(super) mod attention;
pub(super) mod delta_net;
pub(super) mod recurrence;

use std::sync::Arc;

use rayon::prelude::*;

use super::error::ModelError;
use super::group::{HiddenStates, Kept, TokenGroup};
use super::hparams::{AttentionShape, Mixer};
use super::math;
use super::pass::{Pass, Place, ProductInput};
use super::rope::RopeTable;
use super::taps::Taps;
use super::weights::{Layer, Linear, MixerWeights};

/// Sequences are gathered into tiles of at least this many rows, so that queries, keys and values of the whole group never
/// exist at once.
pub(super) const MIXER_TILE: usize = 2048;

impl<'g> Pass<'_, 'g, '_> {
    /// Adds to the residual stream what the mixer of layer `il` gives.
    pub(super) fn mixer_block(
        &self,
        il: usize,
        layer: &Layer<'g>,
        hidden: &mut HiddenStates,
        taps: &mut dyn Taps,
    ) -> Result<(), ModelError> {
        let h = &self.model.hparams;
        let group = Arc::clone(&hidden.group);
        let norm = self.decode_optional(layer.mixer_norm.as_ref())?;
        let rope = self.rope_table(il, &group)?;
        let mut kept = Kept::default();
        for tile in group.tiles(MIXER_TILE) {
            self.check_cancelled()?;
            let start = tile.rows.start;
            let place = Place { layer: Some(il), token: &|row| start + row };
            let residual = &hidden.data[start * h.n_embd..tile.rows.end * h.n_embd];
            let normed = norm.as_ref().map(|norm| self.normed(residual, norm));
            let input = normed.as_deref().unwrap_or(residual);
            let (mixed, output) = match (&h.layers[il].mixer, &layer.mixer) {
                (Mixer::Attention(shape), MixerWeights::Attention(weights)) => {
                    let heads = attention::Heads { pass: self, shape, weights, tile: &tile, place };
                    let mixed =
                        heads.mix(&group, input, rope.as_ref(), hidden.kept(shape.keys_of)?, &mut kept, taps)?;
                    (mixed, &weights.output)
                }
                (Mixer::DeltaNet(shape), MixerWeights::DeltaNet(weights)) => {
                    (self.delta_net(*shape, weights, &tile, input, place, taps)?, &weights.output)
                }
                _ => unreachable!("weights were loaded by these parameters"),
            };
            drop(normed);
            let mut added = self.mixer_output(output, &mixed, tile.rows.len() * h.n_embd, place, taps)?;
            drop(mixed);
            // Behind the output matrix, as llama.cpp has it: an importance matrix knows the inputs before.
            if let Mixer::Attention(AttentionShape { value_scale: Some(scale), .. }) = h.layers[il].mixer {
                added.par_chunks_mut(h.n_embd).for_each(|row| math::scale(row, scale));
            }
            let residual = &mut hidden.data[start * h.n_embd..tile.rows.end * h.n_embd];
            self.add_to_residual(residual, &mut added, layer.post_mixer_norm.as_ref())?;
        }
        if matches!(&h.layers[il].mixer, Mixer::Attention(shape) if shape.keys_are_kept) {
            hidden.keep(il, kept);
        }
        Ok(())
    }

    pub(super) fn mixer_output(
        &self,
        output: &Linear<'g>,
        mixed: &[f32],
        len: usize,
        place: Place<'_>,
        taps: &mut dyn Taps,
    ) -> Result<Vec<f32>, ModelError> {
        let width = output.weight.n_in;
        self.tap(&[output.weight.name], place.layer, None, mixed, width, taps)?;
        let mut added = vec![0.0; len];
        let mut input = ProductInput::new(mixed, width, self.options.precision);
        self.linear(output, 0, &mut input, &mut added, place)?;
        Ok(added)
    }

    /// The rotary embedding of layer `il`, where it has one.
    pub(super) fn rope_table(&self, il: usize, group: &TokenGroup) -> Result<Option<RopeTable>, ModelError> {
        let h = &self.model.hparams;
        let Mixer::Attention(AttentionShape { rope: Some(rope), .. }) = h.layers[il].mixer else { return Ok(None) };
        let factors = self.rope_factors(group.context())?;
        let factors = factors.as_deref().filter(|_| rope.factors);
        Ok(Some(RopeTable::new(&h.rope, rope, factors, group.longest())))
    }

    fn rope_factors(&self, context: usize) -> Result<Option<Vec<f32>>, ModelError> {
        let weights = &self.model.weights;
        let chosen = match &weights.rope_freqs {
            Some(freqs) => Some(freqs),
            None if context > self.model.hparams.rope.n_ctx_original => weights.rope_long.as_ref(),
            None => weights.rope_short.as_ref(),
        };
        self.decode_optional(chosen)
    }
}
