//! `lwq plan` and `lwq quantize --plan` as a user runs them.

mod common;

use std::path::{Path, PathBuf};
use std::process::Output;

use common::{args, data, doclet, error_line, files_in, json_of, lwq, run, run_with, stdout_of};
use lwq::gguf::{Gguf, TensorType};
use lwq::plan::PlanFile;

/// Types whose encoders are fast; every test that does not need others uses them.
const FAST: &str = "Q3_K,Q4_K,Q5_K,Q6_K,Q8_0";

fn imatrix() -> PathBuf {
    data("golden/doclet.imatrix.gguf")
}

/// Plans for the bundled model with its imatrix and the fast types.
fn plan(dir: &Path, name: &str, more: &[&str]) -> (PathBuf, PlanFile) {
    let path = dir.join(name);
    let arguments =
        args!["plan", "--method", "error", doclet(), "--imatrix", imatrix(), "--types", FAST, "-o", &path, "--quiet"];
    stdout_of(run_with(arguments, more));
    let (plan, _) = PlanFile::read(&path).unwrap();
    (path, plan)
}

fn quantize(plan: &Path, output: &Path) -> Output {
    run(args!["quantize", doclet(), output, "--imatrix", imatrix(), "--plan", plan])
}

fn types_of(path: &Path) -> Vec<(String, TensorType)> {
    let gguf = Gguf::open(path).unwrap();
    gguf.tensors().iter().map(|tensor| (tensor.name.clone(), tensor.ty)).collect()
}

#[test]
fn siblings_get_one_type_where_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let equal = |plan: &PlanFile| {
        let ty = |name: String| plan.tensors.iter().find(|row| row.tensor == name).unwrap().ty;
        let alike = |layer: usize, parts: &[&str]| {
            let types: Vec<_> = parts.iter().map(|part| ty(format!("blk.{layer}.{part}.weight"))).collect();
            types.windows(2).all(|pair| pair[0] == pair[1])
        };
        (0..6).all(|layer| alike(layer, &["attn_q", "attn_k", "attn_v"]) && alike(layer, &["ffn_gate", "ffn_up"]))
    };
    let (_, free) = plan(dir.path(), "free.json", &["--target-size", "2.4MB"]);
    let (path, bound) = plan(dir.path(), "bound.json", &["--target-size", "2.4MB", "--siblings-equal"]);
    assert!(!equal(&free) && equal(&bound));
    assert!(bound.file_bytes <= 2_400_000 && bound.bound >= free.bound);
    stdout_of(quantize(&path, &dir.path().join("o.gguf")));
}

#[test]
fn the_file_fills_its_target_and_records_the_plan() {
    let dir = tempfile::tempdir().unwrap();
    let (path, plan) = plan(dir.path(), "p.json", &["--target-size", "2.4MB"]);
    assert_eq!(plan.target_bytes, Some(2_400_000));
    let output = dir.path().join("o.gguf");
    stdout_of(quantize(&path, &output));
    let bytes = std::fs::metadata(&output).unwrap().len();
    assert_eq!(bytes, plan.file_bytes);
    assert!(bytes <= 2_400_000 && bytes as f64 >= 0.999 * 2_400_000.0, "{bytes}");

    let gguf = Gguf::open(&output).unwrap();
    let written: u64 = gguf.tensors().iter().filter_map(|tensor| tensor.bytes).sum();
    assert_eq!(written, plan.tensor_bytes);
    for row in &plan.tensors {
        let tensor = gguf.tensor(&row.tensor).unwrap();
        assert_eq!((tensor.ty, tensor.bytes), (row.ty, Some(row.bytes)), "{}", row.tensor);
    }
    let text = |key: &str| gguf.metadata().str(key).unwrap().unwrap().to_owned();
    assert_eq!(text("lwq.version"), env!("CARGO_PKG_VERSION"));
    assert_eq!(text("lwq.plan.method"), "error");
    assert_eq!(text("lwq.plan.target"), "size 2.4MB");
    assert_eq!(text("lwq.plan.sha256"), PlanFile::digest(&std::fs::read_to_string(&path).unwrap()));
    assert_eq!(text("quantize.imatrix.file"), imatrix().display().to_string());
    let predicted = gguf.metadata().f32("lwq.plan.predicted_kld").unwrap().unwrap();
    assert!((f64::from(predicted) / plan.predicted_kld - 1.0).abs() < 1e-4);
    assert!(plan.bound <= plan.predicted_kld && plan.gap < 0.02);
}

