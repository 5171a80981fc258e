//! Keys that only some classes have.

use serde_json::Value;

use super::{Keys, RopeFactors, Source, common, rope, write_causality};
use crate::convert::ConvertError;
use crate::convert::sizes::{self, Block};

/// Llama, Mistral and Mixtral.
pub(in crate::convert) fn llama(source: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
    common(source, keys)?;
    keys.u32("vocab_size", source.sizes.vocab);
    keys.u32("rope.dimension_count", source.sizes.head);
    rope::write_llama3_factors(source, keys)
}

/// Granite: what its configuration calls multipliers.
pub(in crate::convert) fn granite(source: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
    llama(source, keys)?;
    // Granite has no head size of its own.
    keys.remove("attention.key_length");
    keys.remove("attention.value_length");
    for (field, suffix) in [
        ("attention_multiplier", "attention.scale"),
        ("embedding_multiplier", "embedding_scale"),
        ("residual_multiplier", "residual_scale"),
        ("logits_scaling", "logit_scale"),
    ] {
        if let Some(factor) = source.config.optional_f64(field)?.filter(|factor| *factor != 0.0) {
            keys.f32(suffix, factor);
        }
    }
    Ok(())
}

/// Gemma 1 and 2.
pub(in crate::convert) fn gemma(source: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
    let Source { arch, config, sizes, .. } = source;
    write_causality(config, keys);
    keys.u32("context_length", config.count("max_position_embeddings")?);
    keys.u32("embedding_length", sizes.width);
    keys.u32("block_count", sizes.layers);
    keys.u32("feed_forward_length", sizes.feed_forward);
    keys.u32("attention.head_count", sizes.heads);
    keys.u32("attention.head_count_kv", sizes.key_heads);
    keys.f32("attention.layer_norm_rms_epsilon", config.f64("rms_norm_eps")?);
    keys.u32("attention.key_length", sizes.head);
    keys.u32("attention.value_length", sizes.head);
    if arch.attention.score_cap.is_some() {
        keys.f32("attn_logit_softcapping", config.f64("attn_logit_softcapping")?);
    }
    if arch.logit_cap.is_some() {
        keys.f32("final_logit_softcapping", config.f64("final_logit_softcapping")?);
    }
    if arch.attention.sliding.is_some() {
        keys.u32("attention.sliding_window", config.count("sliding_window")?);
    }
    Ok(())
}

/// Gemma 3.
pub(in crate::convert) fn gemma3(source: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
    common(source, keys)?;
    let Source { config, sizes, rope, .. } = source;
    keys.u32("attention.key_length", sizes.head);
    keys.u32("attention.value_length", sizes.head);
    keys.f32("rope.freq_base", rope.number(config, "rope_theta")?.unwrap_or(1_000_000.0));
    if config.get("attn_logit_softcapping").is_some() {
        return Err(config.wrong("attn_logit_softcapping", "is set, which Gemma 3 does not know; set it to null"));
    }
    if let Some(cap) = config.optional_f64("final_logit_softcapping")?.filter(|cap| *cap != 0.0) {
        keys.f32("final_logit_softcapping", cap);
    }
    if config.optional_u32("sliding_window_pattern")? != Some(1) {
        keys.u32("attention.sliding_window", config.count("sliding_window")?);
    }
    Ok(())
}

