//! Hyperparameters: read from the metadata, checked once, trusted afterwards.

use super::arch::{ARCHITECTURES, Architecture, FeedForward, Gating, Sections, SharedExpert, Sliding};
use super::error::ModelError;
use crate::gguf::{Metadata, ValueType};

/// `LLAMA_MAX_LAYERS` of llama.cpp b10605.
const MAX_LAYERS: u64 = 512;
/// `LLAMA_MAX_EXPERTS` of llama.cpp b10605.
const MAX_EXPERTS: u64 = 512;
/// Upper bound of widths and counts; keeps all products of two far from overflow.
const MAX_WIDTH: u64 = 1 << 28;

/// How rotary frequencies are stretched beyond the training context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RopeScaling {
    /// Not at all.
    None,
    /// All frequencies divided by the factor.
    Linear,
    /// YaRN: low frequencies interpolated, high ones kept, scores sharpened.
    Yarn,
    /// Per-frequency factors, one set for short and one for long contexts.
    LongRope,
}

/// Rotary embedding of a kind of layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct RopeParams {
    /// Base of the geometric series of frequencies.
    pub base: f32,
    /// Multiplier of positions, 1 / scaling factor.
    pub scale: f32,
}

/// Everything the forward pass needs to know beside the tensors.
#[derive(Clone, Debug)]
pub struct Hparams {
    /// Row of the architecture table.
    pub(super) arch: &'static Architecture,
    /// Number of transformer blocks.
    pub(super) n_layer: usize,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Context length of the training.
    pub n_ctx_train: usize,
    /// Query heads per layer.
    pub(super) n_head: Vec<usize>,
    /// Key/value heads per layer.
    pub(super) n_head_kv: Vec<usize>,
    /// Feed-forward width per layer (dense layers).
    pub(super) n_ff: Vec<usize>,
    /// Values per head, of queries and keys as of values.
    pub(super) head_k: usize,
    /// Leading values of a head that are rotated.
    pub(super) n_rot: usize,
    /// Epsilon of all norms.
    pub(super) norm_epsilon: f32,
    /// Rotary embedding of layers that see everything.
    pub(super) rope: RopeParams,
    /// Rotary embedding of windowed layers.
    pub(super) rope_windowed: RopeParams,
    /// Kind of rope scaling.
    pub(super) rope_scaling: RopeScaling,
    /// Context length before scaling.
    pub(super) n_ctx_original: usize,
    /// `rope.scaling.attn_factor`.
    pub(super) rope_attn_factor: f32,
    /// Scale of attention scores.
    pub(super) score_scale: f32,
    /// Cap of attention scores.
    pub(super) score_cap: Option<f32>,
    /// Cap of logits.
    pub(super) logit_cap: Option<f32>,
    /// Pairs of a head that stay as they are, `[n_rot / 2]`.
    pub(super) fixed_pairs: Vec<bool>,
    /// Whether a layer has a rotary embedding.
    pub(super) rotates: Vec<bool>,
    /// Multiplies embeddings.
    pub(super) embedding_scale: Option<f32>,
    /// Multiplies what attention and the feed-forward network add to the residual stream.
    pub(super) residual_scale: Option<f32>,
    /// Multiplies logits.
    pub(super) logit_scale: Option<f32>,
    /// `attention.causal`: false where every position sees all of its sequence.
    pub(super) causal: bool,
    /// Window per layer; `None` sees everything.
    pub(super) window: Vec<Option<usize>>,
    /// Experts, when the model has any.
    pub(super) experts: Option<Experts>,
    /// Layers that have them.
    pub(super) expert_layers: Vec<bool>,
}

/// Mixture-of-experts dimensions.
#[derive(Clone, Copy, Debug)]
pub(super) struct Experts {
    /// Experts per layer.
    pub count: usize,
    /// Experts chosen per token.
    pub used: usize,
    /// Width of one expert; `None` means `n_ff` of the layer.
    pub n_ff: Option<usize>,
    /// Width of the shared expert, when there is one; `Some(None)` means `n_ff` of the layer.
    pub shared_n_ff: Option<Option<usize>>,
    /// How weights follow from router outputs.
    pub gating: Gating,
    /// Multiplies the weights of the chosen experts.
    pub scale: f32,
    /// Number of groups of experts, and of those that are chosen first.
    pub groups: Option<(usize, usize)>,
}

