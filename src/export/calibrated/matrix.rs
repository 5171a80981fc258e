//! One matrix: rounded in every way that the method has, judged on the text of the gate.

use std::borrow::Cow;

use rayon::prelude::*;

use super::{Calibrated, Job, Method};
use crate::convert::source::ReadBuffers;
use crate::display::six_digits;
use crate::export::ExportError;
use crate::moments::{Input, InputMatrix, Unusable};
use crate::progress::Stop;
use crate::quantize::feedback::{Kept, Outcome};
use crate::rounding::RoundingMethod;
use crate::rounding::gptq::FeedbackError;
use crate::rounding::grid::{
    Grid, Groups, Rounded, common_global_scale, feedback, gptq_default, plain, resaved_in_bf16, search,
};

/// Weights that are read and rounded at once: 16 MB as floats.
const SLICE_WEIGHTS: u64 = 1 << 22;

/// A matrix that is to be rounded.
pub(super) struct MatrixJob<'a> {
    pub(super) request: &'a Calibrated<'a>,
    pub(super) job: &'a Job,
    /// By which the columns are multiplied before they are rounded, and inputs divided.
    pub(super) factors: Option<&'a [f32]>,
    pub(super) stop: &'a Stop,
}

/// A rounding that grows slice by slice, with its error on the text of the gate.
#[derive(Default)]
struct Candidate {
    rounded: Rounded,
    error: f64,
}

impl Candidate {
    fn add(&mut self, slice: Rounded, error: f64) {
        let Rounded { codes, scales, zero_points, global_scale } = slice;
        self.rounded.codes.extend(codes);
        self.rounded.scales.extend(scales);
        self.rounded.zero_points.extend(zero_points);
        self.rounded.global_scale = global_scale;
        self.error += error;
    }
}

