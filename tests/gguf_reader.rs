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

#[test]
fn an_open_model_can_be_shared_between_threads() {
    fn shared<T: Send + Sync>(value: T) -> T {
        value
    }
    let gguf = shared(Gguf::open(DOCLET).unwrap());
    std::thread::scope(|scope| {
        for tensor in gguf.tensors() {
            let gguf = &gguf;
            scope.spawn(move || assert_eq!(Some(gguf.data(tensor).unwrap().len() as u64), tensor.bytes));
        }
    });
}

#[cfg(target_os = "linux")]
#[test]
fn released_pages_leave_memory_and_come_back_unchanged() {
    /// Resident bytes of mapped files.
    fn resident() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssFile:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("large.gguf");
    let data: Vec<u8> = (0..64u32 << 20).map(|at| (at >> 10) as u8).collect();
    let file = lwq::gguf::testing::RawGguf::new().tensor("t", &[1 << 20, 64], TensorType::I8, &data);
    std::fs::write(&path, file.build()).unwrap();
    let gguf = Gguf::open(&path).unwrap();
    let tensor = gguf.tensor("t").unwrap();
    assert!(gguf.data(tensor).unwrap() == data);
    let before = resident();
    gguf.release_rows(tensor, 0, 48);
    let after = resident();
    assert!(before - after > 40 << 20, "{before} bytes before, {after} after");
    assert!(gguf.data(tensor).unwrap() == data);
    gguf.release(tensor);
    assert!(gguf.data(tensor).unwrap() == data);
}
