//! `lwq quantize` on inputs that are no plain language models, and with metadata given by hand.

mod common;

use std::path::{Path, PathBuf};

use common::{args, error_line, json_of, run, stdout_of};
use lwq::gguf::testing::RawGguf;
use lwq::gguf::{Array, Gguf, TensorType, Value, ValueType};

/// Weights of a matrix, different in every place.
fn weights(count: u64) -> Vec<f32> {
    (0..count).map(|at| ((at * 37 % 101) as f32 - 50.0) / 400.0).collect()
}

fn matrix(file: RawGguf, name: &str, shape: &[u64]) -> RawGguf {
    file.f32_tensor(name, shape, &weights(shape.iter().product()))
}

fn written(dir: &Path, name: &str, file: &RawGguf) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, file.build()).unwrap();
    path
}

fn stderr_of(output: std::process::Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    stdout_of(output);
    stderr
}

fn type_of(gguf: &Gguf, name: &str) -> TensorType {
    gguf.tensor(name).unwrap().ty
}

fn llama(blocks: u32) -> RawGguf {
    let heads = |file: RawGguf| file.u32("llama.attention.head_count", 4).u32("llama.attention.head_count_kv", 4);
    heads(RawGguf::new().str("general.architecture", "llama").u32("llama.block_count", blocks))
}

#[test]
fn the_factors_of_an_adapter_are_quantized_where_their_rows_fit() {
    let dir = tempfile::tempdir().unwrap();
    let mut file = RawGguf::new()
        .str("general.architecture", "llama")
        .str("general.type", "adapter")
        .str("adapter.type", "lora")
        .f32("adapter.lora.alpha", 32.0);
    for block in 0..2 {
        file = matrix(file, &format!("blk.{block}.attn_q.weight.lora_a"), &[256, 16]);
        file = matrix(file, &format!("blk.{block}.attn_q.weight.lora_b"), &[16, 256]);
    }
    let model = written(dir.path(), "lora.gguf", &file);
    let output = dir.path().join("out.gguf");
    for (arguments, factor_a, factor_b) in [
        (&["--target", "Q8_0"][..], TensorType::Q8_0, TensorType::F16),
        (&["--target", "Q4_K_M"], TensorType::Q4_K, TensorType::F16),
        (&["--target", "F16"], TensorType::F16, TensorType::F16),
        (&["--target", "Q4_K_M", "--tensor-type", "lora_a=q8_0"], TensorType::Q8_0, TensorType::F16),
    ] {
        let command = args!["quantize", &model, &output, "--force"];
        let stderr = stderr_of(run(command.into_iter().chain(arguments.iter().map(Into::into))));
        assert!(!stderr.contains("nothing is quantized"), "{stderr}");
        let gguf = Gguf::open(&output).unwrap();
        assert_eq!(type_of(&gguf, "blk.1.attn_q.weight.lora_a"), factor_a, "{arguments:?}");
        assert_eq!(type_of(&gguf, "blk.1.attn_q.weight.lora_b"), factor_b, "{arguments:?}");
        assert_eq!(gguf.metadata().f32("adapter.lora.alpha").unwrap(), Some(32.0));
        assert_eq!(gguf.metadata().str("general.type").unwrap(), Some("adapter"));
    }
}

#[test]
fn a_run_that_quantizes_nothing_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let vectors =
        RawGguf::new().str("general.architecture", "controlvector").f32_tensor("direction.1", &[256], &[0.5; 256]);
    let model = written(dir.path(), "vectors.gguf", &vectors);
    let output = dir.path().join("out.gguf");
    for target in ["Q8_0", "F16"] {
        let stderr = stderr_of(run(args!["quantize", &model, &output, "--target", target, "--force"]));
        assert!(stderr.contains("nothing is quantized") && stderr.contains("direction.1"), "{stderr}");
    }
    let stderr = stderr_of(run(args!["quantize", &model, &output, "--target", "COPY", "--force"]));
    assert_eq!(stderr, "");
}

