//! What the commands that write finished files share.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::cli::output_name::wrong_extension;
use crate::cli::{Common, count, printable};
use lwq::atomic_file::check_target;
use lwq::imatrix::{Form, Warning};
use lwq::os::same_file;

/// How a file is written.
#[derive(Args, Debug)]
pub struct WritingArgs {
    /// Form of the output [default: dat if its name ends in .dat, else gguf]
    #[arg(long, value_enum)]
    format: Option<FormatArg>,
    /// Tokens per chunk of .dat inputs, which do not store it [default: as the GGUF inputs, else 512]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    pub chunk_size: Option<u32>,
}

/// File forms as flags name them.
#[derive(ValueEnum, Clone, Copy, Debug)]
pub enum FormatArg {
    /// Sums and token counts, per expert
    Gguf,
    /// The older binary form
    Dat,
}

impl From<FormatArg> for Form {
    fn from(format: FormatArg) -> Form {
        match format {
            FormatArg::Gguf => Form::Gguf,
            FormatArg::Dat => Form::Dat,
        }
    }
}

impl WritingArgs {
    pub fn form(&self, output: &Path) -> Form {
        self.format.map_or_else(|| Form::of_name(output), Form::from)
    }
}

/// What `merge` and `convert` report.
#[derive(Debug, Serialize)]
pub struct WrittenReport<'a> {
    pub output: String,
    pub format: &'static str,
    pub inputs: Vec<String>,
    pub entries: usize,
    pub chunk_count: Option<u32>,
    pub chunk_size: Option<u32>,
    pub datasets: &'a [String],
    pub warnings: Vec<String>,
}

/// Collects warnings for the report and prints each at once.
pub struct Warnings<'a> {
    pub common: &'a Common,
    pub lines: Vec<String>,
}

impl Warnings<'_> {
    pub fn add(&mut self, warnings: impl IntoIterator<Item = Warning>) {
        self.add_lines(warnings.into_iter().map(|warning| warning.to_string()));
    }

    pub fn add_of_file(&mut self, file: &Path, warnings: &[Warning]) {
        self.add_lines(warnings.iter().map(|warning| format!("{}: {warning}", file.display())));
    }

    /// Warns of a name that belongs to another format.
    pub fn add_of_name(&mut self, output: &Path, form: Form) {
        self.add_lines(wrong_extension(output, form == Form::Gguf).into_iter());
    }

    fn add_lines(&mut self, lines: impl Iterator<Item = String>) {
        for line in lines {
            let line = printable(&line);
            self.common.warn(&line);
            self.lines.push(line);
        }
    }
}

/// Refuses an output that would overwrite an input, even with `--force`: an interrupted merge of many hours of
/// shards must leave all of them.
pub fn check_output(output: &Path, inputs: &[PathBuf], common: &Common) -> Result<()> {
    if let Some(input) = inputs.iter().find(|input| same_file(input, output)) {
        bail!("{}: is also an input ({}); choose another name for the output", output.display(), input.display());
    }
    Ok(check_target(output, common.force)?)
}

/// Prints what was written.
///
/// # Errors
/// When stdout cannot be written.
pub fn report(common: &Common, written: &WrittenReport<'_>) -> Result<()> {
    if common.json {
        return common.result_json(written);
    }
    let mut text = format!("{}: {} entries", written.output, count(written.entries as u64));
    match (written.chunk_count, written.chunk_size) {
        (Some(chunks), Some(size)) => {
            let _ = write!(text, ", {} chunks of {size} tokens", count(chunks.into()));
        }
        (Some(chunks), None) => {
            let _ = write!(text, ", {} chunks", count(chunks.into()));
        }
        (None, _) => {}
    }
    let _ =
        writeln!(text, ", from {} {}", written.inputs.len(), if written.inputs.len() == 1 { "file" } else { "files" });
    common.result(printable_lines(&text))
}

/// A form as flags and JSON name it.
pub fn json_name(form: Form) -> &'static str {
    match form {
        Form::Dat => "dat",
        Form::Gguf => "gguf",
    }
}

/// Escapes control characters but keeps line ends.
pub fn printable_lines(text: &str) -> String {
    text.split_inclusive('\n')
        .map(|line| match line.strip_suffix('\n') {
            Some(line) => printable(line) + "\n",
            None => printable(line),
        })
        .collect()
}
