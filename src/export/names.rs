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

/// Modules that loaders put into one, which must have one scheme, and the name that vLLM has for it.
const FUSED: [(&[&str], &str); 6] = [
    (&["q_proj", "k_proj", "v_proj"], "qkv_proj"),
    (&["gate_proj", "up_proj"], "gate_up_proj"),
    (&["w1", "w3"], "gate_up_proj"),
    (&["in_proj_qkv", "in_proj_z"], "in_proj_qkvz"),
    (&["in_proj_b", "in_proj_a"], "in_proj_ba"),
    (&["q_a_proj", "kv_a_proj_with_mqa"], "fused_qkv_a_proj"),
];

/// A key that is equal for modules that loaders put into one; `None` for those that stay alone. With it the place of the
/// module among them, and true if it is the last.
pub(crate) fn fused_of(module: &str) -> Option<(String, usize, bool)> {
    let (parent, last) = module.rsplit_once('.')?;
    FUSED.iter().find_map(|(names, _)| {
        let at = names.iter().position(|name| *name == last)?;
        Some((format!("{parent}.{}", names[0]), at, at + 1 == names.len()))
    })
}

/// The stack of experts that a module is one of, such as `model.layers.3.mlp.experts`.
pub(crate) fn experts_of(module: &str) -> Option<&str> {
    let at = module.find(".experts.")?;
    module[at + ".experts.".len()..].starts_with(|c: char| c.is_ascii_digit()).then(|| &module[..at + ".experts".len()])
}

/// A key that is equal for modules which must become the same: those that loaders put into one, and the experts of a layer.
pub(crate) fn unit_of(module: &str) -> String {
    let fused = || fused_of(module).map_or_else(|| module.to_owned(), |(key, ..)| key);
    experts_of(module).map_or_else(fused, str::to_owned)
}

/// What the name of a module of a unit looks like behind its layer: the module's own, or that which vLLM has for several in
/// one.
fn tail_pattern(module: &str) -> String {
    if let Some(stack) = experts_of(module) {
        // vLLM asks for the experts of all classes under the same three names.
        return format!(r"{}\.\d+\..*", regex::escape(stack));
    }
    let (parent, last) = module.rsplit_once('.').unwrap_or(("", module));
    // transformers takes a pattern with this word for that of all experts.
    let escape = |text: &str| regex::escape(text).replace("experts", "expert[s]");
    let fused = FUSED.iter().find(|(names, _)| names.contains(&last));
    let parent = if parent.is_empty() { String::new() } else { format!(r"{}\.", escape(parent)) };
    match fused {
        Some((names, whole)) => format!("{parent}(?:{}|{whole})$", names.join("|")),
        None => format!("{parent}{}$", escape(last)),
    }
}

/// A target for all experts of a model.
pub(crate) const ALL_EXPERTS: &str = r"re:.*\.experts\.\d+\..*";

/// Modules of several layers whose names are alike behind the number.
struct Alike<'a> {
    /// What holds the layers, such as `layers`.
    holder: &'a str,
    /// Of the name behind the number.
    tail: String,
    numbers: Vec<String>,
    modules: Vec<&'a str>,
}

impl Alike<'_> {
    fn pattern(&self) -> String {
        let numbers = self.numbers.join("|");
        let numbers = if self.numbers.len() == 1 { numbers } else { format!("(?:{numbers})") };
        format!(r".*{}\.{numbers}\.{}", regex::escape(self.holder), self.tail)
    }
}

/// Entries of `targets` that name all of `modules` and none of `others`: patterns for whole units, one for those of all layers
/// with the same name; full names where a pattern would go too far. What stands before the layers differs between programs, and
/// vLLM looks for the name that it has for several in one before it looks for theirs; in between for the class.
pub(crate) fn targets(modules: &[&str], others: &[&str]) -> Vec<String> {
    let mut entries = Vec::new();
    let mut alike: Vec<Alike<'_>> = Vec::new();
    for module in modules {
        let number = layer_of(module).map(|layer| layer.to_string());
        let Some((before, tail)) = number.as_ref().and_then(|number| module.split_once(&format!(".{number}."))) else {
            entries.push((*module).to_owned());
            continue;
        };
        let (holder, tail) = (before.rsplit('.').next().unwrap_or(before), tail_pattern(tail));
        let at = alike.iter().position(|known| known.holder == holder && known.tail == tail).unwrap_or(alike.len());
        if at == alike.len() {
            alike.push(Alike { holder, tail, numbers: Vec::new(), modules: Vec::new() });
        }
        let known = &mut alike[at];
        known.numbers.extend(number.filter(|number| !known.numbers.contains(number)));
        known.modules.push(module);
    }
    for known in alike {
        let pattern = known.pattern();
        let regex = Regex::new(&format!("^(?:{pattern})"));
        match regex.is_ok_and(|regex| !others.iter().any(|module| regex.is_match(module))) {
            true => entries.push(format!("re:{pattern}")),
            false => entries.extend(known.modules.into_iter().map(str::to_owned)),
        }
    }
    entries
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
    fn targets_name_whole_units_under_all_names_that_loaders_have_for_them() {
        let q = |layer: u64, name: &str| format!("m.layers.{layer}.attn.{name}_proj");
        let modules = [q(0, "q"), q(0, "k"), q(0, "v"), q(12, "q"), q(12, "k"), q(12, "v"), q(1, "o"), "m.down".into()];
        let experts = ["m.layers.1.mlp.experts.0.down_proj", "m.layers.1.mlp.experts.1.up_proj"];
        let modules: Vec<&str> = modules.iter().map(String::as_str).chain(experts).collect();
        let others = [q(1, "q"), q(2, "q"), q(0, "o"), "m.layers.1.mlp.shared_expert.up_proj".into()];
        let others: Vec<&str> = others.iter().map(String::as_str).collect();
        let found = targets(&modules, &others);
        assert_eq!(
            found,
            [
                "m.down",
                r"re:.*layers\.(?:0|12)\.attn\.(?:q_proj|k_proj|v_proj|qkv_proj)$",
                r"re:.*layers\.1\.attn\.o_proj$",
                r"re:.*layers\.1\.mlp\.experts\.\d+\..*",
            ]
        );
        let is_named = |module: &str| found.iter().any(|entry| matches(entry, module));
        assert!(modules.iter().all(|module| is_named(module)) && !others.iter().any(|module| is_named(module)));
        assert!(is_named("model.layers.12.attn.qkv_proj") && !is_named("m.layers.2.attn.qkv_proj"));
        assert!(is_named("language_model.layers.1.mlp.experts.0.gate_proj"));
        assert!(matches(ALL_EXPERTS, experts[0]) && !matches(ALL_EXPERTS, others[3]));
        let shared = targets(&["m.layers.1.mlp.shared_experts.up_proj"], &experts);
        assert_eq!(shared, [r"re:.*layers\.1\.mlp\.shared_expert[s]\.(?:gate_proj|up_proj|gate_up_proj)$"]);
        assert!(matches(&shared[0], "m.layers.1.mlp.shared_experts.gate_up_proj"));
        // Encoder and decoder have the same names behind their layers.
        let decoder = targets(&["decoder.layers.0.fc1"], &["encoder.layers.0.fc1"]);
        assert_eq!(decoder, ["decoder.layers.0.fc1"]);
        assert_eq!(unit_of("m.layers.1.mlp.experts.1.up_proj"), "m.layers.1.mlp.experts");
        assert_eq!(unit_of("m.attn.k_proj"), unit_of("m.attn.q_proj"));
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
