//! What a tensor does in its model, told from its name; and which tensors are never quantized.

use std::fmt;
use std::ops::Range;

use crate::gguf::TensorType;

/// Broad role of a tensor: the rows of the mix tables (`tensor_category`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // the names say it
pub enum Role {
    Output,
    TokenEmbd,
    AttnQkv,
    AttnKvB,
    AttnV,
    AttnK,
    AttnQ,
    AttnOutput,
    FfnUp,
    FfnGate,
    FfnDown,
    Other,
}

/// Part of a name → role; the first that occurs in the name decides.
const ROLE_MARKS: &[(&str, Role)] = &[
    ("attn_qkv.weight", Role::AttnQkv),
    ("attn_kv_b.weight", Role::AttnKvB),
    ("attn_v.weight", Role::AttnV),
    ("attn_k.weight", Role::AttnK),
    ("attn_q.weight", Role::AttnQ),
    ("attn_output.weight", Role::AttnOutput),
    ("ffn_up", Role::FfnUp),
    ("ffn_gate", Role::FfnGate),
    ("ffn_down", Role::FfnDown),
];

/// Name of the tensor that turns hidden states into logits; without it the token embedding does both.
pub(crate) const OUTPUT_WEIGHT: &str = "output.weight";

/// The matrix of token embeddings; also that of the logits in models without [`OUTPUT_WEIGHT`].
pub(crate) const TOKEN_EMBD_WEIGHT: &str = "token_embd.weight";

/// Names with the role of a token embedding.
const EMBEDDING_NAMES: &[&str] = &[TOKEN_EMBD_WEIGHT, "per_layer_token_embd.weight"];

/// What the names of a block's tensors begin with, before the block's number.
const BLOCK_PREFIX: &str = "blk.";

/// Tensors of a block that other programs put into one matrix, or run with one kernel.
const SIBLINGS: &[(&str, &[&str])] = &[
    ("attn_qkv", &["attn_q", "attn_k", "attn_v", "attn_qkv", "attn_gate"]),
    ("ffn_gate_up", &["ffn_gate", "ffn_up"]),
    ("ffn_exps", &["ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps", "ffn_down_exps"]),
    ("ffn_gate_up_shexp", &["ffn_gate_shexp", "ffn_up_shexp"]),
    ("ffn_gate_up_chexp", &["ffn_gate_chexp", "ffn_up_chexp"]),
];

/// A key that is equal for tensors which other programs put into one; `None` for those that stay alone.
pub(crate) fn siblings(name: &str) -> Option<String> {
    let block = block_number(name)?;
    let part = name.strip_suffix(".weight")?.rsplit('.').next()?;
    let (key, _) = SIBLINGS.iter().find(|(_, parts)| parts.contains(&part))?;
    Some(format!("{BLOCK_PREFIX}{block}.{key}"))
}

impl Role {
    /// The role that the tensor's name implies.
    pub(crate) fn of(name: &str) -> Role {
        if name == OUTPUT_WEIGHT {
            Role::Output
        } else if is_embedding(name) {
            Role::TokenEmbd
        } else {
            ROLE_MARKS.iter().find(|(mark, _)| name.contains(mark)).map_or(Role::Other, |(_, role)| *role)
        }
    }

    /// True for tensors that produce attention values, alone or fused: small and sensitive.
    pub(crate) fn is_value(self) -> bool {
        matches!(self, Role::AttnV | Role::AttnQkv | Role::AttnKvB)
    }

    /// True for the three matrices of a feed-forward block, dense or expert.
    pub(crate) fn is_ffn(self) -> bool {
        matches!(self, Role::FfnUp | Role::FfnGate | Role::FfnDown)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Role::Output => "output",
            Role::TokenEmbd => "token embedding",
            Role::AttnQkv => "attn_qkv",
            Role::AttnKvB => "attn_kv_b",
            Role::AttnV => "attn_v",
            Role::AttnK => "attn_k",
            Role::AttnQ => "attn_q",
            Role::AttnOutput => "attn_output",
            Role::FfnUp => "ffn_up",
            Role::FfnGate => "ffn_gate",
            Role::FfnDown => "ffn_down",
            Role::Other => "other",
        })
    }
}

