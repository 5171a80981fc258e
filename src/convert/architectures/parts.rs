//! Groups of tensors that the rows are made of.

use super::Dim::{
    AllPerLayer, DoubleLinearHeads, DoubleQueries, DoubleWidth, Experts, FeedForward, Fused, GateUp, Head, Heads,
    Kernel, Keys, LinearFused, LinearHead, LinearHeads, LinearKeys, LinearValues, One, Outputs, PerLayer,
    PerLayerVocabulary, Queries, SharedWidth, Values, Vocabulary, Width,
};
use super::When::{
    Attention, Dense, Experts as WithExperts, NextN, NotStored, OwnKeys, OwnValues, Recurrent, Shared, SharedKeys,
    Stored,
};
use super::{Change, Cut, Dim, ExpertNames, Group, Groups, Order, Role, When};

const fn role(source: &'static str, target: &'static str, shape: &'static [Dim]) -> Role {
    Role {
        source,
        stored: ".weight",
        target,
        written: ".weight",
        shape,
        cut: None,
        order: Order::Kept,
        change: Change::Keep,
        bias: false,
        optional: false,
        squeezed: false,
        plain: false,
    }
}

const fn linear(source: &'static str, target: &'static str, shape: &'static [Dim]) -> Role {
    Role { bias: true, ..role(source, target, shape) }
}

const fn shifted(source: &'static str, target: &'static str, shape: &'static [Dim]) -> Role {
    Role { change: Change::AddOne, ..role(source, target, shape) }
}

/// A tensor whose name has no `.weight`, and how the target's ends.
const fn bare(source: &'static str, target: &'static str, written: &'static str, shape: &'static [Dim]) -> Role {
    Role { stored: "", written, ..role(source, target, shape) }
}

const fn optional(role: Role) -> Role {
    Role { optional: true, ..role }
}

/// Segments `from..to` of a tensor that is a stack of them.
const fn cut(role: Role, stack: &'static [Dim], from: usize, to: usize) -> Role {
    Role { cut: Some(Cut { stack, from, to, groups: Groups::One }), ..role }
}

const fn grouped(role: Role, groups: Groups) -> Role {
    match role.cut {
        Some(cut) => Role { cut: Some(Cut { groups, ..cut }), ..role },
        None => role,
    }
}

const fn ordered(order: Order, role: Role) -> Role {
    Role { order, ..role }
}

const fn all(roles: &'static [Role]) -> Group {
    Group { when: &[], roles }
}

const fn on(when: &'static [When], roles: &'static [Role]) -> Group {
    Group { when, roles }
}

const ATTN_NORM: Role = role("input_layernorm", "attn_norm", &[Width]);
const Q_PROJ: Role = linear("self_attn.q_proj", "attn_q", &[Queries, Width]);
const K_PROJ: Role = linear("self_attn.k_proj", "attn_k", &[Keys, Width]);
const V_PROJ: Role = linear("self_attn.v_proj", "attn_v", &[Values, Width]);
const O_PROJ: Role = linear("self_attn.o_proj", "attn_output", &[Width, Outputs]);

// Norms.
pub(super) const NORMS: Group = all(&[ATTN_NORM, role("post_attention_layernorm", "ffn_norm", &[Width])]);
pub(super) const SHIFTED_NORMS: Group = all(&[
    shifted("input_layernorm", "attn_norm", &[Width]),
    shifted("post_attention_layernorm", "ffn_norm", &[Width]),
]);
pub(super) const GEMMA_NORMS: Group = all(&[
    shifted("input_layernorm", "attn_norm", &[Width]),
    shifted("post_attention_layernorm", "post_attention_norm", &[Width]),
    shifted("pre_feedforward_layernorm", "ffn_norm", &[Width]),
    shifted("post_feedforward_layernorm", "post_ffw_norm", &[Width]),
]);
pub(super) const POST_ATTENTION_NORMS: Group =
    all(&[ATTN_NORM, role("post_attention_layernorm", "post_attention_norm", &[Width])]);
