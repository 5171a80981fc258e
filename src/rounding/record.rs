//! What a file tells about how it was rounded.

use serde::{Deserialize, Serialize};

use super::RoundingMethod;
use crate::gguf::Metadata;

/// How a file was rounded, or is to be rounded after a plan.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoundingRecord {
    /// The method that was asked for; single tensors may have another.
    pub method: RoundingMethod,
    /// What feedback went by.
    pub calibration: Option<CalibrationRecord>,
    /// True if the file as a whole is held against one rounded by search.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub final_gate: bool,
}

/// The text and the damping of feedback.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CalibrationRecord {
    /// The text's name.
    pub text: String,
    /// SHA-256 of its tokens and the length of their sequences.
    pub text_sha256: String,
    /// Tokens that were used.
    pub tokens: u64,
    /// Damping that was asked for; none where it was chosen for each input.
    pub damping: Option<f32>,
    /// Digest of the moments of gradients that tied rows together; none where rows were rounded each by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gradients_sha256: Option<String>,
}

impl RoundingRecord {
    /// Adds the keys `lwq.version` and `lwq.rounding.*` to the metadata of a file. ggml's own rounding leaves no trace, so
    /// that such files stay what llama-quantize writes. The length of all values is fixed, and gradients leave none: planned
    /// files have a limit.
    pub fn write(&self, metadata: &mut Metadata) {
        if self.method == RoundingMethod::Ggml {
            return;
        }
        metadata.set("lwq.version", env!("CARGO_PKG_VERSION"));
        metadata.set("lwq.rounding.method", self.method.name());
        if let Some(calibration) = &self.calibration {
            metadata.set("lwq.rounding.text_sha256", calibration.text_sha256.as_str());
            metadata.set("lwq.rounding.tokens", calibration.tokens);
            match calibration.damping {
                Some(damping) => metadata.set("lwq.rounding.damping", damping),
                None => metadata.set("lwq.rounding.damping", "chosen"),
            }
        }
        if self.final_gate {
            // The file is judged when it is written: the numbers take their places then.
            RoundingRecord::write_verdict(metadata, 0.0, 0.0, 0);
        }
    }

    /// Sets the keys `lwq.rounding.gate.*`: mean KL divergences on the text of the gate, nats a token, of the file and of
    /// the same types rounded by search, and the number of layers that keep search.
    pub fn write_verdict(metadata: &mut Metadata, kld: f64, search_kld: f64, searched_layers: u32) {
        metadata.set("lwq.rounding.gate.kld", kld as f32);
        metadata.set("lwq.rounding.gate.search_kld", search_kld as f32);
        metadata.set("lwq.rounding.gate.searched_layers", searched_layers);
    }
}
