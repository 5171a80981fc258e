//! The errors and divergences of a whole model, tensor by tensor.

use std::collections::{BTreeMap, HashMap};

use super::curvature::{foretold, squares_of};
use super::file::type_name;
use super::{
    ColumnWeights, JointProbe, MeasureError, MeasuredTensor, Probe, ProbeResult, Prober, Sampling, Sensitivity,
    TensorSensitivity, encode_tensor, weight_errors,
};
use crate::display::six_digits;
use crate::gguf::{Gguf, TensorInfo, TensorTotals, TensorType};
use crate::model::{HiddenStates, NoTaps, Overrides, Pass};
use crate::moments::GradientMoments;
use crate::recipe::{Role, roles};

/// What the logits of a probe cost, in forward passes.
const COST_OF_LOGITS: f64 = 0.15;

impl Probe {
    /// What a run with one rounding came to.
    pub(super) fn of(ty: &str, result: &ProbeResult) -> Probe {
        Probe {
            ty: ty.to_owned(),
            kld: six_digits(result.mean()),
            kld_error: six_digits(result.error()),
            steady_kld: result.routing.is_some().then(|| six_digits(result.steady())),
            flips: result.routing.as_ref().map(|routing| six_digits(routing.flips)),
            foretold: false,
        }
    }
}

/// What is measured, and on what.
pub struct Measurement<'a, 'm, 'g> {
    /// The model's file.
    pub gguf: &'g Gguf,
    /// The probe text and the original's distributions on it.
    pub prober: &'a Prober<'m, 'g>,
    /// The tensors, in the order of the file.
    pub tensors: &'a [MeasuredTensor<'a>],
}

/// Follows the probes: `state` is complete as far as it goes and may be saved; the number is what the step took, in
/// forward passes over the probe text. An error ends the measurement.
type OnProbe<'f> = dyn FnMut(&Sensitivity, &str, f64) -> Result<(), MeasureError> + 'f;

