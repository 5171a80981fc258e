//! `lwq eval`: scores of models.

mod kld;
mod ppl;
mod tasks;

use anyhow::Result;
use clap::{Args, Subcommand};

use super::Common;

/// Measure how good a model is
#[derive(Args, Debug)]
pub struct EvalArgs {
    #[command(subcommand)]
    command: EvalCommand,
}

#[derive(Subcommand, Debug)]
enum EvalCommand {
    Ppl(ppl::PplArgs),
    Kld(kld::KldArgs),
    Hellaswag(tasks::HellaswagArgs),
    Winogrande(tasks::WinograndeArgs),
    MultipleChoice(tasks::MultipleChoiceArgs),
}

impl EvalArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// When a model or an input is not usable, or the evaluation fails.
    pub fn run(&self, common: &Common) -> Result<()> {
        match &self.command {
            EvalCommand::Ppl(args) => args.run(common),
            EvalCommand::Kld(args) => args.run(common),
            EvalCommand::Hellaswag(args) => args.run(common),
            EvalCommand::Winogrande(args) => args.run(common),
            EvalCommand::MultipleChoice(args) => args.run(common),
        }
    }
}
