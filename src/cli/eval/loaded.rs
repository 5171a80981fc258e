//! What the evaluating commands share: opened models, the text, flags, progress.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use clap::{Args, ValueEnum};

use crate::cli::{Common, Progress, Unit, printable};
use lwq::eval::{
    Evaluation, EvaluationState, ModelScores, Observer, Perplexity, SequentialTest, Verdict, Windows, section_key,
    texts_in_turn,
};
use lwq::gguf::{Gguf, Metadata, fingerprint};
use lwq::model::{Activations, ForwardOptions, Model};
use lwq::os;
use lwq::tokenizer::Tokenizer;

/// Tokens per window where nothing else is asked for and the model's context is not shorter.
const DEFAULT_CONTEXT: usize = 512;

/// Time between two writes of a run's state.
const STATE_INTERVAL: Duration = Duration::from_secs(10);

/// How activations enter the products, as flags name it.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActivationsArg {
    /// Unrounded: the damage of the weights alone
    F32,
    /// Rounded as ggml's CPU backend does: the damage as users run the file
    Ggml,
}

impl ActivationsArg {
    /// The name of the flag's value.
    pub fn name(self) -> &'static str {
        match self {
            ActivationsArg::F32 => "f32",
            ActivationsArg::Ggml => "ggml",
        }
    }

    /// A sentence for people.
    pub fn describe(self) -> &'static str {
        match self {
            ActivationsArg::F32 => "activations unrounded (f32): the damage of the weights alone",
            ActivationsArg::Ggml => "activations rounded as ggml's CPU backend does: the damage as the file runs",
        }
    }

    /// Options of a forward pass that ends when the user interrupts.
    pub fn forward(self) -> ForwardOptions {
        ForwardOptions {
            activations: match self {
                ActivationsArg::F32 => Activations::Unrounded,
                ActivationsArg::Ggml => Activations::Ggml,
            },
            cancel: Some(os::cancel_on_interrupt()),
            ..ForwardOptions::default()
        }
    }
}

/// Flags of every run over a text.
#[derive(Args, Debug)]
pub struct TextArgs {
    /// Tokens per window [default: 512, or the model's context if that is shorter]
    #[arg(long, short = 'c', value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(4..=1 << 24))]
    pub ctx: Option<u32>,
    /// Score at most this many windows; several texts take turns
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub chunks: Option<u32>,
    /// Score the predictions of a window from this position on [default: half the window]
    #[arg(long, value_name = "POSITION", value_parser = clap::value_parser!(u32).range(..1 << 24))]
    pub score_from: Option<u32>,
    /// Rounding of the inputs of products
    #[arg(long, value_enum, default_value = "f32")]
    pub activations: ActivationsArg,
    /// Use this pre-tokenizer instead of the one in the file
    #[arg(long, value_name = "NAME")]
    pub pre: Option<String>,
    /// Memory for activations, such as 2G [default: half of what is free]
    #[arg(long, value_name = "SIZE", value_parser = lwq::gguf::split::parse_size)]
    pub memory: Option<u64>,
    /// Keep scored windows in this file; a run that finds it goes on where another stopped
    #[arg(long, value_name = "FILE")]
    pub state: Option<PathBuf>,
}

/// A file opened for evaluation.
pub struct Opened {
    /// The container.
    pub gguf: Gguf,
    /// What was given on the command line.
    pub path: PathBuf,
}

impl Opened {
    /// Maps a file.
    ///
    /// # Errors
    /// When it is no GGUF file.
    pub fn open(path: &Path) -> Result<Opened> {
        Ok(Opened { gguf: Gguf::open(path)?, path: path.to_owned() })
    }

    /// The name for messages.
    pub fn label(&self) -> String {
        printable(self.gguf.label())
    }

