//! `lwq imatrix`: collecting importance, and merging, converting and describing its files.

mod collect;

use std::fmt::Write as _;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;

use super::{Common, count, printable};
use lwq::atomic_file::check_target;
use lwq::imatrix::{
    DEFAULT_CHUNK_SIZE, Form, HeatmapStyle, Imatrix, ImatrixStats, MergeOptions, Merger, SortBy, TensorStats, Warning,
    heatmap, stored_chunk_size,
};
use lwq::os::{same_file, terminal_width};

/// Score every weight column of a model on calibration text
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct ImatrixArgs {
    #[command(flatten)]
    collect: collect::CollectArgs,
    #[command(subcommand)]
    command: Option<ImatrixCommand>,
}

/// What can be done with finished files.
#[derive(Subcommand, Debug)]
pub enum ImatrixCommand {
    Merge(MergeArgs),
    Convert(ConvertArgs),
    Stats(StatsArgs),
}

/// Add up importance matrices of one model, such as the shards of a run
#[derive(Args, Debug)]
pub struct MergeArgs {
    /// Files to add up, GGUF or .dat
    #[arg(required = true, value_name = "IMATRIX")]
    inputs: Vec<PathBuf>,
    /// File to write
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    writing: WritingArgs,
}

/// Rewrite an importance matrix in the other form
#[derive(Args, Debug)]
pub struct ConvertArgs {
    /// File to read, GGUF or .dat
    #[arg(value_name = "IMATRIX")]
    input: PathBuf,
    /// File to write
    output: PathBuf,
    #[command(flatten)]
    writing: WritingArgs,
}

/// How a file is written.
#[derive(Args, Debug)]
pub struct WritingArgs {
    /// Form of the output [default: dat if its name ends in .dat, else gguf]
    #[arg(long, value_enum)]
    format: Option<FormatArg>,
    /// Tokens per chunk of .dat inputs, which do not store it [default: as the GGUF inputs, else 512]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    chunk_size: Option<u32>,
}

/// File forms as flags name them.
#[derive(ValueEnum, Clone, Copy, Debug)]
pub enum FormatArg {
    /// Sums and token counts, per expert
    Gguf,
    /// The older binary form
    Dat,
}

impl WritingArgs {
    fn form(&self, output: &Path) -> Form {
        match self.format {
            Some(FormatArg::Gguf) => Form::Gguf,
            Some(FormatArg::Dat) => Form::Dat,
            None => Form::of_name(output),
        }
    }
}

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

impl ImatrixArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// When a file cannot be read, does not fit the others, or cannot be written.
    pub fn run(&self, common: &Common) -> Result<()> {
        match &self.command {
            Some(ImatrixCommand::Merge(args)) => args.run(common),
            Some(ImatrixCommand::Convert(args)) => args.run(common),
            Some(ImatrixCommand::Stats(args)) => args.run(common),
            None => self.collect.run(common),
        }
    }
}

/// What `merge` and `convert` report.
#[derive(Debug, Serialize)]
struct Written<'a> {
    output: String,
    format: &'static str,
    inputs: Vec<String>,
    entries: usize,
    chunk_count: Option<u32>,
    chunk_size: Option<u32>,
    datasets: &'a [String],
    warnings: Vec<String>,
}

/// Collects warnings for the report and prints each at once.
struct Warnings<'a> {
    common: &'a Common,
    lines: Vec<String>,
}

impl Warnings<'_> {
    fn add(&mut self, warnings: impl IntoIterator<Item = Warning>) {
        self.add_lines(warnings.into_iter().map(|warning| warning.to_string()));
    }

    fn add_of_file(&mut self, file: &Path, warnings: &[Warning]) {
        self.add_lines(warnings.iter().map(|warning| format!("{}: {warning}", file.display())));
    }

    fn add_lines(&mut self, lines: impl Iterator<Item = String>) {
        for line in lines {
            let line = printable(&line);
            self.common.warn(&line);
            self.lines.push(line);
        }
    }
}

/// Refuses an output that would overwrite an input, even with `--force`: an interrupted merge of many hours of
/// shards must leave all of them.
fn check_output(output: &Path, inputs: &[PathBuf], common: &Common) -> Result<()> {
    if let Some(input) = inputs.iter().find(|input| same_file(input, output)) {
        bail!("{}: is also an input ({}); choose another name for the output", output.display(), input.display());
    }
    Ok(check_target(output, common.force)?)
}

/// Tokens per call of legacy inputs: as told, else as the first GGUF input has it.
fn legacy_chunk_size(writing: &WritingArgs, inputs: &[PathBuf]) -> u32 {
    let stored = || inputs.iter().find_map(|input| stored_chunk_size(input));
    writing.chunk_size.or_else(stored).unwrap_or(DEFAULT_CHUNK_SIZE)
}

fn report(common: &Common, written: &Written<'_>) -> Result<()> {
    if common.json {
        return common.result_json(written);
    }
    let mut text = format!("{}: {} entries", written.output, count(written.entries as u64));
    match (written.chunk_count, written.chunk_size) {
        (Some(chunks), Some(size)) => {
            let _ = write!(text, ", {} chunks of {size} tokens", count(chunks.into()));
        }
        (Some(chunks), None) => {
            let _ = write!(text, ", {} chunks", count(chunks.into()));
        }
        (None, _) => {}
    }
    let _ =
        writeln!(text, ", from {} {}", written.inputs.len(), if written.inputs.len() == 1 { "file" } else { "files" });
    common.result(printable_lines(&text))
}

