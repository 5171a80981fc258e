//! `lwq export` as users run it: what is written, how it reads back, what is refused, and what an interrupt leaves.

mod common;
mod convert_support;
mod export_support;

use std::path::Path;
use std::process::Stdio;

use common::{args, error_line, files_in, json_of, run, run_with, stderr_of, stdout_of};
use convert_support::unpermute;
use export_support::{SCHEMES, bells, config_of, export, exported, mixture, tensors_of, two_layers};
use lwq::gguf::Gguf;
use lwq::rounding::grid::{e4m3_value, fp4_value};
use safetensors::Dtype;
use serde_json::{Value as Json, json};
use sha2::{Digest, Sha256};

const UP: &str = "model.layers.0.mlp.up_proj";

fn hex_digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A column of the hidden states that is much larger than the others behind the first norm of [`wide_range`].
const LARGE: usize = 5;

/// Values of a tensor in 16 or 32 bits.
fn floats(raw: &convert_support::Raw) -> Vec<f32> {
    let half = |bytes: &[u8]| half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
    let single = |bytes: &[u8]| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    match raw.dtype {
        Dtype::F32 => raw.data.chunks_exact(4).map(single).collect(),
        _ => raw.data.chunks_exact(2).map(half).collect(),
    }
}

/// The bundled model's first layers, where one input of the first matrices is large and their weights small.
fn wide_range() -> convert_support::Source {
    let mut source = two_layers();
    let scale = |raw: &mut convert_support::Raw, first: usize, step: usize, by: f32| {
        let mut values = floats(raw);
        values.iter_mut().skip(first).step_by(step).for_each(|value| *value *= by);
        raw.data = match raw.dtype {
            Dtype::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            _ => values.iter().flat_map(|value| half::f16::from_f32(*value).to_le_bytes()).collect(),
        };
    };
    scale(source.tensors.get_mut("model.layers.0.input_layernorm.weight").unwrap(), LARGE, usize::MAX, 64.0);
    for part in ["q", "k", "v"] {
        let matrix = source.tensors.get_mut(&format!("model.layers.0.self_attn.{part}_proj.weight")).unwrap();
        scale(matrix, LARGE, 256, 1.0 / 64.0);
    }
    source
}

/// Names of GGUF, and how many heads the rows of a matrix are permuted by.
fn in_gguf(module: &str) -> (String, Option<usize>) {
    let parts: Vec<&str> = module.split('.').collect();
    let (role, heads) = match parts[4] {
        "q_proj" => ("attn_q", Some(4)),
        "k_proj" => ("attn_k", Some(2)),
        "v_proj" => ("attn_v", None),
        "o_proj" => ("attn_output", None),
        "gate_proj" => ("ffn_gate", None),
        "up_proj" => ("ffn_up", None),
        _ => ("ffn_down", None),
    };
    (format!("blk.{}.{role}.weight", parts[2]), heads)
}

