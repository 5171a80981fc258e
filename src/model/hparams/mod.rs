//! Hyperparameters: read from the metadata, checked once, trusted afterwards.

mod experts;
mod keys;
mod mixers;
mod rope;

use super::arch::{Architecture, DeltaNet, Multipliers, ValueHeads, WindowedRope};
use super::error::ModelError;
use super::nearest;
use crate::gguf::Gguf;
pub(super) use experts::Experts;
use keys::{Keys, Layers, MAX_LAYERS, MAX_WIDTH};
pub(super) use rope::{LayerRope, RopeScaling, RopeSettings, Window};

/// Everything the forward pass needs to know beside the tensors.
#[derive(Clone, Debug)]
pub struct Hparams {
    /// Row of the architecture table.
    pub(super) arch: &'static Architecture,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Context length of the training.
    pub n_ctx_train: usize,
    /// The layers of a pass.
    pub(super) layers: Vec<LayerParams>,
    /// Blocks in the file: layers, and behind them those that predict further tokens.
    pub(super) n_block: usize,
    /// Epsilon of all norms.
    pub(super) norm_epsilon: f32,
    /// What all rotary embeddings share.
    pub(super) rope: RopeSettings,
    /// Cap of attention scores.
    pub(super) score_cap: Option<f32>,
    /// Cap of logits.
    pub(super) logit_cap: Option<f32>,
    /// Multiplies embeddings.
    pub(super) embedding_scale: Option<f32>,
    /// Multiplies what mixer and feed-forward network add to the residual stream.
    pub(super) residual_scale: Option<f32>,
    /// Multiplies logits.
    pub(super) logit_scale: Option<f32>,
    /// `attention.causal`: false where every position sees all of its sequence.
    pub(super) causal: bool,
    /// Experts, when the model has any.
    pub(super) experts: Option<Experts>,
    /// Width of each layer's own input.
    pub(super) layer_input: Option<usize>,
}

/// One layer.
#[derive(Clone, Debug)]
pub(super) struct LayerParams {
    /// What mixes tokens.
    pub mixer: Mixer,
    /// Width of the dense feed-forward network.
    pub n_ff: usize,
    /// Whether it has experts, as far as the metadata tell.
    pub has_experts: bool,
    /// Limit of the experts' gates, and that of other networks.
    pub clamps: [Option<f32>; 2],
}

/// What mixes tokens in a layer.
#[derive(Clone, Debug)]
pub(super) enum Mixer {
    Attention(AttentionShape),
    DeltaNet(DeltaShape),
}

/// Dimensions and rules of a layer's attention.
#[derive(Clone, Debug)]
pub(super) struct AttentionShape {
    /// Query heads.
    pub n_head: usize,
    /// Key and value heads.
    pub n_head_kv: usize,
    /// Values of a query's or key's head.
    pub head_k: usize,
    /// Values of a value's head.
    pub head_v: usize,
    /// Scale of scores.
    pub score_scale: f32,
    /// Multiplies what its output matrix gives.
    pub value_scale: Option<f32>,
    /// What the layer sees; everything before a token without it.
    pub window: Option<Window>,
    /// Rotary embedding, if it has one.
    pub rope: Option<LayerRope>,
    /// Growth of queries with their position.
    pub temperature: Option<Temperature>,
    /// Queries and keys are normed by head without weights, after the rotary embedding.
    pub unweighted_norm: bool,
    /// The earlier layer whose keys and values it uses instead of its own.
    pub keys_of: Option<usize>,
    /// Later layers use its keys and values.
    pub keys_are_kept: bool,
}

impl AttentionShape {
    /// Query values per token.
    pub(super) fn n_embd_q(&self) -> usize {
        self.n_head * self.head_k
    }

    /// Key values per token.
    pub(super) fn n_embd_k(&self) -> usize {
        self.n_head_kv * self.head_k
    }

    /// Values per token.
    pub(super) fn n_embd_v(&self) -> usize {
        self.n_head_kv * self.head_v
    }

    /// Values per token that attention gives.
    pub(super) fn n_embd_out(&self) -> usize {
        self.n_head * self.head_v
    }
}

/// Queries are multiplied by `1 + scale * ln(floor((position + offset) / length) + 1)`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Temperature {
    pub scale: f32,
    pub length: f32,
    pub offset: f32,
}

