//! `lwq bench`: what this machine can do, and how much of it the kernels use.

mod kernels;
mod quantize;

use clap::{Args, Subcommand};

use super::Common;

/// Arguments of `lwq bench`.
#[derive(Args, Debug)]
pub struct BenchArgs {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(Subcommand, Debug)]
enum BenchCommand {
    /// Matrix products of the forward pass, as shares of the machine's own peak
    Kernels(kernels::KernelsArgs),
    /// Encoders and decoders of every type, as shares of the speed of a copy
    Quantize(quantize::CodecsArgs),
}

/// Runs `lwq bench`.
///
/// # Errors
/// When a type cannot be measured or stdout cannot be written.
pub fn run(args: &BenchArgs, common: &Common) -> anyhow::Result<()> {
    match &args.command {
        BenchCommand::Kernels(args) => kernels::run(args, common),
        BenchCommand::Quantize(args) => quantize::run(args, common),
    }
}
