//! The architectures that can be converted: one row each, with everything in which their folders differ.
//!
//! A row stands on the row of the forward pass's table, which says what is computed; here stands how a folder says it.
//! Class names, tensors, the vocabulary and defaults are columns, so a new architecture is a new row.
//!
//! Facts follow llama.cpp b10605 (`conversion/*.py`, `gguf-py/gguf/tensor_mapping.py`) and transformers 4.57.6.

use serde_json::{Value, json};

use super::hparams::{self, WriteKeys};
use crate::model::Architecture;

/// Which dimensions a tensor has, in the order of safetensors (rows first).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dim {
    /// `hidden_size`.
    Width,
    /// Number of query heads.
    Heads,
    /// Rows of all query heads.
    Queries,
    /// Rows of all key or value heads.
    Keys,
    /// Queries, keys and values.
    Fused,
    /// `head_dim`.
    Head,
    /// `intermediate_size`.
    FeedForward,
    /// Gate and up rows in one matrix.
    GateUp,
    /// Number of experts.
    Experts,
    /// Width of the shared expert.
    SharedWidth,
    /// 1.
    One,
}

/// What becomes of the values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// Nothing.
    Keep,
    /// Rows of query heads move from rotating halves to rotating neighbours, which GGUF's llama expects.
    PermuteQueries,
    /// The same for key heads.
    PermuteKeys,
    /// Gemma stores norms minus one.
    AddOne,
}

/// A tensor of each layer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Role {
    /// Name after `model.layers.N.`, without `.weight`.
    pub source: &'static str,
    /// Name after `blk.N.`, without `.weight`.
    pub target: &'static str,
    /// Shape of the weight.
    pub shape: &'static [Dim],
    /// What becomes of it.
    pub change: Change,
    /// A bias of as many values as the weight has rows may stand beside it.
    pub bias: bool,
    /// The source has no `.weight` behind its name.
    pub bare: bool,
}

/// How expert matrices are named.
#[derive(Debug, Clone, Copy)]
pub(super) struct ExpertNames {
    /// Before the expert's number.
    pub prefix: &'static str,
    /// Suffixes of gate, up and down.
    pub gate_up_down: [&'static str; 3],
    /// All experts of gate and up, and of down, in one tensor each; newer files have these.
    pub stacked: [&'static str; 2],
    /// All experts of gate, up and down in three tensors, as MLX has them.
    pub switched: &'static str,
    /// Configuration fields of the width of one expert; the first that is there counts.
    pub width: &'static str,
    /// gpt-oss: always in one tensor, with biases, rows of gate and up in turns.
    pub interleaved: bool,
    /// Stacked tensors have inputs as rows where they are not quantized.
    pub transposed: bool,
}

/// How the vocabulary is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum VocabularyKind {
    /// tokenizer.model, else tokenizer.json of SentencePiece form, else byte-level.
    Llama,
    /// tokenizer.model, else byte-level.
    SentencePieceOrByteLevel,
    /// Byte-level.
    ByteLevel,
    /// SentencePiece without the space before a text.
    Gemma {
        /// Ids of infill tokens, which no file names.
        infill: &'static [(&'static str, u32)],
    },
    /// Phi-3's: SentencePiece with its own rules of token types, or byte-level for Phi-4.
    Phi3,
}

/// Settings of `config.json` that GGUF has no key for. What llama.cpp computes stands in the table of the forward pass;
/// a model that was trained otherwise is converted with a warning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Setting {
    /// `query_pre_attn_scalar`, which scales attention scores.
    QueryScalar,
    /// `use_sliding_window`.
    SlidingWindow,
    /// `no_rope_layers`, or `no_rope_layer_interval`: layers without rotary embedding.
    RopeLayers,
    /// `norm_topk_prob`: the weights of the chosen experts are scaled to sum to one.
    NormalizedExperts,
}

