//! Modules that are not there at all, of which neither a shape nor a neighbour's tensor tells: layers are compared with each
//! other and with what `config.json` says of the model.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use super::modules::Module;
use super::tensors::Tensors;
use crate::convert::source::is_known_class;
use crate::export::names::{self, Role};

/// What loaders do about weights that they do not find.
const RANDOM: &str = "loaders make random weights of it";

/// Names that hold the layers of a language model.
const HOLDERS: [&str; 4] = ["layers", "h", "blocks", "block"];

/// Keys that count blocks behind the layers.
const NEXT_TOKENS: [&str; 3] = ["num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers"];

/// The layers of a part of the model: what each has, by names behind its number.
type Layers<'t> = BTreeMap<u64, BTreeSet<&'t str>>;

/// Names every hole.
pub(super) fn check(
    config: &Map<String, Value>,
    tensors: &Tensors,
    modules: &[Module],
    layers: Option<u64>,
    faults: &mut Vec<String>,
) {
    let config = Config { config, layers };
    let quantized: BTreeSet<&str> = modules.iter().map(|module| module.name.as_str()).collect();
    let names: BTreeSet<&str> = tensors.by_name.keys().map(|name| part_of(name, &quantized)).collect();
    // Other parts, such as towers, have layers of other kinds, which nothing is known of.
    let is_language = |name: &&&str| names::role_of(name, layers) != Role::NextTokens;
    let stacks: BTreeSet<&str> =
        quantized.iter().filter(is_language).filter_map(|name| split(name)).map(|(stack, ..)| stack).collect();
    for stack in &stacks {
        let mut of_stack: Layers<'_> = BTreeMap::new();
        for (_, layer, rest) in names.iter().filter_map(|name| split(name)).filter(|(found, ..)| found == stack) {
            of_stack.entry(layer).or_default().insert(rest);
        }
        if stacks.len() == 1 {
            config.check_number(stack, &of_stack, faults);
        }
        of_stack.retain(|layer, _| layers.is_none_or(|count| *layer < count));
        config.check_layers(stack, &of_stack, faults);
        check_experts(stack, &of_stack, &config, faults);
    }
    config.check_ends(&names, tensors, faults);
}

/// The module that a tensor is a part of, or the tensor's own name where it stands beside one.
fn part_of<'t>(name: &'t str, quantized: &BTreeSet<&str>) -> &'t str {
    let module = name.rsplit_once('.').map_or(name, |(module, _)| module);
    let is_part = name.ends_with(".weight") || quantized.contains(module) && !name.ends_with(".bias");
    if is_part { module } else { name }
}

/// What holds the layers, the number of one, and the name inside it.
fn split(name: &str) -> Option<(&str, u64, &str)> {
    let mut at = 0;
    let mut before = "";
    for part in name.split('.') {
        let end = at + part.len();
        if let (true, Ok(layer)) = (HOLDERS.contains(&before), part.parse()) {
            return Some((&name[..at - 1], layer, name.get(end + 1..)?));
        }
        (at, before) = (end + 1, part);
    }
    None
}

struct Config<'a> {
    config: &'a Map<String, Value>,
    layers: Option<u64>,
}

