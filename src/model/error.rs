//! What can be wrong with a model or its input.

use crate::gguf::GgufError;

/// A model whose `general.architecture` is not in the table.
#[derive(Debug, thiserror::Error)]
#[error(
    "architecture {found:?} is not supported: the forward pass lacks {missing}; nearest is {nearest}, known of its parts: \
     {parts} (`lwq list architectures` names all; quantize, and plan --method error, need no forward pass)"
)]
pub struct UnknownArchitecture {
    /// Value found.
    pub found: String,
    /// Name of the known architecture with the same parts, as far as any has.
    pub nearest: String,
    /// Parts of the model that the forward pass has, comma separated.
    pub parts: String,
    /// What it lacks.
    pub missing: String,
}

/// Errors of opening a model and of its forward pass.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The container could not be read or a value has another type than the key demands.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// `general.architecture` is not in the table.
    #[error("{0}")]
    UnknownArchitecture(Box<UnknownArchitecture>),
    /// A metadata key without which the model cannot be computed.
    #[error("metadata key {key} is missing; the file is no complete language model")]
    MissingKey {
        /// The key.
        key: String,
    },
    /// A metadata value out of its range or contradicting another.
    #[error("metadata key {key} is {found}; expected {expected}")]
    BadValue {
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// What would be accepted.
        expected: String,
    },
    /// A model that looks both ways was to predict the next token.
    #[error(
        "metadata key {key} is false: attention sees the tokens after a position, too; perplexity, divergence and tasks are made of predictions of the next token and need a causal model"
    )]
    NotCausal {
        /// The key.
        key: String,
    },
    /// A tensor that this architecture needs.
    #[error("tensor {name} is missing; architecture {arch} needs it with shape {expected}")]
    MissingTensor {
        /// Tensor name.
        name: String,
        /// Architecture.
        arch: &'static str,
        /// Expected shape, ggml order.
        expected: String,
    },
    /// A tensor of another shape than the metadata implies.
    #[error("tensor {name} has shape {found}; the metadata imply {expected}")]
    BadShape {
        /// Tensor name.
        name: String,
        /// Shape found, ggml order.
        found: String,
        /// Shape wanted, ggml order.
        expected: String,
    },
    /// A tensor whose storage type has no decoder.
    #[error("tensor {name} has type {ty}, which cannot be decoded")]
    UndecodableType {
        /// Tensor name.
        name: String,
        /// Its type.
        ty: String,
    },
    /// A tensor that the architecture does not use: computing without it would give wrong figures.
    #[error("tensor {name} is not part of architecture {arch}; refusing to compute without it")]
    UnexpectedTensor {
        /// Tensor name.
        name: String,
        /// Architecture.
        arch: &'static str,
    },
    /// A replacement tensor of the wrong name or size.
    #[error("replacement for tensor {name}: {reason}")]
    BadOverride {
        /// Tensor name.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// A token id outside of the vocabulary.
    #[error("token {token} at position {position} is outside of the vocabulary of {n_vocab}")]
    TokenOutOfRange {
        /// Token id.
        token: u32,
        /// Index in the group.
        position: usize,
        /// Vocabulary size.
        n_vocab: usize,
    },
    /// The input cannot be run as asked.
    #[error("{reason}")]
    BadInput {
        /// What is wrong.
        reason: String,
    },
    /// A NaN or an infinity appeared.
    #[error("{}: {tensor} gave NaN or infinity for token {token} of the group; its weights are damaged or overflow",
        layer.map_or_else(|| "outside of the layers".to_owned(), |il| format!("layer {il}")))]
    NonFinite {
        /// Layer number, `None` for the embedding and the output matrix.
        layer: Option<usize>,
        /// The weight whose product is not finite.
        tensor: String,
        /// Row of the group.
        token: usize,
    },
    /// A tap has seen what it wanted, and wants no more of the run.
    #[error("a tap has ended the run")]
    Seen,
    /// The run was cancelled.
    #[error("interrupted")]
    Interrupted,
}
