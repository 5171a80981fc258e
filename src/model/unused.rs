//! What a file says of its model and the forward pass leaves aside.
//!
//! A key that changes what the model computes must not be passed over in silence, or figures are those of another model.
//! Keys are told apart by their value: a scale of 1, a count of 0 or what the architecture does anyway change nothing.

use super::arch::{Activation, DenseLayers, Gating, Multipliers, RopeFactors, Sections, SharedExpert, Temperature};
use super::hparams::{Hparams, Mixer, RopeScaling, reads_windowed_base};
use crate::display::printable;
use crate::gguf::{Array, Gguf, Metadata, TensorInfo, TensorType, Value};

/// Keys behind the architecture's name that the forward pass reads, or that play no part in it.
const KNOWN: &[&str] = &[
    "attention.causal",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.key_length_swa",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "attention.value_length_swa",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "expert_feed_forward_length",
    "expert_used_count",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    // No part of the logits.
    "classifier.output_labels",
    "decoder_start_token_id",
    "deepstack_mapping",
    "dense_2_feat_in",
    "dense_2_feat_out",
    "dense_3_feat_in",
    "dense_3_feat_out",
    "embedding_length_out",
    "n_deepstack_layers",
    "pooling_type",
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "vocab_size",
];

/// Keys that count something of which there is always one.
const ONE_IS_NEUTRAL: &[&str] = &[
    "expert_group_count",
    "expert_group_used_count",
    "interleave_moe_layer_step",
    "moe_every_n_layers",
    "num_loops",
    "rope.scaling.alpha",
];

/// Endings of keys that hold a factor, of which 1 changes nothing.
const FACTORS: [&str; 4] = ["scale", "factor", "multiplier", "gain"];

/// More lines than this help nobody.
const MOST_LINES: usize = 20;

/// One line for each key and tensor that would change the figures if the forward pass knew it.
pub(super) fn unused(gguf: &Gguf, hparams: &Hparams) -> Vec<String> {
    let arch = hparams.arch;
    let metadata = gguf.metadata();
    let mut lines = Vec::new();
    for (key, value) in metadata.iter() {
        let Some(suffix) = key.strip_prefix(arch.name).and_then(|rest| rest.strip_prefix('.')) else { continue };
        if !KNOWN.contains(&suffix) && !is_read(suffix, hparams) && !is_neutral(suffix, value, hparams, metadata) {
            let (key, value) = (printable(key), described(value));
            lines.push(format!(
                "metadata key {key} is {value}, which the forward pass of architecture {} ignores; figures may be wrong",
                arch.name
            ));
        }
    }
    for tensor in
        gguf.tensors().iter().filter(|tensor| has_rope_factors(tensor, arch.rope.factors != RopeFactors::None))
    {
        if !is_all_ones(gguf, tensor) {
            lines.push(format!(
                "tensor {}: the forward pass of architecture {} ignores it; figures may be wrong",
                tensor.shown_name(),
                arch.name
            ));
        }
    }
    if lines.len() > MOST_LINES {
        let more = lines.split_off(MOST_LINES).len();
        lines.push(format!("{more} more keys and tensors are ignored"));
    }
    lines
}

/// Keys that the forward pass reads for some architectures only.
fn is_read(suffix: &str, hparams: &Hparams) -> bool {
    let arch = hparams.arch;
    let row = &arch.feed_forward;
    match suffix {
        "attention.sliding_window" | "attention.sliding_window_pattern" => {
            arch.attention.sliding.is_some_and(|s| s.only_with_layers.is_none_or(|layers| layers == hparams.n_layer()))
        }
        "attn_logit_softcapping" => arch.attention.score_cap.is_some(),
        "final_logit_softcapping" => arch.logit_cap.is_some(),
        "expert_shared_feed_forward_length" => !matches!(row.shared, SharedExpert::None | SharedExpert::Counted),
        "expert_shared_count" => matches!(row.shared, SharedExpert::Counted | SharedExpert::CountedWide),
        "expert_gating_func" => row.routing_keys.function,
        "expert_weights_norm" => row.routing_keys.norm,
        "expert_weights_scale" => row.routing_keys.scale,
        "expert_group_count" | "expert_group_used_count" => row.selection_bias,
        // Experts are found by their routers.
        "leading_dense_block_count" | "interleave_moe_layer_step" => row.dense_layers != DenseLayers::None,
        "rope.freq_base_swa" => reads_windowed_base(arch),
        "rope.dimension_count_swa" => arch.attention.sliding.is_some(),
        "embedding_scale" | "residual_scale" | "logit_scale" => {
            matches!(arch.multipliers, Multipliers::ByKeys | Multipliers::MiniCpm)
        }
        "attention.scale" => arch.multipliers == Multipliers::ByKeys,
        "rope.dimension_sections" => arch.rope.sections != Sections::None,
        "rope.scaling.yarn_beta_fast" | "rope.scaling.yarn_beta_slow" | "rope.scaling.yarn_log_multiplier" => {
            arch.rope.yarn_keys
        }
        "rope.scaling.alpha" => arch.rope.base_by_alpha,
        "attention.temperature_scale" => arch.attention.temperature == Temperature::ByKey,
        "attention.value_scale" => arch.attention.own_value_size,
        "attention.shared_kv_layers" => arch.attention.shares_keys,
        "attention.recurrent_layers" | "full_attention_interval" => arch.delta_net.is_some(),
        "embedding_length_per_layer_input" => arch.layer_inputs,
        "nextn_predict_layers" => arch.next_tokens,
        "swiglu_clamp_exp" | "swiglu_clamp_shexp" => row.clamped,
        _ => suffix.starts_with("ssm.") && arch.delta_net.is_some(),
    }
}

