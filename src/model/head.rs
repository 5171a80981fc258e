//! From the last hidden states to logits, streamed.

use rayon::prelude::*;

use super::error::ModelError;
use super::group::HiddenStates;
use super::math;
use super::pass::{Pass, Place, ProductInput};
use super::taps::Taps;

/// Bytes of logits that exist at once.
pub(super) const TILE_BYTES: usize = 64 << 20;

/// Logits of a few tokens.
#[derive(Clone, Copy, Debug)]
pub struct LogitsTile<'a> {
    /// Row of the group for each row of `logits`.
    pub rows: &'a [usize],
    /// Vocabulary size.
    pub n_vocab: usize,
    /// `[rows.len(), n_vocab]`, row-major.
    pub logits: &'a [f32],
}

impl<'a> LogitsTile<'a> {
    /// Pairs of group row and logits.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (usize, &'a [f32])> {
        self.rows.iter().copied().zip(self.logits.chunks_exact(self.n_vocab))
    }
}

impl Pass<'_, '_, '_> {
    /// Number of rows whose logits are best computed together: about 64 MB of logits.
    pub fn logits_tile_rows(&self) -> usize {
        (TILE_BYTES / (4 * self.model.n_vocab().max(1))).clamp(16, 512)
    }

    /// Logits of `rows` of the group into `out`, `[rows.len(), n_vocab]` row-major. Taps see the normed states as
    /// input of the output matrix.
    ///
    /// # Errors
    /// When layers are still to run, a row or `out` does not fit, a value is not finite, a tap fails or the run is
    /// cancelled.
    pub fn logits_into(
        &self,
        hidden: &HiddenStates,
        rows: &[usize],
        out: &mut [f32],
        taps: &mut dyn Taps,
    ) -> Result<(), ModelError> {
        let n_vocab = self.model.n_vocab();
        if rows.len().checked_mul(n_vocab) != Some(out.len()) {
            let reason = format!("{} values cannot hold {} rows of {n_vocab} logits", out.len(), rows.len());
            return Err(ModelError::BadInput { reason });
        }
        self.check_cancelled()?;
        let n_embd = self.model.hparams.n_embd;
        let normed = self.output_input(hidden, rows, taps)?;
        let output = &self.model.weights.output;
        let mut input = ProductInput::new(&normed, n_embd, self.options.precision);
        let place = Place { layer: None, token: &|row| rows[row] };
        self.linear(output, 0, &mut input, out, place)?;
        if let Some(scale) = self.model.hparams.logit_scale {
            out.par_chunks_mut(n_vocab).for_each(|row| math::scale(row, scale));
        }
        if let Some(cap) = self.model.hparams.logit_cap {
            out.par_chunks_mut(n_vocab).for_each(|row| math::soft_cap(row, cap));
        }
        Ok(())
    }

    /// Logits of `rows`, a tile at a time: the buffers never hold more than a tile.
    ///
    /// # Errors
    /// Those of [`Self::logits_into`] and of `sink`.
    pub fn logits(
        &self,
        hidden: &HiddenStates,
        rows: &[usize],
        taps: &mut dyn Taps,
        mut sink: impl FnMut(LogitsTile<'_>) -> Result<(), ModelError>,
    ) -> Result<(), ModelError> {
        let n_vocab = self.model.n_vocab();
        let tile_rows = self.logits_tile_rows();
        let mut buffer = vec![0.0; tile_rows.min(rows.len()) * n_vocab];
        for tile in rows.chunks(tile_rows) {
            let logits = &mut buffer[..tile.len() * n_vocab];
            self.logits_into(hidden, tile, logits, taps)?;
            sink(LogitsTile { rows: tile, n_vocab, logits })?;
        }
        self.model.release_output();
        Ok(())
    }

    /// Shows taps the input of the output matrix for `rows` without computing logits.
    ///
    /// # Errors
    /// Those of [`Self::logits_into`].
    pub fn tap_output(&self, hidden: &HiddenStates, rows: &[usize], taps: &mut dyn Taps) -> Result<(), ModelError> {
        if taps.wants(self.model.weights.output.weight.name) {
            for tile in rows.chunks(1024) {
                self.output_input(hidden, tile, taps)?;
            }
        }
        Ok(())
    }

    fn output_input(&self, hidden: &HiddenStates, rows: &[usize], taps: &mut dyn Taps) -> Result<Vec<f32>, ModelError> {
        let model = self.model;
        let n_embd = model.hparams.n_embd;
        if hidden.next_layer != model.n_layer() || hidden.n_embd != n_embd {
            let reason = format!("logits were asked for before layer {} of {}", hidden.next_layer, model.n_layer());
            return Err(ModelError::BadInput { reason });
        }
        let mut gathered = Vec::with_capacity(rows.len() * n_embd);
        for &row in rows {
            if row >= hidden.group.len() {
                let reason = format!("logits of row {row} were asked for in a group of {}", hidden.group.len());
                return Err(ModelError::BadInput { reason });
            }
            gathered.extend_from_slice(hidden.row(row));
        }
        let norm = model.weights.output_norm.decode(&self.overrides, 0)?;
        let normed = self.normed(&gathered, &norm);
        self.tap(&[model.weights.output.weight.name], None, None, &normed, n_embd, taps)?;
        Ok(normed)
    }
}
