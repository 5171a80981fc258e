//! `lwq compare`: a base model and its quantized files in one table and on one page.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use serde::Serialize;

use super::eval::loaded::{ActivationsArg, Follow, Kept, Opened, check_context, context, read_windows};
use super::eval::tasks::score;
use super::{Common, Interrupted, Progress, Unit, Usage, decimal_size, printable};
use lwq::atomic_file::{AtomicFile, check_target};
use lwq::eval::tasks::{PreparedTasks, ReadOptions, TaskKind, TaskOptions, TaskScores, TaskSet};
use lwq::eval::{Reference, Windows, evaluate};
use lwq::model::{Model, Overrides, Pass};
use lwq::os;
use lwq::report::{
    Comparison, FileFacts, FileFigures, ReportError, Run, TaskFigures, TensorError, TextFacts, html_page, markdown,
    size_plot, tensor_errors, text_tables,
};

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
    /// Text to predict; repeatable
    #[arg(long, short, required = true, value_name = "TEXT")]
    file: Vec<PathBuf>,
    /// Tokens per window [default: 512, or the model's context if that is shorter]
    #[arg(long, short = 'c', value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(4..=1 << 24))]
    ctx: Option<u32>,
    /// Score at most this many windows; several texts take turns
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    chunks: Option<u32>,
    /// Score the predictions of a window from this position on [default: half the window]
    #[arg(long, value_name = "POSITION", value_parser = clap::value_parser!(u32).range(..1 << 24))]
    score_from: Option<u32>,
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
    /// Use this pre-tokenizer instead of the one in the file
    #[arg(long, value_name = "NAME")]
    pre: Option<String>,
    /// Memory for activations, such as 2G [default: half of what is free]
    #[arg(long, value_name = "SIZE", value_parser = lwq::gguf::split::parse_size)]
    memory: Option<u64>,
    /// Keep scored windows in this file: a run that finds it goes on where another stopped, and runs only the models
    /// that are new
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
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
struct Report<'a> {
    #[serde(flatten)]
    comparison: &'a Comparison,
    #[serde(skip_serializing_if = "Option::is_none")]
    html: Option<String>,
    seconds: f64,
    peak_memory_bytes: Option<u64>,
}

/// A task file, tokenized for all models.
struct Tasks {
    name: String,
    prepared: PreparedTasks,
}

