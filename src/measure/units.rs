//! Probes of several tensors at once, rounded by whoever asks: for formats other than GGUF's, whose loaders want some tensors
//! alike.

use super::request::{Job, Ready, minutes};
use super::{MeasureError, Probe, SENSITIVITY_VERSION, Sensitivity, TensorSensitivity};
use crate::display::{count, six_digits};
use crate::gguf::{TensorInfo, TensorType};
use crate::model::Overrides;
use crate::progress::{Stop, Unit as Counted, Watch};

/// Tensors that get the same bits.
#[derive(Debug, Clone)]
pub(crate) struct Unit {
    /// What the caller knows it by.
    pub(crate) name: String,
    /// Names of tensors of the model.
    pub(crate) tensors: Vec<String>,
}

/// A unit, rounded.
#[derive(Debug, Clone, Default)]
pub(crate) struct RoundedUnit {
    /// What its tensors become: name, type, data.
    pub(crate) replacements: Vec<(String, TensorType, Vec<u8>)>,
    /// Squared error of the weights relative to their squared norm, by the name of the rounding. The first is that of the
    /// replacements.
    pub(crate) errors: Vec<(&'static str, f64)>,
}

/// Rounds unit number so and so, unless it is to stop.
pub(crate) type RoundUnit<'r> = dyn Fn(usize, &Stop) -> Result<RoundedUnit, MeasureError> + 'r;

impl Job<'_> {
    /// Measures the divergence that each of `units` causes when `round` has rounded it. The file of the job is written after
    /// each of them, and a run goes on with what is in it. The result has an entry for each unit, under its name.
    ///
    /// # Errors
    /// When the model cannot be run, a unit cannot be rounded, the file is of other units or texts, or the run is interrupted.
    pub(crate) fn measure_units(
        &self,
        units: &[Unit],
        round: &RoundUnit<'_>,
        watch: &dyn Watch,
    ) -> Result<Sensitivity, MeasureError> {
        let known = self.path.exists().then(|| Sensitivity::open(self.path)).transpose()?;
        let is_measured = |state: &Sensitivity, unit: &Unit| state.tensor(&unit.name).is_some();
        if let Some(state) = &known
            && state.provenance.model_sha256 == crate::gguf::fingerprint(self.gguf)
            && units.iter().all(|unit| is_measured(state, unit))
        {
            return Ok(state.clone());
        }
        self.with_model(watch, |ready, provenance, seconds_per_pass| {
            let mut state = match known {
                Some(state) if state.provenance == provenance => state,
                Some(_) => {
                    let reason = "was measured on another model or text; delete it".to_owned();
                    return Err(MeasureError::BadFile { path: self.path.to_owned(), reason });
                }
                None => Sensitivity { lwq_sensitivity: SENSITIVITY_VERSION, provenance, ..Sensitivity::default() },
            };
            let left: Vec<usize> = (0..units.len()).filter(|at| !is_measured(&state, &units[*at])).collect();
            ready
                .probe_units(units, left, round, &mut state, seconds_per_pass, &|state| state.save(self.path, true))?;
            Ok(state)
        })
    }
}

impl Ready<'_, '_, '_> {
    /// The layer whose states a probe of `unit` starts with.
    fn first_use(&self, unit: &Unit) -> usize {
        let m = &self.measurement;
        let tensors: Vec<&TensorInfo> = unit.tensors.iter().filter_map(|name| m.gguf.tensor(name)).collect();
        tensors.into_iter().map(|tensor| m.first_use(tensor)).min().unwrap_or(0)
    }

    fn probe_units(
        &self,
        units: &[Unit],
        mut left: Vec<usize>,
        round: &RoundUnit<'_>,
        state: &mut Sensitivity,
        seconds_per_pass: f64,
        save: &dyn Fn(&Sensitivity) -> Result<(), MeasureError>,
    ) -> Result<(), MeasureError> {
        let (m, watch) = (&self.measurement, self.watch);
        left.sort_by_key(|&at| self.first_use(&units[at]));
        let cost: f64 = left.iter().map(|&at| m.cost_of_probe(self.first_use(&units[at]))).sum::<f64>() + 1.0;
        watch.note(&format!(
            "{} parts to probe on {} tokens each, about {} and the rounding",
            count(left.len() as u64),
            count(m.prober.text().tokens().len() as u64),
            minutes(cost * seconds_per_pass)
        ));
        watch.begin("probing", self.tokens(cost), Counted::Tokens);
        let original = m.prober.pass(Overrides::new())?;
        let mut states = m.prober.embed(&original)?;
        for at in left {
            let unit = &units[at];
            let layer = self.first_use(unit);
            m.advance(&original, &mut states, layer)?;
            self.stop.check()?;
            let rounded = round(at, self.stop)?;
            let mut overrides = Overrides::new();
            for (tensor, ty, data) in rounded.replacements {
                overrides.insert(tensor, ty, data);
            }
            let pass = m.prober.pass(overrides)?;
            let result = m.prober.score(&pass, states.clone())?;
            let errors = rounded.errors.iter().map(|(name, error)| ((*name).to_owned(), six_digits(*error)));
            let ty = rounded.errors.first().map_or("", |(name, _)| *name);
            state.tensors.push(TensorSensitivity {
                name: unit.name.clone(),
                shape: Vec::new(),
                errors: errors.collect(),
                probes: vec![Probe::of(ty, &result)],
            });
            watch.advance(self.tokens(m.cost_of_probe(layer)), &unit.name);
            save(state)?;
        }
        watch.end();
        Ok(())
    }
}
