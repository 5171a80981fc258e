//! `lwq completions` and `lwq man`, and the command reference: all from the definitions of the flags.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, Common, make_folder, printable};

/// Print a script that completes commands and flags in a shell
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  lwq completions bash > ~/.local/share/bash-completion/completions/lwq")]
pub struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

/// Write manual pages, one a command
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  lwq man ~/.local/share/man/man1")]
pub struct ManArgs {
    /// Folder to write to; made if it does not exist
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

impl CompletionsArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// When stdout cannot be written.
    pub fn run(&self, common: &Common) -> Result<()> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "lwq", &mut script);
        common.result(String::from_utf8_lossy(&script))
    }
}

impl ManArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// When a page cannot be written.
    pub fn run(&self, common: &Common) -> Result<()> {
        let context = || printable(&self.folder.display().to_string());
        make_folder(&self.folder)?;
        clap_mangen::generate_to(Cli::command(), &self.folder).with_context(context)?;
        common.note(format!("manual pages written to {}", context()));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The reference, and how to bring it up to date.
    const REFERENCE: &str = "docs/reference/cli.md";

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_command_reference_is_what_the_flags_say() {
        let options = clap_markdown::MarkdownOptions::new().title("Commands".to_owned()).show_footer(false);
        let made = clap_markdown::help_markdown_command_custom(&Cli::command(), &options);
        // Versions and defaults that a machine decides stay out of it.
        let made = made.lines().map(str::trim_end).collect::<Vec<_>>().join("\n") + "\n";
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(REFERENCE);
        if std::env::var_os("LWQ_UPDATE").is_some() {
            std::fs::write(&path, &made).unwrap();
        }
        let found = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(found == made, "{REFERENCE} is not what the flags say: run LWQ_UPDATE=1 cargo test command_reference");
    }
}