struct Keys<'a> {
    metadata: &'a Metadata,
    arch: &'static str,
}

impl Keys<'_> {
    fn name(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.arch)
    }

    fn bad(&self, suffix: &str, found: impl ToString, expected: impl ToString) -> ModelError {
        ModelError::BadValue { key: self.name(suffix), found: found.to_string(), expected: expected.to_string() }
    }

    fn count(&self, suffix: &str, limit: u64) -> Result<Option<usize>, ModelError> {
        match self.metadata.u64(&self.name(suffix))? {
            None => Ok(None),
            Some(value) if value <= limit => Ok(Some(value as usize)),
            Some(value) => Err(self.bad(suffix, value, format!("at most {limit}"))),
        }
    }

    fn required_count(&self, suffix: &str, limit: u64) -> Result<usize, ModelError> {
        match self.count(suffix, limit)? {
            None => Err(ModelError::MissingKey { key: self.name(suffix) }),
            Some(0) => Err(self.bad(suffix, 0, "at least 1")),
            Some(value) => Ok(value),
        }
    }

    fn optional_positive(&self, suffix: &str, limit: u64) -> Result<Option<usize>, ModelError> {
        match self.count(suffix, limit)? {
            Some(0) => Err(self.bad(suffix, 0, "at least 1")),
            value => Ok(value),
        }
    }

    /// One value for all layers or an array with one value per layer.
    fn per_layer(&self, suffix: &str, n_layer: usize) -> Result<Option<Vec<usize>>, ModelError> {
        let key = self.name(suffix);
        if let Ok(Some(array)) = self.metadata.array(&key) {
            if array.len() != n_layer as u64 {
                let found = format!("an array of {}", array.len());
                return Err(self.bad(suffix, found, format!("one value per layer, {n_layer}")));
            }
            let values = array.to_i64_vec()?;
            let values = values.iter().map(|&v| match u64::try_from(v) {
                Ok(v) if v <= MAX_WIDTH => Ok(v as usize),
                _ => Err(self.bad(suffix, v, format!("values from 0 to {MAX_WIDTH}"))),
            });
            return values.collect::<Result<Vec<_>, _>>().map(Some);
        }
        Ok(self.count(suffix, MAX_WIDTH)?.map(|value| vec![value; n_layer]))
    }

    fn finite(&self, suffix: &str) -> Result<Option<f32>, ModelError> {
        match self.metadata.f32(&self.name(suffix))? {
            Some(value) if !value.is_finite() => Err(self.bad(suffix, value, "a finite number")),
            value => Ok(value),
        }
    }

    fn non_negative(&self, suffix: &str) -> Result<Option<f32>, ModelError> {
        match self.finite(suffix)? {
            Some(value) if value < 0.0 => Err(self.bad(suffix, value, "zero or more")),
            value => Ok(value),
        }
    }

    fn positive(&self, suffix: &str) -> Result<Option<f32>, ModelError> {
        match self.finite(suffix)? {
            Some(value) if value <= 0.0 => Err(self.bad(suffix, value, "more than zero")),
            value => Ok(value),
        }
    }
}

