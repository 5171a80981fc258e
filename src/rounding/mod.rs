//! From rows of weights to better blocks, without files or models.
//!
//! [`RoundingMethod::Ggml`] is [`crate::quant::quantize_rows`]: the same bytes as ggml. [`round_by_search`] searches each
//! block's scales by itself. [`gptq`] lets each column make up for the errors of those before it, given the second moment
//! of the inputs, which [`crate::moments`] shows. [`grid`] does all this for the formats of compressed-tensors.

pub mod gptq;
pub mod grid;
mod record;
mod search;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use record::{CalibrationRecord, RoundingRecord};
pub use search::round_by_search;

/// How weights become codes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RoundingMethod {
    /// As ggml does, the same bytes.
    #[default]
    Ggml,
    /// Searches for the scales on the grids as they are decoded, column by column for itself.
    Search,
    /// Each column makes up for the errors of those before it, by the second moment of the inputs.
    #[doc(alias = "GPTQ")]
    #[doc(alias = "LDLQ")]
    Feedback,
}

impl RoundingMethod {
    /// The name in files and flags.
    pub fn name(self) -> &'static str {
        match self {
            RoundingMethod::Ggml => "ggml",
            RoundingMethod::Search => "search",
            RoundingMethod::Feedback => "feedback",
        }
    }
}

impl fmt::Display for RoundingMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
