//! The verb quantize: any GGUF in, a mixed-precision GGUF out.
//!
//! A [`Request`] says what is wanted. [`Request::decide`] touches no tensor: its [`Draft`] holds types, importance, sizes,
//! notes and problems, all that a dry run shows. [`Draft::write`] makes the files; [`write_all`] makes several from one
//! model, which share the pass of [`Rounding::Feedback`].

mod checks;
mod decide;
mod error;
pub mod feedback;
mod importance;
mod known_keys;
mod mtp;
mod override_kv;
mod report;
mod request;
mod run;
mod whole_gate;
pub mod write;

pub use decide::Draft;
pub(crate) use decide::standard_file_bytes;
pub use error::QuantizeError;
pub(crate) use override_kv::{apply as set_values, reader_type};
pub use report::{Report, RoundingReport, TensorRounding, TensorRow, Times};
pub use request::{Choices, MissingImportance, Mtp, Request, Rounding, Split, open_source};
pub(crate) use run::Guests;
pub use run::write_all;
pub use whole_gate::WholeVerdict;