impl Hparams {
    /// Reads and checks all hyperparameters of the model that `metadata` describe.
    pub(super) fn from_metadata(metadata: &Metadata) -> Result<Self, ModelError> {
        let name = metadata
            .str("general.architecture")?
            .ok_or_else(|| ModelError::MissingKey { key: "general.architecture".into() })?;
        let arch = Architecture::by_name(name).ok_or_else(|| ModelError::UnknownArchitecture {
            found: name.chars().take(64).collect(),
            known: ARCHITECTURES.iter().map(|row| row.name).collect::<Vec<_>>().join(", "),
        })?;
        let keys = Keys { metadata, arch: arch.name };
        let n_layer = keys.required_count("block_count", MAX_LAYERS)?;
        let n_embd = keys.required_count("embedding_length", MAX_WIDTH)?;
        let n_ctx_train = keys.required_count("context_length", u64::from(u32::MAX))?;
        let (n_head, n_head_kv) = heads(&keys, n_layer)?;
        let default_head = || match n_embd / n_head[0] {
            0 => Err(keys.bad("attention.head_count", n_head[0], format!("at most embedding_length {n_embd}"))),
            head => Ok(head),
        };
        let head_k = match keys.optional_positive("attention.key_length", MAX_WIDTH)? {
            Some(value) => value,
            None => default_head()?,
        };
        let head_v = match keys.optional_positive("attention.value_length", MAX_WIDTH)? {
            Some(value) => value,
            None => default_head()?,
        };
        if head_k != head_v {
            return Err(keys.bad("attention.value_length", head_v, format!("the key length {head_k}")));
        }
        for suffix in ["attention.key_length_swa", "attention.value_length_swa"] {
            if let Some(value) = keys.count(suffix, MAX_WIDTH)?
                && value != head_k
            {
                return Err(keys.bad(suffix, value, format!("the key length {head_k}")));
            }
        }
        let n_rot = keys.optional_positive("rope.dimension_count", MAX_WIDTH)?.unwrap_or(head_k);
        if n_rot > head_k || n_rot % 2 != 0 {
            return Err(keys.bad(
                "rope.dimension_count",
                n_rot,
                format!("an even number up to the head size {head_k}"),
            ));
        }
        let epsilon_key = "attention.layer_norm_rms_epsilon";
        let norm_epsilon =
            keys.non_negative(epsilon_key)?.ok_or_else(|| ModelError::MissingKey { key: keys.name(epsilon_key) })?;
        let experts = experts(&keys, arch)?;
        let n_ff = match keys.per_layer("feed_forward_length", n_layer)? {
            Some(n_ff) => n_ff,
            None if experts.is_some_and(|e| e.n_ff.is_some()) => vec![0; n_layer],
            None => return Err(ModelError::MissingKey { key: keys.name("feed_forward_length") }),
        };
        if (experts.is_none() || experts.is_some_and(|e| e.n_ff.is_none())) && n_ff.contains(&0) {
            return Err(keys.bad("feed_forward_length", 0, "at least 1"));
        }
        let (rope, rope_scaling) = rope(&keys)?;
        let (window, rope_windowed) = windows(&keys, arch, n_layer, rope)?;
        let score_width = if arch.score_scale.is_by_embedding(n_layer) { n_embd / n_head[0] } else { head_k };
        let multiplier = |suffix: &str| match arch.multipliers {
            true => Ok(keys.finite(suffix)?.filter(|&factor| factor != 0.0)),
            false => Ok::<_, ModelError>(None),
        };
        let score_scale = multiplier("attention.scale")?.unwrap_or(1.0 / (score_width as f32).sqrt());
        let embedding_scale = match arch.scaled_embeddings {
            true => Some((n_embd as f32).sqrt()),
            false => multiplier("embedding_scale")?,
        };
        // Granite's logits are divided by the number in the file.
        let logit_scale = multiplier("logit_scale")?.map(f32::recip);
        if arch.multipliers && logit_scale.is_none() {
            return Err(ModelError::MissingKey { key: keys.name("logit_scale") });
        }
        // Granite says so where no layer rotates.
        let any_rotates = !arch.multipliers || metadata.bool(&keys.name("rope.scaling.finetuned"))?.unwrap_or(true);
        let rotates = (1..=n_layer).map(|nth| any_rotates && arch.rope_free_every.is_none_or(|every| nth % every != 0));
        let cap = |default: Option<f32>, suffix: &str| -> Result<Option<f32>, ModelError> {
            let Some(default) = default else { return Ok(None) };
            Ok(Some(keys.non_negative(suffix)?.unwrap_or(default)).filter(|&cap| cap > 0.0))
        };
        Ok(Hparams {
            arch,
            n_layer,
            n_embd,
            n_ctx_train,
            n_head,
            n_head_kv,
            n_ff,
            head_k,
            n_rot,
            norm_epsilon,
            rope,
            rope_windowed,
            rope_scaling,
            n_ctx_original: keys
                .optional_positive("rope.scaling.original_context_length", u64::from(u32::MAX))?
                .unwrap_or(n_ctx_train),
            rope_attn_factor: keys.finite("rope.scaling.attn_factor")?.unwrap_or(1.0),
            score_scale,
            fixed_pairs: fixed_pairs(&keys, arch, n_rot)?,
            rotates: rotates.collect(),
            embedding_scale,
            residual_scale: multiplier("residual_scale")?,
            logit_scale,
            causal: metadata.bool(&keys.name("attention.causal"))?.unwrap_or(true),
            score_cap: cap(arch.score_cap, "attn_logit_softcapping")?,
            logit_cap: cap(arch.logit_cap, "final_logit_softcapping")?,
            window,
            experts,
            expert_layers: expert_layers(&keys, arch, n_layer)?,
        })
    }