/// Measures the rounding errors that `state` lacks, and tells divergences from `gradients` where they allow it. Runs nothing.
///
/// # Errors
/// When a tensor cannot be read or rounded, or `on_measured` ends the run.
pub(super) fn measure_errors(
    gguf: &Gguf,
    tensors: &[MeasuredTensor<'_>],
    sampling: Sampling,
    gradients: Option<&GradientMoments>,
    state: &mut Sensitivity,
    on_measured: &mut dyn FnMut(&Sensitivity, &TensorInfo) -> Result<(), MeasureError>,
) -> Result<(), MeasureError> {
    for measured in tensors {
        let tensor = measured.tensor;
        if state.tensor(&tensor.name).is_some() {
            continue;
        }
        let squares = squares_of(gradients, measured)?;
        let rows = squares.as_deref().or(measured.row_factors.as_deref());
        let weights = ColumnWeights { importance: measured.importance, rows };
        let found = weight_errors(gguf, tensor, weights, &measured.types, sampling)?;
        gguf.release(tensor);
        let told = found.iter().filter(|(ty, errors)| {
            squares.is_some() && measured.probe_types.contains(ty) && errors.weighted_error.is_finite()
        });
        let probes = told.map(|(ty, errors)| foretold(*ty, errors)).collect();
        let finite = found.into_iter().filter(|(_, errors)| errors.weighted_error.is_finite());
        let errors = finite.map(|(ty, errors)| (type_name(ty), six_digits(errors.relative()))).collect();
        let (name, shape) = (tensor.name.clone(), tensor.shape.clone());
        state.tensors.push(TensorSensitivity { name, shape, errors, probes });
        on_measured(state, tensor)?;
    }
    Ok(())
}

impl Measurement<'_, '_, '_> {
    fn n_layer(&self) -> usize {
        self.prober.last().next_layer()
    }

    /// The layer whose states a probe of `tensor` starts with: 0 for the embedding too, which is looked up again.
    pub(super) fn first_use(&self, tensor: &TensorInfo) -> usize {
        match (Role::of(&tensor.name), roles::block_number(&tensor.name)) {
            (_, Some(block)) => block.max(0) as usize,
            (Role::Output, None) => self.n_layer(),
            _ => 0,
        }
    }

    /// False for tensors of blocks behind the layers, which no pass runs.
    fn has_part(&self, tensor: &TensorInfo) -> bool {
        roles::block_number(&tensor.name).is_none() || self.first_use(tensor) < self.n_layer()
    }

    pub(super) fn cost_of_probe(&self, entering: usize) -> f64 {
        let layers = self.n_layer();
        (layers - entering.min(layers)) as f64 / layers.max(1) as f64 + COST_OF_LOGITS
    }

    /// Probes that `state` lacks: tensor and type.
    fn missing(&self, state: &Sensitivity) -> Vec<(&MeasuredTensor<'_>, TensorType)> {
        self.without_probe(state, |_| true)
    }

    /// Those that it lacks or has not measured.
    fn unmeasured(&self, state: &Sensitivity) -> Vec<(&MeasuredTensor<'_>, TensorType)> {
        self.without_probe(state, |probe| !probe.foretold)
    }

    fn without_probe(
        &self,
        state: &Sensitivity,
        counts: impl Fn(&Probe) -> bool,
    ) -> Vec<(&MeasuredTensor<'_>, TensorType)> {
        let run = self.tensors.iter().filter(|measured| self.has_part(measured.tensor));
        let all = run.flat_map(|measured| measured.probe_types.iter().map(move |&ty| (measured, ty)));
        let lacks = |measured: &MeasuredTensor<'_>, ty: TensorType| {
            let known = state.tensor(&measured.tensor.name);
            known.is_some_and(|known| known.probes.iter().all(|probe| !counts(probe) || probe.ty != type_name(ty)))
        };
        all.filter(|(measured, ty)| lacks(measured, *ty)).collect()
    }

    /// Forward passes over the probe text that [`Self::probe_all`] still has to do for `state`.
    pub fn cost_of_probes(&self, state: &Sensitivity) -> f64 {
        let probes: f64 =
            self.missing(state).iter().map(|(measured, _)| self.cost_of_probe(self.first_use(measured.tensor))).sum();
        if probes > 0.0 { probes + 1.0 } else { 0.0 }
    }

    /// The number of probes that it lacks.
    pub(super) fn count_missing(&self, state: &Sensitivity) -> usize {
        self.missing(state).len()
    }

    /// What [`Self::probe_some`] still has to do.
    pub(super) fn cost_of_some(&self, state: &Sensitivity, wanted: &[(String, String)]) -> f64 {
        self.wanted(state, wanted).iter().map(|(measured, _)| self.cost_of_probe(self.first_use(measured.tensor))).sum()
    }

    fn wanted(&self, state: &Sensitivity, wanted: &[(String, String)]) -> Vec<(&MeasuredTensor<'_>, TensorType)> {
        let is_wanted = |(measured, ty): &(&MeasuredTensor<'_>, TensorType)| {
            wanted.iter().any(|(name, known)| *name == measured.tensor.name && *known == type_name(*ty))
        };
        self.unmeasured(state).into_iter().filter(is_wanted).collect()
    }

    /// Rounds each tensor alone and measures the divergence, as far as `state` does not have it.
    ///
    /// # Errors
    /// When a tensor cannot be rounded, the forward pass fails, or `on_measured` ends the run.
    pub fn probe_all(&self, state: &mut Sensitivity, on_measured: &mut OnProbe<'_>) -> Result<(), MeasureError> {
        self.probe(self.missing(state), state, on_measured)
    }

    /// The same for some tensors and names of types, those included whose divergence was told.
    ///
    /// # Errors
    /// As [`Self::probe_all`].
    pub(super) fn probe_some(
        &self,
        state: &mut Sensitivity,
        wanted: &[(String, String)],
        on_measured: &mut OnProbe<'_>,
    ) -> Result<(), MeasureError> {
        let some = self.wanted(state, wanted);
        self.probe(some, state, on_measured)
    }

    fn probe(
        &self,
        probes: Vec<(&MeasuredTensor<'_>, TensorType)>,
        state: &mut Sensitivity,
        on_measured: &mut OnProbe<'_>,
    ) -> Result<(), MeasureError> {
        let mut by_layer: BTreeMap<usize, Vec<(&MeasuredTensor<'_>, TensorType)>> = BTreeMap::new();
        for (measured, ty) in probes {
            by_layer.entry(self.first_use(measured.tensor)).or_default().push((measured, ty));
        }
        let original = self.prober.pass(Overrides::new())?;
        let mut states = self.prober.embed(&original)?;
        for (layer, probes) in by_layer {
            self.advance(&original, &mut states, layer)?;
            for (measured, ty) in probes {
                let tensor = measured.tensor;
                let data = encode_tensor(self.gguf, tensor, measured.importance, ty)?;
                let mut overrides = Overrides::new();
                overrides.insert(tensor.name.clone(), ty, data);
                let result = self.score(overrides, tensor, &states)?;
                let probe = Probe::of(&type_name(ty), &result);
                if let Some(known) = state.tensors.iter_mut().find(|known| known.name == tensor.name) {
                    known.probes.push(probe);
                }
                on_measured(state, &tensor.name, self.cost_of_probe(layer))?;
            }
        }
        Ok(())
    }

    /// Runs the original up to `layer`.
    pub(super) fn advance(
        &self,
        pass: &Pass<'_, '_, '_>,
        states: &mut HiddenStates,
        layer: usize,
    ) -> Result<(), MeasureError> {
        while states.next_layer() < layer {
            pass.run_layer(states, &mut NoTaps)?;
        }
        Ok(())
    }

    /// Scores the model with `overrides`, of which `tensor` is the first that is used after `states`.
    fn score(
        &self,
        overrides: Overrides<'_>,
        tensor: &TensorInfo,
        states: &HiddenStates,
    ) -> Result<ProbeResult, MeasureError> {
        let pass = self.prober.pass(overrides)?;
        let start = match Role::of(&tensor.name) {
            Role::TokenEmbd => self.prober.embed(&pass)?,
            _ => states.clone(),
        };
        Ok(self.prober.score(&pass, start)?)
    }

    /// Forward passes that [`Self::joint`] takes.
    pub fn cost_of_joint(&self, with_drops: bool) -> f64 {
        let run = self.tensors.iter().filter(|measured| self.has_part(measured.tensor));
        let each = run.map(|measured| self.cost_of_probe(self.first_use(measured.tensor)));
        1.0 + COST_OF_LOGITS + if with_drops { 1.0 + each.sum::<f64>() } else { 0.0 }
    }

    /// Rounds all tensors at once to `types` and measures the divergence; with `drops` also how much it falls when one
    /// tensor gets its weights back. Tensors that are not in `types` keep their weights. `flip_cost` as in
    /// [`ProbeResult::robust_mean`](super::ProbeResult::robust_mean).
    ///
    /// # Errors
    /// Those of [`Self::probe_all`].
    pub fn joint(
        &self,
        types: &HashMap<String, TensorType>,
        with_drops: bool,
        flip_cost: Option<f64>,
        on_step: &dyn Fn(&str, f64),
    ) -> Result<JointProbe, MeasureError> {
        let run = self.tensors.iter().filter(|measured| self.has_part(measured.tensor));
        let chosen: Vec<(&MeasuredTensor<'_>, TensorType)> =
            run.filter_map(|measured| Some((measured, *types.get(&measured.tensor.name)?))).collect();
        let mut encoded = Vec::with_capacity(chosen.len());
        let mut totals = TensorTotals::default();
        for (measured, ty) in &chosen {
            let data = encode_tensor(self.gguf, measured.tensor, measured.importance, *ty)?;
            self.gguf.release(measured.tensor);
            totals.bytes += data.len() as u64;
            totals.parameters += measured.tensor.elements();
            encoded.push(data);
        }
        let all_but = |left_out: Option<&str>| {
            let mut overrides = Overrides::new();
            for ((measured, ty), data) in chosen.iter().zip(&encoded) {
                if left_out != Some(measured.tensor.name.as_str()) {
                    overrides.insert(measured.tensor.name.clone(), *ty, data.as_slice());
                }
            }
            overrides
        };
        let rounded_model = self.prober.pass(all_but(None))?;
        let whole = self.prober.score(&rounded_model, self.prober.embed(&rounded_model)?)?;
        on_step("all tensors", 1.0 + COST_OF_LOGITS);
        let mut drops = BTreeMap::new();
        if with_drops {
            let mut states = self.prober.embed(&rounded_model)?;
            let mut in_order = chosen.clone();
            in_order.sort_by_key(|(measured, _)| self.first_use(measured.tensor));
            for (measured, _) in in_order {
                let layer = self.first_use(measured.tensor);
                self.advance(&rounded_model, &mut states, layer)?;
                let name = measured.tensor.name.as_str();
                let restored = self.score(all_but(Some(name)), measured.tensor, &states)?;
                let drop = whole.robust_mean(flip_cost) - restored.robust_mean(flip_cost);
                drops.insert(name.to_owned(), six_digits(drop));
                on_step(name, self.cost_of_probe(layer));
            }
        }
        Ok(JointProbe {
            bits_per_weight: six_digits(totals.bits_per_weight()),
            kld: six_digits(whole.robust_mean(flip_cost).max(0.0)),
            kld_error: six_digits(whole.error()),
            types: chosen.iter().map(|(measured, ty)| (measured.tensor.name.clone(), type_name(*ty))).collect(),
            drops,
        })
    }
}
