//! Rounding a model with the second moments of its own inputs, in one pass over the layers.
//!
//! [`crate::feedback`] rounds rows, given the second moment of what they are multiplied with. Here the unquantized model
//! runs layer by layer over a calibration text: a [`Stream`] adds up the moments of a layer's inputs (q, k and v share
//! one, gate and up share one, every expert has its own), factors them, shows them, and forgets them before the next
//! layer. A [`Run`] rounds the layer's tensors with them. Nothing of the size of all moments is ever stored: hidden
//! states lie in a file between two layers, and each finished layer goes to the disk, from where an interrupted run goes
//! on.
//!
//! A second text, of other documents, judges every tensor: where its error with feedback exceeds that of a search
//! without second moments, the search's result is kept.
//!
//! # Memory
//! For a layer whose distinct inputs are n₁, n₂ … wide, M = Σ 4nᵢ² bytes of moments of the calibration text turn into
//! factors one by one, and then M bytes of moments of the gate's text join them: 2M and a batch of 8,192 tokens. That is
//! 2.2 GB for a model 4,096 wide with feed-forward networks of 14,336, and 3.3 GB for one of 3,584 and 18,944, besides
//! some 0.3 GB for the forward pass and the rows that are being rounded.

mod checkpoint;
mod error;
mod inputs;
mod outcome;
mod record;
mod run;
mod states;
mod stream;
mod tensor;
mod text;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use checkpoint::{Conditions, PartialFolder};
pub use error::RoundingError;
pub use inputs::{Input, InputMatrix, Unusable};
pub use outcome::{Kept, Outcome, RoleRow, by_role, reasons};
pub use record::{CalibrationRecord, RoundingRecord};
pub use run::{Run, RunOutput, has_input, output_tensor};
pub use stream::{DEFAULT_MOMENT_MEMORY, Damping, OnWork, Stream, StreamSettings, Visitor};
pub(crate) use tensor::read_rows;
pub use tensor::round_by_search;
pub use text::Text;

/// How weights become codes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// As ggml does, the same bytes.
    #[default]
    Ggml,
    /// Searches for the scales on the grids as they are decoded, column by column for itself.
    Search,
    /// Each column makes up for the errors of those before it, by the second moment of the inputs.
    Feedback,
}

impl Method {
    /// The name in files and flags.
    pub fn name(self) -> &'static str {
        match self {
            Method::Ggml => "ggml",
            Method::Search => "search",
            Method::Feedback => "feedback",
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