impl MergeArgs {
    fn run(&self, common: &Common) -> Result<()> {
        check_output(&self.output, &self.inputs, common)?;
        let mut warnings = Warnings { common, lines: Vec::new() };
        let legacy_chunk_size = legacy_chunk_size(&self.writing, &self.inputs);
        let mut merger = Merger::new(MergeOptions { legacy_chunk_size });
        for input in &self.inputs {
            let imatrix = Imatrix::open(input)?;
            warnings.add_of_file(input, &imatrix.warnings);
            let odd = merger.add(&input.display().to_string(), &imatrix)?;
            let told = self.writing.chunk_size.is_some();
            warnings.add(odd.into_iter().filter(|odd| !(told && matches!(odd, Warning::AssumedChunkSize { .. }))));
        }
        let mut merged = merger.finish()?;
        warnings.add(std::mem::take(&mut merged.warnings));
        let form = self.writing.form(&self.output);
        warnings.add(merged.save(&self.output, form, common.force)?);
        report(
            common,
            &Written {
                output: self.output.display().to_string(),
                format: json_name(form),
                inputs: self.inputs.iter().map(|input| input.display().to_string()).collect(),
                entries: merged.entries.len(),
                chunk_count: merged.chunk_count,
                chunk_size: merged.chunk_size,
                datasets: &merged.datasets,
                warnings: warnings.lines,
            },
        )
    }
}

impl ConvertArgs {
    fn run(&self, common: &Common) -> Result<()> {
        let inputs = std::slice::from_ref(&self.input);
        check_output(&self.output, inputs, common)?;
        let mut warnings = Warnings { common, lines: Vec::new() };
        let mut imatrix = Imatrix::open(&self.input)?;
        warnings.add_of_file(&self.input, &imatrix.warnings);
        let form = self.writing.form(&self.output);
        if (imatrix.form, form) == (Form::Dat, Form::Gguf) {
            let chunk_size = self.writing.chunk_size.unwrap_or(DEFAULT_CHUNK_SIZE);
            if self.writing.chunk_size.is_none() {
                let file = self.input.display().to_string();
                warnings.add([Warning::AssumedChunkSize { file, chunk_size }]);
            }
            imatrix = imatrix.counted(chunk_size);
        }
        warnings.add(imatrix.save(&self.output, form, common.force)?);
        report(
            common,
            &Written {
                output: self.output.display().to_string(),
                format: json_name(form),
                inputs: vec![self.input.display().to_string()],
                entries: imatrix.entries.len(),
                chunk_count: imatrix.chunk_count,
                chunk_size: imatrix.chunk_size,
                datasets: &imatrix.datasets,
                warnings: warnings.lines,
            },
        )
    }
}

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
    fn run(&self, common: &Common) -> Result<()> {
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
        text.push_str(&tensor_table(&stats.tensors));
        text.push_str(&layer_table(&stats));
        if !stats.without_data.is_empty() {
            let _ = writeln!(text, "\n{} entries saw no token and have no statistics", stats.without_data.len());
        }
        let map = heatmap(&stats, style);
        if !map.is_empty() {
            let _ = write!(text, "\n{map}");
        }
        common.result(text)
    }
}

/// A form as flags and JSON name it.
fn json_name(form: Form) -> &'static str {
    match form {
        Form::Dat => "dat",
        Form::Gguf => "gguf",
    }
}

/// Width of the heat map where there is no terminal to fit it to.
const PIPED_WIDTH: usize = 120;

/// Escapes control characters but keeps line ends.
fn printable_lines(text: &str) -> String {
    text.split_inclusive('\n')
        .map(|line| match line.strip_suffix('\n') {
            Some(line) => printable(line) + "\n",
            None => printable(line),
        })
        .collect()
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

fn layer_name(layer: Option<u64>) -> String {
    layer.map_or_else(|| "-".to_owned(), |layer| layer.to_string())
}

fn tensor_table(tensors: &[TensorStats]) -> String {
    let mut text = format!(
        "\n{:>5}  {:<20} {:>12} {:>9} {:>11} {:>9} {:>9} {:>9} {:>7} {:>9} {:>8} {:>7} {:>7}\n",
        "Layer", "Tensor", "Σ(Act²)", "Min", "Max", "μ", "σ", "% Active", "N", "Entropy", "E (norm)", "ZD", "CosSim"
    );
    for t in tensors {
        let _ = writeln!(
            text,
            "{:>5}  {:<20} {:>12.2} {:>9.4} {:>11.4} {:>9.2} {:>9.2} {:>8.2}% {:>7} {:>9.4} {:>7.2}% {:>6.2}% {:>7.4}",
            layer_name(t.layer),
            printable(&t.role),
            t.sum_act2,
            t.min,
            t.max,
            t.mean,
            t.deviation,
            100.0 * t.active,
            t.columns,
            t.entropy,
            100.0 * t.entropy_normalized,
            100.0 * t.z_share,
            t.cosine
        );
    }
    text
}

fn layer_table(stats: &ImatrixStats) -> String {
    if stats.layers.is_empty() {
        return String::new();
    }
    let mut text = format!("\n{:>5}  {:>12} {:>9} {:>8}\n", "Layer", "μΣ(Act²)", "μZD", "μCosSim");
    for layer in &stats.layers {
        let _ = writeln!(
            text,
            "{:>5}  {:>12.2} {:>8.4}% {:>8.4}",
            layer.layer,
            layer.sum_act2,
            100.0 * layer.z_share,
            layer.cosine
        );
    }
    text
}
