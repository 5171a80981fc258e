//! What people type by habit, and what a command can know by itself.

mod common;

use common::{args, data, json_of, model_in, run, run_with, stderr_of};

#[test]
fn llama_quantizes_forms_are_the_same_as_a_target() {
    let dir = tempfile::tempdir().unwrap();
    let model = model_in(dir.path());
    let made = |name: &str| dir.path().join(name);
    let target = run(args!["quantize", &model, made("a.gguf"), "--target", "q4_k_m"]);
    assert!(target.status.success(), "{target:?}");
    let expected = std::fs::read(made("a.gguf")).unwrap();
    for (name, rest) in [("b.gguf", &["Q4_K_M"][..]), ("c.gguf", &["q4_k_m", "1"]), ("d.gguf", &["15", "2"])] {
        let output = run_with(args!["quantize", &model, made(name)], rest);
        assert!(output.status.success(), "{output:?}");
        assert_eq!(std::fs::read(made(name)).unwrap(), expected, "{rest:?}");
    }
    // Without OUTPUT the file lies beside the model.
    for rest in [&["Q4_K_M"][..], &["Q4_K_M", "2", "--force"]] {
        let output = run_with(args!["quantize", &model], rest);
        assert!(output.status.success(), "{output:?}");
        assert_eq!(std::fs::read(made("m-Q4_K_M.gguf")).unwrap(), expected, "{rest:?}");
    }
    let json = json_of(run(args!["quantize", &model, made("e.gguf"), "Q4_K_M", "1", "--json"]));
    assert_eq!(json["times"]["threads"], 1);
}

#[test]
fn wrong_positional_arguments_are_wrong_usage() {
    let dir = tempfile::tempdir().unwrap();
    let model = model_in(dir.path());
    for (rest, part) in [
        (&["out.gguf"][..], "give one of --target NAME"),
        (&["out.gguf", "Q9"], "unknown target \"Q9\""),
        (&["out.gguf", "Q4_K_M", "two"], "invalid value 'two'"),
        (&["out.gguf", "Q4_K_M", "0"], "invalid value '0'"),
        (&["out.gguf", "Q4_K_M", "--like", "Q3_K_M"], "cannot be used with"),
        (&["out.gguf", "Q4_K_M", "2", "--threads", "1"], "give the threads once"),
    ] {
        let output = run_with(args!["quantize", &model], rest);
        assert_eq!(output.status.code(), Some(2), "{rest:?}: {output:?}");
        assert!(stderr_of(&output).contains(part), "{rest:?}: {output:?}");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing was written");
}

#[test]
fn an_imatrix_lies_beside_the_model_and_is_found_there() {
    let dir = tempfile::tempdir().unwrap();
    let model = model_in(dir.path());
    let text = data("golden/calib-sample.txt");
    let made = run(args!["imatrix", &model, "-f", text, "-c", "64", "--chunks", "4"]);
    assert!(made.status.success(), "{made:?}");
    let beside = dir.path().join("m.imatrix.gguf");
    assert!(beside.is_file());

    let quantize = |rest: &[&str]| run_with(args!["quantize", &model, "--force"], rest);
    let found = quantize(&["--target", "IQ2_XXS"]);
    assert!(found.status.success(), "{found:?}");
    let line = stderr_of(&found);
    assert!(line.contains("m.imatrix.gguf; --no-imatrix leaves it aside"), "{line}");
    let named = run(args!["quantize", &model, dir.path().join("n.gguf"), "--target", "IQ2_XXS", "--imatrix", &beside]);
    assert!(named.status.success() && !stderr_of(&named).contains("--no-imatrix"), "{named:?}");
    let bytes = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
    assert_eq!(bytes("m-IQ2_XXS.gguf"), bytes("n.gguf"));

    let without = quantize(&["--target", "IQ2_XXS", "--no-imatrix"]);
    assert_eq!(without.status.code(), Some(1), "{without:?}");
    assert!(stderr_of(&without).contains("needs an importance matrix"), "{without:?}");
    // Nothing is rounded here, so nothing is weighed.
    let copy = quantize(&["--target", "COPY"]);
    assert!(copy.status.success() && !stderr_of(&copy).contains("imatrix"), "{copy:?}");

    let plan = run(args!["plan", &model, "--like", "Q4_K_M", "--method", "error"]);
    assert!(plan.status.success() && stderr_of(&plan).contains("--no-imatrix leaves it aside"), "{plan:?}");
    assert!(json_of(plan)["imatrix"]["name"].as_str().unwrap().ends_with("m.imatrix.gguf"));
}

#[test]
fn the_folder_of_several_outputs_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let model = model_in(dir.path());
    let folder = dir.path().join("a/b");
    let dry = run(args!["quantize", &model, &folder, "--target", "Q4_K_M,Q2_K", "--dry-run"]);
    assert!(dry.status.success() && !folder.exists(), "{dry:?}");
    let output = run(args!["quantize", &model, &folder, "--target", "Q4_K_M,Q2_K"]);
    assert!(output.status.success(), "{output:?}");
    assert!(folder.join("m-Q4_K_M.gguf").is_file() && folder.join("m-Q2_K.gguf").is_file());
}

