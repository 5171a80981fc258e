//! `lwq merge`: the parts of a split GGUF into one file.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use super::output_name::wrong_extension;
use super::{Common, count, decimal_size, printable};
use lwq::files::{Merge, Part};

/// Merge the parts of a split GGUF into one file
///
/// Any part names all of them; they lie in one folder. Tensors and metadata stay as they are.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  lwq merge model-00001-of-00003.gguf\n  lwq merge model-00002-of-00003.gguf whole/model.gguf --json"
)]
pub struct MergeArgs {
    /// One of the parts
    #[arg(value_name = "PART")]
    part: PathBuf,
    /// File to write [default: the parts' name without numbers, beside them]
    #[arg(value_name = "OUTPUT")]
    output: Option<PathBuf>,
    /// Show what would be written, without writing
    #[arg(long)]
    dry_run: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct MergeReport {
    parts: Vec<String>,
    written: bool,
    #[serde(flatten)]
    output: Part,
}

impl MergeArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// When parts are missing or do not fit together, or the file cannot be written; no output is left then.
    pub fn run(&self, common: &Common) -> Result<()> {
        let merge = Merge::open(&self.part)?;
        let output = self.output.clone().unwrap_or_else(|| merge.default_output());
        wrong_extension(&output, true).iter().for_each(|line| common.warn(line));
        let made = match self.dry_run {
            true => merge.report(&output)?,
            false => merge.write(&output, common.replace(), &common.watch())?,
        };
        let parts: Vec<String> = merge.gguf().shards().iter().map(|shard| shard.label().to_owned()).collect();
        if common.json {
            return common.result_json(&MergeReport { parts, written: !self.dry_run, output: made });
        }
        if common.quiet && !self.dry_run {
            return Ok(());
        }
        let (path, from) = (printable(&made.path.display().to_string()), parts.len());
        let (tensors, size) = (count(made.tensors as u64), decimal_size(made.size_bytes));
        common.result(format!("{path}  {tensors} tensors from {from} parts, {size}\n"))
    }
}
