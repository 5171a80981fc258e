//! `lwq measure`, and plans made from its file.

mod common;

use std::path::{Path, PathBuf};

use common::{args, data, doclet, error_line, files_in, json_of, model_in, run, run_with, stdout_of};
use half::f16;
use lwq::gguf::{Gguf, GgufLayout, GgufWriter, NewTensor, TensorType};
use lwq::imatrix::Imatrix;
use lwq::measure::Sensitivity;
use lwq::moments::GradientMoments;
use serde_json::Value;

fn imatrix() -> PathBuf {
    data("golden/doclet.imatrix.gguf")
}

fn measure(model: &Path, more: &[&str]) -> std::process::Output {
    run_with(args!["measure", model, "--imatrix", imatrix(), "--probe-tokens", "512", "--quiet"], more)
}

fn plan(model: &Path, more: &[&str]) -> Value {
    json_of(run_with(args!["plan", model, "--imatrix", imatrix(), "--quiet"], more))
}

fn bits(plan: &Value, tensor: &str) -> f64 {
    let rows = plan["tensors"].as_array().unwrap();
    let row = rows.iter().find(|row| row["tensor"] == tensor).unwrap();
    let gguf = Gguf::open(doclet()).unwrap();
    8.0 * row["bytes"].as_f64().unwrap() / gguf.tensor(tensor).unwrap().elements() as f64
}

#[test]
fn one_measurement_serves_every_budget() {
    let folder = tempfile::tempdir().unwrap();
    let model = model_in(folder.path());
    stdout_of(measure(&model, &[]));
    let path = folder.path().join("m.sens.json");
    let measured = Sensitivity::open(&path).unwrap();
    assert_eq!(measured.tensors.len(), 43);
    assert!(measured.tensors.iter().all(|tensor| tensor.probes.len() == 1 && tensor.errors.len() >= 10));
    // More bits, less divergence; the parts nearly add up to the whole.
    let klds: Vec<f64> = measured.joint.iter().map(|joint| joint.kld).collect();
    assert!(klds.len() == 3 && klds[0] > 3.0 * klds[1] && klds[1] > 3.0 * klds[2], "{klds:?}");
    let parts: f64 = measured.tensors.iter().map(|tensor| tensor.probes[0].kld).sum();
    assert!((0.6..1.6).contains(&(klds[0] / parts)), "{parts} {klds:?}");

    let before = std::fs::read(&path).unwrap();
    let small = plan(&model, &["--like", "Q3_K_M"]);
    let large = plan(&model, &["--like", "Q5_K_M"]);
    assert_eq!((&small["method"], &small["text"]["tokens"]), (&Value::from("measured"), &Value::from(512)));
    assert!(small["predicted_kld"].as_f64() > large["predicted_kld"].as_f64());
    assert!(small["predicted_kld_error"].as_f64().unwrap() > 0.0);
    let limit = small["predicted_kld"].as_f64().unwrap();
    let smallest = plan(&model, &["--max-kld", &limit.to_string()]);
    assert!(smallest["predicted_kld"].as_f64().unwrap() <= limit * 1.0001);
    let (found, expected) = (smallest["file_bytes"].as_u64().unwrap(), small["file_bytes"].as_u64().unwrap());
    assert!(found.abs_diff(expected) * 100 < expected, "{found} {expected}");
    assert!(before == std::fs::read(&path).unwrap(), "plans do not touch the measurement");

    // The measurement belongs to one imatrix.
    let line = error_line(&run(args!["plan", &model, "--like", "Q4_K_M", "--quiet"]));
    assert!(line.contains("m.sens.json") && line.contains("--sensitivity"), "{line}");
    assert!(error_line(&measure(&model, &[])).contains("--force"));
    std::fs::write(&path, "{}").unwrap();
    let line = error_line(&run(args!["plan", &model, "--imatrix", imatrix(), "--like", "Q4_K_M", "--quiet"]));
    assert!(line.contains("m.sens.json"), "{line}");
}

