//! What removing layers means for the metadata: which keys speak of layers, and how each is rewritten.
//!
//! The keys are those that llama.cpp b10605 reads (`llama-arch.cpp`, `clip-impl.h`), and some of Ollama's. A length says
//! nothing: a model of four layers has lists of four that are no list of layers, such as `rope.dimension_sections`.

use super::error::{Note, RecipeError};
use super::prune::PrunePlan;
use crate::gguf::{Array, Metadata, Value, ValueType, shown};

/// How a key speaks of layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// An array has a value for each layer; a single value is for all of them.
    PerLayer,
    /// As [`Kind::PerLayer`] where it is an array, else a period as [`Kind::Period`].
    PerLayerOrPeriod,
    /// The number of the first layers of a kind.
    First,
    /// The number of the last layers of a kind, those for multi-token prediction included.
    Last,
    /// Numbers of layers that are of a kind.
    Numbers,
    /// Numbers of layers whose input is taken; the last layer's output has the number behind it.
    Inputs,
    /// Every so many layers one is of a kind.
    Period(Phase),
    /// Something changes after every so many layers.
    Stretch,
    /// Inputs that the first layers get, one each: how many there are is decided elsewhere.
    FirstInputs,
}

/// Which layer of a period of `n` is the one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    First,
    Second,
    Last,
}

impl Phase {
    /// True if the layer is the one of its period.
    fn has(self, layer: u64, period: u64) -> bool {
        let place = layer % period;
        match self {
            Phase::First => place == 0,
            Phase::Second => place == 1 % period,
            Phase::Last => place == period - 1,
        }
    }
}

/// Keys behind the architecture's name, of the main stack of blocks.
const MODEL_KEYS: &[(&str, Kind)] = &[
    ("attention.head_count", Kind::PerLayer),
    ("attention.head_count_kv", Kind::PerLayer),
    ("attention.key_length", Kind::PerLayer),
    ("attention.value_length", Kind::PerLayer),
    ("attention.sliding_window", Kind::PerLayer),
    ("attention.sliding_window_pattern", Kind::PerLayerOrPeriod),
    ("attention.rope_pattern", Kind::PerLayer),
    ("attention.layer_types", Kind::PerLayer),
    ("attention.indexer.types", Kind::PerLayer),
    ("attention.compress_ratios", Kind::PerLayer),
    ("attention.recurrent_layers", Kind::PerLayer),
    ("attention.scale", Kind::PerLayer),
    ("feed_forward_length", Kind::PerLayer),
    ("expert_feed_forward_length", Kind::PerLayer),
    ("expert_shared_feed_forward_length", Kind::PerLayer),
    ("expert_count", Kind::PerLayer),
    ("expert_used_count", Kind::PerLayer),
    ("expert_shared_count", Kind::PerLayer),
    ("swiglu_clamp_exp", Kind::PerLayer),
    ("swiglu_clamp_shexp", Kind::PerLayer),
    ("activation_sparsity_scale", Kind::PerLayer),
    ("deepstack_mapping", Kind::PerLayer),
    ("layer_types", Kind::PerLayer),
    ("rope.freq_base", Kind::PerLayer),
    ("rope.dimension_count", Kind::PerLayer),
    ("rope.scaling.factor", Kind::PerLayer),
    ("ssm.time_step_rank", Kind::PerLayer),
    ("leading_dense_block_count", Kind::First),
    ("hash_layer_count", Kind::First),
    ("n_deepstack_layers", Kind::FirstInputs),
    ("nextn_predict_layers", Kind::Last),
    ("attention.shared_kv_layers", Kind::Last),
    ("attention.full_attention_layers", Kind::Numbers),
    ("attention.sliding_window_layers", Kind::Numbers),
    ("attention.cross_attention_layers", Kind::Numbers),
    ("full_attention_layers", Kind::Numbers),
    ("cross_attention_layers", Kind::Numbers),
    (FULL_ATTENTION_INTERVAL, Kind::Period(Phase::Last)),
    ("interleave_moe_layer_step", Kind::Period(Phase::Last)),
    ("moe_every_n_layers", Kind::Period(Phase::Second)),
    ("rescale_every_n_layers", Kind::Stretch),
    ("attn_res.block_size", Kind::Stretch),
];

/// Keys of the decoder of an encoder-decoder, behind the architecture's name.
const DECODER_COUNT: &str = "decoder_block_count";

