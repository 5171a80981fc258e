//! `lwq export --like-bpw`: 4 and 8 bits in one folder, chosen by what the bits do to the model.

mod common;
mod convert_support;
mod export_support;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use common::{args, data, doclet, error_line, files_in, json_of, run, stderr_of, stdout_of};
use convert_support::{Source, save};
use export_support::{config_of, export, exported, mixture, running_mixture, tensors_of, two_layers};
use serde_json::{Value as Json, json};

/// Modules in 8 bits, by a report.
fn in_eight(report: &Json) -> BTreeSet<String> {
    let bits = report["bits"].as_object().unwrap();
    bits.iter().filter(|(_, bits)| **bits == json!(8)).map(|(module, _)| module.clone()).collect()
}

/// A folder whose modules have 8 bits where `is_eight` says so, put together from one in 4 bits and one in 8.
fn composed(four: &Path, eight: &Path, output: &Path, is_eight: &dyn Fn(&str) -> bool) -> PathBuf {
    let module_of = |name: &str| name.split(".weight").next().unwrap().to_owned();
    let (of_four, of_eight) = (tensors_of(four), tensors_of(eight));
    let mut tensors = of_four.clone();
    let mut targets = BTreeSet::new();
    for name in of_four.keys().filter(|name| name.contains(".weight_")) {
        if is_eight(&module_of(name)) {
            tensors.insert(name.clone(), of_eight[name].clone());
            targets.insert(module_of(name));
        }
    }
    std::fs::create_dir_all(output).unwrap();
    for name in files_in(four) {
        std::fs::copy(four.join(&name), output.join(&name)).unwrap();
    }
    save(&tensors, &output.join("model.safetensors"));
    let mut config = config_of(four);
    let mut group = config_of(eight)["quantization_config"]["config_groups"]["group_0"].clone();
    group["targets"] = json!(targets);
    config["quantization_config"]["config_groups"]["group_1"] = group;
    std::fs::write(output.join("config.json"), config.to_string()).unwrap();
    output.to_path_buf()
}

/// Mean divergence of folders from the bundled model.
fn divergences(dir: &Path, folders: &[&Path]) -> Vec<f64> {
    let mut arguments =
        args!["eval", "kld", "--base", doclet(), "-f", data("golden/eval-sample.txt"), "--chunks", "8", "--json"];
    for folder in folders {
        let gguf = dir.join(format!("{}.gguf", folder.file_name().unwrap().to_str().unwrap()));
        stdout_of(run(args!["convert", folder, "-o", &gguf, "--type", "f32", "--quiet"]));
        arguments.push(gguf.into());
    }
    let report = json_of(run(arguments));
    report["models"].as_array().unwrap().iter().map(|model| model["mean_kld"].as_f64().unwrap()).collect()
}

