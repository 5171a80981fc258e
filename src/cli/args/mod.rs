//! Flags that several commands share, each declared once.

mod budget;
mod choice;
mod importance;
mod model;
mod override_kv;
mod probes;
mod revision;
mod rounding;
mod text;
mod types;

pub use budget::{BudgetArgs, parse_size};
pub use choice::{ChoiceArgs, measurement_path};
pub use importance::{ImportanceArgs, parse_missing};
pub use model::{ActivationsArg, ModelArgs};
pub use override_kv::{parse_override, parse_pair};
pub use probes::ProbeArgs;
pub use revision::RevisionArg;
pub use rounding::{AimFlags, CalibrationFlags, RoundingArg, RoundingFlags, TargetsFlag, rounding};
pub use text::TextArgs;
pub use types::{TypeArgs, parse_target};