/// Phi-3 and Phi-4.
pub(in crate::convert) fn phi3(source: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
    let Source { config, sizes, rope, .. } = source;
    let context = config.count("max_position_embeddings")?;
    let original = rope.required(config, "original_max_position_embeddings")?;
    if !(1.0..=f64::from(u32::MAX)).contains(&original) || original.fract() != 0.0 {
        let problem = format!("is {original}, expected a context length");
        return Err(config.wrong("original_max_position_embeddings", problem));
    }
    write_causality(config, keys);
    let rotated = sizes.rotated(config, rope)?;
    let (long, short) = (rope.numbers(config, "long_factor")?, rope.numbers(config, "short_factor")?);
    if !long.is_empty() {
        let scale = context as f64 / original;
        let attention = match rope.kind().as_deref() {
            Some("su" | "longrope") if scale > 1.0 => (1.0 + scale.ln() / original.ln()).sqrt(),
            Some("yarn") if scale > 1.0 => 0.1 * scale.ln() + 1.0,
            Some("su" | "longrope" | "yarn") => 1.0,
            _ => {
                let field = format!("{}.rope_type", rope.key);
                return Err(config.wrong(&field, "is not longrope, su or yarn, though long_factor is given"));
            }
        };
        for (name, list) in [("long_factor", &long), ("short_factor", &short)] {
            if list.len() as u64 * 2 != rotated {
                let problem =
                    format!("has {} values, expected {}, half of the rotated part of a head", list.len(), rotated / 2);
                return Err(config.wrong(&format!("{}.{name}", rope.key), problem));
            }
        }
        keys.f32("rope.scaling.attn_factor", attention);
        keys.factors.push(RopeFactors { tensor: "rope_factors_long.weight", values: long });
        keys.factors.push(RopeFactors { tensor: "rope_factors_short.weight", values: short });
    }
    keys.u32("context_length", context);
    keys.u32("rope.scaling.original_context_length", original as u64);
    keys.u32("embedding_length", sizes.width);
    keys.u32("feed_forward_length", sizes.feed_forward);
    keys.u32("block_count", sizes.layers);
    keys.u32("attention.head_count", sizes.heads);
    keys.u32("attention.head_count_kv", sizes.key_heads);
    keys.f32("attention.layer_norm_rms_epsilon", config.f64("rms_norm_eps")?);
    keys.u32("rope.dimension_count", rotated);
    keys.f32("rope.freq_base", rope.required(config, "rope_theta")?);
    // 0 tells Phi-4, which has no window, from Phi-3.
    keys.u32("attention.sliding_window", config.optional_u32("sliding_window")?.unwrap_or(0).into());
    Ok(())
}

/// Layers of the text part that get features of the image, where Qwen3-VL is its model.
pub(in crate::convert) fn deepstack(source: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
    let layers = source.config.get("vision_config").and_then(|vision| vision.get("deepstack_visual_indexes"));
    keys.u32("n_deepstack_layers", layers.and_then(Value::as_array).map_or(0, Vec::len) as u64);
    Ok(())
}

/// OLMoE's epsilon, which the reference does not take from the configuration.
pub(in crate::convert) fn fixed_epsilon(_: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
    keys.f32("attention.layer_norm_rms_epsilon", 1e-5);
    Ok(())
}

/// The reference's rule for the width of ERNIE's shared experts.
pub(in crate::convert) fn ernie_shared_width(source: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
    let (width, written) = (source.sizes.shared_width, source.sizes.feed_forward / source.sizes.key_heads);
    if width == 0 {
        return Ok(());
    }
    keys.u32("expert_shared_feed_forward_length", written);
    if width != written {
        keys.warnings.push(format!(
            "the shared experts are {width} wide, but expert_shared_feed_forward_length becomes {written}, intermediate_size by \
             num_key_value_heads, as from llama.cpp's converter; llama.cpp will refuse the file"
        ));
    }
    Ok(())
}

/// A delta net's sizes, and which layers have attention instead.
pub(in crate::convert) fn delta_net(source: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
    let (config, linear) = (source.config, &source.sizes.linear);
    if linear.key_head != linear.value_head {
        let (key, value) = (linear.key_head, linear.value_head);
        keys.warnings.push(format!(
            "linear_value_head_dim is {value} and linear_key_head_dim {key}; llama.cpp computes delta nets of one size only"
        ));
    }
    keys.u32("ssm.conv_kernel", linear.kernel);
    keys.u32("ssm.state_size", linear.key_head);
    keys.u32("ssm.group_count", linear.key_heads);
    keys.u32("ssm.time_step_rank", linear.value_heads);
    keys.u32("ssm.inner_size", linear.value_head * linear.value_heads);
    keys.u32("full_attention_interval", config.optional_count("full_attention_interval")?.unwrap_or(4));
    Ok(())
}

