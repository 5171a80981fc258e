//! `lwq imatrix merge|convert|stats` as a user runs them.

use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/golden");

fn golden(name: &str) -> PathBuf {
    Path::new(GOLDEN).join(name)
}

/// Runs `lwq imatrix` in `dir`; gives exit code, stdout and stderr.
fn imatrix(dir: &Path, args: &[&str]) -> (i32, String, String) {
    let output = Command::cargo_bin("lwq").unwrap().current_dir(dir).arg("imatrix").args(args).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(golden("doclet.imatrix.gguf"), dir.path().join("a.gguf")).unwrap();
    fs::copy(golden("doclet.imatrix.dat"), dir.path().join("a.dat")).unwrap();
    dir
}

#[track_caller]
fn fails(dir: &Path, args: &[&str], expected: &str) {
    let (code, stdout, stderr) = imatrix(dir, args);
    let error = stderr.lines().last().unwrap_or_default();
    assert!(code == 1 && stdout.is_empty(), "{code} {stdout:?} {stderr:?}");
    assert!(error.starts_with("error: ") && error.contains(expected), "{stderr:?} lacks {expected:?}");
}

#[test]
fn convert_writes_what_llama_imatrix_writes() {
    let dir = folder();
    let (code, stdout, stderr) = imatrix(dir.path(), &["convert", "a.gguf", "b.dat"]);
    assert_eq!((code, stderr.as_str()), (0, ""));
    assert_eq!(stdout, "b.dat: 42 entries, 241 chunks of 256 tokens, from 1 file\n");
    assert!(fs::read(dir.path().join("b.dat")).unwrap() == fs::read(golden("doclet.imatrix.dat")).unwrap());

    let (code, ..) = imatrix(dir.path(), &["convert", "a.gguf", "copy", "--format", "gguf"]);
    assert_eq!(code, 0);
    assert!(fs::read(dir.path().join("copy")).unwrap() == fs::read(golden("doclet.imatrix.gguf")).unwrap());
}

#[test]
fn converting_dat_says_which_chunk_size_is_assumed() {
    let dir = folder();
    let (code, stdout, stderr) = imatrix(dir.path(), &["convert", "a.dat", "b.gguf", "--json"]);
    assert_eq!(code, 0);
    assert!(stderr.starts_with("warning: a.dat: ") && stderr.contains("512 assumed (--chunk-size"), "{stderr}");
    let json: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((&json["format"], &json["chunk_size"]), (&"gguf".into(), &512.into()));
    assert_eq!(json["warnings"].as_array().unwrap().len(), 1);
    let (_, stdout, stderr) = imatrix(dir.path(), &["convert", "a.dat", "c.gguf", "--chunk-size", "256"]);
    assert_eq!((stdout.as_str(), stderr.as_str()), ("c.gguf: 42 entries, 241 chunks of 256 tokens, from 1 file\n", ""));
}

#[test]
fn merge_adds_up_and_warns_of_repeated_files() {
    let dir = folder();
    let (code, stdout, stderr) = imatrix(dir.path(), &["merge", "a.gguf", "a.gguf", "-o", "sum.gguf", "--json"]);
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(stderr, "warning: a.gguf: holds the same data as a.gguf; its tokens now count twice\n");
    let json: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(json["chunk_count"], 482);
    assert_eq!(json["datasets"], serde_json::json!(["calib-sample.txt"]));

    // A .dat takes the chunk size of the GGUF beside it, in any order.
    for inputs in [["a.dat", "sum.gguf"], ["sum.gguf", "a.dat"]] {
        let (code, stdout, stderr) = imatrix(dir.path(), &["merge", inputs[0], inputs[1], "-o", "all.dat", "--force"]);
        assert_eq!(code, 0, "{stderr}");
        assert_eq!(stdout, "all.dat: 42 entries, 723 chunks of 256 tokens, from 2 files\n");
        assert!(stderr.contains("256 assumed"), "{stderr}");
    }
}

#[test]
fn merging_shards_restores_the_whole() {
    let dir = folder();
    let whole = lwq::imatrix::Imatrix::open(&golden("doclet.imatrix.gguf")).unwrap();
    let mut args = vec!["merge".to_owned(), "-o".to_owned(), "whole.gguf".to_owned()];
    for shard in 0..4u64 {
        let mut part = whole.clone();
        for entry in part.entries.values_mut() {
            let tokens = entry.counts[0];
            entry.counts[0] = tokens * (shard + 1) / 10;
            let share = entry.counts[0] as f32 / tokens as f32;
            entry.sums.iter_mut().for_each(|sum| *sum *= share);
        }
        let name = format!("part{shard}.gguf");
        part.save(&dir.path().join(&name), lwq::imatrix::Form::Gguf, false).unwrap();
        args.push(name);
    }
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let (code, _, stderr) = imatrix(dir.path(), &args);
    assert_eq!(code, 0, "{stderr}");
    let merged = lwq::imatrix::Imatrix::open(&dir.path().join("whole.gguf")).unwrap();
    for (name, entry) in &whole.entries {
        assert!(entry.counts[0].abs_diff(merged.entries[name].counts[0]) <= 4);
        let (a, b) = (entry.importance().values, merged.entries[name].importance().values);
        for (a, b) in a.iter().zip(&b) {
            assert!((a - b).abs() <= a * 1e-6, "{name}: {a} {b}");
        }
    }
}