/// Models that were opened, the base first.
struct Models<'g> {
    opened: &'g [Opened],
    models: Vec<Model<'g>>,
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
            let inputs = [&self.base].into_iter().chain(&self.models).chain(&self.file);
            for input in inputs {
                ensure!(
                    !os::same_file(path, input),
                    "{}: {flag} would replace an input",
                    printable(&path.display().to_string())
                );
            }
        }
        let opened =
            [&self.base].into_iter().chain(&self.models).map(|path| Opened::open(path)).collect::<Result<Vec<_>>>()?;
        let models = Models { models: opened.iter().map(Opened::model).collect::<Result<Vec<_>>>()?, opened: &opened };
        models.check_vocabularies()?;
        let tokenizer = opened[0].tokenizer(&models.models[0], self.pre.as_deref(), common)?;
        let windows = self.windows(&models, &tokenizer)?;
        let tasks = self.read_tasks(&tokenizer, common)?;

        let names = display_names(&self.base, &self.models);
        let facts: Vec<FileFacts> = names.iter().zip(&opened).map(|(n, o)| FileFacts::new(n, &o.gguf)).collect();
        let mut facts = facts.into_iter();
        let base = facts.next().context("no base")?;
        let mut comparison = Comparison {
            base,
            files: facts.collect(),
            text: TextFacts {
                files: self.file.iter().map(|path| file_name(path)).collect(),
                ctx: windows.n_ctx(),
                windows: windows.len(),
                scored_per_window: windows.scored_per_window(),
            },
            runs: Vec::new(),
            tensor_errors: Vec::new(),
            complete: true,
        };
        let modes: &[ActivationsArg] = match self.activations {
            ModesArg::F32 => &[ActivationsArg::F32],
            ModesArg::Ggml => &[ActivationsArg::Ggml],
            ModesArg::Both => &[ActivationsArg::F32, ActivationsArg::Ggml],
        };
        for &mode in modes {
            let (run, complete) = self.figures(mode, &models, &windows, &tasks, common)?;
            comparison.runs.extend(run);
            comparison.complete &= complete;
            if !complete {
                break;
            }
        }
        if comparison.runs.is_empty() {
            return Err(Interrupted.into());
        }
        if comparison.complete && (common.json || self.html.is_some()) {
            match compare_tensors(&opened, common)? {
                Some(errors) => comparison.tensor_errors = errors,
                None => comparison.complete = false,
            }
        }
        os::end_on_interrupt();
        self.print(&comparison, started, common)?;
        if comparison.complete { Ok(()) } else { Err(Interrupted.into()) }
    }

    fn windows(&self, models: &Models<'_>, tokenizer: &lwq::tokenizer::Tokenizer) -> Result<Windows> {
        let n_ctx = context(self.ctx, &models.models[0], &models.opened[0].label())?;
        for (opened, model) in models.opened.iter().zip(&models.models) {
            check_context(n_ctx, model.hparams().n_ctx_train, &opened.label())?;
        }
        read_windows(&self.file, tokenizer, n_ctx, self.chunks, self.score_from)
    }

    fn read_tasks(&self, tokenizer: &lwq::tokenizer::Tokenizer, common: &Common) -> Result<Vec<Tasks>> {
        let Some(folder) = &self.tasks else { return Ok(Vec::new()) };
        let mut tasks = Vec::new();
        let files = task_files(folder)?;
        let stem = |path: &Path| path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        for (path, kind) in &files {
            let options = ReadOptions {
                format: None,
                tasks: self.most_tasks.map(|n| n as usize),
                seed: self.seed,
                llama_compat: self.llama_compat,
            };
            let set = TaskSet::read(path, *kind, &options)?;
            set.warnings().iter().for_each(|line| common.warn(printable(line)));
            let prepared = PreparedTasks::new(&set, tokenizer, self.llama_compat)?;
            let unique = files.iter().filter(|(other, _)| stem(other) == stem(path)).count() == 1;
            let name = if unique { stem(path) } else { file_name(path) };
            tasks.push(Tasks { name, prepared });
        }
        Ok(tasks)
    }

    /// All figures with one way of rounding activations, and whether they are complete; none when nothing was scored.
    fn figures(
        &self,
        mode: ActivationsArg,
        models: &Models<'_>,
        windows: &Windows,
        tasks: &[Tasks],
        common: &Common,
    ) -> Result<(Option<Run>, bool)> {
        let passes =
            models.models.iter().map(|m| m.pass(mode.forward(), Overrides::new())).collect::<Result<Vec<_>, _>>()?;
        let (base, others) = passes.split_first().context("no base")?;
        let others: Vec<&Pass<'_, '_, '_>> = others.iter().collect();
        let (base_file, files) = models.opened.split_first().context("no base")?;
        let kept = self.state.as_deref().map(|path| Kept::open(path, Some(base_file), files, windows, mode));
        let mut follow = Follow::new(common, windows, passes.len(), None, kept.transpose()?);
        let earlier = follow.earlier();
        let result = evaluate(Reference::Model(base), &others, windows, self.memory, None, &earlier, &mut follow)?;
        follow.finish(&result)?;
        if result.windows == 0 {
            return Ok((None, false));
        }
        let reference = result.reference.context("the base was not scored")?;
        let mut run = Run {
            activations: mode.name().to_owned(),
            windows: result.windows,
            ppl_base: reference.ppl(),
            ppl_base_error: reference.error(),
            base_tasks: Vec::new(),
            files: Vec::new(),
        };
        for scores in &result.models {
            let divergence = scores.divergence.summary().context("nothing was scored")?;
            run.files.push(FileFigures { divergence, tasks: Vec::new() });
        }
        let complete = result.complete && self.score_tasks(mode, models, tasks, &mut run, common)?;
        Ok((Some(run), complete))
    }

    /// Adds the scores of all task files; false when interrupted. A task file counts when the base has finished it.
    fn score_tasks(
        &self,
        mode: ActivationsArg,
        models: &Models<'_>,
        tasks: &[Tasks],
        run: &mut Run,
        common: &Common,
    ) -> Result<bool> {
        let options = TaskOptions { n_ctx: None, memory: self.memory };
        for Tasks { name, prepared } in tasks {
            let mut base: Option<TaskScores> = None;
            for (index, (opened, model)) in models.opened.iter().zip(&models.models).enumerate() {
                let (scores, _) = score(opened, model, prepared, &options, mode, common)?;
                if !scores.is_complete() {
                    return Ok(false);
                }
                let comparison = base.as_ref().and_then(|base| scores.compare(base));
                let figures = TaskFigures { name: name.clone(), summary: scores.summary(), comparison };
                match index.checked_sub(1) {
                    None => run.base_tasks.push(figures),
                    Some(file) => run.files[file].tasks.push(figures),
                }
                base.get_or_insert(scores);
            }
        }
        Ok(true)
    }

    fn print(&self, comparison: &Comparison, started: Instant, common: &Common) -> Result<()> {
        if let Some(path) = &self.html {
            write_text(path, &html_page(comparison)?, common)?;
        }
        if let (Some(path), Some(run)) = (&self.plot, comparison.runs.first()) {
            let folder = |model: &PathBuf| model.parent().map(file_name).unwrap_or_default();
            let groups: Vec<String> = self.models.iter().map(folder).collect();
            write_text(path, &size_plot(comparison, run, &groups)?, common)?;
        }
        let seconds = started.elapsed().as_secs_f64();
        if common.json {
            let html = self.html.as_ref().map(|path| path.display().to_string());
            return common.result_json(&Report { comparison, html, seconds, peak_memory_bytes: os::peak_memory() });
        }
        if self.markdown {
            return common.result(markdown(comparison));
        }
        let memory = os::peak_memory().map_or_else(String::new, |m| format!(", peak memory {}", decimal_size(m)));
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

impl Models<'_> {
    fn check_vocabularies(&self) -> Result<()> {
        for (other, model) in self.opened.iter().zip(&self.models).skip(1) {
            self.opened[0].check_same_vocabulary(other)?;
            ensure!(
                model.n_vocab() == self.models[0].n_vocab(),
                "{}: the embedding has {} rows, that of {} has {}; only models of one vocabulary can be compared",
                other.label(),
                model.n_vocab(),
                self.opened[0].label(),
                self.models[0].n_vocab()
            );
        }
        Ok(())
    }
}

