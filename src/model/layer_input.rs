//! Inputs of each layer beside the residual stream: a row per token from a table of its own and from the embedding.

use rayon::prelude::*;

use super::error::ModelError;
use super::group::HiddenStates;
use super::math;
use super::pass::{Pass, Place, ProductInput, ROWS_PER_TASK};
use super::taps::Taps;
use super::weights::{Layer, LayerInput, LayerInputs, Weight};

/// Rows that are handled together.
const TILE: usize = 2048;

impl<'g> Pass<'_, 'g, '_> {
    /// Adds what layer `il` makes of its own input, then scales its output.
    pub(super) fn layer_input_block(
        &self,
        il: usize,
        layer: &Layer<'g>,
        hidden: &mut HiddenStates,
        taps: &mut dyn Taps,
    ) -> Result<(), ModelError> {
        let n_embd = self.model.hparams.n_embd;
        if let (Some(weights), Some(inputs)) = (&layer.input, &self.model.weights.layer_inputs) {
            let tokens = hidden.group.clone();
            for (tile, tokens) in tokens.tokens().chunks(TILE).enumerate() {
                self.check_cancelled()?;
                let place = Place { layer: Some(il), token: &|row| tile * TILE + row };
                let own = self.layer_input(il, inputs, tokens, place, taps)?;
                let residual = &mut hidden.data[tile * TILE * n_embd..][..tokens.len() * n_embd];
                self.add_layer_input(weights, &own, residual, place, taps)?;
            }
        }
        if let Some(scale) = self.decode_optional(layer.output_scale.as_ref())? {
            hidden.data.par_chunks_mut(n_embd).for_each(|row| math::scale(row, scale[0]));
        }
        Ok(())
    }

    /// The input of layer `il` for some tokens, `[n, width]`: the part of the table's row, scaled, plus the part of the
    /// embedding's product, scaled and normed, over the root of two.
    pub(super) fn layer_input(
        &self,
        il: usize,
        inputs: &LayerInputs<'g>,
        tokens: &[u32],
        place: Place<'_>,
        taps: &mut dyn Taps,
    ) -> Result<Vec<f32>, ModelError> {
        let h = &self.model.hparams;
        let width = inputs.norm.n_in;
        let embedding = self.embed_tokens(tokens)?;
        if il == 0 {
            // One product gives the inputs of all layers.
            self.tap(&[inputs.projection.name], None, None, &embedding, h.n_embd, taps)?;
        }
        let mut projected = vec![0.0; tokens.len() * width];
        let mut product = ProductInput::new(&embedding, h.n_embd, self.options.precision);
        self.product_of_rows(&inputs.projection, il * width..(il + 1) * width, &mut product, &mut projected, place)?;
        let norm = inputs.norm.decode(&self.overrides, 0)?;
        let root = (h.n_embd as f32).sqrt().recip();
        let mut own = self.table_rows(&inputs.embedding, tokens, il * width..(il + 1) * width)?;
        let scale = (width as f32).sqrt();
        own.par_chunks_mut(width).zip(projected.par_chunks_mut(width)).with_min_len(ROWS_PER_TASK).for_each(
            |(own, projected)| {
                math::scale(projected, root);
                math::rms_norm_in_place(projected, &norm, h.norm_epsilon);
                math::scale(own, scale);
                math::add(own, projected);
                math::scale(own, std::f32::consts::FRAC_1_SQRT_2);
            },
        );
        Ok(own)
    }

    /// Columns `range` of the table's rows of some tokens.
    fn table_rows(
        &self,
        table: &Weight<'g>,
        tokens: &[u32],
        range: std::ops::Range<usize>,
    ) -> Result<Vec<f32>, ModelError> {
        let matrix = self.matrix(table, 0)?;
        let mut rows = vec![0.0; tokens.len() * range.len()];
        rows.par_chunks_mut(range.len()).zip(tokens).with_min_len(ROWS_PER_TASK).for_each_init(
            || vec![0.0; table.n_in],
            |row, (out, &token)| {
                matrix.decode_row(token as usize, row);
                out.copy_from_slice(&row[range.clone()]);
            },
        );
        self.model.release(&[table.name]);
        Ok(rows)
    }

    /// Adds `norm(proj(gelu(gate(residual)) * own))`.
    fn add_layer_input(
        &self,
        weights: &LayerInput<'g>,
        own: &[f32],
        residual: &mut [f32],
        place: Place<'_>,
        taps: &mut dyn Taps,
    ) -> Result<(), ModelError> {
        let h = &self.model.hparams;
        let width = weights.gate.weight.n_out;
        self.tap(&[weights.gate.weight.name], place.layer, None, residual, h.n_embd, taps)?;
        let mut gate = vec![0.0; own.len()];
        let mut product = ProductInput::new(residual, h.n_embd, self.options.precision);
        self.linear(&weights.gate, 0, &mut product, &mut gate, place)?;
        let mut gated = own.to_vec();
        gated.par_chunks_mut(width).zip(gate.par_chunks(width)).for_each(|(own, gate)| self.gelu_mul(gate, own));
        self.tap(&[weights.proj.weight.name], place.layer, None, &gated, width, taps)?;
        let mut added = vec![0.0; residual.len()];
        let mut product = ProductInput::new(&gated, width, self.options.precision);
        self.linear(&weights.proj, 0, &mut product, &mut added, place)?;
        let norm = weights.norm.decode(&self.overrides, 0)?;
        residual.par_chunks_mut(h.n_embd).zip(added.par_chunks_mut(h.n_embd)).with_min_len(ROWS_PER_TASK).for_each(
            |(residual, added)| {
                math::rms_norm_in_place(added, &norm, h.norm_epsilon);
                math::add(residual, added);
            },
        );
        Ok(())
    }
}