/// Why a tensor keeps the type it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// The target is a plain copy.
    Copy,
    /// Fewer than two dimensions are longer than one: norms, biases, scales.
    Vector,
    /// The name does not end in `weight`.
    NotAWeight,
    /// The name holds this part, which marks small or index-like tensors.
    Named(&'static str),
    /// `--leave-output-tensor`.
    LeaveOutput,
    /// The source type holds integers or doubles, which are no model weights, or is none that ggml has.
    SourceType,
}

impl fmt::Display for Keep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Keep::Copy => f.write_str("copy"),
            Keep::Vector => f.write_str("one-dimensional"),
            Keep::NotAWeight => f.write_str("name does not end in weight"),
            Keep::Named(part) => write!(f, "{} is never quantized", part.trim_matches('.')),
            Keep::LeaveOutput => f.write_str("--leave-output-tensor"),
            Keep::SourceType => f.write_str("its type holds no weights that are known"),
        }
    }
}

/// Parts of names that exempt a tensor.
const EXEMPT_PARTS: &[&str] = &[
    "_norm.weight",
    // Expert routing.
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    // Gemma 3n: matrices of a few elements, and a small projection.
    "altup",
    "laurel",
    "per_layer_model_proj",
    // Short convolutions of state space and hybrid models.
    "ssm_conv1d",
    "shortconv.conv.weight",
    // Sparse attention indexer.
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    // RWKV's low-rank mixers.
    "time_mix_first.weight",
    "time_mix_w0.weight",
    "time_mix_w1.weight",
    "time_mix_w2.weight",
    "time_mix_v0.weight",
    "time_mix_v1.weight",
    "time_mix_v2.weight",
    "time_mix_a0.weight",
    "time_mix_a1.weight",
    "time_mix_a2.weight",
    "time_mix_g1.weight",
    "time_mix_g2.weight",
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
    // T5's relative positions.
    "attn_rel_b.weight",
    // Image and audio encoders.
    ".position_embd",
    "sam.pos_embd",
    "sam.neck.",
    "sam.net_",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    "a.rvq.codebook",
    "mm.a.code_embd",
];

/// Whole names that exempt a tensor: learned positions and segment embeddings of GPT-2 and BERT.
const EXEMPT_NAMES: &[&str] = &["position_embd.weight", "token_types.weight"];

/// Says why a tensor of this name and shape (ggml order, row length first) is never quantized, or `None`
/// (`tensor_allows_quantization` without its options).
pub fn exemption(name: &str, shape: &[u64]) -> Option<Keep> {
    if !shape.iter().skip(1).any(|&length| length > 1) {
        return Some(Keep::Vector);
    }
    // The factors of an adapter are kept where the matrix that they adapt is.
    let name = adapted_name(name).unwrap_or(name);
    if !name.ends_with("weight") {
        return Some(Keep::NotAWeight);
    }
    let whole = EXEMPT_NAMES.iter().find(|exempt| name == **exempt);
    whole.or_else(|| EXEMPT_PARTS.iter().find(|part| name.contains(**part))).map(|part| Keep::Named(part))
}

/// The name of the matrix that a factor of a LoRA adapter changes: `NAME.lora_a` or `NAME.lora_b`.
pub(crate) fn adapted_name(name: &str) -> Option<&str> {
    name.strip_suffix(".lora_a").or_else(|| name.strip_suffix(".lora_b"))
}

/// True for source types that cannot be turned into single precision weights: integers, and types of other programs.
pub(crate) fn is_unconvertible(ty: TensorType) -> bool {
    ty.info().is_none()
        || matches!(ty, TensorType::I8 | TensorType::I16 | TensorType::I32 | TensorType::I64 | TensorType::F64)
}

