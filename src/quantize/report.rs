//! What a quantize run tells at its end.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use super::Draft;
use super::decide::DraftTensor;
use super::feedback::{Kept, Outcome, RoleRow, by_role, reasons};
use super::whole_gate::WholeVerdict;
use super::write::Stages;
use crate::gguf::{TensorTotals, TypeRow, rows_by_type};
use crate::os;
use crate::rounding::gptq::supports_search;
use crate::rounding::{RoundingMethod, RoundingRecord};

/// The facts of one output: what `lwq quantize --json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The source.
    pub input: String,
    /// The files of the output.
    pub output: Vec<String>,
    /// The target's name, or what the output was planned for.
    pub target: String,
    /// True if nothing was written.
    pub dry_run: bool,
    /// All tensors in the order of the output.
    pub tensors: Vec<TensorRow>,
    /// Sums by type.
    pub types: Vec<TypeRow>,
    /// Weights.
    pub parameters: u64,
    /// Bytes of all output files, headers and padding included.
    pub size_bytes: u64,
    /// Bytes of tensor data alone.
    pub tensor_bytes: u64,
    /// Bits of tensor data per parameter.
    pub bits_per_weight: f64,
    /// Tensors whose rows do not fit the intended type.
    pub fallbacks: usize,
    /// Bytes that the types used instead cost.
    pub fallback_extra_bytes: u64,
    /// How weights were rounded; absent for ggml's rounding.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rounding: Option<RoundingReport>,
    /// Lines that the user should see.
    pub warnings: Vec<String>,
    /// Why the real run would be refused; only in a dry run.
    pub problems: Vec<String>,
    /// Seconds since the run began, for a run of several outputs those before this one included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// Peak resident memory of the process, mapped files included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_memory_bytes: Option<u64>,
    /// What the seconds went into.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub times: Option<Times>,
}

/// What the time of a run went into, in seconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Times {
    /// Worker threads; the stages are sums over them.
    pub threads: usize,
    /// The stages.
    #[serde(flatten)]
    pub stages: Stages,
    /// Waiting for the disk after the last piece.
    pub syncing: f64,
}

/// One output tensor.
#[derive(Clone, Debug, Serialize)]
pub struct TensorRow {
    /// Its name in the output.
    pub name: String,
    /// Its type there, as ggml names it.
    #[serde(rename = "type")]
    pub ty: String,
    /// Its type in the source.
    pub source_type: String,
    /// Its shape in ggml's order: row length first.
    pub shape: Vec<u64>,
    /// Bytes of its data without padding.
    pub bytes: u64,
    /// Why it gets this type.
    pub reason: String,
    /// True if importance data weigh its rounding.
    pub weighted: bool,
    /// The type that its rows do not fit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fallback_from: Option<String>,
    /// How it was rounded, where that is not ggml's way for all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rounding: Option<TensorRounding>,
}

/// How one tensor was rounded.
#[derive(Clone, Debug, Serialize)]
pub struct TensorRounding {
    /// The method.
    pub method: RoundingMethod,
    /// Why feedback was not used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kept: Option<Kept>,
    /// Of a stack of experts, how many were rounded with feedback.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub with_feedback: Option<usize>,
    /// Error on the text of the gate, feedback over search.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held_out_ratio: Option<f64>,
    /// Share of the correlations between inputs that was not relied on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub damping: Option<f64>,
    /// True if feedback went from row to row, too; `held_out_ratio` is then of errors as the loss's gradients weigh them.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub two_sided: bool,
}

/// How the file was rounded.
#[derive(Clone, Debug, Serialize)]
pub struct RoundingReport {
    /// What the file records of it.
    #[serde(flatten)]
    pub record: RoundingRecord,
    /// Rounded tensors by method; empty in a dry run.
    pub methods: BTreeMap<RoundingMethod, usize>,
    /// Why tensors were not rounded with feedback.
    pub kept: BTreeMap<Kept, usize>,
    /// What the gate of the whole file found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub whole: Option<WholeVerdict>,
    /// Methods by role.
    pub roles: Vec<RoleRow>,
}