/// True if the value says what the forward pass does without it.
fn is_neutral(suffix: &str, value: &Value, hparams: &Hparams, metadata: &Metadata) -> bool {
    let arch = hparams.arch;
    let number = number(value);
    let is = |wanted: f64| number.is_some_and(|found| (found - wanted).abs() <= 1e-6 * wanted.abs());
    let gating = hparams.experts.map(|experts| experts.gating);
    let attention = || {
        hparams.layers.iter().filter_map(|layer| match &layer.mixer {
            Mixer::Attention(shape) => Some(shape),
            Mixer::DeltaNet(_) => None,
        })
    };
    let has_windows = attention().any(|shape| shape.window.is_some());
    let rope = attention().find_map(|shape| shape.rope);
    if is_nothing(value) && suffix != "expert_weights_norm" {
        return true;
    }
    match suffix {
        // All norms here are RMS norms.
        "attention.layer_norm_epsilon" => is(f64::from(hparams.norm_epsilon)),
        "attention.scale" => attention().all(|shape| is(f64::from(shape.score_scale))),
        "attention.sliding_window" => number.is_some_and(|window| window >= hparams.n_ctx_train as f64),
        // Without effect where there is no window; that of the window itself is told.
        "attention.sliding_window_pattern" => !metadata.contains(&format!("{}.attention.sliding_window", arch.name)),
        "expert_gating_func" => match gating {
            None | Some(Gating::Softmax | Gating::SoftmaxNormalized) => is(1.0),
            Some(Gating::Sigmoid | Gating::SigmoidNormalized) => is(2.0),
            Some(Gating::SoftmaxOfChosen) => is(3.0),
            Some(Gating::SqrtSoftplus | Gating::SqrtSoftplusNormalized) => is(4.0),
        },
        "expert_weights_norm" => match (gating, value) {
            (None | Some(Gating::SoftmaxOfChosen), _) => true,
            (Some(gating), Value::Bool(norm)) => *norm == gating.is_normalized(),
            _ => false,
        },
        "expert_shared_count" => arch.feed_forward.shared != SharedExpert::None,
        "hidden_activation" => match value {
            Value::String(name) => same_activation(name, arch.feed_forward.activation),
            _ => false,
        },
        "rope.freq_base_swa" => rope.is_none_or(|rope| is(f64::from(rope.base))),
        "rope.dimension_count_swa" => !has_windows || rope.is_none_or(|rope| is(rope.n_rot as f64)),
        "rope.scaling.yarn_beta_fast" => is(32.0) || hparams.rope.scaling != RopeScaling::Yarn,
        "rope.scaling.yarn_beta_slow" => is(1.0) || hparams.rope.scaling != RopeScaling::Yarn,
        "rope.scaling.yarn_ext_factor" => is(1.0) || is(-1.0) || hparams.rope.scaling != RopeScaling::Yarn,
        "rope.scaling.yarn_log_multiplier" => false,
        "swiglu_clamp_exp" => arch.feed_forward.activation == Activation::SwigluOai && is(7.0),
        _ if ONE_IS_NEUTRAL.contains(&suffix) => is(1.0),
        _ => FACTORS.iter().any(|ending| suffix.ends_with(ending)) && is(1.0),
    }
}

fn same_activation(name: &[u8], activation: Activation) -> bool {
    match activation {
        Activation::Silu => [&b"silu"[..], b"swish"].contains(&name),
        Activation::Gelu => name.starts_with(b"gelu") && !name.starts_with(b"gelu_erf"),
        Activation::SwigluOai => name == b"swiglu_oai" || name == b"silu",
    }
}

fn number(value: &Value) -> Option<f64> {
    match value {
        Value::F32(number) => Some(f64::from(*number)),
        Value::F64(number) => Some(*number),
        other => other.as_integer().map(|number| number as f64),
    }
}

/// Zero, false, empty, or an array of nothing but these.
fn is_nothing(value: &Value) -> bool {
    /// Longer arrays hold nothing of a model's layers.
    const LONGEST: u64 = 1 << 16;
    let none = |array: &Array| array.len() <= LONGEST && array.iter().all(|item| is_nothing(&item));
    match value {
        Value::Bool(flag) => !flag,
        Value::String(text) => text.is_empty(),
        Value::Array(array) => none(array),
        other => number(other) == Some(0.0),
    }
}

fn described(value: &Value) -> String {
    const LONGEST: usize = 40;
    match value {
        Value::Bool(flag) => flag.to_string(),
        Value::F32(number) => number.to_string(),
        Value::F64(number) => number.to_string(),
        Value::String(text) => {
            let text: String = String::from_utf8_lossy(text).chars().take(LONGEST).collect();
            format!("{:?}", printable(&text))
        }
        Value::Array(array) => format!("an array of {}", array.len()),
        other => other.as_integer().map_or_else(|| "of an unknown type".to_owned(), |number| number.to_string()),
    }
}

/// Tensors of rotary factors that are not read: those of a block, and all where the architecture has none.
fn has_rope_factors(tensor: &TensorInfo, are_read: bool) -> bool {
    let name = tensor.name.as_str();
    let read = ["rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"];
    (name.contains("rope_freqs.") || name.contains("rope_factors_")) && !(are_read && read.contains(&name))
}

/// Factors of one change nothing.
fn is_all_ones(gguf: &Gguf, tensor: &TensorInfo) -> bool {
    /// Far above half of any head.
    const MOST: u64 = 1 << 16;
    if tensor.ty != TensorType::F32 || tensor.elements() > MOST {
        return false;
    }
    gguf.data(tensor).is_ok_and(|data| data.as_chunks::<4>().0.iter().all(|bytes| f32::from_le_bytes(*bytes) == 1.0))
}