fn write_text(path: &Path, text: &str, common: &Common) -> Result<()> {
    let mut file = AtomicFile::create(path, common.force)?;
    file.write_all(text.as_bytes()).with_context(|| printable(&path.display().to_string()))?;
    Ok(file.commit()?)
}

/// Errors of all files' tensors against the base; `None` when interrupted.
fn compare_tensors(opened: &[Opened], common: &Common) -> Result<Option<Vec<Vec<TensorError>>>> {
    let cancel = os::cancel_on_interrupt();
    let Some((base, files)) = opened.split_first() else { return Ok(None) };
    let weights = |file: &Opened| file.gguf.tensors().iter().map(|t| t.elements()).fold(0, u64::saturating_add);
    // Of each weight, four decoded bytes are compared.
    let total = files.iter().map(weights).fold(0, u64::saturating_add).saturating_mul(4);
    let progress = Progress::new(common, "comparing tensors", total, Unit::Bytes);
    let mut all = Vec::new();
    for file in files {
        let errors = tensor_errors(&base.gguf, &file.gguf, |weights, name| {
            progress.advance(weights.saturating_mul(4), name);
            !cancel.load(std::sync::atomic::Ordering::Relaxed)
        });
        match errors {
            Ok(errors) => all.push(errors),
            Err(ReportError::Interrupted) => {
                common.warn("interrupted: the tensors were not compared");
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        }
    }
    progress.finish();
    Ok(Some(all))
}

/// The files' names without folders, as long as that tells them apart.
fn display_names(base: &Path, models: &[PathBuf]) -> Vec<String> {
    let paths: Vec<&Path> = [base].into_iter().chain(models.iter().map(PathBuf::as_path)).collect();
    let short: Vec<String> = paths.iter().map(|path| file_name(path)).collect();
    let unique = |name: &String| short.iter().filter(|other| *other == name).count() == 1;
    paths.iter().zip(&short).map(|(p, n)| if unique(n) { n.clone() } else { p.display().to_string() }).collect()
}

fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}

/// Task files of a folder with their kinds, by name; other files are passed over.
fn task_files(folder: &Path) -> Result<Vec<(PathBuf, TaskKind)>> {
    let label = printable(&folder.display().to_string());
    let entries = std::fs::read_dir(folder).with_context(|| format!("{label}: the folder of tasks cannot be read"))?;
    let mut paths =
        entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>().context(label.clone())?;
    paths.sort();
    let mut files = Vec::new();
    for path in paths.into_iter().filter(|path| path.is_file()) {
        if let Some(kind) = TaskKind::of_file(&path)? {
            files.push((path, kind));
        }
    }
    ensure!(!files.is_empty(), "{label}: holds no task files (.txt HellaSwag, .csv WinoGrande, .bin or .jsonl)");
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_as_short_as_they_can_be() {
        let names = display_names(Path::new("a/m.gguf"), &["b/m.gguf".into(), "b/q.gguf".into()]);
        assert_eq!(names, ["a/m.gguf", "b/m.gguf", "q.gguf"]);
    }
}