#[test]
fn pruning_rewrites_what_speaks_of_layers_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let mut file = llama(4)
        .i32s("llama.rope.dimension_sections", &[16, 24, 24, 0])
        .f32s("llama.swiglu_clamp_exp", &[1.0, 2.0, 3.0, 4.0])
        .u32("llama.leading_dense_block_count", 2)
        .u32("llama.full_attention_interval", 2)
        .strings("general.tags", &["a", "b", "c", "d"]);
    for block in 0..4 {
        file = matrix(file, &format!("blk.{block}.ffn_up.weight"), &[64, 2]);
    }
    let model = written(dir.path(), "model.gguf", &file);
    let output = dir.path().join("out.gguf");
    let stderr = stderr_of(run(args!["quantize", &model, &output, "--target", "Q8_0", "--prune-layers", "1"]));
    assert!(stderr.contains("llama.full_attention_interval") && stderr.contains("period"), "{stderr}");
    let gguf = Gguf::open(&output).unwrap();
    let floats = |numbers: &[f32]| {
        let values: Vec<Value> = numbers.iter().map(|number| Value::F32(*number)).collect();
        Value::Array(Array::of_values(ValueType::F32, &values))
    };
    assert_eq!(gguf.metadata().u32("llama.block_count").unwrap(), Some(3));
    assert_eq!(gguf.metadata().u32("llama.leading_dense_block_count").unwrap(), Some(1));
    assert_eq!(gguf.metadata().get("llama.swiglu_clamp_exp"), Some(&floats(&[1.0, 3.0, 4.0])));
    let source = Gguf::open(&model).unwrap();
    for key in ["llama.rope.dimension_sections", "general.tags", "llama.full_attention_interval"] {
        assert_eq!(gguf.metadata().get(key), source.metadata().get(key), "{key}");
    }
}

#[test]
fn metadata_by_hand_have_the_type_that_readers_expect() {
    let dir = tempfile::tempdir().unwrap();
    let model = written(dir.path(), "model.gguf", &matrix(llama(1), "blk.0.ffn_up.weight", &[64, 2]));
    let output = dir.path().join("out.gguf");
    let with = |overrides: &[&str]| {
        let mut command = args!["quantize", &model, &output, "--target", "Q8_0", "--force"];
        for text in overrides {
            command.extend(args!["--override-kv", text]);
        }
        run(command)
    };
    stdout_of(with(&[
        "llama.rope.freq_base=int:10000",
        "tokenizer.ggml.add_bos_token=str:true",
        "general.name=int:7",
        "llama.expert_count=float:8",
        "general.file_type=int:1",
    ]));
    let gguf = Gguf::open(&output).unwrap();
    for (key, value) in [
        ("llama.rope.freq_base", Value::F32(10_000.0)),
        ("tokenizer.ggml.add_bos_token", Value::Bool(true)),
        ("general.name", Value::from("7")),
        ("llama.expert_count", Value::U32(8)),
        ("general.file_type", Value::U32(1)),
    ] {
        assert_eq!(gguf.metadata().get(key), Some(&value), "{key}");
    }
    for (text, parts) in [
        ("llama.expert_count=int:-1", ["llama.expert_count", "0 to 4294967295", "-1"]),
        ("llama.block_count=str:four", ["llama.block_count", "u32", "four"]),
        ("tokenizer.ggml.add_bos_token=int:2", ["tokenizer.ggml.add_bos_token", "bool", "2"]),
        ("tokenizer.ggml.tokens=str:a", ["tokenizer.ggml.tokens", "a list", "\"a\""]),
    ] {
        let line = error_line(&with(&[text]));
        for part in parts {
            assert!(line.contains(part), "{part}: {line}");
        }
    }
}

