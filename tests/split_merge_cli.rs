//! `lwq split` and `lwq merge` as a user runs them: parts and whole are the same model.

mod common;

use std::path::Path;

use common::{args, error_line, files_in, json_of, model_in, run, run_with, stderr_of, stdout_of};
use lwq::gguf::testing::RawGguf;
use lwq::gguf::{Gguf, Value};

#[test]
fn parts_by_size_keep_to_it_and_merge_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let model = model_in(dir.path());
    let report = json_of(run(args!["split", &model, "--max-size", "2MB", "--json"]));
    let parts = report["parts"].as_array().unwrap();
    assert!(parts.len() >= 4, "{report}");
    for (number, part) in parts.iter().enumerate() {
        let path = Path::new(part["file"].as_str().unwrap());
        let name = format!("m-{:05}-of-{:05}.gguf", number + 1, parts.len());
        assert_eq!(path, dir.path().join(name));
        let bytes = std::fs::metadata(path).unwrap().len();
        assert_eq!(part["size_bytes"], bytes);
        assert!(bytes <= 2_000_000, "{part}");
    }
    let first = Gguf::open(parts[0]["file"].as_str().unwrap()).unwrap();
    assert_eq!(first.metadata().get("split.count"), Some(&Value::U16(parts.len() as u16)));
    assert_eq!(first.metadata().get("split.tensors.count"), Some(&Value::I32(first.tensors().len() as i32)));
    assert!(first.shards().iter().all(|shard| shard.own_keys().is_empty()));

    // Any part names all.
    let whole = dir.path().join("whole.gguf");
    let last = parts.last().unwrap()["file"].as_str().unwrap();
    let merged = json_of(run(args!["merge", last, &whole, "--json"]));
    assert_eq!(
        (&merged["tensors"], merged["parts"].as_array().unwrap().len()),
        (&first.tensors().len().into(), parts.len())
    );
    assert_eq!(std::fs::read(&whole).unwrap(), std::fs::read(&model).unwrap());
    // Without OUTPUT it lies beside the parts, where the model is already.
    let line = error_line(&run(args!["merge", last]));
    assert!(line.contains("m.gguf: exists already"), "{line}");
    assert!(run(args!["merge", last, "--force"]).status.success());
}

#[test]
fn parts_by_tensors_are_named_as_asked() {
    let dir = tempfile::tempdir().unwrap();
    let model = model_in(dir.path());
    let tensors = Gguf::open(&model).unwrap().tensors().len();
    let text = stdout_of(run(args!["split", &model, dir.path().join("p.gguf"), "--max-tensors", "20"]));
    assert_eq!(text.lines().count(), tensors.div_ceil(20), "{text}");
    assert!(text.starts_with(dir.path().join("p-00001-of-").to_str().unwrap()), "{text}");
    let alone = ["--max-tensors", "1000", "--no-tensor-first-split", "--json"];
    let report = json_of(run_with(args!["split", &model, dir.path().join("q")], &alone));
    assert_eq!((&report["parts"][0]["tensors"], &report["parts"][1]["tensors"]), (&0.into(), &tensors.into()));
    assert!(dir.path().join("q-00002-of-00002.gguf").is_file());
    // A split model can be split otherwise.
    let parts = dir.path().join("q-00001-of-00002.gguf");
    let again = json_of(run(args!["split", &parts, "--max-size", "4MB", "--json"]));
    assert!(again["parts"].as_array().unwrap().len() > 2, "{again}");
}

#[test]
fn a_dry_run_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let model = model_in(dir.path());
    let dry = json_of(run(args!["split", &model, "--max-size", "3MB", "--dry-run", "--json"]));
    assert_eq!((&dry["written"], files_in(dir.path())), (&false.into(), vec!["m.gguf".to_owned()]));
    let made = json_of(run(args!["split", &model, "--max-size", "3MB", "--json"]));
    assert_eq!(dry["parts"], made["parts"]);
}

