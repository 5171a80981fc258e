//! `lwq hash` and `lwq diff` as a user runs them: what a file holds counts, how it is laid out does not.

mod common;

use std::path::PathBuf;

use common::{args, doclet, error_line, files_in, json_of, run, run_with, stdout_of};
use lwq::gguf::testing::RawGguf;
use lwq::gguf::{Gguf, TensorType};
use sha2::{Digest, Sha256};

/// Writes a file and gives its path.
fn write(folder: &tempfile::TempDir, name: &str, file: RawGguf) -> PathBuf {
    let path = folder.path().join(name);
    std::fs::write(&path, file.build()).unwrap();
    path
}

fn sha_of(report: &serde_json::Value) -> String {
    report["models"][0]["sha256"].as_str().unwrap().to_owned()
}

#[test]
fn parts_have_the_digest_of_the_whole() {
    let dir = tempfile::tempdir().unwrap();
    let prefix = dir.path().join("p");
    let parts = json_of(run(args!["split", doclet(), &prefix, "--max-size", "3MB", "--json"]));
    let first = parts["parts"][0]["file"].as_str().unwrap();
    let text = stdout_of(run(args!["hash", doclet(), first]));
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0].split_once("  ").unwrap().0, lines[1].split_once("  ").unwrap().0);
    assert!(lines[1].ends_with(first), "{text}");
    let one = stdout_of(run(args!["hash", doclet(), "--threads", "1"]));
    assert_eq!(one.lines().next(), lines.first().copied());
}

#[test]
fn tensor_lines_are_digests_of_the_data() {
    let text = stdout_of(run(args!["hash", doclet(), "--tensors"]));
    let gguf = Gguf::open(doclet()).unwrap();
    assert_eq!(text.lines().count(), gguf.tensors().len());
    let mut names: Vec<&str> = gguf.tensors().iter().map(|tensor| tensor.name.as_str()).collect();
    names.sort_unstable();
    for (line, name) in text.lines().zip(names) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let tensor = gguf.tensor(name).unwrap();
        let sha256 = format!("{:x}", Sha256::digest(gguf.data(tensor).unwrap()));
        assert_eq!((words[0], words[1], words[3]), (sha256.as_str(), tensor.ty.to_string().as_str(), name));
    }
    let json = json_of(run(args!["hash", doclet(), "--tensors", "--json"]));
    assert_eq!(json["models"][0]["tensors"].as_array().unwrap().len(), gguf.tensors().len());
}

#[test]
fn metadata_count_unless_they_are_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let file = |n| RawGguf::new().u32("n", n).f32_tensor("w", &[2], &[1.0, 2.0]);
    let (a, b) = (write(&dir, "a.gguf", file(1)), write(&dir, "b.gguf", file(2)));
    let of = |path: &PathBuf, more: &[&str]| sha_of(&json_of(run_with(args!["hash", path, "--json"], more)));
    assert_ne!(of(&a, &[]), of(&b, &[]));
    assert_eq!(of(&a, &["--no-metadata"]), of(&b, &["--no-metadata"]));
}

#[test]
fn equal_models_have_no_differences() {
    let dir = tempfile::tempdir().unwrap();
    assert!(run(args!["split", doclet(), dir.path().join("p"), "--max-tensors", "30"]).status.success());
    let first = dir.path().join(&files_in(dir.path())[0]);
    let report = json_of(run(args!["diff", doclet(), &first, "--exit-code", "--json"]));
    assert_eq!((&report["same"], report["metadata"].as_array().unwrap().len()), (&true.into(), 0));
    let text = stdout_of(run(args!["diff", doclet(), &first]));
    assert!(text.starts_with("0 keys and 0 tensors differ, "), "{text}");
}

#[test]
fn a_quantized_file_differs_in_types_and_by_its_rounding() {
    let dir = tempfile::tempdir().unwrap();
    let quantized = dir.path().join("q.gguf");
    assert!(run(args!["quantize", doclet(), &quantized, "Q8_0", "--quiet"]).status.success());
    let output = run(args!["diff", doclet(), &quantized, "--json"]);
    let report = json_of(output);
    let rows = report["tensors"].as_array().unwrap();
    assert!(!rows.is_empty() && report["same_tensors"].as_u64().unwrap() > 0);
    for row in rows {
        assert_eq!((&row["a"]["type"], &row["b"]["type"]), (&"f16".into(), &"q8_0".into()), "{row}");
        let error = row["relative_rms_error"].as_f64().unwrap();
        assert!((1e-4..2e-2).contains(&error), "{row}");
        assert!(row["first_differing_byte"].is_null());
    }
    assert!(report["metadata"].as_array().unwrap().iter().any(|row| row["key"] == "general.file_type"));
    // The error is the same for any number of threads.
    let one = json_of(run(args!["diff", doclet(), &quantized, "--json", "--threads", "1"]));
    assert_eq!(one, report);
    let text = stdout_of(run(args!["diff", doclet(), &quantized]));
    assert!(text.contains("~ general.file_type: u32 (1) -> u32 (7)"), "{text}");
    assert!(text.contains("relative RMS error"), "{text}");
}

#[test]
fn files_that_differ_end_with_three_only_where_it_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let base = RawGguf::new().u32("n", 1).f32_tensor("w", &[2], &[1.0, 2.0]);
    let a = write(&dir, "a.gguf", base.clone().f32_tensor("only", &[1], &[1.0]));
    let b = write(&dir, "b.gguf", base);
    assert_eq!(run(args!["diff", &a, &b]).status.code(), Some(0));
    let output = run(args!["diff", &a, &b, "--exit-code"]);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("- only  f32 1"), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    let quiet = run(args!["diff", &a, &b, "--exit-code", "--quiet"]);
    assert_eq!((quiet.status.code(), quiet.stdout.len()), (Some(3), 0));
    // A comparison that cannot be made is an error.
    let line = error_line(&run(args!["diff", &a, dir.path().join("lost.gguf"), "--exit-code"]));
    assert!(line.contains("lost.gguf"), "{line}");
    assert_eq!(run(args!["diff", &a]).status.code(), Some(2));
}

#[test]
fn names_and_values_from_a_file_cannot_steer_a_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let a =
        write(&dir, "a.gguf", RawGguf::new().str("k\u{1b}[2J", "v\u{1b}[2J").f32_tensor("t\u{1b}[2J", &[1], &[1.0]));
    let b = write(&dir, "b.gguf", RawGguf::new());
    for arguments in [args!["diff", &a, &b], args!["diff", &b, &a], args!["hash", &a, "--tensors"]] {
        let text = stdout_of(run(arguments));
        assert!(!text.contains('\u{1b}') && text.contains("[2J"), "{text}");
    }
}

#[test]
fn types_that_are_not_decoded_are_compared_by_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let file = |byte: u8| RawGguf::new().tensor("w", &[64], TensorType(200), &[[0; 63].as_slice(), &[byte]].concat());
    let (a, b) = (write(&dir, "a.gguf", file(1)), write(&dir, "b.gguf", file(2)));
    let report = json_of(run(args!["diff", &a, &b, "--json"]));
    let row = &report["tensors"][0];
    assert_eq!((&row["first_differing_byte"], row["relative_rms_error"].is_null()), (&63.into(), true), "{report}");
    assert_eq!(json_of(run(args!["diff", &a, &a, "--json"]))["same"], true);
}
