//! A forward pass, one layer at a time for all tokens of a group.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;

use super::Model;
use super::activation_rounding::ActivationRounding;
use super::error::ModelError;
use super::group::{HiddenStates, TokenGroup};
use super::math;
use super::taps::{Expert, Rows, TapInput, Taps};
use super::weights::{Linear, Overrides, Weight};
use crate::compute::{
    IntegerActivations, Matrix, PackedActivations, Precision, Steps, matmul, matmul_integer, multiplies_as_integers,
};

/// Rows of activations that a task of an element-wise step handles.
pub(super) const ROWS_PER_TASK: usize = 16;

/// How activations enter the products.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Activations {
    /// As computed, in f32: what is measured is the damage of the weights alone.
    #[default]
    Unrounded,
    /// Rounded before every product as ggml's CPU backend does for that weight type, and keys and values
    /// rounded to binary16 as in llama.cpp's default cache: the damage as users run the file.
    Ggml,
}

impl Activations {
    /// The name that flags and reports have for it.
    pub fn name(self) -> &'static str {
        match self {
            Activations::Unrounded => "f32",
            Activations::Ggml => "ggml",
        }
    }

    /// A sentence for people.
    pub fn describe(self) -> &'static str {
        match self {
            Activations::Unrounded => "activations unrounded (f32): the damage of the weights alone",
            Activations::Ggml => "activations rounded as ggml's CPU backend does: the damage as the file runs",
        }
    }
}

/// How to run.
#[derive(Clone, Debug)]
pub struct ForwardOptions {
    /// Arithmetic of the products.
    pub precision: Precision,
    /// Rounding of their inputs.
    pub activations: Activations,
    /// GELU is looked up in 16 bits as on ggml's CPU backend, which [`Activations::Ggml`] always does.
    pub tabled_gelu: bool,
    /// Every token goes through all experts of a layer, those that it did not choose without weight in the output: taps see
    /// the inputs of each.
    pub all_experts: bool,
    /// Set it from a signal handler or another thread to stop the run with [`ModelError::Interrupted`].
    pub cancel: Option<Arc<AtomicBool>>,
}

impl Default for ForwardOptions {
    fn default() -> Self {
        ForwardOptions {
            precision: Precision::Accurate,
            activations: Activations::Unrounded,
            tabled_gelu: false,
            all_experts: false,
            cancel: None,
        }
    }
}

/// A model together with the options and the replaced tensors of a run.
pub struct Pass<'m, 'g, 'o> {
    pub(super) model: &'m Model<'g>,
    pub(super) options: ForwardOptions,
    pub(super) overrides: Overrides<'o>,
}

/// The place in the model that messages name.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub layer: Option<usize>,
    /// Row of the group for a row of the current block.
    pub token: &'a (dyn Fn(usize) -> usize + Sync),
}

/// Input rows of one or several products, rounded and packed as these need it.
pub(super) struct ProductInput<'x> {
    x: &'x [f32],
    width: usize,
    packed: PackedActivations,
    packed_as: Option<ActivationRounding>,
    integers: Option<IntegerActivations>,
}

impl<'x> ProductInput<'x> {
    pub(super) fn new(x: &'x [f32], width: usize, precision: Precision) -> Self {
        ProductInput { x, width, packed: PackedActivations::new(precision), packed_as: None, integers: None }
    }

    fn integers(&mut self, steps: Steps) -> &IntegerActivations {
        let known = self.integers.take().filter(|known| known.steps() == steps);
        self.integers.insert(known.unwrap_or_else(|| IntegerActivations::round(self.x, self.width, steps)))
    }

    fn packed(&mut self, rounding: ActivationRounding) -> &PackedActivations {
        if self.packed_as != Some(rounding) {
            let rows = self.x.len() / self.width;
            if rounding == ActivationRounding::None {
                self.packed.pack(self.x, rows, self.width, self.width);
            } else {
                let mut rounded = self.x.to_vec();
                rounded.par_chunks_mut(self.width).with_min_len(ROWS_PER_TASK).for_each(|row| rounding.apply(row));
                self.packed.pack(&rounded, rows, self.width, self.width);
            }
            self.packed_as = Some(rounding);
        }
        &self.packed
    }
}

impl<'m, 'g, 'o> Pass<'m, 'g, 'o> {
    /// The model.
    pub fn model(&self) -> &'m Model<'g> {
        self.model
    }