pub(super) const INTERNLM_NORMS: Group =
    all(&[role("attention_norm", "attn_norm", &[Width]), role("ffn_norm", "ffn_norm", &[Width])]);

// Attention.
pub(super) const ATTENTION: Group = on(&[Attention], &[Q_PROJ, K_PROJ, V_PROJ, O_PROJ]);
pub(super) const NEIGHBOURS_ATTENTION: Group =
    on(&[Attention], &[ordered(Order::Neighbours, Q_PROJ), ordered(Order::Neighbours, K_PROJ), V_PROJ, O_PROJ]);
pub(super) const FUSED_ATTENTION: Group =
    on(&[Attention], &[linear("self_attn.qkv_proj", "attn_qkv", &[Fused, Width]), O_PROJ]);
const QKV: &[Dim] = &[Queries, Keys, Values];
const ERNIE_QKV: &str = "self_attn.qkv_proj.weight";
/// Queries, keys and values in one tensor, or each in its own.
pub(super) const ERNIE_ATTENTION: [Group; 2] = [
    on(&[NotStored(ERNIE_QKV)], &[Q_PROJ, K_PROJ, V_PROJ, O_PROJ]),
    on(
        &[Stored(ERNIE_QKV)],
        &[
            cut(role("self_attn.qkv_proj", "attn_q", &[Queries, Width]), QKV, 0, 1),
            cut(role("self_attn.qkv_proj", "attn_k", &[Keys, Width]), QKV, 1, 2),
            cut(role("self_attn.qkv_proj", "attn_v", &[Values, Width]), QKV, 2, 3),
            O_PROJ,
        ],
    ),
];
pub(super) const INTERNLM_ATTENTION: Group = all(&[
    ordered(
        Order::Neighbours,
        grouped(cut(role("attention.wqkv", "attn_q", &[Queries, Width]), QKV, 0, 1), Groups::KeyHeads),
    ),
    ordered(
        Order::Neighbours,
        grouped(cut(role("attention.wqkv", "attn_k", &[Keys, Width]), QKV, 1, 2), Groups::KeyHeads),
    ),
    grouped(cut(role("attention.wqkv", "attn_v", &[Values, Width]), QKV, 2, 3), Groups::KeyHeads),
    linear("attention.wo", "attn_output", &[Width, Outputs]),
]);
pub(super) const HEAD_NORMS: Group = on(
    &[Attention],
    &[role("self_attn.q_norm", "attn_q_norm", &[Head]), role("self_attn.k_norm", "attn_k_norm", &[Head])],
);
pub(super) const SHIFTED_HEAD_NORMS: Group = on(
    &[Attention],
    &[shifted("self_attn.q_norm", "attn_q_norm", &[Head]), shifted("self_attn.k_norm", "attn_k_norm", &[Head])],
);
/// Norms over all heads together.
pub(super) const WHOLE_NORMS: Group =
    all(&[role("self_attn.q_norm", "attn_q_norm", &[Queries]), role("self_attn.k_norm", "attn_k_norm", &[Keys])]);
pub(super) const SINKS: Group = all(&[bare("self_attn.sinks", "attn_sinks", ".weight", &[Heads])]);

// Dense feed-forward networks.
const MLP: &[Role] = &[
    linear("mlp.gate_proj", "ffn_gate", &[FeedForward, Width]),
    linear("mlp.up_proj", "ffn_up", &[FeedForward, Width]),
    linear("mlp.down_proj", "ffn_down", &[Width, FeedForward]),
];
pub(super) const DENSE: Group = on(&[Dense], MLP);
pub(super) const FUSED_DENSE: Group = on(
    &[Dense],
    &[role("mlp.gate_up_proj", "ffn_up", &[GateUp, Width]), role("mlp.down_proj", "ffn_down", &[Width, FeedForward])],
);
const ERNIE_UP: &str = "mlp.up_gate_proj.weight";
const GATE_AND_UP: &[Dim] = &[FeedForward, FeedForward];
/// Gate and up in one tensor, or each in its own.
pub(super) const ERNIE_DENSE: [Group; 2] = [
    on(&[Dense, NotStored(ERNIE_UP)], MLP),
    on(
        &[Dense, Stored(ERNIE_UP)],
        &[
            cut(role("mlp.up_gate_proj", "ffn_gate", &[FeedForward, Width]), GATE_AND_UP, 0, 1),
            cut(role("mlp.up_gate_proj", "ffn_up", &[FeedForward, Width]), GATE_AND_UP, 1, 2),
            role("mlp.down_proj", "ffn_down", &[Width, FeedForward]),
        ],
    ),
];
pub(super) const INTERNLM_DENSE: Group = all(&[
    role("feed_forward.w1", "ffn_gate", &[FeedForward, Width]),
    role("feed_forward.w3", "ffn_up", &[FeedForward, Width]),
    role("feed_forward.w2", "ffn_down", &[Width, FeedForward]),
]);