#[test]
fn every_scheme_is_sound_and_convert_reads_the_values_that_check_reads() {
    let dir = tempfile::tempdir().unwrap();
    let folder = two_layers().write(&dir.path().join("model"));
    std::fs::write(folder.join("README.md"), "card").unwrap();
    for scheme in SCHEMES {
        let output = exported(&folder, scheme);
        assert_eq!(
            files_in(&output),
            ["README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
        );
        let config = config_of(&output);
        assert_eq!(config["quantization_config"]["ignore"], json!(["lm_head"]), "{scheme}");
        assert_eq!(config["hidden_size"], 256);
        let found = json_of(run(args!["export", &folder, &output, "--check", "--json"]));
        let modules = found["tensors"].as_array().unwrap();
        assert_eq!((modules.len(), found["faults"].as_array().unwrap().len()), (14, 0), "{scheme}");

        let gguf = dir.path().join("back.gguf");
        stdout_of(run(args!["convert", &output, "-o", &gguf, "--type", "f32", "--force", "--quiet"]));
        let gguf = Gguf::open(&gguf).unwrap();
        for module in modules {
            let name = module["name"].as_str().unwrap();
            let (tensor, heads) = in_gguf(name);
            let data = gguf.data(gguf.tensor(&tensor).unwrap()).unwrap();
            let rows = module["shape"][0].as_u64().unwrap() as usize;
            let data = heads.map_or_else(|| data.to_vec(), |heads| unpermute(data, heads, rows));
            // GGUF has a factor for the global scale, which is rounded once more.
            let by_definition = if scheme == "NVFP4A16" { nvfp4(&output, name) } else { data.clone() };
            assert_eq!(hex_digest(&by_definition), module["values_sha256"], "{scheme} {name}");
            let floats =
                |bytes: &[u8]| bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect::<Vec<f32>>();
            for (a, b) in floats(&data).into_iter().zip(floats(&by_definition)) {
                assert!((a - b).abs() <= 2e-7 * b.abs(), "{scheme} {name}: {a} {b}");
            }
            let error = module["relative_error"].as_f64().unwrap();
            let most = if scheme.contains('4') && !scheme.starts_with("W8") { 0.15 } else { 0.04 };
            assert!(error > 1e-4 && error < most, "{scheme} {name}: {error}");
        }
    }
}

/// FP4 by the format's definition: code times block scale over global scale.
fn nvfp4(folder: &Path, module: &str) -> Vec<u8> {
    let tensors = tensors_of(folder);
    let part = |suffix: &str| &tensors[&format!("{module}.{suffix}")];
    let global = f32::from_le_bytes(part("weight_global_scale").data[..].try_into().unwrap());
    let codes = part("weight_packed").data.iter().flat_map(|byte| [byte & 15, byte >> 4]);
    let scales = &part("weight_scale").data;
    codes
        .enumerate()
        .flat_map(|(at, code)| (fp4_value(code) * (e4m3_value(scales[at / 16]) / global)).to_le_bytes())
        .collect()
}

#[test]
fn tensors_have_the_types_and_shapes_of_the_format() {
    let dir = tempfile::tempdir().unwrap();
    let folder = two_layers().write(&dir.path().join("model"));
    for (scheme, parts) in [
        ("W4A16", vec![("packed", Dtype::I32, vec![512, 32]), ("scale", Dtype::F16, vec![512, 2])]),
        ("W4A16_ASYM", vec![("zero_point", Dtype::I32, vec![64, 2]), ("shape", Dtype::I64, vec![2])]),
        ("W8A16", vec![("packed", Dtype::I32, vec![512, 64]), ("shape", Dtype::I64, vec![2])]),
        ("W8A8", vec![("", Dtype::I8, vec![512, 256]), ("scale", Dtype::F16, vec![512, 1])]),
        ("FP8_DYNAMIC", vec![("", Dtype::F8_E4M3, vec![512, 256]), ("scale", Dtype::F16, vec![512, 1])]),
        ("FP8_BLOCK", vec![("", Dtype::F8_E4M3, vec![512, 256]), ("scale", Dtype::F16, vec![4, 2])]),
        ("NVFP4A16", vec![("global_scale", Dtype::F32, vec![1]), ("scale", Dtype::F8_E4M3, vec![512, 16])]),
        ("MXFP4A16", vec![("packed", Dtype::U8, vec![512, 128]), ("scale", Dtype::U8, vec![512, 8])]),
    ] {
        let tensors = tensors_of(&exported(&folder, scheme));
        for (part, dtype, shape) in parts {
            let suffix = if part.is_empty() { String::new() } else { format!("_{part}") };
            let raw = &tensors[&format!("{UP}.weight{suffix}")];
            assert_eq!((raw.dtype, &raw.shape), (dtype, &shape), "{scheme} {part}");
        }
    }
    // What is put into one has one global scale.
    let tensors = tensors_of(&dir.path().join("out-NVFP4A16"));
    let global = |name: &str| tensors[&format!("model.layers.0.{name}_proj.weight_global_scale")].data.clone();
    assert_eq!(global("mlp.up"), global("mlp.gate"));
    assert_eq!(global("self_attn.q"), global("self_attn.v"));
    assert_ne!(global("self_attn.q"), global("self_attn.o"));
}

#[test]
fn files_of_limited_size_have_an_index() {
    let dir = tempfile::tempdir().unwrap();
    let folder = two_layers().write_sharded(&dir.path().join("model"), 3);
    let output = dir.path().join("out");
    let options = ["--scheme", "W8A16", "--group-size", "32", "--shard-size", "500KB", "--check"];
    let text = stdout_of(export(&folder, &output, &options));
    assert!(text.contains("14 quantized matrices, no fault"), "{text}");
    let index: Json =
        serde_json::from_slice(&std::fs::read(output.join("model.safetensors.index.json")).unwrap()).unwrap();
    let names = files_in(&output);
    let shards: Vec<&String> = names.iter().filter(|name| name.ends_with(".safetensors")).collect();
    assert!(shards.len() > 3 && shards[0].starts_with("model-00001-of-0000"), "{shards:?}");
    let place = |suffix: &str| index["weight_map"][format!("{UP}.weight_{suffix}")].clone();
    assert_eq!(place("packed"), place("scale"), "parts of a matrix stay together");
    let total: u64 = shards.iter().map(|name| std::fs::metadata(output.join(name)).unwrap().len()).sum();
    assert!(index["metadata"]["total_size"].as_u64().unwrap() < total);
    stdout_of(run(args!["convert", &output, "-o", dir.path().join("x.gguf"), "--quiet"]));
}

#[test]
fn rows_that_groups_do_not_divide_are_told_and_routed() {
    let dir = tempfile::tempdir().unwrap();
    let mut source = two_layers();
    for layer in 0..2 {
        for (name, shape) in [("gate", [480, 256]), ("up", [480, 256]), ("down", [256, 480])] {
            let name = format!("model.layers.{layer}.mlp.{name}_proj.weight");
            source.tensors.insert(name, bells(layer, &shape));
        }
    }
    source.config["intermediate_size"] = json!(480);
    let folder = source.write(&dir.path().join("model"));
    let down = "model.layers.1.mlp.down_proj";
    let group = |output: &Path| config_of(output)["quantization_config"]["config_groups"]["group_1"].clone();
    for (odd, told, strategy) in [
        ("keep", "stays in 16 bits", Json::Null),
        ("channel", "gets a scale for each row", json!("channel")),
        ("g32", "gets groups of 32", json!("group")),
    ] {
        let output = dir.path().join(odd);
        let done = export(&folder, &output, &["--scheme", "W4A16", "--odd", odd, "--check"]);
        let stderr = stderr_of(&done);
        let line = format!("warning: {down}: its rows of 480 weights are no whole groups of 128; it {told}");
        assert!(stderr.contains(&line), "{stderr}");
        stdout_of(done);
        assert_eq!(group(&output)["weights"]["strategy"], strategy, "{odd}");
        let ignore = config_of(&output)["quantization_config"]["ignore"].clone();
        match odd {
            "keep" => {
                assert_eq!(ignore, json!(["lm_head", "model.layers.0.mlp.down_proj", down]));
                assert_eq!(
                    tensors_of(&output)[&format!("{down}.weight")].data,
                    source.tensors[&format!("{down}.weight")].data
                );
            }
            _ => {
                assert_eq!(ignore, json!(["lm_head"]));
                assert_eq!(group(&output)["targets"], json!([r"re:.*layers\.(?:0|1)\.mlp\.down_proj$"]));
            }
        }
        stdout_of(run(args!["convert", &output, "-o", dir.path().join("x.gguf"), "--force", "--quiet"]));
    }
    // Rows of blocks may be cut at the last of what is put into one, not before; columns not at all, since inputs are rounded
    // in groups of as many.
    let output = dir.path().join("blocks");
    let done = export(&folder, &output, &["--scheme", "FP8_BLOCK", "--odd", "channel", "--check"]);
    assert!(stderr_of(&done).contains("mlp.gate_proj: its 480 rows are no whole blocks of 128"));
    let told = "mlp.down_proj: its rows of 480 weights are no whole groups of 128, in which its inputs are rounded";
    assert!(stderr_of(&done).contains(told), "{}", stderr_of(&done));
    stdout_of(done);
    // All of the networks of both layers, for vLLM under the one name that it has for gate and up.
    let targets = group(&output)["targets"].to_string();
    assert!(
        ["gate_proj", "up_proj", "gate_up_proj", "down_proj"].iter().all(|part| targets.contains(part)),
        "{targets}"
    );
    // What has a scale a row has inputs with a scale a token.
    assert_eq!(group(&output)["input_activations"]["strategy"], "token");
    let mut config = config_of(&output);
    let groups = &mut config["quantization_config"]["config_groups"];
    groups["group_1"]["input_activations"] = groups["group_0"]["input_activations"].clone();
    std::fs::write(output.join("config.json"), config.to_string()).unwrap();
    let checked = run(args!["export", &output, "--check"]);
    let fault = "down_proj: its rows of 480 weights are no whole groups of 128, in which its inputs are rounded";
    assert!(stderr_of(&checked).contains(fault), "{}", stderr_of(&checked));
}

#[test]
fn stacks_of_experts_become_single_ones_and_routers_are_ignored() {
    let dir = tempfile::tempdir().unwrap();
    let single = exported(&mixture(false).write(&dir.path().join("single/model")), "W4A16");
    let stacked = exported(&mixture(true).write(&dir.path().join("stacked/model")), "W4A16");
    let config = config_of(&single);
    assert_eq!(config["quantization_config"]["ignore"], json!(["lm_head", r"re:.*layers\.\d+\.mlp\.gate$"]));
    assert_eq!(config, config_of(&stacked));
    let (single, stacked) = (tensors_of(&single), tensors_of(&stacked));
    assert!(single.contains_key("model.layers.0.mlp.experts.3.down_proj.weight_packed"));
    assert_eq!(single.keys().collect::<Vec<_>>(), stacked.keys().collect::<Vec<_>>());
    for (name, raw) in &single {
        assert_eq!((&raw.shape, &raw.data), (&stacked[name].shape, &stacked[name].data), "{name}");
    }
    let checked =
        run(args!["export", dir.path().join("stacked/model"), dir.path().join("stacked/out-W4A16"), "--check"]);
    assert!(stdout_of(checked).contains("16 quantized matrices, no fault"));
    // transformers cannot read all schemes of experts.
    for (scheme, is_told) in [("MXFP4A16", false), ("NVFP4A16", true)] {
        let done =
            export(&dir.path().join("single/model"), &dir.path().join(scheme), &["--scheme", scheme, "--dry-run"]);
        assert_eq!(stderr_of(&done).contains("cannot read experts"), is_told, "{scheme}");
    }
    // A class that is not known keeps its stacks.
    let mut other = mixture(true);
    other.config["architectures"] = json!(["OtherForCausalLM"]);
    let folder = other.write(&dir.path().join("other/model"));
    let output = dir.path().join("other/out");
    let done = export(&folder, &output, &["--scheme", "W4A16", "--check"]);
    assert!(stderr_of(&done).contains("is not known for OtherForCausalLM; it stays in 16 bits"));
    stdout_of(done);
    let ignore = &config_of(&output)["quantization_config"]["ignore"];
    assert!(ignore.to_string().contains("mlp\\\\.experts"), "{ignore}");
}

#[test]
fn modules_can_be_ignored() {
    let dir = tempfile::tempdir().unwrap();
    let folder = two_layers().write(&dir.path().join("model"));
    let output = dir.path().join("out");
    let options = ["--scheme", "W8A8", "--ignore", r"o_proj$", "--ignore", r"layers\.1\.mlp\.up", "--check"];
    let done = export(&folder, &output, &options);
    let stderr = stderr_of(&done);
    assert!(stderr.contains("vLLM puts them into one and refuses that"), "{stderr}");
    // The check says so as well.
    assert_eq!(done.status.code(), Some(1));
    assert!(stderr.contains("error: ") && stderr.contains("model.layers.1.mlp.up_proj: is in 16 bits"), "{stderr}");
    let ignore = &config_of(&output)["quantization_config"]["ignore"];
    assert_eq!(*ignore, json!(["lm_head", r"re:.*layers\.\d+\.self_attn\.o_proj$", "model.layers.1.mlp.up_proj"]));
}

#[test]
fn a_quantized_source_is_decoded() {
    let dir = tempfile::tempdir().unwrap();
    let folder = two_layers().write(&dir.path().join("model"));
    let eight = exported(&folder, "FP8_DYNAMIC");
    let four = dir.path().join("four");
    let text = stdout_of(export(&eight, &four, &["--scheme", "W4A16", "--check"]));
    assert!(text.contains("no fault"), "{text}");
    assert_eq!(config_of(&four)["quantization_config"]["format"], "pack-quantized");
    let mut gptq = two_layers();
    gptq.config["quantization_config"] = json!({ "quant_method": "gptq", "bits": 4 });
    let folder = gptq.write(&dir.path().join("gptq"));
    let line = error_line(&export(&folder, &dir.path().join("x"), &["--scheme", "W4A16"]));
    assert!(line.contains("method \"gptq\"") && line.contains("16-bit model"), "{line}");
}

#[test]
fn outputs_that_exist_and_wrong_usage_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let folder = two_layers().write(&dir.path().join("model"));
    let output = exported(&folder, "W8A8");
    let again = |output: &Path, options: &[&str]| {
        let mut all = vec!["--scheme", "FP8_DYNAMIC", "--rounding", "rtn"];
        all.extend(options);
        export(&folder, output, &all)
    };
    assert!(error_line(&again(&output, &[])).contains("exists already"));
    stdout_of(again(&output, &["--force", "--check"]));
    assert_eq!(config_of(&output)["quantization_config"]["format"], "float-quantized");
    let other = dir.path().join("other");
    std::fs::create_dir_all(&other).unwrap();
    std::fs::write(other.join("precious"), "data").unwrap();
    assert!(error_line(&again(&other, &["--force"])).contains("no model folder"));
    assert!(error_line(&again(&folder, &["--force"])).contains("is the source folder"));
    assert!(error_line(&again(&folder.join("x"), &[])).contains("lies in it"));
    assert!(error_line(&again(&dir.path().join("no/x"), &[])).contains("does not exist"));
    assert_eq!(files_in(dir.path()), ["model", "other", "out-W8A8"]);

    let code = |arguments: &[&str]| run_with(args!["export", &folder], arguments).status.code();
    assert_eq!(code(&["x", "--scheme", "W3A16"]), Some(2));
    assert_eq!(code(&["x", "--scheme", "W8A8", "--group-size", "64"]), Some(2));
    assert_eq!(code(&["x", "--scheme", "W4A16", "--group-size", "16"]), Some(2));
    assert_eq!(code(&["x", "--scheme", "W4A16", "--shard-size", "0GB"]), Some(2));
    assert_eq!(code(&["x", "--scheme", "W4A16", "--ignore", "("]), Some(2));
    assert_eq!(code(&["x"]), Some(2));
    assert_eq!(code(&["--scheme", "W4A16"]), Some(2));
}