#[test]
fn pattern_files_take_comments_and_patterns_look_around() {
    let dir = tempfile::tempdir().unwrap();
    let mut file = llama(2);
    for block in 0..2 {
        file = matrix(file, &format!("blk.{block}.ffn_up.weight"), &[256, 2]);
    }
    let model = written(dir.path(), "model.gguf", &file);
    let output = dir.path().join("out.gguf");
    let list = dir.path().join("types.txt");
    std::fs::write(&list, "# which\n\nblk\\.(?!0\\.)\\d+\\.ffn_up=q8_0 # all but the first\n").unwrap();
    let command = args!["quantize", &model, &output, "--target", "Q4_0", "--tensor-type-file", &list];
    stdout_of(run(command.iter()));
    let gguf = Gguf::open(&output).unwrap();
    assert_eq!(type_of(&gguf, "blk.0.ffn_up.weight"), TensorType::Q4_0);
    assert_eq!(type_of(&gguf, "blk.1.ffn_up.weight"), TensorType::Q8_0);
    std::fs::write(&list, "# which\nblk\\.(?!0=q8_0\n").unwrap();
    let line = error_line(&run(command.iter().cloned().chain(args!["--force"])));
    assert!(line.contains("types.txt, line 2"), "{line}");
    let line = error_line(&run(args!["quantize", &model, &output, "--target", "Q4_0", "--tensor-type", "a=iq4_ks"]));
    assert!(line.contains("iq4_ks") && line.contains("ik_llama.cpp"), "{line}");
    let target = run(args!["quantize", &model, &output, "--target", "IQ4_KS"]);
    assert!(String::from_utf8_lossy(&target.stderr).contains("ik_llama.cpp"), "{target:?}");
}

#[test]
fn rows_that_no_block_fits_take_the_type_that_holds_them() {
    let dir = tempfile::tempdir().unwrap();
    let bf16: Vec<u8> =
        weights(200).iter().flat_map(|weight| ((weight.to_bits() >> 16) as u16).to_le_bytes()).collect();
    let mut wide = weights(200);
    wide[150] = -7e4;
    let file = llama(1)
        .tensor("blk.0.attn_q.weight", &[100, 2], TensorType::BF16, &bf16)
        .f32_tensor("blk.0.attn_k.weight", &[100, 2], &wide)
        .f32_tensor("blk.0.attn_output.weight", &[100, 2], &weights(200))
        .f32_tensor("blk.0.ffn_up.weight", &[256, 2], &weights(512));
    let model = written(dir.path(), "model.gguf", &file);
    let output = dir.path().join("out.gguf");
    let stderr = stderr_of(run(args!["quantize", &model, &output, "--target", "Q8_0"]));
    assert!(stderr.contains("blk.0.attn_k.weight: weight -70000 in row 1"), "{stderr}");
    let gguf = Gguf::open(&output).unwrap();
    for (name, ty) in [
        ("blk.0.attn_q.weight", TensorType::BF16),
        ("blk.0.attn_k.weight", TensorType::BF16),
        ("blk.0.attn_output.weight", TensorType::F16),
        ("blk.0.ffn_up.weight", TensorType::Q8_0),
    ] {
        assert_eq!(type_of(&gguf, name), ty, "{name}");
    }
    assert_eq!(gguf.data(gguf.tensor("blk.0.attn_q.weight").unwrap()).unwrap(), bf16);
}

#[test]
fn weights_that_are_too_large_for_a_type_are_no_damage() {
    let dir = tempfile::tempdir().unwrap();
    let mut wide = weights(1024);
    wide[700] = 1e6;
    let model = written(dir.path(), "model.gguf", &llama(1).f32_tensor("blk.0.attn_q.weight", &[256, 4], &wide));
    let line = error_line(&run(args!["quantize", &model, "--target", "F16"]));
    for part in ["blk.0.attn_q.weight", "row 2", "1000000", "f16", "65504", "bf16"] {
        assert!(line.contains(part), "{part}: {line}");
    }
    assert!(!line.contains("damaged"), "{line}");
    stdout_of(run(args!["quantize", &model, "--target", "BF16"]));
}