    /// Looks up the embeddings of all tokens: the input of layer 0.
    ///
    /// # Errors
    /// When a token lies outside of the vocabulary, or an embedding is not finite.
    pub fn embed(&self, group: Arc<TokenGroup>) -> Result<HiddenStates, ModelError> {
        let model = self.model;
        let weight = &model.weights.token_embd;
        let n_vocab = model.n_vocab();
        if let Some(position) = group.tokens().iter().position(|&token| token as usize >= n_vocab) {
            return Err(ModelError::TokenOutOfRange { token: group.tokens()[position], position, n_vocab });
        }
        let n_embd = model.hparams.n_embd;
        let data = self.embed_tokens(group.tokens())?;
        model.release_output();
        self.check_finite(&data, n_embd, weight.name, Place { layer: None, token: &|row| row })?;
        Ok(HiddenStates { group, next_layer: 0, n_embd, data, kept: Vec::new() })
    }

    /// Scaled embeddings, `[n, n_embd]`, of tokens that are in the vocabulary.
    pub(super) fn embed_tokens(&self, tokens: &[u32]) -> Result<Vec<f32>, ModelError> {
        let model = self.model;
        let n_embd = model.hparams.n_embd;
        let len = tokens.len().checked_mul(n_embd).ok_or_else(|| ModelError::BadInput {
            reason: format!("{} tokens are too many for one group", tokens.len()),
        })?;
        let mut data = vec![0.0; len];
        let matrix = self.matrix(&model.weights.token_embd, 0)?;
        let scale = model.hparams.embedding_scale;
        data.par_chunks_mut(n_embd).zip(tokens).with_min_len(ROWS_PER_TASK).for_each(|(row, &token)| {
            matrix.decode_row(token as usize, row);
            if let Some(scale) = scale {
                math::scale(row, scale);
            }
        });
        Ok(data)
    }

    /// Runs layer `hidden.next_layer()`. Afterwards none of its weights is resident.
    ///
    /// # Errors
    /// When all layers have run, a value is not finite, a tap fails or the run is cancelled.
    pub fn run_layer(&self, hidden: &mut HiddenStates, taps: &mut dyn Taps) -> Result<(), ModelError> {
        let model = self.model;
        let il = hidden.next_layer;
        let Some(layer) = model.weights.layers.get(il) else {
            let reason = format!("layer {il} was asked for; the model has {}", model.weights.layers.len());
            return Err(ModelError::BadInput { reason });
        };
        if hidden.n_embd != model.hparams.n_embd {
            let reason = format!("hidden states of width {} for a model of {}", hidden.n_embd, model.hparams.n_embd);
            return Err(ModelError::BadInput { reason });
        }
        if !model.hparams.causal && hidden.group.has_continuations() {
            let reason = "continuations share what lies before them, which needs causal attention".to_owned();
            return Err(ModelError::BadInput { reason });
        }
        if let Some(next) = model.layer_tensors.get(il + 1) {
            next.iter().for_each(|t| model.gguf.prefetch_rows(t, 0, t.rows()));
        }
        let result = self
            .mixer_block(il, layer, hidden, taps)
            .and_then(|()| self.feed_forward_block(il, layer, &mut hidden.data, taps))
            .and_then(|()| self.layer_input_block(il, layer, hidden, taps));
        model.layer_tensors[il].iter().for_each(|t| model.gguf.release(t));
        result?;
        hidden.next_layer += 1;
        Ok(())
    }

    /// Runs all layers that `hidden` has not passed yet.
    ///
    /// # Errors
    /// Those of [`Self::run_layer`].
    pub fn run_remaining(&self, hidden: &mut HiddenStates, taps: &mut dyn Taps) -> Result<(), ModelError> {
        while hidden.next_layer < self.model.n_layer() {
            self.run_layer(hidden, taps)?;
        }
        Ok(())
    }

    pub(super) fn decode_optional(&self, weight: Option<&Weight<'g>>) -> Result<Option<Vec<f32>>, ModelError> {
        weight.map(|w| w.decode(&self.overrides, 0)).transpose()
    }

    /// Adds `output`, normed or scaled when the architecture says so, to the residual stream.
    pub(super) fn add_to_residual(
        &self,
        residual: &mut [f32],
        output: &mut [f32],
        norm: Option<&Weight<'g>>,
    ) -> Result<(), ModelError> {
        let h = &self.model.hparams;
        let norm = self.decode_optional(norm)?;
        let rows = residual.par_chunks_mut(h.n_embd).zip(output.par_chunks_mut(h.n_embd));
        rows.with_min_len(ROWS_PER_TASK).for_each(|(residual, output)| {
            if let Some(norm) = &norm {
                math::rms_norm_in_place(output, norm, h.norm_epsilon);
            }
            if let Some(scale) = h.residual_scale {
                math::scale(output, scale);
            }
            math::add(residual, output);
        });
        Ok(())
    }

    pub(super) fn normed(&self, rows: &[f32], norm: &[f32]) -> Vec<f32> {
        let h = &self.model.hparams;
        let mut normed = vec![0.0; rows.len()];
        let pairs = rows.par_chunks(h.n_embd).zip(normed.par_chunks_mut(h.n_embd)).with_min_len(ROWS_PER_TASK);
        pairs.for_each(|(x, out)| math::rms_norm(x, norm, h.norm_epsilon, out));
        normed
    }

