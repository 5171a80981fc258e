//! A trained mixture of experts with delta nets, as users run it: figures of llama.cpp b10605, routes, experts' data.

mod common;

use std::ffi::OsString;
use std::path::PathBuf;

use common::{args, data, json_of, run, stdout_of, tensor_digest};
use lwq::imatrix::Imatrix;
use serde_json::Value;
use tempfile::TempDir;

fn model() -> PathBuf {
    data("doclet-hybrid-f16.gguf")
}

fn golden() -> Value {
    serde_json::from_slice(&std::fs::read(data("golden/doclet-hybrid-eval.json")).unwrap()).unwrap()
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("no {key} in {value}"))
}

/// The model in the types and with the imatrix of the golden figures.
fn quantized(folder: &TempDir, target: &str) -> PathBuf {
    let output = folder.path().join(format!("{target}.gguf"));
    let imatrix = data("golden/doclet-hybrid.imatrix.gguf");
    stdout_of(run(args!["quantize", model(), &output, "--target", target, "--imatrix", imatrix]));
    output
}

/// `eval kld` of one model on the first windows of the golden text.
fn kld(file: &PathBuf, more: &[&str]) -> Value {
    let mut arguments: Vec<OsString> = args!["eval", "kld", file, "--base", model(), "--ctx", "256", "--chunks", "8"];
    arguments.extend(args!["-f", data("golden/eval-sample.txt"), "--json", "--quiet"]);
    arguments.extend(more.iter().map(OsString::from));
    json_of(run(arguments))
}

#[test]
fn perplexity_agrees_with_llama_perplexity() {
    let text = data("golden/eval-sample.txt");
    let found = json_of(run(args!["eval", "ppl", model(), "-f", text, "--ctx", "256", "--json", "--quiet"]));
    let expected = number(&golden()["f16"], "ppl");
    assert!((number(&found, "ppl") / expected - 1.0).abs() < 1e-3, "{found}, expected {expected}");
}

#[test]
fn quantized_tensors_are_those_of_llama_quantize() {
    let folder = tempfile::tempdir().unwrap();
    for (target, expected) in golden()["kld"].as_object().unwrap() {
        assert_eq!(tensor_digest(&quantized(&folder, target)), expected["tensor_digest"].as_str().unwrap(), "{target}");
    }
}

#[test]
fn flips_are_counted_and_forcing_routes_leaves_the_damage_of_the_weights() {
    let folder = tempfile::tempdir().unwrap();
    let q2_k = quantized(&folder, "Q2_K");
    let found = kld(&q2_k, &[]);
    let routing = &found["routing"];
    assert!((0.05..0.4).contains(&number(routing, "flips")), "{routing}");
    assert!(number(routing, "tokens_flipped") > number(routing, "flips"), "{routing}");
    for less in ["forced_mean_kld", "steady_mean_kld"] {
        assert!(number(routing, less) > 0.0 && number(routing, less) < number(&found, "mean_kld"), "{less}: {found}");
    }
    let once = kld(&q2_k, &["--no-forced-routing"]);
    assert_eq!(once["mean_kld"], found["mean_kld"]);
    assert_eq!(once["routing"]["flips"], routing["flips"]);
    assert!(once["routing"].get("forced_mean_kld").is_none());
    let itself = kld(&model(), &[]);
    assert_eq!((number(&itself["routing"], "flips"), number(&itself["routing"], "forced_mean_kld")), (0.0, 0.0));
}

#[test]
fn a_state_keeps_routes() {
    let folder = tempfile::tempdir().unwrap();
    let q2_k = quantized(&folder, "Q2_K");
    let state = folder.path().join("run.state");
    let state = state.to_str().unwrap();
    let unforced = kld(&q2_k, &["--state", state, "--no-forced-routing"]);
    let forced = kld(&q2_k, &["--state", state]);
    assert_eq!(unforced["routing"]["flips"], forced["routing"]["flips"]);
    let again = kld(&q2_k, &["--state", state]);
    assert_eq!(again["routing"], forced["routing"]);
    assert_eq!(number(&again, "tokens_per_second"), 0.0, "nothing was left to run");
}

#[test]
fn all_experts_gives_every_expert_every_token() {
    let folder = tempfile::tempdir().unwrap();
    let collect = |name: &str, more: &[&str]| -> (Imatrix, Value) {
        let output = folder.path().join(name);
        let text = data("golden/calib-sample.txt");
        let mut arguments = args!["imatrix", model(), "-f", text, "-o", &output, "--ctx", "128", "--chunks", "4"];
        arguments.extend(args!["--accurate", "--no-ppl", "--json", "--quiet"]);
        arguments.extend(more.iter().map(OsString::from));
        let report = json_of(run(arguments));
        (Imatrix::open(&output).unwrap(), report)
    };
    let (chosen, chosen_report) = collect("chosen.gguf", &[]);
    let (all, all_report) = collect("all.gguf", &["--all-experts"]);
    let counts = |imatrix: &Imatrix, part: &str| imatrix.entries[part].counts.clone();
    let tokens = 4 * 128;
    for part in ["blk.0.ffn_down_exps.weight", "blk.3.ffn_up_exps.weight"] {
        // Two of eight are chosen.
        assert_eq!(counts(&chosen, part).iter().sum::<u64>(), 2 * tokens, "{part}");
        assert_eq!(counts(&all, part), [tokens; 8], "{part}");
    }
    // What the model computes is the same.
    for part in ["blk.3.attn_q.weight", "blk.2.ssm_out.weight", "blk.3.ffn_down_shexp.weight"] {
        assert_eq!(chosen.entries[part], all.entries[part], "{part}");
    }
    let fewest = |report: &Value| report["experts"][1]["fewest_tokens"].as_u64().unwrap();
    assert_eq!(fewest(&chosen_report), *counts(&chosen, "blk.1.ffn_down_exps.weight").iter().min().unwrap());
    assert_eq!(fewest(&all_report), tokens);
    assert_eq!(all_report["experts"][1]["short_of_data"], 0);
}
