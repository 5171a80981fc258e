//! The `lwq` command: parse, run, map the outcome to an exit code.

use std::process::ExitCode;

use clap::Parser;
use lwq::cli::{Cli, report_error};

fn main() -> ExitCode {
    lwq::os::install_signal_handlers();
    let cli = Cli::parse();
    match cli.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report_error(&error),
    }
}
