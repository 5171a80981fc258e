//! The errors that rounding with feedback leaves, for plans of files that are rounded so.
//!
//! One pass over the layers shows the second moments H of every matrix's inputs. A sample of its rows is rounded to each
//! type as `lwq quantize --rounding feedback` would do it, and judged by tr(dW H dWᵀ) with the moments of the gate's text;
//! the same is measured for plain rounding, to which the probes' divergences belong. So a plan takes the divergence of a
//! probe and multiplies it with the ratio of two errors in the same norm.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use super::MeasureError;
use super::file::type_name;
use crate::display::six_digits;
use crate::gguf::{Gguf, TensorInfo, TensorType};
use crate::moments::{Input, InputMatrix, Visitor};
use crate::quant;
use crate::rounding::gptq::{improve_rows, supports_feedback};
use crate::rounding::round_by_search;
use crate::rows::read_rows;

/// Rows of a tensor that are rounded to every type. Errors of rows differ little: in rows of 1,536 and more, the sum over
/// 64 is certain to a few percent, and 64 rows of every tensor in 16 types cost less than the pass that shows the moments.
const SAMPLED_ROWS: u64 = 64;

/// What the errors depend on beside the model and the imatrix.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeedbackProvenance {
    /// Name of the calibration text.
    pub text: String,
    /// SHA-256 of its tokens.
    pub text_sha256: String,
    /// SHA-256 of the tokens that judged.
    pub gate_sha256: String,
    /// Tokens of the calibration text.
    pub tokens: u64,
    /// Damping and the like, in words.
    pub settings: String,
}

/// Errors in all tensors whose inputs a pass shows.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeedbackErrors {
    /// What they depend on.
    pub provenance: FeedbackProvenance,
    /// Steps of the pass: the layers and the output matrix.
    pub steps: usize,
    /// How many of them are done.
    pub steps_done: usize,
    /// Errors by tensor.
    pub tensors: BTreeMap<String, TensorFeedback>,
}

/// Squared errors of one tensor's outputs relative to Σ h W², with h the diagonal of H, by type.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorFeedback {
    /// Of plain rounding, as the probes round.
    pub plain: BTreeMap<String, f64>,
    /// Of what a run with feedback keeps: feedback, or search where that is better.
    pub errors: BTreeMap<String, f64>,
}

impl FeedbackErrors {
    /// True if all is measured.
    pub fn is_complete(&self) -> bool {
        self.steps > 0 && self.steps_done == self.steps
    }

    /// What is wrong with numbers read from a file.
    pub(super) fn problem(&self) -> Option<String> {
        let sound = |value: &f64| value.is_finite() && *value >= 0.0;
        self.tensors.iter().find_map(|(tensor, known)| {
            let (ty, error) = known.plain.iter().chain(&known.errors).find(|(_, error)| !sound(error))?;
            let name = crate::gguf::shown(tensor.as_bytes());
            Some(format!("tensor {name}: the error of {ty} with feedback is {error}; measure again"))
        })
    }
}

/// A tensor to be measured: the types, and the importance by which the probes rounded it, `[matrices, row_len]`.
pub(super) struct FeedbackSubject<'a> {
    /// Types to round to.
    pub types: Vec<TensorType>,
    /// Importance.
    pub importance: Option<&'a [f32]>,
}

/// Measures what a pass shows.
pub(super) struct FeedbackMeter<'a> {
    /// The model's file.
    pub gguf: &'a Gguf,
    /// What to measure, by tensor.
    pub subjects: &'a HashMap<String, FeedbackSubject<'a>>,
    /// What is measured.
    pub errors: &'a mut FeedbackErrors,
    /// Called after each step.
    pub on_step: &'a mut dyn FnMut(&FeedbackErrors) -> Result<(), MeasureError>,
}

