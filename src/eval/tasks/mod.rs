//! Tasks with several answers: which one does the model think most likely?
//!
//! # Rules
//! Every answer is put into its context and tokenized whole, special tokens added. The tokens with which all
//! sequences of a task begin are its common prefix; it ends before the last token of the shortest sequence at the
//! latest, so that each answer keeps a token to be judged by.
//!
//! - HellaSwag and multiple choice: context, a space, answer. The score of an answer is the mean log-probability of
//!   its tokens after the common prefix.
//! - WinoGrande: the choice stands in the gap of the sentence. The score is the mean log-probability of the tokens
//!   after the choice, provided that both sequences have more than three tokens after the common prefix and the
//!   choice is followed by any; otherwise of those after the common prefix. The last token (mostly a full stop) is
//!   left out where more than one would be scored.
//!
//! The highest score is chosen; of equal ones the first, in WinoGrande the second. `accuracy` is the share of
//! tasks whose chosen answer is right. These are llama-perplexity's rules. Beside them, for all kinds but WinoGrande,
//! `accuracy_norm` chooses as lm-evaluation-harness does for its `acc_norm`: the sum of the log-probabilities of
//! all tokens after those of the context, divided by the bytes of the answer.
//!
//! # Compatibility
//! With [`ReadOptions::llama_compat`] and the same argument of [`PreparedTasks::new`], what llama-perplexity (b10605, built with
//! libstdc++) does beyond its rules is repeated: its choice of tasks; the lost last row of WinoGrande; rows that are
//! skipped; sums in single precision; where WinoGrande scores from the common prefix on, the second sequence's first
//! token is judged with the logits after the last token of the first; a WinoGrande choice that nothing follows
//! scores NaN and loses. Not repeated is what depends on memory that llama-perplexity does not own.

mod content;
mod error;
mod formats;
mod results;
mod score;
mod select;
mod sequences;

use std::fs::File;
use std::io::Read;
use std::path::Path;

use content::Content;
pub use error::TaskError;
pub use results::{TaskComparison, TaskResult, TaskScores, TaskSummary};
pub use score::{TaskOptions, score_tasks};
pub use sequences::PreparedTasks;

use crate::display::printable;
use crate::progress::Watch;
use crate::text::{decode, known_kind};

/// Largest task file that is read.
const MOST_BYTES: u64 = 1 << 30;

/// Most lines of a text file: a bound for memory and time that tasks of any use stay far below.
const MOST_LINES: usize = 6_000_000;

/// What kind of task a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum TaskKind {
    /// Four endings of a description.
    #[serde(rename = "hellaswag")]
    HellaSwag,
    /// Two words for a gap in a sentence.
    #[serde(rename = "winogrande")]
    WinoGrande,
    /// Answers to a question.
    #[serde(rename = "multiple-choice")]
    MultipleChoice,
}

impl TaskKind {
    /// The name that people know.
    pub fn name(self) -> &'static str {
        match self {
            TaskKind::HellaSwag => "HellaSwag",
            TaskKind::WinoGrande => "WinoGrande",
            TaskKind::MultipleChoice => "multiple choice",
        }
    }

    /// The kind of a task file: `.txt` is HellaSwag, `.csv` WinoGrande, `.bin` multiple choice, `.jsonl` told by its
    /// fields; `None` for other files.
    ///
    /// # Errors
    /// When a JSON-lines file cannot be read, or its first object has the fields of no kind.
    pub fn of_file(path: &Path) -> Result<Option<TaskKind>, TaskError> {
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
        Ok(match extension.as_str() {
            "txt" => Some(TaskKind::HellaSwag),
            "csv" => Some(TaskKind::WinoGrande),
            "bin" => Some(TaskKind::MultipleChoice),
            "jsonl" => {
                let bytes = read_file(path)?;
                let wrong = |problem: String| TaskError::File { file: path.display().to_string(), problem };
                let (text, _) = decode(&bytes).map_err(|error| wrong(error.to_string()))?;
                let problem = "the first line is no object with endings, sentence or choices; no kind of task fits";
                Some(formats::kind_of(&text).ok_or_else(|| wrong(problem.to_owned()))?)
            }
            _ => None,
        })
    }
}

