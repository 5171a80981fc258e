//! `lwq imatrix`: collecting importance, and merging, converting and describing its files.

mod collect;
mod convert;
mod merge;
mod stats;
mod writing;

use anyhow::Result;
use clap::{Args, Subcommand};

use super::Common;

/// Score every weight column of a model on calibration text
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct ImatrixArgs {
    #[command(flatten)]
    collect: collect::CollectArgs,
    #[command(subcommand)]
    command: Option<ImatrixCommand>,
}

/// What can be done with finished files.
#[derive(Subcommand, Debug)]
enum ImatrixCommand {
    Merge(merge::MergeArgs),
    Convert(convert::ConvertArgs),
    Stats(stats::StatsArgs),
}

impl ImatrixArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// When a file cannot be read, does not fit the others, or cannot be written.
    pub fn run(&self, common: &Common) -> Result<()> {
        match &self.command {
            Some(ImatrixCommand::Merge(args)) => args.run(common),
            Some(ImatrixCommand::Convert(args)) => args.run(common),
            Some(ImatrixCommand::Stats(args)) => args.run(common),
            None => self.collect.run(common),
        }
    }
}
