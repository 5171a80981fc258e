//! The file that a measurement leaves: everything that plans for any budget need.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{CurvatureCheck, FeedbackErrors, MeasureError, TransferCheck};
use crate::atomic_file::AtomicFile;
use crate::gguf::TensorType;
use crate::text::utf8;

/// The version of the form that this program writes, and the only one it reads.
pub const SENSITIVITY_VERSION: u32 = 1;

/// Larger files are not read: a hundred times that of the largest model.
const MAX_BYTES: u64 = 256 << 20;

/// What a measurement depends on. A plan is only made from a measurement of the same model and imatrix.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provenance {
    /// Name of the model file.
    pub model: String,
    /// Fingerprint of the model.
    pub model_sha256: String,
    /// Name of the importance matrix.
    pub imatrix: Option<String>,
    /// Fingerprint of the importance matrix.
    pub imatrix_sha256: Option<String>,
    /// Name of the probe text.
    pub text: String,
    /// SHA-256 of the tokens that probes run.
    pub text_sha256: String,
    /// Tokens that every probe runs.
    pub tokens: u64,
    /// Predictions that are scored.
    pub scored: u64,
    /// Sequences of the text.
    pub sequences: u64,
    /// Shifts the sample of rows on which errors are measured.
    pub seed: u64,
    /// Digest of the gradients that divergences were told from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gradients_sha256: Option<String>,
}

/// A measured model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sensitivity {
    /// [`SENSITIVITY_VERSION`].
    pub lwq_sensitivity: u32,
    /// What it depends on.
    pub provenance: Provenance,
    /// The model with all tensors rounded.
    pub joint: Vec<JointProbe>,
    /// One entry for every tensor that a plan chooses a type for.
    pub tensors: Vec<TensorSensitivity>,
    /// What rounding with feedback leaves, once somebody asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub feedback: Option<FeedbackErrors>,
    /// How divergences that were told from gradients compare with measured ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub curvature: Option<CurvatureCheck>,
    /// The check that let another model's measurement stand for this one's, or not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transferred: Option<TransferCheck>,
}

/// What is known of one tensor.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorSensitivity {
    /// Its name.
    pub name: String,
    /// Its shape in ggml's order: row length first; empty in files of earlier versions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shape: Vec<u64>,
    /// Squared error of its outputs relative to their squared norm, by type: Σ w (W − Ŵ)² / Σ w W² with the mean squares
    /// w of its inputs.
    pub errors: BTreeMap<String, f64>,
    /// Divergences of the model with this tensor alone rounded.
    pub probes: Vec<Probe>,
}

/// A divergence that was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Probe {
    /// The type.
    #[serde(rename = "type")]
    pub ty: String,
    /// Mean KL divergence, nats a token.
    pub kld: f64,
    /// Its standard error, from the scatter of the sequences; in models with experts that of `steady_kld`.
    pub kld_error: f64,
    /// In models with experts, the part of `kld` that tokens have whose experts all stayed the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steady_kld: Option<f64>,
    /// In models with experts, layers that sent a token to other experts, a token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flips: Option<f64>,
    /// It was not measured but told from gradients.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub foretold: bool,
}

impl Probe {
    /// The divergence as plans take it: that of tokens with unchanged experts, and for each change `flip_cost`.
    pub(super) fn robust_kld(&self, flip_cost: Option<f64>) -> f64 {
        match (self.steady_kld, self.flips, flip_cost) {
            (Some(steady), Some(flips), Some(cost)) => steady + cost * flips,
            _ => self.kld,
        }
    }
}

/// The divergence of the model with all tensors rounded, and what each of them contributes to it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JointProbe {
    /// Bits per weight over these tensors.
    pub bits_per_weight: f64,
    /// Mean KL divergence, nats a token.
    pub kld: f64,
    /// Its standard error.
    pub kld_error: f64,
    /// Type by tensor.
    pub types: BTreeMap<String, String>,
    /// How much the divergence falls when one tensor gets its original weights back; empty when not measured.
    pub drops: BTreeMap<String, f64>,
}

/// The name of a type in these files.
pub fn type_name(ty: TensorType) -> String {
    ty.to_string().to_ascii_uppercase()
}

impl Sensitivity {
    /// The measurement with all errors in the norm of the feedback errors, so that damages of those can be predicted from
    /// it; itself where there are none.
    pub fn in_feedback_norm(&self) -> Sensitivity {
        let mut changed = self.clone();
        for tensor in &mut changed.tensors {
            if let Some(known) = self.feedback.as_ref().and_then(|feedback| feedback.tensors.get(&tensor.name)) {
                tensor.errors.extend(known.plain.iter().map(|(ty, error)| (ty.clone(), *error)));
            }
        }
        changed
    }