#[test]
fn a_stopped_measurement_goes_on_to_the_same_file() {
    let folder = tempfile::tempdir().unwrap();
    let model = model_in(folder.path());
    stdout_of(measure(&model, &[]));
    let path = folder.path().join("m.sens.json");
    let whole = Sensitivity::open(&path).unwrap();
    // What a run leaves that was stopped in the middle of its probes.
    let mut part = whole.clone();
    part.joint.clear();
    part.tensors.iter_mut().skip(10).for_each(|tensor| tensor.probes.clear());
    std::fs::remove_file(&path).unwrap();
    let partial = folder.path().join("m.sens.json.partial");
    part.save(&partial, false).unwrap();
    stdout_of(measure(&model, &["--threads", "1"]));
    assert_eq!(Sensitivity::open(&path).unwrap(), whole, "nor does the number of threads matter");
    assert_eq!(files_in(folder.path()), ["m.gguf", "m.sens.json"]);

    std::fs::remove_file(&path).unwrap();
    part.provenance.text_sha256 = "0".repeat(64);
    part.save(&partial, false).unwrap();
    assert!(error_line(&measure(&model, &[])).contains("unfinished"));
}

#[test]
fn a_fragile_tensor_gets_the_bits() {
    let folder = tempfile::tempdir().unwrap();
    let model = model_in(folder.path());
    // Four times the output of one matrix: what comes from it drowns the rest of the residual stream.
    let fragile = "blk.2.ffn_down.weight";
    let (start, length) = {
        let gguf = Gguf::open(&model).unwrap();
        let data = gguf.data(gguf.tensor(fragile).unwrap()).unwrap();
        let bytes = std::fs::read(&model).unwrap();
        (bytes.windows(data.len().min(4096)).position(|w| w == &data[..w.len()]).unwrap(), data.len())
    };
    let mut bytes = std::fs::read(&model).unwrap();
    for value in bytes[start..start + length].as_chunks_mut::<2>().0 {
        *value = f16::from_f32(4.0 * f16::from_le_bytes(*value).to_f32()).to_le_bytes();
    }
    std::fs::write(&model, bytes).unwrap();
    let planned = plan(&model, &["--like", "Q3_K_M", "--probe-tokens", "512"]);
    let others = ["blk.1.ffn_down.weight", "blk.3.ffn_down.weight", "blk.4.ffn_down.weight"];
    for other in others {
        assert!(bits(&planned, fragile) > bits(&planned, other) + 0.5, "{planned}");
    }
}

#[test]
fn the_output_matrix_is_rounded_with_importance_in_planned_files_only() {
    let folder = tempfile::tempdir().unwrap();
    let model = model_in(folder.path());
    let scored = folder.path().join("imx.gguf");
    let text = data("golden/calib-sample.txt");
    stdout_of(run(args!["imatrix", &model, "-f", text, "-c", "256", "--chunks", "20", "-o", &scored, "--quiet"]));
    let planned = folder.path().join("planned.gguf");
    let standard = folder.path().join("standard.gguf");
    let pins = args!["--tensor-type", "token_embd=q4_K", "--imatrix", &scored, "--quiet"];
    let errors = args!["quantize", &model, &planned, "--like", "Q4_K_M", "--method", "error"];
    stdout_of(run([errors, pins.clone()].concat()));
    stdout_of(run([args!["quantize", &model, &standard, "--target", "Q4_K_M"], pins].concat()));
    let embedding = |path: &Path| {
        let gguf = Gguf::open(path).unwrap();
        gguf.data(gguf.tensor("token_embd.weight").unwrap()).unwrap().to_vec()
    };
    assert!(embedding(&planned) != embedding(&standard));
}

/// The bundled model with two experts in every layer, the second with rows that differ in sign, and with an output matrix
/// of its own.
fn expert_model(path: &Path) {
    let gguf = Gguf::open(doclet()).unwrap();
    let mut metadata = gguf.metadata().clone();
    metadata.set("llama.expert_count", 2u32);
    metadata.set("llama.expert_used_count", 1u32);
    let mut tensors: Vec<(NewTensor, Vec<u8>)> = Vec::new();
    for tensor in gguf.tensors() {
        let data = gguf.data(tensor).unwrap().to_vec();
        let mut new = NewTensor::from(tensor);
        if tensor.name == "token_embd.weight" {
            tensors.push((NewTensor { name: "output.weight".into(), ..new.clone() }, data.clone()));
        }
        match tensor.name.strip_suffix(".weight").filter(|name| name.contains(".ffn_") && !name.contains("norm")) {
            None => tensors.push((new, data)),
            Some(name) => {
                new.name = format!("{name}_exps.weight");
                new.shape.push(2);
                let mirrored: Vec<u8> = data.as_chunks::<2>().0.iter().flat_map(|w| [w[0], w[1] ^ 0x80]).collect();
                tensors.push((new, [data, mirrored].concat()));
                if name.ends_with("ffn_gate") {
                    let router: Vec<u8> =
                        (0..2 * 256).flat_map(|i| (((i * 37) % 17) as f32 - 8.0).to_le_bytes()).collect();
                    let name = name.replace("ffn_gate", "ffn_gate_inp.weight");
                    tensors.push((NewTensor { name, shape: vec![256, 2], ty: TensorType::F32 }, router));
                }
            }
        }
    }
    let layout = GgufLayout::new("experts", &metadata, tensors.iter().map(|(new, _)| new.clone())).unwrap();
    let mut writer = GgufWriter::new(std::fs::File::create(path).unwrap(), layout).unwrap();
    tensors.iter().enumerate().for_each(|(index, (_, data))| writer.write(index, data).unwrap());
    writer.finish().unwrap();
}