/// How a task file is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TaskFormat {
    /// llama-perplexity's form of the kind: text, CSV or binary.
    Llama,
    /// JSON lines: one object per line, with
    /// `context`, `endings`, `label` (HellaSwag), `sentence`, `option1`, `option2`, `answer` (WinoGrande) or
    /// `question`, `choices`, `answer` (multiple choice).
    JsonLines,
}

/// One question and its possible answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// Place in the file, from 1.
    pub number: usize,
    /// Context, question, or the sentence before the gap.
    pub before: Vec<u8>,
    /// What there is to choose from.
    pub choices: Vec<Vec<u8>>,
    /// The sentence after the gap; empty but for WinoGrande.
    pub after: Vec<u8>,
    /// Which choices are right.
    pub right: Vec<bool>,
}

/// What to read of a task file.
#[derive(Clone, Debug, Default)]
pub struct ReadOptions {
    /// Form of the file; found by looking at it when `None`.
    pub format: Option<TaskFormat>,
    /// Tasks to use, drawn at random; all that there are when `None`.
    pub tasks: Option<usize>,
    /// Seed of the choice.
    pub seed: u32,
    /// Read and choose as llama-perplexity does; `seed` has no effect then.
    pub llama_compat: bool,
}

/// Tasks chosen from a file.
#[derive(Clone, Debug)]
pub struct TaskSet {
    kind: TaskKind,
    file: String,
    tasks: Vec<Task>,
    available: usize,
    warnings: Vec<String>,
    notes: Vec<String>,
}

impl TaskSet {
    /// Reads tasks of `kind` from a file, and chooses among them.
    ///
    /// # Errors
    /// When the file cannot be read, or is not what its format demands: then the message names the line or the task.
    pub fn read(path: &Path, kind: TaskKind, options: &ReadOptions) -> Result<TaskSet, TaskError> {
        Self::from_bytes(&path.display().to_string(), &read_file(path)?, kind, options)
    }

    /// Reads tasks from the content of a file; `file` names it in messages.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn from_bytes(file: &str, bytes: &[u8], kind: TaskKind, options: &ReadOptions) -> Result<TaskSet, TaskError> {
        let Content { text, format, mut warnings, notes } = Content::of(file, bytes, kind, options)?;
        let source = formats::Source { file, bytes: &text, llama_compat: options.llama_compat };
        let wanted = options.tasks.unwrap_or(usize::MAX);
        let choose = |total: usize| {
            if options.llama_compat {
                select::draw_like_llama(kind, total, wanted)
            } else {
                select::draw(total, wanted, options.seed)
            }
        };
        let is_text = (format, kind) != (TaskFormat::Llama, TaskKind::MultipleChoice);
        if is_text && memchr::memchr_iter(b'\n', &text).count() > MOST_LINES {
            return Err(source.error(format!("has more than {MOST_LINES} lines; no task file has")));
        }
        let mut available = 0;
        let tasks = match (format, kind) {
            (TaskFormat::Llama, TaskKind::MultipleChoice) => {
                let count = bytes.first_chunk().map_or(0, |count| u32::from_le_bytes(*count) as usize);
                available = count;
                let all = wanted >= count;
                formats::multiple_choice(source, if all { None } else { Some(&choose) })
                    .map_err(|error| known_kind(bytes).map_or(error, |known| source.error(known.to_string())))?
            }
            (TaskFormat::Llama, TaskKind::HellaSwag) => chosen(formats::hellaswag(source)?, choose, &mut available),
            (TaskFormat::Llama, TaskKind::WinoGrande) => {
                chosen(formats::winogrande(source, &mut warnings)?, choose, &mut available)
            }
            (TaskFormat::JsonLines, _) => chosen(formats::json_lines(source, kind)?, choose, &mut available),
        };
        Ok(TaskSet { kind, file: file.to_owned(), tasks, available, warnings, notes })
    }

    /// The kind.
    pub fn kind(&self) -> TaskKind {
        self.kind
    }

    /// The file that the tasks come from, for messages.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// The tasks, in the order in which they are scored.
    pub fn tasks(&self) -> &[Task] {
        &self.tasks
    }

    /// Number of tasks.
    pub fn len(&self) -> usize {
        self.tasks.len()
    }

    /// True without tasks.
    pub fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// Number of tasks in the file.
    pub fn available(&self) -> usize {
        self.available
    }

    /// What was passed over while reading, one line each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// What was made of the file's encoding and line ends, one line each.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Tells `watch` both.
    pub(crate) fn tell(&self, watch: &dyn Watch) {
        self.notes.iter().for_each(|line| watch.note(&printable(line)));
        self.warnings.iter().for_each(|line| watch.warn(&printable(line)));
    }
}