/// Gemma 4, on top of Gemma 3.
pub(in crate::convert) fn gemma4(source: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
    let Source { config, sizes, .. } = source;
    gemma3(source, keys)?;
    keys.u32("attention.shared_kv_layers", config.optional_u32("num_kv_shared_layers")?.unwrap_or(0).into());
    keys.u32("embedding_length_per_layer_input", sizes.per_layer);
    keys.flags("attention.sliding_window_pattern", sizes.blocks.iter().map(|block| block.window));
    let types = sizes::layer_types(config, "layer_types")?.unwrap_or_default();
    let full_head = sizes::full_attention(config, &types, "global_head_dim", "head_dim")?.unwrap_or(sizes.head);
    for suffix in ["attention.key_length", "attention.value_length"] {
        keys.u32(suffix, full_head);
        keys.u32(&format!("{suffix}_swa"), sizes.head);
    }
    let width = match config.optional_count("expert_intermediate_size")? {
        None => config.optional_count("moe_intermediate_size")?,
        width => width,
    };
    if let Some(width) = width {
        keys.u32("expert_feed_forward_length", width);
    }
    if config.bool("use_double_wide_mlp") {
        keys.counts("feed_forward_length", sizes.blocks.iter().map(|block| block.feed_forward));
    }
    if sizes::full_attention(config, &types, "num_global_key_value_heads", "num_key_value_heads")?.is_some() {
        keys.counts("attention.head_count_kv", sizes.blocks.iter().map(|block| block.key_heads));
    }
    keys.u32("rope.dimension_count", full_head);
    keys.u32("rope.dimension_count_swa", sizes.head);
    write_proportional(source, full_head, keys)
}

/// Layers that see everything rotate only a part of the pairs: the others get a factor that stops them.
fn write_proportional(source: &Source, head: u64, keys: &mut Keys) -> Result<(), ConvertError> {
    const STOPPED: f32 = 1e30;
    let Source { config, rope, .. } = source;
    if rope.kind().as_deref() != Some("proportional") {
        let field = format!("{}.full_attention.rope_type", rope.key);
        return Err(config.wrong(&field, "is not proportional, which llama.cpp computes Gemma 4 with"));
    }
    let part = rope.required(config, "partial_rotary_factor")?;
    if !(0.0..=1.0).contains(&part) {
        return Err(config.wrong("partial_rotary_factor", format!("is {part}, expected 0 to 1")));
    }
    let rotated = (head as f64 * part / 2.0) as usize;
    let values = (0..head as usize / 2).map(|pair| if pair < rotated { 1.0 } else { STOPPED }).collect();
    keys.factors.push(RopeFactors { tensor: "rope_freqs.weight", values });
    Ok(())
}

/// Width of Bailing's shared experts.
pub(in crate::convert) fn bailing_shared_width(source: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
    keys.u32("expert_shared_feed_forward_length", source.sizes.shared_width);
    Ok(())
}

/// Factors of Llama 3's kind, where the configuration asks for them.
pub(in crate::convert) fn llama3_factors(source: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
    rope::write_llama3_factors(source, keys)
}

/// EXAONE-MoE: it takes its rotary embedding without scaling, and always tells the blocks of further tokens.
pub(in crate::convert) fn exaone_moe(source: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
    keys.u32("expert_shared_feed_forward_length", source.sizes.shared_width);
    keys.str("rope.scaling.type", "none");
    if source.sizes.dropped == 0 {
        keys.u32("nextn_predict_layers", source.sizes.nextn());
    }
    Ok(())
}

/// The context that Hunyuan's scaled base is made for.
const HUNYUAN_CONTEXT: u64 = 256 * 1024;

