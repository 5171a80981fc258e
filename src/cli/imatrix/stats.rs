//! `lwq imatrix stats`.

use std::fmt::Write as _;
use std::io::{self, IsTerminal};
use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, ValueEnum};
use serde::Serialize;

use super::writing::{Warnings, json_name, printable_lines};
use crate::cli::{Common, count};
use lwq::imatrix::{HeatmapStyle, Imatrix, ImatrixStats, SortBy, heatmap};
use lwq::os::terminal_width;

/// Show statistics per tensor and layer, and a heat map
#[derive(Args, Debug)]
pub struct StatsArgs {
    /// File to read, GGUF or .dat
    #[arg(value_name = "IMATRIX")]
    input: PathBuf,
    /// Order of the tensors
    #[arg(long, value_enum, default_value_t = SortArg::Importance)]
    sort: SortArg,
}

/// Orders as flags name them.
#[derive(ValueEnum, Clone, Copy, Debug)]
pub enum SortArg {
    /// Largest sum of mean squares first
    Importance,
    /// By tensor role, then by importance, as llama-imatrix does
    Role,
    /// By layer, then by role
    Layer,
}

impl From<SortArg> for SortBy {
    fn from(sort: SortArg) -> SortBy {
        match sort {
            SortArg::Importance => SortBy::Importance,
            SortArg::Role => SortBy::Role,
            SortArg::Layer => SortBy::Layer,
        }
    }
}

/// Width of the heat map where there is no terminal to fit it to.
const PIPED_WIDTH: usize = 120;

/// What `stats --json` prints.
#[derive(Debug, Serialize)]
struct StatsReport<'a> {
    file: String,
    format: &'static str,
    entries: usize,
    chunk_count: Option<u32>,
    chunk_size: Option<u32>,
    datasets: &'a [String],
    #[serde(flatten)]
    stats: &'a ImatrixStats,
}

impl StatsArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn run(&self, common: &Common) -> Result<()> {
        let imatrix = Imatrix::open(&self.input)?;
        let mut warnings = Warnings { common, lines: Vec::new() };
        warnings.add_of_file(&self.input, &imatrix.warnings);
        let stats = ImatrixStats::new(&imatrix, self.sort.into());
        let file = self.input.display().to_string();
        if common.json {
            return common.result_json(&StatsReport {
                file,
                format: json_name(imatrix.form),
                entries: imatrix.entries.len(),
                chunk_count: imatrix.chunk_count,
                chunk_size: imatrix.chunk_size,
                datasets: &imatrix.datasets,
                stats: &stats,
            });
        }
        let terminal = io::stdout().is_terminal();
        let color = terminal
            && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty())
            && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        let style = HeatmapStyle { width: terminal_width().unwrap_or(PIPED_WIDTH), color };
        let mut text = summary(&file, &imatrix);
        let _ = write!(text, "{stats}");
        let map = heatmap(&stats, style);
        if !map.is_empty() {
            let _ = write!(text, "\n{map}");
        }
        common.result(text)
    }
}

fn summary(file: &str, imatrix: &Imatrix) -> String {
    let mut text = format!("{file}: {}, {} entries", imatrix.form.name(), count(imatrix.entries.len() as u64));
    if let Some(chunks) = imatrix.chunk_count {
        let _ = write!(text, ", {} chunks", count(chunks.into()));
    }
    if let Some(size) = imatrix.chunk_size {
        let _ = write!(text, " of {size} tokens");
    }
    if let Some(dataset) = imatrix.datasets.first() {
        let _ = write!(text, ", from {dataset}");
    }
    if imatrix.datasets.len() > 1 {
        let _ = write!(text, " and {} more", imatrix.datasets.len() - 1);
    }
    text.push('\n');
    printable_lines(&text)
}