impl Visitor for FeedbackMeter<'_> {
    type Error = MeasureError;

    fn roundings(&self, tensor: &str, _step: usize) -> usize {
        usize::from(self.subjects.contains_key(tensor))
    }

    fn input(&mut self, input: Input) -> Result<(), MeasureError> {
        for name in &input.tensors {
            let (Some(tensor), Some(subject)) = (self.gguf.tensor(name), self.subjects.get(name)) else { continue };
            let measured = measure(self.gguf, tensor, subject, &input)?;
            self.gguf.release(tensor);
            self.errors.tensors.insert(name.clone(), measured);
        }
        Ok(())
    }

    fn done(&mut self, step: usize) -> Result<(), MeasureError> {
        self.errors.steps_done = step + 1;
        (self.on_step)(self.errors)
    }
}

/// Sampled rows of one matrix.
struct Sample<'a> {
    matrix: &'a InputMatrix,
    importance: Option<&'a [f32]>,
    n: usize,
    /// `[rows, n]`.
    weights: Vec<f32>,
}

fn measure(
    gguf: &Gguf,
    tensor: &TensorInfo,
    subject: &FeedbackSubject<'_>,
    input: &Input,
) -> Result<TensorFeedback, MeasureError> {
    let samples = read_samples(gguf, tensor, subject, input)?;
    let norm: f64 = samples.iter().map(Sample::norm).sum();
    let mut measured = TensorFeedback::default();
    if norm <= 0.0 {
        return Ok(measured);
    }
    for &ty in &subject.types {
        let (mut plain, mut kept) = (0.0, 0.0);
        for sample in &samples {
            let by_plain = sample.plain(ty).unwrap_or(f64::INFINITY);
            plain += by_plain;
            kept += if ty.is_quantized() { sample.kept(ty) } else { by_plain };
        }
        for (map, error) in [(&mut measured.plain, plain), (&mut measured.errors, kept)] {
            if error.is_finite() {
                map.insert(type_name(ty), six_digits((error / norm).max(0.0)));
            }
        }
    }
    Ok(measured)
}

/// Rows at equal distances, matrix by matrix.
fn read_samples<'a>(
    gguf: &Gguf,
    tensor: &TensorInfo,
    subject: &FeedbackSubject<'a>,
    input: &'a Input,
) -> Result<Vec<Sample<'a>>, MeasureError> {
    let n = input.n;
    let refused = |problem: String| MeasureError::Tensor { tensor: tensor.shown_name(), problem };
    if tensor.row_len() != n as u64 {
        return Err(refused(format!("rows of {} weights and inputs of {n} values", tensor.row_len())));
    }
    let (rows, per_matrix) = (tensor.rows(), tensor.rows_per_matrix().max(1));
    let count = SAMPLED_ROWS.min(rows);
    let mut samples: Vec<(u64, Sample<'a>)> = Vec::new();
    for at in 0..count {
        let row = (u128::from(2 * at + 1) * u128::from(rows) / u128::from(2 * count)) as u64;
        let matrix = row / per_matrix;
        if samples.last().is_none_or(|(last, _)| *last != matrix) {
            let importance = subject.importance.map(|all| &all[matrix as usize * n..][..n]);
            let matrix_input = input.matrix(matrix as usize);
            samples.push((matrix, Sample { matrix: matrix_input, importance, n, weights: Vec::new() }));
        }
        let weights = read_rows(gguf, tensor, row, 1)?;
        if let Some((_, sample)) = samples.last_mut() {
            sample.weights.extend(weights);
        }
    }
    Ok(samples.into_iter().map(|(_, sample)| sample).collect())
}

