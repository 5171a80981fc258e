//! Accuracy of a model on tasks, alone or against its base.

use std::fmt;
use std::time::Instant;

use serde::Serialize;

use super::EvalError;
use super::follow::until_stopped;
use super::opened::Opened;
use super::tasks::{
    PreparedTasks, TaskComparison, TaskOptions, TaskResult, TaskScores, TaskSet, TaskSummary, score_tasks,
};
use crate::display::{count, peak_memory, printable};
use crate::gguf::Gguf;
use crate::model::Activations;
use crate::os;
use crate::progress::{Interrupted, Stop, Watch};

/// Lets a model choose among the answers of tasks.
///
/// ```
/// use lwq::eval::TaskRequest;
/// use lwq::eval::tasks::{ReadOptions, TaskKind, TaskSet};
/// use lwq::gguf::Gguf;
///
/// let model = Gguf::open("tests/data/doclet-4m-f16.gguf")?;
/// let options = ReadOptions { tasks: Some(4), seed: 1, ..ReadOptions::default() };
/// let tasks = TaskSet::read("tests/data/tasks/hellaswag.txt".as_ref(), TaskKind::HellaSwag, &options)?;
/// let report = TaskRequest::new(&model, &tasks).run(&())?;
/// assert_eq!((report.summary.tasks, report.tasks_available), (4, 12));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct TaskRequest<'a> {
    model: &'a Gguf,
    tasks: &'a TaskSet,
    base: Option<&'a Gguf>,
    options: TaskOptions,
    activations: Activations,
    pre: Option<String>,
    llama_compat: bool,
    details: bool,
}

/// What a model made of tasks.
#[derive(Clone, Debug, Serialize)]
pub struct TaskReport {
    /// The model's file.
    pub file: String,
    /// The file of tasks.
    pub tasks_file: String,
    /// Tasks that it holds.
    pub tasks_available: usize,
    /// The model's figures.
    #[serde(flatten)]
    pub summary: TaskSummary,
    /// File of the base.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// Against the base.
    #[serde(flatten)]
    pub comparison: Option<TaskComparison>,
    /// Rounding of activations, see [`Activations::name`].
    pub activations: &'static str,
    /// Whether tasks were scored as llama-perplexity does.
    pub llama_compat: bool,
    /// Bytes of all files of the model.
    pub size_bytes: u64,
    /// Bits of tensor data per parameter.
    pub bits_per_weight: f64,
    /// False after an interruption: the figures cover less than was asked for.
    pub complete: bool,
    /// Tokens that passed through the models.
    pub tokens: usize,
    /// Time taken.
    pub seconds: f64,
    /// `tokens` by `seconds`.
    pub tokens_per_second: f64,
    /// Peak resident memory of the process, where the system tells.
    pub peak_memory_bytes: Option<u64>,
    /// Every task, where that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub results: Option<Vec<TaskResult>>,
}

impl<'a> TaskRequest<'a> {
    /// Scores `model` on `tasks`.
    pub fn new(model: &'a Gguf, tasks: &'a TaskSet) -> TaskRequest<'a> {
        TaskRequest {
            model,
            tasks,
            base: None,
            options: TaskOptions::default(),
            activations: Activations::default(),
            pre: None,
            llama_compat: false,
            details: false,
        }
    }

    /// Scores a second model, too, and reports what the first recovers of its accuracy.
    pub fn base(self, base: impl Into<Option<&'a Gguf>>) -> Self {
        TaskRequest { base: base.into(), ..self }
    }

    /// Bounds of tokens and memory.
    pub fn options(self, options: TaskOptions) -> Self {
        TaskRequest { options, ..self }
    }

    /// Rounding of the inputs of products.
    pub fn activations(self, activations: Activations) -> Self {
        TaskRequest { activations, ..self }
    }

    /// Uses this pre-tokenizer instead of the one that the file names.
    pub fn pre(self, name: impl Into<Option<String>>) -> Self {
        TaskRequest { pre: name.into(), ..self }
    }

    /// Repeats llama-perplexity's arithmetic and its defects; see [`super::tasks`].
    pub fn llama_compat(self, llama_compat: bool) -> Self {
        TaskRequest { llama_compat, ..self }
    }

    /// Reports every task with its scores.
    pub fn details(self, details: bool) -> Self {
        TaskRequest { details, ..self }
    }

    /// Runs it. When `watch` stops it, the report covers the tasks that were finished by then.
    ///
    /// # Errors
    /// When a model or its tokenizer is not usable, the base cuts the tasks into other tokens, a task does not fit into the
    /// context, or the run was stopped before any task was finished.
    pub fn run(&self, watch: &dyn Watch) -> Result<TaskReport, EvalError> {
        let started = Instant::now();
        let opened = Opened::open(self.model, watch)?;
        let base = self.base.map(|base| Opened::open(base, watch)).transpose()?;
        self.tasks.tell(watch);
        let prepare = |opened: &Opened<'_>| -> Result<PreparedTasks, EvalError> {
            let tokenizer = opened.tokenizer(self.pre.as_deref(), watch)?;
            Ok(PreparedTasks::new(self.tasks, &tokenizer, self.llama_compat)?)
        };
        let prepared = prepare(&opened)?;
        if let Some(base) = &base {
            prepared.check_equal(&prepare(base)?)?;
        }
        let score = |opened: &Opened<'_>, stop: &Stop| -> Result<TaskScores, EvalError> {
            let trained = opened.model.hparams().n_ctx_train;
            if let Some(n_ctx) = self.options.n_ctx.filter(|&n_ctx| n_ctx > trained) {
                return Err(EvalError::LongTasks { file: opened.label(), n_ctx, trained });
            }
            score_model(opened, &prepared, &self.options, self.activations, watch, stop)
        };
        let (scores, base_scores) = until_stopped(watch, |stop| -> Result<_, EvalError> {
            let scores = score(&opened, stop)?;
            let base = base.as_ref().filter(|_| scores.is_complete());
            let base_scores = base.map(|base| score(base, stop)).transpose()?;
            Ok((scores, base_scores))
        })?;
        if scores.results().is_empty() {
            return Err(Interrupted.into());
        }
        let tokens = scores.tokens_run() + base_scores.as_ref().map_or(0, TaskScores::tokens_run);
        let seconds = started.elapsed().as_secs_f64();
        Ok(TaskReport {
            file: self.model.label().to_owned(),
            tasks_file: self.tasks.file().to_owned(),
            tasks_available: self.tasks.available(),
            summary: scores.summary(),
            base: self.base.map(|base| base.label().to_owned()),
            comparison: base_scores.as_ref().and_then(|base| scores.compare(base)),
            activations: self.activations.name(),
            llama_compat: self.llama_compat,
            size_bytes: self.model.file_bytes(),
            bits_per_weight: self.model.totals().bits_per_weight(),
            complete: scores.is_complete() && base_scores.as_ref().is_none_or(TaskScores::is_complete),
            tokens,
            seconds,
            tokens_per_second: tokens as f64 / seconds,
            peak_memory_bytes: os::peak_memory(),
            results: self.details.then(|| scores.results().to_vec()),
        })
    }
}

