//! The `lwq` command: parse, run, map the outcome to an exit code.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    lwq::os::install_signal_handlers();
    cli::main()
}