    /// The model in the file.
    ///
    /// # Errors
    /// When the forward pass cannot run it.
    pub fn model(&self) -> Result<Model<'_>> {
        Model::open(&self.gguf).with_context(|| self.label())
    }

    /// The tokenizer in the file; see [`open_tokenizer`].
    ///
    /// # Errors
    /// When the file has none that is known.
    pub fn tokenizer(&self, model: &Model<'_>, pre: Option<&str>, common: &Common) -> Result<Tokenizer> {
        open_tokenizer(&self.gguf, model, pre, common)
    }

    /// Bytes of all its files.
    pub fn size_bytes(&self) -> u64 {
        self.gguf.shards().iter().map(|shard| shard.file_bytes()).sum()
    }

    /// Bits of tensor data per parameter.
    pub fn bits_per_weight(&self) -> f64 {
        let tensors = self.gguf.tensors();
        let bytes: u64 = tensors.iter().filter_map(|t| t.bytes).sum();
        let parameters: u64 = tensors.iter().map(|t| t.elements()).sum();
        8.0 * bytes as f64 / parameters.max(1) as f64
    }

    /// Checks that `other` has the same tokens, so that predictions of both can be compared.
    ///
    /// # Errors
    /// When sizes or tokens differ; the message names both files.
    pub fn check_same_vocabulary(&self, other: &Opened) -> Result<()> {
        let (a, b) = (self.gguf.metadata(), other.gguf.metadata());
        let (found, expected) = (vocabulary(b)?, vocabulary(a)?);
        let difference = match (expected.len(), found.len()) {
            (a, b) if a != b => Some(format!("has {b} tokens, not {a}")),
            _ => expected.iter().zip(&found).position(|(a, b)| a != b).map(|id| format!("differs at token {id}")),
        };
        match difference {
            Some(difference) => {
                anyhow::bail!(
                    "{}: the vocabulary {difference} as in {}; only models of one vocabulary can be compared",
                    other.label(),
                    self.label()
                )
            }
            None => Ok(()),
        }
    }
}

/// The tokenizer in a model's file, checked against the size of the embedding; its warnings are printed.
///
/// # Errors
/// When the file has none that is known, or one of more tokens than the embedding has rows.
pub fn open_tokenizer(gguf: &Gguf, model: &Model<'_>, pre: Option<&str>, common: &Common) -> Result<Tokenizer> {
    let label = printable(gguf.label());
    let tokenizer = Tokenizer::from_gguf(gguf.metadata(), pre).with_context(|| label.clone())?;
    tokenizer.warnings().iter().for_each(|line| common.warn(line));
    ensure!(
        tokenizer.len() <= model.n_vocab(),
        "{label}: the vocabulary has {} tokens, but the embedding only {} rows; the file is damaged",
        tokenizer.len(),
        model.n_vocab()
    );
    Ok(tokenizer)
}

/// Texts one after the other, each as llama.cpp's tools read a text file: without one final newline.
///
/// # Errors
/// When a file cannot be read.
pub fn read_text(files: &[PathBuf]) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    for path in files {
        let bytes = std::fs::read(path).map_err(|error| {
            let path = printable(&path.display().to_string());
            anyhow!("{path}: cannot read the text: {error}; check the path and its permissions")
        })?;
        if !text.is_empty() {
            text.push(b'\n');
        }
        text.extend_from_slice(bytes.strip_suffix(b"\n").unwrap_or(&bytes));
    }
    Ok(text)
}

/// The windows of texts, in turn where there are several.
///
/// # Errors
/// When a file cannot be read or there is too little text; the message names the files.
pub fn read_windows(
    files: &[PathBuf],
    tokenizer: &Tokenizer,
    n_ctx: usize,
    limit: Option<u32>,
    score_from: Option<u32>,
) -> Result<Windows> {
    let texts = files.iter().map(|file| Ok(tokenizer.encode(read_text(std::slice::from_ref(file))?, true, false)));
    let texts = texts.collect::<Result<Vec<_>>>()?;
    let limit = limit.map(|n| n as usize);
    let windows = Windows::chunks(texts_in_turn(texts, n_ctx), n_ctx, limit, bos(tokenizer));
    let windows = windows.and_then(|windows| match score_from {
        Some(position) => windows.score_from(position as usize),
        None => Ok(windows),
    });
    windows.with_context(|| printable(&file_names(files)))
}

