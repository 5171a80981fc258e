//! `lwq measure`: what rounding each tensor does to a model, once for all plans.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use clap::{Args, ValueEnum};
use serde::Serialize;

use super::args::{ImportanceArgs, ProbeArgs, measurement_path};
use super::{Common, Usage, count, decimal_size, printable};
use lwq::atomic_file::check_target;
use lwq::gguf::Gguf;
use lwq::imatrix::Named;
use lwq::measure::{CurvatureCheck, ProbeOptions, Request};
use lwq::moments::{GradientMoments, GradientRequest};
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
    /// How divergences are found
    #[arg(long, value_enum, default_value = "probes")]
    method: MethodArg,
    #[command(flatten)]
    gradients: GradientArgs,
}

/// Ways to find divergences.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum MethodArg {
    /// Runs the model with each tensor rounded by itself
    Probes,
    /// Tells them from gradients and the importance matrix, and scales that by a probe for each role: a fraction of the time.
    /// The gradients are those of --gradients, made if they are not there [default: beside the output, .gradients.gguf]
    Gradient,
}

/// Flags of gradients.
#[derive(Args, Debug)]
struct GradientArgs {
    /// Write second moments of the loss's gradients to this file, for `quantize --gradients`; without -o nothing else is
    /// measured
    #[arg(long, value_name = "FILE")]
    gradients: Option<PathBuf>,
    /// Use at most this many tokens of the text that gradients are taken of, spread over it [default: 16384]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(64..=1 << 26))]
    gradient_tokens: Option<u32>,
    /// Tokens of a sequence of that text [default: 512, or the model's context if that is shorter]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(8..=1 << 20))]
    gradient_ctx: Option<u32>,
    /// Text that gradients are taken of; repeatable [default: the built-in calibration text]
    #[arg(long, value_name = "TEXT")]
    gradient_file: Vec<PathBuf>,
    /// Draw the labels of the loss from this seed
    #[arg(long, value_name = "N")]
    gradient_seed: Option<u64>,
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
    /// How what was told from gradients compares with what was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    curvature: Option<CurvatureCheck>,
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
        let told = self.method == MethodArg::Gradient;
        let wanted = self.output.is_some() || self.gradients.gradients.is_none() || told;
        let output = match &self.output {
            None if wanted => Some(measurement_path(&self.model, None, true, common)),
            given => given.clone(),
        };
        // What cannot be measured is refused before the gradients, which take long.
        let importance = wanted.then(|| self.importance.open(&self.model, true, common)).transpose()?.flatten();
        if told && importance.is_none() {
            let problem = "--method gradient goes by the inputs of an importance matrix; give --imatrix";
            return Err(Usage(problem.to_owned()).into());
        }
        output.iter().try_for_each(|output| check_target(output, common.force))?;
        let path = match (&self.gradients.gradients, &output) {
            (None, Some(output)) if told => Some(output.with_extension("").with_extension("gradients.gguf")),
            (given, _) => given.clone(),
        };
        // What is there already serves every measurement of the model.
        let kept = path.as_deref().filter(|path| told && path.exists() && !common.force);
        self.gradients.check(path.is_some(), kept)?;
        let gradients = match (&path, kept) {
            (Some(path), None) => Some(self.gradients.measure(&gguf, path, common)?),
            _ => None,
        };
        let moments = path.filter(|_| told).map(|path| opened(&path, &gguf)).transpose()?;
        let named = importance.as_ref().map(|opened| opened.named());
        let measured = output.map(|output| self.measure(&gguf, &output, named, moments, common));
        let measured = measured.transpose()?;
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

    fn measure(
        &self,
        gguf: &Gguf,
        output: &Path,
        importance: Option<Named<'_>>,
        gradients: Option<Arc<GradientMoments>>,
        common: &Common,
    ) -> Result<MeasuredReport> {
        let probes = ProbeOptions { gradients, ..self.probes.options(&common.watch())? };
        let mut request = Request::new(gguf).probes(probes);
        if let Some(named) = importance {
            request = request.imatrix(named);
        }
        let measured = request.run(output, common.replace(), &common.watch())?;
        Ok(MeasuredReport {
            output: output.display().to_string(),
            tensors: measured.tensors.len(),
            probe_tokens: measured.provenance.tokens,
            scored: measured.provenance.scored,
            curvature: measured.curvature,
        })
    }
}

/// Gradients from a file, which must be those of the model.
fn opened(path: &Path, model: &Gguf) -> Result<Arc<GradientMoments>> {
    let gradients = GradientMoments::open(path)?;
    gradients.check_model(model)?;
    Ok(Arc::new(gradients))
}

impl GradientArgs {
    /// Refuses flags of gradients where none are wanted, and where those of `kept` serve.
    fn check(&self, wanted: bool, kept: Option<&Path>) -> Result<()> {
        let flags = [
            (self.gradient_tokens.is_some(), "--gradient-tokens"),
            (self.gradient_ctx.is_some(), "--gradient-ctx"),
            (!self.gradient_file.is_empty(), "--gradient-file"),
            (self.gradient_seed.is_some(), "--gradient-seed"),
        ];
        match (flags.iter().find(|(given, _)| *given), kept) {
            (Some((_, flag)), _) if !wanted => {
                Err(Usage(format!("{flag} goes with --gradients or --method gradient")).into())
            }
            (Some((_, flag)), Some(kept)) => {
                let kept = printable(&kept.display().to_string());
                let problem =
                    format!("{flag}: the gradients of {kept} are there already; leave it out, or add --force");
                Err(Usage(problem).into())
            }
            _ => Ok(()),
        }
    }

    /// Measures gradients.
    fn measure(&self, gguf: &Gguf, output: &Path, common: &Common) -> Result<GradientsReport> {
        let watch = common.watch();
        let mut request = GradientRequest::new(gguf).seed(self.gradient_seed.unwrap_or_default());
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
        Ok(GradientsReport { output, matrices: found.matrices, tokens: found.tokens, loss: found.loss })
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
        if let Some(check) = self.measured.as_ref().and_then(|measured| measured.curvature.as_ref()) {
            lines.push(format!(
                "told from gradients, scaled by {} probes: {:.3} times as much, spread {:.2}",
                check.probes, check.ratio, check.spread
            ));
        }
        if let Some(GradientsReport { output, matrices, tokens, .. }) = &self.gradients {
            let tokens = count(*tokens as u64);
            lines.push(format!("{}: gradients of {matrices} matrices on {tokens} tokens", printable(output)));
        }
        format!("{}, {:.0} s{memory}\n", lines.join("\n"), self.seconds)
    }
}