/// One architecture, or a class of it whose folders differ from the others'.
#[derive(Debug)]
pub(super) struct Row {
    /// What the forward pass knows of it; `general.architecture` above all.
    pub arch: &'static Architecture,
    /// Class names in `architectures`.
    pub classes: &'static [&'static str],
    /// Tensors of a layer, besides experts.
    pub layer: &'static [&'static [Role]],
    /// Experts, if any.
    pub experts: Option<ExpertNames>,
    /// Norms are stored minus one.
    pub shifted_norms: bool,
    /// Embedding and output matrix may have rows behind the vocabulary, which the reference cuts off.
    pub spare_rows: bool,
    pub vocabulary: VocabularyKind,
    /// transformers derives `head_dim` where it is missing.
    pub derives_head_dim: bool,
    /// What transformers fills in.
    pub defaults: fn() -> Vec<(&'static str, Value)>,
    /// Writes the hyperparameters.
    pub keys: WriteKeys,
    /// Settings that its configurations have.
    pub settings: &'static [Setting],
    /// llama.cpp applies the second-level scales of NVFP4 in its feed-forward network as well as in attention.
    pub feed_forward_scales: bool,
}

const fn role(source: &'static str, target: &'static str, shape: &'static [Dim]) -> Role {
    Role { source, target, shape, change: Change::Keep, bias: false, bare: false }
}

const fn linear(source: &'static str, target: &'static str, shape: &'static [Dim]) -> Role {
    Role { bias: true, ..role(source, target, shape) }
}

const fn shifted(source: &'static str, target: &'static str, shape: &'static [Dim]) -> Role {
    Role { change: Change::AddOne, ..role(source, target, shape) }
}

use Dim::{Experts, FeedForward, Fused, GateUp, Head, Heads, Keys, One, Queries, SharedWidth, Width};

const NORMS: &[Role] =
    &[role("input_layernorm", "attn_norm", &[Width]), role("post_attention_layernorm", "ffn_norm", &[Width])];
const GEMMA_NORMS: &[Role] = &[
    shifted("input_layernorm", "attn_norm", &[Width]),
    shifted("post_attention_layernorm", "post_attention_norm", &[Width]),
    shifted("pre_feedforward_layernorm", "ffn_norm", &[Width]),
    shifted("post_feedforward_layernorm", "post_ffw_norm", &[Width]),
];
const GEMMA1_NORMS: &[Role] =
    &[shifted("input_layernorm", "attn_norm", &[Width]), shifted("post_attention_layernorm", "ffn_norm", &[Width])];
const ATTENTION: &[Role] = &[
    linear("self_attn.q_proj", "attn_q", &[Queries, Width]),
    linear("self_attn.k_proj", "attn_k", &[Keys, Width]),
    linear("self_attn.v_proj", "attn_v", &[Keys, Width]),
    linear("self_attn.o_proj", "attn_output", &[Width, Queries]),
];
const PERMUTED_ATTENTION: &[Role] = &[
    Role { change: Change::PermuteQueries, ..ATTENTION[0] },
    Role { change: Change::PermuteKeys, ..ATTENTION[1] },
    ATTENTION[2],
    ATTENTION[3],
];
const FUSED_ATTENTION: &[Role] = &[
    linear("self_attn.qkv_proj", "attn_qkv", &[Fused, Width]),
    linear("self_attn.o_proj", "attn_output", &[Width, Queries]),
];
const HEAD_NORMS: &[Role] =
    &[role("self_attn.q_norm", "attn_q_norm", &[Head]), role("self_attn.k_norm", "attn_k_norm", &[Head])];
const GEMMA_HEAD_NORMS: &[Role] =
    &[shifted("self_attn.q_norm", "attn_q_norm", &[Head]), shifted("self_attn.k_norm", "attn_k_norm", &[Head])];
const DENSE: &[Role] = &[
    linear("mlp.gate_proj", "ffn_gate", &[FeedForward, Width]),
    linear("mlp.up_proj", "ffn_up", &[FeedForward, Width]),
    linear("mlp.down_proj", "ffn_down", &[Width, FeedForward]),
];
const FUSED_DENSE: &[Role] =
    &[role("mlp.gate_up_proj", "ffn_up", &[GateUp, Width]), role("mlp.down_proj", "ffn_down", &[Width, FeedForward])];
