//! Entry points of the fuzz targets: parsers that are private otherwise.

use std::path::Path;

use super::checkpoint::{Checkpoint, parse_header};
use super::vocabulary;

/// Parses a whole safetensors file that is in memory; true if it is sound.
pub fn safetensors(bytes: &[u8]) -> bool {
    parse_header(Path::new("fuzz.safetensors"), bytes).is_ok()
}

/// Opens one safetensors file on disk and reads the first byte of every tensor.
pub fn safetensors_file(path: &Path) -> bool {
    let Ok(checkpoint) = Checkpoint::open_file(path) else { return false };
    for (index, tensor) in checkpoint.tensors().iter().enumerate() {
        let mut byte = [0; 1];
        if tensor.bytes > 0 && checkpoint.read_at(index, 0, &mut byte).is_err() {
            return false;
        }
    }
    true
}

/// Parses tokenizer.json and looks for its pre-tokenizer; the name, if it was recognized.
pub fn tokenizer_json(bytes: &[u8]) -> Option<&'static str> {
    vocabulary::recognize_bytes(bytes)
}