#[test]
fn nothing_is_written_by_a_dry_run_and_bytes_do_not_depend_on_threads() {
    let dir = tempfile::tempdir().unwrap();
    let folder = two_layers().write(&dir.path().join("model"));
    let dry = json_of(export(&folder, &dir.path().join("dry"), &["--scheme", "NVFP4A16", "--dry-run", "--json"]));
    assert_eq!((&dry["written"], &dry["quantized"]), (&json!(false), &json!(14)));
    assert_eq!(files_in(dir.path()), ["model"]);
    let mut files = Vec::new();
    for threads in ["1", "3"] {
        let output = dir.path().join(threads);
        stdout_of(export(&folder, &output, &["--scheme", "NVFP4A16", "--threads", threads]));
        files.push(std::fs::read(output.join("model.safetensors")).unwrap());
    }
    assert!(files[0] == files[1]);
    assert_eq!(files[0].len() as u64, dry["size_bytes"].as_u64().unwrap());
}

const TEXT: [&str; 4] = ["--calibration-tokens", "2048", "--calibration-ctx", "128"];

#[test]
fn rounding_by_the_models_own_inputs_is_nearer_on_other_text() {
    let dir = tempfile::tempdir().unwrap();
    let folder = two_layers().write(&dir.path().join("model"));
    let options = |rounding| [&["--scheme", "W4A16", "--rounding", rounding, "--check", "--json"], &TEXT[..]].concat();
    let feedback = json_of(export(&folder, &dir.path().join("feedback"), &options("feedback")));
    let outcomes = feedback["outcomes"].as_array().unwrap();
    assert_eq!((outcomes.len(), &feedback["rounding"]), (14, &json!("feedback")));
    let ratios: Vec<f64> = outcomes.iter().filter_map(|outcome| outcome["held_out_ratio"].as_f64()).collect();
    assert!(ratios.iter().sum::<f64>() / (ratios.len() as f64) < 0.9, "{ratios:?}");
    let gptq = json_of(export(&folder, &dir.path().join("gptq"), &options("gptq")));
    let search = export(
        &folder,
        &dir.path().join("search"),
        &["--scheme", "W4A16", "--rounding", "search", "--check", "--json"],
    );
    let mean = |report: &Json| {
        let tensors = report["check"]["tensors"].as_array().unwrap();
        tensors.iter().map(|tensor| tensor["relative_error"].as_f64().unwrap()).sum::<f64>() / 14.0
    };
    // What answers for other columns is further away from the weights themselves.
    let (fed, searched, gptq) = (mean(&feedback), mean(&json_of(search)), mean(&gptq));
    assert!(searched < fed && fed < 0.2 && searched < gptq && gptq < 0.25, "{searched} {fed} {gptq}");

    let again = dir.path().join("again");
    let line =
        error_line(&run_with(args!["export", &folder, &again, "--scheme", "W8A8"], &["--gate-file", "/no/such/file"]));
    assert!(line.contains("/no/such/file"), "{line}");
    let wrong = run_with(args!["export", &folder, &again, "--scheme", "W8A8", "--rounding", "rtn"], &TEXT);
    assert_eq!(wrong.status.code(), Some(2));
}

