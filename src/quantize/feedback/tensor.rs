//! One tensor: rounded with feedback and by search, judged on the text of the gate.

use super::super::write::Overflow;
use super::RoundingError;
use super::outcome::{Kept, Outcome};
use crate::display::six_digits;
use crate::gguf::{Gguf, TensorInfo, TensorType};
use crate::moments::{GradientMoments, Input, InputMatrix, Unusable};
use crate::progress::Stop;
use crate::quant;
use crate::recipe::Role;
use crate::rounding::gptq::{
    Factor, OUTPUT_DAMPING, OutputFactor, improve_rows, improve_two_sided, supports_feedback, supports_search,
};
use crate::rounding::{RoundingMethod, round_by_search};
use crate::rows::read_rows;

/// Weights that are decoded and rounded at once: 16 MB as floats.
const SLICE_WEIGHTS: u64 = 1 << 22;

/// Roles whose rows answer for each other where their gradients are known: what writes to the stream, queries, keys and
/// values. On a model of 4 million weights in Q4_K that takes a fifth off the divergence, .88 of it output and down, .94
/// query, key and value; with gate and up, the widest of all, nothing more is gained.
const TWO_SIDED: &[Role] = &[Role::AttnQ, Role::AttnK, Role::AttnV, Role::AttnOutput, Role::FfnDown];

/// A tensor that is to be rounded.
pub(super) struct TensorJob<'a> {
    pub gguf: &'a Gguf,
    pub source: &'a TensorInfo,
    pub ty: TensorType,
    /// Moments of gradients, if there are any.
    pub gradients: Option<&'a GradientMoments>,
    /// What search gives is told beside what feedback gives.
    pub keeps_search: bool,
    pub stop: &'a Stop,
}

/// A tensor that is rounded.
pub(super) struct RoundedTensor {
    /// Its rows in order.
    pub data: Vec<u8>,
    /// The same by search, where that differs and was asked for.
    pub searched: Option<Vec<u8>>,
    pub outcome: Outcome,
}

/// What came out for one matrix.
struct MatrixOutcome {
    /// Why it was not rounded with feedback.
    kept: Option<Kept>,
    /// Errors on the text of the gate, with feedback and by search.
    errors: Option<(f64, f64)>,
    damping: Option<f64>,
    two_sided: bool,
}

