//! `lwq eval hellaswag|winogrande|multiple-choice`: the share of tasks that a model answers rightly.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;

use crate::cli::Common;

/// Choose the right one of four endings
#[derive(Args, Debug)]
pub struct HellaswagArgs {
    #[command(flatten)]
    tasks: TaskArgs,
}

/// Choose the word that fits the sentence
#[derive(Args, Debug)]
pub struct WinograndeArgs {
    #[command(flatten)]
    tasks: TaskArgs,
}

/// Choose the right answer to a question (ARC, MMLU, TruthfulQA)
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
    tasks: PathBuf,
}

impl HellaswagArgs {
    pub(super) fn run(&self, common: &Common) -> Result<()> {
        self.tasks.run(common)
    }
}

impl WinograndeArgs {
    pub(super) fn run(&self, common: &Common) -> Result<()> {
        self.tasks.run(common)
    }
}

impl MultipleChoiceArgs {
    pub(super) fn run(&self, common: &Common) -> Result<()> {
        self.tasks.run(common)
    }
}

impl TaskArgs {
    fn run(&self, _common: &Common) -> Result<()> {
        bail!("{}: tasks of {} cannot be scored yet", self.model.display(), self.tasks.display())
    }
}
