//! Language models: an architecture table and a forward pass with taps.
//!
//! Execution is layer-major: all tokens of a [`TokenGroup`] go through layer 0, then layer 1, and so on. Each
//! weight is read once per group from the mapped file and given back to the system after its layer, so a model
//! larger than memory runs at the speed of the disk. Results depend neither on the number of threads nor on
//! which sequences share a group.
//!
//! ```no_run
//! use std::sync::Arc;
//! use lwq::gguf::Gguf;
//! use lwq::model::{ForwardOptions, Model, NoTaps, Overrides, TokenGroup};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let gguf = Gguf::open("model.gguf")?;
//! let model = Model::open(&gguf)?;
//! let pass = model.pass(ForwardOptions::default(), Overrides::new())?;
//! let group = Arc::new(TokenGroup::from_sequences([[1u32, 15, 27]]));
//! let mut hidden = pass.embed(group)?;
//! pass.run_remaining(&mut hidden, &mut NoTaps)?;
//! pass.logits(&hidden, &[2], &mut NoTaps, |tile| {
//!     println!("{:?}", tile.logits);
//!     Ok(())
//! })?;
//! # Ok(())
//! # }
//! ```

mod activation_rounding;
mod arch;
mod backward;
mod cache;
mod error;
mod feed_forward;
mod gelu;
mod group;
mod head;
mod hparams;
mod layer_input;
pub(crate) mod math;
mod mixer;
mod nearest;
mod pass;
mod residual;
mod rope;
mod routes;
mod routing;
mod taps;
mod unused;
mod weights;

pub(crate) use arch::{ARCHITECTURES, Activation, Architecture, Gating, OutputMatrix, RopeFree};
#[cfg(test)]
pub(crate) use arch::{AttentionGate, DenseLayers, QkNorm, SharedExpert, Sinks};
pub use backward::{GradientTaps, OutputLoss, SampledLabels, TapGradient};
pub(crate) use cache::{LayerCache, caches};
pub use error::{ModelError, UnknownArchitecture};
pub use group::{HiddenStates, KeptWidths, TokenGroup};
pub use head::LogitsTile;
pub use hparams::Hparams;
pub use pass::{Activations, ForwardOptions, Pass};
pub use routes::{ForcedRoutes, RouteFlips, Routes};
pub use taps::{ChosenExperts, Expert, NoTaps, Rows, TapInput, Taps};
pub use weights::Overrides;

use crate::display::printable;
use crate::gguf::{Gguf, TensorInfo};
use crate::os;
use crate::progress::Watch;
use crate::recipe::roles::split_block;
use weights::Weights;

/// Memory assumed to be free where the system does not tell.
const ASSUMED_FREE: u64 = 4 << 30;

/// Tokens per group beyond which a model that stays in memory runs no faster.
const COMFORTABLE_GROUP: u64 = 32_768;

/// A model whose hyperparameters and tensors have been checked.
pub struct Model<'g> {
    gguf: &'g Gguf,
    hparams: Hparams,
    weights: Weights<'g>,
    /// Tensors of each layer, to be prefetched and released.
    layer_tensors: Vec<Vec<&'g TensorInfo>>,
    warnings: Vec<String>,
}

impl<'g> Model<'g> {
    /// Checks metadata and tensors of a file and makes it ready to run. Reads no weights.
    ///
    /// # Errors
    /// [`ModelError`] when the architecture is unknown, or metadata and tensors are incomplete, contradict each
    /// other or go beyond what can be computed.
    pub fn open(gguf: &'g Gguf) -> Result<Self, ModelError> {
        let hparams = Hparams::read(gguf)?;
        let weights = Weights::load(gguf, &hparams)?;
        let mut layer_tensors = vec![Vec::new(); hparams.n_layer()];
        for tensor in gguf.tensors() {
            if let Some((il, _)) = split_block(&tensor.name)
                && let Some(tensors) = usize::try_from(il).ok().and_then(|il| layer_tensors.get_mut(il))
            {
                tensors.push(tensor);
            }
        }
        let warnings = unused::unused(gguf, &hparams);
        Ok(Model { gguf, hparams, weights, layer_tensors, warnings })
    }