/// The tasks that `choose` names, in its order.
fn chosen(tasks: Vec<Task>, choose: impl Fn(usize) -> Vec<usize>, available: &mut usize) -> Vec<Task> {
    *available = tasks.len();
    let mut tasks: Vec<Option<Task>> = tasks.into_iter().map(Some).collect();
    choose(tasks.len()).into_iter().filter_map(|index| tasks.get_mut(index)?.take()).collect()
}

fn read_file(path: &Path) -> Result<Vec<u8>, TaskError> {
    let file = || path.display().to_string();
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MOST_BYTES + 1).read_to_end(&mut bytes))
        .map_err(|source| TaskError::Read { file: file(), source })?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(TaskError::File { file: file(), problem: "is larger than 1 GiB; no task file is".into() });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hellaswag(tasks: usize) -> String {
        (0..tasks).map(|i| format!("A: task {i}\n{}\na\nb\nc\nd\n", i % 4)).collect()
    }

    fn numbers(options: &ReadOptions) -> Vec<usize> {
        let set = TaskSet::from_bytes("h.txt", hellaswag(12).as_bytes(), TaskKind::HellaSwag, options).unwrap();
        assert_eq!(set.available(), 12);
        set.tasks().iter().map(|task| task.number).collect()
    }

    #[test]
    fn tasks_are_chosen_by_seed_or_as_in_llama_perplexity() {
        assert_eq!(numbers(&ReadOptions::default()), (1..=12).collect::<Vec<_>>());
        let some = |seed| numbers(&ReadOptions { tasks: Some(5), seed, ..Default::default() });
        assert_eq!(some(3).len(), 5);
        assert_eq!(some(3), some(3));
        assert_ne!(some(3), some(4));
        let compat = ReadOptions { tasks: Some(4), llama_compat: true, ..Default::default() };
        assert_eq!(numbers(&compat), [6, 12, 9, 11]);
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_a_reader_panic(
            parts in proptest::collection::vec("[ -~]{0,6}|\n|\r\n|,|\"|_|1|2|\\{|\\}|\u{feff}|é", 0..60),
            json: bool,
            llama_compat: bool,
            tasks in proptest::option::of(0usize..5),
        ) {
            let text = parts.concat();
            let format = Some(if json { TaskFormat::JsonLines } else { TaskFormat::Llama });
            let options = ReadOptions { format, tasks, seed: 3, llama_compat };
            for kind in [TaskKind::HellaSwag, TaskKind::WinoGrande, TaskKind::MultipleChoice] {
                let _ = TaskSet::from_bytes("t", text.as_bytes(), kind, &options);
            }
        }
    }

    #[test]
    fn a_missing_file_and_a_folder_are_named() {
        for path in ["/nonexistent/tasks.txt", "/"] {
            let error = TaskSet::read(Path::new(path), TaskKind::HellaSwag, &ReadOptions::default()).unwrap_err();
            assert!(error.to_string().starts_with(&format!("{path}: cannot read the tasks")), "{error}");
        }
    }
}
