//! One row an architecture.

use super::*;

const ROPE: Rope = Rope {
    pairs: RopePairs::Halves,
    sections: Sections::None,
    free: RopeFree::None,
    factors: RopeFactors::None,
    half_where_seeing_all: false,
    yarn_keys: false,
    base_by_alpha: false,
};
const ADJACENT: Rope = Rope { pairs: RopePairs::Adjacent, ..ROPE };
const ADJACENT_WITH_FACTORS: Rope = Rope { factors: RopeFactors::All, ..ADJACENT };
const WITH_FACTORS: Rope = Rope { factors: RopeFactors::All, ..ROPE };
const INTERLEAVED: Rope = Rope { sections: Sections::Interleaved, ..ROPE };

const NORMS: Norms = Norms { before: true, after: false, feed_forward: "ffn_norm" };
/// The norm before the feed-forward network is named as the norm after attention elsewhere.
const LATE_NAME: Norms = Norms { feed_forward: "post_attention_norm", ..NORMS };
const ON_BOTH_SIDES: Norms = Norms { after: true, ..NORMS };
const AFTER_ONLY: Norms = Norms { before: false, ..ON_BOTH_SIDES };

const ATTENTION: Attention = Attention {
    qk_norm: QkNorm::None,
    values_normed: false,
    values_may_be_keys: false,
    own_value_size: false,
    shares_keys: false,
    own_windowed_size: false,
    gate: AttentionGate::None,
    temperature: Temperature::None,
    score_scale: ScoreScale::HeadSize,
    score_cap: None,
    sinks: Sinks::None,
    sliding: None,
};
const HEADS_NORMED: Attention = Attention { qk_norm: QkNorm::Head, ..ATTENTION };
const WHOLE_NORMED: Attention = Attention { qk_norm: QkNorm::Whole, ..ATTENTION };
const GATED_WITHIN: Attention = Attention { gate: AttentionGate::WithinQueries, ..HEADS_NORMED };

const SLIDING: Sliding = Sliding {
    size: WindowSize::Optional,
    period: Some(4),
    chunked: false,
    only_with_layers: None,
    rope: WindowedRope::OwnBase,
};

/// A list says which layers have a window; these do not scale positions.
const SLIDING_BY_LIST: Sliding =
    Sliding { size: WindowSize::Required, period: None, rope: WindowedRope::Unscaled(10_000.0), ..SLIDING };

const DENSE: FeedForward = FeedForward {
    activation: Activation::Silu,
    fused_gate_up: false,
    mixture: Mixture::None,
    fused_experts: false,
    shared: SharedExpert::None,
    routing_keys: RoutingKeys { function: false, norm: false, scale: false },
    selection_bias: false,
    weighs_inputs: false,
    dense_layers: DenseLayers::None,
    beside_dense: false,
    own_expert_width: true,
    clamped: false,
};
const GELU: FeedForward = FeedForward { activation: Activation::Gelu, ..DENSE };
const FUSED: FeedForward = FeedForward { fused_gate_up: true, ..DENSE };
const EXPERTS: FeedForward = FeedForward { mixture: Mixture::Always(Gating::SoftmaxNormalized), ..DENSE };
/// Experts as wide as dense layers would be, in the models that have some.
const SOME_EXPERTS: FeedForward =
    FeedForward { mixture: Mixture::Optional(Gating::SoftmaxNormalized), own_expert_width: false, ..DENSE };
/// Softmax, one gated expert for all.
const SHARED_GATED: FeedForward = FeedForward { shared: SharedExpert::Gated, fused_experts: true, ..EXPERTS };
/// What DeepSeek-V3 began: sigmoid with a bias for the choice, first layers dense, everything said by keys.
const BIASED_SIGMOID: FeedForward = FeedForward {
    mixture: Mixture::Always(Gating::Sigmoid),
    routing_keys: ALL_ROUTING_KEYS,
    selection_bias: true,
    shared: SharedExpert::Counted,
    dense_layers: DenseLayers::ByKeys,
    ..DENSE
};

