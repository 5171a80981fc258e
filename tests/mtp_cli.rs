//! Blocks for multi-token prediction in `lwq quantize`: kept, left out, taken from another file.

mod common;

use std::path::{Path, PathBuf};

use common::{args, error_line, files_in, json_of, run, run_with, stdout_of};
use lwq::gguf::testing::RawGguf;
use lwq::gguf::{Array, Gguf, TensorType, Value, ValueType};
use serde_json::Value as Json;

const WIDTH: u64 = 256;
const TRUNK: u32 = 3;

/// What is special about a file.
struct Shape {
    trunk: u32,
    mtp: u32,
    /// False for a file whose metadata alone tell of the blocks.
    with_tensors: bool,
    architecture: &'static str,
    width: u64,
    vocabulary: u64,
    heads_kv: i32,
}

impl Default for Shape {
    fn default() -> Shape {
        Shape {
            trunk: TRUNK,
            mtp: 0,
            with_tensors: true,
            architecture: "step35",
            width: WIDTH,
            vocabulary: 8,
            heads_kv: 2,
        }
    }
}

/// A file of the same weights for the same names. Widths of feed-forward networks and heads are lists by layer.
fn file(shape: &Shape) -> RawGguf {
    let blocks = shape.trunk + shape.mtp;
    let key = |key: &str| format!("{}.{key}", shape.architecture);
    let list =
        |last: i32| -> Vec<i32> { (0..blocks as i32).map(|il| if il < 3 { shape.heads_kv } else { last }).collect() };
    let mut file = RawGguf::new()
        .str("general.architecture", shape.architecture)
        .u32(&key("block_count"), blocks)
        .u32(&key("embedding_length"), shape.width as u32)
        .u32(&key("attention.head_count"), 4)
        .i32s(&key("attention.head_count_kv"), &list(4))
        .i32s(&key("feed_forward_length"), &list(9))
        .i32s(&key("rope.dimension_sections"), &[1, 2, 3, 0]);
    if shape.mtp > 0 {
        file = file.u32(&key("nextn_predict_layers"), shape.mtp);
    }
    let mut seed = 0;
    let mut matrix = |file: RawGguf, name: &str, rows: u64| {
        seed += 1;
        let weights: Vec<f32> =
            (0..shape.width * rows).map(|at| (((at + seed) * 37 % 101) as f32 - 50.0) / 400.0).collect();
        file.f32_tensor(name, &[shape.width, rows], &weights)
    };
    file = matrix(file, "token_embd.weight", shape.vocabulary);
    file = matrix(file, "output.weight", shape.vocabulary);
    let written = if shape.with_tensors { blocks } else { shape.trunk };
    for block in 0..written {
        for part in ["attn_q", "attn_k", "attn_v", "ffn_down", "ffn_up"] {
            file = matrix(file, &format!("blk.{block}.{part}.weight"), 4);
        }
        if block >= shape.trunk {
            file = matrix(file, &format!("blk.{block}.nextn.eh_proj.weight"), 4);
            file = file.f32_tensor(&format!("blk.{block}.nextn.enorm.weight"), &[4], &[1.0; 4]);
        }
    }
    file
}

fn written(folder: &Path, name: &str, shape: &Shape) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, file(shape).build()).unwrap();
    path
}

/// A model without such blocks, and one with two.
fn trunk_and_full(folder: &Path) -> (PathBuf, PathBuf) {
    let full = Shape { mtp: 2, ..Shape::default() };
    (written(folder, "trunk.gguf", &Shape::default()), written(folder, "full.gguf", &full))
}

/// Name, type and bytes of every tensor, in the order of the file.
fn tensors(path: &Path) -> Vec<(String, TensorType, Vec<u8>)> {
    let gguf = Gguf::open(path).unwrap();
    let read = |tensor| gguf.data(tensor).unwrap().to_vec();
    gguf.tensors().iter().map(|tensor| (tensor.name.clone(), tensor.ty, read(tensor))).collect()
}