#[test]
fn what_cannot_be_split_is_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let model = model_in(dir.path());
    let line = error_line(&run(args!["split", &model, "--max-size", "1GB"]));
    assert!(line.contains("fit in one part; there is nothing to split"), "{line}");
    let line = error_line(&run(args!["split", &model, "--max-size", "10KB"]));
    assert!(line.contains("the metadata alone take"), "{line}");
    for (rest, part) in [
        (&[][..], "--max-size <SIZE>"),
        (&["--max-size", "1GB", "--max-tensors", "2"], "cannot be used with"),
        (&["--max-size", "many"], "is not understood"),
        (&["--max-tensors", "0"], "0 is not in"),
    ] {
        let output = run_with(args!["split", &model], rest);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert!(stderr_of(&output).contains(part), "{output:?}");
    }
    assert_eq!(files_in(dir.path()), ["m.gguf"]);
    // A tensor that is larger than a part stands alone in one.
    let output = run(args!["split", &model, "--max-size", "300KB"]);
    assert!(output.status.success() && stderr_of(&output).contains("cannot be cut"), "{output:?}");
}

#[test]
fn parts_that_are_missing_or_of_something_else_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let model = model_in(dir.path());
    assert!(run(args!["split", &model, "--max-tensors", "10", "--quiet"]).status.success());
    let count = files_in(dir.path()).len() - 1;
    let part = |number: usize| dir.path().join(format!("m-{number:05}-of-{count:05}.gguf"));
    for number in [1, 3] {
        std::fs::rename(part(number), part(number).with_extension("away")).unwrap();
    }
    let line = error_line(&run(args!["merge", part(2), dir.path().join("o.gguf")]));
    let names = format!("2 of {count} parts are missing; put them beside it: m-00001-of-{count:05}.gguf, m-00003-of");
    assert!(line.contains(&names), "{line}");
    let line = error_line(&run(args!["merge", &model, dir.path().join("o.gguf")]));
    assert!(line.contains("is not a part of a split model"), "{line}");
    // Named like a part, but whole.
    let whole = dir.path().join("w-00001-of-00001.gguf");
    std::fs::copy(&model, &whole).unwrap();
    assert!(run(args!["merge", &whole, dir.path().join("o.gguf")]).status.success());
    let two = dir.path().join("w-00001-of-00002.gguf");
    std::fs::copy(&model, &two).unwrap();
    std::fs::copy(&model, dir.path().join("w-00002-of-00002.gguf")).unwrap();
    let line = error_line(&run(args!["merge", &two, dir.path().join("p.gguf")]));
    assert!(line.contains("its keys say that it stands alone"), "{line}");
}

#[test]
fn metadata_of_a_further_part_are_not_lost() {
    let dir = tempfile::tempdir().unwrap();
    let first = RawGguf::new().str("general.architecture", "llama").u32("x", 1).split(0, 2, 1);
    let second = RawGguf::new().split(1, 2, 1).u32("x", 1);
    let parts = [dir.path().join("a-00001-of-00002.gguf"), dir.path().join("a-00002-of-00002.gguf")];
    std::fs::write(&parts[0], first.build()).unwrap();
    let merge = |second: RawGguf| {
        std::fs::write(&parts[1], second.f32_tensor("w", &[1], &[1.0]).build()).unwrap();
        run(args!["merge", &parts[0], "--force"])
    };
    assert!(merge(second.clone()).status.success());
    let line = error_line(&merge(second.clone().u32("y", 1)));
    assert!(line.contains("00002-of-00002.gguf: metadata key \"y\" is not in the first part"), "{line}");
    let other = RawGguf::new().split(1, 2, 1).u32("x", 2);
    assert!(error_line(&merge(other)).contains("key \"x\""));
}

#[test]
fn an_output_is_never_one_of_the_parts() {
    let dir = tempfile::tempdir().unwrap();
    let model = model_in(dir.path());
    assert!(run(args!["split", &model, "--max-tensors", "30"]).status.success());
    let names = files_in(dir.path());
    let first = dir.path().join(&names[0]);
    let before = std::fs::read(&first).unwrap();
    let line = error_line(&run(args!["merge", &first, &first, "--force"]));
    assert!(line.contains("is a file of the model that is read"), "{line}");
    let line = error_line(&run(args!["split", &first, "--max-tensors", "30", "--force"]));
    assert!(line.contains("is a file of the model that is read"), "{line}");
    assert_eq!(std::fs::read(&first).unwrap(), before);
    assert_eq!(files_in(dir.path()), names);
}