/// Names of several files in one line.
pub fn file_names(files: &[PathBuf]) -> String {
    files.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// Tokens of a window: `asked`, or a default that the model was trained for.
///
/// # Errors
/// When more is asked for than the model was trained for.
pub fn context(asked: Option<u32>, model: &Model<'_>, label: &str) -> Result<usize> {
    let trained = model.hparams().n_ctx_train;
    match asked {
        Some(ctx) => check_context(ctx as usize, trained, label).map(|()| ctx as usize),
        None => Ok(DEFAULT_CONTEXT.min(trained.max(4))),
    }
}

/// Tokens of a piece of calibration text, which may be longer than what the model was trained for; `what` names such
/// pieces in the warning about that.
pub fn calibration_context(asked: Option<u32>, model: &Model<'_>, what: &str, common: &Common) -> usize {
    let trained = model.hparams().n_ctx_train;
    let Some(asked) = asked.map(|ctx| ctx as usize) else {
        return DEFAULT_CONTEXT.min(trained.max(8));
    };
    if asked > trained {
        common.warn(format!("{what} of {asked} tokens are longer than the model's context of {trained}"));
    }
    asked
}

fn vocabulary(metadata: &Metadata) -> Result<Vec<&[u8]>> {
    Ok(match metadata.array("tokenizer.ggml.tokens")? {
        Some(tokens) => tokens.iter_str()?.collect(),
        None => Vec::new(),
    })
}

impl TextArgs {
    /// At most this many windows.
    pub fn limit(&self) -> Option<usize> {
        self.chunks.map(|n| n as usize)
    }
}

/// Refuses windows that are longer than the model's context.
///
/// # Errors
/// When they are.
pub fn check_context(n_ctx: usize, trained: usize, label: &str) -> Result<()> {
    ensure!(
        n_ctx <= trained,
        "{label}: windows of {n_ctx} tokens are longer than the model's context of {trained}; give a smaller --ctx"
    );
    Ok(())
}

/// BOS of a vocabulary that adds it.
pub fn bos(tokenizer: &Tokenizer) -> Option<u32> {
    tokenizer.adds_bos().then(|| tokenizer.bos()).flatten()
}

/// The part of a state file that a run uses.
pub struct Kept {
    state: EvaluationState,
    keys: Vec<String>,
    saved: Instant,
}

impl Kept {
    /// Opens `path` for `models` against `base` on `windows`.
    ///
    /// # Errors
    /// When the file is damaged, or none of these.
    pub fn open(
        path: &Path,
        base: Option<&Opened>,
        models: &[Opened],
        windows: &Windows,
        activations: ActivationsArg,
    ) -> Result<Kept> {
        let state = EvaluationState::open(path)?;
        let base = base.map(|opened| fingerprint(&opened.gguf));
        let key =
            |opened: &Opened| section_key(&fingerprint(&opened.gguf), base.as_deref(), windows, activations.name());
        Ok(Kept { state, keys: models.iter().map(key).collect(), saved: Instant::now() })
    }

    fn scores(&self) -> Vec<ModelScores> {
        self.keys.iter().map(|key| self.state.section(key)).collect()
    }

    fn keep(&mut self, so_far: &Evaluation) {
        for (key, scores) in self.keys.iter().zip(&so_far.models) {
            self.state.keep(key, scores);
        }
    }
}

/// Progress of a run, what is kept of it, and where a sequential test ends it.
pub struct Follow<'a> {
    common: &'a Common,
    progress: Progress,
    total: usize,
    note: String,
    test: Option<SequentialTest>,
    kept: Option<Kept>,
    /// What the test has said about the best and every other model.
    pub decided: bool,
}