#[cfg(unix)]
#[test]
fn feedback_goes_on_behind_the_last_finished_matrix() {
    for options in [
        &["--scheme", "W4A16_ASYM", "--rounding", "feedback", "--json"][..],
        &["--scheme", "W8A8", "--rounding", "feedback", "--targets", "corrected", "--json"],
    ] {
        goes_on_behind_the_last_finished_matrix(options);
    }
}

#[cfg(unix)]
fn goes_on_behind_the_last_finished_matrix(options: &[&str]) {
    use common::{interrupt, lwq, wait_for_work};
    let dir = tempfile::tempdir().unwrap();
    let folder = wide_range().write(&dir.path().join("model"));
    let options = [options, &TEXT[..]].concat();
    let whole = json_of(export(&folder, &dir.path().join("whole"), &options));
    let output = dir.path().join("out");
    let journal = dir.path().join("out.partial/journal");
    let lines = || std::fs::read_to_string(&journal).unwrap_or_default().lines().count();
    // In the first layer, and in the second.
    for least in [3, 11] {
        let mut child = lwq()
            .args(args!["export", &folder, &output])
            .args(&options)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        wait_for_work(&mut child, || lines() > least);
        interrupt(child, libc::SIGKILL);
        assert!(lines() < 17 && !output.exists());
    }
    let again = json_of(export(&folder, &output, &options));
    let sorted = |report: &Json| {
        let mut outcomes: Vec<String> =
            report["outcomes"].as_array().unwrap().iter().map(|outcome| outcome.to_string()).collect();
        outcomes.sort();
        outcomes
    };
    assert_eq!(sorted(&again), sorted(&whole));
    assert_eq!(again["smoothed"], whole["smoothed"]);
    for name in files_in(&output) {
        assert!(
            std::fs::read(dir.path().join("whole").join(&name)).unwrap() == std::fs::read(output.join(&name)).unwrap()
        );
    }
    assert_eq!(files_in(dir.path()), ["model", "out", "whole"]);
}