    /// What a layer costs that sends a token to other experts, nats: the median over all probes of what tokens with changed
    /// experts have in the divergence, by the number of changes, each probe counting as often as it has changes. `None` in
    /// models without experts.
    pub fn flip_cost(&self) -> Option<f64> {
        let probes = self.tensors.iter().flat_map(|tensor| &tensor.probes);
        let mut costs: Vec<(f64, f64)> = probes
            .filter_map(|probe| Some((probe.kld - probe.steady_kld?, probe.flips?)))
            .filter(|(_, flips)| *flips > 0.0)
            .map(|(excess, flips)| (excess.max(0.0) / flips, flips))
            .collect();
        costs.sort_by(|a, b| a.0.total_cmp(&b.0));
        let half = costs.iter().map(|(_, flips)| flips).sum::<f64>() / 2.0;
        let mut passed = 0.0;
        let middle = costs.iter().find(|(_, flips)| {
            passed += flips;
            passed >= half
        });
        middle.map(|(cost, _)| *cost)
    }

    /// The entry of a tensor.
    pub fn tensor(&self, name: &str) -> Option<&TensorSensitivity> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    /// Reads and checks a file.
    ///
    /// # Errors
    /// When it cannot be read, is no such file, or holds numbers that no measurement gives.
    pub fn open(path: &Path) -> Result<Sensitivity, MeasureError> {
        let bad = |reason: String| MeasureError::BadFile { path: path.to_owned(), reason };
        let failed =
            |source: std::io::Error| bad(format!("cannot be read: {source}; give a file that lwq measure wrote"));
        let file = File::open(path).map_err(failed)?;
        let mut text = Vec::new();
        file.take(MAX_BYTES + 1).read_to_end(&mut text).map_err(failed)?;
        if text.len() as u64 > MAX_BYTES {
            return Err(bad(format!("is larger than {MAX_BYTES} bytes, no file of lwq measure")));
        }
        let found: Sensitivity = serde_json::from_str(utf8(&text).map_err(|error| bad(error.to_string()))?)
            .map_err(|e| bad(format!("no file of lwq measure: {e}")))?;
        if found.lwq_sensitivity != SENSITIVITY_VERSION {
            let version = found.lwq_sensitivity;
            return Err(bad(format!("has version {version}, expected {SENSITIVITY_VERSION}; measure again")));
        }
        found.check().map_err(bad)?;
        Ok(found)
    }

    fn check(&self) -> Result<(), String> {
        let sound = |value: f64| value.is_finite() && value >= 0.0;
        let mut names = std::collections::HashSet::new();
        for tensor in &self.tensors {
            let name = crate::gguf::shown(tensor.name.as_bytes());
            if !names.insert(tensor.name.as_str()) {
                return Err(format!("tensor {name} stands in it twice; measure again"));
            }
            if let Some((ty, error)) = tensor.errors.iter().find(|(_, error)| !sound(**error)) {
                return Err(format!("tensor {name}: the error of {ty} is {error}; measure again"));
            }
            let optional = |value: Option<f64>| value.is_none_or(f64::is_finite);
            let is_sound = |p: &&Probe| {
                p.kld.is_finite() && sound(p.kld_error) && optional(p.steady_kld) && p.flips.is_none_or(sound)
            };
            if let Some(probe) = tensor.probes.iter().find(|probe| !is_sound(probe)) {
                return Err(format!("tensor {name}: the divergence of {} is {}; measure again", probe.ty, probe.kld));
            }
        }
        if let Some(problem) = self.feedback.as_ref().and_then(FeedbackErrors::problem) {
            return Err(problem);
        }
        match self.joint.iter().find(|j| !sound(j.kld) || !sound(j.bits_per_weight)) {
            Some(joint) => Err(format!("the divergence of the whole model is {}; measure again", joint.kld)),
            None => Ok(()),
        }
    }