/// True for tensors whose rows are looked up by token (`tensor_name_match_token_embd`).
pub(crate) fn is_embedding(name: &str) -> bool {
    EMBEDDING_NAMES.contains(&name)
}

/// True for the tensors that are read row by row and may therefore go without importance weights in any type.
pub(crate) fn is_embedding_or_output(name: &str) -> bool {
    name == OUTPUT_WEIGHT || is_embedding(name)
}

/// True for tensors of the stack of blocks, whether or not a number follows.
pub(crate) fn is_in_block(name: &str) -> bool {
    name.starts_with(BLOCK_PREFIX)
}

/// The first `blk.N.` anywhere in a name, so that both stacks of an encoder-decoder have it (`enc.blk.N.`): the number,
/// and where its digits stand.
pub(crate) fn find_block(name: &str) -> Option<(u64, Range<usize>)> {
    name.match_indices(BLOCK_PREFIX).find_map(|(at, _)| {
        let start = at + BLOCK_PREFIX.len();
        let end = start + name[start..].bytes().take_while(u8::is_ascii_digit).count();
        let number = name[start..end].parse().ok()?;
        name[end..].starts_with('.').then_some((number, start..end))
    })
}

/// Number and part of a name `blk.N.PART`; `None` for other names.
pub(crate) fn split_block(name: &str) -> Option<(u64, &str)> {
    let (number, digits) = find_block(name)?;
    (digits.start == BLOCK_PREFIX.len()).then(|| (number, &name[digits.end + 1..]))
}

/// The block number that the order of tensors goes by, read as llama-quantize reads it (`sscanf` of `blk.%d.`): it may
/// be negative, and nothing need follow. `None` for tensors outside the numbered blocks.
pub fn block_number(name: &str) -> Option<i32> {
    let rest = name.strip_prefix(BLOCK_PREFIX)?;
    let digits = rest.strip_prefix('-').unwrap_or(rest);
    let length = digits.bytes().take_while(u8::is_ascii_digit).count();
    if length == 0 {
        return None;
    }
    rest[..rest.len() - digits.len() + length].parse().ok()
}

