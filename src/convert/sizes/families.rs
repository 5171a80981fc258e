//! Steps of the layout that only some classes have.

use serde_json::Value;

use super::{Linear, Sizes, layer_types};
use crate::convert::ConvertError;
use crate::convert::config::Config;

/// Largest number of heads of a delta net, and largest size of one, that are believed.
const MAX_LINEAR: u64 = 1 << 20;

/// Delta nets in all but every so many layers.
pub(in crate::convert) fn delta_nets(config: &Config, sizes: &mut Sizes) -> Result<(), ConvertError> {
    sizes.linear = Linear {
        key_heads: config.count("linear_num_key_heads")?,
        key_head: config.count("linear_key_head_dim")?,
        value_heads: config.count("linear_num_value_heads")?,
        value_head: config.count("linear_value_head_dim")?,
        kernel: config.count("linear_conv_kernel_dim")?,
    };
    let Linear { key_heads, key_head, value_heads, value_head, kernel } = sizes.linear;
    if [key_heads, key_head, value_heads, value_head, kernel].iter().any(|size| *size > MAX_LINEAR) {
        return Err(config.wrong("linear_num_key_heads", "or a field beside it is no size of a delta net's heads"));
    }
    if !value_heads.is_multiple_of(key_heads) {
        let problem = format!("is {value_heads}, expected a multiple of linear_num_key_heads, {key_heads}");
        return Err(config.wrong("linear_num_value_heads", problem));
    }
    let every = config.optional_count("full_attention_interval")?.unwrap_or(4);
    let types = layer_types(config, "layer_types")?;
    for (number, block) in (0u64..).zip(&mut sizes.blocks) {
        let usual = !(number + 1).is_multiple_of(every);
        let named = types.as_ref().and_then(|types| types.get(number as usize));
        block.recurrent = named.map_or(usual, |kind| *kind == "linear_attention");
        if block.recurrent != usual {
            let problem = format!(
                "has {} in place {number}; GGUF has full attention in every {every}th layer",
                named.unwrap_or(&"nothing")
            );
            return Err(config.wrong("layer_types", problem));
        }
    }
    Ok(())
}

/// Gemma 4: two sizes of heads, keys shared between layers, experts beside dense networks, inputs for each layer.
pub(in crate::convert) fn gemma4(config: &Config, sizes: &mut Sizes) -> Result<(), ConvertError> {
    let Some(types) = layer_types(config, "layer_types")? else {
        return Err(config.wrong("layer_types", "is missing; Gemma 4 needs it, take the model's own config.json"));
    };
    if types.len() as u64 != sizes.layers {
        let problem = format!("has {} entries, expected {}, one for each layer", types.len(), sizes.layers);
        return Err(config.wrong("layer_types", problem));
    }
    let full_head = full_attention(config, &types, "global_head_dim", "head_dim")?;
    let full_head = full_head.ok_or_else(|| config.wrong("global_head_dim", "is missing; Gemma 4 needs it"))?;
    let full_keys = full_attention(config, &types, "num_global_key_value_heads", "num_key_value_heads")?;
    let shared = u64::from(config.optional_u32("num_kv_shared_layers")?.unwrap_or(0)).min(sizes.layers);
    let first_shared = sizes.layers - shared;
    let (values_are_keys, wide) = (config.bool("attention_k_eq_v"), config.bool("use_double_wide_mlp"));
    let experts = config.bool("enable_moe_block");
    for ((number, block), kind) in (0..).zip(&mut sizes.blocks).zip(types) {
        block.window = kind == "sliding_attention";
        if !block.window {
            (block.head, block.value_head) = (full_head, full_head);
            block.key_heads = full_keys.unwrap_or(block.key_heads);
            block.own_values = !values_are_keys;
        }
        block.own_keys = number < first_shared;
        if wide && !block.own_keys {
            block.feed_forward *= 2;
        }
        block.experts = experts && sizes.experts > 0;
    }
    if !experts {
        sizes.experts = 0;
    }
    sizes.per_layer = config.optional_u32("hidden_size_per_layer_input")?.unwrap_or(0).into();
    sizes.per_layer_vocab = config.optional_count("vocab_size_per_layer_input")?.unwrap_or(sizes.vocab);
    Ok(())
}

