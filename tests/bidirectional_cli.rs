//! Models whose attention is not causal: what is made from their inputs works, what needs the next token is refused.

mod common;

use std::path::{Path, PathBuf};

use common::{args, data, doclet, error_line, json_of, run, run_with, stdout_of};
use lwq::imatrix::Imatrix;

/// The bundled model with `attention.causal` false.
fn both_ways(folder: &Path) -> PathBuf {
    let path = folder.join("both-ways.gguf");
    let key = "llama.attention.causal=bool:false";
    stdout_of(run(args!["quantize", doclet(), &path, "--target", "COPY", "--override-kv", key, "--quiet"]));
    path
}

#[test]
fn importance_is_that_of_attention_both_ways() {
    let folder = tempfile::tempdir().unwrap();
    let model = both_ways(folder.path());
    let text = data("golden/calib-sample.txt");
    let collect = |model: &Path, name: &str| {
        let output = folder.path().join(name);
        let report = json_of(run(args![
            "imatrix",
            model,
            "-f",
            &text,
            "--chunks",
            "4",
            "-c",
            "64",
            "--accurate",
            "-o",
            &output,
            "--json"
        ]));
        (report, Imatrix::open(&output).unwrap())
    };
    let (causal_report, causal) = collect(&doclet(), "causal.gguf");
    let (report, found) = collect(&model, "both.gguf");
    assert!(causal_report["ppl"].is_number() && report["ppl"].is_null(), "{report}");
    // The inputs of the first attention are those of the embedding; all that comes after is another.
    assert_eq!(found.entries["blk.0.attn_q.weight"], causal.entries["blk.0.attn_q.weight"]);
    for weight in ["blk.0.attn_output.weight", "blk.0.ffn_up.weight", "blk.5.ffn_down.weight"] {
        let (a, b) = (&found.entries[weight], &causal.entries[weight]);
        assert_eq!(a.counts, b.counts);
        assert_ne!(a.sums, b.sums, "{weight}");
    }
    // Chunks do not see each other: two runs of two chunks add up to one of four.
    let part = |from: &str, name: &str| {
        let output = folder.path().join(name);
        stdout_of(run(args![
            "imatrix",
            &model,
            "-f",
            &text,
            "--chunks",
            "2",
            "--from-chunk",
            from,
            "-c",
            "64",
            "--accurate",
            "-o",
            &output
        ]));
        Imatrix::open(&output).unwrap()
    };
    let (first, second) = (part("0", "p0.gguf"), part("2", "p2.gguf"));
    let name = "blk.3.attn_output.weight";
    for (at, whole) in found.entries[name].sums.iter().enumerate() {
        let sum = first.entries[name].sums[at] + second.entries[name].sums[at];
        assert!((sum - whole).abs() <= 1e-5 * whole.abs(), "{sum} {whole}");
    }
}

#[test]
fn what_needs_the_next_token_is_refused_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let model = both_ways(folder.path());
    let tasks = data("tasks/hellaswag.txt");
    let sens = folder.path().join("m.sens.json");
    for arguments in [
        args!["eval", "ppl", &model],
        args!["eval", "kld", &model, "--base", doclet()],
        args!["eval", "kld", doclet(), "--base", &model],
        args!["eval", "hellaswag", &model, &tasks],
        args!["eval", "hellaswag", doclet(), &tasks, "--base", &model],
        args!["compare", &model, &model],
        args!["measure", &model, "-o", &sens],
        args!["plan", &model, "--like", "Q4_0", "--sensitivity", &sens],
    ] {
        let line = error_line(&run_with(arguments, &["--quiet"]));
        assert!(line.contains("both-ways.gguf: metadata key llama.attention.causal is false"), "{line}");
        assert!(line.contains("perplexity") && line.contains("need a causal model"), "{line}");
    }
    assert!(!sens.exists());
}

#[test]
fn rounding_with_feedback_and_plans_by_error_work() {
    let folder = tempfile::tempdir().unwrap();
    let model = both_ways(folder.path());
    let output = folder.path().join("q.gguf");
    let report = json_of(run(args![
        "quantize",
        &model,
        &output,
        "--target",
        "Q4_0",
        "--rounding",
        "feedback",
        "--calibration-tokens",
        "1024",
        "--json"
    ]));
    assert!(report["rounding"]["methods"]["feedback"].as_u64().is_some_and(|tensors| tensors > 0), "{report}");
    stdout_of(run(args!["plan", &model, "--like", "Q4_0", "--method", "error"]));
}
