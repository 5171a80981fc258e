//! `lwq extract` and `lwq doctor` as a user runs them.

mod common;

use std::path::Path;

use common::{args, doclet, error_line, files_in, json_of, run, run_with, stdout_of};
use lwq::gguf::Gguf;
use safetensors::{Dtype, SafeTensors};

/// The values of a tensor of the bundled model, which holds it as F16.
fn floats(name: &str) -> Vec<f32> {
    let gguf = Gguf::open(doclet()).unwrap();
    let data = gguf.data(gguf.tensor(name).unwrap()).unwrap();
    data.chunks_exact(2).map(|half| half::f16::from_le_bytes([half[0], half[1]]).to_f32()).collect()
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

#[test]
fn one_tensor_becomes_an_npy_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("q.npy");
    let json = json_of(run(args!["extract", doclet(), "^blk\\.0\\.attn_q", "-o", &path, "--json"]));
    let row = &json["tensors"][0];
    assert_eq!(
        (&row["name"], &row["type"], &row["source_type"]),
        (&"blk.0.attn_q.weight".into(), &"F32".into(), &"f16".into())
    );
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00");
    let start = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    assert_eq!(bytes[start..], bytes_of(&floats("blk.0.attn_q.weight")));
    let kept = dir.path().join("half.npy");
    assert!(run(args!["extract", doclet(), "^blk\\.0\\.attn_q", "-o", &kept, "--keep-types"]).status.success());
    let header = String::from_utf8_lossy(&std::fs::read(&kept).unwrap()[..80]).into_owned();
    assert!(header.contains("'descr': '<f2'"), "{header}");
}

#[test]
fn several_tensors_become_a_safetensors_file_or_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layer.safetensors");
    let text = stdout_of(run(args!["extract", doclet(), "blk\\.0\\.", "output_norm", "-o", &path, "--keep-types"]));
    let bytes = std::fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(text.lines().count(), file.len());
    let gguf = Gguf::open(doclet()).unwrap();
    for (name, view) in file.tensors() {
        let tensor = gguf.tensor(&name).unwrap();
        let reversed: Vec<usize> = tensor.shape.iter().rev().map(|&dim| dim as usize).collect();
        assert_eq!((view.shape(), view.data()), (reversed.as_slice(), gguf.data(tensor).unwrap()), "{name}");
        assert!([Dtype::F16, Dtype::F32].contains(&view.dtype()));
    }
    let folder = dir.path().join("a/b");
    assert!(run(args!["extract", doclet(), "blk\\.0\\.", "-o", &folder]).status.success());
    assert_eq!(
        files_in(&folder).len(),
        gguf.tensors().iter().filter(|tensor| tensor.name.starts_with("blk.0.")).count()
    );
    assert!(folder.join("blk.0.attn_q.weight.npy").is_file());
}

#[test]
fn block_types_are_decoded() {
    let dir = tempfile::tempdir().unwrap();
    let (quantized, path) = (dir.path().join("q.gguf"), dir.path().join("e.safetensors"));
    assert!(run(args!["quantize", doclet(), &quantized, "Q8_0", "--quiet"]).status.success());
    assert!(run(args!["extract", &quantized, "attn_q", "-o", &path, "--keep-types"]).status.success());
    let bytes = std::fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let view = file.tensor("blk.0.attn_q.weight").unwrap();
    assert_eq!(view.dtype(), Dtype::F32);
    let decoded = view.data().chunks_exact(4).map(|raw| f32::from_le_bytes(raw.try_into().unwrap()));
    let original = floats("blk.0.attn_q.weight");
    let largest = original.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    assert!(decoded.zip(&original).all(|(a, b)| (a - b).abs() <= largest / 127.0));
}

#[test]
fn what_cannot_be_extracted_is_one_line_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let out = |name: &str| dir.path().join(name).into_os_string().into_string().unwrap();
    for (rest, part) in [
        (["nothing-like-it", &out("a.npy")], "no tensor's name matches \"nothing-like-it\""),
        (["attn", &out("a.npy")], "a .npy file has one tensor"),
        (["attn_q", &out("no/such/a.safetensors")], "does not exist; create it first"),
    ] {
        let line = error_line(&run(args!["extract", doclet(), rest[0], "-o", rest[1]]));
        assert!(line.contains(part), "{line}");
    }
    let existing = dir.path().join("there.npy");
    std::fs::write(&existing, "x").unwrap();
    let line = error_line(&run(args!["extract", doclet(), "output_norm", "-o", &existing]));
    assert!(line.contains("exists already"), "{line}");
    let output = run_with(args!["extract", doclet(), "(", "-o", "x.npy"], &[]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(run(args!["extract", doclet(), "-o", out("all"), "--dry-run"]).status.success());
    assert_eq!(files_in(dir.path()), ["there.npy"]);
}

#[test]
fn doctor_says_what_is_chosen_and_why() {
    let dir = tempfile::tempdir().unwrap();
    let json = json_of(run(args!["doctor", "--folder", dir.path(), "--seconds", "0", "--json"]));
    assert_eq!(json["products"].as_array().unwrap().len(), 0);
    assert_eq!(Path::new(json["disks"][0]["folder"].as_str().unwrap()), dir.path());
    let used = json["kernels"].as_array().unwrap().iter().filter(|row| !row["used_for"].as_array().unwrap().is_empty());
    assert!((1..=2).contains(&used.count()), "{json}");
    let capped = common::lwq().args(["doctor", "--seconds", "0"]).env("LWQ_ISA", "scalar").output().unwrap();
    let text = stdout_of(capped);
    assert!(text.contains("uses     scalar: "), "{text}");
    assert!(text.contains("scalar") && text.contains("accurate products, fast products"), "{text}");
}

#[test]
fn doctor_measures_products_against_the_peak() {
    let json = json_of(run("doctor --seconds 1 --threads 1 --json".split(' ')));
    let rows = json["products"].as_array().unwrap();
    for ty in ["f32", "bf16"] {
        let row = rows.iter().find(|row| row["type"] == ty).unwrap_or_else(|| panic!("{ty}: {json}"));
        assert!(row["gflops"].as_f64().unwrap() > 0.0 && row["share_of_peak"].as_f64().unwrap() > 0.0, "{row}");
    }
}