#[test]
fn experts_share_a_type_and_the_embedding_is_weighted_by_its_tokens() {
    let folder = tempfile::tempdir().unwrap();
    let (model, scored) = (folder.path().join("m.gguf"), folder.path().join("imx.gguf"));
    expert_model(&model);
    let text = data("golden/calib-sample.txt");
    stdout_of(run(args!["imatrix", &model, "-f", &text, "-c", "256", "--chunks", "20", "-o", &scored, "--quiet"]));
    let imatrix = Imatrix::open(&scored).unwrap();
    let frequencies = imatrix.token_frequencies().unwrap();
    assert!(frequencies.iter().sum::<f64>() >= 20.0 * 256.0 && frequencies.iter().all(|&f| f > 0.0));
    assert_eq!(imatrix.entries["blk.0.ffn_up_exps.weight"].counts.iter().sum::<u64>(), 20 * 256);

    let (standard, planned) = (folder.path().join("s.gguf"), folder.path().join("p.gguf"));
    stdout_of(run(args!["quantize", &model, &standard, "--target", "Q4_K_M", "--imatrix", &scored, "--quiet"]));
    let more = args!["--like", "Q4_K_M", "--imatrix", &scored, "--quiet"];
    let probes = args!["measure", &model, "--imatrix", &scored, "--probe-tokens", "512", "--quiet"];
    stdout_of(run(probes));
    stdout_of(run([args!["quantize", &model, &planned], more].concat()));
    let bytes = |path: &Path| std::fs::metadata(path).unwrap().len();
    assert!(bytes(&planned) <= bytes(&standard) && bytes(&planned) * 1000 >= bytes(&standard) * 998);
    let kld = |path: &Path| -> f64 {
        let text = data("golden/eval-sample.txt");
        let arguments = args!["eval", "kld", path, "--base", &model, "-f", text, "--chunks", "10", "--json", "--quiet"];
        json_of(run(arguments))["mean_kld"].as_f64().unwrap()
    };
    let (planned, standard) = (kld(&planned), kld(&standard));
    assert!(planned < standard, "{planned} {standard}");
}

#[test]
fn gradients_are_measured_alone_and_are_the_same_with_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let model = model_in(folder.path());
    let path = |name: &str| folder.path().join(name);
    let measure = |name: &str, more: &[&str]| {
        let gradients = args!["measure", &model, "--gradients", path(name), "--gradient-tokens", "512", "--quiet"];
        run_with(gradients, &[&["--gradient-ctx", "64"], more].concat())
    };
    let report = json_of(measure("a.gguf", &["--json", "--threads", "1"]));
    assert_eq!((&report["gradients"]["matrices"], &report["gradients"]["tokens"]), (&30.into(), &512.into()));
    assert!(report["output"].is_null(), "{report}");
    let loss = report["gradients"]["loss"].as_f64().unwrap();
    assert!((0.5..6.0).contains(&loss), "{loss}");
    let found = GradientMoments::open(&path("a.gguf")).unwrap();
    found.check_model(&Gguf::open(&model).unwrap()).unwrap();
    assert!(found.moment("blk.3.ffn_down.weight").unwrap().unwrap().diagonal().iter().all(|square| *square > 0.0));
    assert_eq!(files_in(folder.path()), ["a.gguf", "m.gguf"]);

    stdout_of(measure("b.gguf", &["--threads", "3"]));
    let bytes = |name: &str| std::fs::read(path(name)).unwrap();
    assert!(bytes("a.gguf") == bytes("b.gguf"), "threads change the gradients");
    stdout_of(measure("c.gguf", &["--gradient-seed", "7"]));
    assert!(bytes("a.gguf") != bytes("c.gguf"), "the seed changes nothing");
    assert!(error_line(&measure("a.gguf", &[])).contains("--force"));
    let alone = run(args!["measure", &model, "--gradient-seed", "7"]);
    assert_eq!(alone.status.code(), Some(2), "a seed without gradients");
}