/// Order in which tensors are written and in which running layer counts advance: tensors without a block first, then
/// by block number, then by name. Returns indices into `names`.
pub fn output_order(names: &[&str]) -> Vec<usize> {
    let keys: Vec<_> = names.iter().map(|name| (block_number(name).unwrap_or(-1), *name)).collect();
    let mut order: Vec<usize> = (0..names.len()).collect();
    order.sort_by(|&a, &b| keys[a].cmp(&keys[b]));
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_loaders_put_into_one_has_one_key() {
        let key = |part: &str| siblings(&format!("blk.3.{part}.weight"));
        assert!(key("attn_q").is_some() && key("attn_q") == key("attn_v") && key("attn_k") == key("attn_qkv"));
        assert!(key("ffn_gate").is_some() && key("ffn_gate") == key("ffn_up") && key("ffn_up") != key("ffn_up_exps"));
        assert!(key("ffn_down_exps").is_some() && key("ffn_down_exps") == key("ffn_gate_exps"));
        assert_eq!((key("attn_output"), key("ffn_down"), siblings("output.weight")), (None, None, None));
        assert_ne!(siblings("blk.3.attn_q.weight"), siblings("blk.4.attn_q.weight"));
    }

    #[test]
    fn roles_follow_the_name() {
        for (name, role) in [
            ("output.weight", Role::Output),
            ("mtp.output.weight", Role::Other),
            ("token_embd.weight", Role::TokenEmbd),
            ("per_layer_token_embd.weight", Role::TokenEmbd),
            ("blk.3.attn_qkv.weight", Role::AttnQkv),
            ("blk.3.attn_kv_b.weight", Role::AttnKvB),
            ("blk.3.attn_k_b.weight", Role::Other),
            ("blk.3.attn_q_a.weight", Role::Other),
            ("enc.blk.3.attn_v.weight", Role::AttnV),
            ("dec.blk.3.cross_attn_v.weight", Role::AttnV),
            ("blk.3.ffn_gate_up_exps.weight", Role::FfnGate),
            ("blk.3.ffn_down_shexp.weight", Role::FfnDown),
            ("blk.3.ffn_up.weight", Role::FfnUp),
            ("blk.3.ssm_in.weight", Role::Other),
        ] {
            assert_eq!(Role::of(name), role, "{name}");
        }
    }

    #[test]
    fn small_and_index_tensors_are_exempt() {
        let matrix = [64, 64];
        for name in [
            "blk.0.attn_norm.weight",
            "blk.0.ffn_gate_inp.weight",
            "position_embd.weight",
            "token_types.weight",
            "v.position_embd.weight",
            "blk.0.ssm_conv1d.weight",
            "blk.0.time_mix_w1.weight",
            "enc.blk.0.attn_rel_b.weight",
            "altup_proj.weight",
        ] {
            assert!(matches!(exemption(name, &matrix), Some(Keep::Named(_))), "{name}");
        }
        assert_eq!(exemption("blk.0.attn_q.bias", &matrix), Some(Keep::NotAWeight));
        assert_eq!(exemption("w", &matrix), Some(Keep::NotAWeight));
        assert_eq!(exemption("blk.0.attn_q.weight.lora_a", &matrix), None);
        assert_eq!(exemption("blk.0.ffn_gate_inp.weight.lora_b", &matrix), Some(Keep::Named("ffn_gate_inp.weight")));
        assert_eq!(exemption("blk.0.attn_q.bias.lora_b", &matrix), Some(Keep::NotAWeight));
        assert_eq!(exemption("lora_a", &matrix), Some(Keep::NotAWeight));
        assert_eq!(exemption("blk.0.attn_q.weight", &matrix), None);
        assert_eq!(exemption("token_embd.weight", &matrix), None);
    }

    #[test]
    fn a_matrix_of_one_row_counts_as_a_vector() {
        assert_eq!(exemption("blk.0.attn_q.weight", &[64, 1]), Some(Keep::Vector));
        assert_eq!(exemption("blk.0.attn_q.weight", &[64]), Some(Keep::Vector));
        assert_eq!(exemption("blk.0.attn_q.weight", &[]), Some(Keep::Vector));
        assert_eq!(exemption("blk.0.attn_q.weight", &[64, 1, 8]), None);
    }

    #[test]
    fn blocks_are_ordered_by_number_after_everything_else() {
        let names = ["blk.10.a", "output.weight", "blk.2.b", "blk.2.a", "enc.blk.0.a", "blk.0.z"];
        let sorted: Vec<_> = output_order(&names).into_iter().map(|at| names[at]).collect();
        assert_eq!(sorted, ["enc.blk.0.a", "output.weight", "blk.0.z", "blk.2.a", "blk.2.b", "blk.10.a"]);
    }

    #[test]
    fn absurd_block_numbers_are_none() {
        assert_eq!(block_number("blk.999999999999.attn_v.weight"), None);
        assert_eq!(block_number("blk..attn_v.weight"), None);
        assert_eq!(block_number("blk.-3.attn_v.weight"), Some(-3));
        assert_eq!(block_number("blk.-.attn_v.weight"), None);
        assert_eq!(block_number("blk.007.attn_v.weight"), Some(7));
    }

    #[test]
    fn names_of_blocks_come_apart() {
        assert_eq!(find_block("enc.blk.12.attn_v.weight"), Some((12, 8..10)));
        assert_eq!(split_block("blk.3.attn_v.weight"), Some((3, "attn_v.weight")));
        for name in
            ["enc.blk.0.a", "blk.x.a", "blk..a", "blk.+5.a", "blk.1", "blk.99999999999999999999.a", "output.weight"]
        {
            assert_eq!(split_block(name), None, "{name}");
        }
        assert_eq!(split_block("blk.x.blk.3.a"), None);
        assert_eq!(find_block("blk.x.blk.3.a"), Some((3, 10..11)));
    }
}