/// A number for layers that see everything: a field of its own, or what `per_layer_config` says of the first of them.
pub(in crate::convert) fn full_attention(
    config: &Config,
    types: &[&str],
    field: &str,
    inner: &str,
) -> Result<Option<u64>, ConvertError> {
    if let Some(own) = config.optional_count(field)? {
        return Ok(Some(own));
    }
    let Some(layers) = config.get("per_layer_config").and_then(Value::as_object) else { return Ok(None) };
    let found = layers.iter().find_map(|(number, layer)| {
        let full = types.get(number.parse::<usize>().ok()?) == Some(&"full_attention");
        layer.get(inner).filter(|_| full).and_then(Value::as_u64)
    });
    match found {
        Some(number) if number == 0 || number > 1 << 31 => {
            Err(config.wrong("per_layer_config", format!("has {inner} {number}, expected a size")))
        }
        found => Ok(found),
    }
}

/// The first of a list of equal counts, or a count: Hunyuan has one for each layer.
pub(in crate::convert) fn equal_counts(config: &Config, field: &str) -> Result<Option<u64>, ConvertError> {
    let Some(Value::Array(list)) = config.get(field) else {
        return Ok(config.optional_u32(field)?.map(u64::from));
    };
    let first = list.first().and_then(Value::as_u64).filter(|count| *count <= 1 << 24);
    let equal = first.is_some_and(|first| list.iter().all(|count| count.as_u64() == Some(first)));
    match (first, equal) {
        (Some(first), true) => Ok(Some(first)),
        _ => Err(config.wrong(field, "is no list of equal counts, of which GGUF has one for all layers")),
    }
}

/// Hunyuan's experts, whose width stands in a list.
pub(in crate::convert) fn hunyuan_experts(config: &Config, sizes: &mut Sizes) -> Result<(), ConvertError> {
    let width = equal_counts(config, "moe_intermediate_size")?.filter(|width| *width > 0);
    sizes.expert_width = width
        .ok_or_else(|| config.wrong("moe_intermediate_size", "is missing; this is no complete model configuration"))?;
    let shared = equal_counts(config, "num_shared_expert")?.unwrap_or(0);
    sizes.shared_width = sizes.feed_forward * shared.min(1 << 16);
    Ok(())
}

/// Step 3.5: two numbers of heads, experts in the layers of a list.
pub(in crate::convert) fn step(config: &Config, sizes: &mut Sizes) -> Result<(), ConvertError> {
    sizes.add_nextn(
        config,
        "num_nextn_predict_layers",
        config.optional_u32("num_nextn_predict_layers")?.unwrap_or(0).into(),
    )?;
    let types = layer_types(config, "layer_types")?.unwrap_or_default();
    let other = config.get("attention_other_setting").cloned().unwrap_or_default();
    let number = |field: &str, usual: u64| {
        let found = other.get(field).and_then(Value::as_u64).filter(|number| (1..1 << 24).contains(number));
        found.unwrap_or(usual)
    };
    let heads = number("num_attention_heads", sizes.heads);
    let key_heads = number("num_attention_groups", sizes.key_heads);
    let with_experts = step_expert_layers(config)?;
    for (number, block) in (0u64..).zip(&mut sizes.blocks) {
        block.window = types.get(number as usize) == Some(&"sliding_attention");
        if block.window {
            (block.heads, block.key_heads) = (heads, key_heads);
        }
        if let Some(layers) = &with_experts {
            block.experts = layers.contains(&number);
        }
    }
    sizes.shared_width = config.count("share_expert_dim")?;
    Ok(())
}

