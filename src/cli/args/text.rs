//! The text that models predict.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use lwq::eval::TextOptions;
use lwq::model::Activations;
use lwq::text::{Set, Text};

use super::ModelArgs;
use crate::cli::Common;

/// Flags of every run over a text.
#[derive(Args, Debug)]
pub struct TextArgs {
    /// Text to predict; repeatable [default: a built-in text]
    #[arg(long, short, value_name = "TEXT")]
    pub file: Vec<PathBuf>,
    /// Tokens per window [default: 512, or the model's context if that is shorter]
    #[arg(long, short = 'c', value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(4..=1 << 24))]
    ctx: Option<u32>,
    /// Score at most this many windows; several texts take turns
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    chunks: Option<u32>,
    /// Score the predictions of a window from this position on [default: half the window]
    #[arg(long, value_name = "POSITION", value_parser = clap::value_parser!(u32).range(..1 << 24))]
    score_from: Option<u32>,
    /// Keep scored windows in this file: a run that finds it goes on where another stopped, and runs only the models
    /// that are new
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
}

impl TextArgs {
    /// The files, or the built-in text with a note that says so.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn read(&self, common: &Common) -> Result<Text> {
        let text = Text::read_or(&self.file, Set::Evaluation, &common.watch())?;
        if self.file.is_empty() {
            common.note(format!("text: {}", text.name()));
        }
        Ok(text)
    }

    /// What the library takes.
    pub fn options(&self, activations: impl Into<Activations>) -> TextOptions {
        TextOptions {
            n_ctx: self.ctx.map(|n| n as usize),
            chunks: self.chunks.map(|n| n as usize),
            score_from: self.score_from.map(|n| n as usize),
            activations: activations.into(),
            pre: self.model.pre.clone(),
            memory: self.model.memory,
            state: self.state.clone(),
        }
    }
}
