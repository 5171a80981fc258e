//! Models by their name on the Hugging Face hub, from a cache on this machine.

mod common;
mod convert_support;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{doclet, error_line, files_in, json_of, lwq, tensor_digest};
use convert_support::Source;
use lwq::gguf::Gguf;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A cache that holds the bundled model as `org/doclet-4m`, at `main`.
fn cache(root: &Path) -> PathBuf {
    let model = root.join("hub/models--org--doclet-4m");
    std::fs::create_dir_all(model.join("refs")).unwrap();
    std::fs::write(model.join("refs/main"), COMMIT).unwrap();
    Source::doclet(&doclet()).write(&model.join("snapshots").join(COMMIT))
}

/// The binary in a folder of its own, with this cache.
fn with_cache(root: &Path) -> Command {
    let work = root.join("work");
    std::fs::create_dir_all(&work).unwrap();
    let mut command = lwq();
    command.current_dir(work).env("HF_HOME", root);
    ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"].iter().for_each(|name| {
        command.env_remove(name);
    });
    command
}

fn run(root: &Path, arguments: &str) -> Output {
    with_cache(root).args(arguments.split(' ')).output().unwrap()
}

#[test]
fn a_model_in_the_cache_is_converted_by_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let snapshot = cache(dir.path());
    let files = files_in(&snapshot);
    let json = json_of(run(dir.path(), "convert org/doclet-4m --json"));
    assert_eq!(Path::new(json["source"].as_str().unwrap()), snapshot);
    // The file is called as the model, and lies where the command ran.
    let made = dir.path().join("work/doclet-4m-f16.gguf");
    assert_eq!(
        (json["output"].as_str().unwrap(), tensor_digest(&made)),
        ("doclet-4m-f16.gguf", tensor_digest(&doclet()))
    );
    let name = Gguf::open(&made).unwrap().metadata().str("general.name").unwrap().unwrap().to_owned();
    assert!(name.starts_with("Doclet"), "{name}");
    assert_eq!(files_in(&snapshot), files);
    for revision in ["main", COMMIT] {
        assert!(run(dir.path(), &format!("convert org/doclet-4m --revision {revision} --dry-run")).status.success());
    }
}

#[test]
fn a_folder_of_that_name_comes_first() {
    let dir = tempfile::tempdir().unwrap();
    cache(dir.path());
    let folder = dir.path().join("work/org/doclet-4m");
    std::fs::create_dir_all(&folder).unwrap();
    let line = error_line(&run(dir.path(), "convert org/doclet-4m"));
    assert!(line.contains("org/doclet-4m") && !line.contains("snapshots"), "{line}");
    let output = run(dir.path(), "convert org/doclet-4m --revision main");
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}

#[test]
fn what_is_not_there_is_named_with_the_command_that_brings_it() {
    let dir = tempfile::tempdir().unwrap();
    let snapshot = cache(dir.path());
    let line = error_line(&run(dir.path(), "convert org/other"));
    assert!(line.contains("`hf download org/other` brings it"), "{line}");
    let line = error_line(&run(dir.path(), "convert org/doclet-4m --revision v2"));
    assert!(line.contains("has main; `hf download org/doclet-4m --revision v2` brings it"), "{line}");
    let output = run(dir.path(), "convert org/doclet-4m --revision ../../x");
    assert_eq!(output.status.code(), Some(2), "{output:?}");

    std::fs::rename(snapshot.join("model.safetensors"), snapshot.join("model-00001-of-00002.safetensors")).unwrap();
    for command in ["convert org/doclet-4m", "export org/doclet-4m out --scheme W4A16", "publish org/doclet-4m out"] {
        let line = error_line(&run(dir.path(), command));
        assert!(line.contains("lacks model-00002-of-00002.safetensors; `hf download org/doclet-4m`"), "{line}");
    }
    // Files and folders that are missing are no models.
    for path in ["lost.gguf", "models/lost.gguf"] {
        let line = error_line(&run(dir.path(), &format!("publish {path} out")));
        assert!(line.contains(path) && !line.contains("hf download"), "{line}");
    }
}

#[test]
fn export_and_publish_take_names_too() {
    let dir = tempfile::tempdir().unwrap();
    cache(dir.path());
    let output = run(dir.path(), "export org/doclet-4m out --scheme W8A16 --rounding rtn");
    assert!(output.status.success(), "{output:?}");
    assert!(dir.path().join("work/out/config.json").is_file());
    // The model is read before the request is looked at as a whole.
    let line = error_line(&run(dir.path(), "publish org/doclet-4m repository --base-model a/b/c --quiet"));
    assert!(line.contains("a/b/c"), "{line}");
}