/// Scores one model. A run that was stopped gives what it has, with a warning.
pub(crate) fn score_model(
    opened: &Opened<'_>,
    tasks: &PreparedTasks,
    options: &TaskOptions,
    activations: Activations,
    watch: &dyn Watch,
    stop: &Stop,
) -> Result<TaskScores, EvalError> {
    let pass = opened.pass(activations, stop)?;
    let scores = score_tasks(&pass, tasks, options, watch).map_err(|error| {
        let error = EvalError::from(error);
        error.in_file(opened.label())
    })?;
    if !scores.is_complete() {
        let (label, done) = (opened.label(), scores.results().len());
        watch.warn(&format!("{label}: interrupted: the figures cover {done} of {} tasks", tasks.len()));
    }
    Ok(scores)
}

impl fmt::Display for TaskReport {
    fn fmt(&self, text: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(results) = &self.results {
            for result in results {
                writeln!(text, "{}", result_line(result))?;
            }
            writeln!(text)?;
        }
        let s = &self.summary;
        writeln!(
            text,
            "{}: {}, {} of {} tasks of {}",
            printable(&self.file),
            s.kind.name(),
            count(s.tasks as u64),
            count(self.tasks_available as u64),
            printable(&self.tasks_file)
        )?;
        let mut line = |name: &str, value: Option<f64>, error: Option<f64>, rest: &str| -> fmt::Result {
            let Some(value) = value else { return Ok(()) };
            let error = error.map_or_else(String::new, |error| format!(" ± {:.4}", 100.0 * error));
            writeln!(text, "{name:<22}{:>9.4}{error} %{rest}", 100.0 * value)
        };
        let interval = s.accuracy_interval.map_or_else(String::new, |[low, high]| {
            format!("  [{:.4}, {:.4}] (95%, Wilson)", 100.0 * low, 100.0 * high)
        });
        line("accuracy", s.accuracy, s.accuracy_error, &interval)?;
        line("normalised by bytes", s.accuracy_norm, s.accuracy_norm_error, "")?;
        line("random chance", s.random_chance, None, "")?;
        if let Some(c) = &self.comparison {
            line("base accuracy", Some(c.base_accuracy), c.base_accuracy_error, "")?;
            line("base, normalised", c.base_accuracy_norm, None, "")?;
            line("difference", Some(c.accuracy_difference), c.accuracy_difference_error, "  (paired)")?;
            line("recovery", c.recovery.map(|percent| percent / 100.0), None, "")?;
            line("recovery, normalised", c.recovery_norm.map(|percent| percent / 100.0), None, "")?;
            line("changed answers", Some(c.changed_answers), None, "")?;
        }
        let memory = peak_memory(self.peak_memory_bytes);
        let covered = if self.complete { "" } else { " (interrupted)" };
        writeln!(
            text,
            "{} tokens{covered}, {:.1} s, {:.0} tokens/s{memory}",
            count(self.tokens as u64),
            self.seconds,
            self.tokens_per_second
        )
    }
}

/// Number, right or wrong, answer chosen, scores of all.
fn result_line(result: &TaskResult) -> String {
    let scores: Vec<String> = result.scores.iter().map(|score| format!("{score:.6}")).collect();
    let verdict = if result.correct { "right" } else { "wrong" };
    format!("{:>6}  {verdict}  {:>2}  {}", result.task, result.chosen, scores.join("  "))
}