// Routers and shared experts.
pub(super) const ROUTER: Group = on(&[WithExperts], &[role("mlp.gate", "ffn_gate_inp", &[Experts, Width])]);
pub(super) const MIXTRAL_ROUTER: Group =
    on(&[WithExperts], &[role("block_sparse_moe.gate", "ffn_gate_inp", &[Experts, Width])]);
pub(super) const GPT_OSS_ROUTER: Group = all(&[linear("mlp.router", "ffn_gate_inp", &[Experts, Width])]);
pub(super) const GRANITE_ROUTER: Group =
    on(&[WithExperts], &[role("block_sparse_moe.router.layer", "ffn_gate_inp", &[Experts, Width])]);
/// What is added to the scores for the choice of experts.
pub(super) const SELECTION_BIAS: Group =
    on(&[WithExperts], &[bare("mlp.gate.e_score_correction_bias", "exp_probs_b", ".bias", &[Experts])]);
pub(super) const MINIMAX_SELECTION_BIAS: Group =
    on(&[WithExperts], &[bare("block_sparse_moe.e_score_correction_bias", "exp_probs_b", ".bias", &[Experts])]);
pub(super) const ERNIE_SELECTION_BIAS: Group = on(
    &[WithExperts],
    &[optional(bare("mlp.moe_statics.e_score_correction_bias", "exp_probs_b", ".bias", &[One, Experts]))],
);
const GATED_SHARED: &[Role] = &[
    role("mlp.shared_expert.gate_proj", "ffn_gate_shexp", &[SharedWidth, Width]),
    role("mlp.shared_expert.up_proj", "ffn_up_shexp", &[SharedWidth, Width]),
    role("mlp.shared_expert.down_proj", "ffn_down_shexp", &[Width, SharedWidth]),
    role("mlp.shared_expert_gate", "ffn_gate_inp_shexp", &[One, Width]),
];
/// One with a gate of its own.
pub(super) const GATED_SHARED_EXPERT: Group = on(&[WithExperts], GATED_SHARED);
/// Some that are one network of their common width.
pub(super) const SHARED_EXPERTS: Group = on(
    &[WithExperts, Shared],
    &[
        role("mlp.shared_experts.gate_proj", "ffn_gate_shexp", &[SharedWidth, Width]),
        role("mlp.shared_experts.up_proj", "ffn_up_shexp", &[SharedWidth, Width]),
        role("mlp.shared_experts.down_proj", "ffn_down_shexp", &[Width, SharedWidth]),
    ],
);
const GRANITE_GATE_AND_UP: &[Dim] = &[SharedWidth, SharedWidth];
/// Granite's, with gate and up in one tensor.
pub(super) const GRANITE_SHARED: Group = on(
    &[WithExperts, Shared],
    &[
        cut(role("shared_mlp.input_linear", "ffn_gate_shexp", &[SharedWidth, Width]), GRANITE_GATE_AND_UP, 0, 1),
        cut(role("shared_mlp.input_linear", "ffn_up_shexp", &[SharedWidth, Width]), GRANITE_GATE_AND_UP, 1, 2),
        role("shared_mlp.output_linear", "ffn_down_shexp", &[Width, SharedWidth]),
    ],
);

