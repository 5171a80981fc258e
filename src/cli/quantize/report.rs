//! What a quantize run tells at its end.

use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use super::plan::Plan;
use crate::cli::inspect::{TypeRow, rows_by_type, type_table};
use crate::cli::{Common, binary_size, decimal_size, printable};
use crate::os;

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
    warnings: Vec<String>,
    /// Why the real run would be refused; only in a dry run.
    problems: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peak_memory_bytes: Option<u64>,
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
}

impl Report {
    /// Sums a plan up; `elapsed` is `None` for a dry run.
    pub fn new(plan: &Plan<'_>, elapsed: Option<Duration>) -> Report {
        let tensors = &plan.tensors;
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
                })
                .collect(),
            parameters,
            size_bytes: plan.file_bytes(),
            tensor_bytes,
            bits_per_weight: 8.0 * tensor_bytes as f64 / parameters.max(1) as f64,
            fallbacks: plan.fallback_cost.tensors,
            fallback_extra_bytes: plan.fallback_cost.got_bytes.saturating_sub(plan.fallback_cost.wanted_bytes),
            warnings: plan.notes().to_vec(),
            problems: plan.problems.clone(),
            seconds: elapsed.map(|elapsed| elapsed.as_secs_f64()),
            peak_memory_bytes: elapsed.and_then(|_| os::peak_memory()),
        }
    }

    /// Prints the report on stdout, as JSON or as a table.
    ///
    /// # Errors
    /// When stdout cannot be written.
    pub fn print(&self, common: &Common) -> Result<()> {
        if common.json {
            return common.result_json(self);
        }
        if common.quiet && !self.dry_run {
            return Ok(());
        }
        common.result(self.text())
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
