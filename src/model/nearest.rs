//! What is known of a model whose architecture is not in the table: its parts by the names of its tensors.

use std::collections::BTreeSet;

use super::arch::{ARCHITECTURES, Architecture, AttentionGate, QkNorm, RopeFactors, SharedExpert, Sinks};
use super::error::{ModelError, UnknownArchitecture};
use crate::gguf::Gguf;
use crate::recipe::roles::split_block;

/// Most names of tensors in a message.
const MOST_NAMES: usize = 6;

/// A part that the forward pass has.
struct Known {
    name: &'static str,
    /// Tensors of a block that tell of it; a dot at the end stands for any rest.
    tensors: &'static [&'static str],
    /// Whether an architecture has it.
    of: fn(&Architecture) -> bool,
}

const KNOWN: &[Known] = &[
    Known { name: "attention", tensors: &["attn_q.", "attn_k.", "attn_v.", "attn_qkv.", "attn_output."], of: |_| true },
    Known { name: "norms before", tensors: &["attn_norm.", "ffn_norm."], of: |arch| arch.norms.before },
    Known {
        name: "norms of queries and keys",
        tensors: &["attn_q_norm.", "attn_k_norm."],
        of: |arch| !matches!(arch.attention.qk_norm, QkNorm::None | QkNorm::Unweighted),
    },
    Known {
        name: "norms after",
        tensors: &["post_attention_norm.", "post_ffw_norm."],
        of: |arch| arch.norms.after || arch.norms.feed_forward == "post_attention_norm",
    },
    Known { name: "gated attention", tensors: &["attn_gate."], of: |arch| arch.attention.gate != AttentionGate::None },
    Known { name: "attention sinks", tensors: &["attn_sinks."], of: |arch| arch.attention.sinks != Sinks::None },
    Known {
        name: "gated delta net",
        tensors: &[
            "ssm_conv1d.",
            "ssm_beta.",
            "ssm_alpha.",
            "ssm_ba.",
            "ssm_a",
            "ssm_dt.bias",
            "ssm_norm.",
            "ssm_out.",
        ],
        of: |arch| arch.delta_net.is_some(),
    },
    Known { name: "gated feed-forward network", tensors: &["ffn_gate.", "ffn_up.", "ffn_down."], of: |_| true },
    Known {
        name: "mixture of experts",
        tensors: &["ffn_gate_inp.", "ffn_gate_exps.", "ffn_up_exps.", "ffn_down_exps.", "ffn_gate_up_exps."],
        of: |arch| arch.feed_forward.mixture.gating().is_some(),
    },
    Known {
        name: "bias for the choice of experts",
        tensors: &["exp_probs_b."],
        of: |arch| arch.feed_forward.selection_bias,
    },
    Known {
        name: "shared experts",
        tensors: &["ffn_gate_shexp.", "ffn_up_shexp.", "ffn_down_shexp.", "ffn_gate_inp_shexp."],
        of: |arch| arch.feed_forward.shared != SharedExpert::None,
    },
    Known {
        name: "rotary factors",
        tensors: &["rope_freqs.", "rope_factors_long.", "rope_factors_short."],
        of: |arch| arch.rope.factors != RopeFactors::None,
    },
    Known {
        name: "inputs by layer",
        tensors: &["inp_gate.", "proj.", "post_norm.", "layer_output_scale."],
        of: |arch| arch.layer_inputs,
    },
    Known { name: "blocks for further tokens", tensors: &["nextn."], of: |arch| arch.next_tokens },
];

/// Parts that the forward pass lacks, and tensors that tell of them.
const LACKING: &[(&str, &[&str])] = &[
    ("latent attention (MLA)", &["attn_kv_a_mqa.", "attn_kv_b.", "attn_k_b.", "attn_v_b.", "attn_q_a.", "attn_q_b."]),
    ("index of sparse attention", &["indexer."]),
    ("state-space layers (Mamba)", &["ssm_x.", "ssm_d", "ssm_dt.weight", "ssm_in."]),
    ("delta net with a decay per channel", &["ssm_f_a.", "ssm_f_b.", "ssm_g_a.", "ssm_g_b.", "ssm_conv1d_q."]),
    ("short convolutions", &["shortconv."]),
    ("RWKV time mixing", &["time_mix_", "channel_mix_"]),
    ("alternating streams (AltUp)", &["altup_"]),
    ("low-rank residual branch (Laurel)", &["laurel_"]),
    ("hyper-connections", &["hc_"]),
    ("latent experts", &["ffn_latent_"]),
    ("norms inside of a branch", &["attn_sub_norm.", "ffn_sub_norm."]),
    ("norms with a mean (LayerNorm)", &["attn_norm.bias", "ffn_norm.bias", "attn_norm_2."]),
    ("experts in one tensor each", &["ffn_gate.0.", "ffn_up.0.", "ffn_down.0."]),
];

