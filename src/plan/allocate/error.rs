//! Why there is no allocation.

use thiserror::Error;

use crate::gguf::TensorType;

/// Why there is no allocation.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum AllocateError {
    /// Every allocation is larger than the budget.
    #[error("the budget of {budget} bytes is too small; the smallest choice takes {smallest}, the largest {largest}")]
    BudgetTooSmall {
        /// The budget in bytes.
        budget: u64,
        /// Bytes of the smallest allocation.
        smallest: u64,
        /// Bytes of the largest allocation.
        largest: u64,
    },
    /// Every allocation has more damage than allowed.
    #[error("a damage of at most {limit} cannot be reached; the least possible is {least}")]
    DamageTooSmall {
        /// The wanted limit.
        limit: f64,
        /// The least damage that any allocation has.
        least: f64,
    },
    /// An item has no usable candidate.
    #[error("{item}: no type is left to choose from")]
    NoCandidate {
        /// The item's name.
        item: String,
    },
    /// Damage that is negative or not a number.
    #[error("{item}: the damage of type {ty} is {damage}, expected a number that is not negative")]
    BadDamage {
        /// The item's name.
        item: String,
        /// The candidate's type.
        ty: TensorType,
        /// Its damage.
        damage: f64,
    },
}
