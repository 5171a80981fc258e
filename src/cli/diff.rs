//! `lwq diff`: what two GGUF files do not have in common.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::{Common, count, printable};
use lwq::files::{Comparison, KeyDifference, Side, TensorDifference, compare};
use lwq::gguf::Gguf;

/// Show what differs between two GGUF files: keys, tensors, types, and how far weights are apart
///
/// Order, padding and parts do not count. The error of a tensor is the root of the mean square of the difference over that
/// of A, all weights decoded. The exit code says whether the comparison could be made; with --exit-code it is 3 for files
/// that differ.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  lwq diff model-f16.gguf model-Q4_K_M.gguf\n  lwq diff old.gguf new.gguf --exit-code --quiet\n  lwq diff a.gguf b.gguf --json | jq '.tensors[].name'"
)]
pub struct DiffArgs {
    /// The first model
    #[arg(value_name = "A")]
    a: PathBuf,
    /// The second
    #[arg(value_name = "B")]
    b: PathBuf,
    /// End with 3 where the files differ
    #[arg(long)]
    exit_code: bool,
}

/// The files differ, as was printed; exit code 3.
#[derive(Debug, thiserror::Error)]
#[error("the files differ")]
pub struct Different;

impl DiffArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// When a model cannot be read; with `--exit-code` when the two differ.
    pub fn run(&self, common: &Common) -> Result<()> {
        let (a, b) = (Gguf::open(&self.a)?, Gguf::open(&self.b)?);
        let found = compare(&a, &b, &common.watch())?;
        if common.json {
            common.result_json(&found)?;
        } else if !(common.quiet && self.exit_code) {
            common.result(text(&found))?;
        }
        if self.exit_code && !found.same { Err(Different.into()) } else { Ok(()) }
    }
}

fn text(found: &Comparison) -> String {
    let mut text = String::new();
    let (a, b) = (printable(&found.a), printable(&found.b));
    if !found.same {
        let _ = writeln!(text, "- {a}\n+ {b}\n");
    }
    found.metadata.iter().for_each(|row| text.push_str(&key_text(row)));
    if !found.metadata.is_empty() && !found.tensors.is_empty() {
        text.push('\n');
    }
    let width = found.tensors.iter().map(|row| row.name.chars().count()).max().unwrap_or(0);
    found.tensors.iter().for_each(|row| text.push_str(&tensor_text(row, width)));
    if !found.same {
        text.push('\n');
    }
    let keys = count(found.metadata.len() as u64);
    let (differ, same) = (count(found.tensors.len() as u64), count(found.same_tensors as u64));
    let _ = writeln!(text, "{keys} keys and {differ} tensors differ, {same} tensors are the same");
    text
}

fn key_text(row: &KeyDifference) -> String {
    let key = printable(&row.key);
    let shown = |value: &str| printable(value);
    match (&row.a, &row.b) {
        (Some(a), Some(b)) => {
            let place = row.first_difference.as_deref().map_or_else(String::new, |at| format!("; from {}", shown(at)));
            format!("~ {key}: {} -> {}{place}\n", shown(a), shown(b))
        }
        (Some(a), None) => format!("- {key}: {}\n", shown(a)),
        (None, b) => format!("+ {key}: {}\n", shown(b.as_deref().unwrap_or_default())),
    }
}

fn tensor_text(row: &TensorDifference, width: usize) -> String {
    let name = printable(&row.name);
    let side = |side: &Side| {
        let shape: Vec<String> = side.shape.iter().map(u64::to_string).collect();
        format!("{} {}", side.ty, shape.join("x"))
    };
    let (a, b) = match (&row.a, &row.b) {
        (Some(a), Some(b)) => (a, b),
        (Some(only), None) => return format!("- {name:<width$}  {}\n", side(only)),
        (None, only) => return format!("+ {name:<width$}  {}\n", only.as_ref().map(side).unwrap_or_default()),
    };
    let mut line = format!("~ {name:<width$}  {}", side(a));
    if side(a) != side(b) {
        let _ = write!(line, " -> {}", side(b));
    }
    if let Some(error) = row.relative_rms_error {
        let _ = write!(line, "  relative RMS error {error:.3e}");
    }
    if let Some(byte) = row.first_differing_byte {
        let _ = write!(line, "  from byte {byte}");
    }
    line.push('\n');
    line
}