// Experts.
pub(super) const QWEN_EXPERTS: ExpertNames = ExpertNames {
    prefix: "mlp.experts.",
    gate_up_down: ["gate_proj", "up_proj", "down_proj"],
    stacked: ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    switched: "mlp.switch_mlp.",
    width: "moe_intermediate_size",
    interleaved: false,
    transposed: false,
    kept_fused: false,
};
pub(super) const MIXTRAL_EXPERTS: ExpertNames = ExpertNames {
    prefix: "block_sparse_moe.experts.",
    gate_up_down: ["w1", "w3", "w2"],
    stacked: ["block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"],
    switched: "block_sparse_moe.switch_mlp.",
    width: "intermediate_size",
    ..QWEN_EXPERTS
};
pub(super) const GPT_OSS_EXPERTS: ExpertNames =
    ExpertNames { width: "intermediate_size", interleaved: true, transposed: true, ..QWEN_EXPERTS };
pub(super) const QWEN_VL_EXPERTS: ExpertNames = ExpertNames { transposed: true, ..QWEN_EXPERTS };
/// As wide as a dense layer, or as the class's layout says.
pub(super) const PLAIN_WIDTH_EXPERTS: ExpertNames = ExpertNames { width: "intermediate_size", ..QWEN_EXPERTS };
pub(super) const GRANITE_EXPERTS: ExpertNames = ExpertNames {
    prefix: "",
    stacked: ["block_sparse_moe.input_linear", "block_sparse_moe.output_linear"],
    ..MIXTRAL_EXPERTS
};

// Delta nets beside gated attention (Qwen3-Next, Qwen3.5).
const LINEAR_STACK: &[Dim] = &[LinearKeys, LinearKeys, LinearValues];
const GATED_STACK: &[Dim] = &[LinearKeys, LinearKeys, LinearValues, LinearValues];
const CONVOLUTION: Role =
    Role { squeezed: true, ..role("linear_attn.conv1d", "ssm_conv1d", &[LinearFused, One, Kernel]) };
const DECAY: Role = Role { change: Change::MinusExp, ..bare("linear_attn.A_log", "ssm_a", "", &[LinearHeads]) };
const TIME_STEP: Role = bare("linear_attn.dt_bias", "ssm_dt", ".bias", &[LinearHeads]);
const DELTA_NORM: Role = role("linear_attn.norm", "ssm_norm", &[LinearHead]);
const DELTA_OUT: Role = role("linear_attn.out_proj", "ssm_out", &[Width, LinearValues]);
/// Qwen3.5's: one tensor for each projection; value heads of all key heads take turns.
pub(super) const DELTA_NET: Group = on(
    &[Recurrent],
    &[
        ordered(
            Order::Turns,
            cut(role("linear_attn.in_proj_qkv", "attn_qkv", &[LinearFused, Width]), LINEAR_STACK, 0, 3),
        ),
        ordered(Order::Turns, role("linear_attn.in_proj_z", "attn_gate", &[LinearValues, Width])),
        ordered(Order::Turns, role("linear_attn.in_proj_b", "ssm_beta", &[LinearHeads, Width])),
        ordered(Order::Turns, role("linear_attn.in_proj_a", "ssm_alpha", &[LinearHeads, Width])),
        ordered(Order::Turns, cut(CONVOLUTION, LINEAR_STACK, 0, 3)),
        ordered(Order::Turns, DECAY),
        ordered(Order::Turns, TIME_STEP),
        DELTA_NORM,
        ordered(Order::TurnsOfColumns, DELTA_OUT),
    ],
);
/// Qwen3-Next's: projections of a key head stand together.
pub(super) const GROUPED_DELTA_NET: Group = on(
    &[Recurrent],
    &[
        grouped(
            cut(role("linear_attn.in_proj_qkvz", "attn_qkv", &[LinearFused, Width]), GATED_STACK, 0, 3),
            Groups::LinearKeyHeads,
        ),
        grouped(
            cut(role("linear_attn.in_proj_qkvz", "attn_gate", &[LinearValues, Width]), GATED_STACK, 3, 4),
            Groups::LinearKeyHeads,
        ),
        role("linear_attn.in_proj_ba", "ssm_ba", &[DoubleLinearHeads, Width]),
        CONVOLUTION,
        DECAY,
        TIME_STEP,
        DELTA_NORM,
        DELTA_OUT,
    ],
);
/// Attention whose queries come with a gate each.
pub(super) const GATED_ATTENTION: Group =
    on(&[Attention], &[linear("self_attn.q_proj", "attn_q", &[DoubleQueries, Width]), K_PROJ, V_PROJ, O_PROJ]);
