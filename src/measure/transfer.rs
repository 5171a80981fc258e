//! The measurement of a model for one that was made from it, such as a fine-tune: a check of some probes decides.
//!
//! What rounding a tensor does changes little where training changes the weights little. Some probes of the other model are
//! run again on this one. Their ratios to the others say how much larger divergences are here as a whole, and how much they
//! differ from tensor to tensor; only the latter changes what a plan chooses.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::file::Probe;
use super::inventory::{Inventory, with_planning};
use super::request::{Job, Request};
use super::{MeasureError, SENSITIVITY_VERSION, Sensitivity, TensorSensitivity};
use crate::atomic_file::{Replace, check_target};
use crate::display::{printable, six_digits};
use crate::progress::{Unit, Watch};
use crate::recipe::candidates::Rules;
use crate::rounding::RoundingMethod;

/// Probes that are run again.
pub const CHECKED_PROBES: usize = 8;

/// A probe agrees when its ratio is within this factor of the median ratio.
const FACTOR: f64 = 1.5;

/// Probes that may disagree.
const OUTLIERS: usize = 1;

/// The median ratio itself lies within this factor of one.
const OVERALL: f64 = 2.0;

/// What the check has found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransferCheck {
    /// The model that was measured.
    pub model: String,
    /// Its fingerprint.
    pub model_sha256: String,
    /// Probes that were run again.
    pub probes: usize,
    /// Median of their divergences here over those there.
    pub ratio: f64,
    /// How far from the median a ratio may be.
    pub factor: f64,
    /// Probes that are not further.
    pub within: usize,
    /// True if the measurement serves; else this model was measured itself.
    pub holds: bool,
}

impl Request<'_> {
    /// Takes the measurement `from` of another model over if a check of [`CHECKED_PROBES`] probes allows: all but one of them
    /// within a factor of 1.5 of the median ratio, which is itself between a half and two. Else this model is measured.
    /// `name` is the file's, for messages. Writes `output` as [`Request::run`] does.
    ///
    /// # Errors
    /// Those of [`Request::run`], and when the measurement is of other tensors or another text.
    pub fn run_with(
        mut self,
        from: &Sensitivity,
        name: &str,
        output: &Path,
        replace: Replace,
        watch: &dyn Watch,
    ) -> Result<(Sensitivity, TransferCheck), MeasureError> {
        check_target(output, replace.is_allowed())?;
        self.probes.tokens.get_or_insert(from.provenance.tokens as usize);
        let (imatrix, source) = self.imatrix.map(with_planning).unzip();
        let mut notes = Vec::new();
        let inventory =
            Inventory::new(self.model, &Rules::default(), imatrix.as_ref(), RoundingMethod::Ggml, &mut notes)?;
        let tensors = inventory.measured();
        let job = Job { gguf: self.model, imatrix: source, tensors: &tensors, probes: &self.probes, path: output };
        let (mut state, check) = job.check_transfer(from, name, watch)?;
        if !check.holds {
            watch.warn(&format!(
                "{name}: does not hold for this model, which is measured itself: {} of {} probes are within a factor of {} of \
                 the median ratio {:.3}",
                check.within, check.probes, check.factor, check.ratio
            ));
            state = job.measure(watch)?;
        }
        notes.iter().for_each(|line| watch.warn(line));
        state.transferred = Some(check.clone());
        state.save(output, true)?;
        Ok((state, check))
    }
}

impl Job<'_> {
    /// The measurement as this model's own, and what the check has found.
    fn check_transfer(
        &self,
        from: &Sensitivity,
        name: &str,
        watch: &dyn Watch,
    ) -> Result<(Sensitivity, TransferCheck), MeasureError> {
        let refused = |reason: String| MeasureError::BadFile {
            path: name.into(),
            reason: format!("{reason}; leave --measured-on out"),
        };
        let mut known: Vec<TensorSensitivity> = Vec::with_capacity(self.tensors.len());
        for measured in self.tensors {
            let tensor = measured.tensor;
            let found = from.tensor(&tensor.name).filter(|found| found.shape.is_empty() || found.shape == tensor.shape);
            let found = found
                .ok_or_else(|| refused(format!("tensor {} is not in it, or of another shape", tensor.shown_name())))?;
            known.push(TensorSensitivity { shape: tensor.shape.clone(), ..found.clone() });
        }
        let flip_cost = from.flip_cost();
        let chosen = choose(&known, flip_cost);
        if chosen.is_empty() {
            return Err(refused("holds no probes".to_owned()));
        }
        self.with_model(watch, |ready, provenance, _| {
            if provenance.text_sha256 != from.provenance.text_sha256 {
                let text = printable(&from.provenance.text);
                return Err(refused(format!(
                    "was measured on another text ({text}), or with another vocabulary; give that text with --probe-file"
                )));
            }
            let mut state = Sensitivity {
                lwq_sensitivity: SENSITIVITY_VERSION,
                provenance,
                joint: from.joint.clone(),
                tensors: known.clone(),
                feedback: from.feedback.clone(),
                curvature: from.curvature.clone(),
                transferred: None,
            };
            for (tensor, ty) in &chosen {
                state.tensors[*tensor].probes.retain(|probe| probe.ty != *ty);
            }
            let (m, watch) = (&ready.measurement, ready.watch);
            // Types that the other measurement did not probe are not missing here.
            let wanted: Vec<_> = chosen.iter().map(|(tensor, ty)| (known[*tensor].name.clone(), ty.clone())).collect();
            watch.begin("probing", ready.tokens(chosen.len() as f64), Unit::Tokens);
            m.probe_some(&mut state, &wanted, &mut |_, tensor, _| {
                watch.advance(ready.tokens(1.0), tensor);
                Ok(())
            })?;
            watch.end();
            let kld = |tensors: &[TensorSensitivity], at: usize, ty: &str| {
                let probe = tensors[at].probes.iter().find(|probe| probe.ty == ty);
                probe.map_or(0.0, |probe| probe.robust_kld(flip_cost))
            };
            let ratios: Vec<f64> = chosen
                .iter()
                .map(|(at, ty)| kld(&state.tensors, *at, ty).max(0.0) / kld(&known, *at, ty))
                .collect();
            let check = judge(&ratios, &from.provenance.model, &from.provenance.model_sha256);
            state.tensors = known.iter().map(|tensor| scaled(tensor, check.ratio)).collect();
            for joint in &mut state.joint {
                joint.kld = six_digits(joint.kld * check.ratio);
                joint.kld_error = six_digits(joint.kld_error * check.ratio);
                joint.drops.values_mut().for_each(|drop| *drop = six_digits(*drop * check.ratio));
            }
            Ok((state, check))
        })
    }
}

