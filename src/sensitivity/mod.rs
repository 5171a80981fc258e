//! What rounding does to a model, measured: the error that each type makes in each tensor.
//!
//! Nothing here decides anything; [`crate::allocate`] does.

mod prior;
mod weight_error;

pub use prior::prior_slopes;
pub use weight_error::{
    ColumnWeights, DEFAULT_SAMPLED_WEIGHTS, RowErrors, Sampling, WeightErrorProblem, fits_row, weight_errors,
};