impl TensorJob<'_> {
    /// Rounds the tensor.
    ///
    /// # Errors
    /// When it cannot be read, holds values that are not finite or too large for the type, or the run is cancelled.
    pub(super) fn round(&self, input: &Input) -> Result<RoundedTensor, RoundingError> {
        let n = self.source.row_len();
        let per_matrix = self.source.rows_per_matrix();
        let row_bytes = self.ty.info().and_then(|info| info.row_bytes(n));
        let row_bytes = row_bytes.ok_or_else(|| self.refused(format!("rows of {n} do not fit {}", self.ty)))?;
        if input.n as u64 != n {
            return Err(self.refused(format!("rows of {n} weights and inputs of {} values", input.n)));
        }
        let size = usize::try_from(row_bytes.saturating_mul(self.source.rows()));
        let mut data = vec![0u8; size.map_err(|_| self.refused("is too large".to_owned()))?];
        let mut searched = vec![0u8; if self.keeps_search { data.len() } else { 0 }];
        let outputs = self.output_factor()?;
        let mut outcomes = Vec::new();
        let matrix_bytes = ((row_bytes * per_matrix) as usize).max(1);
        let mut of_search = searched.chunks_exact_mut(matrix_bytes);
        for (index, out) in data.chunks_exact_mut(matrix_bytes).enumerate() {
            let (matrix, searched) = (input.matrix(index), of_search.next());
            outcomes.push(match (&outputs, self.factor_of(matrix)) {
                (Some(outputs), Ok(factor)) => self.round_whole(matrix, factor, outputs, out, searched)?,
                (_, factor) => self.round_matrix(index, matrix, factor, out, searched)?,
            });
        }
        self.gguf.release(self.source);
        let outcome = self.summarize(&outcomes, input);
        let searched = (self.keeps_search && searched != data).then_some(searched);
        Ok(RoundedTensor { data, searched, outcome })
    }

    fn factor_of<'i>(&self, input: &'i InputMatrix) -> Result<&'i Factor, Kept> {
        match (input.stored.as_ref().unwrap_or(&input.factor), supports_feedback(self.ty)) {
            (_, false) => Err(Kept::Type),
            (Err(Unusable::TooFewTokens(_)), true) => Err(Kept::TooFewTokens),
            (Err(Unusable::Factorization(_) | Unusable::Raw), true) => Err(Kept::Factorization),
            (Ok(factor), true) => Ok(factor),
        }
    }

    /// What ties the rows together: nothing in a stack of experts, whose gradients are few, in other roles, and without
    /// gradients.
    fn output_factor(&self) -> Result<Option<OutputFactor>, RoundingError> {
        let of_role = self.source.matrices() == 1 && TWO_SIDED.contains(&Role::of(&self.source.name));
        let Some(gradients) = self.gradients.filter(|_| of_role && supports_feedback(self.ty)) else { return Ok(None) };
        let Some(moment) = gradients.moment(&self.source.name)? else { return Ok(None) };
        let factor = OutputFactor::new(&moment, OUTPUT_DAMPING).map_err(|error| self.refused(error.to_string()))?;
        Ok(Some(factor))
    }

    /// Rounds a matrix all of whose rows are tied together.
    fn round_whole(
        &self,
        input: &InputMatrix,
        factor: &Factor,
        outputs: &OutputFactor,
        out: &mut [u8],
        searched: Option<&mut [u8]>,
    ) -> Result<MatrixOutcome, RoundingError> {
        self.stop.check()?;
        let n = self.source.row_len() as usize;
        let weights = read_rows(self.gguf, self.source, 0, self.source.rows())?;
        let targets = input.correction.as_ref().map(|correction| correction.targets(0, &weights));
        let targets = targets.as_deref().unwrap_or(&weights);
        self.search(0, targets, &usable_importance(&input.importance), out)?;
        self.tell_search(0, &weights, input, out, searched)?;
        let error_of = |bytes: &[u8]| {
            let mut decoded = vec![0.0; weights.len()];
            quant::dequantize(self.ty, bytes, &mut decoded).map_err(|e| self.refused(e.to_string()))?;
            Ok::<f64, RoundingError>(input.gate.weighed_loss(outputs, &weights, &decoded))
        };
        self.stop.check()?;
        let mut rounded = out.to_vec();
        let sound = improve_two_sided(self.ty, targets, n, factor, outputs, &mut rounded).is_ok()
            && quant::validate(self.ty, &rounded).is_ok();
        let search_error = error_of(out)?;
        let feedback_error = if sound { Some(error_of(&rounded)?).filter(|error| error.is_finite()) } else { None };
        let kept = kept(feedback_error, search_error, input);
        if kept.is_none() {
            out.copy_from_slice(&rounded);
        }
        Ok(MatrixOutcome {
            kept,
            errors: feedback_error.map(|feedback_error| (feedback_error, search_error)),
            damping: Some(factor.damping_used()),
            two_sided: true,
        })
    }

    fn round_matrix(
        &self,
        index: usize,
        input: &InputMatrix,
        factor: Result<&Factor, Kept>,
        out: &mut [u8],
        mut searched: Option<&mut [u8]>,
    ) -> Result<MatrixOutcome, RoundingError> {
        let n = self.source.row_len();
        let rows = self.source.rows_per_matrix();
        let slice_rows = (SLICE_WEIGHTS / n.max(1)).clamp(1, rows.max(1));
        let row_bytes = out.len() / rows.max(1) as usize;
        let importance = usable_importance(&input.importance);
        let mut with_feedback = if factor.is_ok() { vec![0u8; out.len()] } else { Vec::new() };
        let mut sound = factor.is_ok();
        let (mut feedback_error, mut search_error) = (0.0, 0.0);
        let mut decoded = Vec::new();
        for first in (0..rows).step_by(slice_rows as usize) {
            self.stop.check()?;
            let count = slice_rows.min(rows - first);
            let weights = read_rows(self.gguf, self.source, index as u64 * rows + first, count)?;
            let targets = input.correction.as_ref().map(|correction| correction.targets(first as usize, &weights));
            let targets = targets.as_deref().unwrap_or(&weights);
            decoded.resize(weights.len(), 0.0);
            let range = first as usize * row_bytes..(first + count) as usize * row_bytes;
            self.search(index as u64 * rows + first, targets, &importance, &mut out[range.clone()])?;
            let searched = searched.as_deref_mut().map(|searched| &mut searched[range.clone()]);
            self.tell_search(index as u64 * rows + first, &weights, input, &out[range.clone()], searched)?;
            let (Ok(factor), true) = (factor, sound) else { continue };
            let slice = &mut with_feedback[range.clone()];
            let mut error_of = |bytes: &[u8]| {
                quant::dequantize(self.ty, bytes, &mut decoded).map_err(|e| self.refused(e.to_string()))?;
                Ok::<f64, RoundingError>(input.gate.loss(first as usize, &weights, &decoded))
            };
            search_error += error_of(&out[range.clone()])?;
            slice.copy_from_slice(&out[range]);
            // A rounding that fails or gives useless blocks is no reason to stop: search has done it already.
            sound = improve_rows(self.ty, targets, n as usize, factor, slice).is_ok()
                && quant::validate(self.ty, slice).is_ok();
            if sound {
                feedback_error += error_of(slice)?;
                sound = feedback_error.is_finite();
            }
        }
        let kept = match factor {
            Err(kept) => Some(kept),
            Ok(_) => kept(sound.then_some(feedback_error), search_error, input),
        };
        if kept.is_none() {
            out.copy_from_slice(&with_feedback);
        }
        let judged = factor.is_ok() && sound;
        Ok(MatrixOutcome {
            kept,
            errors: judged.then_some((feedback_error, search_error)),
            damping: factor.ok().map(|factor| factor.damping_used()),
            two_sided: false,
        })
    }

    /// What search gives for the rows from `first_row` on, if it was asked for; `found` is what it gave for their targets.
    fn tell_search(
        &self,
        first_row: u64,
        weights: &[f32],
        input: &InputMatrix,
        found: &[u8],
        searched: Option<&mut [u8]>,
    ) -> Result<(), RoundingError> {
        match (searched, &input.correction) {
            (None, _) => Ok(()),
            (Some(searched), None) => {
                searched.copy_from_slice(found);
                Ok(())
            }
            // A target that makes up for errors of others is not what a search would round.
            (Some(searched), Some(_)) => {
                self.search(first_row, weights, &usable_importance(&input.importance), searched)
            }
        }
    }

    /// Rounds the rows from `first_row` on by search.
    fn search(&self, first_row: u64, weights: &[f32], importance: &[f32], out: &mut [u8]) -> Result<(), RoundingError> {
        let n = self.source.row_len() as usize;
        round_by_search(self.ty, weights, n, Some(importance), out).map_err(|e| self.refused(e.to_string()))?;
        quant::validate(self.ty, out)
            .map_err(|error| RoundingError::Overflow(Overflow::new(self.source, first_row, weights, self.ty, &error)))
    }

    fn summarize(&self, matrices: &[MatrixOutcome], input: &Input) -> Outcome {
        let with_feedback = matrices.iter().filter(|matrix| matrix.kept.is_none()).count();
        let errors = matrices.iter().filter_map(|matrix| matrix.errors);
        let (feedback, search) = errors.fold((0.0, 0.0), |(f, s), (feedback, search)| (f + feedback, s + search));
        let fallback = if supports_search(self.ty) { RoundingMethod::Search } else { RoundingMethod::Ggml };
        Outcome {
            tensor: self.source.name.clone(),
            method: if with_feedback > 0 { RoundingMethod::Feedback } else { fallback },
            kept: matrices.iter().find_map(|matrix| matrix.kept),
            matrices: matrices.len(),
            with_feedback,
            held_out_ratio: (search > 0.0).then(|| six_digits(feedback / search)),
            damping: matrices.iter().filter_map(|matrix| matrix.damping).reduce(f64::max),
            two_sided: matrices.iter().any(|matrix| matrix.two_sided),
            tokens: input.matrices.iter().map(|matrix| matrix.tokens).min().unwrap_or(0),
        }
    }

    fn refused(&self, problem: String) -> RoundingError {
        RoundingError::Rounding { tensor: self.source.shown_name(), problem }
    }
}