fn is_mtp(name: &str) -> bool {
    name.starts_with("blk.3.") || name.starts_with("blk.4.")
}

fn pairs(path: &Path) -> Vec<(String, Value)> {
    let gguf = Gguf::open(path).unwrap();
    gguf.metadata().iter().map(|(key, value)| (key.to_owned(), value.clone())).collect()
}

fn list(numbers: &[i32]) -> Value {
    let values: Vec<Value> = numbers.iter().map(|number| Value::I32(*number)).collect();
    Value::Array(Array::of_values(ValueType::I32, &values))
}

fn warnings(report: &Json) -> String {
    report["warnings"].to_string()
}

#[test]
fn left_out_blocks_leave_the_file_of_a_model_that_never_had_them() {
    let dir = tempfile::tempdir().unwrap();
    let (trunk, full) = trunk_and_full(dir.path());
    let (of_trunk, dropped) = (dir.path().join("a.gguf"), dir.path().join("b.gguf"));
    stdout_of(run(args!["quantize", &trunk, &of_trunk, "--target", "Q4_K_M"]));
    let report = json_of(run(args!["quantize", &full, &dropped, "--target", "Q4_K_M", "--drop-mtp", "--json"]));
    assert!(warnings(&report).contains("2 block(s) for multi-token prediction are left out"), "{report}");
    assert_eq!(tensors(&dropped), tensors(&of_trunk));
    let without_count: Vec<_> =
        pairs(&dropped).into_iter().filter(|(key, _)| key != "step35.nextn_predict_layers").collect();
    assert_eq!(without_count, pairs(&of_trunk));
    let gguf = Gguf::open(&dropped).unwrap();
    assert_eq!(gguf.metadata().u32("step35.nextn_predict_layers").unwrap(), Some(0));
    assert_eq!(gguf.metadata().get("step35.feed_forward_length"), Some(&list(&[2, 2, 2])));
    assert_eq!(gguf.metadata().get("step35.rope.dimension_sections"), Some(&list(&[1, 2, 3, 0])));
}

#[test]
fn blocks_that_only_the_metadata_tell_of_are_left_out_too() {
    let dir = tempfile::tempdir().unwrap();
    let shape = Shape { mtp: 1, with_tensors: false, ..Shape::default() };
    let model = written(dir.path(), "model.gguf", &shape);
    let output = dir.path().join("out.gguf");
    stdout_of(run(args!["quantize", &model, &output, "--target", "Q8_0", "--drop-mtp"]));
    let gguf = Gguf::open(&output).unwrap();
    assert_eq!(gguf.metadata().u32("step35.block_count").unwrap(), Some(TRUNK));
    assert_eq!(gguf.metadata().get("step35.attention.head_count_kv"), Some(&list(&[2, 2, 2])));
}

#[test]
fn a_model_without_such_blocks_loses_nothing_and_a_warning_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let (trunk, _) = trunk_and_full(dir.path());
    let (plain, dropped) = (dir.path().join("a.gguf"), dir.path().join("b.gguf"));
    stdout_of(run(args!["quantize", &trunk, &plain, "--target", "Q8_0"]));
    let report = json_of(run(args!["quantize", &trunk, &dropped, "--target", "Q8_0", "--drop-mtp", "--json"]));
    assert!(warnings(&report).contains("nothing is left out"), "{report}");
    assert_eq!(std::fs::read(plain).unwrap(), std::fs::read(dropped).unwrap());
}