/// Hunyuan's rotary embedding: a larger base instead of what its configuration calls dynamic.
fn hunyuan_rope(source: &Source, usual_alpha: f64, with_context: bool, keys: &mut Keys) -> Result<(), ConvertError> {
    let Source { config, sizes, rope, .. } = source;
    let alpha = rope.number(config, "alpha")?.unwrap_or(usual_alpha);
    let base = rope.number(config, "rope_theta")?.unwrap_or(10_000.0);
    let head = sizes.head as f64;
    keys.f32("rope.freq_base", base * alpha.powf(head / (head - 2.0)));
    keys.str("rope.scaling.type", "none");
    keys.f32("rope.scaling.factor", 1.0);
    if with_context {
        let context = config.count("max_position_embeddings")?;
        if base != 10_000.0 || ![32 * 1024, HUNYUAN_CONTEXT].contains(&context) {
            let problem = format!(
                "of type dynamic is known for rope_theta 10000 and contexts of 32768 and 262144, not {base} and {context}"
            );
            return Err(config.wrong(rope.key, problem));
        }
        keys.u32("rope.scaling.original_context_length", HUNYUAN_CONTEXT);
        keys.u32("context_length", HUNYUAN_CONTEXT);
    }
    Ok(())
}

/// Hunyuan without experts.
pub(in crate::convert) fn hunyuan_dense(source: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
    // A count of one expert does not mean that there are experts.
    keys.remove("expert_count");
    match source.rope.kind().as_deref() {
        Some("dynamic") => hunyuan_rope(source, 50.0, true, keys),
        Some("xdrope") => hunyuan_rope(source, 50.0, false, keys),
        _ => Ok(()),
    }
}

/// Hunyuan with experts, whose counts are lists.
pub(in crate::convert) fn hunyuan_moe(source: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
    let Source { config, sizes, .. } = source;
    keys.u32("expert_shared_feed_forward_length", sizes.feed_forward);
    keys.u32("expert_feed_forward_length", sizes.expert_width);
    for (field, suffix) in [("moe_topk", "expert_used_count"), ("num_shared_expert", "expert_shared_count")] {
        let count = sizes::equal_counts(config, field)?;
        let missing = || config.wrong(field, "is missing; this is no complete model configuration");
        keys.u32(suffix, count.ok_or_else(missing)?);
    }
    match source.rope.kind().as_deref() {
        Some("dynamic") => hunyuan_rope(source, 1000.0, true, keys),
        _ => Ok(()),
    }
}

/// Ministral 3 on top of Llama: attention by position.
pub(in crate::convert) fn ministral3(source: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
    let Source { config, rope, .. } = source;
    match config.str("model_type") {
        Some("ministral3") => {
            if rope.kind().as_deref() != Some("yarn") {
                let field = format!("{}.rope_type", rope.key);
                return Err(config.wrong(&field, "is not yarn, which llama.cpp computes Ministral 3 with"));
            }
            keys.f32("rope.scaling.yarn_log_multiplier", rope.required(config, "mscale_all_dim")?);
            keys.f32("attention.temperature_scale", rope.required(config, "llama_4_scaling_beta")?);
            Ok(())
        }
        Some("mistral4") => {
            Err(config
                .wrong("model_type", "is mistral4, which lwq cannot convert; use llama.cpp's convert_hf_to_gguf.py"))
        }
        _ => Ok(()),
    }
}

/// MiniCPM's scales, and its long-context factors.
pub(in crate::convert) fn minicpm(source: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
    let Source { config, sizes, rope, .. } = source;
    let layers = sizes.layers as f64;
    keys.f32("embedding_scale", config.f64("scale_emb")?);
    keys.f32("residual_scale", config.f64("scale_depth")? / layers.sqrt());
    keys.f32("logit_scale", sizes.width as f64 / config.f64("dim_model_base")?);
    let (long, short) = (rope.numbers(config, "long_factor")?, rope.numbers(config, "short_factor")?);
    if long.is_empty() && short.is_empty() {
        return Ok(());
    }
    let pairs = sizes.width / sizes.heads / 2;
    for (name, list) in [("long_factor", &long), ("short_factor", &short)] {
        if list.len() as u64 != pairs {
            let problem = format!("has {} values, expected {pairs}, half of a head", list.len());
            return Err(config.wrong(&format!("{}.{name}", rope.key), problem));
        }
    }
    keys.factors.push(RopeFactors { tensor: "rope_factors_long.weight", values: long });
    keys.factors.push(RopeFactors { tensor: "rope_factors_short.weight", values: short });
    Ok(())
}