pub(super) const SHIFTED_POST_ATTENTION_NORMS: Group = all(&[
    shifted("input_layernorm", "attn_norm", &[Width]),
    shifted("post_attention_layernorm", "post_attention_norm", &[Width]),
]);

// Blocks that predict further tokens.
const EH_PROJ: Role = role("eh_proj", "nextn.eh_proj", &[Width, DoubleWidth]);
const NEXTN_EMBEDDING: Role = optional(role("embed_tokens", "nextn.embed_tokens", &[Vocabulary, Width]));
const NEXTN_HEAD: Role = optional(role("shared_head.head", "nextn.shared_head_head", &[Vocabulary, Width]));
pub(super) const NEXTN: Group = on(
    &[NextN],
    &[
        EH_PROJ,
        role("enorm", "nextn.enorm", &[Width]),
        role("hnorm", "nextn.hnorm", &[Width]),
        NEXTN_EMBEDDING,
        optional(role("shared_head.norm", "nextn.shared_head_norm", &[Width])),
        NEXTN_HEAD,
    ],
);
pub(super) const SHIFTED_NEXTN: Group = on(
    &[NextN],
    &[
        EH_PROJ,
        shifted("enorm", "nextn.enorm", &[Width]),
        shifted("hnorm", "nextn.hnorm", &[Width]),
        NEXTN_EMBEDDING,
        optional(shifted("shared_head.norm", "nextn.shared_head_norm", &[Width])),
        NEXTN_HEAD,
    ],
);
/// A norm behind a block of further tokens.
pub(super) const NEXTN_OUT_NORM: Group =
    on(&[NextN], &[optional(role("final_layernorm", "layer_output_norm", &[Width]))]);

// Gemma 4.
pub(super) const GEMMA4_NORMS: Group = all(&[
    ATTN_NORM,
    role("post_attention_layernorm", "post_attention_norm", &[Width]),
    role("pre_feedforward_layernorm", "ffn_norm", &[Width]),
    role("post_feedforward_layernorm", "post_ffw_norm", &[Width]),
    bare("layer_scalar", "layer_output_scale", ".weight", &[One]),
]);
/// Keys and values may be those of an earlier layer, and values may be the keys; what is stored is carried all the same.
pub(super) const GEMMA4_ATTENTION: [Group; 4] = [
    all(&[Q_PROJ, O_PROJ, role("self_attn.q_norm", "attn_q_norm", &[Head])]),
    on(&[OwnKeys], &[K_PROJ, role("self_attn.k_norm", "attn_k_norm", &[Head])]),
    on(&[OwnKeys, OwnValues], &[V_PROJ]),
    on(
        &[SharedKeys],
        &[optional(K_PROJ), optional(V_PROJ), optional(role("self_attn.k_norm", "attn_k_norm", &[Head]))],
    ),
];
/// A dense network in each layer, and experts beside it.
pub(super) const GEMMA4_FEED_FORWARD: [Group; 2] = [
    all(MLP),
    on(
        &[WithExperts],
        &[
            role("post_feedforward_layernorm_1", "post_ffw_norm_1", &[Width]),
            role("post_feedforward_layernorm_2", "post_ffw_norm_2", &[Width]),
            role("pre_feedforward_layernorm_2", "pre_ffw_norm_2", &[Width]),
            role("router.proj", "ffn_gate_inp", &[Experts, Width]),
            bare("router.scale", "ffn_gate_inp", ".scale", &[Width]),
            bare("router.per_expert_scale", "ffn_down_exps", ".scale", &[Experts]),
        ],
    ),
];
pub(super) const PER_LAYER_INPUTS: Group = on(
    &[When::PerLayer],
    &[
        role("per_layer_input_gate", "inp_gate", &[PerLayer, Width]),
        role("per_layer_projection", "proj", &[Width, PerLayer]),
        role("post_per_layer_input_norm", "post_norm", &[Width]),
    ],
);
pub(super) const PER_LAYER_ENDS: Group = on(
    &[When::PerLayer],
    &[
        role("embed_tokens_per_layer", "per_layer_token_embd", &[PerLayerVocabulary, AllPerLayer]),
        role("per_layer_model_projection", "per_layer_model_proj", &[AllPerLayer, Width]),
        role("per_layer_projection_norm", "per_layer_proj_norm", &[PerLayer]),
    ],
);
pub(super) const GEMMA4_EXPERTS: ExpertNames = ExpertNames {
    prefix: "",
    stacked: ["experts.gate_up_proj", "experts.down_proj"],
    kept_fused: true,
    ..QWEN_EXPERTS
};

