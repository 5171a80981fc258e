//! The way back through what a layer makes of its own input, and the scale of its output.

use rayon::prelude::*;

use super::{Back, LayerTile, add_rows, derivatives};
use crate::model::error::ModelError;
use crate::model::math;
use crate::model::pass::{Pass, ProductInput};
use crate::model::taps::NoTaps;
use crate::model::weights::{LayerInput, LayerInputs};

impl<'g> Pass<'_, 'g, '_> {
    /// Turns the gradient at what left layer `il` into that at `residual`, the stream behind its feed-forward network. The
    /// layer's own input comes from the embedding, where the gradient ends.
    pub(super) fn layer_input_back(
        &self,
        layer_tile: &LayerTile<'_, 'g>,
        residual: &[f32],
        d: &mut [f32],
        back: &mut Back<'_, '_>,
    ) -> Result<(), ModelError> {
        let layer = layer_tile.layer;
        if let Some(scale) = self.decode_optional(layer.output_scale.as_ref())? {
            d.par_chunks_mut(self.model.hparams.n_embd).for_each(|row| math::scale(row, scale[0]));
        }
        if let (Some(weights), Some(inputs)) = (&layer.input, &self.model.weights.layer_inputs) {
            self.own_input_back(layer_tile, weights, inputs, residual, d, back)?;
        }
        Ok(())
    }

    /// Of `residual + norm(proj(gelu(gate(residual)) * own))`.
    fn own_input_back(
        &self,
        layer_tile: &LayerTile<'_, 'g>,
        weights: &LayerInput<'g>,
        inputs: &LayerInputs<'g>,
        residual: &[f32],
        d: &mut [f32],
        back: &mut Back<'_, '_>,
    ) -> Result<(), ModelError> {
        let h = &self.model.hparams;
        let (place, width) = (back.place, weights.gate.weight.n_out);
        let mut own = self.layer_input(layer_tile.il, inputs, layer_tile.tokens, place, &mut NoTaps)?;
        let mut gate = vec![0.0; own.len()];
        let mut product = ProductInput::new(residual, h.n_embd, self.options.precision);
        self.linear(&weights.gate, 0, &mut product, &mut gate, place)?;
        let mut gated = own.clone();
        gated.par_chunks_mut(width).zip(gate.par_chunks(width)).for_each(|(own, gate)| self.gelu_mul(gate, own));
        let mut added = vec![0.0; residual.len()];
        let mut product = ProductInput::new(&gated, width, self.options.precision);
        self.linear(&weights.proj, 0, &mut product, &mut added, place)?;

        let norm = weights.norm.decode(&self.overrides, 0)?;
        let mut d_added = d.to_vec();
        self.norm_back(&added, Some(&norm), &mut d_added);
        let d_gated = self.product_back(&weights.proj, 0, None, d_added, back)?;
        gate.par_chunks_mut(width)
            .zip(own.par_chunks_mut(width))
            .zip(d_gated.par_chunks(width))
            .for_each(|((gate, own), d)| derivatives::gelu_mul(gate, own, d));
        let d_stream = self.product_back(&weights.gate, 0, None, gate, back)?;
        add_rows(d, &d_stream);
        Ok(())
    }
}