#[test]
fn like_takes_the_bytes_of_the_standard_file() {
    let dir = tempfile::tempdir().unwrap();
    let standard = dir.path().join("standard.gguf");
    stdout_of(run(args!["quantize", doclet(), &standard, "--imatrix", imatrix(), "--target", "Q4_K_M"]));
    let bytes = std::fs::metadata(&standard).unwrap().len();
    let (_, plan) = plan(dir.path(), "p.json", &["--like", "q4_k_m"]);
    assert_eq!(plan.target_bytes, Some(bytes));
    assert!(plan.file_bytes <= bytes && plan.file_bytes as f64 >= 0.999 * bytes as f64);
    assert_eq!(plan.target, "like Q4_K_M");
}

#[test]
fn quantize_plans_by_itself_and_names_the_file_after_the_bits() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model.gguf");
    std::fs::copy(doclet(), &model).unwrap();
    let arguments = args![
        "quantize",
        &model,
        "--imatrix",
        imatrix(),
        "--method",
        "error",
        "--target-bpw",
        "4.5",
        "--types",
        FAST,
        "--json",
        "-q"
    ];
    let report = json_of(run(arguments));
    let bits = report["bits_per_weight"].as_f64().unwrap();
    assert_eq!(files_in(dir.path()), [format!("model-{bits:.2}bpw.gguf"), "model.gguf".to_owned()]);
    assert!(bits <= 4.5 && bits > 0.999 * 4.5, "{bits}");
    assert_eq!(report["target"], "plan: 4.5 bits per weight");
    assert_eq!(report["tensors"][1]["reason"], "plan");
}

#[test]
fn the_same_inputs_give_the_same_plan_with_any_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    let texts = ["1", "3"].map(|threads| {
        let (path, _) = plan(dir.path(), threads, &["--target-bpw", "4.1", "-t", threads]);
        std::fs::read_to_string(path).unwrap()
    });
    assert_eq!(texts[0], texts[1]);
}

#[test]
fn types_by_hand_and_minima_are_obeyed() {
    let dir = tempfile::tempdir().unwrap();
    let by_hand = ["--tensor-type", "attn_v=q8_0", "--output-tensor-type", "q6_k", "--min-type", "q4_k"];
    let (_, plan) = plan(dir.path(), "p.json", &[&by_hand[..], &["--target-size", "2.7MB"]].concat());
    for row in &plan.tensors {
        match row.tensor.as_str() {
            // Tied: the embedding is the output.
            "token_embd.weight" => assert_eq!(row.ty, TensorType::Q6_K),
            name if name.contains("attn_v") => assert_eq!(row.ty, TensorType::Q8_0),
            name => assert_ne!(row.ty, TensorType::Q3_K, "{name}"),
        }
    }
}

#[test]
fn less_divergence_takes_more_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (_, small) = plan(dir.path(), "a.json", &["--max-kld", "0.1"]);
    let (_, large) = plan(dir.path(), "b.json", &["--max-kld", "0.01"]);
    assert!(small.predicted_kld <= 0.1 && large.predicted_kld <= 0.01);
    assert!(small.file_bytes < large.file_bytes);
    assert_eq!(small.target_bytes, None);
}

