//! `lwq convert` as a user runs it: the bundled model from its own folder form, types, forms of output, refusals.

mod common;
mod convert_support;

use std::path::{Path, PathBuf};

use common::{args, doclet, error_line, files_in, json_of, run, run_with, stdout_of, tensor_digest};
use convert_support::{Raw, Source, save};
use lwq::gguf::{Gguf, TensorType};
use proptest::prelude::*;
use safetensors::Dtype;
use serde_json::{Value as Json, json};

fn source() -> Source {
    Source::doclet(&doclet())
}

fn converted(folder: &Path, output: &Path, options: &[&str]) -> PathBuf {
    stdout_of(run_with(args!["convert", folder, "-o", output], options));
    output.to_path_buf()
}

#[test]
fn the_bundled_model_comes_back_from_its_folder() {
    let dir = tempfile::tempdir().unwrap();
    let folder = source().write(&dir.path().join("doclet"));
    let output = converted(&folder, &dir.path().join("out.gguf"), &[]);
    assert_eq!(tensor_digest(&output), tensor_digest(&doclet()));

    let (found, expected) = (Gguf::open(&output).unwrap(), Gguf::open(doclet()).unwrap());
    let of_a_run =
        |key: &str| !key.starts_with("general.") || key == "general.architecture" || key == "general.file_type";
    for (key, value) in expected.metadata().iter().filter(|(key, _)| of_a_run(key)) {
        // Byte-level vocabularies put no space before a text, whether or not a file says so.
        if key != "tokenizer.ggml.add_space_prefix" {
            assert_eq!(found.metadata().get(key), Some(value), "{key}");
        }
    }
    assert_eq!(found.metadata().str("tokenizer.ggml.pre").unwrap(), Some("smollm"));
    assert_eq!(found.metadata().str("general.name").unwrap(), Some("Doclet"));
}

#[test]
fn shards_and_threads_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let source = source();
    let whole = source.write(&dir.path().join("doclet"));
    let one = converted(&whole, &dir.path().join("one.gguf"), &["--threads", "1"]);
    let many = converted(&whole, &dir.path().join("many.gguf"), &["--threads", "7"]);
    assert_eq!(std::fs::read(&one).unwrap(), std::fs::read(many).unwrap());
    let sharded = source.write_sharded(&dir.path().join("sharded"), 3);
    let sharded = converted(&sharded, &dir.path().join("sharded.gguf"), &[]);
    assert_eq!(tensor_digest(&one), tensor_digest(&sharded));
}

#[test]
fn every_type_is_written_where_it_belongs() {
    let dir = tempfile::tempdir().unwrap();
    let folder = source().write(&dir.path().join("doclet"));
    let types = [("f32", TensorType::F32, 0), ("F16", TensorType::F16, 1), ("bf16", TensorType::BF16, 32)];
    for (name, ty, file_type) in types.into_iter().chain([("q8_0", TensorType::Q8_0, 7)]) {
        let output = converted(&folder, &dir.path().join(format!("{name}.gguf")), &["--type", name]);
        let gguf = Gguf::open(&output).unwrap();
        assert_eq!(gguf.metadata().u32("general.file_type").unwrap(), Some(file_type));
        assert_eq!(gguf.tensor("blk.3.ffn_down.weight").unwrap().ty, ty);
        assert_eq!(gguf.tensor("token_embd.weight").unwrap().ty, ty);
        assert_eq!(gguf.tensor("blk.3.ffn_norm.weight").unwrap().ty, TensorType::F32);
    }
}

#[test]
fn dry_run_tells_everything_and_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let folder = source().write(&dir.path().join("doclet"));
    let plan = json_of(run(args!["convert", &folder, "--dry-run", "--json"]));
    assert_eq!(files_in(dir.path()), ["doclet"]);
    let done = json_of(run(args!["convert", &folder, "--json"]));
    assert_eq!(files_in(dir.path()), ["doclet", "doclet-f16.gguf"]);
    for key in ["tensors", "metadata", "size_bytes", "tensor_bytes", "architecture", "type", "output", "parameters"] {
        assert_eq!(plan[key], done[key], "{key}");
    }
    assert_eq!(plan["size_bytes"], std::fs::metadata(dir.path().join("doclet-f16.gguf")).unwrap().len());
    assert_eq!(plan["written"], false);
    assert_eq!(plan["class"], "LlamaForCausalLM");
    assert_eq!(plan["metadata"]["tokenizer.ggml.pre"], "smollm");
    assert_eq!(
        plan["tensors"][0],
        json!({ "name": "token_embd.weight", "type": "f16", "shape": [256, 2048], "bytes": 1048576 })
    );

    let line = error_line(&run(args!["convert", &folder]));
    assert!(line.contains("exists already"), "{line}");
}

