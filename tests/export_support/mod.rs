//! Folders that the tests of `lwq export` start from, and what is in those that it writes.
#![allow(dead_code)] // each test file uses a part

use std::path::{Path, PathBuf};
use std::process::Output;

use safetensors::{Dtype, SafeTensors};
use serde_json::{Value as Json, json};

use crate::common::{args, doclet, random::Random, run_with, stdout_of};
use crate::convert_support::{Raw, Source, Tensors};

/// All schemes.
pub(crate) const SCHEMES: [&str; 8] =
    ["W4A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16"];

/// The bundled model with its first two layers.
pub(crate) fn two_layers() -> Source {
    let mut source = Source::doclet(&doclet());
    source.config["num_hidden_layers"] = json!(2);
    source.config["torch_dtype"] = json!("float16");
    let is_kept =
        |name: &String| ["layers.2.", "layers.3.", "layers.4.", "layers.5."].iter().all(|l| !name.contains(l));
    source.tensors.retain(|name, _| is_kept(name));
    source
}

/// Bell-shaped numbers.
pub(crate) fn bells(seed: u64, shape: &[usize]) -> Raw {
    let mut random = Random::new(seed);
    let count: usize = shape.iter().product();
    let values = (0..count).flat_map(|_| ((random.bell() * 0.05).to_bits() >> 16).to_le_bytes()[..2].to_vec());
    Raw { dtype: Dtype::BF16, shape: shape.to_vec(), data: values.collect() }
}

/// A folder of one layer with a mixture of experts; `stacked` has all experts in two tensors.
pub(crate) fn mixture(stacked: bool) -> Source {
    let mut source = two_layers();
    source.config = json!({
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 128, "num_hidden_layers": 1,
        "torch_dtype": "bfloat16",
    });
    let mut tensors = Tensors::new();
    let layer = "model.layers.0.";
    for (at, (name, rows)) in [("q", 128), ("k", 64), ("v", 64), ("o", 128)].iter().enumerate() {
        tensors.insert(format!("{layer}self_attn.{name}_proj.weight"), bells(at as u64, &[*rows, 128]));
    }
    tensors.insert("model.embed_tokens.weight".into(), bells(10, &[32, 128]));
    tensors.insert("lm_head.weight".into(), bells(11, &[32, 128]));
    tensors.insert("model.norm.weight".into(), bells(12, &[128]));
    tensors.insert(format!("{layer}mlp.gate.weight"), bells(13, &[4, 128]));
    let (fused, down) = (bells(14, &[4, 256, 128]), bells(15, &[4, 128, 128]));
    let part = |raw: &Raw, first: usize, rows: usize| Raw {
        dtype: raw.dtype,
        shape: vec![rows, 128],
        data: raw.data[first * 256..(first + rows) * 256].to_vec(),
    };
    for expert in 0..4 {
        let name = |part: &str| format!("{layer}mlp.experts.{expert}.{part}_proj.weight");
        if !stacked {
            tensors.insert(name("gate"), part(&fused, expert * 256, 128));
            tensors.insert(name("up"), part(&fused, expert * 256 + 128, 128));
            tensors.insert(name("down"), part(&down, expert * 128, 128));
        }
    }
    if stacked {
        tensors.insert(format!("{layer}mlp.experts.gate_up_proj"), fused);
        tensors.insert(format!("{layer}mlp.experts.down_proj"), down);
    }
    source.tensors = tensors;
    source
}

/// The same with all that it takes to run it.
pub(crate) fn running_mixture(stacked: bool) -> Source {
    let mut source = mixture(stacked);
    let embedding = bells(20, &[2048, 128]);
    source.tensors.insert("model.embed_tokens.weight".into(), embedding.clone());
    source.tensors.insert("lm_head.weight".into(), embedding);
    for norm in ["input_layernorm", "post_attention_layernorm"] {
        source.tensors.insert(format!("model.layers.0.{norm}.weight"), bells(21, &[128]));
    }
    for norm in ["q_norm", "k_norm"] {
        source.tensors.insert(format!("model.layers.0.self_attn.{norm}.weight"), bells(22, &[32]));
    }
    let more = json!({
        "vocab_size": 2048, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 128, "intermediate_size": 128,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "bos_token_id": 0,
        "eos_token_id": 0, "norm_topk_prob": true, "tie_word_embeddings": false,
    });
    source.config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    source
}

/// Runs an export, by plain rounding unless the options name another.
pub(crate) fn export(folder: &Path, output: &Path, options: &[&str]) -> Output {
    let mut arguments = args!["export", folder, output];
    if !options.contains(&"--rounding") {
        arguments.extend(args!["--rounding", "rtn"]);
    }
    run_with(arguments, options)
}

/// Exports a folder by plain rounding; gives the path of the output.
pub(crate) fn exported(folder: &Path, scheme: &str) -> PathBuf {
    let output = folder.with_file_name(format!("out-{scheme}"));
    stdout_of(export(folder, &output, &["--scheme", scheme, "--quiet"]));
    output
}

/// `config.json` of a folder.
pub(crate) fn config_of(folder: &Path) -> Json {
    serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap()
}

/// Tensors of `model.safetensors`.
pub(crate) fn tensors_of(folder: &Path) -> Tensors {
    let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let raw = |view: safetensors::tensor::TensorView<'_>| Raw {
        dtype: view.dtype(),
        shape: view.shape().to_vec(),
        data: view.data().to_vec(),
    };
    file.tensors().into_iter().map(|(name, view)| (name, raw(view))).collect()
}
