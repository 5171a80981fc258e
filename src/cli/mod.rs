//! The command line: flags, output and exit codes. It parses, calls the library, and prints.
//!
//! Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 files that were asked
//! to be the same differ, 128 + n ended by signal n.

mod args;
mod bench;
mod compare;
mod convert;
mod dev;
mod dev_backward;
mod dev_forward;
mod diff;
mod doctor;
mod edit;
mod eval;
mod export;
mod extract;
mod hash;
mod imatrix;
mod inspect;
mod list;
mod manual;
mod measure;
mod merge;
mod output_name;
mod plan;
mod progress;
mod publish;
mod quantize;
mod split;
mod tokenize;

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use lwq::display::{binary_size, count, decimal_size, peak_memory, printable};
use lwq::progress::Interrupted;

/// Layer-wise quantization of language models in GGUF.
#[derive(Parser, Debug)]
#[command(name = "lwq", version, about, propagate_version = true)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

/// Flags that every command takes.
#[derive(Args, Debug, Clone, Default)]
struct Common {
    /// Threads to use [default: all cores]
    #[arg(long, short = 't', global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    threads: Option<u16>,
    /// Print nothing but results and errors
    #[arg(long, short, global = true)]
    quiet: bool,
    /// Print the result as one JSON object on stdout
    #[arg(long, global = true)]
    json: bool,
    /// Replace an output file that exists
    #[arg(long, global = true)]
    force: bool,
}

#[derive(Subcommand, Debug)]
enum Command {
    Convert(convert::ConvertArgs),
    Quantize(quantize::QuantizeArgs),
    Export(export::ExportArgs),
    Imatrix(imatrix::ImatrixArgs),
    Compare(compare::CompareArgs),
    Eval(eval::EvalArgs),
    Measure(measure::MeasureArgs),
    Plan(plan::PlanArgs),
    Publish(publish::PublishArgs),
    Inspect(inspect::InspectArgs),
    Split(split::SplitArgs),
    Merge(merge::MergeArgs),
    Hash(hash::HashArgs),
    Diff(diff::DiffArgs),
    Edit(edit::EditArgs),
    Extract(extract::ExtractArgs),
    Tokenize(tokenize::TokenizeArgs),
    List(list::ListArgs),
    /// Measure kernels against this machine's own peak
    Bench(bench::BenchArgs),
    Doctor(doctor::DoctorArgs),
    Completions(manual::CompletionsArgs),
    Man(manual::ManArgs),
    /// Raw access to the block formats, for tests
    #[command(hide = true)]
    Dev(dev::DevArgs),
}

/// Parses the command line, runs it and gives the exit code.
pub fn main() -> ExitCode {
    match Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report_error(&error),
    }
}

impl Cli {
    fn run(self) -> anyhow::Result<()> {
        lwq::cpu::check_environment()?;
        let common = &self.common;
        let positional = match &self.command {
            Command::Quantize(args) => args.threads(),
            _ => None,
        };
        if positional.is_some() && common.threads.is_some() {
            return Err(Usage("give the threads once: as NTHREADS or with --threads".to_owned()).into());
        }
        if let Some(threads) = common.threads.or(positional) {
            rayon::ThreadPoolBuilder::new().num_threads(threads.into()).build_global()?;
        }
        match &self.command {
            Command::Convert(args) => args.run(common),
            Command::Quantize(args) => args.run(common),
            Command::Export(args) => args.run(common),
            Command::Imatrix(args) => args.run(common),
            Command::Compare(args) => args.run(common),
            Command::Eval(args) => args.run(common),
            Command::Measure(args) => args.run(common),
            Command::Plan(args) => args.run(common),
            Command::Publish(args) => args.run(common),
            Command::Inspect(args) => args.run(common),
            Command::Split(args) => args.run(common),
            Command::Merge(args) => args.run(common),
            Command::Hash(args) => args.run(common),
            Command::Diff(args) => args.run(common),
            Command::Edit(args) => args.run(common),
            Command::Extract(args) => args.run(common),
            Command::Doctor(args) => args.run(common),
            Command::Tokenize(args) => args.run(common),
            Command::List(args) => args.run(common),
            Command::Bench(args) => bench::run(args, common),
            Command::Completions(args) => args.run(common),
            Command::Man(args) => args.run(common),
            Command::Dev(args) => dev::run(args, common),
        }
    }
}

impl Common {
    /// Whether outputs that exist may be replaced.
    fn replace(&self) -> lwq::atomic_file::Replace {
        if self.force { lwq::atomic_file::Replace::Yes } else { lwq::atomic_file::Replace::No }
    }

    /// Prints a line of information on stderr, unless `--quiet`.
    fn note(&self, line: impl AsRef<str>) {
        if !self.quiet {
            let _ = writeln!(io::stderr(), "{}", line.as_ref());
        }
    }

    /// Prints a warning on stderr, also with `--quiet`.
    fn warn(&self, line: impl AsRef<str>) {
        let _ = writeln!(io::stderr(), "warning: {}", line.as_ref());
    }

    /// Prints a result on stdout; a closed pipe ends the program quietly.
    fn result(&self, text: impl AsRef<str>) -> anyhow::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_ref().as_bytes())?;
        out.flush()?;
        Ok(())
    }

    /// Prints a value as one JSON object on stdout.
    fn result_json(&self, value: &impl serde::Serialize) -> anyhow::Result<()> {
        let mut text = serde_json::to_string_pretty(value)?;
        text.push('\n');
        self.result(text)
    }
}

/// Makes a folder and those above it, unless it is there.
fn make_folder(folder: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder).map_err(|error| {
        let folder = printable(&folder.display().to_string());
        anyhow::anyhow!("{folder}: the folder cannot be made: {error}; choose another or change the permissions")
    })
}

/// Wrong usage that the parser cannot see: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(String);

/// Prints an error as one line on stderr and gives the exit code: 0 for a closed pipe, 128 + n for a run that signal
/// n has stopped, which has said so itself, 3 for [`diff::Different`], which has been printed, 2 for [`Usage`], else 1.
fn report_error(error: &anyhow::Error) -> ExitCode {
    let closed_pipe = error
        .chain()
        .any(|cause| cause.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe));
    if closed_pipe {
        return ExitCode::SUCCESS;
    }
    if error.chain().any(|cause| cause.is::<Interrupted>()) {
        return ExitCode::from(lwq::interrupt::exit_code());
    }
    if error.is::<diff::Different>() {
        return ExitCode::from(3);
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