impl Config<'_> {
    /// A field, of the part for text or of the whole.
    fn field(&self, key: &str) -> Option<&Value> {
        let parts = [self.config.get("text_config").and_then(Value::as_object), Some(self.config)];
        parts.into_iter().flatten().find_map(|part| part.get(key))
    }

    fn count(&self, key: &str) -> u64 {
        self.field(key).and_then(Value::as_u64).unwrap_or(0)
    }

    fn check_number(&self, stack: &str, layers: &Layers<'_>, faults: &mut Vec<String>) {
        let Some(count) = self.layers else { return };
        for layer in (0..count.min(1 << 16)).filter(|layer| !layers.contains_key(layer)) {
            faults.push(format!("{stack}.{layer}: is missing; config.json says {count} layers: {RANDOM}"));
        }
        let more = NEXT_TOKENS.iter().map(|key| self.count(key)).sum::<u64>();
        if let Some(layer) = layers.keys().find(|layer| **layer >= count.saturating_add(more)) {
            faults.push(format!(
                "{stack}.{layer}: is there, but config.json says {count} layers (num_hidden_layers): loaders leave it out"
            ));
        }
    }

    /// A layer that has only a part of what another has, and is of a rarer kind than that, has a hole.
    fn check_layers(&self, stack: &str, layers: &Layers<'_>, faults: &mut Vec<String>) {
        // Each layer has a make of its own there.
        if self.field("block_configs").is_some() {
            return;
        }
        let needed: BTreeMap<u64, BTreeSet<&str>> = layers
            .iter()
            .map(|(layer, names)| (*layer, names.iter().copied().filter(|name| !self.may_lack(*layer, name)).collect()))
            .collect();
        // Layers that may lack something are no model for others.
        let mut kinds: BTreeMap<&BTreeSet<&str>, usize> = BTreeMap::new();
        let usual = needed.iter().filter(|(layer, _)| !self.takes_from_others(**layer));
        usual.for_each(|(_, names)| *kinds.entry(names).or_default() += 1);
        for (layer, names) in &needed {
            let count = kinds.get(names).copied().unwrap_or(0);
            let whole = kinds.iter().filter(|(kind, of_kind)| {
                kind.len() > names.len() && names.is_subset(kind) && (count <= 1 || **of_kind > count)
            });
            let Some((whole, _)) = whole.max_by_key(|(_, count)| **count) else { continue };
            let lacking: Vec<&str> =
                whole.difference(names).copied().filter(|name| !self.may_lack(*layer, name)).collect();
            let is_told = |name: &str| name.strip_suffix(".bias").is_some_and(|module| lacking.contains(&module));
            for name in lacking.iter().filter(|name| !is_told(name)) {
                faults.push(format!(
                    "{stack}.{layer}.{name}: is missing, though other layers like this one have it: {RANDOM}"
                ));
            }
        }
    }

    /// A layer with the keys and values of another.
    fn takes_from_others(&self, layer: u64) -> bool {
        let count = self.count("num_kv_shared_layers");
        count > 0 && self.layers.is_some_and(|layers| layer.saturating_add(count) >= layers)
    }

    /// Layers that take keys and values from others, or keys for values.
    fn may_lack(&self, layer: u64, name: &str) -> bool {
        let last = name.rsplit('.').next().unwrap_or(name);
        let keys_for_values = self.field("attention_k_eq_v").and_then(Value::as_bool).unwrap_or(false);
        (self.takes_from_others(layer) && ["k_proj", "v_proj", "k_norm", "v_norm"].contains(&last))
            || (keys_for_values && last == "v_proj")
    }

    /// Embedding, last norm and head, as far as it is known that the model has them.
    fn check_ends(&self, names: &BTreeSet<&str>, tensors: &Tensors, faults: &mut Vec<String>) {
        let classes = self.config.get("architectures").and_then(Value::as_array);
        let class = classes.and_then(|classes| classes.first()).and_then(Value::as_str).unwrap_or_default();
        if !is_known_class(class) {
            return;
        }
        let outside: Vec<&str> = names.iter().copied().filter(|name| split(name).is_none()).collect();
        let last = |name: &str| name.rsplit('.').next().unwrap_or(name).to_ascii_lowercase();
        let has = |parts: &[&str]| outside.iter().any(|name| parts.iter().any(|part| last(name).contains(part)));
        let beside = |ending: &str| {
            let prefix = names.iter().find_map(|name| split(name)).and_then(|(stack, ..)| stack.rsplit_once('.'));
            prefix.map_or_else(|| ending.to_owned(), |(prefix, _)| format!("{prefix}.{ending}"))
        };
        if !has(&["embed", "wte"]) {
            faults.push(format!("{}: the embedding is missing: {RANDOM}", beside("embed_tokens")));
        }
        if !has(&["norm", "ln_f"]) {
            faults.push(format!("{}: the norm behind the last layer is missing: {RANDOM}", beside("norm")));
        }
        let is_own = self.field("tie_word_embeddings").and_then(Value::as_bool) == Some(false);
        let is_causal = class.ends_with("ForCausalLM") || class.ends_with("ForConditionalGeneration");
        let has_head = tensors.by_name.keys().any(|name| {
            let module = name.split(".weight").next().unwrap_or(name);
            names::role_of(module, self.layers) == Role::Head
        });
        if is_own && is_causal && !has_head {
            faults.push(format!(
                "lm_head.weight: is missing, and config.json says that it is not the embedding (tie_word_embeddings): {RANDOM}"
            ));
        }
    }
}

