//! `lwq eval hellaswag|winogrande|multiple-choice`: the share of tasks that a model answers rightly.

use std::fmt::Write as _;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use serde::Serialize;

use super::loaded::{ActivationsArg, Opened};
use crate::cli::{Common, Interrupted, Progress, Unit, count, decimal_size, printable};
use lwq::eval::tasks::{
    PreparedTasks, ReadOptions, TaskComparison, TaskFormat, TaskKind, TaskOptions, TaskResult, TaskScores, TaskSet,
    TaskSummary, score_tasks,
};
use lwq::model::{Model, Overrides};
use lwq::os;

/// Tasks of HellaSwag that llama-perplexity scores unless told otherwise.
const LLAMA_HELLASWAG_TASKS: usize = 400;

/// Choose the right one of four endings
///
/// TASKS is llama-perplexity's text (six lines a task: context, index of the right ending, four endings) or JSON
/// lines with `context`, `endings` and `label`. An ending is judged by the mean log-probability of its tokens after
/// those that all four share; `accuracy_norm` by log-probability per byte of the ending.
#[derive(Args, Debug)]
pub struct HellaswagArgs {
    #[command(flatten)]
    tasks: TaskArgs,
}

/// Choose the word that fits the gap in a sentence
///
/// TASKS is llama-perplexity's CSV (index,sentence,choice 1,choice 2,answer) or JSON lines with `sentence`,
/// `option1`, `option2` and `answer`. A choice is judged by the mean log-probability of what follows it.
#[derive(Args, Debug)]
pub struct WinograndeArgs {
    #[command(flatten)]
    tasks: TaskArgs,
}

/// Choose the right answer to a question (ARC, MMLU, TruthfulQA)
///
/// TASKS is llama-perplexity's binary file or JSON lines with `question`, `choices` and `answer` (index from 0). An
/// answer is judged by the mean log-probability of its tokens after those that all answers share; `accuracy_norm`
/// by log-probability per byte of the answer.
#[derive(Args, Debug)]
pub struct MultipleChoiceArgs {
    #[command(flatten)]
    tasks: TaskArgs,
}

