//! Flags that several commands share, each declared once.

mod budget;
mod choice;
mod importance;
mod override_kv;
mod probes;
mod rounding;
mod types;

pub use budget::BudgetArgs;
pub use choice::{ChoiceArgs, measurement_path};
pub use importance::ImportanceArgs;
pub use override_kv::parse_override;
pub use probes::ProbeArgs;
pub use rounding::{RoundingFlags, rounding};
pub use types::{TypeArgs, parse_target, parse_type};
