//! `lwq measure`: what rounding each tensor does to a model, once for all plans.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use super::args::{ImportanceArgs, ProbeArgs, measurement_path};
use super::{Common, count, decimal_size, printable};
use lwq::measure::Request;
use lwq::os;
use lwq::quantize::open_source;

/// Measure what rounding each tensor does to a model, once for all plans
#[derive(Args, Debug)]
pub struct MeasureArgs {
    /// Model to measure: a GGUF file, or the first file of a split one
    model: PathBuf,
    #[command(flatten)]
    importance: ImportanceArgs,
    /// File to write [default: the model's name with .sens.json]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    probes: ProbeArgs,
}

/// What `lwq measure --json` prints.
#[derive(Serialize)]
struct MeasureReport {
    output: String,
    tensors: usize,
    probe_tokens: u64,
    scored: u64,
    seconds: f64,
    peak_memory_bytes: Option<u64>,
}

impl MeasureArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// When a file is wrong, or the run was interrupted; what was measured is then kept for the next run.
    pub fn run(&self, common: &Common) -> Result<()> {
        let started = Instant::now();
        let gguf = open_source(&self.model)?;
        let output = self.output.clone().unwrap_or_else(|| measurement_path(&self.model, None, true, common));
        let importance = self.importance.open(&self.model, true, common)?;
        let mut request = Request::new(&gguf).probes(self.probes.options(&common.watch())?);
        if let Some(opened) = &importance {
            request = request.imatrix(opened.named());
        }
        let measured = request.run(&output, common.replace(), &common.watch())?;
        let report = MeasureReport {
            output: output.display().to_string(),
            tensors: measured.tensors.len(),
            probe_tokens: measured.provenance.tokens,
            scored: measured.provenance.scored,
            seconds: started.elapsed().as_secs_f64(),
            peak_memory_bytes: os::peak_memory(),
        };
        if common.json {
            return common.result_json(&report);
        }
        if common.quiet {
            return Ok(());
        }
        let memory =
            report.peak_memory_bytes.map_or_else(String::new, |m| format!(", peak memory {}", decimal_size(m)));
        common.result(format!(
            "{}: {} tensors measured on {} tokens, {:.0} s{memory}\n",
            printable(&report.output),
            report.tensors,
            count(report.probe_tokens),
            report.seconds
        ))
    }
}