// GLM.
pub(super) const GLM4_NORMS: Group = all(&[
    ATTN_NORM,
    role("post_self_attn_layernorm", "post_attention_norm", &[Width]),
    role("post_attention_layernorm", "ffn_norm", &[Width]),
    role("post_mlp_layernorm", "post_ffw_norm", &[Width]),
]);
pub(super) const OPTIONAL_HEAD_NORMS: Group = on(
    &[When::Flag("use_qk_norm")],
    &[role("self_attn.q_norm", "attn_q_norm", &[Head]), role("self_attn.k_norm", "attn_k_norm", &[Head])],
);

// OLMo 2 and EXAONE 4: norms behind attention and behind the feed-forward network only.
pub(super) const POST_NORMS: Group = all(&[
    role("post_attention_layernorm", "post_attention_norm", &[Width]),
    role("post_feedforward_layernorm", "post_ffw_norm", &[Width]),
]);

// Bailing.
pub(super) const BAILING_ATTENTION: Group = all(&[
    linear("attention.query_key_value", "attn_qkv", &[Fused, Width]),
    linear("attention.dense", "attn_output", &[Width, Outputs]),
    role("attention.query_layernorm", "attn_q_norm", &[Head]),
    role("attention.key_layernorm", "attn_k_norm", &[Head]),
]);
pub(super) const BAILING_SELECTION_BIAS: Group =
    on(&[WithExperts], &[optional(bare("mlp.gate.expert_bias", "exp_probs_b", ".bias", &[Experts]))]);

// EXAONE-MoE.
pub(super) const EXAONE_SELECTION_BIAS: [Group; 2] = [
    on(
        &[WithExperts, NotStored("mlp.gate.e_score_correction_bias")],
        &[bare("mlp.e_score_correction_bias", "exp_probs_b", ".bias", &[Experts])],
    ),
    on(
        &[WithExperts, Stored("mlp.gate.e_score_correction_bias")],
        &[bare("mlp.gate.e_score_correction_bias", "exp_probs_b", ".bias", &[Experts])],
    ),
];

// Hunyuan.
pub(super) const HUNYUAN_HEAD_NORMS: Group = all(&[
    role("self_attn.query_layernorm", "attn_q_norm", &[Head]),
    role("self_attn.key_layernorm", "attn_k_norm", &[Head]),
]);
pub(super) const HUNYUAN_ROUTER: Group = on(&[WithExperts], &[role("mlp.gate.wg", "ffn_gate_inp", &[Experts, Width])]);
pub(super) const HUNYUAN_SHARED: Group = on(
    &[WithExperts, Shared],
    &[
        role("mlp.shared_mlp.gate_proj", "ffn_gate_shexp", &[SharedWidth, Width]),
        role("mlp.shared_mlp.up_proj", "ffn_up_shexp", &[SharedWidth, Width]),
        role("mlp.shared_mlp.down_proj", "ffn_down_shexp", &[Width, SharedWidth]),
    ],
);

