//! Hyperparameters: `config.json` to `<architecture>.*` keys, and the rope factors that become tensors.
//!
//! Keys and types follow llama.cpp b10605 (`conversion/base.py`, `llama.py`, `qwen.py`, `gemma.py`, `phi.py`).

use std::f32::consts::TAU;

use serde_json::Value;

use super::ConvertError;
use super::config::{Config, Rope};
use crate::gguf::{self, Array, Metadata, ValueType};
use crate::model::{Architecture, Multipliers};

/// Rope factors that become a tensor.
#[derive(Debug)]
pub(super) struct RopeFactors {
    pub tensor: &'static str,
    pub values: Vec<f32>,
}

/// Sizes of the tensors.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub layers: u64,
    pub width: u64,
    pub heads: u64,
    pub key_heads: u64,
    pub head: u64,
    pub vocab: u64,
    pub feed_forward: u64,
    pub experts: u64,
    pub expert_width: u64,
    pub shared_width: u64,
}

const EXPERT_COUNT: [&str; 3] = ["num_local_experts", "num_experts", "n_routed_experts"];
const EXPERTS_USED: [&str; 2] = ["num_experts_per_tok", "num_experts_per_token"];

impl Sizes {
    /// `expert_width` is the field that holds the width of an expert, for models that have experts.
    pub(super) fn read(config: &Config, expert_width: Option<&str>) -> Result<Sizes, ConvertError> {
        let (width, heads) = (config.count("hidden_size")?, config.count("num_attention_heads")?);
        let key_heads = config.count("num_key_value_heads")?;
        if key_heads > heads || !heads.is_multiple_of(key_heads) {
            let problem = format!("is {key_heads}, expected a divisor of num_attention_heads, {heads}");
            return Err(config.wrong("num_key_value_heads", problem));
        }
        let head = match config.optional_count("head_dim")? {
            Some(head) => head,
            None if width.is_multiple_of(heads) => width / heads,
            None => {
                let problem = format!("is {heads}, which does not divide hidden_size, {width}; add head_dim");
                return Err(config.wrong("num_attention_heads", problem));
            }
        };
        if !head.is_multiple_of(2) {
            return Err(config.wrong("head_dim", format!("is {head}, expected an even number")));
        }
        let layers = config.count("num_hidden_layers")?;
        if layers > 10_000 {
            return Err(config.wrong("num_hidden_layers", format!("is {layers}, expected at most 10000")));
        }
        let mut sizes = Sizes {
            layers,
            width,
            heads,
            key_heads,
            head,
            vocab: config.count("vocab_size")?,
            feed_forward: config.count("intermediate_size")?,
            experts: 0,
            expert_width: 0,
            shared_width: 0,
        };
        if let Some(expert_width) = expert_width {
            let key = EXPERT_COUNT.into_iter().find(|key| config.get(key).is_some()).unwrap_or(EXPERT_COUNT[0]);
            sizes.experts = config.count(key)?;
            if sizes.experts > 65_536 {
                return Err(config.wrong(key, format!("is {}, expected at most 65536", sizes.experts)));
            }
            sizes.expert_width = config.count(expert_width)?;
            sizes.shared_width = config.optional_count("shared_expert_intermediate_size")?.unwrap_or(0);
        }
        Ok(sizes)
    }

    /// Values of a head that are rotated, where only a part is.
    pub(super) fn rotated(&self, config: &Config, rope: &Rope) -> Result<u64, ConvertError> {
        let part = rope.number(config, "partial_rotary_factor")?.unwrap_or(1.0);
        if !(0.0..=1.0).contains(&part) {
            return Err(config.wrong("partial_rotary_factor", format!("is {part}, expected 0 to 1")));
        }
        Ok((part * self.width as f64) as u64 / self.heads)
    }
}

/// What the keys are made from.
pub(super) struct Source<'a> {
    pub arch: &'static Architecture,
    pub config: &'a Config,
    pub sizes: &'a Sizes,
    pub rope: Rope,
}