#[test]
fn corrected_targets_leave_less_divergence() {
    let dir = tempfile::tempdir().unwrap();
    let folder = two_layers().write(&dir.path().join("model"));
    let in_gguf = |folder: &Path, name: &str| {
        let file = dir.path().join(format!("{name}.gguf"));
        stdout_of(run(args!["convert", folder, "-o", &file, "--type", "f32"]));
        file
    };
    let mut files = vec![in_gguf(&folder, "base")];
    for targets in ["model", "corrected"] {
        let output = dir.path().join(format!("by-{targets}"));
        let options = ["--rounding", "feedback", "--scheme", "W4A16", "--targets", targets];
        let text = ["--calibration-tokens", "8192", "--calibration-ctx", "128"];
        stdout_of(export(&folder, &output, &[&options[..], &text].concat()));
        files.push(in_gguf(&output, targets));
    }
    let arguments = args!["eval", "kld", "--base", &files[0], &files[1], &files[2], "--chunks", "8", "--json"];
    let found = json_of(run(arguments));
    let means: Vec<f64> =
        found["models"].as_array().unwrap().iter().map(|file| file["mean_kld"].as_f64().unwrap()).collect();
    assert!(means[1] < 0.95 * means[0], "{means:?}");
    let wrong = run(args![
        "export",
        &folder,
        dir.path().join("x"),
        "--scheme",
        "W4A16",
        "--rounding",
        "rtn",
        "--targets",
        "corrected"
    ]);
    assert_eq!(wrong.status.code(), Some(2));
}

