//! Which tensors of a folder are weights of linear layers, and how the others are named where a configuration lists them.

use regex::Regex;

/// What a tensor is for, as far as its name tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// A matrix product with activations: it is quantized.
    Linear,
    /// The output matrix.
    Head,
    /// A choice of experts, or the gate of a shared one.
    Router,
    /// The narrow inputs of a delta net: its decay and its step.
    Narrow,
    /// A block that predicts further tokens, which transformers does not load.
    NextTokens,
    /// Part of an image or sound tower.
    Tower,
    /// Embeddings, norms, convolutions and whatever is no matrix.
    Other,
}

impl Role {
    /// True for what may be a linear layer of the loaded model: it must be named where it is not quantized.
    pub(crate) fn is_linear_layer(self) -> bool {
        self != Role::Other
    }
}

/// The module of a weight: its name without `.weight`.
pub(crate) fn module_of(name: &str) -> Option<&str> {
    name.strip_suffix(".weight")
}

/// Number of the layer that a name has.
pub(crate) fn layer_of(name: &str) -> Option<u64> {
    let parts: Vec<&str> = name.split('.').collect();
    let holds_layers = |part: &str| matches!(part, "layers" | "h" | "blocks" | "block");
    parts.windows(2).find(|pair| holds_layers(pair[0])).and_then(|pair| pair[1].parse().ok())
}

/// The role of a matrix of the language model by the name of its module; `layers` is the number of its layers.
pub(crate) fn role_of(module: &str, layers: Option<u64>) -> Role {
    let parts: Vec<&str> = module.split('.').collect();
    let last = parts.last().copied().unwrap_or_default();
    let any = |names: &[&str]| parts.iter().any(|part| names.contains(part));
    let starts_head = ["lm_head", "embed_out", "output"].contains(&last) && !any(&["layers", "h", "blocks"]);
    if any(&["mtp", "nextn", "eh_proj", "shared_head"]) || layer_of(module).zip(layers).is_some_and(|(at, n)| at >= n) {
        return Role::NextTokens;
    }
    if starts_head {
        return Role::Head;
    }
    if any(&["gate", "router", "shared_expert_gate", "wg"]) {
        return Role::Router;
    }
    if ["in_proj_a", "in_proj_b", "in_proj_ba"].contains(&last) {
        return Role::Narrow;
    }
    let lower = last.to_ascii_lowercase();
    let is_table = lower.contains("embed") || ["wte", "wpe", "position_ids"].contains(&lower.as_str());
    if is_table || lower.contains("norm") || lower.starts_with("ln_") || lower.contains("conv") {
        return Role::Other;
    }
    Role::Linear
}

/// Modules that loaders put into one: they must have one scheme.
const FUSED: [&[&str]; 6] = [
    &["q_proj", "k_proj", "v_proj"],
    &["gate_proj", "up_proj"],
    &["w1", "w3"],
    &["in_proj_qkv", "in_proj_z"],
    &["in_proj_b", "in_proj_a"],
    &["q_a_proj", "kv_a_proj_with_mqa"],
];

/// A key that is equal for modules that loaders put into one; `None` for those that stay alone. With it the place of the
/// module among them, and true if it is the last.
pub(crate) fn fused_of(module: &str) -> Option<(String, usize, bool)> {
    let (parent, last) = module.rsplit_once('.')?;
    FUSED.iter().find_map(|names| {
        let at = names.iter().position(|name| *name == last)?;
        Some((format!("{parent}.{}", names[0]), at, at + 1 == names.len()))
    })
}

/// The stack of experts that a module is one of, such as `model.layers.3.mlp.experts`.
pub(crate) fn experts_of(module: &str) -> Option<&str> {
    let at = module.find(".experts.")?;
    module[at + ".experts.".len()..].starts_with(|c: char| c.is_ascii_digit()).then(|| &module[..at + ".experts".len()])
}

/// A pattern, `re:` in front, for a module and those of other layers with its name: what stands before the layers' numbers
/// differs between programs.
fn pattern_of(module: &str) -> String {
    let parts: Vec<&str> = module.split('.').collect();
    let is_number = |part: &&str| part.bytes().all(|byte| byte.is_ascii_digit());
    let from = parts.iter().position(&is_number).map_or(0, |first| first.saturating_sub(1));
    let escaped = |part: &&str| if is_number(part) { r"\d+".to_owned() } else { regex::escape(part) };
    let tail: Vec<String> = parts[from..].iter().map(escaped).collect();
    format!(r"re:.*{}$", tail.join(r"\."))
}

/// A pattern for all of a block that predicts further tokens.
fn next_tokens_pattern(module: &str) -> String {
    match (module.split('.').find(|part| matches!(*part, "mtp" | "nextn")), layer_of(module)) {
        (Some(part), _) => format!(r"re:.*{part}\..*"),
        (None, Some(layer)) => format!(r"re:.*layers\.{layer}\..*"),
        (None, None) => module.to_owned(),
    }
}

