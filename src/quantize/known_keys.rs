//! The types that readers expect of metadata keys: a value of another type is not found or ends the load.
//!
//! From llama.cpp b10605 (`llama-arch.cpp`, `llama-hparams.h`, `llama-vocab.cpp`, `clip.cpp`) and its writer (`gguf_writer.py`).

/// What a reader expects of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expected {
    U16,
    U32,
    I32,
    F32,
    Bool,
    Text,
    /// A list of any kind.
    List,
    /// A u32 for all layers, or a list of them.
    U32OrList,
    /// An f32 for all layers, or a list of them.
    F32OrList,
}

use Expected::{Bool, F32, F32OrList, I32, List, Text, U16, U32, U32OrList};

/// Whole names of keys.
const WHOLE: &[(&str, Expected)] = &[
    ("general.quantization_version", U32),
    ("general.alignment", U32),
    ("general.file_type", U32),
    ("general.base_model.count", U32),
    ("general.dataset.count", U32),
    ("general.tags", List),
    ("general.languages", List),
    ("general.datasets", List),
    ("general.sampling.sequence", Text),
    ("general.sampling.top_k", I32),
    ("general.sampling.top_p", F32),
    ("general.sampling.min_p", F32),
    ("general.sampling.xtc_probability", F32),
    ("general.sampling.xtc_threshold", F32),
    ("general.sampling.temp", F32),
    ("general.sampling.penalty_last_n", I32),
    ("general.sampling.penalty_repeat", F32),
    ("general.sampling.mirostat", I32),
    ("general.sampling.mirostat_tau", F32),
    ("general.sampling.mirostat_eta", F32),
    ("split.no", U16),
    ("split.count", U16),
    ("split.tensors.count", I32),
    ("tokenizer.ggml.model", Text),
    ("tokenizer.ggml.pre", Text),
    ("tokenizer.ggml.tokens", List),
    ("tokenizer.ggml.token_type", List),
    ("tokenizer.ggml.token_type_count", U32),
    ("tokenizer.ggml.scores", List),
    ("tokenizer.ggml.merges", List),
    ("tokenizer.ggml.added_tokens", List),
    ("tokenizer.ggml.eos_token_ids", List),
    ("tokenizer.ggml.suppress_tokens", List),
    ("tokenizer.ggml.precompiled_charsmap", List),
    ("tokenizer.ggml.add_bos_token", Bool),
    ("tokenizer.ggml.add_eos_token", Bool),
    ("tokenizer.ggml.add_sep_token", Bool),
    ("tokenizer.ggml.add_space_prefix", Bool),
    ("tokenizer.ggml.remove_extra_whitespaces", Bool),
    ("tokenizer.ggml.normalizer.lowercase", Bool),
    ("tokenizer.ggml.normalizer.strip_accents", Bool),
    ("tokenizer.huggingface.json", Text),
    ("tokenizer.rwkv.world", Text),
    ("tokenizer.chat_template", Text),
    ("tokenizer.chat_templates", List),
    ("adapter.type", Text),
    ("adapter.lora.alpha", F32),
    ("adapter.lora.task_name", Text),
    ("adapter.lora.prompt_prefix", Text),
    ("adapter.alora.invocation_tokens", List),
    ("xielu.alpha_n", F32OrList),
    ("xielu.alpha_p", F32OrList),
    ("xielu.beta", F32OrList),
    ("xielu.eps", F32OrList),
    ("clip.has_text_encoder", Bool),
    ("clip.has_vision_encoder", Bool),
    ("clip.has_audio_encoder", Bool),
    ("clip.has_gen_audio_encoder", Bool),
    ("clip.has_llava_projector", Bool),
    ("clip.use_gelu", Bool),
    ("clip.use_silu", Bool),
    ("clip.projector_type", Text),
];

/// Keys of an encoder, behind `clip.vision.`, `clip.audio.` or `clip.gen.audio.`.
const OF_ENCODER: &[(&str, Expected)] = &[
    ("projector_type", Text),
    ("image_size", U32),
    ("image_min_pixels", U32),
    ("image_max_pixels", U32),
    ("preproc_image_size", U32),
    ("preproc_min_tiles", U32),
    ("preproc_max_tiles", U32),
    ("patch_size", U32),
    ("embedding_length", U32),
    ("feed_forward_length", U32),
    ("projection_dim", U32),
    ("block_count", U32),
    ("image_mean", List),
    ("image_std", List),
    ("image_grid_pinpoints", List),
    ("is_deepstack_layers", List),
    ("feature_layer", List),
    ("wa_layer_indexes", List),
    ("wa_pattern_mode", List),
    ("spatial_merge_size", U32),
    ("n_wa_pattern", U32),
    ("window_size", U32),
    ("num_mel_bins", U32),
    ("attention.head_count", U32),
    ("attention.head_count_kv", U32),
    ("attention.head_dim", U32),
    ("attention.layer_norm_epsilon", F32),
    ("mm_patch_merge_type", Text),
];