const ROUTER: &[Role] = &[role("mlp.gate", "ffn_gate_inp", &[Experts, Width])];
const MIXTRAL_ROUTER: &[Role] = &[role("block_sparse_moe.gate", "ffn_gate_inp", &[Experts, Width])];
const POST_ATTENTION_NORMS: &[Role] = &[
    role("input_layernorm", "attn_norm", &[Width]),
    role("post_attention_layernorm", "post_attention_norm", &[Width]),
];
const SINKS: &[Role] = &[Role { bare: true, ..role("self_attn.sinks", "attn_sinks", &[Heads]) }];
const GPT_OSS_ROUTER: &[Role] = &[linear("mlp.router", "ffn_gate_inp", &[Experts, Width])];
const SHARED_EXPERT: &[Role] = &[
    role("mlp.shared_expert.gate_proj", "ffn_gate_shexp", &[SharedWidth, Width]),
    role("mlp.shared_expert.up_proj", "ffn_up_shexp", &[SharedWidth, Width]),
    role("mlp.shared_expert.down_proj", "ffn_down_shexp", &[Width, SharedWidth]),
    role("mlp.shared_expert_gate", "ffn_gate_inp_shexp", &[One, Width]),
];

const QWEN_EXPERTS: ExpertNames = ExpertNames {
    prefix: "mlp.experts.",
    gate_up_down: ["gate_proj", "up_proj", "down_proj"],
    stacked: ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    switched: "mlp.switch_mlp.",
    width: "moe_intermediate_size",
    interleaved: false,
    transposed: false,
};
const MIXTRAL_EXPERTS: ExpertNames = ExpertNames {
    prefix: "block_sparse_moe.experts.",
    gate_up_down: ["w1", "w3", "w2"],
    stacked: ["block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"],
    switched: "block_sparse_moe.switch_mlp.",
    width: "intermediate_size",
    interleaved: false,
    transposed: false,
};
const GPT_OSS_EXPERTS: ExpertNames = ExpertNames {
    prefix: "mlp.experts.",
    gate_up_down: QWEN_EXPERTS.gate_up_down,
    stacked: QWEN_EXPERTS.stacked,
    switched: QWEN_EXPERTS.switched,
    width: "intermediate_size",
    interleaved: true,
    transposed: true,
};
const QWEN_VL_EXPERTS: ExpertNames = ExpertNames { transposed: true, ..QWEN_EXPERTS };

/// Infill tokens of CodeGemma; other models of the class have their vocabulary.
const CODE_GEMMA_INFILL: &[(&str, u32)] = &[("prefix", 67), ("suffix", 69), ("middle", 68), ("fsep", 70), ("eot", 107)];

/// The row of an architecture of the forward pass, as most are.
const fn plain(name: &str) -> Row {
    Row {
        arch: Architecture::named(name),
        classes: &[],
        layer: &[NORMS, ATTENTION, DENSE],
        experts: None,
        shifted_norms: false,
        spare_rows: false,
        vocabulary: VocabularyKind::SentencePieceOrByteLevel,
        derives_head_dim: false,
        defaults: Vec::new,
        keys: hparams::common,
        settings: &[],
        feed_forward_scales: false,
    }
}

const LLAMA: Row = Row {
    classes: &["LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel"],
    layer: &[NORMS, PERMUTED_ATTENTION, DENSE],
    vocabulary: VocabularyKind::Llama,
    derives_head_dim: true,
    defaults: llama_defaults,
    keys: hparams::llama,
    feed_forward_scales: true,
    ..plain("llama")
};

