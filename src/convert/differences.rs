//! What a configuration asks for and llama.cpp computes otherwise, whatever the file says.

use serde_json::Value;

use super::architectures::{Row, Setting};
use super::config::Config;
use super::sizes::{Sizes, layer_types};
use crate::model::{Activation, Gating, RopeFree};

/// A line for each.
pub(super) fn note(config: &Config, row: &Row, sizes: &Sizes, warnings: &mut Vec<String>) {
    let arch = row.arch;
    let asked = ["hidden_activation", "hidden_act"].iter().find_map(|field| Some((*field, config.str(field)?)));
    let usual: &[&str] = match arch.feed_forward.activation {
        Activation::Silu => &["silu", "swish"],
        Activation::Gelu => &["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"],
        Activation::SwigluOai => &[],
    };
    if let Some((field, activation)) = asked
        && !usual.is_empty()
        && !usual.contains(&activation)
    {
        let activation: String = activation.chars().filter(|c| !c.is_control()).take(40).collect();
        warnings.push(format!("{field} is {activation}; llama.cpp computes {} with {}", arch.name, usual[0]));
    }
    warnings.extend(row.settings.iter().filter_map(|setting| difference(*setting, config, row, sizes)));
}

fn difference(setting: Setting, config: &Config, row: &Row, sizes: &Sizes) -> Option<String> {
    let arch = row.arch;
    match setting {
        Setting::QueryScalar => {
            let scalar = config.optional_f64("query_pre_attn_scalar").ok()??;
            let by_embedding = arch.attention.score_scale.is_by_embedding(sizes.layers as usize);
            let expected = if by_embedding { sizes.width / sizes.heads } else { sizes.head };
            (scalar != expected as f64).then(|| {
                format!("query_pre_attn_scalar is {scalar}; llama.cpp computes with {expected} for this model")
            })
        }
        Setting::SlidingWindow => config
            .bool("use_sliding_window")
            .then(|| format!("use_sliding_window is true; llama.cpp computes {} without a window", arch.name)),
        Setting::RopeLayers => {
            let RopeFree::Every(every) = arch.rope.free else { return None };
            let every = every as u64;
            let usual = |layer: u64| !(layer + 1).is_multiple_of(every);
            let interval = config.get("no_rope_layer_interval").and_then(Value::as_u64).unwrap_or(every);
            let same = match config.get("no_rope_layers").and_then(Value::as_array) {
                Some(layers) => (0..).zip(layers).all(|(layer, rotates)| (rotates.as_u64() == Some(1)) == usual(layer)),
                None => interval == every,
            };
            (!same).then(|| {
                format!("no_rope_layers is not every {every}th layer, as which llama.cpp computes {}", arch.name)
            })
        }
        Setting::FullEvery(every) => {
            let types = layer_types(config, "layer_types").ok()??;
            let full = |(number, kind): (u64, &&str)| number.is_multiple_of(every) == (*kind == "full_attention");
            (!(1..).zip(&types).all(full)).then(|| {
                format!(
                    "layer_types is not full_attention in every {every}th layer, as which llama.cpp computes {}",
                    arch.name
                )
            })
        }
        Setting::Fixed(field, usual) => {
            let (found, usual) = (config.get(field)?, serde_json::from_str::<Value>(usual).unwrap_or_default());
            let same = *found == usual || found.as_f64().is_some_and(|found| usual.as_f64() == Some(found));
            let found: String = found.to_string().chars().filter(|c| !c.is_control()).take(40).collect();
            (!same).then(|| format!("{field} is {found}; llama.cpp computes {} with {usual}", arch.name))
        }
        Setting::NormalizedExperts => {
            let normalizes = arch.feed_forward.mixture.gating() == Some(Gating::SoftmaxNormalized);
            let wanted = config.get("norm_topk_prob")?.as_bool()?;
            (wanted != normalizes)
                .then(|| format!("norm_topk_prob is {wanted}; llama.cpp computes {} with {normalizes}", arch.name))
        }
    }
}
