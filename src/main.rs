//! The `lwq` command: parse, run, map the outcome to an exit code.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    lwq::interrupt::install_handlers();
    cli::main()
}