    /// Query values per token in layer `il`.
    pub(super) fn n_embd_q(&self, il: usize) -> usize {
        self.n_head[il] * self.head_k
    }

    /// Key (and value) values per token in layer `il`.
    pub(super) fn n_embd_kv(&self, il: usize) -> usize {
        self.n_head_kv[il] * self.head_k
    }
}

fn heads(keys: &Keys, n_layer: usize) -> Result<(Vec<usize>, Vec<usize>), ModelError> {
    let suffix = "attention.head_count";
    let n_head = keys.per_layer(suffix, n_layer)?.ok_or_else(|| ModelError::MissingKey { key: keys.name(suffix) })?;
    let n_head_kv = keys.per_layer("attention.head_count_kv", n_layer)?.unwrap_or_else(|| n_head.clone());
    for (&q, &kv) in n_head.iter().zip(&n_head_kv) {
        if q == 0 {
            return Err(keys.bad(suffix, 0, "at least 1"));
        }
        if kv == 0 || q % kv != 0 {
            return Err(keys.bad("attention.head_count_kv", kv, format!("a divisor of the head count {q}")));
        }
    }
    Ok((n_head, n_head_kv))
}

fn experts(keys: &Keys, arch: &'static Architecture) -> Result<Option<Experts>, ModelError> {
    let count = keys.count("expert_count", MAX_EXPERTS)?.unwrap_or(0);
    let used = keys.count("expert_used_count", MAX_EXPERTS)?.unwrap_or(0);
    let usual = match arch.feed_forward {
        FeedForward::Dense if count > 0 => {
            return Err(keys.bad("expert_count", count, format!("none: {} has no experts", arch.name)));
        }
        FeedForward::Dense => return Ok(None),
        FeedForward::DenseOrExperts(_) if count == 0 => {
            return if used == 0 { Ok(None) } else { Err(keys.bad("expert_used_count", used, "0 without experts")) };
        }
        FeedForward::DenseOrExperts(gating) | FeedForward::Experts(gating) => gating,
    };
    if count == 0 {
        return Err(keys.bad("expert_count", 0, format!("1 to {MAX_EXPERTS}: {} has experts", arch.name)));
    }
    if used == 0 || used > count {
        return Err(keys.bad("expert_used_count", used, format!("1 to the number of experts, {count}")));
    }
    let groups = match keys.count("expert_group_count", MAX_EXPERTS)?.filter(|&groups| groups > 1) {
        None => None,
        Some(groups) if arch.selection_bias => {
            let chosen = keys.required_count("expert_group_used_count", groups as u64)?;
            // The score of a group is the sum of its two best.
            if count % groups != 0 || count / groups < 2 || chosen * (count / groups) < used {
                let expected = format!("groups of equal size, of which {chosen} hold {used} experts");
                return Err(keys.bad("expert_group_count", groups, expected));
            }
            Some((groups, chosen))
        }
        Some(_) => return Err(keys.bad("expert_group_count", "above 1", "no groups of experts")),
    };
    let gating = gating(keys, arch, usual)?;
    let scale = match arch.routing_keys.scale {
        true => keys.finite("expert_weights_scale")?.filter(|&scale| scale != 0.0).unwrap_or(1.0),
        false => 1.0,
    };
    let own_width = keys.optional_positive("expert_feed_forward_length", MAX_WIDTH)?;
    let n_ff = own_width.filter(|_| arch.own_expert_width);
    let shared_n_ff = match arch.shared_expert {
        SharedExpert::None => None,
        SharedExpert::Gated => Some(keys.optional_positive("expert_shared_feed_forward_length", MAX_WIDTH)?),
        SharedExpert::Wide => {
            keys.count("expert_shared_feed_forward_length", MAX_WIDTH)?.filter(|&width| width > 0).map(Some)
        }
        SharedExpert::Counted => {
            let shared = keys.count("expert_shared_count", MAX_EXPERTS)?.filter(|&shared| shared > 0);
            shared.map(|shared| n_ff.map(|width| width * shared))
        }
    };
    Ok(Some(Experts { count, used, n_ff, shared_n_ff, gating, scale, groups }))
}

