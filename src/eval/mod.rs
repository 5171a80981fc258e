//! How good a model is: scores computed from logits.
//!
//! | | |
//! |---|---|
//! | [`PerplexityRequest`] | perplexity of one model on a text |
//! | [`DivergenceRequest`] | KL divergence of models from their original |
//! | [`TaskRequest`] | accuracy of a model on [`tasks`] |
//!
//! All of them cut a text into [`Windows`] as llama-perplexity does, run one or several models over it, side by side with
//! the 16-bit original when there is one, and keep four numbers a scored token, which become the figures that publishers
//! print; [`PairedDifference`] and [`SequentialTest`] say whether two models differ. The table of a base and all its quantized files is made by
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

pub(crate) use divergence::{Divergence, ScoredToken};
pub use divergence::{DivergenceSummary, Percentiles, RoutingSummary};
pub use divergence_request::{DivergenceReport, DivergenceRequest, DivergenceRun, ModelDivergence, TestOutcome};
pub use engine::perplexity_of;
pub(crate) use engine::{Evaluation, ModelScores, Reference, evaluate};
pub use error::EvalError;
pub(crate) use follow::{Follow, KeptScores, until_stopped};
pub(crate) use logits_file::{LOGITS_CUT, LogitsReader, LogitsWriter};
pub use opened::TextOptions;
pub(crate) use opened::{Opened, windows_of};
pub use paired::PairedDifference;
pub(crate) use paired::compare_means;
pub use perplexity::Perplexity;
pub(crate) use perplexity::score_chunks;
pub use perplexity_request::{PerplexityReport, PerplexityRequest};
pub use sequential::SequentialTest;
pub(crate) use state::{EvaluationState, section_key};
pub(crate) use task_request::score_model;
pub use task_request::{TaskReport, TaskRequest};
pub use windows::Windows;
pub(crate) use windows::texts_in_turn;
