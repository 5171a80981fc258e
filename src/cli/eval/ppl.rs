//! `lwq eval ppl`.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;

use super::loaded::{Follow, Kept, Opened, TextArgs, check_context, context, file_names, read_text, read_windows};
use lwq::atomic_file::check_target;
use crate::cli::{Common, Interrupted, decimal_size, printable};
use lwq::eval::{LogitsWriter, Reference, Windows, evaluate};
use lwq::model::Overrides;
use lwq::os;

/// Perplexity of a model on a text, with llama-perplexity's protocol
#[derive(Args, Debug)]
pub struct PplArgs {
    /// Model: a GGUF file, or the first file of a split one
    model: PathBuf,
    /// Text to predict; repeatable
    #[arg(long, short, required = true, value_name = "TEXT")]
    file: Vec<PathBuf>,
    #[command(flatten)]
    text: TextArgs,
    /// Move the window by this many tokens and score as many predictions each time
    #[arg(long, value_name = "TOKENS", conflicts_with_all = ["save_logits", "score_from"], value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    ppl_stride: Option<u32>,
    /// Save all distributions in llama-perplexity's form (16-bit, cut at 16 nats)
    #[arg(long, visible_alias = "save-all-logits", value_name = "FILE", conflicts_with_all = ["state", "score_from"])]
    save_logits: Option<PathBuf>,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    file: String,
    ppl: f64,
    ppl_error: f64,
    tokens: usize,
    windows: usize,
    ctx: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    stride: Option<u32>,
    activations: &'static str,
    size_bytes: u64,
    bits_per_weight: f64,
    complete: bool,
    seconds: f64,
    tokens_per_second: f64,
    peak_memory_bytes: Option<u64>,
}

impl PplArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// When the model or the text is not usable, or the run was interrupted (after printing what it covers).
    pub fn run(&self, common: &Common) -> Result<()> {
        let started = Instant::now();
        if let Some(path) = &self.save_logits {
            check_target(path, common.force)?;
        }
        let opened = Opened::open(&self.model)?;
        let model = opened.model()?;
        let tokenizer = opened.tokenizer(&model, self.text.pre.as_deref(), common)?;
        let n_ctx = context(self.text.ctx, &model, &opened.label())?;
        let windows = match self.ppl_stride {
            Some(stride) => {
                let tokens = tokenizer.encode(read_text(&self.file)?, true, false);
                Windows::strided(tokens, n_ctx, stride as usize, self.text.limit())
                    .with_context(|| printable(&file_names(&self.file)))?
            }
            None => read_windows(&self.file, &tokenizer, n_ctx, self.text.chunks, self.text.score_from)?,
        };
        check_context(windows.n_ctx(), model.hparams().n_ctx_train, &opened.label())?;
        let pass = model.pass(self.text.activations.forward(), Overrides::new())?;
        let writer =
            self.save_logits.as_deref().map(|p| LogitsWriter::create(p, common.force, &windows, model.n_vocab()));
        let mut writer = writer.transpose()?;
        let (text, models) = (&self.text, std::slice::from_ref(&opened));
        let kept = text.state.as_deref().map(|path| Kept::open(path, None, models, &windows, text.activations));
        let mut follow = Follow::new(common, &windows, 1, None, kept.transpose()?);
        let (earlier, save) = (follow.earlier(), writer.as_mut());
        let result = evaluate(Reference::None, &[&pass], &windows, text.memory, save, &earlier, &mut follow)
            .with_context(|| opened.label())?;
        follow.finish(&result)?;
        os::end_on_interrupt();
        if result.windows == 0 {
            return Err(Interrupted.into());
        }
        if let Some(writer) = writer {
            writer.finish()?;
        }
        let total = result.models[0].perplexity;
        let seconds = started.elapsed().as_secs_f64();
        let report = Report {
            file: self.model.display().to_string(),
            ppl: total.ppl(),
            ppl_error: total.error(),
            tokens: total.tokens,
            windows: result.windows,
            ctx: windows.n_ctx(),
            stride: self.ppl_stride,
            activations: self.text.activations.name(),
            size_bytes: opened.size_bytes(),
            bits_per_weight: opened.bits_per_weight(),
            complete: result.complete,
            seconds,
            tokens_per_second: result.tokens_run as f64 / seconds,
            peak_memory_bytes: os::peak_memory(),
        };
        if common.json {
            common.result_json(&report)?;
        } else {
            common.note(self.text.activations.describe());
            common.result(format!(
                "perplexity {:.4} ± {:.4} ({} predictions, {} windows of {} tokens)\n",
                report.ppl, report.ppl_error, report.tokens, report.windows, report.ctx
            ))?;
            let memory =
                report.peak_memory_bytes.map_or_else(String::new, |m| format!(", peak memory {}", decimal_size(m)));
            common.note(format!("{seconds:.1} s, {:.0} tokens/s{memory}", report.tokens_per_second));
        }
        if result.interrupted { Err(Interrupted.into()) } else { Ok(()) }
    }
}