#[test]
fn an_unknown_pre_tokenizer_is_described_and_can_be_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut source = source();
    source.tokenizer["pre_tokenizer"]["pretokenizers"][0] =
        json!({ "type": "Split", "pattern": { "Regex": "q{7}|z" }, "behavior": "Isolated", "invert": false });
    source.tokenizer["normalizer"] = json!({ "type": "Lowercase" });
    let folder = source.write(&dir.path().join("doclet"));
    let line = error_line(&run(args!["convert", &folder, "--dry-run"]));
    assert!(line.contains("normalizer \"Lowercase\"") && line.contains("--pre NAME"), "{line}");
    source.tokenizer["normalizer"] = Json::Null;
    source.write_texts(&folder);
    let line = error_line(&run(args!["convert", &folder, "--dry-run"]));
    assert!(line.contains("expression \"q{7}|z\"") && line.contains("smollm"), "{line}");
    let output = converted(&folder, &dir.path().join("out.gguf"), &["--pre", "qwen2"]);
    assert_eq!(Gguf::open(output).unwrap().metadata().str("tokenizer.ggml.pre").unwrap(), Some("qwen2"));
    assert_eq!(run(args!["convert", &folder, "--pre", "nonsense"]).status.code(), Some(2));
}

/// A change of the folder's text files, and a part of the message.
type TextCase = (&'static str, fn(&mut Source), &'static str);

#[test]
fn contradicting_text_files_are_refused_in_one_line() {
    let cases: &[TextCase] = &[
        ("class", |s| s.config["architectures"] = json!(["MysteryForCausalLM"]), "known: LlamaForCausalLM"),
        ("classes", |s| s.config["architectures"] = json!("Llama"), "architectures is \"Llama\""),
        (
            "sections",
            |s| s.config["architectures"] = json!(["Qwen2_5_VLForConditionalGeneration"]),
            "mrope_section is missing; Qwen2_5_VLForConditionalGeneration needs it",
        ),
        ("no class", |s| s.config["architectures"] = Json::Null, "architectures is missing"),
        ("width", |s| s.config["hidden_size"] = json!("wide"), "hidden_size is \"wide\""),
        ("layers", |s| s.config["num_hidden_layers"] = json!(0), "num_hidden_layers is 0"),
        (
            "many layers",
            |s| s.config["num_hidden_layers"] = json!(u64::MAX),
            "num_hidden_layers is 18446744073709551615",
        ),
        (
            "more layers",
            |s| s.config["num_hidden_layers"] = json!(7),
            "model.layers.6.input_layernorm.weight\" is missing",
        ),
        (
            "fewer layers",
            |s| s.config["num_hidden_layers"] = json!(5),
            "are not part of LlamaForCausalLM with 5 layers",
        ),
        ("heads", |s| s.config["num_key_value_heads"] = json!(3), "num_key_value_heads is 3, expected a divisor"),
        ("odd head", |s| s.config["head_dim"] = json!(63), "head_dim is 63"),
        (
            "vocabulary",
            |s| s.config["vocab_size"] = json!(2000),
            "has shape [2048, 256]; config.json implies [2000, 256]",
        ),
        ("huge", |s| s.config["vocab_size"] = json!(1u64 << 31), "has shape [2048, 256]"),
        ("epsilon", |s| s.config["rms_norm_eps"] = json!("small"), "rms_norm_eps is \"small\""),
        ("rope", |s| s.config["rope_scaling"] = json!([1]), "rope_scaling is a list of 1"),
        (
            "yarn",
            |s| s.config["rope_scaling"] = json!({ "type": "yarn", "factor": 2.0 }),
            "rope_scaling.original_max_position_embeddings is missing",
        ),
        (
            "quantized",
            |s| s.config["quantization_config"] = json!({ "quant_method": "gptq" }),
            "convert the 16-bit model that it was made from",
        ),
        ("no vocab", |s| s.tokenizer["model"]["vocab"] = json!({}), "model.vocab is missing or empty"),
        ("unigram", |s| s.tokenizer["model"]["vocab"] = json!([["a", -1.0]]), "add tokenizer.model"),
        ("ids", |s| s.tokenizer["model"]["vocab"]["extra"] = json!(5000), "\"extra\" with id 5000"),
        ("twice", |s| s.tokenizer["model"]["vocab"]["extra"] = json!(7), "has id 7 twice"),
        ("negative", |s| s.tokenizer["model"]["vocab"]["extra"] = json!(-1), "is not what this file should be"),
        ("merges", |s| s.tokenizer["model"]["merges"] = json!(["whole"]), "merge 0 has no two parts"),
        ("no merges", |s| s.tokenizer["model"]["merges"] = json!([]), "model.merges is missing"),
        ("added", |s| s.tokenizer["added_tokens"][0]["id"] = json!(1u64 << 40), "no vocabulary has so many tokens"),
        (
            "decoder",
            |s| s.tokenizer_config["added_tokens_decoder"] = json!({ "x": {} }),
            "added_tokens_decoder has an entry",
        ),
        ("no cut", |s| s.tokenizer["pre_tokenizer"] = Json::Null, "pre_tokenizer is null"),
        ("mixed", |s| s.tokenizer["pre_tokenizer"]["pretokenizers"][0]["type"] = json!("\u{1b}[31m"), "\\u{1b}"),
    ];
    let dir = tempfile::tempdir().unwrap();
    let weights = dir.path().join("weights");
    source().write(&weights);
    for (name, change, message) in cases {
        let folder = dir.path().join(name);
        let mut source = source();
        change(&mut source);
        source.write_texts(&folder);
        std::fs::hard_link(weights.join("model.safetensors"), folder.join("model.safetensors")).unwrap();
        let output = dir.path().join("out.gguf");
        let line = error_line(&run(args!["convert", &folder, "-o", &output]));
        assert!(line.contains(message), "{name}: {line}");
        assert!(!output.exists(), "{name}");
    }
}