/// Keys of an encoder's stack, behind `clip.vision.`, `clip.audio.` or the architecture's name with `.vision.`.
const ENCODER_KEYS: &[(&str, Kind)] = &[
    ("attention.head_count", Kind::PerLayer),
    ("attention.head_count_kv", Kind::PerLayer),
    ("feed_forward_length", Kind::PerLayer),
    ("expert_count_per_layer", Kind::PerLayer),
    ("is_deepstack_layers", Kind::PerLayer),
    ("wa_pattern_mode", Kind::PerLayer),
    ("wa_layer_indexes", Kind::Numbers),
    ("fullatt_block_indexes", Kind::Numbers),
    ("deepstack_visual_indexes", Kind::Numbers),
    ("deepstack_layers", Kind::Numbers),
    ("feature_layer", Kind::Inputs),
    ("intermediate_layers_indices", Kind::Inputs),
    ("n_wa_pattern", Kind::Period(Phase::Last)),
];

/// Keys without an architecture's name, of the main stack.
const BARE_KEYS: &[(&str, Kind)] = &[
    ("xielu.alpha_n", Kind::PerLayer),
    ("xielu.alpha_p", Kind::PerLayer),
    ("xielu.beta", Kind::PerLayer),
    ("xielu.eps", Kind::PerLayer),
];

/// Lists behind the architecture's name that are none of its layers; `target_layers` are those of another model.
const OTHER_LISTS: &[&str] = &[
    "rope.dimension_sections",
    "classifier.output_labels",
    "target_layers",
    "adapters.token_ids_activate",
    "adapters.token_ids_substitute",
];

/// Periods that llama.cpp takes for an architecture whose file does not state them, and the key that would.
const UNSTATED_PERIODS: &[(&str, &str, u64)] = &[
    ("gemma2", "attention.sliding_window_pattern", 2),
    ("gemma3", "attention.sliding_window_pattern", 6),
    ("gemma3n", "attention.sliding_window_pattern", 5),
    ("gemma-embedding", "attention.sliding_window_pattern", 6),
    ("cohere2", "attention.sliding_window_pattern", 4),
    ("cohere2moe", "attention.sliding_window_pattern", 4),
    ("olmo2", "attention.sliding_window_pattern", 4),
    ("exaone4", "attention.sliding_window_pattern", 4),
    ("exaone-moe", "attention.sliding_window_pattern", 4),
    ("gpt-oss", "attention.sliding_window_pattern", 2),
    ("llama4", "attention.sliding_window_pattern", 4),
    ("afmoe", "attention.sliding_window_pattern", 4),
    ("smallthinker", "attention.sliding_window_pattern", 4),
    ("plamo3", "attention.sliding_window_pattern", 8),
    ("modern-bert", "attention.sliding_window_pattern", 3),
    ("laguna", "attention.sliding_window_pattern", 4),
    ("mellum", "attention.sliding_window_pattern", 4),
    ("muse-glimmer", "attention.sliding_window_pattern", 4),
    ("smollm3", "attention.rope_pattern", 4),
    ("qwen3next", FULL_ATTENTION_INTERVAL, 4),
    ("qwen35", FULL_ATTENTION_INTERVAL, 4),
    ("qwen35moe", FULL_ATTENTION_INTERVAL, 4),
    ("minimax-01", FULL_ATTENTION_INTERVAL, 8),
];

/// Architectures whose window pattern begins with the layer that sees everything.
const FULL_LAYER_FIRST: &[&str] = &["cohere2moe", "laguna", "modern-bert", "smallthinker"];

/// The key that says which layers are recurrent, one by one, and the one that gives the period of those that are not.
const RECURRENT_LAYERS: &str = "attention.recurrent_layers";
const FULL_ATTENTION_INTERVAL: &str = "full_attention_interval";

/// Tensors whose rows hold something for every layer: they cannot lose a layer by losing a tensor.
const OF_ALL_LAYERS: &[&str] = &["per_layer_token_embd.weight", "per_layer_model_proj.weight"];

/// Keys behind the architecture's name that have a value for each layer of the main stack where they are lists, those for
/// multi-token prediction included.
pub(super) fn keys_of_layers() -> impl Iterator<Item = &'static str> {
    let by_layer = |kind: &Kind| matches!(kind, Kind::PerLayer | Kind::PerLayerOrPeriod);
    MODEL_KEYS.iter().filter(move |(_, kind)| by_layer(kind)).map(|(key, _)| *key)
}

