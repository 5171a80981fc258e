//! `lwq eval kld`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::cli::args::{ActivationsArg, TextArgs};
use crate::cli::{Common, Usage};
use lwq::eval::{DivergenceReport, DivergenceRequest, SequentialTest};
use lwq::gguf::Gguf;
use lwq::model::Activations;
use lwq::progress::Interrupted;

/// KL divergence of quantized models from their 16-bit original
#[derive(Args, Debug)]
pub struct KldArgs {
    /// Quantized models
    #[arg(required = true, value_name = "MODEL")]
    models: Vec<PathBuf>,
    /// The original, run beside the others
    #[arg(long, value_name = "MODEL", required_unless_present = "base_logits", conflicts_with = "base_logits")]
    base: Option<PathBuf>,
    /// Distributions of the original that llama-perplexity or --save-logits saved; they hold the text too
    #[arg(long, visible_alias = "kl-divergence-base", value_name = "FILE", conflicts_with_all = ["file", "ctx", "save_logits", "state", "score_from"])]
    base_logits: Option<PathBuf>,
    #[command(flatten)]
    text: TextArgs,
    /// Rounding of the inputs of products
    #[arg(long, value_enum, default_value = "f32")]
    activations: ActivationsArg,
    /// Save the distributions of the original in llama-perplexity's form (16-bit, cut at 16 nats)
    #[arg(long, visible_alias = "save-all-logits", value_name = "FILE", conflicts_with_all = ["state", "score_from"])]
    save_logits: Option<PathBuf>,
    /// Mixtures of experts: do not run them a second time with the experts that the original chose
    #[arg(long)]
    no_forced_routing: bool,
    /// Stop as soon as the best model differs significantly from every other one (a confidence sequence over windows,
    /// valid at every look)
    #[arg(long)]
    sequential_test: bool,
    /// Error probability of the sequential test
    #[arg(long, value_name = "P", default_value_t = 0.05, value_parser = parse_alpha)]
    alpha: f64,
}

fn parse_alpha(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(alpha) if alpha > 0.0 && alpha < 1.0 => Ok(alpha),
        _ => Err("give a probability between 0 and 1".into()),
    }
}

impl KldArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// When a model, the text or the saved logits are not usable, or the run was interrupted (after printing what it
    /// covers).
    pub fn run(&self, common: &Common) -> Result<()> {
        if self.sequential_test && self.models.len() < 2 {
            return Err(Usage("--sequential-test compares models; give two or more".into()).into());
        }
        let models = self.models.iter().map(Gguf::open).collect::<Result<Vec<_>, _>>()?;
        let base = self.base.as_deref().map(Gguf::open).transpose()?;
        let report = match (&base, &self.base_logits) {
            (_, Some(logits)) => self.compare(DivergenceRequest::from_logits(logits), &models, common)?,
            (Some(base), None) => {
                let text = self.text.read(common)?;
                self.compare(DivergenceRequest::from_base(base, &text), &models, common)?
            }
            (None, None) => return Err(Usage("--base or --base-logits is needed".into()).into()),
        };
        if common.json {
            common.result_json(&report)?;
        } else {
            common.note(Activations::from(self.activations).describe());
            common.result(report.to_string())?;
        }
        if report.interrupted { Err(Interrupted.into()) } else { Ok(()) }
    }

    fn compare(&self, request: DivergenceRequest<'_>, models: &[Gguf], common: &Common) -> Result<DivergenceReport> {
        let test = self.sequential_test.then_some(SequentialTest { alpha: self.alpha });
        let mut request = request
            .options(self.text.options(self.activations))
            .sequential_test(test)
            .forced_routes(!self.no_forced_routing);
        if let Some(path) = &self.save_logits {
            request = request.save_logits(path, common.replace());
        }
        Ok(request.run(&models.iter().collect::<Vec<_>>(), &common.watch())?)
    }
}