impl Report {
    /// Sums a draft up; `outcomes` are those of the tensors that were rounded with the model's inputs, `run` is `None` for a
    /// dry run.
    pub(super) fn new(
        draft: &Draft<'_>,
        output: &Path,
        outcomes: Vec<Outcome>,
        verdict: Option<WholeVerdict>,
        run: Option<(Duration, Times)>,
    ) -> Report {
        let (elapsed, times) = run.unzip();
        let tensors = &draft.tensors;
        let outcomes = all_outcomes(draft, &outcomes, elapsed.is_some());
        let of_tensor: HashMap<&str, &Outcome> = outcomes.iter().map(|o| (o.tensor.as_str(), o)).collect();
        let parameters = tensors.iter().map(|tensor| tensor.source.elements()).sum();
        let tensor_bytes = tensors.iter().map(|tensor| tensor.bytes).sum();
        let cost = &draft.fallback_cost;
        Report {
            input: draft.gguf.label().to_string(),
            output: draft.paths(output).iter().map(|path| path.display().to_string()).collect(),
            target: draft.target.clone(),
            dry_run: elapsed.is_none(),
            types: rows_by_type(tensors.iter().map(|t| (t.choice.ty, t.source.elements(), t.bytes))),
            tensors: tensors
                .iter()
                .map(|tensor| TensorRow {
                    name: tensor.name.clone(),
                    ty: tensor.choice.ty.to_string(),
                    source_type: tensor.source.ty.to_string(),
                    shape: tensor.source.shape.clone(),
                    bytes: tensor.bytes,
                    reason: tensor.choice.reason.to_string(),
                    weighted: tensor.is_weighted(),
                    fallback_from: tensor.choice.fallback_from.map(|ty| ty.to_string()),
                    rounding: of_tensor.get(tensor.source.name.as_str()).map(|outcome| TensorRounding::new(outcome)),
                })
                .collect(),
            parameters,
            size_bytes: draft.file_bytes(),
            tensor_bytes,
            bits_per_weight: TensorTotals { parameters, bytes: tensor_bytes }.bits_per_weight(),
            fallbacks: cost.tensors,
            fallback_extra_bytes: cost.got_bytes.saturating_sub(cost.wanted_bytes),
            rounding: RoundingReport::new(draft, &outcomes, verdict),
            warnings: draft.notes().to_vec(),
            problems: draft.problems().to_vec(),
            seconds: elapsed.map(|elapsed| elapsed.as_secs_f64()),
            peak_memory_bytes: elapsed.and_then(|_| os::peak_memory()),
            times,
        }
    }
}

/// Outcomes of all tensors that are rounded otherwise than ggml does, with those whose input the model does not show.
fn all_outcomes(draft: &Draft<'_>, known: &[Outcome], done: bool) -> Vec<Outcome> {
    let method = draft.method;
    if method == RoundingMethod::Ggml || !done {
        return Vec::new();
    }
    let mut known: HashMap<&str, &Outcome> = known.iter().map(|outcome| (outcome.tensor.as_str(), outcome)).collect();
    let outcome = |tensor: &DraftTensor<'_>| match known.remove(tensor.source.name.as_str()) {
        Some(outcome) => outcome.clone(),
        None => Outcome {
            tensor: tensor.source.name.clone(),
            method: if supports_search(tensor.choice.ty) { RoundingMethod::Search } else { RoundingMethod::Ggml },
            kept: (method == RoundingMethod::Feedback).then_some(Kept::NoInput),
            matrices: tensor.source.matrices() as usize,
            with_feedback: 0,
            held_out_ratio: None,
            damping: None,
            two_sided: false,
            tokens: 0,
        },
    };
    draft.tensors.iter().filter(|tensor| tensor.is_rounded()).map(outcome).collect()
}

impl TensorRounding {
    fn new(outcome: &Outcome) -> TensorRounding {
        TensorRounding {
            method: outcome.method,
            kept: outcome.kept,
            with_feedback: (outcome.matrices > 1).then_some(outcome.with_feedback),
            held_out_ratio: outcome.held_out_ratio,
            damping: outcome.damping,
            two_sided: outcome.two_sided,
        }
    }
}

impl RoundingReport {
    fn new(draft: &Draft<'_>, outcomes: &[Outcome], whole: Option<WholeVerdict>) -> Option<RoundingReport> {
        let record = draft.record.as_ref().filter(|record| record.method != RoundingMethod::Ggml)?.clone();
        let mut methods = BTreeMap::new();
        outcomes.iter().for_each(|outcome| *methods.entry(outcome.method).or_insert(0) += 1);
        let judged = record.method == RoundingMethod::Feedback;
        Some(RoundingReport {
            record,
            methods,
            kept: reasons(outcomes),
            whole,
            roles: if judged { by_role(outcomes) } else { Vec::new() },
        })
    }
}
