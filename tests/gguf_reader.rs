//! Reads the bundled model and compares what is found with what is known of it.

use lwq::gguf::{Gguf, TensorType};

const DOCLET: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/doclet-4m-f16.gguf");

#[test]
fn the_bundled_model_is_read() {
    let gguf = Gguf::open(DOCLET).unwrap();
    let metadata = gguf.metadata();
    assert_eq!(metadata.str("general.architecture").unwrap(), Some("llama"));
    assert_eq!(metadata.u64("llama.block_count").unwrap(), Some(6));
    assert_eq!(metadata.u64("llama.embedding_length").unwrap(), Some(256));
    let tokens = metadata.array("tokenizer.ggml.tokens").unwrap().unwrap();
    assert_eq!(tokens.iter_str().unwrap().count() as u64, tokens.len());

    let embedding = gguf.tensor("token_embd.weight").unwrap();
    assert_eq!(embedding.ty, TensorType::F16);
    assert_eq!(embedding.row_len(), 256);
    assert_eq!(embedding.rows(), tokens.len());
    assert_eq!(gguf.data(embedding).unwrap().len() as u64, embedding.elements() * 2);
    let last_row = gguf.read_rows(embedding, embedding.rows() - 1, 1).unwrap();
    assert!(gguf.data(embedding).unwrap().ends_with(&last_row));
    assert!(gguf.read_rows(embedding, embedding.rows(), 1).is_err());
}

#[test]
fn a_wrong_type_is_named_with_file_key_and_both_types() {
    let gguf = Gguf::open(DOCLET).unwrap();
    let message = gguf.metadata().u64("general.architecture").unwrap_err().to_string();
    for part in ["doclet-4m-f16.gguf", "\"general.architecture\"", "str (\"llama\")", "a non-negative integer"] {
        assert!(message.contains(part), "{message}");
    }
}
