//! KL divergence of models from their original.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::{Serialize, Serializer};

use super::engine::{evaluate, routes_compare};
use super::follow::{Follow, KeptScores, until_stopped};
use super::opened::{Opened, TextOptions, windows_of};
use super::{
    DivergenceSummary, EvalError, Evaluation, LogitsReader, LogitsWriter, PairedDifference, Reference, SequentialTest,
    Windows, compare_means,
};
use crate::atomic_file::{Replace, check_target};
use crate::display::printable;
use crate::gguf::Gguf;
use crate::model::Pass;
use crate::os;
use crate::progress::{Interrupted, Watch};
use crate::text::{Text, leading_bos};
use crate::tokenizer::Tokenizer;

/// Compares what models predict with what their original does.
///
/// ```
/// use lwq::eval::{DivergenceRequest, TextOptions};
/// use lwq::gguf::Gguf;
/// use lwq::text::{Set, Text};
///
/// let base = Gguf::open("tests/data/doclet-4m-f16.gguf")?;
/// # let quantized = Gguf::open("tests/data/doclet-4m-f16.gguf")?;
/// let text = Text::built_in(Set::Evaluation);
/// let options = TextOptions { n_ctx: Some(64), chunks: Some(2), ..TextOptions::default() };
/// let report = DivergenceRequest::from_base(&base, &text).options(options).run(&[&quantized], &())?;
/// println!("mean KLD {:.6}", report.models[0].divergence.mean_kld);
/// assert!(report.models[0].divergence.mean_kld < 1e-5, "a model does not diverge from itself");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct DivergenceRequest<'a> {
    original: Original<'a>,
    options: TextOptions,
    save_logits: Option<(PathBuf, Replace)>,
    test: Option<SequentialTest>,
    forces_routes: bool,
}

/// What models are compared with.
#[derive(Clone, Copy)]
enum Original<'a> {
    /// A model that runs beside them on a text.
    Model(&'a Gguf, &'a Text),
    /// Its distributions, which were saved with the text.
    Logits(&'a Path),
}

/// One model against the original.
#[derive(Clone, Debug, Serialize)]
pub struct ModelDivergence {
    /// The model's file.
    pub file: String,
    /// Bytes of all its files.
    pub size_bytes: u64,
    /// Bits of tensor data per parameter.
    pub bits_per_weight: f64,
    /// Perplexity and divergence.
    #[serde(flatten)]
    pub divergence: DivergenceSummary,
    /// Mean divergence against that of the first model, over the same windows; `None` of the first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kld_against_first: Option<PairedDifference>,
}

/// What a run over all models has to say.
#[derive(Clone, Debug, Serialize)]
pub struct DivergenceRun {
    /// File of the original, or of its saved distributions.
    pub base: String,
    /// Rounding of activations, see [`Activations::name`](crate::model::Activations::name).
    pub activations: &'static str,
    /// Tokens of a window.
    pub ctx: usize,
    /// Windows scored.
    pub windows: usize,
    /// Predictions scored in a window.
    pub scored_per_window: usize,
    /// False when the run ended before the last window: it was stopped, or the test had decided.
    pub complete: bool,
    /// Outcome of the sequential test, where one was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sequential_test: Option<TestOutcome>,
    /// Time taken.
    pub seconds: f64,
    /// Tokens that passed through a model, summed over models, by `seconds`.
    pub tokens_per_second: f64,
    /// Peak resident memory of the process, where the system tells.
    pub peak_memory_bytes: Option<u64>,
}

/// Outcome of a sequential test.
#[derive(Clone, Debug, Serialize)]
pub struct TestOutcome {
    /// The test and where it is described.
    pub test: &'static str,
    /// Error probability.
    pub alpha: f64,
    /// Whether the best differs significantly from every other.
    pub decided: bool,
    /// File of the model with the least mean divergence.
    pub best: String,
}

/// Divergence of models from their original. Written as JSON, a single model's figures stand beside those of the run, and
/// several models in a list `models`.
#[derive(Clone, Debug)]
pub struct DivergenceReport {
    /// The run.
    pub run: DivergenceRun,
    /// The models, in the order given.
    pub models: Vec<ModelDivergence>,
    /// True when the run was stopped: it covers less than was asked for.
    pub interrupted: bool,
}

