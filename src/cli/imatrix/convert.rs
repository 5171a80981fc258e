//! `lwq imatrix convert`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::writing::{Warnings, WritingArgs, WrittenReport, check_output, json_name, report};
use crate::cli::Common;
use lwq::imatrix::{DEFAULT_CHUNK_SIZE, Form, Imatrix, Warning};

/// Rewrite an importance matrix in the other form
#[derive(Args, Debug)]
pub struct ConvertArgs {
    /// File to read, GGUF or .dat
    #[arg(value_name = "IMATRIX")]
    input: PathBuf,
    /// File to write
    output: PathBuf,
    #[command(flatten)]
    writing: WritingArgs,
}

impl ConvertArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub fn run(&self, common: &Common) -> Result<()> {
        let inputs = std::slice::from_ref(&self.input);
        check_output(&self.output, inputs, common)?;
        let mut warnings = Warnings { common, lines: Vec::new() };
        let mut imatrix = Imatrix::open(&self.input)?;
        warnings.add_of_file(&self.input, &imatrix.warnings);
        let form = self.writing.form(&self.output);
        warnings.add_of_name(&self.output, form);
        if (imatrix.form, form) == (Form::Dat, Form::Gguf) {
            let chunk_size = self.writing.chunk_size.unwrap_or(DEFAULT_CHUNK_SIZE);
            if self.writing.chunk_size.is_none() {
                let file = self.input.display().to_string();
                warnings.add([Warning::AssumedChunkSize { file, chunk_size }]);
            }
            imatrix = imatrix.counted(chunk_size);
        }
        warnings.add(imatrix.save(&self.output, form, common.force)?);
        report(
            common,
            &WrittenReport {
                output: self.output.display().to_string(),
                format: json_name(form),
                inputs: vec![self.input.display().to_string()],
                entries: imatrix.entries.len(),
                chunk_count: imatrix.chunk_count,
                chunk_size: imatrix.chunk_size,
                datasets: &imatrix.datasets,
                warnings: warnings.lines,
            },
        )
    }
}
