//! `lwq extract`: tensors of a GGUF as safetensors or .npy.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use regex::Regex;
use serde::Serialize;

use super::{Common, printable};
use lwq::files::{Extracted, Extraction, Numbers};
use lwq::gguf::Gguf;

/// Write tensors of a GGUF for other programs: safetensors, or NumPy's .npy
///
/// Weights are decoded to 32-bit floats; integers and 64-bit floats stay as they are. Shapes are those of other programs, rows
/// first.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  lwq extract model.gguf '^token_embd' -o embedding.npy\n  lwq extract model.gguf 'blk\\.0\\.' -o layer0.safetensors --keep-types\n  lwq extract model.gguf attn_q attn_k -o folder"
)]
pub struct ExtractArgs {
    /// Model to read: a GGUF file, or the first file of a split one
    #[arg(value_name = "MODEL")]
    input: PathBuf,
    /// Regular expressions, of which one must match a part of a tensor's name [default: all tensors]
    #[arg(value_name = "PATTERN", value_parser = parse_pattern)]
    patterns: Vec<Regex>,
    /// A .safetensors file, a .npy file for one tensor, or a folder, which is made, for a .npy file each
    #[arg(long, short, value_name = "OUTPUT")]
    output: PathBuf,
    /// Keep F16 and BF16 as they are; NumPy has no BF16
    #[arg(long)]
    keep_types: bool,
    /// Show what would be written, without writing
    #[arg(long)]
    dry_run: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct ExtractReport {
    source: String,
    written: bool,
    tensors: Vec<Extracted>,
}

fn parse_pattern(text: &str) -> Result<Regex, String> {
    // The library's own message has several lines.
    Regex::new(text).map_err(|_| "is no regular expression".to_owned())
}

impl ExtractArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// When the model cannot be read, a pattern matches nothing, a tensor cannot be written in the form that is asked for, or
    /// the output cannot be written.
    pub fn run(&self, common: &Common) -> Result<()> {
        let gguf = Gguf::open(&self.input)?;
        let numbers = if self.keep_types { Numbers::Kept } else { Numbers::F32 };
        let extraction = Extraction::new(&gguf, &self.patterns, numbers)?;
        let tensors = match self.dry_run {
            true => extraction.report(&self.output)?,
            false => extraction.write(&self.output, common.replace(), &common.watch())?,
        };
        if common.json {
            let source = gguf.label().to_owned();
            return common.result_json(&ExtractReport { source, written: !self.dry_run, tensors });
        }
        if common.quiet && !self.dry_run {
            return Ok(());
        }
        let mut text = String::new();
        let width = tensors.iter().map(|row| row.name.chars().count()).max().unwrap_or(0);
        for row in &tensors {
            let shape: Vec<String> = row.shape.iter().map(u64::to_string).collect();
            let (name, file) = (printable(&row.name), printable(&row.file.display().to_string()));
            let (from, to) = (&row.source_type, &row.ty);
            let _ = writeln!(text, "{name:<width$}  {from:<8} -> {to:<4} {:>16}  {file}", shape.join("x"));
        }
        common.result(text)
    }
}
