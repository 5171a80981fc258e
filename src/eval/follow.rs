//! What happens beside a run over a text: its progress, what is kept of it, and where a sequential test ends it.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use super::opened::Opened;
use super::{EvalError, Evaluation, EvaluationState, ModelScores, Perplexity, SequentialTest, Windows, section_key};
use crate::gguf::fingerprint;
use crate::model::Activations;
use crate::progress::{Stop, Unit, Watch};

/// Time between two writes of a run's state.
const STATE_INTERVAL: Duration = Duration::from_secs(10);

/// Does work that `watch` may stop. Before and after it, nobody looks at what asks for a stop.
pub(crate) fn until_stopped<T>(watch: &dyn Watch, work: impl FnOnce(&Stop) -> T) -> T {
    let stop = watch.stop();
    let outcome = work(&stop);
    stop.end();
    outcome
}

/// The part of a state file that a run uses.
pub(crate) struct KeptScores {
    state: EvaluationState,
    keys: Vec<String>,
    saved: Instant,
}

impl KeptScores {
    /// Opens the file for `models` against `base` on `windows`.
    ///
    /// # Errors
    /// When the file is damaged, or none of these.
    pub(crate) fn open(
        path: &Path,
        base: Option<&Opened<'_>>,
        models: &[&Opened<'_>],
        windows: &Windows,
        activations: Activations,
    ) -> Result<KeptScores, EvalError> {
        let state = EvaluationState::open(path)?;
        let base = base.map(|opened| fingerprint(opened.gguf));
        let key =
            |opened: &&Opened<'_>| section_key(&fingerprint(opened.gguf), base.as_deref(), windows, activations.name());
        Ok(KeptScores { state, keys: models.iter().map(key).collect(), saved: Instant::now() })
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

/// Follows one run.
pub(crate) struct Follow<'a> {
    watch: &'a dyn Watch,
    total: usize,
    note: String,
    test: Option<SequentialTest>,
    kept: Option<KeptScores>,
}

impl<'a> Follow<'a> {
    /// Begins the stage of a run of `n_models` models, the base among them, over `windows`.
    pub(crate) fn new(
        watch: &'a dyn Watch,
        windows: &Windows,
        n_models: usize,
        test: Option<SequentialTest>,
        kept: Option<KeptScores>,
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
                watch.note(&format!("{known} of {} windows were scored before", all * n_models));
            }
            tokens -= known * windows.n_ctx();
        }
        watch.begin("evaluating", tokens as u64, Unit::Tokens);
        Follow { watch, total: windows.len(), note: String::new(), test, kept }
    }

    /// What an earlier run has found, one entry a model or none.
    pub(super) fn earlier(&self) -> Vec<ModelScores> {
        self.kept.as_ref().map_or_else(Vec::new, KeptScores::scores)
    }

    /// `tokens` more have passed through all layers of one model.
    pub(super) fn advanced(&self, tokens: usize) {
        self.watch.advance(tokens as u64, &self.note);
    }

    /// A group of windows has been scored; a test may end the run here.
    pub(super) fn scored(&mut self, so_far: &mut Evaluation) -> ControlFlow<()> {
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
                self.watch.warn(&format!("the state is not kept: {error}"));
            }
            kept.saved = Instant::now();
        }
        if let Some(test) = &self.test
            && test.separates_best(&so_far.window_means())
        {
            so_far.decided = true;
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }

    /// The stage is over.
    pub(super) fn end(&self) {
        self.watch.end();
    }

    /// Keeps what was scored; says so when the run stopped early.
    ///
    /// # Errors
    /// When the state cannot be written.
    pub(super) fn finish(mut self, result: &Evaluation) -> Result<(), EvalError> {
        let mut kept = "";
        if let Some(state) = &mut self.kept {
            state.keep(result);
            state.state.save()?;
            kept = "; the same command goes on from there";
        }
        if result.interrupted {
            let (windows, total) = (result.windows, self.total);
            self.watch.warn(&format!("interrupted: the figures cover {windows} of {total} windows{kept}"));
        }
        Ok(())
    }
}

fn with_error(perplexity: &Perplexity) -> String {
    format!("{:.4} ± {:.4}", perplexity.ppl(), perplexity.error())
}
