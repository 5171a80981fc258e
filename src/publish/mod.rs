//! The verb: a model in, a finished repository out.
//!
//! A [`Request`] says what is wanted. [`Request::decide`] reads headers and decides on names, sizes, steps, time and disk: its
//! [`Draft`] holds all that a dry run shows. [`Draft::run`] makes the repository from the calls of the other verbs: convert,
//! importance matrix, measurement, plans, rounding of all files in one pass of the model, evaluation of all in one pass beside
//! the base, a choice by a stated rule, and the card. What is finished is kept in a journal in the output folder, so that the
//! same request goes on after any interruption, and another one redoes only what it changes.

mod bench;
mod card;
mod checks;
mod choose;
mod commands;
mod cost;
mod draft;
mod error;
mod finish;
mod fit;
mod forecast;
mod identity;
mod journal;
mod pages;
mod progress;
mod report;
mod repository;
mod request;
mod run;
mod score;
mod source;
mod stages;
mod status;

pub use bench::{Speed, parse as parse_llama_bench};
pub use card::TEMPLATE;
pub use choose::{Measured, Reason, choose, next_size};
pub use draft::Draft;
pub use error::PublishError;
pub use fit::{CacheType, ContextMemory, Fit, parse_context};
pub use forecast::{Forecast, Step, WantedFile};
pub use identity::{FrontMatter, Said};
pub use journal::{Progress, StepState};
pub use report::{
    AgainstEntry, BaseFacts, EvaluationFacts, Figures, FileEntry, FolderEntry, Hashed, Provenance, REPORT_VERSION,
    Recommendation, Report, Shrinkage, StandardEntry, TextEntry, TriedEntry,
};
pub use request::{Against, DEFAULT_TARGETS, DEFAULT_TRIALS, EvaluationOptions, ImportanceOptions, Request};
pub use run::Published;
pub use status::{Status, StatusFile};