impl MatrixJob<'_> {
    /// Rounds the matrix, whose input is that of matrix `index` of `input`.
    ///
    /// # Errors
    /// When it cannot be read, or the run is stopped.
    pub(super) fn round(&self, input: &Input, index: usize) -> Result<(Rounded, Outcome), ExportError> {
        let columns = self.job.matrix.columns;
        if input.n as u64 != columns {
            return Err(self.refused(format!("has rows of {columns} weights, and the model inputs of {}", input.n)));
        }
        let matrix = input.matrix(index);
        match self.request.method {
            Method::Feedback => self.with_feedback(matrix),
            Method::Gptq { resaved } => self.as_others(matrix, resaved),
        }
    }

    /// Calls `take` with one slice after the other: its first row, its weights and their number of rows.
    fn slices(&self, mut take: impl FnMut(usize, &[f32], usize) -> Result<(), ExportError>) -> Result<(), ExportError> {
        let Job { matrix, layout, .. } = self.job;
        let together = match layout.groups {
            Groups::Blocks { rows, .. } => rows as u64,
            _ => 1,
        };
        let rows = (SLICE_WEIGHTS / matrix.columns.max(1)).max(1).next_multiple_of(together);
        let mut buffers = ReadBuffers::default();
        let mut weights = Vec::new();
        for first in (0..matrix.rows).step_by(rows as usize) {
            self.stop.check()?;
            let count = rows.min(matrix.rows - first);
            weights.clear();
            self.request.folder.read_rows(matrix, first, count, &mut buffers, &mut weights)?;
            take(first as usize, &weights, count as usize)?;
        }
        Ok(())
    }

    /// NVFP4's global scale: that given, or the matrix's own.
    fn global(&self) -> Result<Option<f32>, ExportError> {
        if self.job.layout.grid != Grid::Nvfp4 || self.job.global.is_some() {
            return Ok(self.job.global);
        }
        let mut peak = 0.0f32;
        self.slices(|_, weights, _| {
            peak = weights.iter().fold(peak, |peak, w| peak.max(w.abs()));
            Ok(())
        })?;
        Ok(Some(common_global_scale([&[peak][..]])))
    }

    fn with_feedback(&self, input: &InputMatrix) -> Result<(Rounded, Outcome), ExportError> {
        let Job { layout, .. } = *self.job;
        let columns = self.job.matrix.columns as usize;
        let global = self.global()?;
        let mut importance = Cow::Borrowed(input.importance.as_slice());
        let mut factor = match &input.factor {
            Ok(factor) => Ok(Cow::Borrowed(factor)),
            Err(Unusable::TooFewTokens(_)) => Err(Kept::TooFewTokens),
            Err(Unusable::Factorization(_) | Unusable::Raw) => Err(Kept::Factorization),
        };
        if let Some(factors) = self.factors {
            let of_inputs: Vec<f32> = factors.iter().map(|factor| 1.0 / factor).collect();
            importance = importance.iter().zip(&of_inputs).map(|(square, by)| square * by * by).collect();
            factor = factor.map(|factor| Cow::Owned(factor.scaled(&of_inputs)));
        }
        let importance = importance.iter().any(|value| *value > 0.0).then_some(&*importance);
        let (mut fed, mut searched, mut rtn) = (Candidate::default(), Candidate::default(), Candidate::default());
        self.slices(|first, original, rows| {
            let error = |rounded: &Rounded| {
                let mut decoded = layout.dequantize(rounded, rows, columns);
                self.scale(&mut decoded, |value, factor| *value /= factor);
                input.gate.loss(first, original, &decoded)
            };
            let mut weights = match &input.correction {
                Some(correction) => Cow::Owned(correction.targets(first, original)),
                None => Cow::Borrowed(original),
            };
            if self.factors.is_some() {
                self.scale(weights.to_mut(), |value, factor| *value *= factor);
            }
            let weights = &*weights;
            let by_search = search(layout, weights, rows, columns, importance, global);
            if let Ok(factor) = &factor {
                let with_feedback = feedback(layout, weights, rows, columns, factor, &by_search);
                let with_feedback = with_feedback.map_err(|error| self.unroundable(error))?;
                let of_feedback = error(&with_feedback);
                fed.add(with_feedback, of_feedback);
            }
            let of_search = error(&by_search);
            searched.add(by_search, of_search);
            // Scales matter so little for floats of 8 bits that those which are better here may be worse elsewhere.
            if layout.grid == Grid::Fp8 {
                let by_rtn = plain(layout, weights, rows, columns, global);
                let of_rtn = error(&by_rtn);
                rtn.add(by_rtn, of_rtn);
            }
            Ok(())
        })?;
        let is_judged = input.gate.tokens() > 0;
        let kept = match &factor {
            Err(kept) => Some(*kept),
            // Whoever saw no text of the gate cannot judge; equal errors keep what is certain.
            Ok(_) if fed.error.is_nan() || fed.error > searched.error || !is_judged => Some(Kept::HeldOutError),
            Ok(_) => None,
        };
        let ratio = (factor.is_ok() && searched.error > 0.0).then(|| six_digits(fed.error / searched.error));
        let method = if kept.is_none() { RoundingMethod::Feedback } else { RoundingMethod::Search };
        let best = if kept.is_none() { fed } else { searched };
        let (method, kept, best) = match layout.grid {
            Grid::Fp8 if !is_judged || rtn.error < best.error => {
                (RoundingMethod::Ggml, kept.or(Some(Kept::HeldOutError)), rtn)
            }
            _ => (method, kept, best),
        };
        let damping = factor.ok().map(|factor| factor.damping_used());
        Ok((best.rounded, self.outcome(method, kept, ratio, damping, input)))
    }

    /// The weights as they are decoded, in the place of the source's: factors are taken back.
    pub(super) fn decoded(&self, rounded: &Rounded) -> Vec<f32> {
        let Job { matrix, layout, .. } = self.job;
        let mut decoded = layout.dequantize(rounded, matrix.rows as usize, matrix.columns as usize);
        self.scale(&mut decoded, |value, factor| *value /= factor);
        decoded
    }

    /// Changes rows by the factors of their columns.
    fn scale(&self, rows: &mut [f32], by: impl Fn(&mut f32, f32) + Sync) {
        let Some(factors) = self.factors else { return };
        rows.par_chunks_exact_mut(factors.len().max(1))
            .for_each(|row| row.iter_mut().zip(factors).for_each(|(value, factor)| by(value, *factor)));
    }

    fn as_others(&self, input: &InputMatrix, resaved: bool) -> Result<(Rounded, Outcome), ExportError> {
        let Some(moment) = &input.raw else { return Err(self.refused("has no second moment".to_owned())) };
        let Job { layout, .. } = *self.job;
        let columns = self.job.matrix.columns as usize;
        let global = self.global()?;
        let mut all = Candidate::default();
        self.slices(|_, weights, rows| {
            let rounded = gptq_default(layout, weights, rows, columns, moment, global);
            let rounded = rounded.map_err(|error| self.unroundable(error))?;
            let rounded = if resaved { resaved_in_bf16(layout, &rounded, rows, columns) } else { rounded };
            all.add(rounded, 0.0);
            Ok(())
        })?;
        Ok((all.rounded, self.outcome(RoundingMethod::Feedback, None, None, None, input)))
    }

    fn outcome(
        &self,
        method: RoundingMethod,
        kept: Option<Kept>,
        held_out_ratio: Option<f64>,
        damping: Option<f64>,
        input: &InputMatrix,
    ) -> Outcome {
        Outcome {
            tensor: self.job.module.clone(),
            method,
            kept,
            matrices: 1,
            with_feedback: usize::from(method == RoundingMethod::Feedback),
            held_out_ratio,
            damping,
            two_sided: false,
            tokens: input.tokens,
        }
    }

    fn unroundable(&self, error: FeedbackError) -> ExportError {
        self.refused(error.to_string())
    }

    fn refused(&self, problem: String) -> ExportError {
        ExportError::Rounding { module: self.job.module.clone(), problem }
    }
}
