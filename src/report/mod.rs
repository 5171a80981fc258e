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

use serde::Serialize;

pub use compare::{ComparisonRequest, TaskFolder};
pub use error::ReportError;
pub use facts::{FileFacts, LayerGrid, TensorError, TensorFacts, tensor_errors};
pub use html::html_page;
pub use size_plot::size_plot;
pub use table::{markdown, text_tables};

use crate::eval::DivergenceSummary;
use crate::eval::tasks::{TaskComparison, TaskSummary};

/// All that is known about a base model and its quantized files.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// The base.
    pub base: FileFacts,
    /// The text that was predicted.
    pub text: TextFacts,
    /// The quantized files, in the order given.
    pub files: Vec<FileFacts>,
    /// Figures: one entry for each way of rounding activations.
    pub runs: Vec<Run>,
    /// Errors of each file's tensors against the base, in the order of `files`; empty where not asked for.
    pub tensor_errors: Vec<Vec<TensorError>>,
    /// False after an interruption: the figures cover less than was asked for.
    pub complete: bool,
}

/// The text and how it was cut.
#[derive(Clone, Debug, Serialize)]
pub struct TextFacts {
    /// Names of the files.
    pub files: Vec<String>,
    /// Tokens of a window.
    pub ctx: usize,
    /// Windows that the text has, or that were asked for.
    pub windows: usize,
    /// Predictions scored in a window.
    pub scored_per_window: usize,
}

/// One pass over text and tasks.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// `f32` (unrounded) or `ggml`.
    pub activations: String,
    /// Windows scored.
    pub windows: usize,
    /// Perplexity of the base.
    pub ppl_base: f64,
    /// Its standard error.
    pub ppl_base_error: f64,
    /// The base's tasks.
    pub base_tasks: Vec<TaskFigures>,
    /// The files, in the order given.
    pub files: Vec<FileFigures>,
}

/// Figures of one file in one run.
#[derive(Clone, Debug, Serialize)]
pub struct FileFigures {
    /// Perplexity and divergence.
    #[serde(flatten)]
    pub divergence: DivergenceSummary,
    /// Scores of the tasks.
    pub tasks: Vec<TaskFigures>,
}

/// Score of one task file.
#[derive(Clone, Debug, Serialize)]
pub struct TaskFigures {
    /// Name of the task file, without folder and extension.
    pub name: String,
    /// Its figures.
    #[serde(flatten)]
    pub summary: TaskSummary,
    /// Against the base.
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