/// An imatrix with an entry of ones for each of the weights: name, columns, rows, tokens of each row.
fn imatrix(dir: &Path, name: &str, entries: &[(&str, u64, &[f32])]) -> PathBuf {
    let mut file = RawGguf::new()
        .str("general.type", "imatrix")
        .strings("imatrix.datasets", &["text"])
        .u32("imatrix.chunk_count", 1)
        .u32("imatrix.chunk_size", 512);
    for (weight, columns, counts) in entries {
        let rows = counts.len() as u64;
        let sums: Vec<f32> = counts.iter().flat_map(|count| vec![*count; *columns as usize]).collect();
        file = file.f32_tensor(&format!("{weight}.in_sum2"), &[*columns, rows], &sums);
        file = file.f32_tensor(&format!("{weight}.counts"), &[1, rows], counts);
    }
    written(dir, name, &file)
}

#[test]
fn matrices_without_importance_are_refused_plain_or_of_another_type() {
    let dir = tempfile::tempdir().unwrap();
    let mut file = llama(2).u32("llama.expert_count", 2).u32("llama.expert_used_count", 1);
    file = matrix(file, "blk.0.ffn_up.weight", &[256, 4]);
    file = matrix(file, "blk.0.ffn_down_exps.weight", &[256, 4, 2]);
    file = matrix(file, "blk.1.nextn.eh_proj.weight", &[256, 4]);
    let model = written(dir.path(), "model.gguf", &file);
    let entries = [("blk.0.ffn_up.weight", 256, &[64.0][..]), ("blk.0.ffn_down_exps.weight", 256, &[64.0, 0.0])];
    let matrix = imatrix(dir.path(), "a.gguf", &entries);
    let output = dir.path().join("out.gguf");
    let with = |target: &str, missing: &[&str]| {
        let command = args!["quantize", &model, &output, "--target", target, "--imatrix", &matrix, "--force", "--json"];
        run(command.into_iter().chain(missing.iter().map(Into::into)))
    };
    let line = error_line(&with("IQ2_XXS", &[]));
    assert!(line.contains("blk.1.nextn.eh_proj.weight") && line.contains("--missing-importance"), "{line}");
    let report = json_of(with("IQ2_XXS", &["--missing-importance", "plain"]));
    assert!(report["warnings"].to_string().contains("all their columns count the same"), "{report}");
    let gguf = Gguf::open(&output).unwrap();
    assert_eq!(type_of(&gguf, "blk.1.nextn.eh_proj.weight"), type_of(&gguf, "blk.0.ffn_up.weight"));
    drop(gguf);
    stdout_of(with("IQ2_XXS", &["--missing-importance", "q6_K"]));
    assert_eq!(type_of(&Gguf::open(&output).unwrap(), "blk.1.nextn.eh_proj.weight"), TensorType::Q6_K);
    for target in ["IQ2_XXS", "Q4_K_M"] {
        let line = error_line(&with(target, &["--missing-importance", "refuse"]));
        for part in ["blk.1.nextn.eh_proj.weight", "blk.0.ffn_down_exps.weight", "--missing-importance", "2 tensors"] {
            assert!(line.contains(part), "{part}: {line}");
        }
    }
    let whole =
        [entries[0], ("blk.0.ffn_down_exps.weight", 256, &[64.0, 64.0]), ("blk.1.nextn.eh_proj.weight", 256, &[1.0])];
    let whole = imatrix(dir.path(), "b.gguf", &whole);
    let command = args!["quantize", &model, &output, "--target", "IQ2_XXS", "--imatrix", &whole, "--force"];
    stdout_of(run(command.into_iter().chain(args!["--missing-importance", "refuse"])));
    let none = args!["quantize", &model, &output, "--target", "Q4_0", "--force", "--missing-importance", "refuse"];
    assert!(error_line(&run(none)).contains("add --imatrix"));
    let needy = run(args!["quantize", &model, "--target", "Q4_0", "--missing-importance", "iq2_xs"]);
    assert_eq!(needy.status.code(), Some(2));
}

