//! The second moments of a model's own inputs, one layer at a time, to whoever asks.
//!
//! [`crate::rounding::gptq`] rounds rows, given the second moment of what they are multiplied with. Here the unquantized
//! model runs layer by layer over a calibration text: a [`Stream`] adds up the moments of a layer's inputs (q, k and v
//! share one, gate and up share one, every expert has its own), factors them, shows them to a [`Visitor`], and forgets
//! them before the next layer. Nothing of the size of all moments is ever stored: hidden states lie in a file between two
//! layers, from where an interrupted run goes on.
//!
//! A second text, of other documents, shows the same inputs for judging.
//!
//! # Memory
//! For a layer whose distinct inputs are n₁, n₂ … wide, M = Σ 4nᵢ² bytes of moments of the calibration text turn into
//! factors one by one, and then M bytes of moments of the gate's text join them: 2M and a batch of 8,192 tokens. That is
//! 2.2 GB for a model 4,096 wide with feed-forward networks of 14,336, and 3.3 GB for one of 3,584 and 18,944, besides
//! some 0.3 GB for the forward pass and the rows that are being rounded. With factors in both orders it is 3M.

mod calibration;
mod corrected;
mod damping;
mod error;
mod gradients;
mod inputs;
mod states;
mod stream;

use crate::gguf::Gguf;
use crate::recipe::roles;

pub use calibration::{Calibration, CalibrationOptions, DEFAULT_TOKENS, FactorOrder};
pub use damping::Damping;
pub use error::{GradientsError, MomentsError};
pub use gradients::{
    DEFAULT_GRADIENT_TOKENS, DEFAULT_STATES_MEMORY, GradientMoments, GradientProvenance, GradientReport,
    GradientRequest, GradientSettings, GradientSink, GradientSquares, GradientsWriter, OutputGradients, Reached,
    gradient_moments, save_gradients,
};
pub use inputs::{Input, InputMatrix, Unusable};
pub(crate) use states::are_there as has_states;
pub use stream::{DEFAULT_MOMENT_MEMORY, Stream, StreamSettings, Visitor};

/// True if the forward pass of a model shows the input of this tensor, as far as its name tells: those of the layers,
/// and that of the output matrix.
pub fn has_input(name: &str, output: &str) -> bool {
    name == output || roles::block_number(name).is_some()
}

/// Name of the matrix that gives the logits, told from the tensors alone.
pub fn output_tensor(gguf: &Gguf) -> &'static str {
    if gguf.tensor(roles::OUTPUT_WEIGHT).is_some() { roles::OUTPUT_WEIGHT } else { roles::TOKEN_EMBD_WEIGHT }
}
