//! What a decoder keeps of the tokens that it has seen, layer by layer: the facts behind the size of a cache.

use super::error::ModelError;
use super::hparams::{Hparams, Mixer};
use crate::gguf::Gguf;

/// What one layer keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LayerCache {
    /// Keys and values of every token that it may look back at.
    Tokens {
        /// Values of a token's keys.
        keys: u64,
        /// Values of a token's values.
        values: u64,
        /// Last tokens that it sees; all without it.
        window: Option<u64>,
    },
    /// A state of fixed size, in 32-bit floats.
    State {
        /// Numbers of it.
        numbers: u64,
    },
    /// Nothing: it uses what another layer keeps.
    Shared,
}

/// The caches of all layers that a pass runs.
///
/// # Errors
/// When the architecture is unknown, or its metadata are incomplete.
pub(crate) fn caches(gguf: &Gguf) -> Result<Vec<LayerCache>, ModelError> {
    let hparams = Hparams::read(gguf)?;
    let of_layer = |mixer: &Mixer| match mixer {
        Mixer::Attention(shape) if shape.keys_of.is_some() => LayerCache::Shared,
        Mixer::Attention(shape) => LayerCache::Tokens {
            keys: shape.n_embd_k() as u64,
            values: shape.n_embd_v() as u64,
            window: shape.window.map(|window| window.size as u64),
        },
        // The tokens that the convolution still needs, and a square for each value head.
        Mixer::DeltaNet(shape) => {
            LayerCache::State { numbers: ((shape.kernel - 1) * shape.channels() + shape.inner() * shape.head) as u64 }
        }
    };
    Ok(hparams.layers.iter().map(|layer| of_layer(&layer.mixer)).collect())
}