#[test]
fn blocks_of_another_file_come_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let (trunk, full) = trunk_and_full(dir.path());
    let (donor, plain) = (dir.path().join("donor.gguf"), dir.path().join("plain.gguf"));
    stdout_of(run(args!["quantize", &full, &donor, "--target", "Q8_0"]));
    stdout_of(run(args!["quantize", &trunk, &plain, "--target", "Q4_K_M"]));
    let output = dir.path().join("out.gguf");
    let command = || args!["quantize", &trunk, &output, "--target", "Q4_K_M", "--mtp-from", &donor, "--json"];
    let planned = json_of(run_with(command(), &["--dry-run"]));
    assert!(!output.exists());
    let report = json_of(run(command()));
    assert_eq!(report["size_bytes"], planned["size_bytes"]);
    assert_eq!(report["tensors"], planned["tensors"]);
    assert_eq!(std::fs::metadata(&output).unwrap().len(), report["size_bytes"].as_u64().unwrap());
    let rows = report["tensors"].as_array().unwrap();
    let taken: Vec<&Json> = rows.iter().filter(|row| row["reason"] == "--mtp-from").collect();
    assert!(taken.len() == 14 && taken.iter().all(|row| row["type"] == row["source_type"]), "{taken:?}");
    assert!(warnings(&report).contains("14 tensors, are taken from"), "{report}");

    let got = tensors(&output);
    let (blocks, others): (Vec<_>, Vec<_>) = got.into_iter().partition(|(name, ..)| is_mtp(name));
    let of_donor: Vec<_> = tensors(&donor).into_iter().filter(|(name, ..)| is_mtp(name)).collect();
    assert_eq!(blocks, of_donor);
    assert_eq!(others, tensors(&plain), "the types of the others do not change");
    let gguf = Gguf::open(&output).unwrap();
    assert_eq!(gguf.metadata().u32("step35.block_count").unwrap(), Some(5));
    assert_eq!(gguf.metadata().u32("step35.nextn_predict_layers").unwrap(), Some(2));
    assert_eq!(gguf.metadata().get("step35.attention.head_count_kv"), Some(&list(&[2, 2, 2, 4, 4])));
    assert_eq!(gguf.metadata().get("step35.feed_forward_length"), Some(&list(&[2, 2, 2, 9, 9])));
}

#[test]
fn what_was_left_out_can_be_put_back() {
    let dir = tempfile::tempdir().unwrap();
    let (_, full) = trunk_and_full(dir.path());
    let (dropped, back) = (dir.path().join("dropped.gguf"), dir.path().join("back.gguf"));
    let copy = dir.path().join("copy.gguf");
    stdout_of(run(args!["quantize", &full, &copy, "--target", "COPY"]));
    stdout_of(run(args!["quantize", &full, &dropped, "--target", "COPY", "--drop-mtp"]));
    stdout_of(run(args!["quantize", &dropped, &back, "--target", "COPY", "--mtp-from", &full]));
    assert!(std::fs::metadata(&dropped).unwrap().len() < std::fs::metadata(&full).unwrap().len());
    assert_eq!(std::fs::read(&back).unwrap(), std::fs::read(&copy).unwrap());
}

#[test]
fn split_files_lose_and_get_blocks_alike() {
    let dir = tempfile::tempdir().unwrap();
    let (trunk, full) = trunk_and_full(dir.path());
    let split = |model: &Path, name: &str| {
        let path = dir.path().join(name);
        stdout_of(run(args!["quantize", model, &path, "--target", "COPY", "--split-max-size", "40K"]));
        let first = format!("{name}-00001-of-");
        let file = files_in(dir.path()).into_iter().find(|file| file.starts_with(&first)).unwrap();
        dir.path().join(file)
    };
    let (trunk_split, full_split) = (split(&trunk, "t"), split(&full, "f"));
    let parts = |prefix: &str| files_in(dir.path()).into_iter().filter(|file| file.starts_with(prefix)).count();
    assert!(parts("t-0") > 1 && parts("f-0") > 1);

    let kept = dir.path().join("kept");
    let command = args!["quantize", &trunk_split, &kept, "--target", "Q8_0", "--keep-split", "--mtp-from", &full_split];
    let report = json_of(run_with(command, &["--json"]));
    let files: Vec<String> =
        report["output"].as_array().unwrap().iter().map(|f| f.as_str().unwrap().to_owned()).collect();
    assert_eq!(files.len(), parts("t-0"));
    let gguf = Gguf::open(&files[0]).unwrap();
    let last = files.len() - 1;
    assert!(gguf.tensors().iter().all(|tensor| !is_mtp(&tensor.name) || tensor.shard == last));
    assert_eq!(gguf.tensors().iter().filter(|tensor| is_mtp(&tensor.name)).count(), 14);
    drop(gguf);

    let whole = dir.path().join("whole.gguf");
    stdout_of(run(args!["quantize", &full, &whole, "--target", "Q8_0", "--drop-mtp"]));
    let dropped = dir.path().join("dropped");
    let command = args!["quantize", &full_split, &dropped, "--target", "Q8_0", "--keep-split", "--drop-mtp"];
    let report = json_of(run_with(command, &["--json"]));
    let mut got = tensors(Path::new(report["output"][0].as_str().unwrap()));
    let mut expected = tensors(&whole);
    got.sort_by(|a, b| a.0.cmp(&b.0));
    expected.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(got, expected);
}

