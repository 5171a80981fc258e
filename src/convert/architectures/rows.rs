//! The table.

use super::defaults::*;
use super::parts::*;
use super::{RoleToken, Row, Setting, VocabularyKind, names};
use crate::convert::hparams::{self, Key, count, flag, number, where_given};
use crate::convert::sizes::{self, Layout};
use crate::model::Architecture;

/// Infill tokens of CodeGemma; other models of the class have their vocabulary.
const CODE_GEMMA_INFILL: &[(&str, u32)] = &[("prefix", 67), ("suffix", 69), ("middle", 68), ("fsep", 70), ("eot", 107)];

const COMMON: Key = Key::Part(hparams::common);
const LLAMA_KEYS: &[Key] = &[Key::Part(hparams::llama)];

/// The row of an architecture of the forward pass, as most are.
const fn plain(name: &str) -> Row {
    Row {
        arch: Architecture::named(name),
        classes: &[],
        aliases: &[],
        defaults: Vec::new,
        derives_head_dim: false,
        layout: &[],
        names: names::plain,
        left_out: &[],
        ends: &[],
        layer: &[NORMS, ATTENTION, DENSE],
        experts: None,
        shifted_norms: false,
        spare_rows: false,
        vocabulary: VocabularyKind::SentencePieceOrByteLevel,
        special: &[],
        keys: &[COMMON],
        default_sections: &[],
        settings: &[],
        feed_forward_scales: false,
    }
}

const LLAMA: Row = Row {
    classes: &["LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel"],
    layer: &[NORMS, NEIGHBOURS_ATTENTION, DENSE],
    vocabulary: VocabularyKind::Llama,
    derives_head_dim: true,
    defaults: llama_defaults,
    keys: LLAMA_KEYS,
    feed_forward_scales: true,
    ..plain("llama")
};

