//! `lwq split`: one GGUF into several files.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::Result;
use clap::{ArgGroup, Args};
use serde::Serialize;

use super::args::parse_size;
use super::output_name::wrong_extension;
use super::{Common, count, decimal_size, printable};
use lwq::files::{Limit, Part, SplitPlan};
use lwq::gguf::{Gguf, split};
use lwq::plan::Size;

/// Split a GGUF into parts, which llama.cpp loads by the first one
///
/// Parts are named as llama-gguf-split names them, OUTPUT-00001-of-00003.gguf. Tensors and metadata stay as they are; the
/// metadata are in the first part.
#[derive(Args, Debug)]
#[command(
    group(ArgGroup::new("limit").args(["max_size", "max_tensors"]).required(true)),
    after_help = "Examples:\n  lwq split model.gguf --max-size 2GB\n  lwq split model.gguf parts/model --max-tensors 128\n  lwq split model.gguf --max-size 50GB --dry-run --json"
)]
pub struct SplitArgs {
    /// Model to read: a GGUF file, or the first file of a split one
    #[arg(value_name = "MODEL")]
    input: PathBuf,
    /// What the names of the parts begin with [default: the model's name, beside it]
    #[arg(value_name = "OUTPUT")]
    output: Option<PathBuf>,
    /// Most bytes of a part's file, such as 2GB (units of 1000) or 1.9GiB (units of 1024)
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    max_size: Option<Size>,
    /// Most tensors of a part
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_tensors: Option<u32>,
    /// Leave the first part without tensors: metadata alone
    #[arg(long)]
    no_tensor_first_split: bool,
    /// Show the parts, without writing
    #[arg(long)]
    dry_run: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct SplitReport<'a> {
    source: String,
    written: bool,
    parts: &'a [Part],
    warnings: &'a [String],
}

impl SplitArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// When the model cannot be read, there is nothing to split, or a part cannot be written; no part is left then.
    pub fn run(&self, common: &Common) -> Result<()> {
        let gguf = Gguf::open(&self.input)?;
        let output = self.output.clone().unwrap_or_else(|| match split::parse_shard_path(&self.input) {
            Some((prefix, _, _)) => prefix,
            None => self.input.clone(),
        });
        // The command line makes sure that there is one of both.
        let limit = match (&self.max_size, self.max_tensors) {
            (Some(size), _) => Limit::Bytes(size.bytes),
            (None, tensors) => Limit::Tensors(tensors.unwrap_or(u32::MAX) as usize),
        };
        let plan = SplitPlan::new(&gguf, &output, limit, self.no_tensor_first_split)?;
        let warnings = plan.warnings().to_vec();
        let wrong = plan.parts().first().and_then(|part| wrong_extension(&part.path, true));
        warnings.iter().chain(&wrong).for_each(|line| common.warn(line));
        let parts = match self.dry_run {
            true => plan.parts().to_vec(),
            false => plan.write(common.replace(), &common.watch())?,
        };
        if common.json {
            return common.result_json(&SplitReport {
                source: gguf.label().to_owned(),
                written: !self.dry_run,
                parts: &parts,
                warnings: &warnings,
            });
        }
        if common.quiet && !self.dry_run {
            return Ok(());
        }
        let mut text = String::new();
        for part in &parts {
            let path = printable(&part.path.display().to_string());
            let _ = writeln!(text, "{path}  {} tensors, {}", count(part.tensors as u64), decimal_size(part.size_bytes));
        }
        common.result(text)
    }
}