/// Where the keys go.
pub(super) struct Keys<'a> {
    metadata: &'a mut Metadata,
    prefix: &'static str,
    warnings: &'a mut Vec<String>,
}

impl Keys<'_> {
    fn u32(&mut self, suffix: &str, value: u64) {
        // Counts were checked to be below 2^32 when they were read.
        self.metadata.set(&format!("{}.{suffix}", self.prefix), value as u32);
    }

    fn f32(&mut self, suffix: &str, value: f64) {
        self.metadata.set(&format!("{}.{suffix}", self.prefix), value as f32);
    }

    fn str(&mut self, suffix: &str, value: &str) {
        self.metadata.set(&format!("{}.{suffix}", self.prefix), value);
    }
}

/// Writes the keys of an architecture, in the order of the reference, and gives the rope factors that become tensors.
pub(super) type WriteKeys = fn(&Source, &mut Keys) -> Result<Vec<RopeFactors>, ConvertError>;

/// Writes all hyperparameters and gives the rope factors that become tensors.
pub(super) fn write(
    write_keys: WriteKeys,
    source: &Source,
    file_type: u32,
    metadata: &mut Metadata,
    warnings: &mut Vec<String>,
) -> Result<Vec<RopeFactors>, ConvertError> {
    let mut keys = Keys { metadata, prefix: source.arch.name, warnings };
    let factors = write_keys(source, &mut keys)?;
    keys.metadata.set("general.file_type", file_type);
    Ok(factors)
}

/// The keys that most architectures have and no others.
pub(super) fn common(source: &Source, keys: &mut Keys) -> Result<Vec<RopeFactors>, ConvertError> {
    let Source { arch, config, sizes, rope } = source;
    keys.u32("block_count", sizes.layers);
    keys.u32("context_length", config.count("max_position_embeddings")?);
    keys.u32("embedding_length", sizes.width);
    keys.u32("feed_forward_length", sizes.feed_forward);
    keys.u32("attention.head_count", sizes.heads);
    keys.u32("attention.head_count_kv", sizes.key_heads);
    write_causality(config, keys);
    write_rope_scaling(config, rope, keys)?;
    if let Some(theta) = rope.number(config, "rope_theta")? {
        keys.f32("rope.freq_base", theta);
    }
    if let Some(theta) = rope.sliding.as_ref().and_then(|sliding| sliding.get("rope_theta")) {
        keys.f32("rope.freq_base_swa", config.number("rope_local_base_freq", theta)?);
    }
    keys.f32("attention.layer_norm_rms_epsilon", config.f64("rms_norm_eps")?);
    for (names, suffix) in [(&EXPERT_COUNT[..], "expert_count"), (&EXPERTS_USED[..], "expert_used_count")] {
        if let Some(name) = names.iter().find(|name| config.get(name).is_some())
            && let Some(count) = config.optional_u32(name)?
        {
            keys.u32(suffix, count.into());
        }
    }
    write_sections(config, rope, arch.has_sections(), keys)?;
    // Granite has no head size of its own.
    if config.get("head_dim").is_some() && arch.multipliers != Multipliers::ByKeys {
        keys.u32("attention.key_length", sizes.head);
        keys.u32("attention.value_length", sizes.head);
    }
    if sizes.experts > 0 && arch.feed_forward.own_expert_width {
        keys.u32("expert_feed_forward_length", sizes.expert_width);
        if sizes.shared_width > 0 {
            keys.u32("expert_shared_feed_forward_length", sizes.shared_width);
        }
    }
    Ok(Vec::new())
}

/// Llama, Mistral and Mixtral.
pub(super) fn llama(source: &Source, keys: &mut Keys) -> Result<Vec<RopeFactors>, ConvertError> {
    common(source, keys)?;
    let Source { config, sizes, rope, .. } = source;
    keys.u32("vocab_size", sizes.vocab);
    keys.u32("rope.dimension_count", sizes.head);
    Ok(llama3_factors(config, sizes, rope)?.into_iter().collect())
}