/// Probes at equal distances among the larger three quarters: the smallest are mostly noise.
fn choose(tensors: &[TensorSensitivity], flip_cost: Option<f64>) -> Vec<(usize, String)> {
    let of_tensor = |(at, tensor): (usize, &TensorSensitivity)| {
        let probe = |probe: &Probe| (probe.robust_kld(flip_cost), at, probe.ty.clone());
        tensor.probes.iter().map(probe).collect::<Vec<_>>()
    };
    let mut all: Vec<(f64, usize, String)> = tensors.iter().enumerate().flat_map(of_tensor).collect();
    all.retain(|(kld, ..)| *kld > 0.0);
    all.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
    all.truncate((all.len() * 3).div_ceil(4));
    let count = CHECKED_PROBES.min(all.len());
    (0..count).map(|nth| &all[nth * all.len() / count]).map(|(_, at, ty)| (*at, ty.clone())).collect()
}

fn judge(ratios: &[f64], model: &str, sha256: &str) -> TransferCheck {
    let mut sorted = ratios.to_vec();
    sorted.sort_by(f64::total_cmp);
    let ratio = (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0;
    let agrees = |found: &&f64| **found >= ratio / FACTOR && **found <= ratio * FACTOR;
    let within = ratios.iter().filter(agrees).count();
    let overall = ratio.is_finite() && (1.0 / OVERALL..=OVERALL).contains(&ratio);
    TransferCheck {
        model: model.to_owned(),
        model_sha256: sha256.to_owned(),
        probes: ratios.len(),
        ratio: six_digits(ratio),
        factor: FACTOR,
        within,
        holds: overall && within + OUTLIERS >= ratios.len(),
    }
}

fn scaled(tensor: &TensorSensitivity, ratio: f64) -> TensorSensitivity {
    let mut tensor = tensor.clone();
    for probe in &mut tensor.probes {
        probe.kld = six_digits(probe.kld * ratio);
        probe.kld_error = six_digits(probe.kld_error * ratio);
        probe.steady_kld = probe.steady_kld.map(|kld| six_digits(kld * ratio));
    }
    tensor
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_probe_may_disagree_and_all_may_be_larger() {
        let judged = |ratios: &[f64]| judge(ratios, "m", "s");
        let good = judged(&[1.2, 1.3, 1.25, 1.1, 1.4, 1.2, 1.3, 9.0]);
        assert!(good.holds && good.within == 7 && (good.ratio - 1.275).abs() < 1e-9, "{good:?}");
        assert!(!judged(&[1.2, 1.3, 1.25, 1.1, 1.4, 1.2, 0.1, 9.0]).holds);
        assert!(!judged(&[3.0; 8]).holds && !judged(&[0.0; 8]).holds && !judged(&[f64::NAN; 8]).holds);
    }

    #[test]
    fn probes_are_chosen_over_the_whole_range() {
        let probe =
            |kld: f64| Probe { ty: "Q3_K".into(), kld, kld_error: 0.0, steady_kld: None, flips: None, foretold: false };
        let tensors: Vec<TensorSensitivity> = (0..40)
            .map(|at| TensorSensitivity { probes: vec![probe(f64::from(at) * 0.01)], ..TensorSensitivity::default() })
            .collect();
        let chosen: Vec<usize> = choose(&tensors, None).into_iter().map(|(at, _)| at).collect();
        assert_eq!((chosen.len(), chosen[0]), (CHECKED_PROBES, 39));
        assert!(chosen.windows(2).all(|pair| pair[0] > pair[1]) && chosen[7] >= 10, "{chosen:?}");
    }
}
