//! `lwq measure`: what rounding each tensor does to a model, once for all plans.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use super::args::{ImportanceArgs, ProbeArgs, measurement_path};
use super::{Common, count, decimal_size, printable};
use lwq::gguf::Gguf;
use lwq::measure::Request;
use lwq::moments::GradientRequest;
use lwq::os;
use lwq::quantize::open_source;
use lwq::text::Text;

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
    #[command(flatten)]
    gradients: GradientArgs,
}

/// Flags of gradients.
#[derive(Args, Debug)]
struct GradientArgs {
    /// Write second moments of the loss's gradients to this file, for `quantize --gradients`; without -o nothing else is
    /// measured
    #[arg(long, value_name = "FILE")]
    gradients: Option<PathBuf>,
    /// Use at most this many tokens of the text that gradients are taken of, spread over it [default: 16384]
    #[arg(long, value_name = "N", requires = "gradients", value_parser = clap::value_parser!(u32).range(64..=1 << 26))]
    gradient_tokens: Option<u32>,
    /// Tokens of a sequence of that text [default: 512, or the model's context if that is shorter]
    #[arg(long, value_name = "TOKENS", requires = "gradients", value_parser = clap::value_parser!(u32).range(8..=1 << 20))]
    gradient_ctx: Option<u32>,
    /// Text that gradients are taken of; repeatable [default: the built-in calibration text]
    #[arg(long, value_name = "TEXT", requires = "gradients")]
    gradient_file: Vec<PathBuf>,
    /// Draw the labels of the loss from this seed
    #[arg(long, value_name = "N", requires = "gradients", default_value_t = 0)]
    gradient_seed: u64,
}

/// What `lwq measure --json` prints.
#[derive(Serialize)]
struct MeasureReport {
    #[serde(flatten)]
    measured: Option<MeasuredReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gradients: Option<GradientsReport>,
    seconds: f64,
    peak_memory_bytes: Option<u64>,
}

#[derive(Serialize)]
struct MeasuredReport {
    output: String,
    tensors: usize,
    probe_tokens: u64,
    scored: u64,
}

#[derive(Serialize)]
struct GradientsReport {
    output: String,
    matrices: usize,
    tokens: usize,
    /// Mean cross entropy with the drawn labels, nats per token.
    loss: f64,
}

impl MeasureArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// When a file is wrong, or the run was interrupted; what was measured is then kept for the next run.
    pub fn run(&self, common: &Common) -> Result<()> {
        let started = Instant::now();
        let gguf = open_source(&self.model)?;
        let gradients = self.gradients.measure(&gguf, common)?;
        let wanted = self.output.is_some() || gradients.is_none();
        let measured = wanted.then(|| self.measure(&gguf, common)).transpose()?;
        let (seconds, peak_memory_bytes) = (started.elapsed().as_secs_f64(), os::peak_memory());
        let report = MeasureReport { measured, gradients, seconds, peak_memory_bytes };
        if common.json {
            return common.result_json(&report);
        }
        if common.quiet {
            return Ok(());
        }
        common.result(report.text())
    }

    fn measure(&self, gguf: &Gguf, common: &Common) -> Result<MeasuredReport> {
        let output = self.output.clone().unwrap_or_else(|| measurement_path(&self.model, None, true, common));
        let importance = self.importance.open(&self.model, true, common)?;
        let mut request = Request::new(gguf).probes(self.probes.options(&common.watch())?);
        if let Some(opened) = &importance {
            request = request.imatrix(opened.named());
        }
        let measured = request.run(&output, common.replace(), &common.watch())?;
        Ok(MeasuredReport {
            output: output.display().to_string(),
            tensors: measured.tensors.len(),
            probe_tokens: measured.provenance.tokens,
            scored: measured.provenance.scored,
        })
    }
}

impl GradientArgs {
    /// Measures gradients, if they are asked for.
    fn measure(&self, gguf: &Gguf, common: &Common) -> Result<Option<GradientsReport>> {
        let Some(output) = &self.gradients else { return Ok(None) };
        let watch = common.watch();
        let mut request = GradientRequest::new(gguf).seed(self.gradient_seed);
        if !self.gradient_file.is_empty() {
            request = request.text(Text::read(&self.gradient_file, &watch)?);
        }
        if let Some(tokens) = self.gradient_tokens {
            request = request.tokens(tokens as usize);
        }
        if let Some(ctx) = self.gradient_ctx {
            request = request.ctx(ctx as usize);
        }
        let found = request.run(output, common.replace(), &watch)?;
        let output = output.display().to_string();
        Ok(Some(GradientsReport { output, matrices: found.matrices, tokens: found.tokens, loss: found.loss }))
    }
}

impl MeasureReport {
    fn text(&self) -> String {
        let memory = self.peak_memory_bytes.map_or_else(String::new, |m| format!(", peak memory {}", decimal_size(m)));
        let mut lines = Vec::new();
        if let Some(MeasuredReport { output, tensors, probe_tokens, .. }) = &self.measured {
            let tokens = count(*probe_tokens);
            lines.push(format!("{}: {tensors} tensors measured on {tokens} tokens", printable(output)));
        }
        if let Some(GradientsReport { output, matrices, tokens, .. }) = &self.gradients {
            let tokens = count(*tokens as u64);
            lines.push(format!("{}: gradients of {matrices} matrices on {tokens} tokens", printable(output)));
        }
        format!("{}, {:.0} s{memory}\n", lines.join("\n"), self.seconds)
    }
}
