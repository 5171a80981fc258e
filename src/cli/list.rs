//! `lwq list`: the tables that decide what can be done.

use std::fmt::Write as _;

use anyhow::Result;
use clap::{Args, ValueEnum};
use serde::Serialize;

use super::Common;
use lwq::capabilities::{ArchitectureCapabilities, TypeCapabilities};
use lwq::recipe::TARGETS;

/// List architectures, tensor types or targets, with what can be done with each
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  lwq list architectures --json")]
pub struct ListArgs {
    /// What to list
    #[arg(value_enum)]
    what: What,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum What {
    /// Architectures whose models can be run, and what that makes possible
    Architectures,
    /// Tensor types: sizes, and which way they can be made and read
    Types,
    /// Targets of lwq quantize
    Targets,
}

/// A row of `lwq list targets --json`.
#[derive(Serialize)]
struct TargetRow {
    name: &'static str,
    aliases: &'static [&'static str],
    /// `general.file_type` of the file; null where the source's is kept.
    file_type: Option<u32>,
    base_type: String,
    base_bits_per_weight: Option<f64>,
    description: &'static str,
}

impl ListArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// When stdout cannot be written.
    pub fn run(&self, common: &Common) -> Result<()> {
        match self.what {
            What::Architectures => architectures(common),
            What::Types => types(common),
            What::Targets => targets(common),
        }
    }
}

fn mark(can: bool) -> &'static str {
    if can { "yes" } else { "-" }
}

fn architectures(common: &Common) -> Result<()> {
    let rows: Vec<ArchitectureCapabilities> = ArchitectureCapabilities::all().collect();
    if common.json {
        return common.result_json(&rows);
    }
    let mut text = format!(
        "{:<10} {:<8} {:<8} {:<7} {:<5} {:<5} {:<8} models\n",
        "name", "quantize", "convert", "imatrix", "eval", "plan", "feedback"
    );
    for row in &rows {
        let _ = writeln!(
            text,
            "{:<10} {:<8} {:<8} {:<7} {:<5} {:<5} {:<8} {}",
            row.name,
            mark(row.quantize),
            mark(!row.converts.is_empty()),
            mark(row.imatrix),
            mark(row.eval),
            mark(row.plan),
            mark(row.feedback),
            row.covers
        );
    }
    text.push_str("any other  yes      -        -       -     error -        planned with --method error\n");
    common.result(text)
}

fn types(common: &Common) -> Result<()> {
    let rows: Vec<TypeCapabilities> = TypeCapabilities::all().collect();
    if common.json {
        return common.result_json(&rows);
    }
    let mut text = format!(
        "{:<8} {:>3} {:>6} {:>6} {:>7}  {:<5} {:<6} {:<8} {:<6} {:<8} plan\n",
        "name", "id", "block", "bytes", "bits", "read", "write", "imatrix", "search", "feedback"
    );
    for row in &rows {
        let _ = writeln!(
            text,
            "{:<8} {:>3} {:>6} {:>6} {:>7.4}  {:<5} {:<6} {:<8} {:<6} {:<8} {}",
            row.name,
            row.id,
            row.block_len,
            row.block_bytes,
            row.bits_per_weight,
            mark(row.decode),
            mark(row.encode),
            if row.needs_importance { "needed" } else { "-" },
            mark(row.search),
            mark(row.feedback),
            mark(row.plan_candidate)
        );
    }
    common.result(text)
}

fn targets(common: &Common) -> Result<()> {
    let rows = TARGETS.iter().map(|info| TargetRow {
        name: info.name,
        aliases: info.aliases,
        file_type: info.file_type,
        base_type: info.base.to_string(),
        base_bits_per_weight: info.base.info().map(|ty| ty.bits_per_weight()),
        description: info.description,
    });
    if common.json {
        return common.result_json(&rows.collect::<Vec<_>>());
    }
    let mut text = String::new();
    for row in rows {
        let number = row.file_type.map_or_else(|| "-".to_owned(), |number| number.to_string());
        let _ = writeln!(text, "{:<10} {number:>3}  {:<8} {}", row.name, row.base_type, row.description);
    }
    common.result(text)
}