/// Every class.
pub(in crate::convert) const ROWS: &[Row] = &[
    LLAMA,
    Row { classes: &["MistralForCausalLM"], derives_head_dim: false, defaults: mistral_defaults, ..LLAMA },
    Row {
        classes: &["MixtralForCausalLM"],
        layer: &[NORMS, NEIGHBOURS_ATTENTION, MIXTRAL_ROUTER],
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
        layout: &[Layout::SharedWidth("shared_expert_intermediate_size")],
        layer: &[NORMS, ATTENTION, ROUTER, GATED_SHARED_EXPERT],
        experts: Some(QWEN_EXPERTS),
        vocabulary: VocabularyKind::ByteLevel,
        defaults: qwen2_moe_defaults,
        settings: &[Setting::SlidingWindow, Setting::NormalizedExperts],
        keys: &[COMMON, EXPERT_WIDTH, SHARED_WIDTH],
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
        keys: &[COMMON, EXPERT_WIDTH],
        ..plain("qwen3moe")
    },
    Row {
        classes: &["GemmaForCausalLM"],
        layer: &[SHIFTED_NORMS, ATTENTION, DENSE],
        shifted_norms: true,
        vocabulary: VocabularyKind::Gemma { infill: CODE_GEMMA_INFILL },
        defaults: gemma_defaults,
        keys: &[Key::Part(hparams::gemma)],
        ..plain("gemma")
    },
    Row {
        classes: &["Gemma2ForCausalLM"],
        layer: &[GEMMA_NORMS, ATTENTION, DENSE],
        shifted_norms: true,
        vocabulary: VocabularyKind::Gemma { infill: &[] },
        defaults: gemma2_defaults,
        keys: &[Key::Part(hparams::gemma)],
        settings: &[Setting::QueryScalar],
        ..plain("gemma2")
    },
    Row {
        classes: &["Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"],
        layer: &[GEMMA_NORMS, ATTENTION, SHIFTED_HEAD_NORMS, DENSE],
        shifted_norms: true,
        spare_rows: true,
        vocabulary: VocabularyKind::Gemma { infill: &[] },
        defaults: gemma3_defaults,
        keys: &[Key::Part(hparams::gemma3)],
        settings: &[Setting::QueryScalar],
        ..plain("gemma3")
    },
    Row {
        classes: &["Phi3ForCausalLM"],
        layer: &[NORMS, FUSED_ATTENTION, FUSED_DENSE],
        vocabulary: VocabularyKind::Phi3,
        defaults: phi3_defaults,
        keys: &[Key::Part(hparams::phi3)],
        ..plain("phi3")
    },
    Row {
        classes: &["SmolLM3ForCausalLM"],
        layer: &[NORMS, NEIGHBOURS_ATTENTION, DENSE],
        vocabulary: VocabularyKind::Llama,
        defaults: smollm3_defaults,
        keys: LLAMA_KEYS,
        settings: &[Setting::SlidingWindow, Setting::RopeLayers],
        ..plain("smollm3")
    },
    Row {
        classes: &["GraniteForCausalLM"],
        defaults: granite_defaults,
        keys: GRANITE_KEYS,
        layer: &[NORMS, NEIGHBOURS_ATTENTION, DENSE],
        vocabulary: VocabularyKind::Llama,
        ..plain("granite")
    },
    Row {
        classes: &["GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"],
        layout: &[Layout::SharedWidth("shared_intermediate_size")],
        layer: &[NORMS, NEIGHBOURS_ATTENTION, GRANITE_ROUTER, GRANITE_SHARED],
        experts: Some(GRANITE_EXPERTS),
        vocabulary: VocabularyKind::Llama,
        defaults: granite_moe_defaults,
        keys: &[Key::Part(hparams::granite), SHARED_WIDTH],
        ..plain("granitemoe")
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
        keys: &[COMMON, Key::Part(hparams::deepstack)],
        ..plain("qwen3vl")
    },
    Row {
        classes: &["Qwen3VLMoeForConditionalGeneration"],
        layer: &[NORMS, ATTENTION, HEAD_NORMS, ROUTER],
        experts: Some(QWEN_VL_EXPERTS),
        vocabulary: VocabularyKind::ByteLevel,
        defaults: qwen3_vl_moe_defaults,
        keys: &[COMMON, EXPERT_WIDTH, Key::Part(hparams::deepstack)],
        settings: &[Setting::NormalizedExperts],
        ..plain("qwen3vlmoe")
    },
    Row {
        classes: &["GptOssForCausalLM"],
        layer: &[POST_ATTENTION_NORMS, ATTENTION, SINKS, GPT_OSS_ROUTER],
        experts: Some(GPT_OSS_EXPERTS),
        vocabulary: VocabularyKind::ByteLevel,
        defaults: gpt_oss_defaults,
        keys: &[COMMON, EXPERT_WIDTH, count("sliding_window", "attention.sliding_window")],
        ..plain("gpt-oss")
    },
    Row {
        classes: &["Dots1ForCausalLM"],
        layout: &[Layout::LeadingDense("first_k_dense_replace"), Layout::SharedCount("n_shared_experts")],
        layer: &[NORMS, ATTENTION, HEAD_NORMS, DENSE, ROUTER, SELECTION_BIAS, SHARED_EXPERTS],
        experts: Some(QWEN_EXPERTS),
        vocabulary: VocabularyKind::ByteLevel,
        defaults: dots1_defaults,
        keys: &[
            COMMON,
            EXPERT_WIDTH,
            count("first_k_dense_replace", "leading_dense_block_count"),
            count("n_shared_experts", "expert_shared_count"),
            number("routed_scaling_factor", "expert_weights_scale"),
            flag("norm_topk_prob", "expert_weights_norm"),
        ],
        settings: &[Setting::Fixed("sliding_window", "null")],
        ..plain("dots1")
    },
    Row {
        classes: &["Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"],
        names: names::ernie,
        layer: &[NORMS, ERNIE_ATTENTION[0], ERNIE_ATTENTION[1], ERNIE_DENSE[0], ERNIE_DENSE[1]],
        vocabulary: VocabularyKind::SentencePiece,
        defaults: ernie4_5_defaults,
        ..plain("ernie4_5")
    },
    Row {
        classes: &["Ernie4_5_MoeForCausalLM"],
        aliases: &[("num_experts", "moe_num_experts"), ("num_experts_per_tok", "moe_k")],
        names: names::ernie,
        left_out: &["model.mtp_block.", "model.mtp_emb_norm.", "model.mtp_hidden_norm.", "model.mtp_linear_proj."],
        layout: &[
            Layout::LeadingDense("moe_layer_start_index"),
            Layout::ExpertsEvery("moe_layer_interval"),
            Layout::SharedCount("moe_num_shared_experts"),
        ],
        layer: &[NORMS, ATTENTION, DENSE, ROUTER, ERNIE_SELECTION_BIAS, SHARED_EXPERTS],
        experts: Some(QWEN_EXPERTS),
        vocabulary: VocabularyKind::SentencePiece,
        defaults: ernie4_5_moe_defaults,
        keys: &[
            COMMON,
            EXPERT_WIDTH,
            count("moe_layer_interval", "interleave_moe_layer_step"),
            count("moe_layer_start_index", "leading_dense_block_count"),
            count("moe_num_shared_experts", "expert_shared_count"),
            Key::Part(hparams::ernie_shared_width),
        ],
        ..plain("ernie4_5-moe")
    },
    Row {
        classes: &["OlmoeForCausalLM"],
        layer: &[NORMS, ATTENTION, WHOLE_NORMS, ROUTER],
        experts: Some(PLAIN_WIDTH_EXPERTS),
        vocabulary: VocabularyKind::ByteLevel,
        defaults: olmoe_defaults,
        keys: &[COMMON, Key::Part(hparams::fixed_epsilon)],
        settings: &[
            Setting::NormalizedExperts,
            Setting::Fixed("rms_norm_eps", "1e-5"),
            Setting::Fixed("clip_qkv", "null"),
        ],
        ..plain("olmoe")
    },
    Row {
        classes: &["MiniMaxM2ForCausalLM"],
        layer: &[NORMS, ATTENTION, WHOLE_NORMS, MIXTRAL_ROUTER, MINIMAX_SELECTION_BIAS],
        experts: Some(MIXTRAL_EXPERTS),
        vocabulary: VocabularyKind::ByteLevel,
        keys: &[COMMON, EXPERT_WIDTH, count("rotary_dim", "rope.dimension_count")],
        settings: &[Setting::Fixed("qk_norm_type", "\"per_layer\"")],
        ..plain("minimax-m2")
    },
    Row {
        classes: &["InternLM2ForCausalLM"],
        names: names::internlm2,
        layer: &[INTERNLM_NORMS, INTERNLM_ATTENTION, INTERNLM_DENSE],
        vocabulary: VocabularyKind::InternLm2,
        special: &[RoleToken { role: "eos", token: "<|im_end|>", replaces: true }],
        ..plain("internlm2")
    },
    Row {
        classes: &["Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"],
        layer: &[SHIFTED_POST_ATTENTION_NORMS, DELTA_NET, GATED_ATTENTION, SHIFTED_HEAD_NORMS, DENSE, SHIFTED_NEXTN],
        keys: QWEN35_KEYS,
        ..QWEN35
    },
    QWEN35MOE,
    Row {
        arch: Architecture::named("qwen3next"),
        classes: &["Qwen3NextForCausalLM"],
        layer: &[
            SHIFTED_POST_ATTENTION_NORMS,
            GROUPED_DELTA_NET,
            GATED_ATTENTION,
            SHIFTED_HEAD_NORMS,
            ROUTER,
            GATED_SHARED_EXPERT,
            SHIFTED_NEXTN,
        ],
        defaults: qwen3_next_defaults,
        default_sections: &[],
        settings: &[Setting::NormalizedExperts, Setting::Fixed("decoder_sparse_step", "1")],
        ..QWEN35MOE
    },
    Row {
        classes: &["Gemma4ForConditionalGeneration", "Gemma4ForCausalLM"],
        layout: &[Layout::Part(sizes::gemma4)],
        ends: &[PER_LAYER_ENDS],
        layer: &[
            GEMMA4_NORMS,
            GEMMA4_ATTENTION[0],
            GEMMA4_ATTENTION[1],
            GEMMA4_ATTENTION[2],
            GEMMA4_ATTENTION[3],
            GEMMA4_FEED_FORWARD[0],
            GEMMA4_FEED_FORWARD[1],
            PER_LAYER_INPUTS,
        ],
        experts: Some(GEMMA4_EXPERTS),
        spare_rows: true,
        vocabulary: VocabularyKind::Gemma4,
        keys: &[Key::Part(hparams::gemma4)],
        ..plain("gemma4")
    },
    Row {
        classes: &["Glm4ForCausalLM"],
        layer: &[GLM4_NORMS, ATTENTION, FUSED_DENSE],
        vocabulary: VocabularyKind::ByteLevel,
        special: GLM4_TOKENS,
        defaults: glm4_defaults,
        keys: &[COMMON, Key::Rotated(0.5)],
        ..plain("glm4")
    },
    Row {
        classes: &["Glm4MoeForCausalLM"],
        layout: &[
            Layout::LeadingDense("first_k_dense_replace"),
            Layout::SharedCount("n_shared_experts"),
            Layout::NextN("num_nextn_predict_layers"),
        ],
        layer: &[
            POST_ATTENTION_NORMS,
            ATTENTION,
            OPTIONAL_HEAD_NORMS,
            DENSE,
            ROUTER,
            SELECTION_BIAS,
            SHARED_EXPERTS,
            NEXTN,
        ],
        experts: Some(QWEN_EXPERTS),
        vocabulary: VocabularyKind::ByteLevel,
        special: GLM_MOE_TOKENS,
        defaults: glm4_moe_defaults,
        keys: &[
            COMMON,
            Key::Rotated(0.5),
            EXPERT_WIDTH,
            where_given(count("n_shared_experts", "expert_shared_count")),
            where_given(count("first_k_dense_replace", "leading_dense_block_count")),
            Key::Fixed("expert_gating_func", SIGMOID),
            where_given(number("routed_scaling_factor", "expert_weights_scale")),
            where_given(flag("norm_topk_prob", "expert_weights_norm")),
            Key::Part(hparams::nextn_where_given),
        ],
        ..plain("glm4moe")
    },
    Row {
        classes: &["Olmo2ForCausalLM"],
        layer: &[POST_NORMS, ATTENTION, WHOLE_NORMS, DENSE],
        vocabulary: VocabularyKind::ByteLevel,
        defaults: olmo2_defaults,
        ..plain("olmo2")
    },
    Row {
        classes: &["Olmo3ForCausalLM"],
        layout: &[Layout::Part(sizes::windows)],
        layer: &[POST_NORMS, ATTENTION, WHOLE_NORMS, DENSE],
        vocabulary: VocabularyKind::ByteLevel,
        defaults: olmo3_defaults,
        keys: &[COMMON, Key::Part(hparams::windows)],
        ..plain("olmo2")
    },
    Row {
        classes: &["BailingMoeV2ForCausalLM"],
        names: names::bailing,
        layout: &[
            Layout::LeadingDense("first_k_dense_replace"),
            Layout::SharedCount("num_shared_experts"),
            Layout::SharedWidthWhereGiven("moe_shared_expert_intermediate_size"),
            Layout::NextN("num_nextn_predict_layers"),
        ],
        layer: &[
            NORMS,
            BAILING_ATTENTION,
            DENSE,
            ROUTER,
            BAILING_SELECTION_BIAS,
            SHARED_EXPERTS,
            NEXTN,
            NEXTN_OUT_NORM,
        ],
        experts: Some(QWEN_EXPERTS),
        vocabulary: VocabularyKind::ByteLevel,
        keys: &[
            COMMON,
            Key::Rotated(0.5),
            count("first_k_dense_replace", "leading_dense_block_count"),
            VOCAB_SIZE,
            EXPERT_WIDTH,
            Key::Part(hparams::bailing_shared_width),
            number("routed_scaling_factor", "expert_weights_scale"),
            count("num_shared_experts", "expert_shared_count"),
            flag("norm_topk_prob", "expert_weights_norm"),
            Key::Part(hparams::nextn_where_given),
        ],
        ..plain("bailingmoe2")
    },
    Row {
        classes: &["Exaone4ForCausalLM"],
        layout: &[Layout::Part(sizes::windows)],
        layer: &[POST_NORMS, ATTENTION, HEAD_NORMS, DENSE],
        vocabulary: VocabularyKind::ByteLevel,
        defaults: exaone4_defaults,
        keys: EXAONE4_KEYS,
        ..plain("exaone4")
    },
    Row {
        classes: &["ExaoneMoEForCausalLM", "ExaoneMoeForCausalLM"],
        names: names::mtp,
        layout: &[
            Layout::LeadingDense("first_last_k_dense_replace"),
            Layout::LeadingDense("first_k_dense_replace"),
            Layout::SharedCount("num_shared_experts"),
            Layout::Part(sizes::windows),
            Layout::NextN("num_nextn_predict_layers"),
        ],
        layer: &[
            NORMS,
            ATTENTION,
            HEAD_NORMS,
            DENSE,
            ROUTER,
            EXAONE_SELECTION_BIAS[0],
            EXAONE_SELECTION_BIAS[1],
            SHARED_EXPERTS,
            NEXTN,
        ],
        experts: Some(QWEN_EXPERTS),
        vocabulary: VocabularyKind::ByteLevel,
        keys: &[
            COMMON,
            VOCAB_SIZE,
            Key::Part(hparams::windows),
            Key::Part(hparams::llama3_factors),
            EXPERT_WIDTH,
            count("num_shared_experts", "expert_shared_count"),
            number("routed_scaling_factor", "expert_weights_scale"),
            flag("norm_topk_prob", "expert_weights_norm"),
            Key::Fixed("leading_dense_block_count", 0),
            where_given(count("first_last_k_dense_replace", "leading_dense_block_count")),
            where_given(count("first_k_dense_replace", "leading_dense_block_count")),
            Key::Part(hparams::exaone_moe),
        ],
        ..plain("exaone-moe")
    },
    Row {
        classes: &["HunYuanDenseV1ForCausalLM"],
        layer: &[NORMS, ATTENTION, HUNYUAN_HEAD_NORMS, DENSE],
        vocabulary: VocabularyKind::Hunyuan,
        defaults: hunyuan_defaults,
        keys: &[COMMON, Key::Part(hparams::hunyuan_dense)],
        settings: HUNYUAN_SETTINGS,
        ..plain("hunyuan-dense")
    },
    Row {
        classes: &["HunYuanMoEV1ForCausalLM"],
        layout: &[Layout::Part(sizes::hunyuan_experts)],
        layer: &[NORMS, ATTENTION, HUNYUAN_HEAD_NORMS, HUNYUAN_ROUTER, HUNYUAN_SHARED],
        experts: Some(PLAIN_WIDTH_EXPERTS),
        vocabulary: VocabularyKind::ByteLevel,
        defaults: hunyuan_defaults,
        keys: &[COMMON, Key::Part(hparams::hunyuan_moe)],
        settings: HUNYUAN_SETTINGS,
        ..plain("hunyuan-moe")
    },
    Row {
        arch: Architecture::named("mistral3"),
        classes: &["Mistral3ForConditionalGeneration", "Ministral3ForCausalLM"],
        derives_head_dim: false,
        defaults: mistral_defaults,
        keys: &[Key::Part(hparams::llama), Key::Part(hparams::ministral3)],
        ..LLAMA
    },
    Row {
        classes: &["MiniCPMForCausalLM"],
        layer: &[NORMS, NEIGHBOURS_ATTENTION, DENSE],
        vocabulary: VocabularyKind::SentencePiece,
        keys: &[COMMON, Key::Part(hparams::minicpm)],
        ..plain("minicpm")
    },
    Row {
        classes: &["AfmoeForCausalLM"],
        layout: &[Layout::LeadingDense("num_dense_layers"), Layout::SharedCount("num_shared_experts")],
        layer: &[AFMOE_NORMS, ATTENTION, AFMOE_GATE, HEAD_NORMS, DENSE, AFMOE_ROUTER, SHARED_EXPERTS],
        experts: Some(QWEN_EXPERTS),
        vocabulary: VocabularyKind::Llama,
        keys: &[
            Key::Part(hparams::llama),
            where_given(count("num_shared_experts", "expert_shared_count")),
            EXPERT_WIDTH,
            where_given(count("num_dense_layers", "leading_dense_block_count")),
            where_given(flag("route_norm", "expert_weights_norm")),
            where_given(number("route_scale", "expert_weights_scale")),
            where_given(count("sliding_window", "attention.sliding_window")),
        ],
        settings: &[Setting::FullEvery(4), Setting::Fixed("mup_enabled", "true")],
        ..plain("afmoe")
    },
    Row {
        classes: &["Step3p5ForCausalLM"],
        aliases: &[
            ("num_key_value_heads", "num_attention_groups"),
            ("num_experts", "moe_num_experts"),
            ("num_experts_per_tok", "moe_top_k"),
        ],
        names: names::step,
        layout: &[Layout::Part(sizes::step)],
        layer: &[SHIFTED_NORMS, ATTENTION, STEP_GATE, SHIFTED_HEAD_NORMS, DENSE, STEP_ROUTER, SHIFTED_NEXTN],
        experts: Some(STEP_EXPERTS),
        shifted_norms: true,
        vocabulary: VocabularyKind::ByteLevel,
        defaults: step_defaults,
        keys: &[
            COMMON,
            EXPERT_WIDTH,
            SHARED_WIDTH,
            where_given(number("moe_router_scaling_factor", "expert_weights_scale")),
            where_given(flag("norm_expert_weight", "expert_weights_norm")),
            Key::Part(hparams::step),
            Key::Part(hparams::nextn),
        ],
        ..plain("step35")
    },
    Row {
        classes: &["MiMoV2FlashForCausalLM", "MiMoV2ForCausalLM"],
        aliases: &[("rms_norm_eps", "layernorm_epsilon")],
        names: names::mtp,
        layout: &[Layout::Part(sizes::mimo)],
        layer: &[
            MIMO_NORMS[0],
            MIMO_NORMS[1],
            MIMO_NORMS[2],
            MIMO_ATTENTION[0],
            MIMO_ATTENTION[1],
            MIMO_ATTENTION[2],
            DENSE,
            ROUTER,
            SELECTION_BIAS,
            NEXTN,
            NEXTN_OUT_NORM,
        ],
        experts: Some(QWEN_EXPERTS),
        vocabulary: VocabularyKind::ByteLevel,
        defaults: mimo_defaults,
        keys: &[COMMON, EXPERT_WIDTH, Key::Part(hparams::mimo), Key::Part(hparams::nextn)],
        ..plain("mimo2")
    },
    Row {
        arch: Architecture::named("llama4"),
        classes: &["Llama4ForConditionalGeneration", "Llama4ForCausalLM"],
        aliases: &[("intermediate_size_moe", "intermediate_size"), ("intermediate_size", "intermediate_size_mlp")],
        derives_head_dim: false,
        layout: &[Layout::ExpertsEvery("interleave_moe_layer_step"), Layout::Part(sizes::llama4)],
        layer: &[NORMS, ATTENTION, LLAMA4_DENSE, LLAMA4_ROUTER],
        experts: Some(LLAMA4_EXPERTS),
        vocabulary: VocabularyKind::ByteLevel,
        defaults: llama4_defaults,
        keys: &[
            Key::Part(hparams::llama),
            count("interleave_moe_layer_step", "interleave_moe_layer_step"),
            EXPERT_WIDTH,
            Key::Part(hparams::llama4),
        ],
        settings: &[
            Setting::Fixed("attn_temperature_tuning", "true"),
            Setting::Fixed("attention_chunk_size", "8192"),
            Setting::Fixed("floor_scale", "8192"),
            Setting::Fixed("attn_scale", "0.1"),
        ],
        feed_forward_scales: false,
        ..LLAMA
    },
];

