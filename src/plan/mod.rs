//! Plans: a type for every tensor of one model, chosen for a byte budget, as a file that people can read.
//!
//! A [`Request`] makes one: [`crate::recipe::candidates`] says which types a tensor may get, [`crate::measure`] what each of
//! them costs, [`allocate`] chooses among them, [`PlanFile`] records the choice with what it was based on, and
//! [`PlanFile::choices_for`] turns it into what a [`quantize::Request`](crate::quantize::Request) takes, after checking that
//! model and importance matrix are the ones that the plan was made for.

pub mod allocate;
mod budget;
mod choices;
mod damage;
mod error;
mod file;
mod make;
mod map;
mod record;
mod request;
mod tensor_types;

pub use budget::{Budget, Size};
pub use error::PlanError;
pub use file::{DamageMethod, PLAN_VERSION, PlanFile, PlanRow, PlannedText};
pub use map::{MapStyle, map};
pub use record::record;
pub use request::Request;
pub use tensor_types::tensor_types;

#[cfg(test)]
pub(crate) use file::tests::example;