/// A list of limits, one for each block; 0 where there is none.
fn limits(source: &Source, field: &str) -> Result<Option<Vec<f32>>, ConvertError> {
    let Some(value) = source.config.get(field) else { return Ok(None) };
    let limit = |value: &Value| match value {
        Value::Null => Ok(0.0),
        value => source.config.number(field, value).map(|limit| limit as f32),
    };
    let list = value.as_array().ok_or_else(|| source.config.wrong(field, "is no list of numbers"))?;
    let mut limits = list.iter().map(limit).collect::<Result<Vec<f32>, _>>()?;
    limits.resize(source.sizes.blocks.len(), 0.0);
    Ok(Some(limits))
}

/// Heads and key heads of each block.
fn heads_by_block(source: &Source, keys: &mut Keys) {
    let each = |of: fn(&Block) -> u64| source.sizes.blocks.iter().map(of);
    keys.counts("attention.head_count", each(|block| block.heads));
    keys.counts("attention.head_count_kv", each(|block| block.key_heads));
}

/// Step 3.5.
pub(in crate::convert) fn step(source: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
    let Source { config, sizes, .. } = source;
    heads_by_block(source, keys);
    keys.u32("attention.sliding_window", config.count("sliding_window")?);
    keys.flags("attention.sliding_window_pattern", sizes.blocks.iter().map(|block| block.window));
    let leading = sizes::step_expert_layers(config)?.and_then(|layers| layers.into_iter().min()).unwrap_or(0);
    keys.u32("leading_dense_block_count", leading);
    keys.u32("moe_every_n_layers", config.optional_count("moe_every_n_layer")?.unwrap_or(1));
    for (field, suffix) in [("swiglu_limits", "swiglu_clamp_exp"), ("swiglu_limits_shared", "swiglu_clamp_shexp")] {
        if let Some(limits) = limits(source, field)? {
            keys.numbers(suffix, &limits);
        }
    }
    step_factors(source, keys)
}

/// Llama 3's factors for the rotated part of layers that see everything; the other pairs stay as they are.
fn step_factors(source: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
    let Source { config, sizes, .. } = source;
    let types = sizes::layer_types(config, "layer_types")?.unwrap_or_default();
    let parts = config.get("partial_rotary_factors").and_then(Value::as_array).cloned().unwrap_or_default();
    let full = types.iter().zip(&parts).find(|(kind, _)| **kind == "full_attention");
    let part = full.and_then(|(_, part)| part.as_f64()).unwrap_or(0.5).clamp(0.0, 1.0);
    rope::write_partial_llama3_factors(source, (sizes.head as f64 * part) as u64, keys)
}

/// MiMo 2.
pub(in crate::convert) fn mimo(source: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
    let Source { config, sizes, rope, .. } = source;
    if config.str("topk_method") != Some("noaux_tc") {
        return Err(config.wrong("topk_method", "is not noaux_tc, by which llama.cpp chooses MiMo 2's experts"));
    }
    keys.counts("attention.head_count_kv", sizes.blocks.iter().map(|block| block.key_heads));
    keys.u32("attention.sliding_window", config.count("sliding_window")?);
    keys.counts("attention.sliding_window_pattern", sizes.blocks.iter().map(|block| u64::from(block.window)));
    keys.u32("attention.value_length", config.count("v_head_dim")?);
    let part = rope.required(config, "partial_rotary_factor")?;
    if !(0.0..=1.0).contains(&part) {
        return Err(config.wrong("partial_rotary_factor", format!("is {part}, expected 0 to 1")));
    }
    keys.u32("rope.dimension_count", (sizes.head as f64 * part) as u64);
    if let Some(scale) = config.optional_f64("attention_value_scale")? {
        keys.f32("attention.value_scale", scale);
    }
    Ok(())
}

/// Llama 4, on top of Llama.
pub(in crate::convert) fn llama4(source: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
    let types = sizes::layer_types(source.config, "layer_types")?;
    if types.is_some_and(|types| types.iter().all(|kind| *kind == "full_attention")) {
        keys.u32("attention.sliding_window", 0);
    }
    Ok(())
}