/// Models in which a token sees those behind it as well: embedding models and text encoders.
fn write_causality(config: &Config, keys: &mut Keys) {
    // Gemma's word for it; "vision" concerns images only.
    let both_ways = config.get("use_bidirectional_attention").is_some_and(|to| *to == true || *to == "all");
    if both_ways && config.get("sliding_window").is_some() {
        keys.warnings.push("use_bidirectional_attention is set: windows will be those of llama.cpp".to_owned());
    }
    if both_ways || config.get("is_causal").and_then(Value::as_bool) == Some(false) {
        keys.metadata.set(&format!("{}.attention.causal", keys.prefix), false);
    }
}

/// How many pairs of a head rotate by the position in time, in height and in width.
fn write_sections(config: &Config, rope: &Rope, has_sections: bool, keys: &mut Keys) -> Result<(), ConvertError> {
    let sections = rope.numbers(config, "mrope_section")?;
    if sections.is_empty() && has_sections {
        let class = config.architecture();
        let problem = format!("is missing; {class} needs it, take the model's own config.json");
        return Err(config.wrong(&format!("{}.mrope_section", rope.key), problem));
    }
    if sections.is_empty() {
        return Ok(());
    }
    let mut pairs = sections.iter().map(|pairs| gguf::Value::I32(*pairs as i32)).collect::<Vec<_>>();
    pairs.resize(4, gguf::Value::I32(0));
    keys.metadata.set(&format!("{}.rope.dimension_sections", keys.prefix), Array::of_values(ValueType::I32, &pairs));
    Ok(())
}

/// Granite: what its configuration calls multipliers.
pub(super) fn granite(source: &Source, keys: &mut Keys) -> Result<Vec<RopeFactors>, ConvertError> {
    let factors = llama(source, keys)?;
    for (field, suffix) in [
        ("attention_multiplier", "attention.scale"),
        ("embedding_multiplier", "embedding_scale"),
        ("residual_multiplier", "residual_scale"),
        ("logits_scaling", "logit_scale"),
    ] {
        if let Some(factor) = source.config.optional_f64(field)?.filter(|factor| *factor != 0.0) {
            keys.f32(suffix, factor);
        }
    }
    Ok(factors)
}

/// The text part of Qwen3-VL, whose first layers get features of the image.
pub(super) fn qwen3_vl(source: &Source, keys: &mut Keys) -> Result<Vec<RopeFactors>, ConvertError> {
    let factors = common(source, keys)?;
    let layers = source.config.get("vision_config").and_then(|vision| vision.get("deepstack_visual_indexes"));
    keys.u32("n_deepstack_layers", layers.and_then(Value::as_array).map_or(0, Vec::len) as u64);
    Ok(factors)
}

/// gpt-oss.
pub(super) fn gpt_oss(source: &Source, keys: &mut Keys) -> Result<Vec<RopeFactors>, ConvertError> {
    common(source, keys)?;
    keys.u32("attention.sliding_window", source.config.count("sliding_window")?);
    Ok(Vec::new())
}

