//! Plans: a type for every tensor of one model, chosen for a byte budget, as a file that people can read.
//!
//! [`candidates`] says which types a tensor may get, [`crate::allocate`] chooses among them, [`PlanFile`] records the
//! choice with what it was based on, and [`PlanFile::choices`] turns it into what `lwq quantize` does, after checking
//! that model and importance matrix are the ones that the plan was made for.

mod apply;
pub mod candidates;
mod error;
mod file;
mod fingerprint;
mod record;
mod tensor_types;

pub use error::PlanError;
pub use file::{Method, PLAN_VERSION, PlanFile, PlanRow, ProbeText, SourceFile};
pub use fingerprint::imatrix_fingerprint;
pub use record::record;
pub use tensor_types::tensor_types;

#[cfg(test)]
pub(crate) use file::tests::example;
