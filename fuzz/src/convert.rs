use std::path::{Path, PathBuf};

use lwq::convert::fuzzing;
use lwq::tokenizer::pretokenize::known_names;

/// Any bytes as a safetensors file: refused or read, never a panic, never more memory than the file explains.
pub fn convert_safetensors(bytes: &[u8]) {
    if fuzzing::safetensors(bytes) {
        // A sound header must also survive on disk, with every tensor inside the file.
        let path = std::env::temp_dir().join(format!("lwq-fuzz-{}.safetensors", std::process::id()));
        std::fs::write(&path, bytes).expect("the temporary folder is writable");
        let sound = fuzzing::safetensors_file(&path);
        std::fs::remove_file(&path).expect("the file is ours");
        assert!(sound);
    }
}

/// Any bytes as tokenizer.json: a pre-tokenizer that the tokenizer knows, or none, never a panic.
pub fn convert_tokenizer_json(bytes: &[u8]) {
    if let Some(name) = fuzzing::tokenizer_json(bytes) {
        assert!(known_names().any(|known| known == name));
    }
}

/// Configurations of the checkpoints that an input can be, chosen by its first byte.
const QUANTIZATIONS: [&str; 6] = [
    r#"null"#,
    r#"{"quant_method": "fp8", "weight_block_size": [2, 2]}"#,
    r#"{"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": {"weights": {"num_bits": 4}}}}"#,
    r#"{"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": {}}"#,
    r#"{"quant_method": "modelopt", "quant_algo": "NVFP4"}"#,
    r#"{"quant_method": "mxfp4"}"#,
];

/// A byte that chooses a configuration, and a safetensors file of quantized weights: refused, or read to floats and to blocks
/// that decode to the same floats.
pub fn convert_checkpoint(bytes: &[u8]) {
    let Some((choice, file)) = bytes.split_first() else { return };
    let folder = folder("checkpoint");
    let quantization = QUANTIZATIONS[usize::from(*choice) % QUANTIZATIONS.len()];
    let config = format!(r#"{{"architectures": ["LlamaForCausalLM"], "quantization_config": {quantization}}}"#);
    put(&folder, "config.json", config.as_bytes());
    put(&folder, "model.safetensors", file);
    super::accepted(fuzzing::checkpoint(&folder));
}

/// tokenizer.model, tokenizer.json and tokenizer_config.json, the first two behind their lengths: refused, or one vocabulary.
pub fn convert_tokenizer_pair(bytes: &[u8]) {
    let folder = folder("tokenizer-pair");
    let mut rest = bytes;
    for name in ["tokenizer.model", "tokenizer.json"] {
        let Some((length, after)) = rest.split_first_chunk::<2>() else { return };
        let (file, after) = after.split_at(usize::from(u16::from_le_bytes(*length)).min(after.len()));
        put(&folder, name, file);
        rest = after;
    }
    put(&folder, "tokenizer_config.json", rest);
    for class in ["LlamaForCausalLM", "Gemma3ForCausalLM", "Phi3ForCausalLM"] {
        super::accepted(fuzzing::tokenizer_folder(&folder, class, 300));
    }
}

fn folder(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("lwq-fuzz-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&path).expect("the temporary folder is writable");
    path
}

/// An empty file is none.
fn put(folder: &Path, name: &str, bytes: &[u8]) {
    let path = folder.join(name);
    if bytes.is_empty() {
        let _ = std::fs::remove_file(path);
    } else {
        std::fs::write(path, bytes).expect("the folder is ours");
    }
}