#[test]
fn norms_take_up_factors_of_large_inputs() {
    let dir = tempfile::tempdir().unwrap();
    let folder = wide_range().write(&dir.path().join("model"));
    let export = |name: &str, flags: &[&str]| {
        let output = dir.path().join(name);
        let options = [&["--scheme", "W8A8", "--rounding", "feedback", "--check", "--json"], &TEXT[..], flags].concat();
        (json_of(export(&folder, &output, &options)), output)
    };
    let (report, smooth) = export("smooth", &[]);
    let (plain, flat) = export("flat", &["--no-smooth"]);
    const NORM: &str = "model.layers.0.input_layernorm.weight";
    assert!(report["smoothed"].as_array().unwrap().contains(&json!(NORM)), "{}", report["smoothed"]);
    assert_eq!(plain["smoothed"], json!([]));
    let source = tensors_of(&folder);
    assert_eq!(tensors_of(&flat)[NORM].data, source[NORM].data);
    let (before, mut tensors) = (floats(&source[NORM]), tensors_of(&smooth));
    let factors: Vec<f32> = before.iter().zip(floats(&tensors[NORM])).map(|(before, after)| before / after).collect();
    assert!(factors.iter().all(|factor| factor.log2().fract() == 0.0), "{factors:?}");
    assert!(factors[LARGE] >= 4.0, "{}", factors[LARGE]);

    // One of the matrices behind the norm without the factors is another model.
    for part in ["weight", "weight_scale"] {
        let name = format!("model.layers.0.self_attn.k_proj.{part}");
        let of_flat = tensors_of(&flat).remove(&name).unwrap();
        tensors.insert(name, of_flat);
    }
    convert_support::save(&tensors, &smooth.join("model.safetensors"));
    let line = error_line(&run(args!["export", &folder, &smooth, "--check", "--quiet"]));
    assert!(line.contains("k_proj: lacks the factors of model.layers.0.input_layernorm.weight, which"), "{line}");
}

