//! Hyperparameters: read from the metadata, checked once, trusted afterwards.

mod experts;
mod keys;
mod rope;

use super::arch::{
    Architecture, DeltaNet, Multipliers, QkNorm, RopeFree, ScoreScale, Temperature as TemperatureRow, WindowedRope,
};
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
        let (rope, mixers) = mixers(&keys, arch, layers, n_embd, n_ctx_train, &factors)?;
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

/// What mixes tokens in each layer.
fn mixers(
    keys: &Keys,
    arch: &'static Architecture,
    layers: Layers,
    n_embd: usize,
    n_ctx_train: usize,
    factors: &Factors,
) -> Result<(RopeSettings, Vec<Mixer>), ModelError> {
    let (n_head, n_head_kv) = heads(keys, layers)?;
    let (head, head_windowed) = (head_sizes(keys, arch, n_embd, &n_head)?, windowed_head_sizes(keys)?);
    let (settings, rope) = rope::settings(keys, arch, n_ctx_train, head.0)?;
    let windows = rope::windows(keys, arch, layers)?;
    let head_windowed = match (arch.attention.own_windowed_size, head_windowed) {
        (true, (k, v)) => (k.unwrap_or(head.0), v.unwrap_or(head.1)),
        (false, (k, v)) => {
            for (suffix, found) in [("attention.key_length_swa", k), ("attention.value_length_swa", v)] {
                if let Some(found) = found.filter(|&found| found != head.0) {
                    return Err(keys.bad(suffix, found, format!("the key length {}", head.0)));
                }
            }
            head
        }
    };
    if head_windowed.0 != head_windowed.1 && !arch.attention.own_value_size {
        return Err(keys.bad(
            "attention.value_length_swa",
            head_windowed.1,
            format!("the key length {}", head_windowed.0),
        ));
    }
    let any_window = windows.iter().any(Option::is_some);
    let windowed_rope = match any_window {
        true => rope::windowed_rope(keys, arch, rope, head_windowed.0)?,
        false => rope,
    };
    let delta = delta_layers(keys, arch, layers)?;
    let shared = shared_keys(keys, arch, &windows, layers)?;
    let value_scale = match arch.attention.own_value_size {
        true => keys.finite("attention.value_scale")?.filter(|&scale| scale != 0.0 && scale != 1.0),
        false => None,
    };
    let mut mixers = Vec::with_capacity(layers.run);
    for (il, window) in windows.iter().enumerate() {
        if let Some((_, shape)) = delta.as_ref().filter(|(layers, _)| layers[il]) {
            mixers.push(Mixer::DeltaNet(*shape));
            continue;
        }
        if n_head[il] == 0 {
            return Err(keys.bad("attention.head_count", 0, "at least 1"));
        }
        if n_head_kv[il] == 0 || n_head[il] % n_head_kv[il] != 0 {
            let expected = format!("a divisor of the head count {}", n_head[il]);
            return Err(keys.bad("attention.head_count_kv", n_head_kv[il], expected));
        }
        let (head_k, head_v) = if window.is_some() { head_windowed } else { head };
        let free = match arch.rope.free {
            RopeFree::None => false,
            RopeFree::Every(every) => (il + 1) % every == 0,
            RopeFree::SeeingAll => any_window && window.is_none(),
        };
        let rotates = factors.rotates && !free;
        let rope = if window.is_some() { windowed_rope } else { rope };
        let usual_scale = match arch.attention.score_scale {
            ScoreScale::One => 1.0,
            by if by.is_by_embedding(layers.run) => 1.0 / ((n_embd / n_head[il]) as f32).sqrt(),
            _ => 1.0 / (head_k as f32).sqrt(),
        };
        let many_experts = keys.count("expert_count", u64::MAX)? == Some(128);
        mixers.push(Mixer::Attention(AttentionShape {
            n_head: n_head[il],
            n_head_kv: n_head_kv[il],
            head_k,
            head_v,
            score_scale: factors.scores.unwrap_or(usual_scale),
            value_scale,
            window: *window,
            rope: rotates.then_some(rope),
            temperature: temperature(keys, arch, &settings, rotates)?,
            unweighted_norm: arch.attention.qk_norm == QkNorm::Unweighted && rotates && !many_experts,
            keys_of: shared[il],
            keys_are_kept: shared.contains(&Some(il)),
        }));
    }
    Ok((settings, mixers))
}

fn heads(keys: &Keys, layers: Layers) -> Result<(Vec<usize>, Vec<usize>), ModelError> {
    let suffix = "attention.head_count";
    let n_head = keys.per_layer(suffix, layers)?.ok_or_else(|| keys.missing(suffix))?;
    let n_head_kv = keys.per_layer("attention.head_count_kv", layers)?.unwrap_or_else(|| n_head.clone());
    Ok((n_head, n_head_kv))
}