/// Refuses a tensor that holds something for every layer.
pub(super) fn refuse_tensor_of_all_layers(name: &str) -> Result<(), RecipeError> {
    match OF_ALL_LAYERS.contains(&name) {
        true => Err(RecipeError::TensorOfAllLayers { tensor: name.to_owned() }),
        false => Ok(()),
    }
}

/// Rewrites all keys that speak of layers for a model that loses those of `plan`. Returns what the user should be told.
pub(super) fn rewrite(plan: &PrunePlan, architecture: &str, metadata: &mut Metadata) -> Vec<Note> {
    let mut notes = Vec::new();
    for stack in stacks(plan, architecture, metadata) {
        let Some(layers) = stack.layers else { continue };
        for (key, kind) in &stack.keys {
            let of_key = Rewrite { plan, key, kind: *kind, layers, nextn: stack.nextn };
            if let Some(value) = metadata.get(key).cloned()
                && let Some(new) = of_key.value(&value, &mut notes)
            {
                metadata.set(key, new);
            }
        }
        if stack.is_main {
            note_unstated_period(plan, architecture, layers, metadata, &mut notes);
            note_unknown_lists(architecture, layers, &stack.keys, metadata, &mut notes);
        }
        if let Some(key) = &stack.count_key {
            let left = layers.saturating_sub(plan.removed_below(layers));
            let elem = metadata.get(key).map_or(ValueType::U32, Value::value_type);
            if let Some(value) = Value::integer(elem, left.into()) {
                metadata.set(key, value);
            }
        }
    }
    notes
}

/// A stack of blocks and what the metadata say of it.
struct Stack {
    /// The key with the number of its layers.
    count_key: Option<String>,
    /// That number.
    layers: Option<u64>,
    /// How many of them, the last ones, predict further tokens.
    nextn: u64,
    /// Keys that speak of its layers.
    keys: Vec<(String, Kind)>,
    is_main: bool,
}

fn stacks(plan: &PrunePlan, architecture: &str, metadata: &Metadata) -> Vec<Stack> {
    let count_of = |key: &str| metadata.u64(key).ok().flatten();
    let mut stacks = Vec::new();
    let mains: Vec<&str> = plan.stacks().filter(|stack| matches!(*stack, "" | "enc.")).collect();
    // A decoder without a count of its own is as deep as the encoder.
    let decoder_key = format!("{architecture}.{DECODER_COUNT}");
    if plan.stacks().any(|stack| stack == "dec.") && count_of(&decoder_key).is_some() {
        let layers = count_of(&decoder_key);
        stacks.push(Stack { count_key: Some(decoder_key), layers, nextn: 0, keys: Vec::new(), is_main: false });
    }
    if !mains.is_empty() || plan.stacks().any(|stack| stack == "dec.") {
        let key = format!("{architecture}.block_count");
        let last = mains.iter().copied().chain(["dec."]).filter_map(|stack| plan.last_layer(stack)).max();
        let layers = count_of(&key).or(last.map(|last| last.saturating_add(1)));
        // Where layers are named one by one, the period is not looked at.
        let one_by_one = metadata.contains(&format!("{architecture}.{RECURRENT_LAYERS}"));
        let looked_at = MODEL_KEYS.iter().filter(|(key, _)| !(one_by_one && *key == FULL_ATTENTION_INTERVAL));
        let prefixed = looked_at.map(|(key, kind)| (format!("{architecture}.{key}"), *kind));
        let bare = BARE_KEYS.iter().map(|(key, kind)| ((*key).to_owned(), *kind));
        let nextn = count_of(&format!("{architecture}.nextn_predict_layers")).unwrap_or(0);
        stacks.push(Stack { count_key: Some(key), layers, nextn, keys: prefixed.chain(bare).collect(), is_main: true });
    }
    for (stack, part) in [("v.", "vision"), ("a.", "audio"), ("v.sam.", "vision.sam"), ("v.global.", "vision.global")] {
        if !plan.stacks().any(|name| name == stack) {
            continue;
        }
        for prefix in [format!("clip.{part}"), format!("{architecture}.{part}")] {
            let key = format!("{prefix}.block_count");
            let layers = count_of(&key);
            let keys = ENCODER_KEYS.iter().map(|(key, kind)| (format!("{prefix}.{key}"), *kind)).collect();
            let known = layers.or(plan.last_layer(stack).map(|last| last.saturating_add(1)));
            let count_key = layers.is_some().then_some(key);
            stacks.push(Stack { count_key, layers: known, nextn: 0, keys, is_main: false });
            // For an image encoder alone, both prefixes are the same.
            if architecture == "clip" {
                break;
            }
        }
    }
    stacks
}

