//! How large the result may be.

use crate::recipe::Target;

/// The limit of a plan.
#[derive(Debug, Clone, PartialEq)]
pub enum Budget {
    /// At most the bytes of the standard file of this target.
    Like(Target),
    /// At most these bytes of the file, headers and padding included.
    File(Size),
    /// At most these bits of tensor data per weight.
    BitsPerWeight(f64),
    /// The smallest file whose predicted mean KL divergence is at most this, in nats a token.
    Divergence(f64),
}

/// A size as it was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Size {
    /// The user's text: what a plan records.
    pub text: String,
    /// What it means.
    pub bytes: u64,
}

impl From<u64> for Size {
    fn from(bytes: u64) -> Size {
        Size { text: bytes.to_string(), bytes }
    }
}

impl Budget {
    /// The request in the words that a plan records.
    pub fn words(&self) -> String {
        match self {
            Budget::Like(target) => format!("like {target}"),
            Budget::File(size) => format!("size {}", size.text),
            Budget::BitsPerWeight(bits) => format!("{bits} bits per weight"),
            Budget::Divergence(limit) => format!("KL divergence {limit}"),
        }
    }
}
