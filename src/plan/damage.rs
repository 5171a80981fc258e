//! The damage that each type does to each tensor, by the method that was asked for.

use std::collections::{BTreeMap, HashMap};

use super::{DamageMethod, PlannedText, Request};
use crate::gguf::TensorType;
use crate::measure::{
    ColumnWeights, DamageModel, Inventory, Job, MeasureError, SECOND_ROUND_BITS, Sampling, Sensitivity, prior_slopes,
    type_name, weight_errors,
};
use crate::progress::{Unit, Watch};
use crate::quant::{Codec, codec};
use crate::quantize::Rounding;
use crate::recipe::parse_storable_type;

/// Predicted damage of every choice.
pub(super) struct Estimate {
    damage: HashMap<String, Vec<(TensorType, f64)>>,
    measured: Option<Measured>,
}

/// What a measured estimate rests on.
struct Measured {
    sensitivity: Sensitivity,
    /// The same in the norm of the errors that feedback leaves, where the file is to be rounded so.
    judged: Option<Sensitivity>,
    /// Bits per weight of the budget, where that is known and a second round wanted.
    bits: Option<f64>,
    /// Errors of the types that the measurement does not hold.
    extra: HashMap<String, Vec<(TensorType, f64)>>,
}

impl Estimate {
    /// Damage of a type in a tensor; infinite for types that were not looked at.
    pub(super) fn damage(&self, tensor: &str, ty: TensorType) -> f64 {
        let known = self.damage.get(tensor).and_then(|types| types.iter().find(|(known, _)| *known == ty));
        known.map_or(f64::INFINITY, |(_, damage)| *damage)
    }

    /// Divergence of the whole model that a sum of damages comes to.
    pub(super) fn predict(&self, sum: f64) -> f64 {
        self.measured.as_ref().map_or(sum, |m| m.model().predict(sum))
    }

    /// The sum of damages that comes to the divergence `kld`.
    pub(super) fn damage_for(&self, kld: f64) -> f64 {
        self.measured.as_ref().map_or(kld, |m| m.model().sum_for(kld))
    }

    /// Standard error of a prediction, as a part of it; `None` where nobody knows.
    pub(super) fn relative_error<'t>(&self, damages: impl Iterator<Item = (&'t str, f64)>) -> Option<f64> {
        let measured = self.measured.as_ref()?;
        Some(measured.model().relative_error(damages))
    }

    /// The text of the probes.
    pub(super) fn text(&self) -> Option<PlannedText> {
        let provenance = &self.measured.as_ref()?.sensitivity.provenance;
        Some(PlannedText {
            name: provenance.text.clone(),
            sha256: provenance.text_sha256.clone(),
            tokens: provenance.tokens,
        })
    }

    /// Measures around a first solution of few bits, where damages do not add up, unless that was done before.
    /// True if the estimate has changed.
    ///
    /// # Errors
    /// Those of the measurement.
    pub(super) fn refine(
        &mut self,
        job: &Job<'_>,
        types: &HashMap<String, TensorType>,
        watch: &dyn Watch,
    ) -> Result<bool, MeasureError> {
        let Some(measured) = &mut self.measured else { return Ok(false) };
        let Some(bits) = measured.bits.filter(|bits| *bits < SECOND_ROUND_BITS) else { return Ok(false) };
        if measured.sensitivity.round_around(bits).is_some() {
            return Ok(false);
        }
        job.measure_around(&mut measured.sensitivity, types, watch)?;
        measured.judged = measured.judged.take().map(|_| measured.sensitivity.in_feedback_norm());
        self.damage = measured.damage(job);
        Ok(true)
    }
}

impl Measured {
    fn model(&self) -> DamageModel<'_> {
        self.judged.as_ref().unwrap_or(&self.sensitivity).damage_model(self.bits)
    }

    /// Errors of a tensor by type: those that feedback leaves, where the file is to be rounded so.
    fn errors(&self, name: &str) -> Option<&BTreeMap<String, f64>> {
        let feedback = self.judged.as_ref().and_then(|judged| judged.feedback.as_ref()?.tensors.get(name));
        let errors = feedback.map(|known| &known.errors).filter(|errors| !errors.is_empty());
        errors.or_else(|| self.sensitivity.tensor(name).map(|tensor| &tensor.errors))
    }

    fn damage(&self, job: &Job<'_>) -> HashMap<String, Vec<(TensorType, f64)>> {
        let model = self.model();
        let of_tensor = |name: &str| {
            let table = self.errors(name).into_iter().flatten();
            let named = table.filter_map(|(ty, error)| Some((parse_storable_type(ty, "type").ok()?, *error)));
            let all = named.chain(self.extra.get(name).into_iter().flatten().copied());
            all.filter_map(|(ty, error)| Some((ty, model.damage(name, error)?))).collect()
        };
        let names = job.tensors.iter().map(|measured| measured.tensor.name.as_str());
        names.map(|name| (name.to_owned(), of_tensor(name))).collect()
    }
}