/// Why feedback with this error, `None` if it is not sound, is not kept instead of a search with that one.
fn kept(feedback_error: Option<f64>, search_error: f64, input: &InputMatrix) -> Option<Kept> {
    match feedback_error {
        None => Some(Kept::Unsound),
        // Whoever saw no text of the gate cannot judge; equal errors keep what is certain.
        Some(error) if error > search_error || input.gate.tokens() == 0 => Some(Kept::HeldOutError),
        Some(_) => None,
    }
}

/// Importance that a rounding can use: an input that was always zero weighs all columns the same.
fn usable_importance(importance: &[f32]) -> Vec<f32> {
    if importance.iter().any(|value| *value > 0.0) { importance.to_vec() } else { vec![1.0; importance.len()] }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::testing::RawGguf;
    use crate::rounding::gptq::{Factor, SecondMoment, search_rows};
    use crate::testing::Random;

    const N: usize = 64;
    const ROWS: usize = 24;

    /// Values without a pattern in [-1, 1).
    fn noise(len: usize, seed: u64) -> Vec<f32> {
        let mut random = Random::new(seed);
        (0..len).map(|_| random.signed()).collect()
    }

    /// A moment of inputs whose neighbouring columns are alike.
    fn moment(seed: u64) -> SecondMoment {
        let mut rows = noise(512 * N, seed);
        for row in rows.chunks_exact_mut(N) {
            for j in 1..N {
                row[j] = 0.9 * row[j - 1] + 0.4 * row[j];
            }
        }
        let mut moment = SecondMoment::new(N).unwrap();
        moment.accumulate(&rows, None);
        moment
    }

    fn input(gate: SecondMoment) -> Input {
        let calibration = moment(1);
        let matrix = InputMatrix {
            importance: calibration.diagonal(),
            factor: Factor::new(&calibration, 0.02).map_err(|e| Unusable::Factorization(e.to_string())),
            stored: None,
            tokens: 512,
            gate: gate.into(),
            raw: None,
            sample: None,
            correction: None,
        };
        Input { tensors: vec!["w.weight".to_owned()], n: N, matrices: vec![matrix], is_moved: false }
    }

    fn round(input: &Input, ty: TensorType, values: &[f32]) -> Result<(Vec<u8>, Outcome), RoundingError> {
        round_both(input, ty, values).map(|rounded| (rounded.data, rounded.outcome))
    }

    fn round_both(input: &Input, ty: TensorType, values: &[f32]) -> Result<RoundedTensor, RoundingError> {
        let gguf = RawGguf::new().f32_tensor("w.weight", &[N as u64, (values.len() / N) as u64], values).build();
        let gguf = Gguf::from_bytes(gguf).unwrap();
        let source = &gguf.tensors()[0];
        let job = TensorJob { gguf: &gguf, source, ty, gradients: None, keeps_search: true, stop: &Stop::never() };
        job.round(input)
    }

    #[test]
    fn feedback_is_kept_where_it_helps_on_other_text() {
        let values = noise(ROWS * N, 3);
        let (_, outcome) = round(&input(moment(2)), TensorType::Q4_0, &values).unwrap();
        assert_eq!((outcome.method, outcome.kept, outcome.with_feedback), (RoundingMethod::Feedback, None, 1));
        assert!(outcome.held_out_ratio.unwrap() < 0.8, "{outcome:?}");
    }

    #[test]
    fn what_search_gives_is_told_where_it_differs() {
        let values = noise(ROWS * N, 3);
        let both = round_both(&input(moment(2)), TensorType::Q4_0, &values).unwrap();
        let mut expected = vec![0; both.data.len()];
        search_rows(TensorType::Q4_0, &values, N, Some(&moment(1).diagonal()), &mut expected).unwrap();
        assert_eq!(both.searched.as_ref(), Some(&expected));
        assert_ne!(both.data, expected);
        let mut kept = input(moment(2));
        kept.matrices[0].factor = Err(Unusable::TooFewTokens(3));
        assert_eq!(round_both(&kept, TensorType::Q4_0, &values).unwrap().searched, None);
    }

    #[test]
    fn the_gate_keeps_search_where_its_text_says_so() {
        // Neighbouring columns of opposite sign: what cancels on the calibration text adds up here.
        let mut rows = noise(512 * N, 5);
        for row in rows.chunks_exact_mut(N) {
            for j in 1..N {
                row[j] = -0.9 * row[j - 1] + 0.4 * row[j];
            }
        }
        let mut gate = SecondMoment::new(N).unwrap();
        gate.accumulate(&rows, None);
        let values = noise(ROWS * N, 3);
        let (bytes, outcome) = round(&input(gate), TensorType::Q4_0, &values).unwrap();
        assert_eq!((outcome.method, outcome.kept), (RoundingMethod::Search, Some(Kept::HeldOutError)), "{outcome:?}");
        assert!(outcome.held_out_ratio.unwrap() > 1.0);
        let mut expected = vec![0; bytes.len()];
        let importance = moment(1).diagonal();
        search_rows(TensorType::Q4_0, &values, N, Some(&importance), &mut expected).unwrap();
        assert_eq!(bytes, expected);
    }

    #[test]
    fn without_a_factor_search_is_kept() {
        for (unusable, kept) in [
            (Unusable::TooFewTokens(3), Kept::TooFewTokens),
            (Unusable::Factorization("x".to_owned()), Kept::Factorization),
        ] {
            let mut input = input(moment(2));
            input.matrices[0].factor = Err(unusable);
            let (_, outcome) = round(&input, TensorType::Q5_0, &noise(ROWS * N, 3)).unwrap();
            assert_eq!(
                (outcome.method, outcome.kept, outcome.held_out_ratio),
                (RoundingMethod::Search, Some(kept), None)
            );
        }
    }

    #[test]
    fn dead_inputs_and_bad_weights_end_in_bytes_or_in_one_line() {
        let dead = || {
            let mut moment = SecondMoment::new(N).unwrap();
            moment.accumulate(&vec![0.0; 64 * N], None);
            moment
        };
        let mut input = input(dead());
        input.matrices[0].importance = vec![0.0; N];
        input.matrices[0].factor = Factor::new(&dead(), 0.02).map_err(|e| Unusable::Factorization(e.to_string()));
        let (bytes, outcome) = round(&input, TensorType::Q4_0, &noise(ROWS * N, 3)).unwrap();
        quant::validate(TensorType::Q4_0, &bytes).unwrap();
        assert!(outcome.held_out_ratio.is_none_or(f64::is_finite));
        let mut values = noise(ROWS * N, 3);
        values[N + 3] = f32::NAN;
        let error = round(&input, TensorType::Q4_0, &values).unwrap_err().to_string();
        assert!(error.contains("\"w.weight\"") && error.contains(&format!("weight {} is NaN", N + 3)), "{error}");
    }

    #[test]
    fn a_request_to_stop_is_seen() {
        let gguf = RawGguf::new().f32_tensor("w.weight", &[N as u64, 2], &noise(2 * N, 1)).build();
        let gguf = Gguf::from_bytes(gguf).unwrap();
        let stop = Stop::when(std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true)));
        let (source, ty) = (&gguf.tensors()[0], TensorType::Q4_0);
        let job = TensorJob { gguf: &gguf, source, ty, gradients: None, keeps_search: false, stop: &stop };
        assert!(matches!(job.round(&input(moment(2))), Err(RoundingError::Interrupted(_))));
    }
}
