//! A comparison of a base and its quantized files: sizes, perplexity, divergence, tasks, errors of the tensors.

use std::path::{Path, PathBuf};

use super::facts::tensor_errors_until;
use super::{Comparison, FileFacts, FileFigures, ReportError, Run, TaskFigures, TextFacts};
use crate::display::printable;
use crate::eval::tasks::{PreparedTasks, ReadOptions, TaskKind, TaskOptions, TaskScores, TaskSet};
use crate::eval::{
    EvalError, Follow, KeptScores, Opened, Reference, TextOptions, Windows, evaluate, score_model, until_stopped,
    windows_of,
};
use crate::gguf::Gguf;
use crate::model::{Activations, Pass};
use crate::progress::{Interrupted, Stop, Watch};
use crate::text::Text;
use crate::tokenizer::Tokenizer;

/// Compares quantized files with their base.
///
/// ```
/// use lwq::eval::TextOptions;
/// use lwq::gguf::Gguf;
/// use lwq::report::{ComparisonRequest, text_tables};
/// use lwq::text::{Set, Text};
///
/// let base = Gguf::open("tests/data/doclet-4m-f16.gguf")?;
/// # let quantized = Gguf::open("tests/data/doclet-4m-f16.gguf")?;
/// let text = Text::built_in(Set::Evaluation);
/// let options = TextOptions { n_ctx: Some(64), chunks: Some(2), ..TextOptions::default() };
/// let comparison = ComparisonRequest::new(&base, &text).options(options).run(&[&quantized], &())?;
/// println!("{}", text_tables(&comparison, str::to_owned));
/// assert_eq!((comparison.files.len(), comparison.runs[0].windows), (1, 2));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct ComparisonRequest<'a> {
    base: &'a Gguf,
    text: &'a Text,
    options: TextOptions,
    modes: Vec<Activations>,
    tasks: Option<TaskFolder>,
    tensor_errors: bool,
}

/// A folder of task files, and what to score of each.
#[derive(Clone, Debug, Default)]
pub struct TaskFolder {
    /// The folder; `.txt` is HellaSwag, `.csv` WinoGrande, `.bin` multiple choice, `.jsonl` any. Others are passed over.
    pub folder: PathBuf,
    /// Tasks to draw at random from each file; all when `None`.
    pub most_tasks: Option<usize>,
    /// Seed of the draw.
    pub seed: u32,
    /// Draw and score as llama-perplexity does; `seed` has no effect then.
    pub llama_compat: bool,
}

impl TaskFolder {
    /// Number of task files in the folder.
    ///
    /// # Errors
    /// When it cannot be read or holds none.
    pub fn count(&self) -> Result<usize, ReportError> {
        Ok(task_files(&self.folder)?.len())
    }
}

/// A task file, tokenized for all models.
struct NamedTasks {
    name: String,
    prepared: PreparedTasks,
}