/// One key of a stack.
struct Rewrite<'a> {
    plan: &'a PrunePlan,
    key: &'a str,
    kind: Kind,
    /// Layers of its stack before any is removed.
    layers: u64,
    /// How many of them predict further tokens.
    nextn: u64,
}

impl Rewrite<'_> {
    /// The key's new value, `None` where the old one holds.
    fn value(&self, value: &Value, notes: &mut Vec<Note>) -> Option<Value> {
        let plan = self.plan;
        match (self.kind, value) {
            (Kind::PerLayer | Kind::PerLayerOrPeriod, Value::Array(array)) => self.per_layer(array, notes),
            (Kind::PerLayer, _) => None,
            (Kind::PerLayerOrPeriod, _) => {
                let first = FULL_LAYER_FIRST
                    .iter()
                    .any(|architecture| self.key.strip_prefix(*architecture).is_some_and(|rest| rest.starts_with('.')));
                self.note_period(value, if first { Phase::First } else { Phase::Last }, notes);
                None
            }
            (Kind::Period(phase), _) => {
                self.note_period(value, phase, notes);
                None
            }
            (Kind::Stretch, _) => {
                let period = number(value).filter(|period| *period > 0)?;
                if !self.kept().all(|layer| layer / period == plan.new_number(layer) / period) {
                    notes.push(Note::PeriodBroken { key: shown(self.key.as_bytes()), period });
                }
                None
            }
            (Kind::First, _) => {
                let first = number(value)?;
                self.count(value, first, plan.removed_below(first))
            }
            (Kind::FirstInputs, _) => {
                let first = number(value)?;
                if plan.removed_below(first) > 0 {
                    notes.push(Note::InputsOfRemovedLayers { key: shown(self.key.as_bytes()), layers: first });
                }
                None
            }
            (Kind::Last, _) => {
                let last = number(value)?;
                let begin = self.layers.saturating_sub(last);
                if self.key.ends_with("shared_kv_layers") && last > 0 {
                    self.note_shared_from(begin, notes);
                }
                let removed = plan.removed_below(self.layers) - plan.removed_below(begin);
                self.count(value, last, removed)
            }
            (Kind::Numbers | Kind::Inputs, Value::Array(array)) => self.numbers(array, notes),
            (Kind::Numbers | Kind::Inputs, _) => {
                let layer = number(value)?;
                if self.kind == Kind::Numbers && plan.is_removed(layer) {
                    notes.push(Note::LayerOfKeyRemoved { key: shown(self.key.as_bytes()), layer });
                }
                Value::integer(value.value_type(), plan.new_number(layer).into())
            }
        }
    }

    /// Layers that stay.
    fn kept(&self) -> impl Iterator<Item = u64> {
        // A count that the file makes up must not be walked.
        let walked = self.layers.min(MOST_LAYERS);
        (0..walked).filter(|layer| !self.plan.is_removed(*layer))
    }

    /// The same array without the values of the layers that go. Those for multi-token prediction may have none; values
    /// behind the last layer stay.
    fn per_layer(&self, array: &Array, notes: &mut Vec<Note>) -> Option<Value> {
        if array.len() < self.layers.saturating_sub(self.nextn) || array.len() > MOST_LAYERS {
            notes.push(Note::NotPerLayer { key: shown(self.key.as_bytes()), values: array.len(), layers: self.layers });
            return None;
        }
        let kept = array.iter().enumerate().filter(|(layer, _)| !self.plan.is_removed(*layer as u64));
        let values: Vec<Value> = kept.map(|(_, value)| value).collect();
        Some(Value::Array(Array::of_values(array.elem_type(), &values)))
    }

    /// A list of layer numbers after pruning.
    fn numbers(&self, array: &Array, notes: &mut Vec<Note>) -> Option<Value> {
        let old = array.to_i64_vec().ok().filter(|_| array.len() <= MOST_LAYERS)?;
        let mut new = Vec::with_capacity(old.len());
        for number in old {
            // Negative numbers stand for none or count from the end.
            let number = match u64::try_from(number) {
                Ok(layer) if self.kind == Kind::Numbers && self.plan.is_removed(layer) => continue,
                Ok(layer) => i128::from(self.plan.new_number(layer)),
                Err(_) => i128::from(number),
            };
            new.push(number);
        }
        if new.is_empty() && !array.is_empty() {
            notes.push(Note::NoLayerLeft { key: shown(self.key.as_bytes()) });
        }
        if self.kind == Kind::Inputs && new.windows(2).any(|pair| pair[0] == pair[1] && pair[0] >= 0) {
            notes.push(Note::InputsFallTogether { key: shown(self.key.as_bytes()) });
        }
        let values: Option<Vec<Value>> =
            new.into_iter().map(|number| Value::integer(array.elem_type(), number)).collect();
        Some(Value::Array(Array::of_values(array.elem_type(), &values?)))
    }

    fn count(&self, value: &Value, count: u64, removed: u64) -> Option<Value> {
        Value::integer(value.value_type(), count.saturating_sub(removed).into())
    }

    fn note_period(&self, value: &Value, phase: Phase, notes: &mut Vec<Note>) {
        let Some(period) = number(value).filter(|period| *period > 0) else { return };
        if !self.kept().all(|layer| phase.has(layer, period) == phase.has(self.plan.new_number(layer), period)) {
            notes.push(Note::PeriodBroken { key: shown(self.key.as_bytes()), period });
        }
    }

    /// The layers that share take keys and values of one of the two layers before them, by their kind.
    fn note_shared_from(&self, begin: u64, notes: &mut Vec<Note>) {
        let sources = begin.saturating_sub(2)..begin;
        if let Some(layer) = sources.into_iter().find(|layer| self.plan.is_removed(*layer)) {
            notes.push(Note::SharedSourceRemoved { key: shown(self.key.as_bytes()), layer });
        }
    }
}

