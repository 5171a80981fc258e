//! What transformers 4.57.6 fills in where `config.json` leaves something out.

use serde_json::{Value, json};

macro_rules! defaults {
    ($name:ident { $($key:literal: $value:expr),* $(,)? }) => {
        pub(super) fn $name() -> Vec<(&'static str, Value)> {
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
defaults!(granite_moe_defaults {
    "vocab_size": 32000, "max_position_embeddings": 2048, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "num_local_experts": 8, "num_experts_per_tok": 2, "embedding_multiplier": 1.0, "logits_scaling": 1.0,
    "residual_multiplier": 1.0, "attention_multiplier": 1.0,
});
defaults!(dots1_defaults {
    "vocab_size": 152064, "max_position_embeddings": 2048, "hidden_size": 4608, "intermediate_size": 10944,
    "num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "moe_intermediate_size": 1408, "n_group": 1, "topk_group": 1,
    "norm_topk_prob": false, "routed_scaling_factor": 1.0, "first_k_dense_replace": 0,
});
defaults!(ernie4_5_defaults {
    "vocab_size": 103424, "max_position_embeddings": 131072, "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 18, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128,
    "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "tie_word_embeddings": true,
});
defaults!(ernie4_5_moe_defaults {
    "vocab_size": 103424, "max_position_embeddings": 131072, "hidden_size": 2560, "intermediate_size": 12288,
    "num_hidden_layers": 28, "num_attention_heads": 20, "num_key_value_heads": 4, "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0, "tie_word_embeddings": true, "moe_intermediate_size": 1536, "moe_num_experts": 64,
    "moe_k": 6, "moe_layer_interval": 1, "moe_layer_start_index": 1, "moe_num_shared_experts": 2,
});
defaults!(olmoe_defaults {
    "vocab_size": 50304, "max_position_embeddings": 4096, "hidden_size": 2048, "intermediate_size": 2048,
    "num_hidden_layers": 16, "num_attention_heads": 16, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": false,
});
defaults!(qwen3_next_defaults {
    "vocab_size": 151936, "max_position_embeddings": 32768, "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "num_experts": 512,
    "num_experts_per_tok": 10, "norm_topk_prob": true, "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_value_head_dim": 128,
});
defaults!(glm4_defaults {
    "vocab_size": 151552, "max_position_embeddings": 131072, "hidden_size": 4096, "intermediate_size": 13696,
    "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
    "rms_norm_eps": 1.5625e-7, "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
});
defaults!(glm4_moe_defaults {
    "vocab_size": 151552, "max_position_embeddings": 131072, "hidden_size": 4096, "intermediate_size": 10944,
    "num_hidden_layers": 46, "num_attention_heads": 96, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "n_routed_experts": 128, "num_experts_per_tok": 8,
    "n_group": 1, "topk_group": 1, "norm_topk_prob": true, "routed_scaling_factor": 1.0,
    "moe_intermediate_size": 1408, "n_shared_experts": 1, "first_k_dense_replace": 1, "use_qk_norm": false,
});
defaults!(olmo2_defaults {
    "vocab_size": 50304, "max_position_embeddings": 2048, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
});
defaults!(olmo3_defaults {
    "vocab_size": 50304, "max_position_embeddings": 2048, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "sliding_window": 4096,
});
defaults!(exaone4_defaults {
    "vocab_size": 102400, "max_position_embeddings": 2048, "hidden_size": 4096, "intermediate_size": 16384,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_pattern": 4,
});
defaults!(hunyuan_defaults {
    "vocab_size": 290943, "max_position_embeddings": 2048, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
});
defaults!(step_defaults {
    "rms_norm_eps": 1e-5,
});
defaults!(mimo_defaults {
    "layernorm_epsilon": 1e-5,
});
defaults!(llama4_defaults {
    "vocab_size": 202048, "max_position_embeddings": 131072, "hidden_size": 5120, "intermediate_size": 8192,
    "intermediate_size_mlp": 16384, "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
    "head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "num_local_experts": 16,
    "num_experts_per_tok": 1, "interleave_moe_layer_step": 1,
});
