//! `lwq quantize --gradients` as a user runs it.

mod common;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};

use common::{args, data, doclet, error_line, files_in, json_of, lwq, run, stdout_of};
use lwq::cpu::Level;
use lwq::gguf::{Gguf, fingerprint};
use lwq::moments::{GradientMoments, GradientProvenance, save_gradients};
use lwq::quant;
use lwq::rounding::gptq::SecondMoment;
use serde_json::Value as Json;

const TIED: [&str; 5] = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_down"];

fn calibration() -> PathBuf {
    data("golden/calib-sample.txt")
}

/// A file of gradients of which two directions have the most: the model's own take a backward pass.
fn gradients(dir: &Path, model: &Path, seed: u64) -> PathBuf {
    let gguf = Gguf::open(model).unwrap();
    let of_role = |name: &str| TIED.iter().any(|role| name.ends_with(&format!(".{role}.weight")));
    let mut moments = BTreeMap::new();
    for tensor in gguf.tensors().iter().filter(|tensor| of_role(&tensor.name)) {
        let m = tensor.rows_per_matrix() as usize;
        let mut state = seed.wrapping_add(moments.len() as u64);
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        let shared: Vec<f32> = (0..2 * m).map(|_| next()).collect();
        let mut moment = SecondMoment::new(m).unwrap();
        for _ in 0..300 {
            let (a, b) = (next(), next());
            let row: Vec<f32> = (0..m).map(|j| a * shared[j] + b * shared[m + j] + 0.3 * next()).collect();
            moment.accumulate(&row, None);
        }
        moments.insert(tensor.name.clone(), moment);
    }
    let provenance = GradientProvenance {
        model: "model.gguf".to_owned(),
        model_sha256: fingerprint(&gguf),
        text: "text".to_owned(),
        text_sha256: "0".repeat(64),
        tokens: 300,
        seed,
    };
    let path = dir.join(format!("gradients-{seed}.gguf"));
    save_gradients(&path, true, &provenance, &moments, &BTreeMap::new()).unwrap();
    path
}

/// A few thousand tokens of other text that judge what was rounded.
fn gate(dir: &Path) -> PathBuf {
    let path = dir.join("gate.txt");
    let text = std::fs::read_to_string(data("golden/eval-sample.txt")).unwrap();
    std::fs::write(&path, text.chars().take(8_000).collect::<String>()).unwrap();
    path
}

/// Arguments that round `model` to `output` with few tokens.
fn feedback(dir: &Path, model: &Path, output: &Path, tokens: &str) -> Vec<OsString> {
    args!["quantize", model, output, "-f", calibration(), "--calibration-tokens", tokens, "--gate-file", gate(dir)]
}

/// The same with gradients, to a target.
fn with_gradients(arguments: Vec<OsString>, gradients: &Path, target: &str) -> Vec<OsString> {
    arguments.into_iter().chain(args!["--gradients", gradients, "--target", target]).collect()
}

#[test]
fn rows_of_the_matrices_in_the_file_are_tied_and_the_file_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let (output, plain) = (dir.path().join("o.gguf"), dir.path().join("plain.gguf"));
    let gradients = gradients(dir.path(), &doclet(), 1);
    let mut arguments = with_gradients(feedback(dir.path(), &doclet(), &output, "2048"), &gradients, "Q4_K_M");
    arguments.push("--json".into());
    let report = json_of(run(arguments));
    let digest = GradientMoments::open(&gradients).unwrap().digest();
    assert_eq!(report["rounding"]["calibration"]["gradients_sha256"], Json::String(digest));
    let gguf = Gguf::open(&output).unwrap();
    let mut tied = 0;
    for tensor in report["tensors"].as_array().unwrap().iter().filter(|tensor| tensor["rounding"].is_object()) {
        let name = tensor["name"].as_str().unwrap();
        let expected = TIED.iter().any(|role| name.contains(role));
        assert_eq!(tensor["rounding"]["two_sided"].as_bool().unwrap_or(false), expected, "{name}");
        let ratio = tensor["rounding"]["held_out_ratio"].as_f64().unwrap();
        assert!(!expected || ratio < 0.9, "{name}: {ratio}");
        tied += usize::from(expected);
    }
    assert_eq!(tied, 30);
    for tensor in gguf.tensors() {
        quant::validate(tensor.ty, gguf.data(tensor).unwrap()).unwrap_or_else(|e| panic!("{}: {e}", tensor.name));
    }
    // Other matrices have the bytes that they have without gradients.
    let mut arguments = feedback(dir.path(), &doclet(), &plain, "2048");
    arguments.extend(args!["--target", "Q4_K_M", "--quiet"]);
    stdout_of(run(arguments));
    let plain = Gguf::open(&plain).unwrap();
    // Gradients take no byte more, so that files of plans keep their limit.
    let size = |gguf: &Gguf| gguf.file_bytes();
    assert_eq!(size(&plain), size(&gguf));
    for tensor in plain.tensors() {
        let same = gguf.data(gguf.tensor(&tensor.name).unwrap()).unwrap() == plain.data(tensor).unwrap();
        let of_role = TIED.iter().any(|role| tensor.name.contains(role));
        assert_eq!(same, !of_role, "{}", tensor.name);
    }
}

