//! The bundled model as transformers would save it, made from its GGUF.
#![allow(dead_code)] // each test file uses a part

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lwq::gguf::{Gguf, TensorType};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value as Json, json};

/// Raw values of one tensor.
#[derive(Clone)]
pub(crate) struct Raw {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Vec<u8>,
}

/// Tensors by Hugging Face's names.
pub(crate) type Tensors = BTreeMap<String, Raw>;

/// A model folder with the files that a test changes before the program sees them.
pub(crate) struct Source {
    pub(crate) config: Json,
    pub(crate) tokenizer: Json,
    pub(crate) tokenizer_config: Json,
    pub(crate) tensors: Tensors,
}

const LAYER_NAMES: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

fn source_name(name: &str) -> String {
    match name {
        "token_embd.weight" => return "model.embed_tokens.weight".into(),
        "output_norm.weight" => return "model.norm.weight".into(),
        _ => {}
    }
    let parts: Vec<&str> = name.split('.').collect();
    let (_, theirs) = LAYER_NAMES.iter().find(|(ours, _)| *ours == parts[2]).expect("a known tensor");
    format!("model.layers.{}.{theirs}.weight", parts[1])
}

/// Undoes the order of rows that GGUF's llama has: row `s * n / 2 + i` of a head is row `2i + s` there.
pub(crate) fn unpermute(data: &[u8], heads: usize, rows: usize) -> Vec<u8> {
    let row_bytes = data.len() / rows;
    let head_rows = rows / heads;
    let mut out = Vec::with_capacity(data.len());
    for row in 0..rows {
        let (head, inside) = (row / head_rows, row % head_rows);
        let (half, pair) = (inside / (head_rows / 2), inside % (head_rows / 2));
        let from = (head * head_rows + 2 * pair + half) * row_bytes;
        out.extend_from_slice(&data[from..from + row_bytes]);
    }
    out
}

impl Source {
    /// Reads the bundled model.
    pub(crate) fn doclet(path: &Path) -> Source {
        let gguf = Gguf::open(path).unwrap();
        let mut tensors = Tensors::new();
        for tensor in gguf.tensors() {
            let shape: Vec<usize> = tensor.shape.iter().rev().map(|dim| *dim as usize).collect();
            let data = gguf.data(tensor).unwrap();
            let data = match tensor.name.split('.').nth(2) {
                Some("attn_q") => unpermute(data, 4, shape[0]),
                Some("attn_k") => unpermute(data, 2, shape[0]),
                _ => data.to_vec(),
            };
            let dtype = if tensor.ty == TensorType::F32 { Dtype::F32 } else { Dtype::F16 };
            tensors.insert(source_name(&tensor.name), Raw { dtype, shape, data });
        }
        let strings = |key: &str| -> Vec<String> {
            let array = gguf.metadata().array(key).unwrap().unwrap();
            array.iter_str().unwrap().map(|text| String::from_utf8(text.to_vec()).unwrap()).collect()
        };
        let tokens = strings("tokenizer.ggml.tokens");
        let added: Vec<Json> =
            (0..3).map(|id| json!({ "id": id, "content": tokens[id], "special": true, "normalized": false })).collect();
        let vocab: serde_json::Map<String, Json> =
            tokens.iter().enumerate().map(|(id, text)| (text.clone(), json!(id))).collect();
        Source {
            config: json!({
                "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 2048, "hidden_size": 256,
                "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
                "head_dim": 64, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
                "tie_word_embeddings": true, "bos_token_id": 0, "eos_token_id": 0,
            }),
            tokenizer: json!({
                "version": "1.0", "added_tokens": added, "normalizer": null, "post_processor": null,
                "pre_tokenizer": { "type": "Sequence", "pretokenizers": [
                    { "type": "Digits", "individual_digits": true },
                    { "type": "ByteLevel", "add_prefix_space": false, "use_regex": true },
                ] },
                "decoder": { "type": "ByteLevel" },
                "model": { "type": "BPE", "vocab": vocab, "merges": strings("tokenizer.ggml.merges") },
            }),
            tokenizer_config: json!({
                "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>",
                "eos_token": "<|endoftext|>", "add_bos_token": false,
            }),
            tensors,
        }
    }

    /// Writes all files but the weights.
    pub(crate) fn write_texts(&self, folder: &Path) {
        std::fs::create_dir_all(folder).unwrap();
        for (name, json) in [
            ("config.json", &self.config),
            ("tokenizer.json", &self.tokenizer),
            ("tokenizer_config.json", &self.tokenizer_config),
        ] {
            std::fs::write(folder.join(name), json.to_string()).unwrap();
        }
    }

    /// Writes the folder with one safetensors file.
    pub(crate) fn write(&self, folder: &Path) -> PathBuf {
        self.write_texts(folder);
        save(&self.tensors, &folder.join("model.safetensors"));
        folder.to_path_buf()
    }

    /// Writes the folder with the tensors dealt to `shards` files, and their index.
    pub(crate) fn write_sharded(&self, folder: &Path, shards: usize) -> PathBuf {
        self.write_texts(folder);
        let mut places = serde_json::Map::new();
        for shard in 0..shards {
            let name = format!("model-{:05}-of-{shards:05}.safetensors", shard + 1);
            let part: Tensors =
                self.tensors.iter().skip(shard).step_by(shards).map(|(key, raw)| (key.clone(), raw.clone())).collect();
            places.extend(part.keys().map(|key| (key.clone(), json!(name))));
            save(&part, &folder.join(name));
        }
        let index = json!({ "metadata": { "total_size": 0 }, "weight_map": places });
        std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
        folder.to_path_buf()
    }
}

/// Writes a safetensors file.
pub(crate) fn save(tensors: &Tensors, path: &Path) {
    let views = tensors.iter().map(|(name, raw)| {
        (name.clone(), TensorView::new(raw.dtype, raw.shape.clone(), &raw.data).expect("data fit the shape"))
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}