#[test]
fn an_impossible_limit_names_the_smallest_and_the_largest_file() {
    let arguments = |limit: &str, value: &str| {
        run(args!["plan", "--method", "error", doclet(), "--imatrix", imatrix(), "--types", FAST, limit, value])
    };
    let error = error_line(&arguments("--target-size", "1MB"));
    assert!(error.contains("the smallest possible file has 1822944 bytes"), "{error}");
    assert!(error.contains("the largest 4394208"), "{error}");
    let error = error_line(&arguments("--target-bpw", "2"));
    assert!(error.contains("the smallest choice of types has 3.4"), "{error}");
    // With these types some divergence is left.
    let output = arguments("--max-kld", "0.00001");
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && stderr.contains("out of reach"), "{stderr}");
}

#[test]
fn a_plan_for_other_files_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = plan(dir.path(), "p.json", &["--target-bpw", "5"]);
    let output = dir.path().join("o.gguf");
    let without = run(args!["quantize", doclet(), &output, "--plan", &path]);
    assert!(error_line(&without).contains("was made with the importance matrix"), "{without:?}");

    // The same model with one weight changed.
    let mut bytes = std::fs::read(doclet()).unwrap();
    let gguf = Gguf::open(doclet()).unwrap();
    let first = gguf.shards()[0].data_start() as usize + gguf.tensors()[0].offset as usize;
    bytes[first] ^= 1;
    let changed = dir.path().join("changed.gguf");
    std::fs::write(&changed, bytes).unwrap();
    let other = run(args!["quantize", &changed, &output, "--imatrix", imatrix(), "--plan", &path]);
    assert!(error_line(&other).contains("was made for another model"), "{other:?}");

    let text = std::fs::read_to_string(&path).unwrap();
    let (_, plan) = (&path, PlanFile::parse(&text, "p").unwrap());
    let sha256 = plan.imatrix.unwrap().sha256;
    let mut foreign: String = sha256.clone();
    foreign.replace_range(..1, if sha256.starts_with('0') { "1" } else { "0" });
    std::fs::write(&path, text.replace(&sha256, &foreign)).unwrap();
    assert!(error_line(&quantize(&path, &output)).contains("another importance matrix"));
    assert!(!output.exists());
}

#[test]
fn a_damaged_plan_gives_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let (path, plan) = plan(dir.path(), "p.json", &["--target-bpw", "5"]);
    let text = plan.to_text();
    let first = text.lines().find(|line| line.contains("blk.0.attn_k")).unwrap();
    let cases = [
        (text.replace("\"tensors\"", "\"tensors\" 1"), "is no plan of lwq"),
        (text.replace(first, &first.replace("attn_k", "attn_z")), "blk.0.attn_k.weight"),
        (text.replace(first, &format!("{first}\n{first}")), "is listed twice"),
        (text.replace(&format!("{first}\n"), ""), "is in the model and not in the plan"),
        (text.replace("q4_K", "q4_X").replace("q5_K", "q4_X"), "known types"),
        (text.replace("\"lwq_plan\": 1", "\"lwq_plan\": 7"), "lwq_plan is 7"),
        (String::new(), "is no plan of lwq"),
    ];
    let output = dir.path().join("o.gguf");
    for (text, expected) in cases {
        std::fs::write(&path, text).unwrap();
        let error = error_line(&quantize(&path, &output));
        assert!(error.contains(expected) && error.contains("p.json"), "{error} should contain {expected}");
    }
    assert!(error_line(&quantize(&doclet(), &output)).contains("is no plan of lwq"));
    let missing = error_line(&quantize(&dir.path().join("none.json"), &output));
    assert!(missing.contains("none.json") && missing.contains("check the path"), "{missing}");
    assert!(!output.exists());
}

