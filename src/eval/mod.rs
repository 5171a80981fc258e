//! How good a model is: scores computed from logits.
//!
//! | | |
//! |---|---|
//! | [`PerplexityRequest`] | perplexity of one model on a text |
//! | [`DivergenceRequest`] | KL divergence of models from their original |
//! | [`TaskRequest`] | accuracy of a model on [`tasks`] |
//!
//! Below them, [`Windows`] cuts a text as llama-perplexity does; [`evaluate`] runs one or several models over it, side by
//! side with a 16-bit reference when there is one, and keeps four numbers a scored token; [`Divergence::summary`] and
//! [`Perplexity`] turn them into the figures that publishers print; [`compare_means`] and [`SequentialTest`] say
//! whether two models differ. The table of a base and all its quantized files is made by
//! [`report::ComparisonRequest`](crate::report::ComparisonRequest).

mod divergence;
mod divergence_request;
mod divergence_text;
mod engine;
mod error;
mod follow;
mod logits_file;
mod opened;
mod paired;
mod perplexity;
mod perplexity_request;
mod sequential;
mod state;
mod task_request;
pub mod tasks;
mod windows;

pub use divergence::{Divergence, DivergenceSummary, Percentiles, ScoredToken};
pub use divergence_request::{DivergenceReport, DivergenceRequest, DivergenceRun, ModelDivergence, TestOutcome};
pub(crate) use engine::evaluate_with;
pub use engine::{Evaluation, ModelScores, Reference, evaluate};
pub use error::EvalError;
pub(crate) use follow::{Follow, KeptScores, until_stopped};
pub use logits_file::{LOGITS_CUT, LogitsReader, LogitsWriter};
pub use opened::TextOptions;
pub(crate) use opened::{Opened, windows_of};
pub use paired::{PairedDifference, compare_means};
pub use perplexity::{Perplexity, score_chunks};
pub use perplexity_request::{PerplexityReport, PerplexityRequest};
pub use sequential::{SequentialTest, Verdict};
pub use state::{EvaluationState, section_key};
pub(crate) use task_request::score_model;
pub use task_request::{TaskReport, TaskRequest};
pub use windows::{Windows, texts_in_turn};
