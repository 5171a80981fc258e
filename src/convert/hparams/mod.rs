//! Hyperparameters: `config.json` to `<architecture>.*` keys, and the rope factors that become tensors.
//!
//! A row lists what its class has: the keys that most have, fields that become keys as they are, and parts of its own.
//! Keys and types follow llama.cpp b10605 (`conversion/*.py`).

mod families;
mod rope;

use serde_json::Value;

use super::ConvertError;
use super::architectures::Row;
use super::config::{Config, Rope};
use super::sizes::{EXPERT_COUNT, Sizes};
use crate::gguf::{self, Array, Metadata, ValueType};
use crate::model::Architecture;

pub(super) use families::*;

/// Rope factors that become a tensor.
#[derive(Debug)]
pub(super) struct RopeFactors {
    pub tensor: &'static str,
    pub values: Vec<f32>,
}

/// What the keys are made from.
pub(super) struct Source<'a> {
    pub arch: &'static Architecture,
    pub row: &'static Row,
    pub config: &'a Config,
    pub sizes: &'a Sizes,
    pub rope: Rope,
}

/// Where the keys go.
pub(super) struct Keys<'a> {
    metadata: &'a mut Metadata,
    prefix: &'static str,
    warnings: &'a mut Vec<String>,
    factors: Vec<RopeFactors>,
}

impl Keys<'_> {
    fn set(&mut self, suffix: &str, value: impl Into<gguf::Value>) {
        self.metadata.set(&format!("{}.{suffix}", self.prefix), value);
    }

    fn remove(&mut self, suffix: &str) {
        self.metadata.remove(&format!("{}.{suffix}", self.prefix));
    }

    fn u32(&mut self, suffix: &str, value: u64) {
        // Counts were checked to be below 2^32 when they were read.
        self.set(suffix, value as u32);
    }

    fn f32(&mut self, suffix: &str, value: f64) {
        self.set(suffix, value as f32);
    }

    fn str(&mut self, suffix: &str, value: &str) {
        self.set(suffix, value);
    }

    /// A list of counts, one for each block; the reference's type for them.
    fn counts(&mut self, suffix: &str, values: impl Iterator<Item = u64>) {
        let values: Vec<gguf::Value> = values.map(|value| gguf::Value::I32(value as i32)).collect();
        self.set(suffix, Array::of_values(ValueType::I32, &values));
    }

    /// A list of numbers, one for each block.
    fn numbers(&mut self, suffix: &str, values: &[f32]) {
        let values: Vec<gguf::Value> = values.iter().map(|value| gguf::Value::F32(*value)).collect();
        self.set(suffix, Array::of_values(ValueType::F32, &values));
    }

    /// A list of flags, one for each block.
    fn flags(&mut self, suffix: &str, values: impl Iterator<Item = bool>) {
        let values: Vec<gguf::Value> = values.map(gguf::Value::Bool).collect();
        self.set(suffix, Array::of_values(ValueType::Bool, &values));
    }
}

/// Writes some keys.
pub(super) type Part = fn(&Source, &mut Keys) -> Result<(), ConvertError>;

/// An entry of a row's list of keys; later ones replace earlier ones.
#[derive(Debug, Clone, Copy)]
pub(super) enum Key {
    /// Some that belong together.
    Part(Part),
    /// A field that holds an integer.
    Count(Field),
    /// A field that holds a number.
    Number(Field),
    /// A field that holds a flag.
    Flag(Field),
    /// The part of a head that is rotated, where the configuration does not say otherwise.
    Rotated(f64),
    /// A number that all models of the class have.
    Fixed(&'static str, u32),
}

/// A field of `config.json` and the key that it becomes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Field {
    from: &'static str,
    to: &'static str,
    required: bool,
}

const fn field(from: &'static str, to: &'static str) -> Field {
    Field { from, to, required: true }
}

/// An integer that must be there.
pub(super) const fn count(from: &'static str, to: &'static str) -> Key {
    Key::Count(field(from, to))
}

/// A number that must be there.
pub(super) const fn number(from: &'static str, to: &'static str) -> Key {
    Key::Number(field(from, to))
}

/// A flag that must be there.
pub(super) const fn flag(from: &'static str, to: &'static str) -> Key {
    Key::Flag(field(from, to))
}

/// The same field where it need not be there; the key is then left out.
pub(super) const fn where_given(key: Key) -> Key {
    match key {
        Key::Count(field) => Key::Count(Field { required: false, ..field }),
        Key::Number(field) => Key::Number(Field { required: false, ..field }),
        Key::Flag(field) => Key::Flag(Field { required: false, ..field }),
        other => other,
    }
}

impl Key {
    fn write(self, source: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
        let config = source.config;
        let (field, written) = match self {
            Key::Part(part) => return part(source, keys),
            Key::Rotated(usual) => return rope::write_rotated(source, usual, keys),
            Key::Fixed(suffix, value) => {
                keys.u32(suffix, value.into());
                return Ok(());
            }
            Key::Count(field) => {
                (field, config.optional_u32(field.from)?.map(|count| keys.u32(field.to, count.into())))
            }
            Key::Number(field) => (field, config.optional_f64(field.from)?.map(|number| keys.f32(field.to, number))),
            Key::Flag(field) => (field, config.optional_bool(field.from)?.map(|flag| keys.set(field.to, flag))),
        };
        if written.is_none() && field.required {
            return Err(config.wrong(field.from, "is missing; this is no complete model configuration"));
        }
        Ok(())
    }
}

