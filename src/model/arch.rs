//! The architectures that the forward pass knows: one row each, holding only what differs between them.
//!
//! Facts follow llama.cpp b10605 (`src/models/*.cpp`, `llama_model_rope_type`). All rows share: RMS norms before
//! attention and feed-forward, rotary positions, grouped-query attention with optional biases and optionally
//! fused `attn_qkv`, a gated feed-forward network, residual connections around both.

/// Which pairs of head values a rotary embedding turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RopePairs {
    /// Values `2i` and `2i + 1` (`LLAMA_ROPE_TYPE_NORM`).
    Adjacent,
    /// Values `i` and `i + n_rot / 2` (`LLAMA_ROPE_TYPE_NEOX`).
    Halves,
}

/// How the gate enters the product of the feed-forward network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activation {
    /// `silu(gate) * up`.
    Silu,
    /// `gelu(gate) * up`, tanh form.
    Gelu,
    /// gpt-oss: `g * sigmoid(1.702 g) * (u + 1)` with clamped `g` and `u`.
    SwigluOai,
}

/// Which layers see only a window of the last tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Sliding {
    /// All layers see everything; the metadata's window is ignored.
    None,
    /// Of every `period` layers all but the last have a window.
    Periodic {
        /// Layers per cycle when `attention.sliding_window_pattern` is absent.
        period: u64,
        /// Window when the metadata has none; `None` means that no layer has a window then.
        default_window: Option<u64>,
        /// Rope base of windowed layers when `rope.freq_base_swa` is absent: the model's own base, or this.
        default_base: Option<f32>,
    },
}

/// How the pairs of a head are dealt to positions in time, height and width. In text these are one; pairs that go to none of
/// them are not rotated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sections {
    /// There is one position.
    None,
    /// `rope.dimension_sections`, one after the other.
    Consecutive,
    /// The same numbers, in turns.
    Interleaved,
}

/// How expert weights follow from the router's outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gating {
    /// Softmax over all experts, the chosen ones taken as they are.
    Softmax,
    /// Softmax over all experts, the chosen ones scaled to sum to one.
    SoftmaxNormalized,
    /// Softmax over the chosen experts' logits only.
    SoftmaxOfChosen,
    /// Sigmoid of each logit, the chosen ones taken as they are.
    Sigmoid,
    /// Sigmoid of each logit, the chosen ones scaled to sum to one.
    SigmoidNormalized,
}

/// Whether the model has dense feed-forward layers, experts, or may have either.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FeedForward {
    /// Dense layers only.
    Dense,
    /// Experts when `expert_count` is above zero.
    DenseOrExperts(Gating),
    /// Experts always.
    Experts(Gating),
}

impl FeedForward {
    /// How expert weights follow from the router's outputs; `None` without experts.
    pub(crate) fn gating(self) -> Option<Gating> {
        match self {
            FeedForward::Dense => None,
            FeedForward::DenseOrExperts(gating) | FeedForward::Experts(gating) => Some(gating),
        }
    }
}

/// What of the routing of experts stands in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RoutingKeys {
    /// `expert_gating_func`.
    pub function: bool,
    /// `expert_weights_norm`.
    pub norm: bool,
    /// `expert_weights_scale`.
    pub scale: bool,
}

/// Experts that see every token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SharedExpert {
    /// There are none.
    None,
    /// One, with a sigmoid gate of its own.
    Gated,
    /// One of width `expert_shared_feed_forward_length`, where the file has that.
    Wide,
    /// `expert_shared_count` of them, as one network of their common width.
    Counted,
}

/// What queries and keys are normed over before the rotary embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QkNorm {
    /// They are not normed.
    None,
    /// Each head.
    Head,
    /// All heads together.
    Whole,
}

/// Scale of the attention scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ScoreScale {
    /// `1 / sqrt(head size)`.
    HeadSize,
    /// As `HeadSize`, but `1 / sqrt(n_embd / n_head)` for the model with this many layers.
    HeadSizeExceptAt(usize),
}