impl Sample<'_> {
    /// Σ h W².
    fn norm(&self) -> f64 {
        let diagonal = self.matrix.gate.diagonal();
        let rows = self.weights.chunks_exact(self.n);
        rows.flat_map(|row| row.iter().zip(&diagonal)).map(|(w, h)| f64::from(*h) * f64::from(*w).powi(2)).sum()
    }

    fn error(&self, ty: TensorType, round: impl FnOnce(&mut [u8]) -> bool) -> Option<f64> {
        let row_bytes = ty.info()?.row_bytes(self.n as u64)? as usize;
        let mut encoded = vec![0u8; row_bytes * (self.weights.len() / self.n)];
        if !round(&mut encoded) || quant::validate(ty, &encoded).is_err() {
            return None;
        }
        let mut decoded = vec![0.0; self.weights.len()];
        quant::dequantize(ty, &encoded, &mut decoded).ok()?;
        Some(self.matrix.gate.loss(0, &self.weights, &decoded)).filter(|error| error.is_finite())
    }

    /// As the probes round; by the importance of the text where the type cannot do without any.
    fn plain(&self, ty: TensorType) -> Option<f64> {
        let needs = quant::codec(ty).is_some_and(quant::Codec::needs_importance);
        let importance = self.importance.or(needs.then_some(self.matrix.importance.as_slice()));
        self.error(ty, |out| quant::quantize_rows(ty, &self.weights, self.n, importance, out).is_ok())
    }

    /// As a run with feedback rounds and keeps.
    fn kept(&self, ty: TensorType) -> f64 {
        let importance = Some(self.matrix.importance.as_slice());
        let mut searched = Vec::new();
        let by_search = self.error(ty, |out| {
            let done = round_by_search(ty, &self.weights, self.n, importance, out).is_ok();
            searched.extend_from_slice(out);
            done
        });
        let with_feedback = match &self.matrix.factor {
            Ok(factor) if supports_feedback(ty) => self.error(ty, |out| {
                out.copy_from_slice(&searched);
                improve_rows(ty, &self.weights, self.n, factor, out).is_ok()
            }),
            _ => None,
        };
        by_search.into_iter().chain(with_feedback).fold(f64::INFINITY, f64::min)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::testing::RawGguf;
    use crate::rounding::gptq::{Factor, SecondMoment};
    use crate::testing::Random;

    /// Inputs whose neighbouring columns are alike, from a fixed sequence.
    fn moment(n: usize, seed: u64) -> SecondMoment {
        let mut random = Random::new(seed);
        let mut rows: Vec<f32> = (0..512 * n).map(|_| random.signed()).collect();
        for row in rows.chunks_exact_mut(n) {
            for j in 1..n {
                row[j] = 0.9 * row[j - 1] + 0.4 * row[j];
            }
        }
        let mut moment = SecondMoment::new(n).unwrap();
        moment.accumulate(&rows, None);
        moment
    }

    #[test]
    fn feedback_leaves_less_than_plain_rounding_and_every_type_is_measured() {
        let n = 256;
        let values: Vec<f32> = (0..n * 200).map(|at| ((at * 7919 % 10_007) as f32 / 5003.5 - 1.0).powi(3)).collect();
        let gguf = Gguf::from_bytes(RawGguf::new().f32_tensor("w.weight", &[n as u64, 200], &values).build()).unwrap();
        let calibration = moment(n, 1);
        let matrix = InputMatrix {
            importance: calibration.diagonal(),
            factor: Ok(Factor::new(&calibration, 0.02).unwrap()),
            stored: None,
            tokens: 512,
            gate: moment(n, 2).into(),
            raw: None,
            sample: None,
            correction: None,
        };
        let input = Input { tensors: vec!["w.weight".into()], n, matrices: vec![matrix], is_moved: false };
        let types = [TensorType::Q4_K, TensorType::Q8_0, TensorType::IQ2_XXS, TensorType::F16];
        let subjects = [("w.weight".to_owned(), FeedbackSubject { types: types.to_vec(), importance: None })].into();
        let mut errors = FeedbackErrors { steps: 2, ..FeedbackErrors::default() };
        let mut steps = 0;
        let mut meter = FeedbackMeter {
            gguf: &gguf,
            subjects: &subjects,
            errors: &mut errors,
            on_step: &mut |errors| {
                steps = errors.steps_done;
                Ok(())
            },
        };
        assert_eq!((meter.roundings("w.weight", 0), meter.roundings("v.weight", 0)), (1, 0));
        meter.input(input).unwrap();
        meter.done(1).unwrap();
        assert!(steps == 2 && errors.is_complete() && errors.problem().is_none());
        let known = &errors.tensors["w.weight"];
        assert_eq!((known.plain.len(), known.errors.len()), (4, 4), "{known:?}");
        assert!(known.errors["Q4_K"] < 0.85 * known.plain["Q4_K"], "{known:?}");
        assert!(known.errors["Q8_0"] < known.errors["Q4_K"] && known.errors["F16"] == known.plain["F16"]);
    }
}