/// A change of the finished folder, and a part of the message.
type FileCase = (&'static str, fn(&Path), &'static str);

fn write(path: &Path, name: &str, bytes: &[u8]) {
    std::fs::write(path.join(name), bytes).unwrap();
}

fn edit(path: &Path, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(path.join(name)).unwrap();
    change(&mut bytes);
    write(path, name, &bytes);
}

#[test]
fn damaged_files_are_refused_in_one_line() {
    const FIRST: &str = "model-00001-of-00002.safetensors";
    const SECOND: &str = "model-00002-of-00002.safetensors";
    const INDEX: &str = "model.safetensors.index.json";
    let cases: &[FileCase] = &[
        ("no config", |f| std::fs::remove_file(f.join("config.json")).unwrap(), "holds no config.json"),
        ("config cut", |f| write(f, "config.json", b"{\"a\": "), "config.json: is not JSON"),
        ("config list", |f| write(f, "config.json", b"[]"), "is a list of 0, expected an object"),
        ("config empty", |f| write(f, "config.json", b""), "config.json: is not JSON"),
        ("config deep", |f| write(f, "config.json", "[".repeat(100_000).as_bytes()), "config.json: is not JSON"),
        ("no tokenizer", |f| std::fs::remove_file(f.join("tokenizer.json")).unwrap(), "holds neither tokenizer.json"),
        ("tokenizer cut", |f| edit(f, "tokenizer.json", |b| b.truncate(999)), "tokenizer.json: is not JSON"),
        (
            "tokenizer model",
            |f| write(f, "tokenizer.model", b"\x0a\xff\xff\xff\xff\x0fabc"),
            "is no SentencePiece model",
        ),
        ("empty model", |f| write(f, "tokenizer.model", b""), "without pieces"),
        ("sampling", |f| write(f, "generation_config.json", b"{\"top_k\": \"many\"}"), "top_k is \"many\""),
        ("shard missing", |f| std::fs::remove_file(f.join(SECOND)).unwrap(), "00002-of-00002.safetensors: is missing"),
        ("shard empty", |f| write(f, SECOND, b""), "has 0 bytes and no safetensors header"),
        ("shard cut", |f| edit(f, SECOND, |b| b.truncate(b.len() - 7)), "is cut: "),
        ("header cut", |f| edit(f, SECOND, |b| b.truncate(100)), "is cut inside its header (100 of"),
        ("trailing", |f| edit(f, SECOND, |b| b.extend([0; 9])), "has 9 bytes behind its last tensor"),
        ("absurd", |f| edit(f, SECOND, |b| b[..8].fill(0xff)), "says its header has 18446744073709551615 bytes"),
        ("large", |f| edit(f, SECOND, |b| b[..8].copy_from_slice(&(1u64 << 40).to_le_bytes())), "at most 100 MB"),
        ("no json", |f| edit(f, SECOND, |b| b[8] = b'x'), "header is damaged"),
        ("lfs", |f| write(f, SECOND, b"version https://git-lfs.github.com/spec/v1\noid sha256:0"), "Git LFS pointer"),
        ("dtype", |f| edit(f, SECOND, |b| replace(b, b"\"F16\"", b"\"F61\"")), "has dtype \"F61\""),
        ("offsets", |f| edit(f, SECOND, |b| replace(b, b"[0,", b"[1,")), "has data_offsets 1 to"),
        (
            "duplicate",
            |f| {
                std::fs::copy(f.join(FIRST), f.join(SECOND)).unwrap();
            },
            "is also in",
        ),
        ("index cut", |f| edit(f, INDEX, |b| b.truncate(40)), "index.json: is not JSON"),
        ("index empty", |f| write(f, INDEX, b"{}"), "weight_map is missing"),
        (
            "index path",
            |f| write(f, INDEX, b"{\"weight_map\": {\"a\": \"../../etc/passwd\"}}"),
            "expected a file name in this folder",
        ),
        ("index number", |f| write(f, INDEX, b"{\"weight_map\": {\"a\": 7}}"), "is 7, expected a file name"),
        (
            "index lists more",
            |f| {
                edit(f, INDEX, |b| {
                    replace(
                        b,
                        b"\"weight_map\":{",
                        b"\"weight_map\":{\"x.weight\":\"model-00001-of-00002.safetensors\",",
                    )
                })
            },
            "\"x.weight\" should be in",
        ),
    ];
    let dir = tempfile::tempdir().unwrap();
    let source = source();
    for (name, change, message) in cases {
        let folder = source.write_sharded(&dir.path().join(name), 2);
        change(&folder);
        let output = dir.path().join("out.gguf");
        let line = error_line(&run(args!["convert", &folder, "-o", &output]));
        assert!(line.contains(message), "{name}: {line}");
        assert!(line.len() < 4000, "{name}: {line}");
        assert!(!output.exists(), "{name}");
        std::fs::remove_dir_all(folder).unwrap();
    }
    let line = error_line(&run(args!["convert", dir.path().join("nothing")]));
    assert!(line.contains("does not exist"), "{line}");
    let line = error_line(&run(args!["convert", doclet()]));
    assert!(line.contains("is not a folder"), "{line}");
}

