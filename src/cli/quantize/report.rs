//! What a quantize run tells at its end.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use super::plan::{Plan, PlannedTensor};
use crate::cli::inspect::{TypeRow, rows_by_type, type_table};
use crate::cli::{Common, binary_size, count, decimal_size, printable};
use lwq::rounding::gptq::supports_search;
use lwq::os;
use lwq::quantize::write::Stages;
use lwq::rounding::{Kept, Method, Outcome, RoleRow, RoundingRecord, by_role, reasons};

/// The closing facts, as printed with `--json`.
#[derive(Serialize)]
pub(super) struct Report {
    input: String,
    output: Vec<String>,
    target: String,
    dry_run: bool,
    tensors: Vec<TensorRow>,
    types: Vec<TypeRow>,
    parameters: u64,
    /// All output files, headers and padding included.
    size_bytes: u64,
    /// Tensor data alone.
    tensor_bytes: u64,
    /// Tensor data per parameter.
    bits_per_weight: f64,
    /// Tensors whose rows do not fit the intended type.
    fallbacks: usize,
    /// What the types used instead cost.
    fallback_extra_bytes: u64,
    /// How weights were rounded; absent for ggml's rounding.
    #[serde(skip_serializing_if = "Option::is_none")]
    rounding: Option<RoundingReport>,
    warnings: Vec<String>,
    /// Why the real run would be refused; only in a dry run.
    problems: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peak_memory_bytes: Option<u64>,
    /// What the seconds went into.
    #[serde(skip_serializing_if = "Option::is_none")]
    times: Option<Times>,
}

/// What the time of a run went into, in seconds.
#[derive(Clone, Copy, Serialize)]
pub(super) struct Times {
    /// Worker threads; the stages are sums over them.
    pub threads: usize,
    #[serde(flatten)]
    pub stages: Stages,
    /// Waiting for the disk after the last piece.
    pub syncing: f64,
}

#[derive(Serialize)]
struct TensorRow {
    name: String,
    #[serde(rename = "type")]
    ty: String,
    source_type: String,
    shape: Vec<u64>,
    bytes: u64,
    reason: String,
    weighted: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    fallback_from: Option<String>,
    /// How it was rounded, where that is not ggml's way for all.
    #[serde(skip_serializing_if = "Option::is_none")]
    rounding: Option<TensorRounding>,
}

/// How one tensor was rounded.
#[derive(Serialize)]
struct TensorRounding {
    method: Method,
    /// Why feedback was not used.
    #[serde(skip_serializing_if = "Option::is_none")]
    kept: Option<Kept>,
    /// Of a stack of experts, how many were rounded with feedback.
    #[serde(skip_serializing_if = "Option::is_none")]
    with_feedback: Option<usize>,
    /// Error on the text of the gate, feedback over search.
    #[serde(skip_serializing_if = "Option::is_none")]
    held_out_ratio: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    damping: Option<f64>,
}

/// How the file was rounded.
#[derive(Serialize)]
struct RoundingReport {
    #[serde(flatten)]
    record: RoundingRecord,
    /// Rounded tensors by method; empty in a dry run.
    methods: BTreeMap<Method, usize>,
    /// Why tensors were not rounded with feedback.
    kept: BTreeMap<Kept, usize>,
    roles: Vec<RoleRow>,
}

impl Report {
    /// Sums a plan up; `run` is `None` for a dry run.
    /// `outcomes` are those of the tensors that were rounded with the model's inputs.
    pub fn new(plan: &Plan<'_>, outcomes: &[Outcome], run: Option<(Duration, Times)>) -> Report {
        let (elapsed, times) = run.unzip();
        let tensors = &plan.tensors;
        let outcomes = all_outcomes(plan, outcomes, elapsed.is_some());
        let of_tensor: HashMap<&str, &Outcome> = outcomes.iter().map(|o| (o.tensor.as_str(), o)).collect();
        let parameters = tensors.iter().map(|tensor| tensor.source.elements()).sum();
        let tensor_bytes = tensors.iter().map(|tensor| tensor.bytes).sum();
        Report {
            input: plan.gguf.label().to_string(),
            output: plan.files.iter().map(|file| file.path.display().to_string()).collect(),
            target: plan.target.clone(),
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
            size_bytes: plan.file_bytes(),
            tensor_bytes,
            bits_per_weight: 8.0 * tensor_bytes as f64 / parameters.max(1) as f64,
            fallbacks: plan.fallback_cost.tensors,
            fallback_extra_bytes: plan.fallback_cost.got_bytes.saturating_sub(plan.fallback_cost.wanted_bytes),
            rounding: RoundingReport::new(plan, &outcomes),
            warnings: plan.notes().to_vec(),
            problems: plan.problems.clone(),
            seconds: elapsed.map(|elapsed| elapsed.as_secs_f64()),
            peak_memory_bytes: elapsed.and_then(|_| os::peak_memory()),
            times,
        }
    }