/// What the three commands take.
#[derive(Args, Debug)]
struct TaskArgs {
    /// Model to score: a GGUF file, or the first file of a split one
    model: PathBuf,
    /// File of tasks
    #[arg(value_name = "TASKS")]
    file: PathBuf,
    /// Score a second model, and print what MODEL recovers of its accuracy
    #[arg(long, value_name = "MODEL")]
    base: Option<PathBuf>,
    /// Draw N of the tasks at random [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    tasks: Option<u32>,
    /// Seed of the draw
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u32,
    /// Repeat llama-perplexity's choice of tasks (HellaSwag: 400 unless --tasks is given), its arithmetic and its
    /// defects
    #[arg(long, conflicts_with = "seed")]
    llama_compat: bool,
    /// Form of TASKS
    #[arg(long, value_enum, default_value = "auto")]
    format: FormatArg,
    /// Refuse tasks that need more tokens [default: the model's context]
    #[arg(long, short = 'c', value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    ctx: Option<u32>,
    /// Rounding of the inputs of products
    #[arg(long, value_enum, default_value = "f32")]
    activations: ActivationsArg,
    /// Use this pre-tokenizer instead of the one in the file
    #[arg(long, value_name = "NAME")]
    pre: Option<String>,
    /// Memory for activations, such as 2G [default: half of what is free]
    #[arg(long, value_name = "SIZE", value_parser = lwq::gguf::split::parse_size)]
    memory: Option<u64>,
    /// List every task with its scores
    #[arg(long)]
    details: bool,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum FormatArg {
    /// Look at the file
    Auto,
    /// llama-perplexity's form
    Llama,
    /// One JSON object a line
    Jsonl,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    file: String,
    tasks_file: String,
    tasks_available: usize,
    #[serde(flatten)]
    summary: TaskSummary,
    #[serde(skip_serializing_if = "Option::is_none")]
    base: Option<String>,
    #[serde(flatten)]
    comparison: Option<TaskComparison>,
    activations: &'static str,
    llama_compat: bool,
    size_bytes: u64,
    bits_per_weight: f64,
    complete: bool,
    tokens: usize,
    seconds: f64,
    tokens_per_second: f64,
    peak_memory_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    results: Option<&'a [TaskResult]>,
}

impl HellaswagArgs {
    pub(super) fn run(&self, common: &Common) -> Result<()> {
        self.tasks.run(TaskKind::HellaSwag, common)
    }
}

impl WinograndeArgs {
    pub(super) fn run(&self, common: &Common) -> Result<()> {
        self.tasks.run(TaskKind::WinoGrande, common)
    }
}

impl MultipleChoiceArgs {
    pub(super) fn run(&self, common: &Common) -> Result<()> {
        self.tasks.run(TaskKind::MultipleChoice, common)
    }
}

impl TaskArgs {
    fn run(&self, kind: TaskKind, common: &Common) -> Result<()> {
        let started = Instant::now();
        let opened = Opened::open(&self.model)?;
        let model = opened.model()?;
        let base = self.base.as_deref().map(Opened::open).transpose()?;
        let base_model = base.as_ref().map(Opened::model).transpose()?;
        let set = self.read(kind)?;
        set.warnings().iter().for_each(|line| common.warn(printable(line)));
        let tokenizer = opened.tokenizer(&model, self.pre.as_deref(), common)?;
        let prepared = PreparedTasks::new(&set, &tokenizer, self.llama_compat)?;
        if let (Some(base), Some(base_model)) = (&base, &base_model) {
            let tokenizer = base.tokenizer(base_model, self.pre.as_deref(), common)?;
            prepared.check_equal(&PreparedTasks::new(&set, &tokenizer, self.llama_compat)?)?;
        }
        let mut spent = 0;
        let mut score = |opened: &Opened, model: &Model<'_>| -> Result<TaskScores> {
            if let Some(ctx) = self.ctx {
                let trained = model.hparams().n_ctx_train;
                let label = opened.label();
                ensure!(
                    ctx as usize <= trained,
                    "{label}: --ctx {ctx} is longer than the model's context of {trained}"
                );
            }
            let options = TaskOptions { n_ctx: self.ctx.map(|n| n as usize), memory: self.memory };
            let (scores, tokens) = score(opened, model, &prepared, &options, self.activations, common)?;
            spent += tokens;
            Ok(scores)
        };
        let scores = score(&opened, &model)?;
        if scores.results().is_empty() {
            return Err(Interrupted.into());
        }
        let base_scores = match (&base, &base_model) {
            (Some(base), Some(base_model)) if scores.is_complete() => Some(score(base, base_model)?),
            _ => None,
        };
        let complete = scores.is_complete() && base_scores.as_ref().is_none_or(TaskScores::is_complete);
        os::end_on_interrupt();
        let seconds = started.elapsed().as_secs_f64();
        let report = Report {
            file: self.model.display().to_string(),
            tasks_file: self.file.display().to_string(),
            tasks_available: set.available(),
            summary: scores.summary(),
            base: self.base.as_ref().map(|path| path.display().to_string()),
            comparison: base_scores.as_ref().and_then(|base| scores.compare(base)),
            activations: self.activations.name(),
            llama_compat: self.llama_compat,
            size_bytes: opened.size_bytes(),
            bits_per_weight: opened.bits_per_weight(),
            complete,
            tokens: spent,
            seconds,
            tokens_per_second: spent as f64 / seconds,
            peak_memory_bytes: os::peak_memory(),
            results: self.details.then(|| scores.results()),
        };
        if common.json {
            common.result_json(&report)?;
        } else {
            common.note(self.activations.describe());
            common.result(report.text())?;
        }
        if complete { Ok(()) } else { Err(Interrupted.into()) }
    }

    fn read(&self, kind: TaskKind) -> Result<TaskSet> {
        let mut tasks = self.tasks.map(|n| n as usize);
        if self.llama_compat && kind == TaskKind::HellaSwag {
            tasks = tasks.or(Some(LLAMA_HELLASWAG_TASKS));
        }
        let options = ReadOptions {
            format: match self.format {
                FormatArg::Auto => None,
                FormatArg::Llama => Some(TaskFormat::Llama),
                FormatArg::Jsonl => Some(TaskFormat::JsonLines),
            },
            tasks,
            seed: self.seed,
            llama_compat: self.llama_compat,
        };
        Ok(TaskSet::read(&self.file, kind, &options)?)
    }
}