impl Serialize for DivergenceReport {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        #[serde(untagged)]
        enum Form<'a> {
            One {
                #[serde(flatten)]
                model: &'a ModelDivergence,
                #[serde(flatten)]
                run: &'a DivergenceRun,
            },
            Several {
                #[serde(flatten)]
                run: &'a DivergenceRun,
                models: &'a [ModelDivergence],
            },
        }
        let run = &self.run;
        match self.models.as_slice() {
            [model] => Form::One { model, run }.serialize(serializer),
            models => Form::Several { run, models }.serialize(serializer),
        }
    }
}

impl<'a> DivergenceRequest<'a> {
    /// Compares with `base` on `text`.
    pub fn from_base(base: &'a Gguf, text: &'a Text) -> DivergenceRequest<'a> {
        DivergenceRequest::new(Original::Model(base, text))
    }

    /// Compares with distributions that llama-perplexity or [`DivergenceRequest::save_logits`] saved; the file holds the text
    /// and its windows, too.
    pub fn from_logits(path: &'a Path) -> DivergenceRequest<'a> {
        DivergenceRequest::new(Original::Logits(path))
    }

    fn new(original: Original<'a>) -> DivergenceRequest<'a> {
        DivergenceRequest {
            original,
            options: TextOptions::default(),
            save_logits: None,
            test: None,
            forces_routes: true,
        }
    }

    /// How the text is cut and scored. Of saved logits only `chunks`, `activations`, `pre` and `memory` count.
    pub fn options(self, options: TextOptions) -> Self {
        DivergenceRequest { options, ..self }
    }

    /// Saves the distributions of the base in llama-perplexity's form (16-bit, cut at 16 nats).
    pub fn save_logits(self, path: impl Into<PathBuf>, replace: Replace) -> Self {
        DivergenceRequest { save_logits: Some((path.into(), replace)), ..self }
    }

    /// Whether mixtures of experts run a second time with the experts that the base chose, which tells the damage of weights
    /// from that of changed routes; they do unless told otherwise. Without a base that runs there are no routes.
    pub fn forced_routes(self, forces_routes: bool) -> Self {
        DivergenceRequest { forces_routes, ..self }
    }

    /// Ends the run as soon as the best model differs significantly from every other one.
    pub fn sequential_test(self, test: impl Into<Option<SequentialTest>>) -> Self {
        DivergenceRequest { test: test.into(), ..self }
    }

    /// Runs `models` beside the original. When `watch` stops the run, the report covers what was scored by then; with
    /// [`TextOptions::state`] the next run goes on from there.
    ///
    /// # Errors
    /// When a model, the text, the saved logits or an output file is not usable, vocabularies differ, or the run was stopped
    /// before anything was scored.
    pub fn run(&self, models: &[&Gguf], watch: &dyn Watch) -> Result<DivergenceReport, EvalError> {
        let started = Instant::now();
        let options = &self.options;
        if let Some((path, replace)) = &self.save_logits {
            check_target(path, replace.is_allowed())?;
        }
        let opened = models.iter().map(|gguf| Opened::open(gguf, watch)).collect::<Result<Vec<_>, _>>()?;
        let base = match self.original {
            Original::Model(base, _) => Some(Opened::open(base, watch)?),
            Original::Logits(_) => None,
        };
        let Some(main) = base.as_ref().or(opened.first()) else {
            let reason = "there is no model to compare".to_owned();
            return Err(EvalError::BadWindow { reason });
        };
        opened.iter().try_for_each(|other| main.check_same_vocabulary(other))?;
        let tokenizer = main.tokenizer(options.pre.as_deref(), watch)?;
        let (windows, mut reader) = match self.original {
            Original::Model(_, text) => (windows_of(text, &tokenizer, main.context(options.n_ctx)?, options)?, None),
            Original::Logits(path) => {
                let reader = LogitsReader::open(path)?;
                (self.saved_windows(path, &reader, main, &tokenizer)?, Some(reader))
            }
        };
        opened.iter().try_for_each(|other| other.check_context(windows.n_ctx()))?;

        let n_vocab = main.model.n_vocab();
        let create =
            |(path, replace): &(PathBuf, Replace)| LogitsWriter::create(path, replace.is_allowed(), &windows, n_vocab);
        let mut writer = self.save_logits.as_ref().map(create).transpose()?;
        let kept = options.state.as_deref();
        let all: Vec<&Opened<'_>> = opened.iter().collect();
        let kept = kept.map(|path| KeptScores::open(path, base.as_ref(), &all, &windows, options.activations));
        let kept = kept.transpose()?;
        let result = until_stopped(watch, |stop| {
            let passes = opened.iter().map(|m| m.pass(options.activations, stop)).collect::<Result<Vec<_>, _>>()?;
            let passes: Vec<&Pass<'_, '_, '_>> = passes.iter().collect();
            let base_pass = base.as_ref().map(|m| m.pass(options.activations, stop)).transpose()?;
            let reference = match (&base_pass, &mut reader) {
                (Some(pass), _) => Reference::Model { pass, forces: self.forces_routes },
                (None, Some(reader)) => Reference::File(reader),
                (None, None) => Reference::None,
            };
            let n_run = passes_of(&opened, base.as_ref(), self.forces_routes);
            let follow = Follow::new(watch, &windows, n_run, self.test, kept);
            evaluate(reference, &passes, &windows, options.memory, writer.as_mut(), follow)
        })?;
        if result.windows == 0 {
            return Err(Interrupted.into());
        }
        if let Some(writer) = writer
            && !writer.finish()?
        {
            watch.warn("the logits were not saved: the run ended before the last window");
        }

        let seconds = started.elapsed().as_secs_f64();
        let models = reports(&opened, &result);
        let best = models.iter().min_by(|a, b| a.divergence.mean_kld.total_cmp(&b.divergence.mean_kld));
        let sequential_test = self.test.as_ref().zip(best).map(|(test, best)| TestOutcome {
            test: SequentialTest::DESCRIPTION,
            alpha: test.alpha,
            decided: result.decided,
            best: best.file.clone(),
        });
        let run = DivergenceRun {
            base: match self.original {
                Original::Model(base, _) => base.label().to_owned(),
                Original::Logits(path) => path.display().to_string(),
            },
            activations: options.activations.name(),
            ctx: windows.n_ctx(),
            windows: result.windows,
            scored_per_window: result.scored_per_window,
            complete: result.complete,
            sequential_test,
            seconds,
            tokens_per_second: result.tokens_run as f64 / seconds,
            peak_memory_bytes: os::peak_memory(),
        };
        Ok(DivergenceReport { run, models, interrupted: result.interrupted })
    }

    /// The windows of saved logits.
    fn saved_windows(
        &self,
        path: &Path,
        reader: &LogitsReader,
        main: &Opened<'_>,
        tokenizer: &Tokenizer,
    ) -> Result<Windows, EvalError> {
        let logits = printable(&path.display().to_string());
        let (found, expected) = (reader.n_vocab(), main.model.n_vocab());
        if found != expected {
            return Err(EvalError::OtherLogits { logits, found, file: main.label(), expected });
        }
        main.check_context(reader.n_ctx()).map_err(|error| error.in_file(logits))?;
        reader.windows(self.options.chunks, leading_bos(tokenizer))
    }
}

/// Forward passes over the text: the base, each model, and again those whose routes are forced.
fn passes_of(opened: &[Opened<'_>], base: Option<&Opened<'_>>, forces: bool) -> usize {
    let Some(base) = base else { return opened.len() };
    let again = opened.iter().filter(|one| forces && routes_compare(&base.model, &one.model));
    1 + opened.len() + again.count()
}

fn reports(opened: &[Opened<'_>], result: &Evaluation) -> Vec<ModelDivergence> {
    let means = result.window_means();
    let of_model = |(index, opened): (usize, &Opened<'_>)| {
        Some(ModelDivergence {
            file: opened.gguf.label().to_owned(),
            size_bytes: opened.gguf.file_bytes(),
            bits_per_weight: opened.gguf.totals().bits_per_weight(),
            divergence: result.models[index].divergence.summary()?,
            kld_against_first: if index > 0 { compare_means(&means[index], &means[0]) } else { None },
        })
    };
    opened.iter().enumerate().filter_map(of_model).collect()
}