const SCALE_ONLY: RoutingKeys = RoutingKeys { function: false, norm: false, scale: true };
const ALL_ROUTING_KEYS: RoutingKeys = RoutingKeys { function: true, norm: true, scale: true };

const PLAIN: Architecture = Architecture {
    name: "",
    covers: "",
    rope: ROPE,
    norms: NORMS,
    attention: ATTENTION,
    delta_net: None,
    feed_forward: DENSE,
    layer_inputs: false,
    next_tokens: false,
    multipliers: Multipliers::None,
    logit_cap: None,
    output: OutputMatrix::OwnOrTied,
};

/// Three layers of four have a delta net, the fourth gated attention.
const HYBRID: Architecture = Architecture {
    rope: INTERLEAVED,
    norms: LATE_NAME,
    attention: GATED_WITHIN,
    delta_net: Some(DeltaNet { heads: ValueHeads::Tiled, fused_gates: false }),
    next_tokens: true,
    ..PLAIN
};

/// Every supported architecture.
pub(crate) const ARCHITECTURES: &[Architecture] = &[
    Architecture {
        name: "llama",
        covers: "Llama 1-3, Mistral, Mixtral, SmolLM, TinyLlama, DeepSeek-R1-Distill-Llama",
        rope: ADJACENT_WITH_FACTORS,
        feed_forward: SOME_EXPERTS,
        ..PLAIN
    },
    Architecture {
        name: "llama4",
        covers: "Llama 4",
        rope: Rope { free: RopeFree::Every(4), ..ADJACENT_WITH_FACTORS },
        attention: Attention {
            qk_norm: QkNorm::Unweighted,
            temperature: Temperature::RopeFree { scale: 0.1, length: 8192.0, offset: 1.0 },
            sliding: Some(Sliding { size: WindowSize::Fixed(8192), chunked: true, ..SLIDING }),
            ..ATTENTION
        },
        feed_forward: FeedForward {
            mixture: Mixture::Always(Gating::Sigmoid),
            shared: SharedExpert::AsExpert,
            weighs_inputs: true,
            dense_layers: DenseLayers::ByKeys,
            ..DENSE
        },
        ..PLAIN
    },
    Architecture {
        name: "mistral3",
        covers: "Ministral 3, Mistral Small 3.2 and later, Devstral 2",
        rope: Rope { yarn_keys: true, ..ADJACENT_WITH_FACTORS },
        attention: Attention { temperature: Temperature::ByKey, ..ATTENTION },
        feed_forward: SOME_EXPERTS,
        ..PLAIN
    },
    Architecture { name: "qwen2", covers: "Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen", ..PLAIN },
    Architecture {
        name: "qwen2vl",
        covers: "text part of Qwen2-VL, Qwen2.5-VL",
        rope: Rope { sections: Sections::Consecutive, ..ROPE },
        ..PLAIN
    },
    Architecture {
        name: "qwen2moe",
        covers: "Qwen1.5-MoE, Qwen2-MoE",
        feed_forward: FeedForward { mixture: Mixture::Always(Gating::Softmax), shared: SharedExpert::Gated, ..DENSE },
        output: OutputMatrix::Own,
        ..PLAIN
    },
    Architecture { name: "qwen3", covers: "Qwen3", attention: HEADS_NORMED, ..PLAIN },
    Architecture {
        name: "qwen3vl",
        covers: "text part of Qwen3-VL",
        rope: INTERLEAVED,
        attention: HEADS_NORMED,
        ..PLAIN
    },
    Architecture { name: "qwen3moe", covers: "Qwen3-MoE", attention: HEADS_NORMED, feed_forward: EXPERTS, ..PLAIN },
    Architecture {
        name: "qwen3vlmoe",
        covers: "text part of Qwen3-VL-MoE",
        rope: INTERLEAVED,
        attention: HEADS_NORMED,
        feed_forward: EXPERTS,
        ..PLAIN
    },
    Architecture {
        name: "qwen3next",
        covers: "Qwen3-Next, Qwen3-Coder-Next",
        rope: ROPE,
        delta_net: Some(DeltaNet { heads: ValueHeads::Grouped, fused_gates: true }),
        feed_forward: SHARED_GATED,
        ..HYBRID
    },
    Architecture { name: "qwen35", covers: "dense Qwen3.5, 3.6 and 3.8", ..HYBRID },
    Architecture {
        name: "qwen35moe",
        covers: "mixtures of experts of Qwen3.5, 3.6",
        feed_forward: SHARED_GATED,
        ..HYBRID
    },
    Architecture {
        name: "gemma",
        covers: "Gemma 1",
        feed_forward: GELU,
        multipliers: Multipliers::RootOfWidth,
        output: OutputMatrix::Tied,
        ..PLAIN
    },
    Architecture {
        name: "gemma2",
        covers: "Gemma 2",
        norms: ON_BOTH_SIDES,
        attention: Attention {
            score_scale: ScoreScale::HeadSizeExceptAt(46),
            score_cap: Some(50.0),
            sliding: Some(Sliding { size: WindowSize::Or(4096), period: Some(2), ..SLIDING }),
            ..ATTENTION
        },
        feed_forward: GELU,
        multipliers: Multipliers::RootOfWidth,
        logit_cap: Some(30.0),
        output: OutputMatrix::Tied,
        ..PLAIN
    },
    Architecture {
        name: "gemma3",
        covers: "Gemma 3",
        norms: ON_BOTH_SIDES,
        attention: Attention {
            score_scale: ScoreScale::HeadSizeExceptAt(62),
            sliding: Some(Sliding { period: Some(6), rope: WindowedRope::Unscaled(10_000.0), ..SLIDING }),
            ..HEADS_NORMED
        },
        feed_forward: GELU,
        multipliers: Multipliers::RootOfWidth,
        logit_cap: Some(0.0),
        ..PLAIN
    },
    Architecture {
        name: "gemma4",
        covers: "Gemma 4: E2B, E4B, 12B, 26B-A4B, 31B",
        rope: Rope { factors: RopeFactors::SeeingAll, ..ROPE },
        norms: ON_BOTH_SIDES,
        attention: Attention {
            values_normed: true,
            values_may_be_keys: true,
            shares_keys: true,
            own_windowed_size: true,
            score_scale: ScoreScale::One,
            sliding: Some(SLIDING_BY_LIST),
            ..HEADS_NORMED
        },
        feed_forward: FeedForward {
            mixture: Mixture::Optional(Gating::SoftmaxNormalized),
            fused_experts: true,
            beside_dense: true,
            dense_layers: DenseLayers::WithoutRouter,
            ..GELU
        },
        layer_inputs: true,
        multipliers: Multipliers::RootOfWidth,
        logit_cap: Some(30.0),
        ..PLAIN
    },
    Architecture { name: "phi3", covers: "Phi-3, Phi-4", rope: WITH_FACTORS, feed_forward: FUSED, ..PLAIN },
    Architecture {
        name: "gpt-oss",
        covers: "gpt-oss",
        norms: LATE_NAME,
        attention: Attention {
            sinks: Sinks::All,
            sliding: Some(Sliding { size: WindowSize::Required, period: Some(2), ..SLIDING }),
            ..ATTENTION
        },
        feed_forward: FeedForward {
            activation: Activation::SwigluOai,
            mixture: Mixture::Always(Gating::SoftmaxOfChosen),
            ..DENSE
        },
        output: OutputMatrix::Own,
        ..PLAIN
    },
    Architecture { name: "smollm3", covers: "SmolLM3", rope: Rope { free: RopeFree::Every(4), ..ADJACENT }, ..PLAIN },
    Architecture {
        name: "granite",
        covers: "Granite 3, dense Granite 4",
        rope: ADJACENT_WITH_FACTORS,
        multipliers: Multipliers::ByKeys,
        ..PLAIN
    },
    Architecture {
        name: "granitemoe",
        covers: "Granite 3 mixtures of experts",
        rope: ADJACENT_WITH_FACTORS,
        feed_forward: FeedForward { shared: SharedExpert::Wide, routing_keys: SCALE_ONLY, ..SOME_EXPERTS },
        multipliers: Multipliers::ByKeys,
        ..PLAIN
    },
    Architecture {
        name: "minicpm",
        covers: "MiniCPM 1, 2 and 4",
        rope: ADJACENT_WITH_FACTORS,
        feed_forward: FeedForward { shared: SharedExpert::Wide, ..SOME_EXPERTS },
        multipliers: Multipliers::MiniCpm,
        ..PLAIN
    },
    Architecture {
        name: "dots1",
        covers: "dots.llm1",
        attention: HEADS_NORMED,
        feed_forward: FeedForward { mixture: Mixture::Always(Gating::Softmax), ..BIASED_SIGMOID },
        output: OutputMatrix::Own,
        ..PLAIN
    },
    Architecture { name: "ernie4_5", covers: "dense ERNIE 4.5", rope: ADJACENT, ..PLAIN },
    Architecture {
        name: "ernie4_5-moe",
        covers: "ERNIE 4.5 mixtures of experts",
        rope: ADJACENT,
        feed_forward: FeedForward {
            mixture: Mixture::Always(Gating::SoftmaxNormalized),
            routing_keys: SCALE_ONLY,
            shared: SharedExpert::Wide,
            ..BIASED_SIGMOID
        },
        ..PLAIN
    },
    Architecture {
        name: "olmo2",
        covers: "OLMo 2, OLMo 3",
        norms: AFTER_ONLY,
        attention: Attention { sliding: Some(Sliding { rope: WindowedRope::Plain, ..SLIDING }), ..WHOLE_NORMED },
        output: OutputMatrix::Own,
        ..PLAIN
    },
    Architecture {
        name: "olmoe",
        covers: "OLMoE",
        attention: WHOLE_NORMED,
        feed_forward: FeedForward {
            mixture: Mixture::Optional(Gating::Softmax),
            routing_keys: SCALE_ONLY,
            ..SOME_EXPERTS
        },
        output: OutputMatrix::Own,
        ..PLAIN
    },
    Architecture {
        name: "minimax-m2",
        covers: "MiniMax-M2",
        attention: WHOLE_NORMED,
        feed_forward: FeedForward {
            mixture: Mixture::Optional(Gating::SigmoidNormalized),
            routing_keys: RoutingKeys { norm: false, ..ALL_ROUTING_KEYS },
            selection_bias: true,
            ..SOME_EXPERTS
        },
        output: OutputMatrix::Own,
        ..PLAIN
    },
    Architecture { name: "seed_oss", covers: "Seed-OSS", norms: LATE_NAME, ..PLAIN },
    Architecture {
        name: "internlm2",
        covers: "InternLM2, InternLM2.5",
        rope: ADJACENT,
        output: OutputMatrix::Own,
        ..PLAIN
    },
    Architecture {
        name: "glm4",
        covers: "GLM-4-0414, GLM-Z1",
        rope: Rope { sections: Sections::IfGiven, ..ADJACENT },
        norms: ON_BOTH_SIDES,
        feed_forward: FUSED,
        next_tokens: true,
        ..PLAIN
    },
    Architecture {
        name: "glm4moe",
        covers: "GLM-4.5, 4.6, 4.7",
        rope: Rope { sections: Sections::IfGiven, ..ROPE },
        norms: LATE_NAME,
        attention: Attention { qk_norm: QkNorm::HeadIfThere, ..ATTENTION },
        feed_forward: BIASED_SIGMOID,
        next_tokens: true,
        ..PLAIN
    },
    Architecture {
        name: "bailingmoe2",
        covers: "Ling 2, Ring 2",
        attention: HEADS_NORMED,
        feed_forward: FeedForward { shared: SharedExpert::CountedWide, ..BIASED_SIGMOID },
        next_tokens: true,
        output: OutputMatrix::Own,
        ..PLAIN
    },
    Architecture {
        name: "exaone4",
        covers: "EXAONE 4.0",
        rope: Rope { free: RopeFree::SeeingAll, ..WITH_FACTORS },
        norms: AFTER_ONLY,
        attention: Attention {
            sliding: Some(Sliding {
                size: WindowSize::Or(4096),
                only_with_layers: Some(64),
                rope: WindowedRope::Same,
                ..SLIDING
            }),
            ..HEADS_NORMED
        },
        next_tokens: true,
        ..PLAIN
    },
    Architecture {
        name: "exaone-moe",
        covers: "K-EXAONE",
        rope: Rope { free: RopeFree::SeeingAll, ..WITH_FACTORS },
        attention: Attention {
            sliding: Some(Sliding { size: WindowSize::Required, rope: WindowedRope::Same, ..SLIDING }),
            ..HEADS_NORMED
        },
        feed_forward: FeedForward { shared: SharedExpert::AsExpert, ..BIASED_SIGMOID },
        next_tokens: true,
        output: OutputMatrix::Own,
        ..PLAIN
    },
    Architecture {
        name: "hunyuan-dense",
        covers: "dense Hunyuan",
        rope: Rope { base_by_alpha: true, ..WITH_FACTORS },
        attention: Attention { qk_norm: QkNorm::HeadAfterRope, ..ATTENTION },
        ..PLAIN
    },
    Architecture {
        name: "hunyuan-moe",
        covers: "Hunyuan-A13B",
        rope: WITH_FACTORS,
        attention: Attention { qk_norm: QkNorm::HeadAfterRope, ..ATTENTION },
        feed_forward: FeedForward { shared: SharedExpert::AsDense, own_expert_width: false, ..EXPERTS },
        ..PLAIN
    },
    Architecture {
        name: "afmoe",
        covers: "Trinity",
        rope: Rope { free: RopeFree::Every(4), ..ROPE },
        norms: ON_BOTH_SIDES,
        attention: Attention { gate: AttentionGate::Values, sliding: Some(SLIDING), ..HEADS_NORMED },
        feed_forward: BIASED_SIGMOID,
        multipliers: Multipliers::RootOfWidth,
        ..PLAIN
    },
    Architecture {
        name: "step35",
        covers: "Step 3.5",
        rope: Rope { factors: RopeFactors::SeeingAll, half_where_seeing_all: true, ..ROPE },
        attention: Attention {
            qk_norm: QkNorm::HeadIfThere,
            gate: AttentionGate::Heads,
            sliding: Some(SLIDING_BY_LIST),
            ..ATTENTION
        },
        feed_forward: FeedForward {
            shared: SharedExpert::Wide,
            dense_layers: DenseLayers::WithoutRouter,
            clamped: true,
            ..BIASED_SIGMOID
        },
        next_tokens: true,
        output: OutputMatrix::Own,
        ..PLAIN
    },
    Architecture {
        name: "mimo2",
        covers: "MiMo-V2",
        attention: Attention {
            own_value_size: true,
            sinks: Sinks::IfThere,
            sliding: Some(SLIDING_BY_LIST),
            ..ATTENTION
        },
        feed_forward: FeedForward {
            mixture: Mixture::Optional(Gating::SigmoidNormalized),
            selection_bias: true,
            dense_layers: DenseLayers::WithoutRouter,
            ..DENSE
        },
        next_tokens: true,
        output: OutputMatrix::Own,
        ..PLAIN
    },
];