#[cfg(unix)]
#[test]
fn gradients_go_on_where_they_were_interrupted() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let measure = |name: &str| args!["measure", doclet(), "--gradients", path(name), "--gradient-tokens", "2048"];
    stdout_of(run(measure("whole.gguf")));
    let mut child = common::lwq()
        .args(measure("o.gguf"))
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    // Step 6 is the output matrix, then come the layers from the last one on.
    let step = path("o.gguf.partial/step-0003.gguf");
    common::wait_for_work(&mut child, || step.exists());
    common::interrupt(child, libc::SIGINT);
    assert!(step.exists() && !path("o.gguf").exists());

    let other = run_with(measure("o.gguf"), &["--gradient-seed", "1"]);
    assert!(error_line(&other).contains("another model, text or seed"), "{other:?}");
    let again = run(measure("o.gguf"));
    assert!(String::from_utf8_lossy(&again.stderr).contains("going on after"), "{again:?}");
    stdout_of(again);
    assert!(std::fs::read(path("o.gguf")).unwrap() == std::fs::read(path("whole.gguf")).unwrap());
    assert_eq!(files_in(folder.path()), ["o.gguf", "whole.gguf"]);
}

#[test]
fn divergences_told_from_gradients_come_near_those_that_are_measured() {
    let folder = tempfile::tempdir().unwrap();
    let model = model_in(folder.path());
    let path = |name: &str| folder.path().join(name);
    let of = |name: &str, more: &[&str]| {
        let output = path(name).display().to_string();
        measure(&model, &[&["-o", output.as_str(), "--json"], more].concat())
    };
    stdout_of(of("probes.json", &[]));
    let report = json_of(of("told.json", &["--method", "gradient", "--gradient-tokens", "4096"]));
    // A probe for each of seven roles; the embedding is probed as ever.
    assert_eq!(report["curvature"]["probes"], 7, "{report}");
    assert!(report["curvature"]["spread"].as_f64().unwrap() < 1.0, "{report}");
    let (probes, told) = (path("probes.json"), path("told.json"));
    let (probes, told) = (Sensitivity::open(&probes).unwrap(), Sensitivity::open(&told).unwrap());
    assert_eq!(told.tensors.iter().filter(|tensor| tensor.probes[0].foretold).count(), 42 - 7);
    let mut logs: Vec<f64> = Vec::new();
    for tensor in &told.tensors {
        let measured = probes.tensor(&tensor.name).unwrap();
        assert_eq!((tensor.probes.len(), &tensor.probes[0].ty), (1, &measured.probes[0].ty));
        logs.push((tensor.probes[0].kld / measured.probes[0].kld).ln().abs());
    }
    logs.sort_by(f64::total_cmp);
    assert!(logs[logs.len() / 2] < 0.4, "half of them within a factor of 1.5: {logs:?}");

    // The gradients stay beside the output and serve again.
    let kept = path("told.gradients.gguf");
    let before = std::fs::read(&kept).unwrap();
    let again = json_of(of("again.json", &["--method", "gradient", "--gradients", kept.to_str().unwrap()]));
    assert!(again["gradients"].is_null() && std::fs::read(&kept).unwrap() == before);
    assert!(std::fs::read(path("again.json")).unwrap() == std::fs::read(path("told.json")).unwrap());
    let other =
        of("x.json", &["--method", "gradient", "--gradients", kept.to_str().unwrap(), "--gradient-tokens", "512"]);
    assert_eq!(other.status.code(), Some(2), "tokens of gradients that are there: {other:?}");
    // Refused before the gradients are made.
    let made = path("made.gguf");
    let blind = run(args!["measure", &model, "--no-imatrix", "--method", "gradient", "--gradients", &made]);
    assert_eq!(blind.status.code(), Some(2), "{blind:?}");
    assert!(String::from_utf8_lossy(&blind.stderr).contains("--imatrix"), "{blind:?}");
    let taken = of("told.json", &["--method", "gradient", "--gradients", made.to_str().unwrap()]);
    assert!(error_line(&taken).contains("told.json: exists already"), "{taken:?}");
    assert!(!made.exists());
}
