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