impl ScoreScale {
    /// True if scores of a model with `n_layer` layers are scaled by `n_embd / n_head` instead of the head size.
    pub(crate) fn is_by_embedding(self, n_layer: usize) -> bool {
        self == ScoreScale::HeadSizeExceptAt(n_layer)
    }
}

/// One architecture: `general.architecture` and everything in which it differs from the others.
#[derive(Debug)]
pub(crate) struct Architecture {
    /// Value of `general.architecture`; also the prefix of its metadata keys.
    pub name: &'static str,
    /// Models it covers, for people.
    pub covers: &'static str,
    /// Pairs of the rotary embedding.
    pub rope: RopePairs,
    /// Gate function.
    pub activation: Activation,
    /// Dense or experts.
    pub feed_forward: FeedForward,
    /// Experts beside the routed ones.
    pub shared_expert: SharedExpert,
    /// What the file says of the routing.
    pub routing_keys: RoutingKeys,
    /// `exp_probs_b` may be added to the scores for the choice of experts.
    pub selection_bias: bool,
    /// The first layers, and all but every so many, may be dense: `leading_dense_block_count`, `interleave_moe_layer_step`.
    pub dense_layers: bool,
    /// Experts have a width of their own, `expert_feed_forward_length`; otherwise they are as wide as dense layers.
    pub own_expert_width: bool,
    /// Norm of queries and keys.
    pub qk_norm: QkNorm,
    /// Norms after attention and after the feed-forward network (`post_attention_norm`, `post_ffw_norm`).
    pub post_norms: bool,
    /// Suffix of the norm before the feed-forward network.
    pub ffn_norm: &'static str,
    /// `ffn_up` holds gate and up rows in one matrix, gate first.
    pub fused_gate_up: bool,
    /// Embeddings are multiplied by `sqrt(n_embd)`.
    pub scaled_embeddings: bool,
    /// Positions of more than one kind.
    pub sections: Sections,
    /// Every so many layers, the last of them, have no rotary embedding.
    pub rope_free_every: Option<usize>,
    /// Embeddings, attention scores, what a layer adds to the residual stream, and logits are scaled by numbers of the file.
    pub multipliers: bool,
    /// Layers with a window.
    pub sliding: Sliding,
    /// Scale of attention scores.
    pub score_scale: ScoreScale,
    /// Default of `attn_logit_softcapping`; `None` when scores are never capped.
    pub score_cap: Option<f32>,
    /// Default of `final_logit_softcapping`; 0 means uncapped unless the metadata asks for it.
    pub logit_cap: Option<f32>,
    /// Every head has a learned sink logit (`attn_sinks`).
    pub sinks: bool,
    /// `rope_freqs.weight` and, for long-rope models, `rope_factors_*.weight` divide the rotary frequencies.
    pub rope_factors: bool,
    /// `output.weight` may be absent; `token_embd.weight` then serves twice.
    pub output: OutputMatrix,
}

/// Where the output matrix comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OutputMatrix {
    /// `output.weight`, or the embedding when absent.
    OwnOrTied,
    /// Always `output.weight`.
    Own,
    /// Always the embedding.
    Tied,
}

const PLAIN: Architecture = Architecture {
    name: "",
    covers: "",
    rope: RopePairs::Halves,
    activation: Activation::Silu,
    feed_forward: FeedForward::Dense,
    shared_expert: SharedExpert::None,
    routing_keys: RoutingKeys { function: false, norm: false, scale: false },
    selection_bias: false,
    dense_layers: false,
    own_expert_width: true,
    qk_norm: QkNorm::None,
    post_norms: false,
    ffn_norm: "ffn_norm",
    fused_gate_up: false,
    scaled_embeddings: false,
    sections: Sections::None,
    rope_free_every: None,
    multipliers: false,
    sliding: Sliding::None,
    score_scale: ScoreScale::HeadSize,
    score_cap: None,
    logit_cap: None,
    sinks: false,
    rope_factors: false,
    output: OutputMatrix::OwnOrTied,
};