/// Scores one model; gives the tokens that it took, too. An interrupted run gives what it has, with a warning.
pub fn score(
    opened: &Opened,
    model: &Model<'_>,
    tasks: &PreparedTasks,
    options: &TaskOptions,
    activations: ActivationsArg,
    common: &Common,
) -> Result<(TaskScores, usize)> {
    let pass = model.pass(activations.forward(), Overrides::new())?;
    let progress = Progress::new(common, "answering", tasks.total_tokens() as u64, Unit::Tokens);
    let mut spent = 0;
    let scores = score_tasks(&pass, tasks, options, |tokens, so_far| {
        spent += tokens;
        let done = so_far.results().len();
        let right = so_far.results().iter().filter(|result| result.correct).count();
        progress.advance(tokens as u64, &format!("task {done} of {}, {right} right", tasks.len()));
        ControlFlow::Continue(())
    })
    .with_context(|| opened.label())?;
    progress.finish();
    if !scores.is_complete() {
        let label = opened.label();
        common.warn(format!(
            "{label}: interrupted: the figures cover {} of {} tasks",
            scores.results().len(),
            tasks.len()
        ));
    }
    Ok((scores, spent))
}

impl Report<'_> {
    fn text(&self) -> String {
        let mut text = String::new();
        if let Some(results) = self.results {
            for result in results {
                let _ = writeln!(text, "{}", result_line(result));
            }
            text.push('\n');
        }
        let s = &self.summary;
        let _ = writeln!(
            text,
            "{}: {}, {} of {} tasks of {}",
            printable(&self.file),
            s.kind.name(),
            count(s.tasks as u64),
            count(self.tasks_available as u64),
            printable(&self.tasks_file)
        );
        let mut line = |name: &str, value: Option<f64>, error: Option<f64>, rest: &str| {
            if let Some(value) = value {
                let error = error.map_or_else(String::new, |error| format!(" ± {:.4}", 100.0 * error));
                let _ = writeln!(text, "{name:<22}{:>9.4}{error} %{rest}", 100.0 * value);
            }
        };
        let interval = s.accuracy_interval.map_or_else(String::new, |[low, high]| {
            format!("  [{:.4}, {:.4}] (95%, Wilson)", 100.0 * low, 100.0 * high)
        });
        line("accuracy", s.accuracy, s.accuracy_error, &interval);
        line("normalised by bytes", s.accuracy_norm, s.accuracy_norm_error, "");
        line("random chance", s.random_chance, None, "");
        if let Some(c) = &self.comparison {
            line("base accuracy", Some(c.base_accuracy), c.base_accuracy_error, "");
            line("base, normalised", c.base_accuracy_norm, None, "");
            line("difference", Some(c.accuracy_difference), c.accuracy_difference_error, "  (paired)");
            line("recovery", c.recovery.map(|percent| percent / 100.0), None, "");
            line("recovery, normalised", c.recovery_norm.map(|percent| percent / 100.0), None, "");
            line("changed answers", Some(c.changed_answers), None, "");
        }
        let memory = self.peak_memory_bytes.map_or_else(String::new, |m| format!(", peak memory {}", decimal_size(m)));
        let covered = if self.complete { "" } else { " (interrupted)" };
        let _ = writeln!(
            text,
            "{} tokens{covered}, {:.1} s, {:.0} tokens/s{memory}",
            count(self.tokens as u64),
            self.seconds,
            self.tokens_per_second
        );
        text
    }
}

/// Number, right or wrong, answer chosen, scores of all.
fn result_line(result: &TaskResult) -> String {
    let scores: Vec<String> = result.scores.iter().map(|score| format!("{score:.6}")).collect();
    let verdict = if result.correct { "right" } else { "wrong" };
    format!("{:>6}  {verdict}  {:>2}  {}", result.task, result.chosen, scores.join("  "))
}