/// The layers that have experts, where they are listed.
pub(in crate::convert) fn step_expert_layers(config: &Config) -> Result<Option<Vec<u64>>, ConvertError> {
    let Some(text) = config.str("moe_layers_enum").filter(|text| !text.trim().is_empty()) else { return Ok(None) };
    let layers: Result<Vec<u64>, _> = text.split(',').map(|number| number.trim().parse::<u64>()).collect();
    layers.map(Some).map_err(|_| config.wrong("moe_layers_enum", "is no list of numbers, separated by commas"))
}

/// MiMo 2: values of a size of their own, two numbers of key heads, experts in the layers of a list. No field says that
/// all its models have three blocks of further tokens.
pub(in crate::convert) fn mimo(config: &Config, sizes: &mut Sizes) -> Result<(), ConvertError> {
    let (value_head, window_keys) = (config.count("v_head_dim")?, config.count("swa_num_key_value_heads")?);
    for (field, usual) in [
        ("swa_head_dim", "head_dim"),
        ("swa_num_attention_heads", "num_attention_heads"),
        ("swa_v_head_dim", "v_head_dim"),
    ] {
        if config.optional_count(field)? != config.optional_count(usual)? {
            return Err(config.wrong(field, format!("is not {usual}; GGUF has one of them for all layers")));
        }
    }
    let windows = numbers(config, "hybrid_layer_pattern", sizes.layers)?;
    let experts = numbers(config, "moe_layer_freq", sizes.layers)?;
    for ((block, window), experts) in sizes.blocks.iter_mut().zip(windows).zip(experts) {
        block.window = window == 1;
        block.experts = experts != 0;
    }
    sizes.add_nextn(config, "hybrid_layer_pattern", 3)?;
    for block in &mut sizes.blocks {
        block.window |= block.nextn;
        block.value_head = value_head;
        if block.window {
            block.key_heads = window_keys;
        }
    }
    Ok(())
}

/// A list with a number for each layer.
fn numbers(config: &Config, field: &str, layers: u64) -> Result<Vec<u64>, ConvertError> {
    let list = config.get(field).and_then(Value::as_array);
    let list = list.and_then(|list| list.iter().map(Value::as_u64).collect::<Option<Vec<u64>>>());
    match list {
        Some(list) if list.len() as u64 == layers => Ok(list),
        _ => Err(config.wrong(field, format!("is no list of {layers} numbers, one for each layer"))),
    }
}

/// Llama 4: experts in every so many layers, beside one that is always there.
pub(in crate::convert) fn llama4(config: &Config, sizes: &mut Sizes) -> Result<(), ConvertError> {
    sizes.shared_width = sizes.expert_width;
    let Some(list) = config.get("moe_layers").and_then(Value::as_array) else { return Ok(()) };
    let every = config.optional_count("interleave_moe_layer_step")?.unwrap_or(1);
    for (number, block) in (0u64..).zip(&mut sizes.blocks) {
        let listed = list.iter().any(|layer| layer.as_u64() == Some(number));
        if listed != (number + 1).is_multiple_of(every) {
            let problem =
                format!("names other layers than interleave_moe_layer_step, {every}, implies; GGUF has no list");
            return Err(config.wrong("moe_layers", problem));
        }
        block.experts = listed;
    }
    Ok(())
}

/// Layers with a window by `layer_types`, by a pattern, or all but every fourth.
pub(in crate::convert) fn windows(config: &Config, sizes: &mut Sizes) -> Result<(), ConvertError> {
    if config.get("sliding_window").is_none() {
        return Ok(());
    }
    let types = layer_types(config, "layer_types")?;
    let every = config.get("sliding_window_pattern").and_then(Value::as_u64).unwrap_or(4).max(1);
    let letters = config.str("sliding_window_pattern").map(str::as_bytes).filter(|letters| !letters.is_empty());
    for (number, block) in sizes.blocks.iter_mut().enumerate() {
        block.window = match (&types, letters) {
            (Some(types), _) => types.get(number) == Some(&"sliding_attention"),
            (None, Some(letters)) => letters[number % letters.len()] == b'L',
            (None, None) => !(number as u64 + 1).is_multiple_of(every),
        };
    }
    Ok(())
}
