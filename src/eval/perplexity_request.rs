//! Perplexity of a model on a text.

use std::path::PathBuf;
use std::time::Instant;

use serde::Serialize;

use super::engine::evaluate;
use super::follow::{Follow, KeptScores, until_stopped};
use super::opened::{Opened, TextOptions, windows_of};
use super::{EvalError, LogitsWriter, Reference, Windows};
use crate::atomic_file::{Replace, check_target};
use crate::display::printable;
use crate::gguf::Gguf;
use crate::os;
use crate::progress::{Interrupted, Watch};
use crate::text::Text;

/// Scores a model on a text with llama-perplexity's protocol.
///
/// ```
/// use lwq::eval::{PerplexityRequest, TextOptions};
/// use lwq::gguf::Gguf;
/// use lwq::text::{Set, Text};
///
/// let model = Gguf::open("tests/data/doclet-4m-f16.gguf")?;
/// let text = Text::built_in(Set::Evaluation);
/// let options = TextOptions { n_ctx: Some(128), chunks: Some(2), ..TextOptions::default() };
/// let report = PerplexityRequest::new(&model, &text).options(options).run(&())?;
/// assert_eq!((report.windows, report.tokens), (2, 2 * 63));
/// assert!(report.ppl > 1.0 && report.complete);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct PerplexityRequest<'a> {
    model: &'a Gguf,
    text: &'a Text,
    options: TextOptions,
    stride: Option<usize>,
    save_logits: Option<(PathBuf, Replace)>,
}

/// Perplexity of a model on a text.
#[derive(Clone, Debug, Serialize)]
pub struct PerplexityReport {
    /// The model's file.
    pub file: String,
    /// `exp(mean negative log-likelihood)`.
    pub ppl: f64,
    /// Its standard error.
    pub ppl_error: f64,
    /// Predictions scored.
    pub tokens: usize,
    /// Windows scored.
    pub windows: usize,
    /// Tokens of a window.
    pub ctx: usize,
    /// Tokens by which the window moved, where it did not move by its own length.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stride: Option<usize>,
    /// Rounding of activations, see [`Activations::name`](crate::model::Activations::name).
    pub activations: &'static str,
    /// Bytes of all files of the model.
    pub size_bytes: u64,
    /// Bits of tensor data per parameter.
    pub bits_per_weight: f64,
    /// False after an interruption: the figures cover less than the text.
    pub complete: bool,
    /// Time taken.
    pub seconds: f64,
    /// Tokens that passed through the model, by `seconds`.
    pub tokens_per_second: f64,
    /// Peak resident memory of the process, where the system tells.
    pub peak_memory_bytes: Option<u64>,
}

impl<'a> PerplexityRequest<'a> {
    /// Scores `model` on `text`.
    pub fn new(model: &'a Gguf, text: &'a Text) -> PerplexityRequest<'a> {
        PerplexityRequest { model, text, options: TextOptions::default(), stride: None, save_logits: None }
    }

    /// How the text is cut and scored.
    pub fn options(self, options: TextOptions) -> Self {
        PerplexityRequest { options, ..self }
    }

    /// Moves the window by `tokens` and scores as many predictions each time; see [`Windows::strided`].
    pub fn stride(self, tokens: impl Into<Option<usize>>) -> Self {
        PerplexityRequest { stride: tokens.into(), ..self }
    }

    /// Saves all distributions in llama-perplexity's form (16-bit, cut at 16 nats).
    pub fn save_logits(self, path: impl Into<PathBuf>, replace: Replace) -> Self {
        PerplexityRequest { save_logits: Some((path.into(), replace)), ..self }
    }

    /// Runs it. When `watch` stops it, the report covers what was scored by then; with [`TextOptions::state`] the next run
    /// goes on from there.
    ///
    /// # Errors
    /// When the model, the text or an output file is not usable, or the run was stopped before anything was scored.
    pub fn run(&self, watch: &dyn Watch) -> Result<PerplexityReport, EvalError> {
        let started = Instant::now();
        let options = &self.options;
        if let Some((path, replace)) = &self.save_logits {
            check_target(path, replace.is_allowed())?;
        }
        let opened = Opened::open(self.model, watch)?;
        let tokenizer = opened.tokenizer(options.pre.as_deref(), watch)?;
        let n_ctx = opened.context(options.n_ctx)?;
        let windows = match self.stride {
            Some(stride) => {
                let tokens = tokenizer.encode(self.text.joined(), true, false);
                let windows = Windows::strided(tokens, n_ctx, stride, options.chunks);
                windows.map_err(|error| error.in_file(printable(&self.text.name())))?
            }
            None => windows_of(self.text, &tokenizer, n_ctx, options)?,
        };
        opened.check_context(windows.n_ctx())?;
        let n_vocab = opened.model.n_vocab();
        let create =
            |(path, replace): &(PathBuf, Replace)| LogitsWriter::create(path, replace.is_allowed(), &windows, n_vocab);
        let mut writer = self.save_logits.as_ref().map(create).transpose()?;
        let kept = options.state.as_deref();
        let kept =
            kept.map(|path| KeptScores::open(path, None, &[&opened], &windows, options.activations)).transpose()?;
        let result = until_stopped(watch, |stop| {
            let pass = opened.pass(options.activations, stop)?;
            let follow = Follow::new(watch, &windows, 1, None, kept);
            evaluate(Reference::None, &[&pass], &windows, options.memory, writer.as_mut(), follow)
        });
        let result = result.map_err(|error| error.in_file(opened.label()))?;
        if result.windows == 0 {
            return Err(Interrupted.into());
        }
        if let Some(writer) = writer {
            writer.finish()?;
        }
        let total = result.models[0].perplexity;
        let seconds = started.elapsed().as_secs_f64();
        Ok(PerplexityReport {
            file: self.model.label().to_owned(),
            ppl: total.ppl(),
            ppl_error: total.error(),
            tokens: total.tokens,
            windows: result.windows,
            ctx: windows.n_ctx(),
            stride: self.stride,
            activations: options.activations.name(),
            size_bytes: self.model.file_bytes(),
            bits_per_weight: self.model.totals().bits_per_weight(),
            complete: result.complete,
            seconds,
            tokens_per_second: result.tokens_run as f64 / seconds,
            peak_memory_bytes: os::peak_memory(),
        })
    }
}