impl Temperature {
    /// The factor of a query at `position`.
    pub(super) fn at(self, position: usize) -> f32 {
        1.0 + self.scale * (((position as f32 + self.offset) / self.length).floor() + 1.0).ln()
    }
}

/// Dimensions of a delta net.
#[derive(Clone, Copy, Debug)]
pub(super) struct DeltaShape {
    /// Row of the architecture.
    pub row: DeltaNet,
    /// Query and key heads.
    pub n_key: usize,
    /// Value heads.
    pub n_value: usize,
    /// Values of any head; the state of a value head is a square of them.
    pub head: usize,
    /// Tokens that the convolution sees.
    pub kernel: usize,
}

impl DeltaShape {
    /// Values per token that go through the convolution: queries, keys, values.
    pub(super) fn channels(&self) -> usize {
        (2 * self.n_key + self.n_value) * self.head
    }

    /// Factor of queries of length one.
    pub(super) fn query_scale(&self) -> f32 {
        1.0 / (self.head as f32).sqrt()
    }

    /// The key head that value head `head` uses.
    pub(super) fn key_head(&self, head: usize) -> usize {
        match self.row.heads {
            ValueHeads::Tiled => head % self.n_key,
            ValueHeads::Grouped => head / (self.n_value / self.n_key),
        }
    }

    /// Where query, key and value of value head `head` begin among the channels.
    pub(super) fn first_channels(&self, head: usize) -> [usize; 3] {
        let key_head = self.key_head(head);
        [key_head, self.n_key + key_head, 2 * self.n_key + head].map(|head| head * self.head)
    }

    /// Values per token of all value heads.
    pub(super) fn inner(&self) -> usize {
        self.n_value * self.head
    }
}

impl Hparams {
    /// Reads and checks all hyperparameters of a model.
    pub(super) fn read(gguf: &Gguf) -> Result<Self, ModelError> {
        let metadata = gguf.metadata();
        let name = metadata
            .str("general.architecture")?
            .ok_or_else(|| ModelError::MissingKey { key: "general.architecture".into() })?;
        let Some(arch) = Architecture::by_name(name) else { return Err(nearest::unknown_architecture(gguf, name)) };
        let keys = Keys { metadata, arch: arch.name };
        let layers = layer_counts(&keys, arch)?;
        let n_embd = keys.required_count("embedding_length", MAX_WIDTH)?;
        let n_ctx_train = keys.required_count("context_length", u64::from(u32::MAX))?;
        let experts = experts::experts(&keys, arch)?;
        let n_ff = match keys.per_layer("feed_forward_length", layers)? {
            Some(n_ff) => n_ff,
            None if experts.is_some_and(|e| e.n_ff.is_some()) => vec![0; layers.run],
            None => return Err(keys.missing("feed_forward_length")),
        };
        if experts.is_none_or(|e| e.n_ff.is_none()) && n_ff.contains(&0) {
            return Err(keys.bad("feed_forward_length", 0, "at least 1"));
        }
        let epsilon_key = "attention.layer_norm_rms_epsilon";
        let norm_epsilon = keys.non_negative(epsilon_key)?.ok_or_else(|| keys.missing(epsilon_key))?;
        let factors = Factors::read(&keys, arch, n_embd, layers.run)?;
        let (rope, mixers) = mixers::read(&keys, arch, layers, [n_embd, n_ctx_train], &factors)?;
        let has_experts = experts::expert_layers(&keys, arch, layers)?;
        let clamps =
            [clamps(&keys, arch, "swiglu_clamp_exp", layers)?, clamps(&keys, arch, "swiglu_clamp_shexp", layers)?];
        let layers_of = mixers.into_iter().zip(n_ff).zip(has_experts).enumerate();
        let layer_params = layers_of.map(|(il, ((mixer, n_ff), has_experts))| LayerParams {
            mixer,
            n_ff,
            has_experts,
            clamps: [clamps[0][il], clamps[1][il]],
        });
        let cap = |default: Option<f32>, suffix: &str| -> Result<Option<f32>, ModelError> {
            let Some(default) = default else { return Ok(None) };
            Ok(Some(keys.non_negative(suffix)?.unwrap_or(default)).filter(|&cap| cap > 0.0))
        };
        let layer_input = match arch.layer_inputs {
            true => keys.count("embedding_length_per_layer_input", MAX_WIDTH)?.filter(|&width| width > 0),
            false => None,
        };
        Ok(Hparams {
            arch,
            n_embd,
            n_ctx_train,
            layers: layer_params.collect(),
            n_block: layers.all,
            norm_epsilon,
            rope,
            score_cap: cap(arch.attention.score_cap, "attn_logit_softcapping")?,
            logit_cap: cap(arch.logit_cap, "final_logit_softcapping")?,
            embedding_scale: factors.embedding,
            residual_scale: factors.residual,
            logit_scale: factors.logits,
            causal: keys.bool("attention.causal")?.unwrap_or(true),
            experts,
            layer_input,
        })
    }