    /// Writes the file, a tensor a line.
    ///
    /// # Errors
    /// When the disk reports an error or the file exists and `replace` is false.
    pub fn save(&self, path: &Path, replace: bool) -> Result<(), MeasureError> {
        let lines = |items: Vec<String>| match items.is_empty() {
            true => "[]".to_owned(),
            false => format!("[\n    {}\n  ]", items.join(",\n    ")),
        };
        let text = format!(
            "{{\n  \"lwq_sensitivity\": {},\n  \"provenance\": {},\n  \"joint\": {},\n  \"tensors\": {}{}{}{}\n}}\n",
            self.lwq_sensitivity,
            json(&self.provenance),
            lines(self.joint.iter().map(json).collect()),
            lines(self.tensors.iter().map(json).collect()),
            self.feedback
                .as_ref()
                .map_or_else(String::new, |found| format!(",\n  \"feedback\": {}", feedback_json(found))),
            self.curvature.as_ref().map_or_else(String::new, |check| format!(",\n  \"curvature\": {}", json(check))),
            self.transferred
                .as_ref()
                .map_or_else(String::new, |check| format!(",\n  \"transferred\": {}", json(check))),
        );
        let mut file = AtomicFile::create(path, replace)?;
        file.write_all(text.as_bytes()).map_err(|source| crate::atomic_file::OutputError::Io {
            path: path.to_owned(),
            action: "cannot write it",
            source,
        })?;
        Ok(file.commit()?)
    }
}

/// JSON of the section on feedback, a tensor a line.
fn feedback_json(found: &FeedbackErrors) -> String {
    let line = |(name, known): (&String, _)| format!("{}: {}", json(name), json(known));
    let tensors: Vec<String> = found.tensors.iter().map(line).collect();
    format!(
        "{{\n    \"provenance\": {},\n    \"steps\": {},\n    \"steps_done\": {},\n    \"tensors\": {{\n      {}\n    }}\n  }}",
        json(&found.provenance),
        found.steps,
        found.steps_done,
        tensors.join(",\n      ")
    )
}

/// Compact JSON of a value that always has one.
fn json(value: &(impl Serialize + ?Sized)) -> String {
    serde_json::to_string(value).unwrap_or_else(|_| "null".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::TensorFeedback;

    fn example() -> Sensitivity {
        let errors = [("Q3_K".to_owned(), 0.02), ("Q4_K".to_owned(), 0.005)].into();
        let probes = vec![Probe {
            ty: "Q3_K".into(),
            kld: 0.003,
            kld_error: 0.0001,
            steady_kld: None,
            flips: None,
            foretold: true,
        }];
        Sensitivity {
            lwq_sensitivity: SENSITIVITY_VERSION,
            tensors: ["a", "b"]
                .map(|n| TensorSensitivity {
                    name: n.into(),
                    shape: vec![256, 2],
                    errors: BTreeMap::clone(&errors),
                    probes: probes.clone(),
                })
                .into(),
            joint: vec![JointProbe { bits_per_weight: 3.4, kld: 0.1, ..JointProbe::default() }],
            curvature: Some(CurvatureCheck { probes: 7, ratio: 1.25, spread: 0.5 }),
            ..Sensitivity::default()
        }
    }

    #[test]
    fn a_file_comes_back_and_has_a_line_for_each_tensor() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.sens.json");
        example().save(&path, false).unwrap();
        assert_eq!(Sensitivity::open(&path).unwrap(), example());
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().filter(|line| line.contains("\"name\"")).count(), 2);
        assert!(example().save(&path, false).is_err());
        let known = TensorFeedback { plain: [("Q3_K".into(), 0.03)].into(), errors: [("Q3_K".into(), 0.01)].into() };
        let feedback =
            FeedbackErrors { steps: 3, steps_done: 1, tensors: [("a".into(), known)].into(), ..Default::default() };
        let with_feedback = Sensitivity { feedback: Some(feedback), ..example() };
        with_feedback.save(&path, true).unwrap();
        assert_eq!(Sensitivity::open(&path).unwrap(), with_feedback);
        let changed = with_feedback.in_feedback_norm();
        assert_eq!((changed.tensors[0].errors["Q3_K"], changed.tensors[0].errors["Q4_K"]), (0.03, 0.005));
        assert_eq!(changed.tensors[1], with_feedback.tensors[1]);
        Sensitivity::default().save(&path, true).unwrap();
        assert!(Sensitivity::open(&path).unwrap_err().to_string().contains("version 0"));
    }

    #[test]
    fn damaged_files_are_refused_in_one_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.sens.json");
        let refused = |text: &str| {
            std::fs::write(&path, text).unwrap();
            let line = Sensitivity::open(&path).unwrap_err().to_string();
            assert!(line.contains("m.sens.json") && !line.contains('\n'), "{line}");
            line
        };
        example().save(&path, true).unwrap();
        let good = std::fs::read_to_string(&path).unwrap();
        refused("");
        refused("[]");
        refused(&good[..good.len() / 2]);
        assert!(refused(&good.replace("\"name\":\"b\"", "\"name\":\"a\"")).contains("twice"));
        assert!(refused(&good.replace("0.02", "-1.0")).contains("Q3_K"));
        assert!(refused(&good.replace("0.003", "1e999")).contains("m.sens.json"));
    }
}