#[test]
fn tensor_types_give_the_same_file_without_the_plan() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = plan(dir.path(), "p.json", &["--target-bpw", "4.6"]);
    let list = dir.path().join("types.txt");
    let more = ["--target-bpw", "4.6", "--format", "tensor-types", "--types", FAST, "-q"];
    let arguments = args!["plan", "--method", "error", doclet(), "--imatrix", imatrix(), "-o", &list];
    stdout_of(run_with(arguments, &more));
    let (planned, listed) = (dir.path().join("a.gguf"), dir.path().join("b.gguf"));
    stdout_of(quantize(&path, &planned));
    stdout_of(run(args![
        "quantize",
        doclet(),
        &listed,
        "--imatrix",
        imatrix(),
        "--target",
        "Q8_0",
        "--tensor-type-file",
        &list
    ]));
    assert_eq!(types_of(&planned), types_of(&listed));
    assert_eq!(common::tensor_digest(&planned), common::tensor_digest(&listed));
}

#[test]
fn show_draws_the_plan() {
    let dir = tempfile::tempdir().unwrap();
    let (path, plan) = plan(dir.path(), "p.json", &["--target-bpw", "4.6"]);
    let text = stdout_of(run(args!["plan", "show", &path]));
    for expected in ["attn_k", "ffn_down", "token_embd.weight", "bits/weight", "method error", "4.6 bits per weight"] {
        assert!(text.contains(expected), "{text}");
    }
    assert!(!text.contains('\x1b'), "no colour in a pipe");
    let json = json_of(run(args!["plan", "show", &path, "--json"]));
    assert_eq!(json["file_bytes"], plan.file_bytes);
    assert_eq!(json["tensors"].as_array().unwrap().len(), plan.tensors.len());
}

#[test]
fn without_an_imatrix_no_type_that_needs_one_is_chosen() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.json");
    let types = "IQ2_S,IQ3_XXS,Q3_K,Q4_K";
    stdout_of(run(args![
        "plan",
        "--method",
        "error",
        doclet(),
        "--target-bpw",
        "3.6",
        "--types",
        types,
        "-o",
        &path,
        "-q"
    ]));
    let (plan, _) = PlanFile::read(&path).unwrap();
    let blocks = plan.tensors.iter().filter(|row| row.tensor.starts_with("blk."));
    assert!(blocks.clone().all(|row| [TensorType::Q3_K, TensorType::Q4_K].contains(&row.ty)));
    let output = dir.path().join("o.gguf");
    stdout_of(run(args!["quantize", doclet(), &output, "--plan", &path]));
    assert_eq!(std::fs::metadata(&output).unwrap().len(), plan.file_bytes);
    let with = run(args!["quantize", doclet(), &output, "--imatrix", imatrix(), "--plan", &path, "--force"]);
    assert!(error_line(&with).contains("leave --imatrix away"));
}

#[test]
fn outputs_and_usage_are_guarded() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = plan(dir.path(), "p.json", &["--target-bpw", "5"]);
    let again = run(args!["plan", "--method", "error", doclet(), "--target-bpw", "5", "-o", &path]);
    assert!(error_line(&again).contains("exists already"));
    let model = dir.path().join("model.gguf");
    std::fs::copy(doclet(), &model).unwrap();
    let onto_input = run(args!["plan", "--method", "error", &model, "--target-bpw", "5", "-o", &model, "--force"]);
    assert!(error_line(&onto_input).contains("is an input"));
    for wrong in [
        args!["plan", "--method", "error", doclet()],
        args!["plan", "--method", "error", doclet(), "--target-bpw", "5", "--like", "Q4_K_M"],
        args!["plan", doclet(), "--target-bpw", "-5"],
        args!["plan", doclet(), "--target-size", "big"],
        args!["plan", doclet(), "--like", "COPY"],
        args!["plan", doclet(), "--target-bpw", "5", "--types", "Q4_Z"],
        args!["quantize", doclet()],
        args!["quantize", doclet(), "--plan", &path, "--target", "Q4_K_M"],
        args!["quantize", doclet(), "--plan", &path, "--tensor-type", "attn=q4_0"],
        args!["quantize", doclet(), "--plan", &path, "--pure"],
        args!["quantize", doclet(), "--target", "Q4_K_M", "--types", "Q4_K"],
    ] {
        let output = lwq().args(&wrong).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{wrong:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}