/// True if an entry of `ignore` or `targets` names the module. Patterns are anchored at the start, as loaders match them.
pub(crate) fn matches(entry: &str, module: &str) -> bool {
    match entry.strip_prefix("re:") {
        None => entry == module,
        Some(pattern) => Regex::new(&format!("^(?:{pattern})")).is_ok_and(|regex| regex.is_match(module)),
    }
}

/// Entries that name all of `kept` and none of `quantized`: a pattern for modules that many layers have, full names where a
/// pattern would go too far.
pub(crate) fn entries(kept: &[String], quantized: &[&str], layers: Option<u64>) -> Vec<String> {
    let mut entries: Vec<String> = Vec::new();
    for module in kept {
        let has_number = module.split('.').any(|part| part.bytes().all(|byte| byte.is_ascii_digit()));
        let pattern = match role_of(module, layers) {
            Role::NextTokens => Some(next_tokens_pattern(module)).filter(|pattern| pattern.starts_with("re:")),
            _ => has_number.then(|| pattern_of(module)),
        };
        let entry = match pattern {
            Some(pattern) if entries.contains(&pattern) => continue,
            Some(pattern) => {
                let regex = Regex::new(&format!("^(?:{})", &pattern["re:".len()..]));
                let is_free = regex.is_ok_and(|regex| !quantized.iter().any(|module| regex.is_match(module)));
                if is_free { pattern } else { module.clone() }
            }
            None => module.clone(),
        };
        if !entries.contains(&entry) {
            entries.push(entry);
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_what_a_matrix_is_for() {
        for (module, role) in [
            ("model.layers.0.self_attn.q_proj", Role::Linear),
            ("model.layers.0.mlp.gate_proj", Role::Linear),
            ("model.layers.0.mlp.experts.7.down_proj", Role::Linear),
            ("model.layers.0.block_sparse_moe.experts.7.w2", Role::Linear),
            ("model.layers.0.self_attn.kv_b_proj", Role::Linear),
            ("model.layers.0.attention.output", Role::Linear),
            ("model.layers.0.mlp.gate", Role::Router),
            ("model.layers.0.mlp.shared_expert_gate", Role::Router),
            ("model.layers.0.block_sparse_moe.router.layer", Role::Router),
            ("model.layers.0.linear_attn.in_proj_ba", Role::Narrow),
            ("model.layers.0.linear_attn.in_proj_qkvz", Role::Linear),
            ("model.layers.0.linear_attn.conv1d", Role::Other),
            ("model.layers.0.self_attn.q_norm", Role::Other),
            ("model.embed_tokens", Role::Other),
            ("model.embed_tokens_per_layer", Role::Other),
            ("lm_head", Role::Head),
            ("language_model.lm_head", Role::Head),
            ("output", Role::Head),
            ("mtp.layers.0.mlp.up_proj", Role::NextTokens),
            ("model.layers.4.mlp.up_proj", Role::NextTokens),
        ] {
            assert_eq!(role_of(module, Some(4)), role, "{module}");
        }
    }

    #[test]
    fn fused_modules_share_a_key() {
        let key = |module| fused_of(module).map(|(key, ..)| key);
        assert_eq!(key("a.self_attn.q_proj"), key("a.self_attn.v_proj"));
        assert_ne!(key("a.mlp.gate_proj"), key("b.mlp.gate_proj"));
        assert_eq!(key("a.self_attn.o_proj"), None);
        assert_eq!(fused_of("a.up_proj"), Some(("a.gate_proj".into(), 1, true)));
        assert_eq!(experts_of("m.3.mlp.experts.12.up_proj"), Some("m.3.mlp.experts"));
        assert_eq!(experts_of("m.3.mlp.shared_expert.up_proj"), None);
    }

    #[test]
    fn entries_name_what_is_kept_and_nothing_else() {
        let kept = ["lm_head", "mtp.layers.0.mlp.up_proj", "mtp.layers.0.mlp.gate_proj", "m.layers.2.mlp.up_proj"];
        let routers = ["m.layers.0.mlp.gate", "m.layers.1.mlp.gate", "m.layers.1.mlp.up_proj"];
        let kept: Vec<String> = kept.into_iter().chain(routers).map(str::to_owned).collect();
        let quantized = ["m.layers.0.mlp.up_proj", "m.layers.0.mlp.gate_proj"];
        let entries = entries(&kept, &quantized, Some(2));
        assert_eq!(
            entries,
            [
                "lm_head",
                r"re:.*mtp\..*",
                r"re:.*layers\.2\..*",
                r"re:.*layers\.\d+\.mlp\.gate$",
                "m.layers.1.mlp.up_proj"
            ]
        );
        for module in &kept {
            assert!(entries.iter().any(|entry| matches(entry, module)), "{module}");
        }
        for module in quantized {
            assert!(!entries.iter().any(|entry| matches(entry, module)), "{module}");
        }
    }
}
