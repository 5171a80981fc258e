//! `lwq eval hellaswag|winogrande|multiple-choice` as a user runs them.
//!
//! tests/data/tasks/expected.json holds choices and scores that tests/interop/task_reference.py worked out from
//! llama.cpp's logits.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{data, doclet, error_line, json_of, run, stdout_of};
use lwq::eval::tasks::{PreparedTasks, ReadOptions, TaskKind, TaskOptions, TaskSet, score_tasks};
use lwq::gguf::Gguf;
use lwq::model::{ForwardOptions, Model, Overrides};
use lwq::progress::Watch;
use lwq::tokenizer::Tokenizer;
use serde_json::Value;

const KINDS: [(&str, &str); 3] = [
    ("hellaswag", "tasks/hellaswag.txt"),
    ("winogrande", "tasks/winogrande.csv"),
    ("multiple-choice", "tasks/multiple-choice.bin"),
];

fn arguments(kind: &str, tasks: &Path, options: &[&str]) -> Vec<String> {
    let mut arguments = vec!["eval".to_owned(), kind.to_owned(), doclet().display().to_string()];
    arguments.push(tasks.display().to_string());
    arguments.extend(options.iter().map(|option| (*option).to_owned()));
    arguments
}

fn json(kind: &str, tasks: &Path, options: &[&str]) -> Value {
    let options = [options, &["--json", "--quiet", "--details"]].concat();
    json_of(run(arguments(kind, tasks, &options)))
}

fn expected(kind: &str, mode: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(data("tasks/expected.json")).unwrap();
    let all: Value = serde_json::from_str(&text).unwrap();
    all[kind][mode].as_array().unwrap().clone()
}

#[track_caller]
fn assert_close(got: &Value, want: &Value) {
    assert_eq!(got.as_array().unwrap().len(), want.as_array().unwrap().len());
    for (got, want) in got.as_array().unwrap().iter().zip(want.as_array().unwrap()) {
        match (got.as_f64(), want.as_f64()) {
            (Some(a), Some(b)) => assert!((a - b).abs() < 3e-3, "{a} {b}"),
            (a, b) => assert_eq!(a, b),
        }
    }
}

#[test]
fn choices_and_scores_are_those_of_the_rules() {
    for (kind, tasks) in KINDS {
        for mode in ["default", "llama_compat"] {
            let options: &[&str] = if mode == "default" { &[] } else { &["--llama-compat"] };
            let report = json(kind, &data(tasks), options);
            let expected = expected(kind, mode);
            let results = report["results"].as_array().unwrap();
            assert_eq!(results.len(), expected.len(), "{kind} {mode}");
            for (got, want) in results.iter().zip(&expected) {
                for key in ["task", "chosen", "correct", "chosen_norm", "correct_norm"] {
                    assert_eq!(got[key], want[key], "{kind} {mode}: {got} {want}");
                }
                assert_close(&got["scores"], &want["scores"]);
                if kind != "winogrande" {
                    assert_close(&got["scores_norm"], &want["scores_norm"]);
                }
            }
            let n = expected.len() as f64;
            let right = |key: &str| expected.iter().filter(|r| r[key] == true).count() as f64;
            let p = right("correct") / n;
            assert_eq!(report["accuracy"], p);
            assert!((report["accuracy_error"].as_f64().unwrap() - (p * (1.0 - p) / (n - 1.0)).sqrt()).abs() < 1e-12);
            assert_eq!(report["tasks"], expected.len());
            assert_eq!(report["complete"], true);
            match kind {
                "winogrande" => assert_eq!(report.get("accuracy_norm"), None),
                _ => assert_eq!(report["accuracy_norm"], right("correct_norm") / n),
            }
        }
    }
}