#[test]
fn entries_of_another_form_serve_where_the_inputs_are_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let mut file = llama(1);
    file = matrix(file, "blk.0.attn_kv_b.weight", &[256, 8]);
    file = matrix(file, "blk.0.attn_v_b.weight", &[256, 2, 4]);
    file = matrix(file, "blk.0.ffn_gate_exps.weight", &[256, 2, 2]);
    let model = written(dir.path(), "model.gguf", &file);
    let entries = [
        ("blk.0.attn_kv_b.weight", 256, &[8.0, 8.0, 8.0, 8.0][..]),
        ("blk.0.ffn_gate.0.weight", 256, &[3.0]),
        ("blk.0.ffn_gate.1.weight", 256, &[3.0]),
    ];
    let matrix = imatrix(dir.path(), "a.gguf", &entries);
    let output = dir.path().join("out.gguf");
    let command = args!["quantize", &model, &output, "--target", "IQ2_XXS", "--imatrix", &matrix, "--json"];
    let report = json_of(run(command));
    assert!(report["tensors"].as_array().unwrap().iter().all(|tensor| tensor["weighted"] == true), "{report}");
    let warnings = report["warnings"].to_string();
    for part in ["3 tensors are weighed", "blk.0.attn_v_b.weight", "blk.0.attn_kv_b.weight"] {
        assert!(warnings.contains(part), "{part}: {warnings}");
    }
    assert!(!warnings.contains("belong to no tensor"), "{warnings}");
}

#[test]
fn what_llama_cpp_cannot_read_is_named_and_carried_over() {
    let dir = tempfile::tempdir().unwrap();
    let long = format!("model.{}.weight", "x".repeat(80));
    let blocks: Vec<u8> = (0..320_u32).map(|at| at as u8).collect();
    let mut file = RawGguf::new().str("general.architecture", "flux");
    file = matrix(file, "a.weight", &[256, 4]);
    file = file.info("b.weight", 2, &[256, 2], 144, 4096).data(&blocks);
    file = matrix(file, &long, &[256, 4]);
    file = matrix(file, "patch.weight", &[2, 2, 1, 4, 4]);
    let model = written(dir.path(), "model.gguf", &file);
    let output = dir.path().join("out.gguf");
    for (target, ty) in [("Q8_0", TensorType::Q8_0), ("COPY", TensorType::F32)] {
        let stderr = stderr_of(run(args!["quantize", &model, &output, "--target", target, "--force"]));
        for part in ["b.weight, are of type type#144 (iq4_ks of ik_llama.cpp", "GGML_MAX_NAME", "GGML_MAX_DIMS"] {
            assert!(stderr.contains(part), "{part}: {stderr}");
        }
        let gguf = Gguf::open(&output).unwrap();
        assert_eq!((type_of(&gguf, "a.weight"), type_of(&gguf, &long)), (ty, ty));
        let unknown = gguf.tensor("b.weight").unwrap();
        assert_eq!((unknown.ty, unknown.bytes), (TensorType(144), Some(320)));
        let start = (gguf.shards()[0].data_start() + unknown.offset) as usize;
        assert_eq!(std::fs::read(&output).unwrap()[start..start + 320], blocks);
        assert_eq!(gguf.tensor("patch.weight").unwrap().shape, [2, 2, 1, 4, 4]);
    }
    let inspected = run(args!["inspect", &model, "--tensors"]);
    let stderr = String::from_utf8_lossy(&inspected.stderr).into_owned();
    assert!(stderr.contains("ik_llama.cpp") && stderr.contains("GGML_MAX_NAME"), "{stderr}");
    let text = stdout_of(inspected);
    assert!(text.contains("type#144") && text.contains("320 B"), "{text}");
}