/// Finds the damage of all legal types.
///
/// # Errors
/// When the model cannot be read or run, or a measurement belongs to other files.
pub(super) fn estimate(
    inventory: &Inventory<'_>,
    job: &Job<'_>,
    request: &Request<'_>,
    bits: Option<f64>,
    watch: &dyn Watch,
) -> Result<Estimate, MeasureError> {
    match request.method {
        DamageMethod::Error => {
            if matches!(request.rounding, Rounding::Feedback(_)) {
                watch.warn("--method error runs nothing: types are chosen by the errors of plain rounding, not by those of feedback");
            }
            by_error(inventory, bits, watch)
        }
        DamageMethod::Measured => by_measurement(inventory, job, request, bits, watch),
    }
}

fn by_measurement(
    inventory: &Inventory<'_>,
    job: &Job<'_>,
    request: &Request<'_>,
    bits: Option<f64>,
    watch: &dyn Watch,
) -> Result<Estimate, MeasureError> {
    let mut sensitivity = match job.finished()? {
        Some(found) => found,
        None => job.measure(watch)?,
    };
    let judged = match request.rounding {
        Rounding::Feedback(calibration) => {
            job.measure_feedback(&mut sensitivity, calibration, watch)?;
            Some(sensitivity.in_feedback_norm())
        }
        Rounding::Ggml | Rounding::Search => None,
    };
    // Rounds around other solutions may stand in the file; they count only where they are asked for.
    let bits = bits.filter(|_| request.second_round);
    let mut measured = Measured { sensitivity, judged, bits, extra: HashMap::new() };
    for ((tensor, types), target) in inventory.choosable().zip(job.tensors) {
        if measured.sensitivity.tensor(&tensor.name).is_none() {
            let reason = format!("tensor {} was not measured; delete the file and plan again", tensor.shown_name());
            return Err(MeasureError::BadFile { path: job.path.to_owned(), reason });
        }
        let known = measured.errors(&tensor.name);
        let missing: Vec<TensorType> = types
            .iter()
            .copied()
            .filter(|ty| known.is_none_or(|known| !known.contains_key(&type_name(*ty))))
            .filter(|ty| target.importance.is_some() || !codec(*ty).is_some_and(Codec::needs_importance))
            .collect();
        if !missing.is_empty() {
            let weights = ColumnWeights { importance: target.importance, rows: target.row_factors.as_deref() };
            let errors = weight_errors(inventory.gguf, tensor, weights, &missing, Sampling::default())?;
            let finite = errors.into_iter().filter(|(_, errors)| errors.weighted_error.is_finite());
            measured.extra.insert(tensor.name.clone(), finite.map(|(ty, errors)| (ty, errors.relative())).collect());
        }
    }
    Ok(Estimate { damage: measured.damage(job), measured: Some(measured) })
}

/// Types this many bits below the budget's average are not tried without measurements: the damage of so few bits is
/// guessed too badly, and the encoders of the smallest types are by far the slowest.
const BITS_BELOW_AVERAGE: f64 = 2.0;

/// Weights that are rounded per tensor: the guesses are no better than a larger sample would deserve.
const SAMPLED_WEIGHTS: u64 = 1 << 17;

/// The types worth rounding to: all, if the budget is not known in bits.
fn tried(types: &[TensorType], bits: Option<f64>) -> Vec<TensorType> {
    let size = |ty: &TensorType| ty.info().map_or(0.0, |info| info.bits_per_weight());
    let least = bits.map_or(0.0, |bits| bits - BITS_BELOW_AVERAGE);
    // Rows that only large types fit have one of those, whatever the budget.
    let most = types.iter().map(size).fold(0.0, f64::max);
    types.iter().copied().filter(|ty| size(ty) >= least.min(most)).collect()
}

/// Relative rounding errors times what is usual for the role of a tensor.
fn by_error(inventory: &Inventory<'_>, bits: Option<f64>, watch: &dyn Watch) -> Result<Estimate, MeasureError> {
    let names: Vec<&str> = inventory.choosable().map(|(tensor, _)| tensor.name.as_str()).collect();
    let total = inventory.choosable().filter_map(|(tensor, _)| tensor.bytes).sum();
    watch.begin("rounding samples", total, Unit::Bytes);
    let sampling = Sampling { weights: SAMPLED_WEIGHTS, ..Sampling::default() };
    let mut damage = HashMap::new();
    for ((tensor, types), slope) in inventory.choosable().zip(prior_slopes(&names)) {
        let importance = inventory.importance.get(&tensor.name);
        let rows = inventory.row_factors(tensor);
        let types = tried(types, bits);
        // With feedback, types may be legal whose importance only the model's run will show.
        let needs = importance.is_none() && types.iter().any(|ty| codec(*ty).is_some_and(Codec::needs_importance));
        let equal = if needs { vec![1.0; (tensor.row_len() * tensor.matrices()) as usize] } else { Vec::new() };
        let values = importance.map(|found| found.values.as_slice()).or(needs.then_some(equal.as_slice()));
        let weights = ColumnWeights { importance: values, rows: rows.as_deref() };
        let errors = weight_errors(inventory.gguf, tensor, weights, &types, sampling)?;
        inventory.gguf.release(tensor);
        let scaled = errors.into_iter().map(|(ty, errors)| (ty, slope * errors.relative())).collect();
        damage.insert(tensor.name.clone(), scaled);
        watch.advance(tensor.bytes.unwrap_or(0), &tensor.name);
    }
    watch.end();
    Ok(Estimate { damage, measured: None })
}