#[test]
fn random_chance_is_the_mean_of_the_shares_and_tasks_by_answers_in_llama_perplexity() {
    let tasks = data("tasks/multiple-choice.bin");
    // Answers of the twelve tasks: 4 3 5 3 2 4 4 3 4 4 3 4.
    let mean = (6.0 / 4.0 + 4.0 / 3.0 + 1.0 / 5.0 + 1.0 / 2.0) / 12.0;
    let close = |report: Value, chance: f64| (report["random_chance"].as_f64().unwrap() - chance).abs() < 1e-12;
    assert!(close(json("multiple-choice", &tasks, &[]), mean));
    assert!(close(json("multiple-choice", &tasks, &["--llama-compat"]), 12.0 / 43.0));
}

#[test]
fn json_lines_hold_the_same_tasks() {
    let mut binary = json("multiple-choice", &data("tasks/multiple-choice.bin"), &[]);
    let lines = json("multiple-choice", &data("tasks/multiple-choice.jsonl"), &[]);
    assert_eq!(binary["results"].take(), lines["results"]);
}

#[test]
fn results_depend_neither_on_threads_nor_on_memory() {
    for (kind, tasks) in KINDS {
        let one = json(kind, &data(tasks), &["--threads", "1"]);
        let small = json(kind, &data(tasks), &["--threads", "3", "--memory", "1"]);
        assert_eq!(one["results"], small["results"]);
    }
}

#[test]
fn a_model_recovers_all_of_its_own_accuracy() {
    let base = doclet().display().to_string();
    let report = json("hellaswag", &data("tasks/hellaswag.txt"), &["--base", &base]);
    assert_eq!(report["recovery"], 100.0);
    assert_eq!((&report["accuracy_difference"], &report["changed_answers"]), (&0.0.into(), &0.0.into()));
    assert_eq!(report["base_accuracy"], report["accuracy"]);
    assert!(report["size_bytes"].as_u64().unwrap() > 1_000_000 && report["bits_per_weight"].as_f64().unwrap() > 15.9);
}