/// More layers no model has that llama.cpp loads (`LLAMA_MAX_LAYERS` is 512).
pub(super) const MOST_LAYERS: u64 = 1 << 16;

/// A whole number that is not negative.
fn number(value: &Value) -> Option<u64> {
    value.as_integer().and_then(|number| u64::try_from(number).ok())
}

/// Says so where the architecture's own period no longer fits.
fn note_unstated_period(plan: &PrunePlan, architecture: &str, layers: u64, metadata: &Metadata, notes: &mut Vec<Note>) {
    let of_architecture = UNSTATED_PERIODS.iter().filter(|row| row.0 == architecture);
    for (_, key, period) in of_architecture {
        let full = format!("{architecture}.{key}");
        let one_by_one =
            *key == FULL_ATTENTION_INTERVAL && metadata.contains(&format!("{architecture}.{RECURRENT_LAYERS}"));
        // Without a window there is no pattern; two architectures have one by themselves.
        let window = metadata.u64(&format!("{architecture}.attention.sliding_window")).ok().flatten();
        let window = window.unwrap_or(u64::from(matches!(architecture, "gemma2" | "llama4")));
        let windowed = *key != "attention.sliding_window_pattern" || window > 0;
        if metadata.contains(&full) || one_by_one || !windowed {
            continue;
        }
        let phase = if FULL_LAYER_FIRST.contains(&architecture) { Phase::First } else { Phase::Last };
        let of_key = Rewrite { plan, key: &full, kind: Kind::Period(phase), layers, nextn: 0 };
        of_key.note_period(&Value::U64(*period), phase, notes);
    }
}

/// Names lists of the architecture that have a value for each layer, as far as lengths tell, and that are not known.
fn note_unknown_lists(
    architecture: &str,
    layers: u64,
    known: &[(String, Kind)],
    metadata: &Metadata,
    notes: &mut Vec<Note>,
) {
    for (key, value) in metadata.iter() {
        let Value::Array(array) = value else { continue };
        let Some(rest) = key.strip_prefix(architecture).and_then(|rest| rest.strip_prefix('.')) else { continue };
        let is_known = known.iter().any(|(known, _)| known == key) || OTHER_LISTS.contains(&rest);
        if array.len() == layers && !is_known && !rest.starts_with("vision.") && !rest.starts_with("audio.") {
            notes.push(Note::UnknownList { key: shown(key.as_bytes()), values: array.len() });
        }
    }
}

#[cfg(test)]
mod tests;
