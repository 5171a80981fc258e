//! A base model and its quantized files side by side: as text, Markdown, JSON and a web page.
//!
//! [`ComparisonRequest`] finds the figures, [`Comparison`] holds them; [`FileFacts`] and [`tensor_errors`] find what the
//! files alone tell; [`text_tables`], [`markdown`] and [`html_page`] show it all.

mod compare;
mod error;
mod facts;
mod html;
mod plots;
mod size_plot;
mod table;

use serde::{Deserialize, Serialize};

pub use compare::{ComparisonRequest, TaskFolder};
pub use error::ReportError;
pub use facts::{FileFacts, TensorError, TensorFacts, tensor_errors};
pub use html::html_page;
pub use size_plot::size_plot;
pub(crate) use table::escaped;
pub use table::{markdown, text_tables};

use crate::eval::DivergenceSummary;
use crate::eval::tasks::{TaskComparison, TaskSummary};

/// All that is known about a base model and its quantized files: what `lwq compare --json` prints.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Comparison {
    /// The unquantized original that all files are held against.
    pub base: FileFacts,
    /// The text that was predicted, and how it was cut into windows.
    pub text: TextFacts,
    /// Size and types of each quantized file, in the order given.
    pub files: Vec<FileFacts>,
    /// Perplexities, divergences and task scores: one entry for each way of rounding activations.
    pub runs: Vec<Run>,
    /// Errors of each file's tensors against the base, in the order of `files`; empty where not asked for
    /// and after an interruption.
    pub tensor_errors: Vec<Vec<TensorError>>,
    /// False after an interruption: the figures cover less than was asked for.
    pub complete: bool,
}

/// The text and how it was cut.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TextFacts {
    /// Names of the text files, without folders, in the order given.
    pub files: Vec<String>,
    /// Tokens of a window.
    pub ctx: usize,
    /// Windows that were to be scored: those of the text, or as many as were asked for.
    pub windows: usize,
    /// Predictions scored in a window, in tokens.
    pub scored_per_window: usize,
}

/// One pass over text and tasks.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Run {
    /// How the inputs of products were rounded: `f32` (not at all) or `ggml` (as its CPU backend does).
    pub activations: String,
    /// Windows scored; fewer than those of the text after an interruption.
    pub windows: usize,
    /// Perplexity of the base, `exp` of its mean negative log-likelihood in nats per token.
    pub ppl_base: f64,
    /// Standard error of `ppl_base`, in its unit.
    pub ppl_base_error: f64,
    /// The base's score of each task file, in the order of their names.
    pub base_tasks: Vec<TaskFigures>,
    /// Figures of each quantized file, in the order given.
    pub files: Vec<FileFigures>,
}

/// Figures of one file in one run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FileFigures {
    /// Perplexity and divergence from the base; in JSON, its fields stand beside `tasks`.
    #[serde(flatten)]
    pub divergence: DivergenceSummary,
    /// The file's score of each task file, in the order of the run's `base_tasks`.
    pub tasks: Vec<TaskFigures>,
}

/// Score of one model on one task file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TaskFigures {
    /// Name of the task file without its folder, and without extension where that tells the files apart.
    pub name: String,
    /// Tasks scored and accuracy, as shares from 0 to 1; in JSON, its fields stand beside `name`.
    #[serde(flatten)]
    pub summary: TaskSummary,
    /// The same tasks against the base's answers, its fields beside `name` too; `None` for the base itself
    /// and where no task was scored with both.
    #[serde(flatten)]
    pub comparison: Option<TaskComparison>,
}

/// What the way of rounding means, in a sentence for people.
fn describe_activations(name: &str) -> &'static str {
    match name {
        "ggml" => "activations rounded as ggml's CPU backend does: the damage as users run the file",
        _ => "activations unrounded (f32): the damage of the weights alone",
    }
}
