//! Rounding a model with the second moments of its own inputs, in one pass over the layers.
//!
//! A [`Run`] rounds each layer's tensors with what [`crate::moments`] shows of their inputs. A second text, of other
//! documents, judges every tensor: where its error with feedback exceeds that of a search without second moments, the
//! search's result is kept. Each finished layer goes to the disk, into a [`PartialFolder`], from where an interrupted run
//! goes on.

mod checkpoint;
mod error;
mod outcome;
mod run;
mod tensor;

pub use checkpoint::PartialFolder;
pub use error::RoundingError;
pub use outcome::{Kept, Outcome, RoleRow, by_role, reasons};
pub(crate) use run::Rounder;
pub use run::{Run, RunOutput};