/// Keys behind the architecture's name.
const OF_ARCHITECTURE: &[(&str, Expected)] = &[
    ("vocab_size", U32),
    ("context_length", U32),
    ("embedding_length", U32),
    ("embedding_length_out", U32),
    ("embedding_length_per_layer_input", U32),
    ("features_length", U32),
    ("block_count", U32),
    ("leading_dense_block_count", U32),
    ("attn_res.block_size", U32),
    ("activation.situ_beta", F32),
    ("activation.situ_linear_beta", F32),
    ("activation_sparsity_scale", F32OrList),
    ("altup.active_idx", U32),
    ("altup.num_inputs", U32),
    ("feed_forward_length", U32OrList),
    ("expert_feed_forward_length", U32),
    ("expert_shared_feed_forward_length", U32),
    ("expert_chunk_feed_forward_length", U32),
    ("swiglu_clamp_exp", F32OrList),
    ("swiglu_clamp_shexp", F32OrList),
    ("use_parallel_residual", Bool),
    ("tensor_data_layout", Text),
    ("expert_count", U32),
    ("expert_used_count", U32),
    ("expert_shared_count", U32),
    ("expert_group_count", U32),
    ("expert_group_used_count", U32),
    ("expert_weights_scale", F32),
    ("expert_weights_norm", Bool),
    ("expert_latent_length", U32),
    ("expert_gating_func", U32),
    ("expert_group_scale", F32),
    ("experts_per_group", U32),
    ("moe_every_n_layers", U32),
    ("moe_latent_size", U32),
    ("nextn_predict_layers", U32),
    ("n_deepstack_layers", U32),
    ("deepstack_mapping", List),
    ("hidden_activation", Text),
    ("pooling_type", U32),
    ("logit_scale", F32),
    ("decoder_start_token_id", U32),
    ("decoder_block_count", U32),
    ("attn_logit_softcapping", F32),
    ("router_logit_softcapping", F32),
    ("final_logit_softcapping", F32),
    ("swin_norm", Bool),
    ("rescale_every_n_layers", U32),
    ("time_mix_extra_dim", U32),
    ("time_decay_extra_dim", U32),
    ("residual_scale", F32),
    ("embedding_scale", F32),
    ("adapters.count", U32),
    ("adapters.token_ids_activate", List),
    ("adapters.token_ids_substitute", List),
    ("adapters.lora_rank", U32),
    ("adapters.router_gain", F32),
    ("token_shift_count", U32),
    ("interleave_moe_layer_step", U32),
    ("full_attention_interval", U32),
    ("num_loops", U32),
    ("skip_loop_final_norm", Bool),
    ("hash_layer_count", U32),
    ("attention.head_count", U32OrList),
    ("attention.head_count_kv", U32OrList),
    ("attention.max_alibi_bias", F32),
    ("attention.clamp_kqv", F32),
    ("attention.key_length", U32),
    ("attention.value_length", U32),
    ("attention.layer_norm_epsilon", F32),
    ("attention.layer_norm_rms_epsilon", F32),
    ("attention.group_norm_epsilon", F32),
    ("attention.group_norm_groups", U32),
    ("attention.causal", Bool),
    ("attention.q_lora_rank", U32),
    ("attention.kv_lora_rank", U32),
    ("attention.decay_lora_rank", U32),
    ("attention.iclr_lora_rank", U32),
    ("attention.value_residual_mix_lora_rank", U32),
    ("attention.gate_lora_rank", U32),
    ("attention.relative_buckets_count", U32),
    ("attention.sliding_window", U32),
    ("attention.sliding_window_pattern", U32OrList),
    ("attention.rope_pattern", List),
    ("attention.scale", F32),
    ("attention.output_scale", F32),
    ("attention.value_scale", F32),
    ("attention.temperature_length", U32),
    ("attention.temperature_scale", F32),
    ("attention.key_length_mla", U32),
    ("attention.value_length_mla", U32),
    ("attention.key_length_swa", U32),
    ("attention.value_length_swa", U32),
    ("attention.key_length_mla_swa", U32),
    ("attention.value_length_mla_swa", U32),
    ("attention.kv_lora_rank_swa", U32),
    ("attention.indexer.head_count", U32),
    ("attention.indexer.key_length", U32),
    ("attention.indexer.top_k", U32),
    ("attention.indexer.block_size", U32),
    ("attention.indexer.local_blocks", U32),
    ("attention.indexer.types", List),
    ("attention.output_group_count", U32),
    ("attention.output_lora_rank", U32),
    ("attention.compress_rope_freq_base", F32),
    ("attention.compress_ratios", List),
    ("attention.shared_kv_layers", U32),
    ("attention.recurrent_layers", U32OrList),
    ("hyper_connection.count", U32),
    ("hyper_connection.sinkhorn_iterations", U32),
    ("hyper_connection.epsilon", F32),
    ("rope.dimension_count", U32),
    ("rope.dimension_count_swa", U32),
    ("rope.dimension_sections", List),
    ("rope.freq_base", F32),
    ("rope.freq_base_swa", F32),
    ("rope.scale_linear", F32),
    ("rope.scaling.type", Text),
    ("rope.scaling.factor", F32),
    ("rope.scaling.alpha", F32),
    ("rope.scaling.attn_factor", F32),
    ("rope.scaling.original_context_length", U32),
    ("rope.scaling.finetuned", Bool),
    ("rope.scaling.yarn_log_multiplier", F32),
    ("rope.scaling.yarn_ext_factor", F32),
    ("rope.scaling.yarn_attn_factor", F32),
    ("rope.scaling.yarn_beta_fast", F32),
    ("rope.scaling.yarn_beta_slow", F32),
    ("ssm.conv_kernel", U32),
    ("ssm.inner_size", U32),
    ("ssm.state_size", U32),
    ("ssm.time_step_rank", U32),
    ("ssm.group_count", U32),
    ("ssm.dt_b_c_rms", Bool),
    ("kda.head_dim", U32),
    ("kda.safe_gate", Bool),
    ("kda.gate_lower_bound", F32),
    ("wkv.head_size", U32),
    ("posnet.embedding_length", U32),
    ("posnet.block_count", U32),
    ("convnext.embedding_length", U32),
    ("convnext.block_count", U32),
    ("classifier.output_labels", List),
    ("target_layers", List),
    ("target_hidden_size", U32),
    ("block_size", U32),
    ("sample_from_anchor", Bool),
    ("norm_before_residual", Bool),
    ("norm_before_fc", Bool),
    ("shortconv.l_cache", U32),
    ("dense_2_feat_in", U32),
    ("dense_2_feat_out", U32),
    ("dense_3_feat_in", U32),
    ("dense_3_feat_out", U32),
];