/// Writes all hyperparameters and gives the rope factors that become tensors.
pub(super) fn write(
    source: &Source,
    file_type: u32,
    metadata: &mut Metadata,
    warnings: &mut Vec<String>,
) -> Result<Vec<RopeFactors>, ConvertError> {
    let mut keys = Keys { metadata, prefix: source.arch.name, warnings, factors: Vec::new() };
    for key in source.row.keys {
        key.write(source, &mut keys)?;
    }
    keys.metadata.set("general.file_type", file_type);
    Ok(keys.factors)
}

const EXPERTS_USED: [&str; 3] = ["num_experts_per_tok", "num_experts_per_token", "top_k_experts"];
const DENSE_WIDTH: [&str; 3] = ["prefix_dense_intermediate_size", "dense_intermediate_size", "intermediate_size"];
const ROUTING: [&str; 6] = [
    "score_function",
    "scoring_func",
    "score_func",
    "moe_router_activation",
    "moe_router_activation_func",
    "expert_selection_fn",
];

/// The keys that most architectures have.
pub(super) fn common(source: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
    let Source { config, sizes, rope, .. } = source;
    keys.u32("block_count", sizes.blocks.len() as u64);
    keys.u32("context_length", config.count("max_position_embeddings")?);
    keys.u32("embedding_length", sizes.width);
    if let Some(name) = DENSE_WIDTH.iter().find(|name| config.get(name).is_some()) {
        keys.u32("feed_forward_length", config.count(name)?);
    }
    keys.u32("attention.head_count", sizes.heads);
    keys.u32("attention.head_count_kv", sizes.key_heads);
    write_causality(config, keys);
    rope::write_scaling(source, keys)?;
    rope::write_sections(source, keys)?;
    if let Some(theta) = rope.number(config, "rope_theta")? {
        keys.f32("rope.freq_base", theta);
    }
    if let Some(theta) = rope.sliding.as_ref().and_then(|sliding| sliding.get("rope_theta")) {
        keys.f32("rope.freq_base_swa", config.number("rope_local_base_freq", theta)?);
    }
    let epsilon = if config.get("rms_norm_eps").is_none() { config.optional_f64("norm_eps")? } else { None };
    let epsilon = epsilon.map_or_else(|| config.f64("rms_norm_eps"), Ok)?;
    keys.f32("attention.layer_norm_rms_epsilon", epsilon);
    for (names, suffix) in [
        (&EXPERT_COUNT[..], "expert_count"),
        (&EXPERTS_USED[..], "expert_used_count"),
        (&["n_group"], "expert_group_count"),
        (&["topk_group"], "expert_group_used_count"),
    ] {
        if let Some(name) = names.iter().find(|name| config.get(name).is_some())
            && let Some(count) = config.optional_u32(name)?
        {
            keys.u32(suffix, count.into());
        }
    }
    write_routing(config, keys)?;
    if config.get("head_dim").is_some() {
        keys.u32("attention.key_length", sizes.head);
        keys.u32("attention.value_length", sizes.head);
    }
    Ok(())
}

/// How scores of experts become weights.
fn write_routing(config: &Config, keys: &mut Keys) -> Result<(), ConvertError> {
    let Some(name) = ROUTING.iter().find(|name| config.get(name).is_some()) else { return Ok(()) };
    let function = match config.str(name) {
        Some("softmax") => 1,
        Some("sigmoid") => 2,
        Some("sqrtsoftplus") => 4,
        _ => return Err(config.wrong(name, "is none of softmax, sigmoid and sqrtsoftplus, which GGUF knows")),
    };
    keys.u32("expert_gating_func", function);
    Ok(())
}

/// Blocks that predict further tokens, where there are any.
pub(super) fn nextn(source: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
    if source.sizes.nextn() > 0 {
        keys.u32("nextn_predict_layers", source.sizes.nextn());
    }
    Ok(())
}

/// The same where the configuration speaks of them, though there may be none.
pub(super) fn nextn_where_given(source: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
    let given = source.config.get("num_nextn_predict_layers").is_some();
    if given && source.sizes.dropped == 0 {
        keys.u32("nextn_predict_layers", source.sizes.nextn());
    }
    Ok(())
}

/// The window of layers that have one, and which do.
pub(super) fn windows(source: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
    if let Some(window) = source.config.optional_u32("sliding_window")? {
        keys.u32("attention.sliding_window", window.into());
        let trunk = source.sizes.blocks.iter().filter(|block| !block.nextn);
        keys.flags("attention.sliding_window_pattern", trunk.map(|block| block.window));
    }
    Ok(())
}

/// Size of the vocabulary.
pub(super) fn vocab_size(source: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
    keys.u32("vocab_size", source.sizes.vocab);
    Ok(())
}

/// Width of an expert that is not that of dense layers.
pub(super) fn expert_width(source: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
    if source.sizes.experts > 0 {
        keys.u32("expert_feed_forward_length", source.sizes.expert_width);
    }
    Ok(())
}

/// Width of the shared experts, where there are any.
pub(super) fn shared_width(source: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
    if source.sizes.shared_width > 0 {
        keys.u32("expert_shared_feed_forward_length", source.sizes.shared_width);
    }
    Ok(())
}

/// Models in which a token sees those behind it as well: embedding models and text encoders.
fn write_causality(config: &Config, keys: &mut Keys) {
    // Gemma's word for it; "vision" concerns images only.
    let both_ways = config.get("use_bidirectional_attention").is_some_and(|to| *to == true || *to == "all");
    if both_ways && config.get("sliding_window").is_some() {
        keys.warnings.push("use_bidirectional_attention is set: windows will be those of llama.cpp".to_owned());
    }
    if both_ways || config.get("is_causal").and_then(Value::as_bool) == Some(false) {
        keys.set("attention.causal", false);
    }
}