/// Every architecture.
pub(super) const ROWS: &[Row] = &[
    LLAMA,
    Row { classes: &["MistralForCausalLM"], derives_head_dim: false, defaults: mistral_defaults, ..LLAMA },
    Row {
        classes: &["MixtralForCausalLM"],
        layer: &[NORMS, PERMUTED_ATTENTION, MIXTRAL_ROUTER],
        experts: Some(MIXTRAL_EXPERTS),
        derives_head_dim: false,
        defaults: mixtral_defaults,
        ..LLAMA
    },
    Row {
        classes: &["Qwen2ForCausalLM", "Qwen2Model"],
        defaults: qwen2_defaults,
        settings: &[Setting::SlidingWindow],
        ..plain("qwen2")
    },
    Row {
        classes: &["Qwen2MoeForCausalLM"],
        layer: &[NORMS, ATTENTION, ROUTER, SHARED_EXPERT],
        experts: Some(QWEN_EXPERTS),
        vocabulary: VocabularyKind::ByteLevel,
        defaults: qwen2_moe_defaults,
        settings: &[Setting::SlidingWindow, Setting::NormalizedExperts],
        ..plain("qwen2moe")
    },
    Row {
        classes: &["Qwen3ForCausalLM", "Qwen3Model"],
        layer: &[NORMS, ATTENTION, HEAD_NORMS, DENSE],
        defaults: qwen3_defaults,
        settings: &[Setting::SlidingWindow],
        feed_forward_scales: true,
        ..plain("qwen3")
    },
    Row {
        classes: &["Qwen3MoeForCausalLM"],
        layer: &[NORMS, ATTENTION, HEAD_NORMS, ROUTER],
        experts: Some(QWEN_EXPERTS),
        vocabulary: VocabularyKind::ByteLevel,
        defaults: qwen3_moe_defaults,
        settings: &[Setting::SlidingWindow, Setting::NormalizedExperts],
        feed_forward_scales: true,
        ..plain("qwen3moe")
    },
    Row {
        classes: &["GemmaForCausalLM"],
        layer: &[GEMMA1_NORMS, ATTENTION, DENSE],
        shifted_norms: true,
        vocabulary: VocabularyKind::Gemma { infill: CODE_GEMMA_INFILL },
        defaults: gemma_defaults,
        keys: hparams::gemma,
        ..plain("gemma")
    },
    Row {
        classes: &["Gemma2ForCausalLM"],
        layer: &[GEMMA_NORMS, ATTENTION, DENSE],
        shifted_norms: true,
        vocabulary: VocabularyKind::Gemma { infill: &[] },
        defaults: gemma2_defaults,
        keys: hparams::gemma,
        settings: &[Setting::QueryScalar],
        ..plain("gemma2")
    },
    Row {
        classes: &["Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"],
        layer: &[GEMMA_NORMS, ATTENTION, GEMMA_HEAD_NORMS, DENSE],
        shifted_norms: true,
        spare_rows: true,
        vocabulary: VocabularyKind::Gemma { infill: &[] },
        defaults: gemma3_defaults,
        keys: hparams::gemma3,
        settings: &[Setting::QueryScalar],
        ..plain("gemma3")
    },
    Row {
        classes: &["Phi3ForCausalLM"],
        layer: &[NORMS, FUSED_ATTENTION, FUSED_DENSE],
        vocabulary: VocabularyKind::Phi3,
        defaults: phi3_defaults,
        keys: hparams::phi3,
        ..plain("phi3")
    },
    Row {
        classes: &["SmolLM3ForCausalLM"],
        layer: &[NORMS, PERMUTED_ATTENTION, DENSE],
        vocabulary: VocabularyKind::Llama,
        defaults: smollm3_defaults,
        keys: hparams::llama,
        settings: &[Setting::SlidingWindow, Setting::RopeLayers],
        ..plain("smollm3")
    },
    Row {
        classes: &["GraniteForCausalLM"],
        defaults: granite_defaults,
        keys: hparams::granite,
        layer: &[NORMS, PERMUTED_ATTENTION, DENSE],
        vocabulary: VocabularyKind::Llama,
        ..plain("granite")
    },
    Row {
        classes: &["SeedOssForCausalLM"],
        layer: &[POST_ATTENTION_NORMS, ATTENTION, DENSE],
        vocabulary: VocabularyKind::ByteLevel,
        defaults: seed_oss_defaults,
        ..plain("seed_oss")
    },
    Row {
        classes: &["Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"],
        defaults: qwen2_vl_defaults,
        settings: &[Setting::SlidingWindow],
        ..plain("qwen2vl")
    },
    Row {
        classes: &["Qwen3VLForConditionalGeneration"],
        layer: &[NORMS, ATTENTION, HEAD_NORMS, DENSE],
        defaults: qwen3_vl_defaults,
        keys: hparams::qwen3_vl,
        ..plain("qwen3vl")
    },
    Row {
        classes: &["Qwen3VLMoeForConditionalGeneration"],
        layer: &[NORMS, ATTENTION, HEAD_NORMS, ROUTER],
        experts: Some(QWEN_VL_EXPERTS),
        vocabulary: VocabularyKind::ByteLevel,
        defaults: qwen3_vl_moe_defaults,
        keys: hparams::qwen3_vl,
        settings: &[Setting::NormalizedExperts],
        ..plain("qwen3vlmoe")
    },
    Row {
        classes: &["GptOssForCausalLM"],
        layer: &[POST_ATTENTION_NORMS, ATTENTION, SINKS, GPT_OSS_ROUTER],
        experts: Some(GPT_OSS_EXPERTS),
        vocabulary: VocabularyKind::ByteLevel,
        defaults: gpt_oss_defaults,
        keys: hparams::gpt_oss,
        ..plain("gpt-oss")
    },
];