const HUNYUAN_SETTINGS: &[Setting] = &[Setting::Fixed("use_cla", "false"), Setting::Fixed("use_mla", "false")];

/// What Qwen3.5's classes share.
const QWEN35: Row = Row {
    layout: &[Layout::Part(sizes::delta_nets), Layout::NextNOrStored("mtp_num_hidden_layers")],
    names: names::mtp,
    shifted_norms: true,
    vocabulary: VocabularyKind::ByteLevel,
    default_sections: &[11.0, 11.0, 10.0],
    settings: &[Setting::Fixed("attn_output_gate", "true")],
    feed_forward_scales: true,
    ..plain("qwen35")
};
const QWEN35MOE: Row = Row {
    arch: Architecture::named("qwen35moe"),
    classes: &["Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"],
    layout: &[
        Layout::Part(sizes::delta_nets),
        Layout::NextNOrStored("mtp_num_hidden_layers"),
        Layout::SharedWidth("shared_expert_intermediate_size"),
    ],
    layer: &[
        SHIFTED_POST_ATTENTION_NORMS,
        DELTA_NET,
        GATED_ATTENTION,
        SHIFTED_HEAD_NORMS,
        ROUTER,
        GATED_SHARED_EXPERT,
        SHIFTED_NEXTN,
    ],
    experts: Some(QWEN_EXPERTS),
    keys: QWEN35_KEYS,
    ..QWEN35
};
const QWEN35_KEYS: &[Key] =
    &[COMMON, EXPERT_WIDTH, SHARED_WIDTH, Key::Part(hparams::delta_net), Key::Rotated(0.25), Key::Part(hparams::nextn)];