#[test]
fn classes_that_cannot_be_run_are_rounded_by_search() {
    let dir = tempfile::tempdir().unwrap();
    let mut source = mixture(false);
    source.config["architectures"] = json!(["OtherForCausalLM"]);
    let folder = source.write(&dir.path().join("model"));
    let output = dir.path().join("out");
    let done = run(args!["export", &folder, &output, "--scheme", "W4A16"]);
    assert!(stderr_of(&done).contains("OtherForCausalLM is no class that lwq can run: rounded by search"));
    assert!(stdout_of(done).contains("rounding search"));
    let line = error_line(&export(&folder, &dir.path().join("x"), &["--scheme", "W4A16", "--rounding", "feedback"]));
    assert!(line.contains("give --rounding search or rtn"), "{line}");
}

/// Large enough that the run is still busy when the signal comes, sparse enough to cost no disk.
#[cfg(unix)]
fn slow_folder(folder: &Path) {
    std::fs::create_dir_all(folder).unwrap();
    let config = json!({ "architectures": ["OtherForCausalLM"], "num_hidden_layers": 12 });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let mut header = serde_json::Map::new();
    let bytes = 2048u64 * 4096 * 2;
    for layer in 0..12 {
        let offsets = json!([layer * bytes, (layer + 1) * bytes]);
        let entry = json!({ "dtype": "BF16", "shape": [2048, 4096], "data_offsets": offsets });
        header.insert(format!("model.layers.{layer}.mlp.up_proj.weight"), entry);
    }
    let header = Json::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    let path = folder.join("model.safetensors");
    std::fs::write(&path, &file).unwrap();
    std::fs::File::options().write(true).open(&path).unwrap().set_len(file.len() as u64 + 12 * bytes).unwrap();
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_goes_on_and_leaves_no_half_folder() {
    use common::{interrupt, lwq, wait_for_work};
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("model");
    slow_folder(&folder);
    let whole = dir.path().join("whole");
    let options = ["--scheme", "W4A16", "--rounding", "search", "--threads", "1"];
    stdout_of(export(&folder, &whole, &options));
    let output = dir.path().join("out");
    for signal in [libc::SIGKILL, libc::SIGINT] {
        let lines = || {
            let journal = std::fs::read_to_string(dir.path().join("out.partial/journal")).unwrap_or_default();
            journal.lines().count()
        };
        let before = lines();
        let mut child = lwq()
            .args(args!["export", &folder, &output])
            .args(options)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        wait_for_work(&mut child, || lines() > before.max(1));
        let ended = interrupt(child, signal);
        assert_eq!(files_in(dir.path()), ["model", "out.partial", "whole"]);
        if signal == libc::SIGINT {
            assert!(stderr_of(&ended).contains("the same command goes on"), "{}", stderr_of(&ended));
        }
    }
    let other = error_line(&export(&folder, &output, &["--scheme", "W8A16"]));
    assert!(other.contains("was made with other settings; delete it or add --force"), "{other}");
    let done = export(&folder, &output, &options);
    assert!(stderr_of(&done).contains("going on after"), "{}", stderr_of(&done));
    stdout_of(done);
    assert_eq!(files_in(dir.path()), ["model", "out", "whole"]);
    for name in files_in(&whole) {
        assert!(std::fs::read(whole.join(&name)).unwrap() == std::fs::read(output.join(&name)).unwrap(), "{name}");
    }
}