/// All experts of a layer have the same matrices, and there are as many as the configuration says.
fn check_experts(stack: &str, layers: &Layers<'_>, config: &Config<'_>, faults: &mut Vec<String>) {
    let counts = ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"];
    let said = counts.iter().map(|key| config.count(key)).find(|count| *count > 0);
    for (layer, names) in layers {
        let mut experts: BTreeMap<&str, BTreeMap<u64, BTreeSet<&str>>> = BTreeMap::new();
        for name in names {
            let Some(block) = names::experts_of(name) else { continue };
            let Some((number, matrix)) = name[block.len() + 1..].split_once('.') else { continue };
            let Ok(number) = number.parse() else { continue };
            experts.entry(block).or_default().entry(number).or_default().insert(matrix);
        }
        for (block, experts) in experts {
            let all: BTreeSet<&str> = experts.values().flatten().copied().collect();
            for (number, matrices) in &experts {
                for matrix in all.difference(matrices) {
                    let line = format!("{stack}.{layer}.{block}.{number}.{matrix}: is missing, though other");
                    // The comparison of layers has found it already.
                    if !faults.iter().any(|fault| fault.starts_with(&line)) {
                        faults.push(format!("{line} experts have it: {RANDOM}"));
                    }
                }
            }
            let last = experts.keys().next_back().map_or(0, |last| last + 1);
            for number in (0..said.unwrap_or(last).min(1 << 16)).filter(|number| !experts.contains_key(number)) {
                let expert = format!("{stack}.{layer}.{block}.{number}");
                if !faults.iter().any(|fault| fault.starts_with(&format!("{expert}."))) {
                    faults.push(format!("{expert}: is missing: {RANDOM}"));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(config: Value, count: u64, layers: &[&[&str]]) -> Vec<String> {
        let config = config.as_object().unwrap().clone();
        let config = Config { config: &config, layers: Some(count) };
        let layers: Layers<'_> =
            layers.iter().enumerate().map(|(at, names)| (at as u64, names.iter().copied().collect())).collect();
        let mut faults = Vec::new();
        config.check_number("m.layers", &layers, &mut faults);
        config.check_layers("m.layers", &layers, &mut faults);
        check_experts("m.layers", &layers, &config, &mut faults);
        faults.iter().map(|fault| fault.split(':').next().unwrap().to_owned()).collect()
    }

    const FULL: [&str; 4] = ["attn.q_proj", "attn.q_proj.bias", "attn.k_proj", "attn.v_proj"];
    const DELTA: [&str; 2] = ["delta.in_proj", "delta.out_proj"];
    const NO_VALUES: [&str; 3] = ["attn.q_proj", "attn.q_proj.bias", "attn.k_proj"];

    #[test]
    fn a_layer_with_a_part_of_another_has_a_hole() {
        let none = || serde_json::json!({});
        assert!(faults(none(), 4, &[&FULL, &DELTA, &FULL, &DELTA]).is_empty(), "kinds of layers");
        assert_eq!(faults(none(), 3, &[&FULL, &FULL[2..], &FULL]), ["m.layers.1.attn.q_proj"]);
        assert_eq!(faults(none(), 2, &[&FULL, &NO_VALUES]), ["m.layers.1.attn.v_proj"]);
        assert_eq!(faults(none(), 4, &[&FULL, &DELTA, &FULL, &DELTA[1..]]), ["m.layers.3.delta.in_proj"]);
        let lacking = ["m.layers.1.attn.v_proj", "m.layers.3.attn.v_proj"];
        assert_eq!(faults(none(), 5, &[&FULL, &NO_VALUES, &FULL, &NO_VALUES, &FULL]), lacking);
        // As many of both kinds: each second layer takes its values from the one before.
        assert!(faults(none(), 4, &[&FULL, &NO_VALUES, &FULL, &NO_VALUES]).is_empty());
    }

    #[test]
    fn what_the_configuration_explains_is_no_hole() {
        let shared = serde_json::json!({ "num_kv_shared_layers": 1 });
        assert!(faults(shared.clone(), 3, &[&FULL, &FULL, &FULL[..2]]).is_empty());
        assert_eq!(faults(shared, 3, &[&FULL, &FULL[..2], &FULL[..2]]).len(), 2);
        assert!(faults(serde_json::json!({ "attention_k_eq_v": true }), 3, &[&FULL, &FULL, &NO_VALUES]).is_empty());
        assert!(faults(serde_json::json!({ "block_configs": [] }), 3, &[&FULL, &FULL, &NO_VALUES]).is_empty());
    }

    #[test]
    fn layers_and_experts_are_counted() {
        let none = || serde_json::json!({});
        assert_eq!(faults(none(), 4, &[&FULL, &FULL]), ["m.layers.2", "m.layers.3"]);
        assert_eq!(faults(none(), 1, &[&FULL, &FULL]), ["m.layers.1"]);
        assert!(faults(serde_json::json!({ "num_nextn_predict_layers": 1 }), 1, &[&FULL, &FULL]).is_empty());
        let experts = ["mlp.experts.0.up", "mlp.experts.0.down", "mlp.experts.1.up", "mlp.experts.1.down"];
        assert!(faults(none(), 1, &[&experts]).is_empty());
        assert_eq!(faults(none(), 1, &[&experts[..3]]), ["m.layers.0.mlp.experts.1.down"]);
        assert_eq!(faults(none(), 2, &[&experts[..3], &experts]), ["m.layers.0.mlp.experts.1.down"]);
        let three = serde_json::json!({ "num_experts": 3 });
        assert_eq!(faults(three, 1, &[&experts]), ["m.layers.0.mlp.experts.2"]);
    }

    #[test]
    fn names_are_split_at_the_layer() {
        assert_eq!(split("a.layers.3.mlp.experts.1.up"), Some(("a.layers", 3, "mlp.experts.1.up")));
        assert_eq!(split("h.0.ln_1"), Some(("h", 0, "ln_1")));
        assert_eq!(split("model.norm"), None);
        let quantized = BTreeSet::from(["a.q"]);
        let parts = ["a.q.weight_scale", "a.q.bias", "a.norm.weight", "a.norm.bias", "a.A_log"];
        assert_eq!(
            parts.map(|name| part_of(name, &quantized)),
            ["a.q", "a.q.bias", "a.norm", "a.norm.bias", "a.A_log"]
        );
    }
}