#[test]
fn some_tasks_are_drawn_by_seed() {
    let numbers = |seed: &str| {
        let report = json("winogrande", &data("tasks/winogrande.csv"), &["--tasks", "4", "--seed", seed]);
        assert_eq!((&report["tasks"], &report["tasks_available"]), (&4.into(), &13.into()));
        report["results"].as_array().unwrap().iter().map(|r| r["task"].as_u64().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(numbers("5"), numbers("5"));
    assert_ne!(numbers("5"), numbers("6"));
    let compat = json("winogrande", &data("tasks/winogrande.csv"), &["--tasks", "3", "--llama-compat"]);
    // Of twelve rows, the thirteenth being lost.
    assert_eq!(compat["tasks_available"], 12);
}

#[test]
fn text_shows_accuracy_with_its_interval() {
    let text = stdout_of(run(arguments("hellaswag", &data("tasks/hellaswag.txt"), &["--details", "--quiet"])));
    assert_eq!(text.lines().filter(|line| line.contains("  right  ")).count(), 5, "{text}");
    assert!(text.contains("HellaSwag, 12 of 12 tasks"), "{text}");
    assert!(text.contains("accuracy") && text.contains("41.6667 ± 14.8") && text.contains("Wilson"), "{text}");
}

#[test]
fn seed_and_compatibility_exclude_each_other() {
    let output = run(arguments("hellaswag", &data("tasks/hellaswag.txt"), &["--seed", "2", "--llama-compat"]));
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn damaged_files_and_tasks_that_are_too_long_are_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, content: &[u8]| -> PathBuf {
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    let binary = std::fs::read(data("tasks/multiple-choice.bin")).unwrap();
    let mut fewer = binary.clone();
    fewer[0] -= 1;
    let long = format!("A: b\n0\n{}\nc\nd\ne\n", "word ".repeat(2_000_000));
    for (kind, path, options, message) in [
        ("hellaswag", write("five.txt", b"a\n0\nb\nc\nd\n"), &[][..], "has 5 lines, not a multiple of 6"),
        ("hellaswag", write("empty.txt", b""), &[], "holds no tasks"),
        ("hellaswag", write("gold.txt", b"a\n7\nb\nc\nd\ne\n"), &[], "line 2: \"7\" is not the index"),
        ("hellaswag", write("long.txt", long.as_bytes()), &[], "task 1: needs 4000004 tokens; the context has 256"),
        ("hellaswag", data("tasks/hellaswag.txt"), &["--ctx", "20"], "the context has 20"),
        ("hellaswag", data("tasks/hellaswag.txt"), &["--ctx", "1000000"], "longer than the model's context"),
        ("winogrande", write("cut.csv", b"0,A _ b,c"), &[], "line 1: has 3 columns"),
        ("multiple-choice", write("fewer.bin", &fewer), &[], "the count or an offset is wrong"),
        ("multiple-choice", write("cut.bin", &binary[..binary.len() - 9]), &[], "task 12: "),
        ("multiple-choice", data("tasks/hellaswag.txt"), &[], "cannot hold their offsets"),
        ("multiple-choice", data("tasks/none.bin"), &[], "cannot read the tasks"),
    ] {
        let line = error_line(&run(arguments(kind, &path, options)));
        assert!(line.contains(message), "{line}");
    }
}

/// Cancels a pass when five tasks are done.
struct StopAfterFiveTasks(Arc<AtomicBool>);

impl Watch for StopAfterFiveTasks {
    fn advance(&self, _: u64, so_far: &str) {
        if so_far.starts_with("task 5 ") {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

#[test]
fn a_stopped_run_gives_the_tasks_that_were_finished() {
    let gguf = Gguf::open(doclet()).unwrap();
    let model = Model::open(&gguf).unwrap();
    let tokenizer = Tokenizer::from_gguf(gguf.metadata(), None).unwrap();
    let set = TaskSet::read(&data("tasks/hellaswag.txt"), TaskKind::HellaSwag, &ReadOptions::default()).unwrap();
    let prepared = PreparedTasks::new(&set, &tokenizer, false).unwrap();
    // Next to no memory: groups of a single sequence.
    let options = TaskOptions { memory: Some(1), ..TaskOptions::default() };
    let pass = model.pass(ForwardOptions::default(), Overrides::new()).unwrap();
    let whole = score_tasks(&pass, &prepared, &options, &()).unwrap();
    let flag = Arc::new(AtomicBool::new(false));
    let stoppable = ForwardOptions { cancel: Some(flag.clone()), ..ForwardOptions::default() };
    let stoppable = model.pass(stoppable, Overrides::new()).unwrap();
    let stopped = score_tasks(&stoppable, &prepared, &options, &StopAfterFiveTasks(flag)).unwrap();
    assert!(whole.is_complete() && !stopped.is_complete());
    assert_eq!(stopped.results(), &whole.results()[..5]);
    assert_eq!((stopped.summary().tasks, stopped.summary().tasks_selected), (5, 12));
    assert!(0 < stopped.tokens_run() && stopped.tokens_run() < whole.tokens_run());

    let cancelled = ForwardOptions { cancel: Some(Arc::new(AtomicBool::new(true))), ..ForwardOptions::default() };
    let pass = model.pass(cancelled, Overrides::new()).unwrap();
    let none = score_tasks(&pass, &prepared, &options, &()).unwrap();
    assert!(none.results().is_empty() && none.summary().accuracy.is_none());
}

#[test]
fn rows_that_llama_perplexity_skips_are_reported() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.csv");
    std::fs::write(&path, "no commas\n0,The _ sings.,bird,stone,1\n1,The _ burns.,wood,stone,1\n").unwrap();
    let line = error_line(&run(arguments("winogrande", &path, &[])));
    assert!(line.contains("line 1: has 1 columns"), "{line}");
    let output = run(arguments("winogrande", &path, &["--llama-compat", "--json"]));
    let warnings = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(warnings.contains("warning: ") && warnings.contains("line 1 skipped"), "{warnings}");
    let report: Value = json_of(output);
    assert_eq!((&report["tasks"], &report["accuracy_error"]), (&1.into(), &Value::Null));
}