#[test]
fn a_measured_mix_loses_less_than_the_first_layers_in_8_bits() {
    let dir = tempfile::tempdir().unwrap();
    let mut source = Source::doclet(&doclet());
    source.config["torch_dtype"] = json!("float16");
    let folder = source.write(&dir.path().join("model"));
    let measured = dir.path().join("measured");
    let options = ["--scheme", "W4A16", "--like-bpw", "5", "--rounding", "search", "--check", "--json"];
    let report = json_of(export(&folder, &measured, &options));
    let bits = report["bits_per_weight"].as_f64().unwrap();
    assert!(bits <= 5.0 && bits > 4.8 && report["like_bpw"] == 5.0, "{bits}");
    assert_eq!(report["bits"].as_object().unwrap().len(), 42);
    assert_eq!(report["check"]["faults"], json!([]));
    let eight = in_eight(&report);
    for layer in 0..6 {
        for siblings in [&["self_attn.q", "self_attn.k", "self_attn.v"][..], &["mlp.gate", "mlp.up"]] {
            let is_in = |name: &&str| eight.contains(&format!("model.layers.{layer}.{name}_proj"));
            let count = siblings.iter().filter(|name| is_in(name)).count();
            assert!(count == 0 || count == siblings.len(), "{eight:?}");
        }
    }
    let config = &config_of(&measured)["quantization_config"];
    let groups = config["config_groups"].as_object().unwrap();
    assert_eq!((groups.len(), &config["format"]), (2, &json!("pack-quantized")));
    for (group, bits) in groups.values().zip([4, 8]) {
        assert_eq!((&group["weights"]["num_bits"], &group["format"]), (&json!(bits), &json!("pack-quantized")));
    }
    assert_eq!(groups["group_0"]["targets"], json!(["Linear"]));
    assert!(groups["group_1"]["targets"].as_array().unwrap().len() <= 4, "{groups:?}");

    let by_search = |scheme: &str| {
        let output = dir.path().join(scheme);
        stdout_of(export(&folder, &output, &["--scheme", scheme, "--rounding", "search", "--quiet"]));
        output
    };
    let (all_4, all_8) = (by_search("W4A16"), by_search("W8A16"));
    // The bytes of a matrix depend on its own bits alone.
    let again = composed(&all_4, &all_8, &dir.path().join("again"), &|module| eight.contains(module));
    let (tensors, expected) = (tensors_of(&measured), tensors_of(&again));
    assert!(expected.iter().all(|(name, raw)| raw.data == tensors[name].data));

    let first = |module: &str| module.starts_with("model.layers.0.") || module.starts_with("model.layers.1.self_attn.");
    let first = composed(&all_4, &all_8, &dir.path().join("first"), &first);
    let size = |folder: &Path| std::fs::metadata(folder.join("model.safetensors")).unwrap().len();
    assert!(size(&first) >= size(&measured) - 4096, "{} {}", size(&first), size(&measured));
    let found = divergences(dir.path(), &[&measured, &first, &all_4]);
    assert!(found[0] < 0.9 * found[1] && found[1] < found[2], "{found:?}");
}

#[test]
fn what_does_not_go_with_a_mix_is_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let folder = two_layers().write(&dir.path().join("model"));
    let output = dir.path().join("out");
    let with =
        |scheme: &str, bits: &str| export(&folder, &output, &["--scheme", scheme, "--like-bpw", bits, "--dry-run"]);
    let line = error_line(&with("W4A16", "4"));
    assert!(line.contains("all matrices in 4 bits with their scales take 4.127; give --like-bpw 4.127"), "{line}");
    let text = stdout_of(with("W4A16", "4.127"));
    assert!(text.contains("at most 4.127 bits per weight") && text.contains("a dry run does not measure"), "{text}");
    assert_eq!(files_in(dir.path()), ["model"]);
    for scheme in ["W8A16", "W8A8", "FP8_DYNAMIC", "NVFP4A16"] {
        let line = error_line(&with(scheme, "5"));
        assert!(line.contains(&format!("{scheme} has no 4-bit integers")) && line.contains("W4A16"), "{line}");
    }
    for bits in ["0", "-1", "nan", "x"] {
        assert_eq!(with("W4A16", bits).status.code(), Some(2), "{bits}");
    }
    let mut other = two_layers();
    other.config["architectures"] = json!(["OtherForCausalLM"]);
    let other = other.write(&dir.path().join("other"));
    let line = error_line(&export(&other, &output, &["--scheme", "W4A16", "--like-bpw", "5"]));
    assert!(line.contains("OtherForCausalLM is no class that lwq can run") && line.contains("--like-bpw"), "{line}");

    // More than 8 bits cannot be used, and nothing has to be measured for it.
    let done = export(&folder, &output, &["--scheme", "W4A16", "--like-bpw", "9", "--check", "--json"]);
    assert!(stderr_of(&done).contains("all matrices get 8 bits") && !stderr_of(&done).contains("probe"));
    assert_eq!(in_eight(&json_of(done)).len(), 14);
    let (found, expected) = (tensors_of(&output), tensors_of(&exported(&folder, "W8A16")));
    assert!(expected.iter().all(|(name, raw)| raw.data == found[name].data));
    let groups = config_of(&output)["quantization_config"]["config_groups"].clone();
    assert_eq!((groups.as_object().unwrap().len(), &groups["group_0"]["targets"]), (1, &json!(["Linear"])));
}