/// Every supported architecture.
pub(crate) const ARCHITECTURES: &[Architecture] = &[
    Architecture {
        name: "llama",
        covers: "Llama 1-3, Mistral, Mixtral, SmolLM, TinyLlama, DeepSeek-R1-Distill-Llama",
        rope: RopePairs::Adjacent,
        feed_forward: FeedForward::DenseOrExperts(Gating::SoftmaxNormalized),
        own_expert_width: false,
        rope_factors: true,
        ..PLAIN
    },
    Architecture { name: "qwen2", covers: "Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen", ..PLAIN },
    Architecture {
        name: "qwen2vl",
        covers: "text part of Qwen2-VL, Qwen2.5-VL",
        sections: Sections::Consecutive,
        ..PLAIN
    },
    Architecture {
        name: "qwen2moe",
        covers: "Qwen1.5-MoE, Qwen2-MoE",
        feed_forward: FeedForward::Experts(Gating::Softmax),
        shared_expert: SharedExpert::Gated,
        output: OutputMatrix::Own,
        ..PLAIN
    },
    Architecture { name: "qwen3", covers: "Qwen3", qk_norm: QkNorm::Head, ..PLAIN },
    Architecture {
        name: "qwen3vl",
        covers: "text part of Qwen3-VL",
        qk_norm: QkNorm::Head,
        sections: Sections::Interleaved,
        ..PLAIN
    },
    Architecture {
        name: "qwen3moe",
        covers: "Qwen3-MoE",
        feed_forward: FeedForward::Experts(Gating::SoftmaxNormalized),
        qk_norm: QkNorm::Head,
        ..PLAIN
    },
    Architecture {
        name: "qwen3vlmoe",
        covers: "text part of Qwen3-VL-MoE",
        feed_forward: FeedForward::Experts(Gating::SoftmaxNormalized),
        qk_norm: QkNorm::Head,
        sections: Sections::Interleaved,
        ..PLAIN
    },
    Architecture {
        name: "gemma",
        covers: "Gemma 1",
        activation: Activation::Gelu,
        scaled_embeddings: true,
        output: OutputMatrix::Tied,
        ..PLAIN
    },
    Architecture {
        name: "gemma2",
        covers: "Gemma 2",
        activation: Activation::Gelu,
        post_norms: true,
        scaled_embeddings: true,
        sliding: Sliding::Periodic { period: 2, default_window: Some(4096), default_base: None },
        score_scale: ScoreScale::HeadSizeExceptAt(46),
        score_cap: Some(50.0),
        logit_cap: Some(30.0),
        output: OutputMatrix::Tied,
        ..PLAIN
    },
    Architecture {
        name: "gemma3",
        covers: "Gemma 3",
        activation: Activation::Gelu,
        qk_norm: QkNorm::Head,
        post_norms: true,
        scaled_embeddings: true,
        sliding: Sliding::Periodic { period: 6, default_window: None, default_base: Some(10_000.0) },
        score_scale: ScoreScale::HeadSizeExceptAt(62),
        logit_cap: Some(0.0),
        ..PLAIN
    },
    Architecture { name: "phi3", covers: "Phi-3, Phi-4", fused_gate_up: true, rope_factors: true, ..PLAIN },
    Architecture {
        name: "gpt-oss",
        covers: "gpt-oss",
        activation: Activation::SwigluOai,
        feed_forward: FeedForward::Experts(Gating::SoftmaxOfChosen),
        ffn_norm: "post_attention_norm",
        sliding: Sliding::Periodic { period: 2, default_window: None, default_base: None },
        sinks: true,
        output: OutputMatrix::Own,
        ..PLAIN
    },
    Architecture { name: "smollm3", covers: "SmolLM3", rope: RopePairs::Adjacent, rope_free_every: Some(4), ..PLAIN },
    Architecture {
        name: "granite",
        covers: "Granite 3, dense Granite 4",
        rope: RopePairs::Adjacent,
        multipliers: true,
        rope_factors: true,
        ..PLAIN
    },
    Architecture {
        name: "granitemoe",
        covers: "Granite 3 mixtures of experts",
        rope: RopePairs::Adjacent,
        feed_forward: FeedForward::DenseOrExperts(Gating::SoftmaxNormalized),
        own_expert_width: false,
        shared_expert: SharedExpert::Wide,
        routing_keys: RoutingKeys { function: false, norm: false, scale: true },
        multipliers: true,
        rope_factors: true,
        ..PLAIN
    },
    Architecture {
        name: "dots1",
        covers: "dots.llm1",
        feed_forward: FeedForward::Experts(Gating::Softmax),
        shared_expert: SharedExpert::Counted,
        routing_keys: RoutingKeys { function: true, norm: true, scale: true },
        selection_bias: true,
        dense_layers: true,
        qk_norm: QkNorm::Head,
        output: OutputMatrix::Own,
        ..PLAIN
    },
    Architecture {
        name: "ernie4_5-moe",
        covers: "ERNIE 4.5 mixtures of experts",
        rope: RopePairs::Adjacent,
        feed_forward: FeedForward::Experts(Gating::SoftmaxNormalized),
        shared_expert: SharedExpert::Wide,
        routing_keys: RoutingKeys { function: false, norm: false, scale: true },
        selection_bias: true,
        dense_layers: true,
        ..PLAIN
    },
    Architecture {
        name: "olmoe",
        covers: "OLMoE",
        feed_forward: FeedForward::DenseOrExperts(Gating::Softmax),
        own_expert_width: false,
        routing_keys: RoutingKeys { function: false, norm: false, scale: true },
        qk_norm: QkNorm::Whole,
        output: OutputMatrix::Own,
        ..PLAIN
    },
    Architecture {
        name: "minimax-m2",
        covers: "MiniMax-M2",
        feed_forward: FeedForward::DenseOrExperts(Gating::SigmoidNormalized),
        own_expert_width: false,
        routing_keys: RoutingKeys { function: true, norm: false, scale: true },
        selection_bias: true,
        qk_norm: QkNorm::Whole,
        output: OutputMatrix::Own,
        ..PLAIN
    },
    Architecture { name: "seed_oss", covers: "Seed-OSS", ffn_norm: "post_attention_norm", ..PLAIN },
    Architecture {
        name: "internlm2",
        covers: "InternLM2, InternLM2.5",
        rope: RopePairs::Adjacent,
        output: OutputMatrix::Own,
        ..PLAIN
    },
    Architecture { name: "ernie4_5", covers: "dense ERNIE 4.5", rope: RopePairs::Adjacent, ..PLAIN },
];

