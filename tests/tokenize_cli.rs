//! `lwq tokenize` as a user runs it.

mod common;

use common::{doclet, error_line, run, stdout_of};
use serde_json::Value;

#[test]
fn a_text_is_taken_from_the_argument_the_flag_or_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("text.txt");
    std::fs::write(&file, "Hello world").unwrap();
    let model = doclet();
    let (model, file) = (model.to_str().unwrap(), file.to_str().unwrap());
    let ids = |more: &[&str]| stdout_of(run([&["tokenize", model, "--ids"], more].concat()));
    let expected = ids(&["Hello world"]);
    assert!(expected.starts_with('[') && expected.ends_with("]\n"), "{expected}");
    assert_eq!(ids(&["--text", "Hello world"]), expected);
    assert_eq!(ids(&["-f", file]), expected);
    assert_ne!(ids(&["Hello"]), expected);
    let report: Value = serde_json::from_str(&stdout_of(run(["tokenize", model, "Hello world", "--json"]))).unwrap();
    let text: String = report["texts"][0].as_array().unwrap().iter().filter_map(|t| t["text"].as_str()).collect();
    assert_eq!(text, "Hello world");
}

#[test]
fn two_texts_and_files_that_are_not_there_are_refused() {
    let model = doclet();
    let model = model.to_str().unwrap();
    for other in [["--text", "b"], ["-f", "b.txt"]] {
        assert_eq!(run([&["tokenize", model, "a"], &other[..]].concat()).status.code(), Some(2));
    }
    let line = error_line(&run(["tokenize", model, "-f", "none.txt"]));
    assert!(line.contains("none.txt"), "{line}");
}