#[test]
fn a_folder_that_cannot_be_made_is_one_line_that_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let model = model_in(dir.path());
    // Below a file there are no folders.
    let folder = model.join("out");
    for arguments in [args!["quantize", &model, &folder, "--target", "Q4_K_M,Q2_K"], args!["man", &folder]] {
        let output = run(arguments);
        let line = stderr_of(&output);
        assert_eq!(output.status.code(), Some(1), "{line}");
        assert!(
            line.lines().count() == 1 && line.contains("cannot be made") && line.contains("choose another"),
            "{line}"
        );
    }
}

#[test]
fn a_measurement_that_cannot_lie_beside_the_model_lies_beside_the_output() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("models--o--n/snapshots/0123");
    let read_only = dir.path().join("read-only");
    let outputs = dir.path().join("out");
    for folder in [&cache, &read_only, &outputs] {
        std::fs::create_dir_all(folder).unwrap();
    }
    let models = [(model_in(&cache), "cache.json"), (model_in(&read_only), "read-only.json")];
    let mut permissions = std::fs::metadata(&read_only).unwrap().permissions();
    permissions.set_readonly(true);
    std::fs::set_permissions(&read_only, permissions.clone()).unwrap();
    for (model, plan) in models {
        let measurement = outputs.join("m.sens.json");
        let _ = std::fs::remove_file(&measurement);
        let rest = ["--like", "Q4_K_M", "--probe-tokens", "64", "-o"];
        let output = run_with(args!["plan", &model], &[&rest[..], &[outputs.join(plan).to_str().unwrap()]].concat());
        assert!(output.status.success(), "{output:?}");
        assert!(measurement.is_file(), "{output:?}");
        assert!(stderr_of(&output).contains("not kept beside the model but in"), "{output:?}");
        assert!(!model.with_extension("sens.json").exists());
    }
    #[allow(clippy::permissions_set_readonly_false)] // the temporary folder is to be removed
    permissions.set_readonly(false);
    std::fs::set_permissions(&read_only, permissions).unwrap();
}

#[test]
fn tables_can_be_listed() {
    let architectures = json_of(run(args!["list", "architectures", "--json"]));
    let llama = architectures.as_array().unwrap().iter().find(|row| row["name"] == "llama").unwrap();
    assert!(llama["converts"].as_array().unwrap().iter().any(|class| class == "LlamaForCausalLM"));
    assert_eq!((&llama["feedback"], &llama["quantize"]), (&true.into(), &true.into()));
    let types = json_of(run(args!["list", "types", "--json"]));
    let row = types.as_array().unwrap().iter().find(|row| row["name"] == "iq2_xxs").unwrap();
    assert_eq!((&row["needs_importance"], &row["block_bytes"]), (&true.into(), &66.into()));
    let targets = json_of(run(args!["list", "targets", "--json"]));
    let row = targets.as_array().unwrap().iter().find(|row| row["name"] == "Q4_K_M").unwrap();
    assert_eq!((&row["file_type"], &row["base_type"]), (&15.into(), &"q4_K".into()));
    let help = run(args!["quantize", "--help"]);
    for target in targets.as_array().unwrap() {
        let name = target["name"].as_str().unwrap();
        assert!(String::from_utf8_lossy(&help.stdout).split_whitespace().any(|word| word == name), "{name}");
    }
    for what in ["architectures", "types", "targets"] {
        assert!(run(args!["list", what]).stdout.len() > 300, "{what}");
    }
}

#[test]
fn completions_and_manual_pages_come_from_the_flags() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let output = run(args!["completions", shell]);
        let script = String::from_utf8(output.stdout).unwrap();
        assert!(script.contains("no-imatrix") && script.contains("quantize"), "{shell}");
    }
    assert_eq!(run(args!["completions", "cmd"]).status.code(), Some(2));
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("man1");
    let output = run(args!["man", &folder]);
    assert!(output.status.success(), "{output:?}");
    for page in ["lwq.1", "lwq-quantize.1", "lwq-eval-kld.1"] {
        assert!(std::fs::read_to_string(folder.join(page)).unwrap().contains(".TH"), "{page}");
    }
    assert!(!folder.join("lwq-dev.1").exists(), "hidden commands have no page");
}