/// The gating rule: the architecture's, or what the file says where it may.
fn gating(keys: &Keys, arch: &'static Architecture, usual: Gating) -> Result<Gating, ModelError> {
    let by_file = arch.routing_keys;
    let function = match by_file.function {
        true => keys.count("expert_gating_func", u64::from(u32::MAX))?.filter(|&function| function != 0),
        false => None,
    };
    let normalized = match by_file.norm {
        true => keys.metadata.bool(&keys.name("expert_weights_norm"))?.unwrap_or(false),
        false => matches!(usual, Gating::SoftmaxNormalized | Gating::SigmoidNormalized),
    };
    let sigmoid = matches!(usual, Gating::Sigmoid | Gating::SigmoidNormalized);
    match (function, normalized) {
        (None, _) if usual == Gating::SoftmaxOfChosen => Ok(usual),
        (None, _) if !by_file.norm => Ok(usual),
        (Some(1), true) => Ok(Gating::SoftmaxNormalized),
        (Some(1), false) => Ok(Gating::Softmax),
        (Some(2), true) => Ok(Gating::SigmoidNormalized),
        (Some(2), false) => Ok(Gating::Sigmoid),
        (Some(3), _) => Ok(Gating::SoftmaxOfChosen),
        (Some(other), _) => {
            Err(keys.bad("expert_gating_func", other, "1 (softmax), 2 (sigmoid) or 3 (softmax of the chosen)"))
        }
        (None, true) if sigmoid => Ok(Gating::SigmoidNormalized),
        (None, false) if sigmoid => Ok(Gating::Sigmoid),
        (None, true) => Ok(Gating::SoftmaxNormalized),
        (None, false) => Ok(Gating::Softmax),
    }
}

/// Which layers have experts, in a model that has some.
fn expert_layers(keys: &Keys, arch: &'static Architecture, n_layer: usize) -> Result<Vec<bool>, ModelError> {
    if !arch.dense_layers {
        return Ok(vec![true; n_layer]);
    }
    let leading = keys.count("leading_dense_block_count", MAX_LAYERS)?.unwrap_or(0);
    let step = keys.optional_positive("interleave_moe_layer_step", MAX_LAYERS)?.unwrap_or(1);
    Ok((0..n_layer).map(|il| il >= leading && (il + 1) % step == 0).collect())
}