/// The refusal of a model whose architecture, `name`, is not in the table.
pub(super) fn unknown_architecture(gguf: &Gguf, name: &str) -> ModelError {
    let parts: BTreeSet<&str> = gguf.tensors().iter().filter_map(|tensor| part_of(&tensor.name)).collect();
    let has = |signs: &[&str]| parts.iter().any(|part| signs.iter().any(|sign| is_of(part, sign)));
    let found: Vec<&Known> = KNOWN.iter().filter(|known| has(known.tensors)).collect();
    let mut missing: Vec<String> =
        LACKING.iter().filter(|(_, signs)| has(signs)).map(|(part, _)| (*part).to_owned()).collect();
    if has(&["ffn_up."]) && !has(&["ffn_gate."]) && !gguf.tensors().is_empty() {
        missing.push("feed-forward network without a gate, unless its ffn_up holds both".to_owned());
    }
    let is_told = |part: &&&str| {
        let known = KNOWN.iter().flat_map(|known| known.tensors);
        known.chain(LACKING.iter().flat_map(|(_, signs)| *signs)).any(|sign| is_of(part, sign))
    };
    let strange: Vec<&str> = parts.iter().filter(|part| !is_told(part)).copied().collect();
    if !strange.is_empty() {
        let more = strange.len().saturating_sub(MOST_NAMES);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        missing.push(format!("{}{more}", strange[..strange.len().min(MOST_NAMES)].join(", ")));
    }
    let or_nothing = |list: String, nothing: &str| if list.is_empty() { nothing.to_owned() } else { list };
    let names: Vec<&str> = found.iter().map(|known| known.name).collect();
    ModelError::UnknownArchitecture(Box::new(UnknownArchitecture {
        found: name.chars().take(64).collect(),
        nearest: nearest(&found).to_owned(),
        parts: or_nothing(names.join(", "), "none"),
        missing: or_nothing(missing.join("; "), "the rule that joins them"),
    }))
}

/// The architecture whose parts agree best with those found.
fn nearest(found: &[&Known]) -> &'static str {
    let agreement = |arch: &&Architecture| {
        let agrees = |known: &&Known| (known.of)(arch) == found.iter().any(|part| part.name == known.name);
        KNOWN.iter().filter(agrees).count()
    };
    // The first of equals.
    ARCHITECTURES.iter().rev().max_by_key(agreement).map_or("none", |arch| arch.name)
}

/// A tensor's name without its block; `None` for the ends that every model has.
fn part_of(name: &str) -> Option<&str> {
    match split_block(name) {
        Some((_, part)) => Some(part),
        None if name.starts_with("rope_f") => Some(name),
        None => None,
    }
}

/// True if a sign stands for a tensor: it is its beginning, or all of it without `.weight`.
fn is_of(part: &str, sign: &str) -> bool {
    match sign.ends_with(['.', '_']) {
        true => part.starts_with(sign),
        false => part == sign || part.strip_suffix(".weight") == Some(sign),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signs_stand_for_whole_names_or_beginnings() {
        assert!(is_of("attn_q.weight", "attn_q.") && !is_of("attn_q_norm.weight", "attn_q."));
        assert!(is_of("ssm_a", "ssm_a") && !is_of("ssm_alpha.weight", "ssm_a"));
        assert!(is_of("ssm_d.weight", "ssm_d") && !is_of("ssm_dt.bias", "ssm_d"));
        assert!(is_of("time_mix_w1.weight", "time_mix_"));
    }

    #[test]
    fn the_nearest_has_the_same_parts() {
        let found =
            |names: &[&str]| -> Vec<&Known> { KNOWN.iter().filter(|known| names.contains(&known.name)).collect() };
        let dense = ["attention", "norms before", "gated feed-forward network"];
        assert_eq!(nearest(&found(&[&dense[..], &["rotary factors", "mixture of experts"]].concat())), "llama");
        assert_eq!(nearest(&found(&[&dense[..], &["norms of queries and keys"]].concat())), "qwen3");
        let hybrid =
            ["norms of queries and keys", "norms after", "gated attention", "gated delta net", "shared experts"];
        let more = ["mixture of experts", "blocks for further tokens"];
        let names = [&dense[..], &hybrid[..], &more[..]].concat();
        assert!(["qwen3next", "qwen35moe"].contains(&nearest(&found(&names))));
    }
}
