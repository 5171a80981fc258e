//! The `lwq` command: parse, run, map the outcome to an exit code.

#![allow(unreachable_pub)] // nobody reaches into a program

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    lwq::os::keep_freed_memory();
    lwq::interrupt::install_handlers();
    cli::main()
}