#[test]
fn outputs_that_would_destroy_something_are_refused() {
    let dir = folder();
    let before = fs::read(dir.path().join("a.gguf")).unwrap();
    fails(dir.path(), &["merge", "a.dat", "a.gguf", "-o", "./a.gguf", "--force"], "is also an input");
    fails(dir.path(), &["convert", "a.gguf", "a.gguf", "--force"], "is also an input");
    fails(dir.path(), &["convert", "a.gguf", "a.dat"], "exists already; add --force");
    fails(dir.path(), &["convert", "a.gguf", "no/such/b.dat"], "does not exist");
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("a.gguf", dir.path().join("link.gguf")).unwrap();
        fails(dir.path(), &["merge", "a.gguf", "-o", "link.gguf", "--force"], "is also an input");
    }
    assert!(fs::read(dir.path().join("a.gguf")).unwrap() == before);
}

#[test]
fn a_failed_merge_leaves_no_output() {
    let dir = folder();
    fs::write(dir.path().join("cut.gguf"), &fs::read(golden("doclet.imatrix.gguf")).unwrap()[..20000]).unwrap();
    fs::write(dir.path().join("text.dat"), "no imatrix at all, only text").unwrap();
    fails(dir.path(), &["merge", "a.gguf", "cut.gguf", "-o", "out.gguf"], "cut.gguf: cut short");
    fails(dir.path(), &["merge", "a.gguf", "text.dat", "-o", "out.gguf"], "text.dat: no imatrix");
    fails(dir.path(), &["merge", "missing.gguf", "-o", "out.gguf"], "missing.gguf: cannot read");
    let mut names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["a.dat", "a.gguf", "cut.gguf", "text.dat"]);
}

#[test]
fn stats_show_tensors_layers_and_a_map() {
    let dir = folder();
    let (code, stdout, stderr) = imatrix(dir.path(), &["stats", "a.gguf"]);
    assert_eq!((code, stderr.as_str()), (0, ""));
    let lines: Vec<&str> = stdout.lines().collect();
    assert_eq!(lines[0], "a.gguf: GGUF, 42 entries, 241 chunks of 256 tokens, from calib-sample.txt");
    assert!(lines[2].contains("Σ(Act²)") && lines[2].contains("CosSim"));
    assert_eq!(lines[3].split_whitespace().take(3).collect::<Vec<_>>(), ["0", "ffn_down", "1870.95"]);
    assert!(stdout.contains("μΣ(Act²)") && stdout.contains("\nffn_down    █"), "{stdout}");
    assert!(!stdout.contains('\x1b'), "no colours in a pipe");

    let (_, stdout, _) = imatrix(dir.path(), &["stats", "a.gguf", "--json", "--sort", "role"]);
    let json: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(json["tensors"].as_array().unwrap().len(), 42);
    assert_eq!(json["tensors"][0]["name"], "blk.4.attn_k.weight");
    assert_eq!(json["layers"].as_array().unwrap().len(), 6);
    assert_eq!((&json["format"], &json["chunk_count"]), (&"gguf".into(), &241.into()));
}

#[test]
fn a_model_is_refused_with_what_to_give_instead() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/doclet-4m-f16.gguf");
    fails(Path::new(GOLDEN), &["stats", model], "is a model (general.architecture is \"llama\")");
}

/// Runs `lwq quantize` on the bundled model with `imatrix`; the output is `out.gguf` in `dir`.
fn quantize(dir: &Path, imatrix: &Path, target: &str) -> (i32, String) {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/doclet-4m-f16.gguf");
    let mut command = Command::cargo_bin("lwq").unwrap();
    command.current_dir(dir).args(["quantize", model, "out.gguf", "--target", target, "--imatrix"]).arg(imatrix);
    let output = command.output().unwrap();
    (output.status.code().unwrap_or(-1), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn quantize_stops_before_work_when_needed_data_are_missing() {
    let dir = folder();
    let mut half = lwq::imatrix::Imatrix::open(&golden("doclet.imatrix.gguf")).unwrap();
    half.entries.retain(|name, _| !name.starts_with("blk.3.ffn") && !name.starts_with("blk.4.attn_q"));
    let path = dir.path().join("half.gguf");
    half.save(&path, lwq::imatrix::Form::Gguf, false).unwrap();

    let (code, stderr) = quantize(dir.path(), &path, "IQ2_XXS");
    let error = stderr.lines().last().unwrap();
    assert_eq!(code, 1, "{stderr}");
    for name in
        ["4 tensors have no imatrix data", "blk.3.ffn_down.weight", "blk.3.ffn_up.weight", "blk.4.attn_q.weight"]
    {
        assert!(error.contains(name), "{error:?} lacks {name:?}");
    }
    assert!(!dir.path().join("out.gguf").exists());

    // Types that can do without are only warned about, by name.
    let (code, stderr) = quantize(dir.path(), &path, "Q4_0");
    assert!(code == 0 && stderr.contains("4 of the quantized tensors have no imatrix data"), "{stderr}");
}

#[test]
fn quantize_refuses_the_imatrix_of_another_model() {
    let dir = folder();
    let mut other = lwq::imatrix::Imatrix::open(&golden("doclet.imatrix.gguf")).unwrap();
    for entry in other.entries.values_mut() {
        entry.sums.truncate(entry.sums.len() / 2);
    }
    let path = dir.path().join("other.gguf");
    other.save(&path, lwq::imatrix::Form::Gguf, false).unwrap();
    let (code, stderr) = quantize(dir.path(), &path, "Q4_K_M");
    let error = stderr.lines().last().unwrap();
    assert!(code == 1 && error.contains("42 imatrix entries have another length than the tensor"), "{stderr}");
    assert!(!dir.path().join("out.gguf").exists());
}
