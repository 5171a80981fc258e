//! `lwq eval ppl`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::cli::args::{ActivationsArg, TextArgs};
use crate::cli::{Common, peak_memory};
use lwq::eval::PerplexityRequest;
use lwq::gguf::Gguf;
use lwq::model::Activations;
use lwq::progress::Interrupted;

/// Perplexity of a model on a text, with llama-perplexity's protocol
#[derive(Args, Debug)]
pub struct PplArgs {
    /// Model: a GGUF file, or the first file of a split one
    model: PathBuf,
    #[command(flatten)]
    text: TextArgs,
    /// Rounding of the inputs of products
    #[arg(long, value_enum, default_value = "f32")]
    activations: ActivationsArg,
    /// Move the window by this many tokens and score as many predictions each time
    #[arg(long, value_name = "TOKENS", conflicts_with_all = ["save_logits", "score_from"], value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    ppl_stride: Option<u32>,
    /// Save all distributions in llama-perplexity's form (16-bit, cut at 16 nats)
    #[arg(long, visible_alias = "save-all-logits", value_name = "FILE", conflicts_with_all = ["state", "score_from"])]
    save_logits: Option<PathBuf>,
}

impl PplArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// When the model or the text is not usable, or the run was interrupted (after printing what it covers).
    pub fn run(&self, common: &Common) -> Result<()> {
        let model = Gguf::open(&self.model)?;
        let text = self.text.read(common)?;
        let mut request = PerplexityRequest::new(&model, &text)
            .options(self.text.options(self.activations))
            .stride(self.ppl_stride.map(|n| n as usize));
        if let Some(path) = &self.save_logits {
            request = request.save_logits(path, common.replace());
        }
        let report = request.run(&common.watch())?;
        if common.json {
            common.result_json(&report)?;
        } else {
            common.note(Activations::from(self.activations).describe());
            common.result(format!(
                "perplexity {:.4} ± {:.4} ({} predictions, {} windows of {} tokens)\n",
                report.ppl, report.ppl_error, report.tokens, report.windows, report.ctx
            ))?;
            let memory = peak_memory(report.peak_memory_bytes);
            common.note(format!("{:.1} s, {:.0} tokens/s{memory}", report.seconds, report.tokens_per_second));
        }
        if report.complete { Ok(()) } else { Err(Interrupted.into()) }
    }
}