/// Values of a key's and of a value's head.
fn head_sizes(keys: &Keys, arch: &Architecture, n_embd: usize, n_head: &[usize]) -> Result<(usize, usize), ModelError> {
    let usual = || match n_head.iter().find(|&&heads| heads > 0).map(|heads| n_embd / heads) {
        None => Err(keys.bad("attention.head_count", 0, "at least 1")),
        Some(0) => Err(keys.bad("attention.head_count", n_head[0], format!("at most embedding_length {n_embd}"))),
        Some(head) => Ok(head),
    };
    let size = |suffix: &str| match keys.optional_positive(suffix, MAX_WIDTH)? {
        Some(size) => Ok(size),
        None => usual(),
    };
    let (head_k, head_v) = (size("attention.key_length")?, size("attention.value_length")?);
    if head_k != head_v && !arch.attention.own_value_size {
        return Err(keys.bad("attention.value_length", head_v, format!("the key length {head_k}")));
    }
    Ok((head_k, head_v))
}

fn windowed_head_sizes(keys: &Keys) -> Result<(Option<usize>, Option<usize>), ModelError> {
    let size = |suffix: &str| keys.optional_positive(suffix, MAX_WIDTH);
    Ok((size("attention.key_length_swa")?, size("attention.value_length_swa")?))
}

fn temperature(
    keys: &Keys,
    arch: &Architecture,
    rope: &RopeSettings,
    rotates: bool,
) -> Result<Option<Temperature>, ModelError> {
    Ok(match arch.attention.temperature {
        TemperatureRow::None => None,
        TemperatureRow::ByKey => {
            let scale = keys.finite("attention.temperature_scale")?.filter(|&scale| scale != 0.0);
            scale.map(|scale| Temperature { scale, length: rope.n_ctx_original as f32, offset: 0.0 })
        }
        TemperatureRow::RopeFree { scale, length, offset } => {
            (!rotates).then_some(Temperature { scale, length, offset })
        }
    })
}

/// Which layers have a delta net, and its dimensions.
fn delta_layers(
    keys: &Keys,
    arch: &Architecture,
    layers: Layers,
) -> Result<Option<(Vec<bool>, DeltaShape)>, ModelError> {
    let Some(row) = arch.delta_net else { return Ok(None) };
    let recurrent = match keys.flags("attention.recurrent_layers", layers)? {
        Some(flags) => flags,
        None => {
            let every = keys.optional_positive("full_attention_interval", MAX_LAYERS)?.unwrap_or(4);
            (1..=layers.run).map(|nth| nth % every != 0).collect()
        }
    };
    /// Far above any model's; a convolution of more taps than tokens is no short one.
    const MAX_KERNEL: u64 = 1024;
    let shape = DeltaShape {
        row,
        n_key: keys.required_count("ssm.group_count", MAX_WIDTH)?,
        n_value: keys.required_count("ssm.time_step_rank", MAX_WIDTH)?,
        head: keys.required_count("ssm.state_size", MAX_WIDTH)?,
        kernel: keys.required_count("ssm.conv_kernel", MAX_KERNEL)?,
    };
    if !shape.n_value.is_multiple_of(shape.n_key) {
        let expected = format!("a divisor of ssm.time_step_rank, {}", shape.n_value);
        return Err(keys.bad("ssm.group_count", shape.n_key, expected));
    }
    let inner = keys.required_count("ssm.inner_size", MAX_WIDTH)?;
    if shape.n_value.checked_mul(shape.head) != Some(inner) {
        let expected = format!("time_step_rank {} times state_size {}", shape.n_value, shape.head);
        return Err(keys.bad("ssm.inner_size", inner, expected));
    }
    Ok(Some((recurrent, shape)))
}

/// The layer whose keys and values each layer uses instead of its own.
fn shared_keys(
    keys: &Keys,
    arch: &Architecture,
    windows: &[Option<Window>],
    layers: Layers,
) -> Result<Vec<Option<usize>>, ModelError> {
    let suffix = "attention.shared_kv_layers";
    let sharing = match arch.attention.shares_keys {
        true => keys.count(suffix, MAX_LAYERS)?.unwrap_or(0),
        false => 0,
    };
    if sharing == 0 {
        return Ok(vec![None; layers.run]);
    }
    // The last layers with keys of their own are one of each kind: with a window, then without.
    let bad = |expected: &str| keys.bad(suffix, sharing, expected);
    let own =
        layers.run.checked_sub(sharing).filter(|&own| own >= 2).ok_or_else(|| bad("all layers but two or more"))?;
    let source = |il: usize| if windows[il].is_some() { own - 2 } else { own - 1 };
    let sources = (0..layers.run).map(|il| (il >= own).then(|| source(il)));
    let sources: Vec<Option<usize>> = sources.collect();
    let same_kind = |il: usize, source: usize| windows[il].is_some() == windows[source].is_some();
    match sources.iter().enumerate().all(|(il, source)| source.is_none_or(|source| same_kind(il, source))) {
        true => Ok(sources),
        false => Err(bad("layers behind one with a window and one without")),
    }
}

/// True if the file's window rule has a rotary base of its own.
pub(super) fn reads_windowed_base(arch: &Architecture) -> bool {
    arch.attention.sliding.is_some_and(|s| matches!(s.rope, WindowedRope::OwnBase | WindowedRope::Unscaled(_)))
}