impl<'a> ComparisonRequest<'a> {
    /// Compares with `base` on `text`.
    pub fn new(base: &'a Gguf, text: &'a Text) -> ComparisonRequest<'a> {
        let (options, modes) = (TextOptions::default(), Vec::new());
        ComparisonRequest { base, text, options, modes, tasks: None, tensor_errors: false }
    }

    /// How the text is cut and scored.
    pub fn options(self, options: TextOptions) -> Self {
        ComparisonRequest { options, ..self }
    }

    /// Ways of rounding activations, a table for each, instead of the one in the options.
    pub fn modes(self, modes: &[Activations]) -> Self {
        ComparisonRequest { modes: modes.to_vec(), ..self }
    }

    /// Scores tasks, too.
    pub fn tasks(self, tasks: impl Into<Option<TaskFolder>>) -> Self {
        ComparisonRequest { tasks: tasks.into(), ..self }
    }

    /// Compares the files tensor by tensor, too.
    pub fn tensor_errors(self, wanted: bool) -> Self {
        ComparisonRequest { tensor_errors: wanted, ..self }
    }

    /// Compares `models`. When `watch` stops it, the comparison holds the figures found by then and says that it is not
    /// complete; with [`TextOptions::state`] the next run goes on from there.
    ///
    /// # Errors
    /// When a model, the text or a task file is not usable, vocabularies or shapes differ, or the run was stopped before
    /// anything was scored.
    pub fn run(&self, models: &[&Gguf], watch: &dyn Watch) -> Result<Comparison, ReportError> {
        let base = Opened::open(self.base, watch)?;
        let files = models.iter().map(|gguf| Opened::open(gguf, watch)).collect::<Result<Vec<_>, _>>()?;
        files.iter().try_for_each(|file| base.check_same_vocabulary(file))?;
        let tokenizer = base.tokenizer(self.options.pre.as_deref(), watch)?;
        let n_ctx = base.context(self.options.n_ctx)?;
        files.iter().try_for_each(|file| file.check_context(n_ctx))?;
        let windows = windows_of(self.text, &tokenizer, n_ctx, &self.options)?;
        let tasks = self.read_tasks(&tokenizer, watch)?;

        let labels: Vec<&str> = [self.base].iter().chain(models).map(|gguf| gguf.label()).collect();
        let names = display_names(&labels);
        let mut comparison = Comparison {
            base: FileFacts::new(&names[0], self.base),
            files: names[1..].iter().zip(models).map(|(name, gguf)| FileFacts::new(name, gguf)).collect(),
            text: TextFacts {
                files: self.text.documents().map(|(name, _)| file_name(name)).collect(),
                ctx: windows.n_ctx(),
                windows: windows.len(),
                scored_per_window: windows.scored_per_window(),
            },
            runs: Vec::new(),
            tensor_errors: Vec::new(),
            complete: true,
        };
        until_stopped(watch, |stop| {
            let all = [&base].into_iter().chain(&files).collect::<Vec<_>>();
            self.fill(&mut comparison, &all, &windows, &tasks, watch, stop)
        })?;
        Ok(comparison)
    }

    /// Runs the models, the base first, and compares the tensors.
    fn fill(
        &self,
        comparison: &mut Comparison,
        models: &[&Opened<'_>],
        windows: &Windows,
        tasks: &[NamedTasks],
        watch: &dyn Watch,
        stop: &Stop,
    ) -> Result<(), ReportError> {
        let only = [self.options.activations];
        for &mode in if self.modes.is_empty() { &only[..] } else { &self.modes } {
            let (run, complete) = self.figures(mode, models, windows, watch, stop)?;
            let Some(mut run) = run else {
                comparison.complete = false;
                break;
            };
            comparison.complete = complete && self.score_tasks(mode, models, tasks, &mut run, watch, stop)?;
            comparison.runs.push(run);
            if !comparison.complete {
                break;
            }
        }
        if comparison.runs.is_empty() {
            return Err(Interrupted.into());
        }
        if comparison.complete && self.tensor_errors {
            let files: Vec<&Gguf> = models.iter().skip(1).map(|opened| opened.gguf).collect();
            match tensor_errors_until(self.base, &files, watch, stop) {
                Ok(errors) => comparison.tensor_errors = errors,
                Err(ReportError::Interrupted(_)) => {
                    watch.warn("interrupted: the tensors were not compared");
                    comparison.complete = false;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn read_tasks(&self, tokenizer: &Tokenizer, watch: &dyn Watch) -> Result<Vec<NamedTasks>, ReportError> {
        let Some(asked) = &self.tasks else { return Ok(Vec::new()) };
        let files = task_files(&asked.folder)?;
        let stem = |path: &Path| path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let options =
            ReadOptions { format: None, tasks: asked.most_tasks, seed: asked.seed, llama_compat: asked.llama_compat };
        let mut tasks = Vec::new();
        for (path, kind) in &files {
            let set = TaskSet::read(path, *kind, &options).map_err(EvalError::from)?;
            set.tell(watch);
            let prepared = PreparedTasks::new(&set, tokenizer, asked.llama_compat).map_err(EvalError::from)?;
            let unique = files.iter().filter(|(other, _)| stem(other) == stem(path)).count() == 1;
            let name = if unique { stem(path) } else { file_name(&path.display().to_string()) };
            tasks.push(NamedTasks { name, prepared });
        }
        Ok(tasks)
    }

    /// Figures of the text with one way of rounding activations, and whether they are complete; none when nothing was
    /// scored.
    fn figures(
        &self,
        mode: Activations,
        models: &[&Opened<'_>],
        windows: &Windows,
        watch: &dyn Watch,
        stop: &Stop,
    ) -> Result<(Option<Run>, bool), ReportError> {
        let Some((base, files)) = models.split_first() else { return Ok((None, false)) };
        let base_pass = base.pass(mode, stop)?;
        let passes = files.iter().map(|file| file.pass(mode, stop)).collect::<Result<Vec<_>, _>>()?;
        let passes: Vec<&Pass<'_, '_, '_>> = passes.iter().collect();
        let kept = self.options.state.as_deref();
        let kept = kept.map(|path| KeptScores::open(path, Some(base), files, windows, mode)).transpose()?;
        let follow = Follow::new(watch, windows, passes.len() + 1, None, kept);
        let reference = Reference::Model { pass: &base_pass, forces: false };
        let result = evaluate(reference, &passes, windows, self.options.memory, None, follow)?;
        let Some(reference) = result.reference.filter(|_| result.windows > 0) else { return Ok((None, false)) };
        let summaries = result.models.iter().filter_map(|scores| scores.divergence.summary());
        let run = Run {
            activations: mode.name().to_owned(),
            windows: result.windows,
            ppl_base: reference.ppl(),
            ppl_base_error: reference.error(),
            base_tasks: Vec::new(),
            files: summaries.map(|divergence| FileFigures { divergence, tasks: Vec::new() }).collect(),
        };
        Ok((Some(run), result.complete))
    }

    /// Adds the scores of all task files; false when interrupted. A task file counts when the base, which comes first, has
    /// finished it.
    fn score_tasks(
        &self,
        mode: Activations,
        models: &[&Opened<'_>],
        tasks: &[NamedTasks],
        run: &mut Run,
        watch: &dyn Watch,
        stop: &Stop,
    ) -> Result<bool, ReportError> {
        let options = TaskOptions { n_ctx: None, memory: self.options.memory };
        for NamedTasks { name, prepared } in tasks {
            let mut base: Option<TaskScores> = None;
            for (index, opened) in models.iter().enumerate() {
                let scores = score_model(opened, prepared, &options, mode, watch, stop)?;
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
}

/// The files' names without folders, as long as that tells them apart.
fn display_names(labels: &[&str]) -> Vec<String> {
    let short: Vec<String> = labels.iter().map(|label| file_name(label)).collect();
    let unique = |name: &String| short.iter().filter(|other| *other == name).count() == 1;
    labels.iter().zip(&short).map(|(l, n)| if unique(n) { n.clone() } else { (*l).to_owned() }).collect()
}

fn file_name(path: &str) -> String {
    Path::new(path).file_name().map_or_else(|| path.to_owned(), |name| name.to_string_lossy().into_owned())
}

/// Task files of a folder with their kinds, by name; other files are passed over.
fn task_files(folder: &Path) -> Result<Vec<(PathBuf, TaskKind)>, ReportError> {
    let label = || printable(&folder.display().to_string());
    let unreadable = |source| ReportError::TaskFolder { folder: label(), source };
    let entries = std::fs::read_dir(folder).map_err(unreadable)?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>().map_err(unreadable)?;
    paths.sort();
    let mut files = Vec::new();
    for path in paths.into_iter().filter(|path| path.is_file()) {
        if let Some(kind) = TaskKind::of_file(&path).map_err(EvalError::from)? {
            files.push((path, kind));
        }
    }
    if files.is_empty() {
        return Err(ReportError::NoTasks { folder: label() });
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_as_short_as_they_can_be() {
        let names = display_names(&["a/m.gguf", "b/m.gguf", "b/q.gguf"]);
        assert_eq!(names, ["a/m.gguf", "b/m.gguf", "q.gguf"]);
    }
}