    fn text(&self) -> String {
        let mut text = String::new();
        if self.dry_run {
            let width = self.tensors.iter().map(|row| row.name.chars().count()).max().unwrap_or(0);
            for row in &self.tensors {
                text.push_str(&format!(
                    "{:<width$}  {:>8} -> {:<8} {:>12}  {}\n",
                    printable(&row.name),
                    row.source_type,
                    row.ty,
                    decimal_size(row.bytes),
                    row.reason
                ));
            }
            text.push('\n');
        }
        text.push_str(&type_table(&self.types));
        let verb = if self.dry_run { "would be" } else { "is" };
        text.push_str(&format!(
            "\n{} {verb} {} ({}), {:.2} bits per weight\n",
            printable(&self.output.join(", ")),
            decimal_size(self.size_bytes),
            binary_size(self.size_bytes),
            self.bits_per_weight
        ));
        if let Some(rounding) = &self.rounding {
            text.push_str(&rounding.text());
        }
        for problem in &self.problems {
            text.push_str(&format!("not possible yet: {problem}\n"));
        }
        if let Some(seconds) = self.seconds {
            text.push_str(&format!("{seconds:.1} s"));
            if let Some(peak) = self.peak_memory_bytes {
                text.push_str(&format!(", peak memory {}", decimal_size(peak)));
            }
            text.push('\n');
        }
        text
    }
}

/// Prints reports on stdout, as JSON or as tables. One is an object by itself, several stand under `outputs`.
///
/// # Errors
/// When stdout cannot be written.
pub(super) fn print(reports: &[Report], common: &Common) -> Result<()> {
    match reports {
        [report] if common.json => common.result_json(report),
        several if common.json => common.result_json(&Several { outputs: several }),
        _ if common.quiet && !reports.iter().any(|report| report.dry_run) => Ok(()),
        _ => common.result(reports.iter().map(Report::text).collect::<Vec<_>>().join("\n")),
    }
}

/// What `--json` prints for several outputs.
#[derive(Serialize)]
struct Several<'a> {
    outputs: &'a [Report],
}

/// Outcomes of all tensors that are rounded otherwise than ggml does, with those whose input the model does not show.
fn all_outcomes(plan: &Plan<'_>, known: &[Outcome], done: bool) -> Vec<Outcome> {
    let method = plan.rounding.method;
    if method == Method::Ggml || !done {
        return Vec::new();
    }
    let mut known: HashMap<&str, &Outcome> = known.iter().map(|outcome| (outcome.tensor.as_str(), outcome)).collect();
    let outcome = |tensor: &PlannedTensor<'_>| match known.remove(tensor.source.name.as_str()) {
        Some(outcome) => outcome.clone(),
        None => Outcome {
            tensor: tensor.source.name.clone(),
            method: if supports_search(tensor.choice.ty) { Method::Search } else { Method::Ggml },
            kept: (method == Method::Feedback).then_some(Kept::NoInput),
            matrices: tensor.source.matrices() as usize,
            with_feedback: 0,
            held_out_ratio: None,
            damping: None,
            tokens: 0,
        },
    };
    plan.tensors.iter().filter(|tensor| tensor.is_rounded()).map(outcome).collect()
}

impl TensorRounding {
    fn new(outcome: &Outcome) -> TensorRounding {
        TensorRounding {
            method: outcome.method,
            kept: outcome.kept,
            with_feedback: (outcome.matrices > 1).then_some(outcome.with_feedback),
            held_out_ratio: outcome.held_out_ratio,
            damping: outcome.damping,
        }
    }
}

impl RoundingReport {
    fn new(plan: &Plan<'_>, outcomes: &[Outcome]) -> Option<RoundingReport> {
        let record = plan.rounding.record.as_ref().filter(|record| record.method != Method::Ggml)?.clone();
        let mut methods = BTreeMap::new();
        outcomes.iter().for_each(|outcome| *methods.entry(outcome.method).or_insert(0) += 1);
        let judged = record.method == Method::Feedback;
        Some(RoundingReport {
            record,
            methods,
            kept: reasons(outcomes),
            roles: if judged { by_role(outcomes) } else { Vec::new() },
        })
    }

    fn text(&self) -> String {
        let mut text = String::new();
        if !self.roles.is_empty() {
            text.push_str(&format!(
                "\n{:<16} {:>8} {:>13} {:>24}\n",
                "role", "tensors", "with feedback", "held-out error, ratio"
            ));
            for row in &self.roles {
                let ratio = row.held_out_ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.3}"));
                text.push_str(&format!("{:<16} {:>8} {:>13} {:>24}\n", row.role, row.tensors, row.feedback, ratio));
            }
        }
        let words = |list: Vec<String>| list.join(", ");
        let methods = words(self.methods.iter().map(|(method, n)| format!("{} {method}", count(*n as u64))).collect());
        let kept = words(self.kept.iter().map(|(kept, n)| format!("{} {kept}", count(*n as u64))).collect());
        match (methods.is_empty(), kept.is_empty()) {
            (true, _) => text.push_str(&format!("rounding: {}\n", self.record.method)),
            (false, true) => text.push_str(&format!("rounded: {methods}\n")),
            (false, false) => text.push_str(&format!("rounded: {methods} (kept for: {kept})\n")),
        }
        text
    }
}