    pub(super) fn tap(
        &self,
        tensors: &[&str],
        layer: Option<usize>,
        expert: Option<Expert>,
        rows: &[f32],
        width: usize,
        taps: &mut dyn Taps,
    ) -> Result<(), ModelError> {
        if rows.is_empty() || !tensors.iter().any(|name| taps.wants(name)) {
            return Ok(());
        }
        taps.input(&TapInput { tensors, layer, expert, rows: Rows::new(rows, width) })
    }

    pub(super) fn matrix<'a>(&'a self, weight: &Weight<'g>, mat: usize) -> Result<Matrix<'a>, ModelError>
    where
        'g: 'a,
    {
        let rows = weight.rows(&self.overrides, mat);
        Matrix::new(rows.ty, rows.n_out, rows.n_in, rows.data).map_err(|_| weight.undecodable(rows.ty))
    }

    /// `out[t] = (W x[t]) * scale + bias` for every row of the input.
    pub(super) fn linear(
        &self,
        linear: &Linear<'g>,
        mat: usize,
        input: &mut ProductInput<'_>,
        out: &mut [f32],
        place: Place<'_>,
    ) -> Result<(), ModelError> {
        let matrix = self.matrix(&linear.weight, mat)?;
        let n_out = matrix.rows();
        self.multiply(&matrix, input, out);
        self.finish_product(linear, mat, out, 0..n_out)?;
        self.check_finite(out, n_out, linear.weight.name, place)
    }

    /// `out[t] = W[rows] x[t]` for every row of the input.
    pub(super) fn product_of_rows(
        &self,
        weight: &Weight<'g>,
        rows: std::ops::Range<usize>,
        input: &mut ProductInput<'_>,
        out: &mut [f32],
        place: Place<'_>,
    ) -> Result<(), ModelError> {
        let all = weight.rows(&self.overrides, 0);
        let row_bytes = all.data.len() / all.n_out;
        let data = &all.data[rows.start * row_bytes..rows.end * row_bytes];
        let matrix = Matrix::new(all.ty, rows.len(), all.n_in, data).map_err(|_| weight.undecodable(all.ty))?;
        self.multiply(&matrix, input, out);
        self.check_finite(out, rows.len(), weight.name, place)
    }

    fn multiply(&self, matrix: &Matrix<'_>, input: &mut ProductInput<'_>, out: &mut [f32]) {
        let rounding = match self.options.activations {
            Activations::Unrounded => ActivationRounding::None,
            Activations::Ggml => ActivationRounding::of_weight(matrix.ty()),
        };
        match rounding.steps() {
            Some(steps) if multiplies_as_integers(matrix.ty()) => {
                matmul_integer(input.integers(steps), matrix, out, matrix.rows());
            }
            _ => matmul(input.packed(rounding), matrix, out, matrix.rows()),
        }
    }

    /// Scale and bias of outputs `range`, which `out` holds for every row.
    pub(super) fn finish_product(
        &self,
        linear: &Linear<'g>,
        mat: usize,
        out: &mut [f32],
        range: std::ops::Range<usize>,
    ) -> Result<(), ModelError> {
        let scale = self.decode_optional(linear.scale.as_ref())?.map(|scales| scales[mat]);
        let bias = linear.bias.as_ref().map(|b| b.decode(&self.overrides, mat)).transpose()?;
        if scale.is_none() && bias.is_none() {
            return Ok(());
        }
        let bias = bias.as_deref().map(|b| &b[range.clone()]);
        out.par_chunks_mut(range.len()).with_min_len(ROWS_PER_TASK).for_each(|row| {
            if let Some(scale) = scale {
                math::scale(row, scale);
            }
            if let Some(bias) = bias {
                math::add(row, bias);
            }
        });
        Ok(())
    }

    pub(super) fn check_finite(
        &self,
        values: &[f32],
        width: usize,
        tensor: &str,
        place: Place<'_>,
    ) -> Result<(), ModelError> {
        let bad = values.par_chunks(width).with_min_len(ROWS_PER_TASK).position_first(|row| !math::all_finite(row));
        match bad {
            None => Ok(()),
            Some(row) => {
                Err(ModelError::NonFinite { layer: place.layer, tensor: tensor.to_owned(), token: (place.token)(row) })
            }
        }
    }

    pub(super) fn check_cancelled(&self) -> Result<(), ModelError> {
        match &self.options.cancel {
            Some(flag) if flag.load(Ordering::Relaxed) => Err(ModelError::Interrupted),
            _ => Ok(()),
        }
    }
}
