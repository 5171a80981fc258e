//! The way back from the logits to what leaves the last layer.

use std::sync::Arc;

use rayon::prelude::*;

use super::{Back, GradientTaps, OutputLoss, derivatives};
use crate::model::error::ModelError;
use crate::model::group::{HiddenStates, Kept};
use crate::model::math;
use crate::model::pass::{Pass, Place};
use crate::model::taps::NoTaps;

impl Pass<'_, '_, '_> {
    /// The gradient of `loss` at what left the last layer, given that: logits are computed and dropped a tile of rows at a
    /// time.
    ///
    /// # Errors
    /// When layers are still to run, the group has continuations, activations are rounded, a value is not finite, the loss or a
    /// tap fails, or the run is cancelled.
    pub fn head_gradient(
        &self,
        hidden: &HiddenStates,
        loss: &mut dyn OutputLoss,
        taps: &mut dyn GradientTaps,
    ) -> Result<HiddenStates, ModelError> {
        self.check_differentiable(hidden)?;
        let model = self.model;
        let (n_embd, n_vocab, n) = (model.hparams.n_embd, model.n_vocab(), hidden.group.len());
        let norm = model.weights.output_norm.decode(&self.overrides, 0)?;
        let mut data = vec![0.0; hidden.data.len()];
        let tile_rows = self.logits_tile_rows();
        let rows: Vec<usize> = (0..n).collect();
        for (rows, d) in rows.chunks(tile_rows).zip(data.chunks_mut(tile_rows * n_embd)) {
            let mut logits = vec![0.0; rows.len() * n_vocab];
            self.logits_into(hidden, rows, &mut logits, &mut NoTaps)?;
            let capped = model.hparams.logit_cap.map(|_| logits.clone());
            loss.gradient(&hidden.group, rows, &mut logits)?;
            if let (Some(cap), Some(capped)) = (model.hparams.logit_cap, &capped) {
                logits
                    .par_chunks_mut(n_vocab)
                    .zip(capped.par_chunks(n_vocab))
                    .for_each(|(d, capped)| derivatives::soft_cap(capped, d, cap));
            }
            if let Some(scale) = model.hparams.logit_scale {
                logits.par_chunks_mut(n_vocab).for_each(|row| math::scale(row, scale));
            }
            let mut back = Back { place: Place { layer: None, token: &|row| rows[row] }, taps: &mut *taps };
            self.add_product_back(&model.weights.output, 0, None, logits, d, &mut back)?;
            self.norm_back(&hidden.data[rows[0] * n_embd..][..d.len()], Some(&norm), d);
        }
        model.release_output();
        let kept = model.kept_widths(model.n_layer()).into_iter().map(|widths| {
            let zeros = |width: usize| vec![0.0; n * width];
            (widths.layer, Arc::new(Kept { k: zeros(widths.keys), v: zeros(widths.values) }))
        });
        let kept = kept.collect();
        Ok(HiddenStates { group: Arc::clone(&hidden.group), next_layer: model.n_layer(), n_embd, data, kept })
    }
}
