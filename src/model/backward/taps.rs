//! Listening to the gradients at the outputs of the weight matrices.

use super::super::error::ModelError;
use super::super::taps::{Expert, Rows};

/// Gradients at some outputs of a weight matrix.
///
/// A product over many tokens may be reported in several blocks; block boundaries depend on the model and the group, never on
/// the number of threads. Rows come in the order of the tokens.
#[derive(Clone, Copy, Debug)]
pub struct TapGradient<'a> {
    /// Name of the weight.
    pub tensor: &'a str,
    /// Layer, `None` for the output matrix.
    pub layer: Option<usize>,
    /// For stacked experts, the one that these rows were routed to.
    pub expert: Option<Expert>,
    /// Of the loss by the product with the matrix, before scale and bias, `[n, n_out]`.
    pub rows: Rows<'a>,
}

/// A listener to the gradients at the outputs of all weight matrices.
pub trait GradientTaps {
    /// Whether gradients at this weight's outputs are wanted.
    fn wants(&self, tensor: &str) -> bool;

    /// Takes one block of rows.
    ///
    /// # Errors
    /// An error stops the run.
    fn gradient(&mut self, gradient: &TapGradient<'_>) -> Result<(), ModelError>;
}