// Afmoe.
pub(super) const AFMOE_NORMS: Group = all(&[
    ATTN_NORM,
    role("post_attention_layernorm", "post_attention_norm", &[Width]),
    role("pre_mlp_layernorm", "ffn_norm", &[Width]),
    role("post_mlp_layernorm", "post_ffw_norm", &[Width]),
]);
pub(super) const AFMOE_GATE: Group = all(&[role("self_attn.gate_proj", "attn_gate", &[Outputs, Width])]);
pub(super) const AFMOE_ROUTER: Group = on(
    &[WithExperts],
    &[
        role("mlp.router.gate", "ffn_gate_inp", &[Experts, Width]),
        bare("mlp.expert_bias", "exp_probs_b", ".bias", &[Experts]),
    ],
);

// Step 3.5.
pub(super) const STEP_GATE: Group = all(&[optional(role("self_attn.g_proj", "attn_gate", &[Heads, Width]))]);
pub(super) const STEP_ROUTER: Group = on(
    &[WithExperts],
    &[
        role("moe.gate", "ffn_gate_inp", &[Experts, Width]),
        optional(bare("moe.router_bias", "exp_probs_b", ".bias", &[Experts])),
        role("share_expert.gate_proj", "ffn_gate_shexp", &[SharedWidth, Width]),
        role("share_expert.up_proj", "ffn_up_shexp", &[SharedWidth, Width]),
        role("share_expert.down_proj", "ffn_down_shexp", &[Width, SharedWidth]),
    ],
);
pub(super) const STEP_EXPERTS: ExpertNames = ExpertNames {
    prefix: "moe.experts.",
    stacked: ["moe.gate_up_proj", "moe.gate_up_down_proj"],
    switched: "moe.",
    ..QWEN_EXPERTS
};

// MiMo 2.
const MIMO_QKV: &str = "self_attn.qkv_proj.weight";
pub(super) const MIMO_ATTENTION: [Group; 3] = [
    on(&[NotStored(MIMO_QKV)], &[Q_PROJ, K_PROJ, V_PROJ, O_PROJ]),
    on(
        &[Stored(MIMO_QKV)],
        &[Role { plain: true, ..linear("self_attn.qkv_proj", "attn_qkv", &[Fused, Width]) }, O_PROJ],
    ),
    all(&[optional(bare("self_attn.attention_sink_bias", "attn_sinks", ".weight", &[Heads]))]),
];
pub(super) const MIMO_NORMS: [Group; 3] = [
    all(&[ATTN_NORM]),
    on(&[NotStored("pre_mlp_layernorm.weight")], &[role("post_attention_layernorm", "ffn_norm", &[Width])]),
    on(&[Stored("pre_mlp_layernorm.weight")], &[role("pre_mlp_layernorm", "ffn_norm", &[Width])]),
];

// Llama 4.
pub(super) const LLAMA4_DENSE: Group = on(
    &[Dense],
    &[
        role("feed_forward.gate_proj", "ffn_gate", &[FeedForward, Width]),
        role("feed_forward.up_proj", "ffn_up", &[FeedForward, Width]),
        role("feed_forward.down_proj", "ffn_down", &[Width, FeedForward]),
    ],
);
pub(super) const LLAMA4_ROUTER: Group = on(
    &[WithExperts],
    &[
        role("feed_forward.router", "ffn_gate_inp", &[Experts, Width]),
        role("feed_forward.shared_expert.gate_proj", "ffn_gate_shexp", &[SharedWidth, Width]),
        role("feed_forward.shared_expert.up_proj", "ffn_up_shexp", &[SharedWidth, Width]),
        role("feed_forward.shared_expert.down_proj", "ffn_down_shexp", &[Width, SharedWidth]),
    ],
);
pub(super) const LLAMA4_EXPERTS: ExpertNames = ExpertNames {
    prefix: "feed_forward.experts.",
    stacked: ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"],
    switched: "feed_forward.switch_mlp.",
    width: "intermediate_size_moe",
    transposed: true,
    ..QWEN_EXPERTS
};
