//! `lwq eval hellaswag|winogrande|multiple-choice`: the share of tasks that a model answers rightly.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, ValueEnum};

use crate::cli::Common;
use crate::cli::args::{ActivationsArg, ModelArgs};
use lwq::eval::TaskRequest;
use lwq::eval::tasks::{ReadOptions, TaskFormat, TaskKind, TaskOptions, TaskSet};
use lwq::gguf::Gguf;
use lwq::model::Activations;
use lwq::progress::Interrupted;

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
    #[command(flatten)]
    loading: ModelArgs,
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
        let model = Gguf::open(&self.model)?;
        let base = self.base.as_deref().map(Gguf::open).transpose()?;
        let set = self.read(kind)?;
        let n_ctx = self.ctx.map(|n| n as usize);
        let report = TaskRequest::new(&model, &set)
            .base(base.as_ref())
            .options(TaskOptions { n_ctx, memory: self.loading.memory })
            .activations(self.activations.into())
            .pre(self.loading.pre.clone())
            .llama_compat(self.llama_compat)
            .details(self.details)
            .run(&common.watch())?;
        if common.json {
            common.result_json(&report)?;
        } else {
            common.note(Activations::from(self.activations).describe());
            common.result(report.to_string())?;
        }
        if report.complete { Ok(()) } else { Err(Interrupted.into()) }
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