impl Row {
    /// The row of a class name.
    pub(super) fn by_class(class: &str) -> Option<&'static Row> {
        ROWS.iter().find(|row| row.classes.contains(&class))
    }

    /// All tensors of a layer besides experts.
    pub(super) fn roles(&self) -> impl Iterator<Item = &'static Role> {
        self.layer.iter().flat_map(|group| group.iter())
    }
}

macro_rules! defaults {
    ($name:ident { $($key:literal: $value:expr),* $(,)? }) => {
        fn $name() -> Vec<(&'static str, Value)> {
            vec![$(($key, json!($value))),*]
        }
    };
}

defaults!(llama_defaults {
    "vocab_size": 32000, "max_position_embeddings": 2048, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
});
defaults!(mistral_defaults {
    "vocab_size": 32000, "max_position_embeddings": 131072, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
});
defaults!(mixtral_defaults {
    "vocab_size": 32000, "max_position_embeddings": 131072, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0, "num_experts_per_tok": 2, "num_local_experts": 8,
});
defaults!(qwen2_defaults {
    "vocab_size": 151936, "max_position_embeddings": 32768, "hidden_size": 4096, "intermediate_size": 22016,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
});
defaults!(qwen3_defaults {
    "vocab_size": 151936, "max_position_embeddings": 32768, "hidden_size": 4096, "intermediate_size": 22016,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
});
defaults!(qwen2_moe_defaults {
    "vocab_size": 151936, "max_position_embeddings": 32768, "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4, "num_experts": 60,
});
defaults!(qwen3_moe_defaults {
    "vocab_size": 151936, "max_position_embeddings": 32768, "hidden_size": 2048, "intermediate_size": 6144,
    "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_experts": 128,
});
defaults!(gemma_defaults {
    "vocab_size": 256000, "max_position_embeddings": 8192, "hidden_size": 3072, "intermediate_size": 24576,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": true,
});
defaults!(gemma2_defaults {
    "vocab_size": 256000, "max_position_embeddings": 8192, "hidden_size": 2304, "intermediate_size": 9216,
    "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 4096, "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 256, "tie_word_embeddings": true,
});
defaults!(gemma3_defaults {
    "vocab_size": 262208, "max_position_embeddings": 131072, "hidden_size": 2304, "intermediate_size": 9216,
    "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10000.0, "sliding_window": 4096,
    "query_pre_attn_scalar": 256, "tie_word_embeddings": true,
});
defaults!(phi3_defaults {
    "vocab_size": 32064, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
    "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "partial_rotary_factor": 1.0,
});
defaults!(gpt_oss_defaults {
    "vocab_size": 201088, "max_position_embeddings": 131072, "hidden_size": 2880, "intermediate_size": 2880,
    "num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 150000.0, "sliding_window": 128, "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "rope_scaling": json!({ "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "original_max_position_embeddings": 4096 }),
});
defaults!(smollm3_defaults {
    "vocab_size": 128256, "max_position_embeddings": 32768, "hidden_size": 2048, "intermediate_size": 11008,
    "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
    "rope_theta": 2_000_000.0, "tie_word_embeddings": true,
});
defaults!(granite_defaults {
    "vocab_size": 32000, "max_position_embeddings": 2048, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0,
});
defaults!(seed_oss_defaults {
    "vocab_size": 155136, "max_position_embeddings": 524288, "hidden_size": 4096, "intermediate_size": 27648,
    "num_hidden_layers": 64, "num_attention_heads": 80, "num_key_value_heads": 8, "head_dim": 128,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
});
defaults!(qwen2_vl_defaults {
    "vocab_size": 152064, "max_position_embeddings": 32768, "hidden_size": 8192, "intermediate_size": 29568,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
});
defaults!(qwen3_vl_defaults {
    "vocab_size": 151936, "max_position_embeddings": 128000, "hidden_size": 4096, "intermediate_size": 22016,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
    "rms_norm_eps": 1e-6, "rope_theta": 5_000_000.0,
});
defaults!(qwen3_vl_moe_defaults {
    "vocab_size": 151936, "max_position_embeddings": 128000, "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-6,
    "rope_theta": 5_000_000.0, "moe_intermediate_size": 1408, "num_experts_per_tok": 4, "num_experts": 60,
});

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{QkNorm, SharedExpert, Sinks};

    #[test]
    fn a_class_has_one_row() {
        let mut classes: Vec<&str> = ROWS.iter().flat_map(|row| row.classes).copied().collect();
        let count = classes.len();
        classes.sort_unstable();
        classes.dedup();
        assert_eq!(classes.len(), count);
    }

    /// Both tables say which tensors a layer has: this one where they come from, the other what they are for.
    #[test]
    fn tensors_are_those_of_the_forward_pass() {
        for row in ROWS {
            let Row { arch, classes, .. } = row;
            let has = |target: &str| row.roles().any(|role| role.target == target);
            for norm in ["attn_q_norm", "attn_k_norm"] {
                assert_eq!(has(norm), arch.attention.qk_norm != QkNorm::None, "{classes:?} {norm}");
            }
            for norm in ["post_attention_norm", "post_ffw_norm"] {
                assert_eq!(has(norm), arch.norms.after || arch.norms.feed_forward == norm, "{classes:?} {norm}");
            }
            assert!(has("attn_norm") && has(arch.norms.feed_forward), "{classes:?}");
            let dense = row.experts.is_none();
            assert_eq!(has("ffn_up"), dense, "{classes:?}");
            assert_eq!(has("ffn_gate"), dense && !arch.feed_forward.fused_gate_up, "{classes:?}");
            assert_eq!(has("ffn_gate_inp"), !dense, "{classes:?}");
            assert_eq!(has("ffn_gate_inp_shexp"), arch.feed_forward.shared == SharedExpert::Gated, "{classes:?}");
            assert_eq!(has("attn_sinks"), arch.attention.sinks == Sinks::All, "{classes:?}");
            assert!(dense || arch.feed_forward.mixture.gating().is_some(), "{classes:?}");
            if let Some(experts) = row.experts {
                let own = experts.width != "intermediate_size" || experts.interleaved;
                assert_eq!(own, arch.feed_forward.own_expert_width, "{classes:?}");
            }
        }
    }
}
