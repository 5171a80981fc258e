//! Plans: a type for every tensor of one model, chosen for a byte budget, as a file that people can read.
//!
//! [`crate::recipe::candidates`] says which types a tensor may get, [`allocate`] chooses among them, [`PlanFile`] records the
//! choice with what it was based on, and [`PlanFile::choices`] turns it into what `lwq quantize` does, after checking
//! that model and importance matrix are the ones that the plan was made for.

pub mod allocate;
mod apply;
mod error;
mod file;
mod record;
mod tensor_types;

pub use error::PlanError;
pub use file::{DamageMethod, PLAN_VERSION, PlanFile, PlanRow, ProbeText};
pub use record::record;
pub use tensor_types::tensor_types;

#[cfg(test)]
pub(crate) use file::tests::example;
