//! `lwq compare` as a user runs it.

mod common;

use std::path::{Path, PathBuf};

use common::{args, data, doclet, error_line, json_of, run, run_with, stdout_of};
use serde_json::Value;

fn quantized(folder: &Path, target: &str) -> PathBuf {
    let path = folder.join(format!("doclet-{target}.gguf"));
    let imatrix = data("golden/doclet.imatrix.gguf");
    stdout_of(run(args!["quantize", doclet(), &path, "--target", target, "--imatrix", imatrix, "--quiet"]));
    path
}

fn compare(models: &[&Path], options: &[&str]) -> std::process::Output {
    let text = data("golden/eval-sample.txt");
    let mut arguments = args!["compare", doclet(), "-f", text, "--chunks", "4"];
    arguments.extend(models.iter().map(|path| path.as_os_str().to_owned()));
    run_with(arguments, options)
}

#[test]
fn json_holds_every_column_and_the_page_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (q4, q2) = (quantized(dir.path(), "Q4_K_M"), quantized(dir.path(), "Q2_K"));
    let page = dir.path().join("page.html");
    let tasks = data("tasks");
    let options = ["--tasks", tasks.to_str().unwrap(), "--json", "--html", page.to_str().unwrap(), "--most-tasks", "6"];
    let report: Value = json_of(compare(&[&q4, &q2], &options));
    assert_eq!((&report["base"]["file"], &report["complete"]), (&"doclet-4m-f16.gguf".into(), &true.into()));
    let (files, runs) = (report["files"].as_array().unwrap(), report["runs"].as_array().unwrap());
    assert_eq!((files.len(), runs.len()), (2, 1));
    assert_eq!(files[0]["size_bytes"], std::fs::metadata(&q4).unwrap().len());
    let figures = |i: usize, key: &str| runs[0]["files"][i][key].as_f64().unwrap();
    assert!(figures(1, "mean_kld") > 3.0 * figures(0, "mean_kld"));
    assert!((figures(0, "ppl_base") - runs[0]["ppl_base"].as_f64().unwrap()).abs() < 1e-4);
    let tasks = runs[0]["files"][0]["tasks"].as_array().unwrap();
    let names: Vec<&str> = tasks.iter().map(|task| task["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["hellaswag", "multiple-choice.bin", "multiple-choice.jsonl", "winogrande"]);
    assert!(tasks.iter().all(|task| task["accuracy"].is_number() && task["base_accuracy"].is_number()));
    // Q2_K has larger errors than Q4_K_M in every tensor; the first has all types that were written.
    let errors = |i: usize| report["tensor_errors"][i].as_array().unwrap().clone();
    assert_eq!(errors(0).len(), errors(1).len());
    for (a, b) in errors(0).iter().zip(&errors(1)) {
        let (small, large) = (a["relative_error"].as_f64().unwrap(), b["relative_error"].as_f64().unwrap());
        assert!(small > 0.0 && small <= large && large < 0.6, "{a} {b}");
    }
    let page = std::fs::read_to_string(page).unwrap();
    assert!(page.starts_with("<!DOCTYPE html>") && page.ends_with("</html>\n"));
    assert_eq!(page.matches("<svg").count(), 2 + 2 * 2);
}

#[test]
fn a_model_does_not_differ_from_itself() {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("copy.gguf");
    std::fs::copy(doclet(), &copy).unwrap();
    let page = dir.path().join("page.html");
    let output = compare(&[&copy], &["--json", "--activations", "both", "--html", page.to_str().unwrap()]);
    let report: Value = json_of(output);
    let runs = report["runs"].as_array().unwrap();
    assert_eq!((&runs[0]["activations"], &runs[1]["activations"]), (&"f32".into(), &"ggml".into()));
    for run in runs {
        assert_eq!((&run["files"][0]["mean_kld"], &run["files"][0]["same_top_p"]), (&0.0.into(), &1.0.into()));
    }
    assert!(report["tensor_errors"][0].as_array().unwrap().iter().all(|error| error["relative_error"] == 0.0));
    assert!(page.exists());
}

#[test]
fn the_plot_joins_files_of_one_folder() {
    let dir = tempfile::tempdir().unwrap();
    let (small, large) = (dir.path().join("small"), dir.path().join("large"));
    for (folder, target) in [(&small, "Q2_K"), (&small, "Q4_K_M"), (&large, "Q6_K")] {
        std::fs::create_dir_all(folder).unwrap();
        std::fs::rename(quantized(dir.path(), target), folder.join(format!("{target}.gguf"))).unwrap();
    }
    let models = [small.join("Q2_K.gguf"), small.join("Q4_K_M.gguf"), large.join("Q6_K.gguf")];
    let models: Vec<&Path> = models.iter().map(PathBuf::as_path).collect();
    let plot = dir.path().join("plot.svg");
    stdout_of(compare(&models, &["--plot", plot.to_str().unwrap(), "--score-from", "64", "--markdown"]));
    let svg = std::fs::read_to_string(&plot).unwrap();
    for text in ["small", "large", "Q2_K", "Q4_K_M", "Q6_K", "size, GB", "mean KLD"] {
        assert!(svg.contains(text), "{text} in {svg}");
    }
    let again = error_line(&compare(&models, &["--plot", plot.to_str().unwrap()]));
    assert!(again.contains("plot.svg") && again.contains("--force"), "{again}");
}

#[test]
fn tables_name_size_bits_and_figures() {
    let dir = tempfile::tempdir().unwrap();
    let q4 = quantized(dir.path(), "Q4_K_M");
    let text = stdout_of(compare(&[&q4], &[]));
    for heading in ["GB", "GiB", "bits/weight", "PPL", "ρ PPL", "mean KLD", "RMS Δp", "same top"] {
        assert!(text.lines().next().unwrap().contains(heading), "{text}");
    }
    assert!(
        text.contains("doclet-Q4_K_M.gguf")
            && text.contains("4 windows of 256 tokens, 127 of them scored, of eval-sample.txt"),
        "{text}"
    );
    let card = stdout_of(compare(&[&q4], &["--markdown"]));
    let rows: Vec<&str> = card.lines().filter(|line| line.starts_with('|')).collect();
    assert!(card.starts_with("## Quantized files of doclet-4m-f16.gguf\n\n| file |") && rows.len() == 4, "{card}");
}

#[test]
fn what_cannot_be_compared_is_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().join("empty.txt");
    std::fs::write(&empty, "").unwrap();
    let model = doclet();
    let line = error_line(&run_with(args!["compare", &model, &model], &["-f", empty.to_str().unwrap()]));
    assert!(line.contains("empty.txt") && line.contains("at least two windows"), "{line}");
    let line = error_line(&compare(&[&model], &["--ctx", "100000"]));
    assert!(line.contains("longer than the model's context"), "{line}");
    let line = error_line(&compare(&[&model], &["--tasks", dir.path().to_str().unwrap()]));
    assert!(line.contains("empty.txt") || line.contains("holds no task"), "{line}");
    let line = error_line(&compare(&[&model], &["--html", empty.to_str().unwrap()]));
    assert!(line.contains("empty.txt") && line.contains("--force"), "{line}");
    assert_eq!(compare(&[&model], &["--json", "--markdown"]).status.code(), Some(2));
}

#[test]
fn without_a_text_the_built_in_one_is_scored_and_named() {
    let output = run(["compare".as_ref(), doclet().as_os_str(), doclet().as_os_str()]
        .into_iter()
        .chain(["-c", "64", "--chunks", "2", "--json"].map(std::ffi::OsStr::new)));
    assert!(String::from_utf8_lossy(&output.stderr).contains("text: lwq built-in evaluation text"));
    let report: Value = serde_json::from_str(&stdout_of(output)).unwrap();
    assert_eq!(report["text"]["files"], serde_json::json!(["lwq built-in evaluation text"]));
}
