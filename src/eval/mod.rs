//! How good a model is: scores computed from logits.
//!
//! [`Windows`] cuts a text as llama-perplexity does; [`evaluate`] runs one or several models over it, side by side
//! with a 16-bit reference when there is one, and keeps four numbers a scored token; [`Divergence::summary`] and
//! [`Perplexity`] turn them into the figures that publishers print; [`compare_means`] and [`SequentialTest`] say
//! whether two models differ.

mod divergence;
mod engine;
mod error;
mod logits_file;
mod paired;
mod perplexity;
mod state;
pub mod tasks;
mod windows;

pub use divergence::{Divergence, DivergenceSummary, Percentiles, ScoredToken};
pub use engine::{Evaluation, ModelScores, Observer, Reference, evaluate};
pub use error::EvalError;
pub use logits_file::{LOGITS_CUT, LogitsReader, LogitsWriter};
pub use paired::{PairedDifference, SequentialTest, Verdict, compare_means};
pub use perplexity::{Perplexity, score_chunks};
pub use state::{EvaluationState, section_key};
pub use windows::{Windows, texts_in_turn};