fn write_rope_scaling(config: &Config, rope: &Rope, keys: &mut Keys) -> Result<(), ConvertError> {
    let factor = rope.number(config, "factor")?;
    match (rope.kind().as_deref(), factor) {
        (None | Some("default" | "llama3" | "mrope"), _) | (Some("linear" | "yarn"), None) => {}
        (Some("linear"), Some(factor)) => {
            keys.str("rope.scaling.type", "linear");
            keys.f32("rope.scaling.factor", factor);
        }
        (Some("yarn"), Some(factor)) => {
            keys.str("rope.scaling.type", "yarn");
            keys.f32("rope.scaling.factor", factor);
            let original = rope.required(config, "original_max_position_embeddings")?;
            if !(1.0..=f64::from(u32::MAX)).contains(&original) {
                let field = format!("{}.original_max_position_embeddings", rope.key);
                return Err(config.wrong(&field, format!("is {original}, expected a context length")));
            }
            keys.u32("rope.scaling.original_context_length", original as u64);
            let attention = match rope.number(config, "attention_factor")? {
                None => rope.number(config, "attn_factor")?,
                factor => factor,
            };
            let optional = [
                ("rope.scaling.yarn_ext_factor", rope.number(config, "extrapolation_factor")?),
                ("rope.scaling.yarn_attn_factor", attention),
                ("rope.scaling.yarn_beta_fast", rope.number(config, "beta_fast")?),
                ("rope.scaling.yarn_beta_slow", rope.number(config, "beta_slow")?),
            ];
            for (suffix, value) in optional {
                if let Some(value) = value {
                    keys.f32(suffix, value);
                }
            }
        }
        (Some("su" | "longrope"), _) => keys.str("rope.scaling.type", "longrope"),
        (Some(other), _) => {
            let other: String = other.chars().filter(|c| !c.is_control()).take(40).collect();
            keys.warnings.push(format!(
                "{}.rope_type is {other}, which GGUF cannot express; texts longer than the training \
                 context will run worse",
                rope.key
            ));
        }
    }
    Ok(())
}

/// Llama 3's factors: low frequencies slowed down, high ones kept, those between blended. Single precision in the
/// order of the reference, so that the tensor has its bytes.
fn llama3_factors(config: &Config, sizes: &Sizes, rope: &Rope) -> Result<Option<RopeFactors>, ConvertError> {
    if rope.kind().as_deref() != Some("llama3") {
        return Ok(None);
    }
    let number = |name: &str, default: f64| rope.number(config, name).map(|value| value.unwrap_or(default) as f32);
    let base = number("rope_theta", 10_000.0)?;
    let factor = number("factor", 8.0)?;
    let (low, high) = (number("low_freq_factor", 1.0)?, number("high_freq_factor", 4.0)?);
    let context = number("original_max_position_embeddings", 8192.0)?;
    if [base, factor, low, high, context].iter().any(|value| *value <= 0.0) || low == high {
        return Err(
            config.wrong(rope.key, "has a factor of llama3 that is zero or negative, or equal low and high ones")
        );
    }
    let values = (0..sizes.head / 2).map(|i| {
        let exponent = (2 * i) as f32 / sizes.head as f32;
        let frequency = 1.0 / f64::from(base).powf(exponent.into()) as f32;
        let wavelength = frequency.recip() * TAU;
        if wavelength < context / high {
            1.0
        } else if wavelength > context / low {
            factor
        } else {
            let smooth = (wavelength.recip() * context - low) / (high - low);
            ((1.0 - smooth) / factor + smooth).recip()
        }
    });
    Ok(Some(RopeFactors { tensor: "rope_freqs.weight", values: values.collect() }))
}

/// Gemma 1 and 2.
pub(super) fn gemma(source: &Source, keys: &mut Keys) -> Result<Vec<RopeFactors>, ConvertError> {
    let Source { arch, config, sizes, .. } = source;
    write_causality(config, keys);
    keys.u32("context_length", config.count("max_position_embeddings")?);
    keys.u32("embedding_length", sizes.width);
    keys.u32("block_count", sizes.layers);
    keys.u32("feed_forward_length", sizes.feed_forward);
    keys.u32("attention.head_count", sizes.heads);
    keys.u32("attention.head_count_kv", sizes.key_heads);
    keys.f32("attention.layer_norm_rms_epsilon", config.f64("rms_norm_eps")?);
    keys.u32("attention.key_length", sizes.head);
    keys.u32("attention.value_length", sizes.head);
    if arch.attention.score_cap.is_some() {
        keys.f32("attn_logit_softcapping", config.f64("attn_logit_softcapping")?);
    }
    if arch.logit_cap.is_some() {
        keys.f32("final_logit_softcapping", config.f64("final_logit_softcapping")?);
    }
    if arch.attention.sliding.is_some() {
        keys.u32("attention.sliding_window", config.count("sliding_window")?);
    }
    Ok(Vec::new())
}