    /// Number of layers that a pass runs.
    pub(super) fn n_layer(&self) -> usize {
        self.layers.len()
    }

    /// The largest of what `of` says of the layers with attention.
    pub(super) fn widest_attention(&self, of: impl Fn(&AttentionShape) -> usize) -> usize {
        let attention = self.layers.iter().filter_map(|layer| match &layer.mixer {
            Mixer::Attention(shape) => Some(of(shape)),
            Mixer::DeltaNet(_) => None,
        });
        attention.max().unwrap_or(0)
    }

    /// The delta net, if any layer has one: they are alike.
    pub(super) fn delta_net(&self) -> Option<DeltaShape> {
        self.layers.iter().find_map(|layer| match &layer.mixer {
            Mixer::DeltaNet(shape) => Some(*shape),
            Mixer::Attention(_) => None,
        })
    }
}

fn layer_counts(keys: &Keys, arch: &Architecture) -> Result<Layers, ModelError> {
    let all = keys.required_count("block_count", MAX_LAYERS)?;
    let suffix = "nextn_predict_layers";
    let behind = match arch.next_tokens {
        true => keys.count(suffix, MAX_LAYERS)?.unwrap_or(0),
        false => 0,
    };
    if behind >= all {
        return Err(keys.bad(suffix, behind, format!("less than block_count, {all}")));
    }
    Ok(Layers { run: all - behind, all })
}

/// Numbers of the file that scale one thing or another.
struct Factors {
    embedding: Option<f32>,
    residual: Option<f32>,
    logits: Option<f32>,
    scores: Option<f32>,
    rotates: bool,
}

impl Factors {
    fn read(keys: &Keys, arch: &Architecture, n_embd: usize, n_layer: usize) -> Result<Factors, ModelError> {
        let none = Factors { embedding: None, residual: None, logits: None, scores: None, rotates: true };
        let by_file = |suffix: &str| keys.finite(suffix).map(|factor| factor.filter(|&factor| factor != 0.0));
        Ok(match arch.multipliers {
            Multipliers::None => none,
            Multipliers::RootOfWidth => Factors { embedding: Some((n_embd as f32).sqrt()), ..none },
            Multipliers::ByKeys => Factors {
                embedding: by_file("embedding_scale")?,
                residual: by_file("residual_scale")?,
                logits: Some(by_file("logit_scale")?.ok_or_else(|| keys.missing("logit_scale"))?.recip()),
                scores: by_file("attention.scale")?,
                // Granite says so where no layer rotates.
                rotates: keys.bool("rope.scaling.finetuned")?.unwrap_or(true),
            },
            Multipliers::MiniCpm => Factors {
                embedding: Some(by_file("embedding_scale")?.unwrap_or(12.0)),
                residual: Some(by_file("residual_scale")?.unwrap_or(1.4 / (n_layer as f32).sqrt())),
                logits: Some(by_file("logit_scale")?.unwrap_or(256.0 / n_embd as f32).recip()),
                ..none
            },
        })
    }
}

/// Limits of gates per layer; below `1e-6` there is none.
fn clamps(keys: &Keys, arch: &Architecture, suffix: &str, layers: Layers) -> Result<Vec<Option<f32>>, ModelError> {
    let limits = match arch.feed_forward.clamped {
        true => keys.numbers(suffix, layers)?,
        false => None,
    };
    let limits = limits.unwrap_or_else(|| vec![0.0; layers.run]);
    Ok(limits.into_iter().map(|limit| Some(limit).filter(|&limit| limit > 1e-6)).collect())
}

/// True if the file's window rule has a rotary base of its own.
pub(super) fn reads_windowed_base(arch: &Architecture) -> bool {
    arch.attention.sliding.is_some_and(|s| matches!(s.rope, WindowedRope::OwnBase | WindowedRope::Unscaled(_)))
}
