//! The command line: flags, output and exit codes. Nothing outside this module prints or knows clap.
//!
//! Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 128 + n ended by
//! signal n.

mod bench;
mod compare;
mod convert;
mod dev;
mod dev_forward;
mod eval;
mod format;
mod imatrix;
mod inspect;
mod measure;
mod plan;
mod progress;
mod quantize;
mod rounding;
mod tokenize;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

pub use format::{binary_size, count, decimal_size, printable};
pub use progress::{Progress, Unit};

/// Layer-wise quantization of language models in GGUF.
#[derive(Parser, Debug)]
#[command(name = "lwq", version, about, propagate_version = true)]
pub struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

/// Flags that every command takes.
#[derive(Args, Debug, Clone, Default)]
pub struct Common {
    /// Threads to use [default: all cores]
    #[arg(long, short = 't', global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub threads: Option<u16>,
    /// Print nothing but results and errors
    #[arg(long, short, global = true)]
    pub quiet: bool,
    /// Print the result as one JSON object on stdout
    #[arg(long, global = true)]
    pub json: bool,
    /// Replace an output file that exists
    #[arg(long, global = true)]
    pub force: bool,
}

#[derive(Subcommand, Debug)]
enum Command {
    Convert(convert::ConvertArgs),
    Quantize(quantize::QuantizeArgs),
    Imatrix(imatrix::ImatrixArgs),
    Compare(compare::CompareArgs),
    Eval(eval::EvalArgs),
    Measure(measure::MeasureArgs),
    Plan(plan::PlanArgs),
    Inspect(inspect::InspectArgs),
    Tokenize(tokenize::TokenizeArgs),
    /// Measure kernels against this machine's own peak
    Bench(bench::BenchArgs),
    /// Raw access to the block formats, for tests
    #[command(hide = true)]
    Dev(dev::DevArgs),
}

impl Cli {
    /// Runs the command that was parsed.
    ///
    /// # Errors
    /// Whatever the command reports; [`report_error`] turns it into a line and an exit code.
    pub fn run(self) -> anyhow::Result<()> {
        lwq::cpu::check_environment()?;
        let common = &self.common;
        if let Some(threads) = common.threads {
            rayon::ThreadPoolBuilder::new().num_threads(threads.into()).build_global()?;
        }
        match &self.command {
            Command::Convert(args) => args.run(common),
            Command::Quantize(args) => args.run(common),
            Command::Imatrix(args) => args.run(common),
            Command::Compare(args) => args.run(common),
            Command::Eval(args) => args.run(common),
            Command::Measure(args) => args.run(common),
            Command::Plan(args) => args.run(common),
            Command::Inspect(args) => args.run(common),
            Command::Tokenize(args) => args.run(common),
            Command::Bench(args) => bench::run(args, common),
            Command::Dev(args) => dev::run(args, common),
        }
    }
}

impl Common {
    /// Number of worker threads: the flag, or every core.
    pub fn thread_count(&self) -> usize {
        match self.threads {
            Some(n) => n.into(),
            None => std::thread::available_parallelism().map_or(1, Into::into),
        }
    }

    /// Prints a line of information on stderr, unless `--quiet`.
    pub fn note(&self, line: impl AsRef<str>) {
        if !self.quiet {
            let _ = writeln!(io::stderr(), "{}", line.as_ref());
        }
    }

    /// Prints a warning on stderr, also with `--quiet`.
    pub fn warn(&self, line: impl AsRef<str>) {
        let _ = writeln!(io::stderr(), "warning: {}", line.as_ref());
    }

    /// Prints a result on stdout.
    ///
    /// # Errors
    /// When stdout cannot be written; a closed pipe ends the program quietly.
    pub fn result(&self, text: impl AsRef<str>) -> anyhow::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_ref().as_bytes())?;
        out.flush()?;
        Ok(())
    }

    /// Prints a value as one JSON object on stdout.
    ///
    /// # Errors
    /// As [`Common::result`].
    pub fn result_json(&self, value: &impl serde::Serialize) -> anyhow::Result<()> {
        let mut text = serde_json::to_string_pretty(value)?;
        text.push('\n');
        self.result(text)
    }
}

/// A run that was interrupted after it printed what it had: exit code 130 and no line of its own.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Wrong usage that the parser cannot see: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// Prints an error as one line on stderr and gives the exit code: 0 for a closed pipe, 130 for [`Interrupted`],
/// 2 for [`Usage`], else 1.
pub fn report_error(error: &anyhow::Error) -> ExitCode {
    let closed_pipe = error
        .chain()
        .any(|cause| cause.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe));
    if closed_pipe {
        return ExitCode::SUCCESS;
    }
    if error.is::<Interrupted>() {
        return ExitCode::from(130);
    }
    // Contexts and sources in one line; some sources repeat themselves in their parents' text.
    let mut line = String::new();
    for cause in error.chain() {
        let text = printable(&cause.to_string());
        if line.is_empty() {
            line = text;
        } else if !line.contains(&text) {
            line = format!("{line}: {text}");
        }
    }
    let _ = writeln!(io::stderr(), "error: {line}");
    if error.is::<Usage>() { ExitCode::from(2) } else { ExitCode::FAILURE }
}