/// Gemma 3.
pub(super) fn gemma3(source: &Source, keys: &mut Keys) -> Result<Vec<RopeFactors>, ConvertError> {
    common(source, keys)?;
    let Source { config, sizes, rope, .. } = source;
    keys.u32("attention.key_length", sizes.head);
    keys.u32("attention.value_length", sizes.head);
    keys.f32("rope.freq_base", rope.number(config, "rope_theta")?.unwrap_or(1_000_000.0));
    if config.get("attn_logit_softcapping").is_some() {
        return Err(config.wrong("attn_logit_softcapping", "is set, which Gemma 3 does not know; set it to null"));
    }
    if let Some(cap) = config.optional_f64("final_logit_softcapping")?.filter(|cap| *cap != 0.0) {
        keys.f32("final_logit_softcapping", cap);
    }
    if config.optional_u32("sliding_window_pattern")? != Some(1) {
        keys.u32("attention.sliding_window", config.count("sliding_window")?);
    }
    Ok(Vec::new())
}

/// Phi-3 and Phi-4.
pub(super) fn phi3(source: &Source, keys: &mut Keys) -> Result<Vec<RopeFactors>, ConvertError> {
    let Source { config, sizes, rope, .. } = source;
    let context = config.count("max_position_embeddings")?;
    let original = rope.required(config, "original_max_position_embeddings")?;
    if !(1.0..=f64::from(u32::MAX)).contains(&original) || original.fract() != 0.0 {
        let problem = format!("is {original}, expected a context length");
        return Err(config.wrong("original_max_position_embeddings", problem));
    }
    write_causality(config, keys);
    let rotated = sizes.rotated(config, rope)?;
    let (long, short) = (rope.numbers(config, "long_factor")?, rope.numbers(config, "short_factor")?);
    let mut factors = Vec::new();
    if !long.is_empty() {
        let scale = context as f64 / original;
        let attention = match rope.kind().as_deref() {
            Some("su" | "longrope") if scale > 1.0 => (1.0 + scale.ln() / original.ln()).sqrt(),
            Some("yarn") if scale > 1.0 => 0.1 * scale.ln() + 1.0,
            Some("su" | "longrope" | "yarn") => 1.0,
            _ => {
                let field = format!("{}.rope_type", rope.key);
                return Err(config.wrong(&field, "is not longrope, su or yarn, though long_factor is given"));
            }
        };
        for (name, list) in [("long_factor", &long), ("short_factor", &short)] {
            if list.len() as u64 * 2 != rotated {
                let problem =
                    format!("has {} values, expected {}, half of the rotated part of a head", list.len(), rotated / 2);
                return Err(config.wrong(&format!("{}.{name}", rope.key), problem));
            }
        }
        keys.f32("rope.scaling.attn_factor", attention);
        factors.push(RopeFactors { tensor: "rope_factors_long.weight", values: long });
        factors.push(RopeFactors { tensor: "rope_factors_short.weight", values: short });
    }
    keys.u32("context_length", context);
    keys.u32("rope.scaling.original_context_length", original as u64);
    keys.u32("embedding_length", sizes.width);
    keys.u32("feed_forward_length", sizes.feed_forward);
    keys.u32("block_count", sizes.layers);
    keys.u32("attention.head_count", sizes.heads);
    keys.u32("attention.head_count_kv", sizes.key_heads);
    keys.f32("attention.layer_norm_rms_epsilon", config.f64("rms_norm_eps")?);
    keys.u32("rope.dimension_count", rotated);
    keys.f32("rope.freq_base", rope.required(config, "rope_theta")?);
    // 0 tells Phi-4, which has no window, from Phi-3.
    keys.u32("attention.sliding_window", config.optional_u32("sliding_window")?.unwrap_or(0).into());
    Ok(factors)
}