impl Architecture {
    /// The row of `name`.
    pub(super) fn by_name(name: &str) -> Option<&'static Architecture> {
        ARCHITECTURES.iter().find(|row| row.name == name)
    }

    /// Heads are rotated by positions of more than one kind.
    pub(crate) fn has_sections(&self) -> bool {
        self.sections != Sections::None
    }

    /// The row of `name`, for tables that are built on this one; a name that is not here does not compile there.
    pub(crate) const fn named(name: &str) -> &'static Architecture {
        let mut rows = ARCHITECTURES;
        while let [row, rest @ ..] = rows {
            if same(row.name.as_bytes(), name.as_bytes()) {
                return row;
            }
            rows = rest;
        }
        panic!("no such architecture")
    }
}

/// `==`, which constants cannot use.
const fn same(mut a: &[u8], mut b: &[u8]) -> bool {
    while let ([first, rest_a @ ..], [other, rest_b @ ..]) = (a, b) {
        if *first != *other {
            return false;
        }
        (a, b) = (rest_a, rest_b);
    }
    a.is_empty() && b.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_to_a_row_agree() {
        for row in ARCHITECTURES {
            assert_eq!(Architecture::named(row.name).name, row.name);
            assert_eq!(Architecture::by_name(row.name).map(|found| found.name), Some(row.name));
        }
    }
}