#[test]
fn bytes_depend_neither_on_threads_nor_on_the_instruction_set() {
    let dir = tempfile::tempdir().unwrap();
    // Two layers are enough, as scalar code takes its time.
    let model = dir.path().join("two-layers.gguf");
    stdout_of(run(args!["quantize", doclet(), &model, "--target", "COPY", "--prune-layers", "1,2,3,4", "--quiet"]));
    let gradients = gradients(dir.path(), &model, 2);
    // Types by columns, by table and by groups of eight.
    let types = ["--tensor-type", "ffn_down=iq3_s", "--tensor-type", "attn_output=iq4_xs"];
    let bytes = |isa: &str, threads: &str| {
        let output = dir.path().join(format!("{isa}-{threads}.gguf"));
        let mut command = lwq();
        command.env("LWQ_ISA", isa).args(with_gradients(
            feedback(dir.path(), &model, &output, "512"),
            &gradients,
            "Q4_K_S",
        ));
        command.args(types).args(["--token-embedding-type", "f16", "--threads", threads, "--quiet"]);
        stdout_of(command.output().unwrap());
        std::fs::read(output).unwrap()
    };
    let expected = bytes(Level::Scalar.name(), "2");
    for level in Level::ALL.into_iter().filter(|l| l.is_of_this_architecture() && *l != Level::Scalar) {
        let isa = level.name();
        if level.is_available() {
            assert!(["1", "3"].iter().all(|threads| bytes(isa, threads) == expected), "{isa}");
        } else {
            // Past what the test harness keeps to itself.
            writeln!(std::io::stderr(), "skipped: gradients with {isa} (this CPU lacks it, or LWQ_ISA forbids it)")
                .unwrap();
        }
    }
}

#[cfg(unix)]
#[test]
fn unfinished_work_with_other_gradients_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("o.gguf");
    let files = [3, 4].map(|seed| gradients(dir.path(), &doclet(), seed));
    let arguments = |gradients: &Path| {
        let mut arguments = with_gradients(feedback(dir.path(), &doclet(), &output, "1024"), gradients, "Q5_K_S");
        arguments.push("--quiet".into());
        arguments
    };
    let first_step = dir.path().join("o.gguf.partial/step-0001.gguf");
    let mut command = lwq();
    command.args(arguments(&files[0])).stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    let mut child = command.spawn().unwrap();
    common::wait_for_work(&mut child, || first_step.exists());
    common::interrupt(child, libc::SIGINT);
    let line = error_line(&run(arguments(&files[1])));
    assert!(line.contains("other settings") && line.contains("--force"), "{line}");
    stdout_of(run(arguments(&files[0])));
    assert!(!files_in(dir.path()).contains(&"o.gguf.partial".to_owned()));
}

#[test]
fn what_is_no_file_of_this_models_gradients_is_refused_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("o.gguf");
    let other = dir.path().join("other.gguf");
    stdout_of(run(args!["quantize", doclet(), &other, "--target", "COPY", "--prune-layers", "1", "--quiet"]));
    let of_other = gradients(dir.path(), &other, 5);
    let refused = |gradients: &Path| {
        error_line(&run(with_gradients(feedback(dir.path(), &doclet(), &output, "1024"), gradients, "Q4_K_M")))
    };
    let line = refused(&of_other);
    assert!(line.contains("another model") && line.contains("gradients-5.gguf"), "{line}");
    assert!(refused(&doclet()).contains("lwq measure --gradients"), "{}", refused(&doclet()));
    assert!(refused(&dir.path().join("missing.gguf")).contains("missing.gguf"));
    let usage = |arguments: Vec<OsString>, part: &str| {
        let found = run(arguments);
        let stderr = String::from_utf8_lossy(&found.stderr).into_owned();
        assert!(found.status.code() == Some(2) && stderr.contains(part), "{stderr}");
    };
    let search = args!["quantize", doclet(), &output, "--target", "Q4_K_M", "--rounding", "search"];
    usage(search.into_iter().chain(args!["--gradients", &of_other]).collect(), "--gradients goes with");
    let export = args!["export", data("golden"), dir.path().join("out"), "--gradients", &of_other];
    usage(export, "--gradients");
    assert!(!output.exists());
}