fn replace(bytes: &mut Vec<u8>, from: &[u8], to: &[u8]) {
    let at = bytes.windows(from.len()).position(|window| window == from).expect("the text is there");
    bytes.splice(at..at + from.len(), to.iter().copied());
}

/// A change of the tensors, and a part of the message.
type TensorCase = (&'static str, fn(&mut Source), &'static str);

#[test]
fn wrong_tensors_are_refused_by_name() {
    const UP: &str = "model.layers.2.mlp.up_proj.weight";
    let cases: &[TensorCase] = &[
        (
            "missing",
            |s| {
                s.tensors.remove(UP);
            },
            "\"model.layers.2.mlp.up_proj.weight\" is missing; LlamaForCausalLM needs it with shape [512, 256]",
        ),
        (
            "extra",
            |s| {
                let raw = s.tensors[UP].clone();
                s.tensors.insert("model.layers.2.mlp.mystery.weight".into(), raw);
            },
            "mystery.weight\" is not part of",
        ),
        (
            "transposed",
            |s| s.tensors.get_mut(UP).unwrap().shape.reverse(),
            "has shape [256, 512]; config.json implies [512, 256]",
        ),
        ("integers", |s| s.tensors.get_mut(UP).unwrap().dtype = Dtype::I16, "has dtype I16"),
        (
            "both spellings",
            |s| {
                let raw = s.tensors[UP].clone();
                s.tensors.insert("layers.2.mlp.up_proj.weight".into(), raw);
            },
            "stands for the same weights",
        ),
        (
            "NaN",
            |s| s.tensors.get_mut(UP).unwrap().data[514..516].copy_from_slice(&[0x00, 0x7e]),
            "weight 257 is NaN or infinite",
        ),
        (
            "too large",
            |s| {
                let raw = s.tensors.get_mut(UP).unwrap();
                raw.dtype = Dtype::BF16;
                raw.data[6..8].copy_from_slice(&0x4800u16.to_le_bytes());
            },
            "too large for f16; use --type bf16",
        ),
        (
            "scales",
            |s| {
                let (shape, data) = (vec![512, 256], vec![0x38; 512 * 256]);
                s.tensors.insert(UP.into(), Raw { dtype: Dtype::F8_E4M3, shape, data });
                s.tensors
                    .insert(format!("{UP}_scale_inv"), Raw { dtype: Dtype::F32, shape: vec![5, 2], data: vec![0; 40] });
            },
            "_scale_inv\" has shape [5, 2]; weights of shape [512, 256]",
        ),
        (
            "NaN scale",
            |s| {
                let (shape, data) = (vec![512, 256], vec![0x38; 512 * 256]);
                s.tensors.insert(UP.into(), Raw { dtype: Dtype::F8_E4M3, shape, data });
                s.tensors.insert(
                    format!("{UP}_scale_inv"),
                    Raw { dtype: Dtype::F32, shape: vec![4, 2], data: vec![0xff; 32] },
                );
            },
            "value 0 is NaN",
        ),
    ];
    let dir = tempfile::tempdir().unwrap();
    for (name, change, message) in cases {
        let mut source = source();
        change(&mut source);
        let folder = source.write(&dir.path().join("model"));
        let output = dir.path().join("out.gguf");
        let line = error_line(&run(args!["convert", &folder, "-o", &output, "--type", "f16"]));
        assert!(line.contains(message), "{name}: {line}");
        assert_eq!(files_in(dir.path()), ["model"], "{name}");
    }
}