#[test]
fn files_of_another_model_are_refused_with_both_names_and_the_field() {
    let dir = tempfile::tempdir().unwrap();
    let (trunk, full) = trunk_and_full(dir.path());
    let output = dir.path().join("out.gguf");
    let with =
        |donor: &Path| error_line(&run(args!["quantize", &trunk, &output, "--target", "Q8_0", "--mtp-from", donor]));
    let mtp = |shape: Shape| Shape { mtp: 2, ..shape };
    for (shape, parts) in [
        (mtp(Shape { architecture: "mimo2", ..Shape::default() }), ["general.architecture", "step35", "mimo2"]),
        (mtp(Shape { width: 512, ..Shape::default() }), ["step35.embedding_length", "256", "512"]),
        (mtp(Shape { heads_kv: 1, ..Shape::default() }), ["step35.attention.head_count_kv", "2 for layer 0", "1"]),
        (mtp(Shape { trunk: 4, ..Shape::default() }), ["step35.block_count", "3", "4"]),
        (mtp(Shape { vocabulary: 9, ..Shape::default() }), ["token_embd.weight", "8", "9"]),
        (mtp(Shape { with_tensors: false, ..Shape::default() }), ["no tensor of block 3", "", ""]),
        (Shape::default(), ["step35.nextn_predict_layers", "missing", "no blocks to take"]),
    ] {
        let donor = written(dir.path(), "donor.gguf", &shape);
        let line = with(&donor);
        assert!(parts.iter().all(|part| line.contains(part)), "{parts:?}: {line}");
        assert!(line.contains("trunk.gguf") && line.contains("donor.gguf"), "{line}");
        assert!(!output.exists());
    }
    let line = error_line(&run(args!["quantize", &full, &output, "--target", "Q8_0", "--mtp-from", &full]));
    assert!(line.contains("of its own") && line.contains("blk.3."), "{line}");
    let line = error_line(&run(args!["quantize", &trunk, &full, "--target", "Q8_0", "--mtp-from", &full, "--force"]));
    assert!(line.contains("is the input"), "{line}");
    let line = with(&dir.path().join("none.gguf"));
    assert!(line.contains("none.gguf"), "{line}");
}

#[test]
fn a_model_of_nothing_but_such_blocks_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = written(dir.path(), "model.gguf", &Shape { trunk: 0, mtp: 2, ..Shape::default() });
    let line = error_line(&run(args!["quantize", &model, "--target", "Q8_0", "--drop-mtp"]));
    assert!(line.contains("--drop-mtp") && line.contains("all 2 layers"), "{line}");
}

#[test]
fn the_flags_exclude_each_other_and_sizes() {
    for flags in [
        &["--target", "Q8_0", "--drop-mtp", "--mtp-from", "x.gguf"][..],
        &["--target", "Q8_0", "--prune-layers", "1", "--mtp-from", "x.gguf"],
        &["--target-size", "1G", "--drop-mtp"],
        &["--like", "Q4_K_M", "--mtp-from", "x.gguf"],
    ] {
        let outcome = run_with(args!["quantize", "model.gguf"], flags);
        assert_eq!(outcome.status.code(), Some(2), "{flags:?}");
    }
}