fn rope(keys: &Keys) -> Result<(RopeParams, RopeScaling), ModelError> {
    let base = keys.positive("rope.freq_base")?.unwrap_or(10_000.0);
    let type_key = keys.name("rope.scaling.type");
    let scaling = match keys.metadata.str(&type_key)? {
        None | Some("linear") => RopeScaling::Linear,
        Some("none") => RopeScaling::None,
        Some("yarn") => RopeScaling::Yarn,
        Some("longrope") => RopeScaling::LongRope,
        Some(other) => {
            let other: String = other.chars().take(64).collect();
            return Err(keys.bad("rope.scaling.type", format!("{other:?}"), "none, linear, yarn or longrope"));
        }
    };
    let factor = match keys.non_negative("rope.scaling.factor")? {
        None => keys.non_negative("rope.scale_linear")?,
        factor => factor,
    };
    let scale = match factor {
        None | Some(0.0) => 1.0,
        Some(factor) => 1.0 / factor,
    };
    let scale = if scaling == RopeScaling::None { 1.0 } else { scale };
    Ok((RopeParams { base, scale }, scaling))
}

/// Pairs that belong to no position of a text. As in `ggml_mrope_cache_init` (llama.cpp b10605), sections repeat where they are
/// shorter than a head.
fn fixed_pairs(keys: &Keys, arch: &'static Architecture, n_rot: usize) -> Result<Vec<bool>, ModelError> {
    if arch.sections == Sections::None {
        return Ok(vec![false; n_rot / 2]);
    }
    let suffix = "rope.dimension_sections";
    let missing = || ModelError::MissingKey { key: keys.name(suffix) };
    let found = keys.metadata.array(&keys.name(suffix))?.ok_or_else(missing)?;
    let expected = "up to four numbers of pairs, together at least 1";
    let bad = || keys.bad(suffix, format!("an array of {}", found.len()), expected);
    let mut sections = [0usize; 4];
    if found.len() > 4 {
        return Err(bad());
    }
    for (section, value) in sections.iter_mut().zip(found.to_i64_vec()?) {
        *section = usize::try_from(value).ok().filter(|&pairs| pairs <= n_rot).ok_or_else(bad)?;
    }
    let all: usize = sections.iter().sum();
    if all == 0 {
        return Err(bad());
    }
    Ok((0..n_rot / 2)
        .map(|pair| match (arch.sections, pair % all) {
            (Sections::Interleaved, place) => place >= 3 * sections[place % 3],
            (_, place) => place >= all - sections[3],
        })
        .collect())
}

fn windows(
    keys: &Keys,
    arch: &'static Architecture,
    n_layer: usize,
    rope: RopeParams,
) -> Result<(Vec<Option<usize>>, RopeParams), ModelError> {
    let Sliding::Periodic { period, default_window, default_base } = arch.sliding else {
        return Ok((vec![None; n_layer], rope));
    };
    let found = keys.count("attention.sliding_window", u64::from(u32::MAX))?;
    let window = found.or(default_window.map(|w| w as usize)).filter(|&w| w > 0);
    let Some(window) = window else {
        return match arch.sinks {
            true => Err(ModelError::MissingKey { key: keys.name("attention.sliding_window") }),
            false => Ok((vec![None; n_layer], rope)),
        };
    };
    let suffix = "attention.sliding_window_pattern";
    let windowed: Vec<bool> = match keys.metadata.array(&keys.name(suffix)) {
        Ok(Some(array)) if array.len() == n_layer as u64 => match array.elem_type() {
            ValueType::Bool => array.to_bool_vec()?,
            _ => array.to_i64_vec()?.iter().map(|&v| v != 0).collect(),
        },
        Ok(Some(array)) => {
            return Err(keys.bad(suffix, format!("an array of {}", array.len()), format!("one per layer, {n_layer}")));
        }
        _ => {
            let period = keys.count(suffix, MAX_LAYERS)?.unwrap_or(period as usize);
            (0..n_layer).map(|il| period == 0 || il % period < period - 1).collect()
        }
    };
    let base = keys.positive("rope.freq_base_swa")?.or(default_base).unwrap_or(rope.base);
    let scale = if default_base.is_some() { 1.0 } else { rope.scale };
    let window = windowed.into_iter().map(|windowed| windowed.then_some(window)).collect();
    Ok((window, RopeParams { base, scale }))
}
