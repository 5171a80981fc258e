//! Listening to the inputs of the weight matrices, and to the choice of experts.

use std::ops::Range;

use super::error::ModelError;

/// A row-major block of f32 values.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    data: &'a [f32],
    width: usize,
}

impl<'a> Rows<'a> {
    /// Rows of `width` values each.
    ///
    /// # Panics
    /// When `data` is not whole rows.
    pub fn new(data: &'a [f32], width: usize) -> Self {
        assert!(width > 0 && data.len().is_multiple_of(width), "{} values are not rows of {width}", data.len());
        Rows { data, width }
    }

    /// All values, row-major.
    pub fn data(&self) -> &'a [f32] {
        self.data
    }

    /// Values per row: `n_in` of the weight.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.data.len() / self.width
    }

    /// True without rows.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// The rows in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &'a [f32]> {
        self.data.chunks_exact(self.width)
    }
}

/// Which matrix of a stack of experts an input went to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expert {
    /// Number of the expert.
    pub index: usize,
    /// Experts in the stack.
    pub count: usize,
}

/// One block of input rows of a weight matrix product.
///
/// A product over many tokens may be reported in several blocks; block boundaries depend on the model and the
/// group, never on the number of threads. Rows come in the order of the tokens; a token that was routed to an
/// expert contributes one row to it.
#[derive(Clone, Copy, Debug)]
pub struct TapInput<'a> {
    /// Names of the weights that are multiplied with these rows (q, k and v share one input; gate and up too).
    pub tensors: &'a [&'a str],
    /// Layer, `None` for the output matrix.
    pub layer: Option<usize>,
    /// For stacked experts, the one that these rows were routed to.
    pub expert: Option<Expert>,
    /// The rows before any rounding, `[n, n_in]`.
    pub rows: Rows<'a>,
}

/// The experts that a layer's router chose for consecutive tokens.
#[derive(Clone, Copy, Debug)]
pub struct ChosenExperts<'a> {
    /// Layer.
    pub layer: usize,
    /// Row of the group of the first token.
    pub first_row: usize,
    /// Experts in the layer.
    pub count: usize,
    /// Experts per token.
    pub used: usize,
    /// Their numbers, `[n, used]`, best first.
    pub experts: &'a [u32],
}

/// A listener to the inputs of all weight matrices.
pub trait Taps {
    /// Whether inputs of this weight are wanted. A pass whose only purpose is a tap may skip what nobody wants.
    fn wants(&self, _tensor: &str) -> bool {
        true
    }

    /// Takes one block of rows.
    ///
    /// # Errors
    /// An error stops the run.
    fn input(&mut self, _input: &TapInput<'_>) -> Result<(), ModelError> {
        Ok(())
    }

    /// Takes the experts that some tokens went to.
    fn chosen_experts(&mut self, _chosen: &ChosenExperts<'_>) {}

    /// The experts that the tokens of `rows` must go to instead of those with the best scores, `[rows.len(), used]`, each
    /// below the number of experts.
    fn forced_experts(&self, _layer: usize, _rows: Range<usize>, _used: usize) -> Option<&[u32]> {
        None
    }
}

/// Listens to nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoTaps;

impl Taps for NoTaps {
    fn wants(&self, _tensor: &str) -> bool {
        false
    }
}
