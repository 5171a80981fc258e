//! `lwq compare`: a base model and its quantized files in one table and on one page.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use serde::Serialize;

use super::args::TextArgs;
use super::{Common, Usage, peak_memory, printable};
use lwq::atomic_file::{AtomicFile, check_target};
use lwq::gguf::Gguf;
use lwq::model::Activations;
use lwq::os;
use lwq::progress::Interrupted;
use lwq::report::{Comparison, ComparisonRequest, TaskFolder, html_page, markdown, size_plot, text_tables};

/// Compare quantized files with their base: size, perplexity, KL divergence, tasks
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  lwq compare model-f16.gguf model-Q4_K_M.gguf model-Q3_K_M.gguf -f text.txt --html compare.html"
)]
pub struct CompareArgs {
    /// The original
    base: PathBuf,
    /// Its quantized files
    #[arg(required = true, value_name = "MODEL")]
    models: Vec<PathBuf>,
    #[command(flatten)]
    text: TextArgs,
    /// Rounding of the inputs of products; both makes a table for each
    #[arg(long, value_enum, default_value = "f32")]
    activations: ModesArg,
    /// Score the task files of this folder: .txt HellaSwag, .csv WinoGrande, .bin multiple choice, .jsonl any
    #[arg(long, value_name = "FOLDER")]
    tasks: Option<PathBuf>,
    /// Draw at most N tasks of each file at random
    #[arg(long, value_name = "N", requires = "tasks", value_parser = clap::value_parser!(u32).range(1..))]
    most_tasks: Option<u32>,
    /// Seed of the draw
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u32,
    /// Draw and score tasks as llama-perplexity does
    #[arg(long, requires = "tasks", conflicts_with = "seed")]
    llama_compat: bool,
    /// Print the table as Markdown, for a model card
    #[arg(long)]
    markdown: bool,
    /// Write a web page with plots
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write an SVG image of the divergence against size, of the first table; files of one folder have one colour
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum ModesArg {
    /// Unrounded: the damage of the weights alone
    F32,
    /// Rounded as ggml's CPU backend does: the damage as users run the files
    Ggml,
    /// One after the other
    Both,
}

/// What `--json` prints.
#[derive(Serialize)]
struct CompareReport<'a> {
    #[serde(flatten)]
    comparison: &'a Comparison,
    #[serde(skip_serializing_if = "Option::is_none")]
    html: Option<String>,
    seconds: f64,
    peak_memory_bytes: Option<u64>,
}

impl CompareArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// When a model, the text or a task file is not usable, or the run was interrupted (after printing what it
    /// covers).
    pub fn run(&self, common: &Common) -> Result<()> {
        let started = Instant::now();
        if self.markdown && common.json {
            return Err(Usage("--markdown and --json cannot be used together".into()).into());
        }
        for (path, flag) in [(&self.html, "--html"), (&self.plot, "--plot")] {
            let Some(path) = path else { continue };
            check_target(path, common.force)?;
            for input in [&self.base].into_iter().chain(&self.models).chain(&self.text.file) {
                ensure!(
                    !os::same_file(path, input),
                    "{}: {flag} would replace an input",
                    printable(&path.display().to_string())
                );
            }
        }
        let base = Gguf::open(&self.base)?;
        let models = self.models.iter().map(Gguf::open).collect::<Result<Vec<_>, _>>()?;
        let text = self.text.read(common)?;
        let comparison = ComparisonRequest::new(&base, &text)
            .options(self.text.options(Activations::default()))
            .modes(match self.activations {
                ModesArg::F32 => &[Activations::Unrounded],
                ModesArg::Ggml => &[Activations::Ggml],
                ModesArg::Both => &[Activations::Unrounded, Activations::Ggml],
            })
            .tasks(self.tasks.as_ref().map(|folder| TaskFolder {
                folder: folder.clone(),
                most_tasks: self.most_tasks.map(|n| n as usize),
                seed: self.seed,
                llama_compat: self.llama_compat,
            }))
            .tensor_errors(common.json || self.html.is_some())
            .run(&models.iter().collect::<Vec<_>>(), &common.watch())?;
        self.print(&comparison, started, common)?;
        if comparison.complete { Ok(()) } else { Err(Interrupted.into()) }
    }

    fn print(&self, comparison: &Comparison, started: Instant, common: &Common) -> Result<()> {
        if let Some(path) = &self.html {
            write_text(path, &html_page(comparison)?, common)?;
        }
        if let (Some(path), Some(run)) = (&self.plot, comparison.runs.first()) {
            let folder = |model: &PathBuf| model.parent().map(last_part).unwrap_or_default();
            let groups: Vec<String> = self.models.iter().map(folder).collect();
            write_text(path, &size_plot(comparison, run, &groups)?, common)?;
        }
        let seconds = started.elapsed().as_secs_f64();
        if common.json {
            let html = self.html.as_ref().map(|path| path.display().to_string());
            return common.result_json(&CompareReport {
                comparison,
                html,
                seconds,
                peak_memory_bytes: os::peak_memory(),
            });
        }
        if self.markdown {
            return common.result(markdown(comparison));
        }
        let memory = peak_memory(os::peak_memory());
        common.result(text_tables(comparison, printable))?;
        common.note(format!("{seconds:.1} s{memory}"));
        if let Some(path) = &self.html {
            common.note(format!("page written to {}", printable(&path.display().to_string())));
        }
        if let Some(path) = &self.plot {
            common.note(format!("plot written to {}", printable(&path.display().to_string())));
        }
        Ok(())
    }
}

fn write_text(path: &Path, text: &str, common: &Common) -> Result<()> {
    let mut file = AtomicFile::create(path, common.force)?;
    file.write_all(text.as_bytes()).with_context(|| printable(&path.display().to_string()))?;
    Ok(file.commit()?)
}

fn last_part(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}