/// Texts about the model: all of `general.` that is not listed otherwise.
const GENERAL_TEXTS: &[&str] = &[
    "type",
    "architecture",
    "name",
    "author",
    "version",
    "organization",
    "finetune",
    "basename",
    "description",
    "quantized_by",
    "size_label",
    "license",
    "license.name",
    "license.link",
    "url",
    "doi",
    "uuid",
    "repo_url",
    "source.url",
    "source.doi",
    "source.uuid",
    "source.repo_url",
    "source.huggingface.repository",
];

/// Namespaces that are no architecture.
const NO_ARCHITECTURE: &[&str] =
    &["general", "tokenizer", "split", "adapter", "xielu", "clip", "imatrix", "lwq", "quantize"];

/// What readers expect of the key, `None` for a key that is not known.
pub(super) fn expected(key: &str) -> Option<Expected> {
    let find = |table: &[(&str, Expected)], key: &str| table.iter().find(|row| row.0 == key).map(|row| row.1);
    if let Some(found) = find(WHOLE, key) {
        return Some(found);
    }
    let (first, rest) = key.split_once('.')?;
    match first {
        "general" => {
            let numbered = |rest: &str| rest.starts_with("base_model.") || rest.starts_with("dataset.");
            (GENERAL_TEXTS.contains(&rest) || numbered(rest)).then_some(Text)
        }
        "tokenizer" if rest.starts_with("ggml.") && rest.ends_with("_token_id") => Some(U32),
        "tokenizer" if rest.starts_with("chat_template.") => Some(Text),
        "clip" => {
            let parts = ["vision.", "audio.", "gen.audio."];
            parts.iter().find_map(|part| rest.strip_prefix(*part)).and_then(|rest| find(OF_ENCODER, rest))
        }
        _ if NO_ARCHITECTURE.contains(&first) => None,
        _ => find(OF_ARCHITECTURE, rest),
    }
}

/// The architecture's part of a key that stands behind an architecture's name.
pub(super) fn architecture_of(key: &str) -> Option<&str> {
    let (first, rest) = key.split_once('.')?;
    let known = !NO_ARCHITECTURE.contains(&first) && OF_ARCHITECTURE.iter().any(|row| row.0 == rest);
    known.then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_found_by_their_namespace() {
        for (key, found) in [
            ("general.name", Some(Text)),
            ("general.base_model.0.name", Some(Text)),
            ("general.base_model.count", Some(U32)),
            ("general.nonsense", None),
            ("tokenizer.ggml.bos_token_id", Some(U32)),
            ("tokenizer.ggml.add_bos_token", Some(Bool)),
            ("tokenizer.chat_template.tool_use", Some(Text)),
            ("llama.rope.freq_base", Some(F32)),
            ("qwen3moe.attention.head_count_kv", Some(U32OrList)),
            ("clip.vision.block_count", Some(U32)),
            ("clip.block_count", None),
            ("adapter.block_count", None),
            ("block_count", None),
            ("", None),
        ] {
            assert_eq!(expected(key), found, "{key}");
        }
        assert_eq!(architecture_of("llama.block_count"), Some("llama"));
        assert_eq!(architecture_of("general.name"), None);
    }

    #[test]
    fn no_key_is_listed_twice() {
        for table in [WHOLE, OF_ENCODER, OF_ARCHITECTURE] {
            let mut keys: Vec<&str> = table.iter().map(|row| row.0).collect();
            keys.sort_unstable();
            assert!(keys.windows(2).all(|pair| pair[0] != pair[1]));
        }
    }
}