#[cfg(unix)]
#[test]
fn measuring_goes_on_behind_the_last_probe() {
    use common::{interrupt, lwq, wait_for_work};
    use std::process::Stdio;
    let dir = tempfile::tempdir().unwrap();
    let folder = two_layers().write(&dir.path().join("model"));
    let (whole, output) = (dir.path().join("whole"), dir.path().join("out"));
    let options = ["--scheme", "W4A16_ASYM", "--like-bpw", "6", "--json"];
    let expected = json_of(export(&folder, &whole, &options));
    assert!(!in_eight(&expected).is_empty());
    let measured = dir.path().join("out.partial/work/bits.sens.json");
    let probes = || std::fs::read_to_string(&measured).unwrap_or_default().matches("\"kld\"").count();
    let mut child = lwq()
        .args(args!["export", &folder, &output, "--rounding", "rtn"])
        .args(options)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for_work(&mut child, || probes() > 1);
    interrupt(child, libc::SIGINT);
    let before = probes();
    assert!(before < 8 && !output.exists());
    let done = export(&folder, &output, &options);
    assert!(stderr_of(&done).contains(&format!("{} parts to probe", 8 - before)), "{}", stderr_of(&done));
    assert_eq!(json_of(done)["bits"], expected["bits"]);
    for name in files_in(&whole) {
        assert!(std::fs::read(whole.join(&name)).unwrap() == std::fs::read(output.join(&name)).unwrap(), "{name}");
    }
    assert_eq!(files_in(dir.path()), ["model", "out", "whole"]);
}

#[test]
fn experts_of_a_mix_are_one_for_transformers() {
    let dir = tempfile::tempdir().unwrap();
    let folder = mixture(false).write(&dir.path().join("model"));
    let (four, eight) = (exported(&folder, "W4A16"), exported(&folder, "W8A16"));
    let is_expert = |module: &str| module.contains(".experts.");
    // By full names alone transformers takes the group of all other layers for the experts.
    let named = composed(&four, &eight, &dir.path().join("named"), &is_expert);
    let line = error_line(&run(args!["export", &named, "--check"]));
    assert!(line.contains("is in group_1, but transformers (5.17) decodes all experts by group_0"), "{line}");
    let mut config = config_of(&named);
    let groups = &mut config["quantization_config"]["config_groups"];
    groups["group_1"]["targets"] = json!([r"re:.*\.experts\.\d+\..*"]);
    std::fs::write(named.join("config.json"), config.to_string()).unwrap();
    stdout_of(run(args!["export", &named, "--check"]));
}

#[test]
fn a_mix_keeps_experts_equal_and_names_them() {
    let dir = tempfile::tempdir().unwrap();
    let folder = running_mixture(true).write(&dir.path().join("model"));
    // All experts take more than three quarters of the weights.
    let report = json_of(export(
        &folder,
        &dir.path().join("out"),
        &["--scheme", "W4A16", "--like-bpw", "6", "--check", "--json"],
    ));
    let eight = in_eight(&report);
    assert_eq!(eight.len(), 4, "{eight:?}");
    assert!(eight.iter().all(|module| module.contains("self_attn")));
    let groups = config_of(&dir.path().join("out"))["quantization_config"]["config_groups"].clone();
    assert_eq!(groups["group_0"]["targets"], json!(["Linear", r"re:.*\.experts\.\d+\..*"]));
    assert_eq!(groups["group_1"]["weights"]["num_bits"], 8);
}

#[test]
fn parts_of_one_that_have_other_bits_are_a_fault() {
    let dir = tempfile::tempdir().unwrap();
    let dense = two_layers().write(&dir.path().join("dense/model"));
    let sparse = mixture(false).write(&dir.path().join("sparse/model"));
    let v = "model.layers.1.self_attn.v_proj";
    let down = "model.layers.0.mlp.experts.2.down_proj";
    for (folder, module) in [(dense, v), (sparse, down)] {
        let (four, eight) = (exported(&folder, "W4A16"), exported(&folder, "W8A16"));
        let broken = composed(&four, &eight, &folder.with_file_name("broken"), &|name| name == module);
        let line = error_line(&run(args!["export", &broken, "--check"]));
        assert!(line.contains(&format!("{module}: is in group_1, but")), "{line}");
        assert!(line.contains("in group_0: vLLM puts them into one and refuses that"), "{line}");
    }
}