    /// The file.
    pub fn gguf(&self) -> &'g Gguf {
        self.gguf
    }

    /// What the file says of the model and the forward pass leaves aside, one line each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Tells `watch` the warnings, with the file's name.
    pub(crate) fn warn(&self, watch: &dyn Watch) {
        let file = printable(self.gguf.label());
        self.warnings.iter().for_each(|line| watch.warn(&format!("{file}: {line}")));
    }

    /// Hyperparameters.
    pub fn hparams(&self) -> &Hparams {
        &self.hparams
    }

    /// False if every position sees all of its sequence (`attention.causal` is false): such a model predicts no next token.
    pub fn is_causal(&self) -> bool {
        self.hparams.causal
    }

    /// Refuses models that do not predict the next token.
    ///
    /// # Errors
    /// [`ModelError::NotCausal`].
    pub fn check_predicts(&self) -> Result<(), ModelError> {
        if self.is_causal() {
            return Ok(());
        }
        Err(ModelError::NotCausal { key: format!("{}.attention.causal", self.hparams.arch.name) })
    }

    /// Number of layers.
    pub fn n_layer(&self) -> usize {
        self.hparams.n_layer()
    }

    /// Experts per layer and per token, for models that have some.
    pub fn experts(&self) -> Option<(usize, usize)> {
        self.hparams.experts.map(|experts| (experts.count, experts.used))
    }

    /// What a pass that has reached layer `next` keeps of earlier ones, beside the residual stream.
    pub fn kept_widths(&self, next: usize) -> Vec<KeptWidths> {
        let layers = self.hparams.layers.iter().take(next).enumerate();
        let kept = layers.filter_map(|(layer, params)| match &params.mixer {
            hparams::Mixer::Attention(shape) if shape.keys_are_kept => {
                Some(KeptWidths { layer, keys: shape.n_embd_k(), values: shape.n_embd_v() })
            }
            _ => None,
        });
        kept.collect()
    }

    /// Vocabulary size.
    pub fn n_vocab(&self) -> usize {
        self.weights.token_embd.n_out
    }

    /// Name of the matrix that gives the logits: `output.weight`, or the embedding when tied.
    pub fn output_tensor(&self) -> &'g str {
        self.weights.output.weight.name
    }

    /// Lets the system drop the pages of the embedding and the output matrix. [`Pass::logits`] and [`Pass::embed`]
    /// do it themselves; callers of [`Pass::logits_into`] do it after their last tile.
    pub fn release_output(&self) {
        self.release(&[self.weights.token_embd.name, self.weights.output.weight.name]);
    }

    /// Lets the system drop the pages of some weights.
    fn release(&self, names: &[&str]) {
        names.iter().filter_map(|name| self.gguf.tensor(name)).for_each(|tensor| self.gguf.release(tensor));
    }

    /// Prepares a run.
    ///
    /// # Errors
    /// [`ModelError::BadOverride`] when a replacement names no tensor of the model or has another size.
    pub fn pass<'m, 'o>(
        &'m self,
        options: ForwardOptions,
        overrides: Overrides<'o>,
    ) -> Result<Pass<'m, 'g, 'o>, ModelError> {
        overrides.check(self.gguf)?;
        Ok(Pass { model: self, options, overrides })
    }

    /// Tokens per group that keep a run with sequences of `n_ctx` tokens within `memory` bytes (default: half of
    /// what is free), a multiple of `n_ctx` and at least one sequence. Weights are not counted: they are mapped and
    /// the system may drop them at any time.
    ///
    /// A model that fits into free memory beside the run gains nothing from groups of more than
    /// 32,768 tokens, so it gets none: smaller groups show progress earlier.
    pub fn group_tokens(&self, memory: Option<u64>, n_ctx: usize) -> usize {
        let free = os::available_memory().unwrap_or(ASSUMED_FREE);
        let memory = memory.unwrap_or(free / 2);
        let n_ctx = n_ctx.max(1);
        let affordable = memory.saturating_sub(self.working_bytes(n_ctx)) / self.token_bytes();
        let weights: u64 = self.gguf.tensors().iter().filter_map(|t| t.bytes).fold(0, u64::saturating_add);
        let useful = if weights > free.saturating_sub(memory) { u64::MAX } else { COMFORTABLE_GROUP };
        let sequences = usize::try_from(affordable.min(useful)).unwrap_or(usize::MAX) / n_ctx;
        n_ctx * sequences.max(1)
    }

    /// Bytes that every token of a group takes throughout a run.
    fn token_bytes(&self) -> u64 {
        let kept = self.kept_widths(self.n_layer()).iter().map(|kept| kept.keys + kept.values).sum::<usize>();
        4 * (self.hparams.n_embd + kept) as u64
    }

    /// Upper bound of the bytes that a run takes beside the hidden states.
    fn working_bytes(&self, n_ctx: usize) -> u64 {
        let h = &self.hparams;
        let n_embd = h.n_embd as u64;
        let mixer_rows = (mixer::MIXER_TILE + n_ctx) as u64;
        let attention = h.widest_attention(|shape| {
            3 * shape.n_embd_q() + 2 * shape.n_embd_out() + 2 * (shape.n_embd_k() + shape.n_embd_v())
        });
        let delta_net = h.delta_net().map_or(0, |shape| 2 * shape.channels() + 3 * shape.inner());
        let per_row = 3 * n_embd + attention.max(delta_net) as u64;
        let widest = h.layers.iter().map(|layer| layer.n_ff).max().unwrap_or(0);
        let n_ff = h.experts.and_then(|e| e.n_ff).map_or(widest, |n| n.max(widest)) as u64;
        let ff_rows = feed_forward::tile_rows(n_ff as usize) as u64;
        let routed = if h.experts.is_some() { feed_forward::ROUTED_ROWS as u64 * 3 * n_embd } else { 0 };
        let feed_forward = ff_rows * (4 * n_embd + 4 * n_ff) + routed;
        4 * (mixer_rows * per_row).max(feed_forward) + 2 * head::TILE_BYTES as u64
    }
}