const EXAONE4_KEYS: &[Key] = &[COMMON, VOCAB_SIZE, Key::Part(hparams::windows), Key::Part(hparams::llama3_factors)];
const VOCAB_SIZE: Key = Key::Part(hparams::vocab_size);
/// `expert_gating_func` of scores by sigmoid.
const SIGMOID: u32 = 2;
const GLM4_TOKENS: &[RoleToken] = &[
    RoleToken { role: "eos", token: "<|endoftext|>", replaces: false },
    RoleToken { role: "eot", token: "<|user|>", replaces: false },
    RoleToken { role: "unk", token: "<|endoftext|>", replaces: false },
    RoleToken { role: "bos", token: "<|endoftext|>", replaces: false },
];
const GLM_MOE_TOKENS: &[RoleToken] = &[
    RoleToken { role: "bos", token: "[gMASK]", replaces: false },
    RoleToken { role: "eot", token: "<|user|>", replaces: false },
    RoleToken { role: "unk", token: "<|endoftext|>", replaces: false },
    RoleToken { role: "eom", token: "<|observation|>", replaces: false },
];

const EXPERT_WIDTH: Key = Key::Part(hparams::expert_width);
const SHARED_WIDTH: Key = Key::Part(hparams::shared_width);
const GRANITE_KEYS: &[Key] = &[Key::Part(hparams::granite)];
