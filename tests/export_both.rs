//! `lwq export --also-gguf`: a folder and GGUF files from one pass over the model.

mod common;
mod convert_support;
mod export_support;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use common::{args, error_line, files_in, json_of, run, run_with, stdout_of};
use export_support::{running_mixture, two_layers};
use serde_json::json;

/// Little text: the bytes depend on it, but not whether they are the same.
const TEXT: [&str; 2] = ["--calibration-tokens", "1024"];

fn export(folder: &Path, output: &Path, options: &[&str]) -> std::process::Output {
    run_with(args!["export", folder, output, "--scheme", "W4A16", "--json"], &[&TEXT[..], options].concat())
}

/// The file that two verbs make.
fn in_two_steps(folder: &Path, target: &str) -> PathBuf {
    let whole = folder.with_file_name("whole.gguf");
    stdout_of(run(args!["convert", folder, "-o", &whole, "--force", "--quiet"]));
    let output = folder.with_file_name(format!("two-steps-{target}.gguf"));
    let arguments: Vec<OsString> =
        args!["quantize", &whole, &output, "--target", target, "--rounding", "feedback", "--quiet"];
    stdout_of(run_with(arguments, &TEXT));
    output
}

fn assert_same(found: &Path, expected: &Path) {
    assert!(std::fs::read(found).unwrap() == std::fs::read(expected).unwrap(), "{} differs", found.display());
}

#[test]
fn one_pass_makes_the_files_that_two_would() {
    let dir = tempfile::tempdir().unwrap();
    for (name, source) in [("dense", two_layers()), ("sparse", running_mixture(true))] {
        let dir = dir.path().join(name);
        let folder = source.write(&dir.join("model"));
        let (alone, output, other) = (dir.join("alone"), dir.join("out"), dir.join("other.gguf"));
        stdout_of(export(&folder, &alone, &[]));
        let named = format!("q5_0={}", other.display());
        let report = json_of(export(&folder, &output, &["--also-gguf", "Q4_K_M", "--also-gguf", &named, "--check"]));
        let files = report["also_gguf"].as_array().unwrap();
        assert_eq!((files.len(), &files[0]["target"], &files[1]["target"]), (2, &json!("Q4_K_M"), &json!("Q5_0")));
        assert_eq!(files[1]["size_bytes"], std::fs::metadata(&other).unwrap().len());
        assert_same(&dir.join("out-Q4_K_M.gguf"), &in_two_steps(&folder, "Q4_K_M"));
        assert_same(&other, &in_two_steps(&folder, "Q5_0"));
        assert_eq!(files_in(&alone), files_in(&output));
        files_in(&alone).iter().for_each(|name| assert_same(&output.join(name), &alone.join(name)));
        let left = ["alone", "model", "other.gguf", "out", "out-Q4_K_M.gguf"];
        let made = ["two-steps-Q4_K_M.gguf", "two-steps-Q5_0.gguf", "whole.gguf"];
        assert_eq!(files_in(&dir), [&left[..], &made].concat());
    }
}

#[cfg(unix)]
#[test]
fn both_go_on_where_the_run_was_killed() {
    use common::{interrupt, lwq, wait_for_work};
    use std::process::Stdio;
    let dir = tempfile::tempdir().unwrap();
    let folder = two_layers().write(&dir.path().join("model"));
    let (whole, output) = (dir.path().join("whole"), dir.path().join("out"));
    let options = ["--also-gguf", "Q4_K_M"];
    stdout_of(export(&folder, &whole, &options));
    let file = dir.path().join("out-Q4_K_M.gguf");
    let step = dir.path().join("out-Q4_K_M.gguf.partial/step-0000.gguf");
    let mut child = lwq()
        .args(args!["export", &folder, &output, "--scheme", "W4A16", "--json"])
        .args([&TEXT[..], &options].concat())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for_work(&mut child, || step.exists());
    interrupt(child, libc::SIGKILL);
    assert!(!output.exists() && !file.exists());
    let done = export(&folder, &output, &options);
    let stderr = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(stderr.contains("going on after 1 of 3 steps") && !stderr.contains("of 3 steps done"), "{stderr}");
    stdout_of(done);
    assert_same(&file, &dir.path().join("whole-Q4_K_M.gguf"));
    files_in(&whole).iter().for_each(|name| assert_same(&output.join(name), &whole.join(name)));
    let names = ["model", "out", "out-Q4_K_M.gguf", "whole", "whole-Q4_K_M.gguf"];
    assert_eq!(files_in(dir.path()), names);

    // A file that is there is not replaced without being told to.
    let line =
        error_line(&export(&folder, &dir.path().join("x"), &["--also-gguf", &format!("Q4_K_M={}", file.display())]));
    assert!(line.contains("out-Q4_K_M.gguf: exists already"), "{line}");
    assert_eq!(files_in(dir.path()), names);
}

#[test]
fn what_does_not_go_together_is_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let folder = two_layers().write(&dir.path().join("model"));
    let output = dir.path().join("out");
    for rounding in ["rtn", "search", "gptq"] {
        let options = ["--scheme", "W4A16", "--rounding", rounding, "--also-gguf", "Q4_K_M"];
        let done = run_with(args!["export", &folder, &output], &options);
        assert_eq!(done.status.code(), Some(2));
        let stderr = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(
            stderr.contains(&format!("--also-gguf goes with --rounding feedback, not with {rounding}")),
            "{stderr}"
        );
    }
    for wrong in ["Q4_X", "Q4_K_M=", ""] {
        assert_eq!(export(&folder, &output, &["--also-gguf", wrong]).status.code(), Some(2), "{wrong}");
    }
    let mut other = two_layers();
    other.config["architectures"] = json!(["OtherForCausalLM"]);
    let other = other.write(&dir.path().join("other"));
    let line = error_line(&export(&other, &output, &["--also-gguf", "Q4_K_M"]));
    assert!(line.contains("give --rounding search or rtn"), "{line}");
    let line = error_line(&run(args!["export", &other, &output, "--scheme", "W4A16", "--also-gguf", "Q4_K_M"]));
    assert!(line.contains("the rounding is search; leave it out"), "{line}");
    let refused = |options: &[&str]| {
        let line = error_line(&export(&folder, &output, options));
        assert_eq!(files_in(dir.path()), ["model", "other"], "{line}");
        line
    };
    assert!(refused(&["--also-gguf", "Q4_K_M", "--also-gguf", "Q4_K_M"]).contains("the name of two files"));
    let inside = format!("Q4_K_M={}", output.join("x.gguf").display());
    assert!(refused(&["--also-gguf", &inside]).contains("lies in the folder to be written"));
    let nowhere = format!("Q4_K_M={}", dir.path().join("no/x.gguf").display());
    assert!(refused(&["--also-gguf", &nowhere]).contains("a folder that does not exist"));
}
