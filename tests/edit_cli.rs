//! `lwq edit` as a user runs it: keys change, tensors do not.

mod common;

use std::path::Path;

use common::{args, doclet, error_line, files_in, json_of, model_in, run, run_with, stdout_of, tensor_digest};
use lwq::gguf::testing::RawGguf;
use lwq::gguf::{Gguf, Value};

fn value(path: &Path, key: &str) -> Option<Value> {
    Gguf::open(path).unwrap().metadata().get(key).cloned()
}

#[test]
fn a_new_file_has_the_changes_and_the_same_tensors() {
    let dir = tempfile::tempdir().unwrap();
    let model = model_in(dir.path());
    let template = dir.path().join("t.jinja");
    std::fs::write(&template, "{% for m in messages %}{{ m.content }}\n{% endfor %}").unwrap();
    let output = dir.path().join("o.gguf");
    let report = json_of(run(args![
        "edit",
        &model,
        "-o",
        &output,
        "--chat-template",
        &template,
        "--set",
        "general.author=str:me",
        "--set",
        "llama.context_length=int:512",
        "--remove",
        "general.name",
        "--rename",
        "tokenizer.ggml.pre=general.pre",
        "--json",
    ]));
    assert_eq!((&report["written"], report["changes"].as_array().unwrap().len()), (&true.into(), 5));
    assert_eq!(tensor_digest(&output), tensor_digest(&doclet()));
    let text = std::fs::read_to_string(&template).unwrap();
    assert_eq!(value(&output, "tokenizer.chat_template"), Some(Value::from(text.as_str())));
    assert_eq!(value(&output, "llama.context_length"), Some(Value::U32(512)));
    assert_eq!(value(&output, "general.author"), Some(Value::from("me")));
    assert_eq!(value(&output, "general.name"), None);
    assert_eq!(value(&output, "general.pre"), value(&doclet(), "tokenizer.ggml.pre"));
    // The source is as it was.
    assert_eq!(std::fs::read(&model).unwrap(), std::fs::read(doclet()).unwrap());
    // It may be replaced, when one says so.
    let over = |more: &[&str]| run_with(args!["edit", &model, "-o", &model, "--set", "general.author=str:you"], more);
    assert!(error_line(&over(&[])).contains("exists already"));
    assert!(over(&["--force"]).status.success());
    assert_eq!(value(&model, "general.author"), Some(Value::from("you")));
    assert_eq!(tensor_digest(&model), tensor_digest(&doclet()));
}

#[test]
fn an_edit_in_place_touches_its_bytes_alone() {
    let dir = tempfile::tempdir().unwrap();
    let model = model_in(dir.path());
    let before = std::fs::read(&model).unwrap();
    let edit = ["--in-place", "--set", "llama.context_length=u32:77"];
    assert!(run_with(args!["edit", &model], &[&edit[..], &["--dry-run"]].concat()).status.success());
    assert_eq!(std::fs::read(&model).unwrap(), before);
    let text = stdout_of(run_with(args!["edit", &model], &edit));
    assert!(text.starts_with("llama.context_length: u32 (") && text.ends_with("-> u32 (77)\n"), "{text}");
    let after = std::fs::read(&model).unwrap();
    let changed: Vec<usize> = (0..before.len()).filter(|&at| before[at] != after[at]).collect();
    assert!(after.len() == before.len() && (1..=4).contains(&changed.len()), "{changed:?}");
    assert_eq!(value(&model, "llama.context_length"), Some(Value::U32(77)));
    assert_eq!(files_in(dir.path()), ["m.gguf"]);

    // A long value does not fit.
    let long = format!("general.author=str:{}", "x".repeat(500));
    let line = error_line(&run_with(args!["edit", &model], &["--in-place", "--set", &long]));
    assert!(line.contains("bytes more than the file has") && line.contains("-o"), "{line}");
    let line = error_line(&run_with(args!["edit", &model], &["--in-place", "--remove", "tokenizer.ggml.tokens"]));
    assert!(line.contains("bytes less"), "{line}");
    assert_eq!(std::fs::read(&model).unwrap(), after);
}

#[test]
fn the_first_part_of_a_split_model_is_edited_in_place() {
    let dir = tempfile::tempdir().unwrap();
    assert!(run(args!["split", doclet(), dir.path().join("p"), "--max-tensors", "30"]).status.success());
    let first = dir.path().join(&files_in(dir.path())[0]);
    let change = ["--set", "llama.context_length=int:99"];
    let line = error_line(&run_with(args!["edit", &first, "-o", dir.path().join("o.gguf")], &change));
    assert!(line.contains("merge them first, or edit it in place"), "{line}");
    assert!(run_with(args!["edit", &first, "--in-place"], &change).status.success());
    assert_eq!(value(&first, "llama.context_length"), Some(Value::U32(99)));
    assert_eq!(tensor_digest(&first), tensor_digest(&doclet()));
}

#[test]
fn changes_that_would_lose_something_are_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let model = model_in(dir.path());
    let empty = dir.path().join("empty.jinja");
    std::fs::write(&empty, "").unwrap();
    let empty = empty.to_str().unwrap().to_owned();
    for (rest, part) in [
        (["--set", "general.alignment=int:64"], "says how the file is laid out"),
        (["--remove", "split.count"], "says how the file is laid out"),
        (["--remove", "general.lost"], "has no key \"general.lost\""),
        (["--rename", "general.name=general.architecture"], "already"),
        (["--set", "llama.context_length=u64:5"], "is of type u32, not u64"),
        (["--set", "llama.context_length=str:long"], "expect u32"),
        (["--set", "llama.context_length=int:-1"], "expect u32"),
        (["--set", "tokenizer.ggml.tokens=str:x"], "a list"),
        (["--chat-template", "/no/such/file"], "/no/such/file"),
        (["--chat-template", &empty], "is empty"),
    ] {
        let line = error_line(&run_with(args!["edit", &model, "-o", dir.path().join("o.gguf")], &rest));
        assert!(line.contains(part), "{rest:?}: {line}");
    }
    assert_eq!(files_in(dir.path()), ["empty.jinja", "m.gguf"]);
    assert_eq!(std::fs::read(&model).unwrap(), std::fs::read(doclet()).unwrap());
}

#[test]
fn wrong_usage_is_told_before_anything_is_read() {
    for (rest, part) in [
        (&["-o", "x.gguf"][..], "required"),
        (&["--set", "a=int:1"], "required"),
        (&["-o", "x.gguf", "--in-place", "--set", "a=int:1"], "cannot be used with"),
        (&["--dry-run", "--set", "a=1"], "KEY=TYPE:VALUE"),
        (&["--dry-run", "--set", "a=u8:256"], "none of its type"),
        (&["--dry-run", "--rename", "a"], "OLD=NEW"),
        (&["--dry-run", "--remove", ""], "a value is required"),
    ] {
        let output = run_with(args!["edit", "lost.gguf"], rest);
        assert_eq!(output.status.code(), Some(2), "{rest:?}: {output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(part), "{rest:?}: {output:?}");
    }
}

#[test]
fn types_that_change_because_readers_expect_it_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.gguf");
    let file = RawGguf::new().str("general.architecture", "llama").i32("llama.context_length", 5);
    std::fs::write(&path, file.f32_tensor("w", &[1], &[1.0]).build()).unwrap();
    let output = run(args!["edit", &path, "--in-place", "--set", "llama.context_length=int:6"]);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && stderr.contains("was i32 in the file, is stored as u32"), "{stderr}");
    assert_eq!(value(&path, "llama.context_length"), Some(Value::U32(6)));
}
