//! `lwq doctor`: what this machine offers, what is chosen of it, and how fast it is.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;

use super::Common;
use lwq::bench::Doctor;

/// Show what this machine offers, which kernels are chosen and why, and their speed against its peak
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  lwq doctor\n  lwq doctor --folder /models --json\n  LWQ_ISA=avx2 lwq doctor --seconds 1"
)]
pub struct DoctorArgs {
    /// Folder whose disk is looked at; may be given more than once [default: the current one and the temporary one]
    #[arg(long, value_name = "DIR")]
    folder: Vec<PathBuf>,
    /// Seconds that measuring may take, about; 0 measures nothing
    #[arg(long, value_name = "SECONDS", default_value_t = 3, value_parser = clap::value_parser!(u32).range(0..=600))]
    seconds: u32,
}

impl DoctorArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// When threads cannot be started or stdout cannot be written.
    pub fn run(&self, common: &Common) -> Result<()> {
        let temporary = std::env::temp_dir();
        let folders: Vec<&Path> = match self.folder.is_empty() {
            true => vec![Path::new("."), &temporary],
            false => self.folder.iter().map(PathBuf::as_path).collect(),
        };
        let doctor =
            Doctor { folders: &folders, threads: rayon::current_num_threads(), seconds: f64::from(self.seconds) };
        let report = doctor.run(&common.watch())?;
        if common.json { common.result_json(&report) } else { common.result(report.to_string()) }
    }
}