impl<'a> Follow<'a> {
    /// Follows a run of `n_models` models, the base among them, over `windows`.
    pub fn new(
        common: &'a Common,
        windows: &Windows,
        n_models: usize,
        test: Option<SequentialTest>,
        kept: Option<Kept>,
    ) -> Follow<'a> {
        let mut tokens = windows.len() * windows.n_ctx() * n_models;
        if let Some(kept) = &kept {
            let all = windows.len();
            let done = |scores: &ModelScores| (scores.nlls.len() / windows.scored_per_window().max(1)).min(all);
            let done: Vec<usize> = kept.scores().iter().map(done).collect();
            // The base runs wherever one of the others does.
            let with_base = if n_models > done.len() { done.iter().copied().min().unwrap_or(0) } else { 0 };
            let known = done.iter().sum::<usize>() + with_base;
            if known > 0 {
                common.note(format!("{known} of {} windows were scored before", all * n_models));
            }
            tokens -= known * windows.n_ctx();
        }
        let progress = Progress::new(common, "evaluating", tokens as u64, Unit::Tokens);
        Follow { common, progress, total: windows.len(), note: String::new(), test, kept, decided: false }
    }

    /// What an earlier run has found, one entry a model or none.
    pub fn earlier(&self) -> Vec<ModelScores> {
        self.kept.as_ref().map_or_else(Vec::new, Kept::scores)
    }

    /// Ends the display and keeps what was scored; says so when the run stopped early.
    ///
    /// # Errors
    /// When the state cannot be written.
    pub fn finish(&mut self, result: &Evaluation) -> Result<()> {
        self.progress.finish();
        let mut kept = "";
        if let Some(state) = &mut self.kept {
            state.keep(result);
            state.state.save()?;
            kept = "; the same command goes on from there";
        }
        if result.interrupted {
            let (windows, total) = (result.windows, self.total);
            self.common.warn(format!("interrupted: the figures cover {windows} of {total} windows{kept}"));
        }
        Ok(())
    }
}

impl Observer for Follow<'_> {
    fn advanced(&mut self, tokens: usize) {
        self.progress.advance(tokens as u64, &self.note);
    }

    fn scored(&mut self, so_far: &Evaluation) -> ControlFlow<()> {
        self.note = format!("window {} of {}", so_far.windows, self.total);
        if let Some(scores) = so_far.models.first() {
            self.note.push_str(&format!(", perplexity {}", with_error(&scores.perplexity)));
            if !scores.divergence.tokens.is_empty() {
                self.note.push_str(&format!(", KLD {:.6}", scores.divergence.mean_kld()));
            }
        }
        if let Some(kept) = self.kept.as_mut().filter(|kept| kept.saved.elapsed() >= STATE_INTERVAL) {
            kept.keep(so_far);
            if let Err(error) = kept.state.save() {
                self.common.warn(format!("the state is not kept: {error}"));
            }
            kept.saved = Instant::now();
        }
        if let Some(test) = &self.test
            && all_decided(test, so_far)
        {
            self.decided = !so_far.complete;
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }
}

fn with_error(perplexity: &Perplexity) -> String {
    format!("{:.4} ± {:.4}", perplexity.ppl(), perplexity.error())
}

/// True when the best model differs significantly from every other one. The error probability is shared among the
/// comparisons (Bonferroni).
pub fn all_decided(test: &SequentialTest, so_far: &Evaluation) -> bool {
    let means: Vec<Vec<f64>> = so_far.models.iter().map(|m| m.window_means(so_far.scored_per_window)).collect();
    let total = |m: &Vec<f64>| m.iter().sum::<f64>();
    let Some(best) = (0..means.len()).min_by(|&a, &b| total(&means[a]).total_cmp(&total(&means[b]))) else {
        return false;
    };
    let others = means.len().saturating_sub(1);
    let pairs = (means.len() * others / 2).max(1);
    let shared = SequentialTest { alpha: test.alpha / pairs as f64 };
    others > 0
        && (0..means.len()).filter(|&i| i != best).all(|i| shared.look(&means[best], &means[i]) == Verdict::First)
}
