//! What the fuzz targets run, one function a target. `tests/fuzz_corpus.rs` includes these files and runs the same
//! functions without a fuzzer.

mod convert;
mod gguf_reader;
mod imatrix;
mod tokenizer;

pub use convert::{convert_checkpoint, convert_safetensors, convert_tokenizer_json, convert_tokenizer_pair};
pub use gguf_reader::gguf_reader;
pub use imatrix::{imatrix_dat, imatrix_gguf};
pub use tokenizer::tokenizer;

/// What was read, or nothing: then the error has to be one line that fits a screen.
fn accepted<T, E: std::fmt::Display>(result: Result<T, E>) -> Option<T> {
    result
        .inspect_err(|error| {
            let message = error.to_string();
            assert!(!message.chars().any(char::is_control) && message.len() < 2000, "{message:?}");
        })
        .ok()
}
