//! `lwq imatrix merge`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::writing::{Warnings, WritingArgs, WrittenReport, check_output, json_name, report};
use crate::cli::Common;
use lwq::imatrix::{DEFAULT_CHUNK_SIZE, Imatrix, MergeOptions, Merger, Warning, stored_chunk_size};

/// Add up importance matrices of one model, such as the shards of a run
#[derive(Args, Debug)]
pub struct MergeArgs {
    /// Files to add up, GGUF or .dat
    #[arg(required = true, value_name = "IMATRIX")]
    inputs: Vec<PathBuf>,
    /// File to write
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    writing: WritingArgs,
}

impl MergeArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// When a file cannot be read, does not fit the others, or cannot be written.
    pub fn run(&self, common: &Common) -> Result<()> {
        check_output(&self.output, &self.inputs, common)?;
        let mut warnings = Warnings { common, lines: Vec::new() };
        let legacy_chunk_size = legacy_chunk_size(&self.writing, &self.inputs);
        let mut merger = Merger::new(MergeOptions { legacy_chunk_size });
        for input in &self.inputs {
            let imatrix = Imatrix::open(input)?;
            warnings.add_of_file(input, &imatrix.warnings);
            let odd = merger.add(&input.display().to_string(), &imatrix)?;
            let told = self.writing.chunk_size.is_some();
            warnings.add(odd.into_iter().filter(|odd| !(told && matches!(odd, Warning::AssumedChunkSize { .. }))));
        }
        let mut merged = merger.finish()?;
        warnings.add(std::mem::take(&mut merged.warnings));
        let form = self.writing.form(&self.output);
        warnings.add_of_name(&self.output, form);
        warnings.add(merged.save(&self.output, form, common.force)?);
        report(
            common,
            &WrittenReport {
                output: self.output.display().to_string(),
                format: json_name(form),
                inputs: self.inputs.iter().map(|input| input.display().to_string()).collect(),
                entries: merged.entries.len(),
                chunk_count: merged.chunk_count,
                chunk_size: merged.chunk_size,
                datasets: &merged.datasets,
                warnings: warnings.lines,
            },
        )
    }
}

/// Tokens per call of legacy inputs: as told, else as the first GGUF input has it.
fn legacy_chunk_size(writing: &WritingArgs, inputs: &[PathBuf]) -> u32 {
    let stored = || inputs.iter().find_map(|input| stored_chunk_size(input));
    writing.chunk_size.or_else(stored).unwrap_or(DEFAULT_CHUNK_SIZE)
}