#[test]
fn block_scales_of_fp8_weights_are_applied() {
    const UP: &str = "model.layers.2.mlp.up_proj.weight";
    let dir = tempfile::tempdir().unwrap();
    let mut source = source();
    let scales: Vec<f32> = (1..=8).map(|scale| scale as f32 / 64.0).collect();
    let bytes = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
    source.tensors.insert(UP.into(), Raw { dtype: Dtype::F8_E4M3, shape: vec![512, 256], data: vec![0x3C; 512 * 256] });
    source.tensors.insert(format!("{UP}_scale_inv"), Raw { dtype: Dtype::F32, shape: vec![4, 2], data: bytes });
    source.config["quantization_config"] = json!({ "quant_method": "fp8", "weight_block_size": [128, 128] });
    let folder = source.write(&dir.path().join("model"));
    let output = converted(&folder, &dir.path().join("out.gguf"), &["--type", "f32"]);
    let gguf = Gguf::open(output).unwrap();
    let data = gguf.data(gguf.tensor("blk.2.ffn_up.weight").unwrap()).unwrap();
    for (index, raw) in data.chunks_exact(4).enumerate() {
        let (row, column) = (index / 256, index % 256);
        let value = f32::from_le_bytes(raw.try_into().unwrap());
        assert_eq!(value, 1.5 * scales[row / 128 * 2 + column / 128], "row {row}, column {column}");
    }
}

#[test]
fn the_source_is_never_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let folder = source().write(&dir.path().join("model"));
    let weights = folder.join("model.safetensors");
    let before = std::fs::read(&weights).unwrap();
    let line = error_line(&run(args!["convert", &folder, "-o", &weights, "--force"]));
    assert!(line.contains("is one of the files to convert"), "{line}");
    assert_eq!(std::fs::read(&weights).unwrap(), before);
}

fn small_file() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let raw = |n: usize| Raw { dtype: Dtype::F16, shape: vec![n, 2], data: vec![0; 4 * n] };
    let tensors = [("a.weight", 3), ("b.weight", 5)].map(|(name, n)| (name.to_owned(), raw(n)));
    let path = dir.path().join("small.safetensors");
    save(&tensors.into(), &path);
    std::fs::read(path).unwrap()
}

proptest! {
    #[test]
    fn changed_headers_never_panic(at in 0usize..200, byte: u8, cut in 0usize..300) {
        let mut bytes = small_file();
        prop_assert!(lwq::convert::fuzzing::safetensors(&bytes));
        let at = at % bytes.len();
        bytes[at] = byte;
        let _ = lwq::convert::fuzzing::safetensors(&bytes);
        bytes.truncate(cut);
        let _ = lwq::convert::fuzzing::safetensors(&bytes);
    }
}
