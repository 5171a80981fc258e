//! `lwq quantize --rounding` as a user runs it.

mod common;

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use common::{args, data, doclet, error_line, files_in, json_of, lwq, run, run_with, stdout_of, tensor_digest};
use lwq::cpu::Level;
use lwq::gguf::{Gguf, Metadata, TensorType};
use lwq::quant;
use serde_json::Value as Json;

fn calibration() -> PathBuf {
    data("golden/calib-sample.txt")
}

/// A few thousand tokens of other text that judge what was rounded: the built-in text would take longer.
fn gate() -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("gate.txt");
    let mine = path.with_extension(format!("{:?}", std::thread::current().id()));
    let text = std::fs::read_to_string(data("golden/eval-sample.txt")).unwrap();
    std::fs::write(&mine, text.chars().take(8_000).collect::<String>()).unwrap();
    std::fs::rename(mine, &path).unwrap();
    path
}

/// Arguments of few tokens.
fn few() -> Vec<OsString> {
    args!["--calibration-tokens", "2048", "--gate-file", gate()]
}

/// Rounds the bundled model with few tokens.
fn feedback(output: &Path, more: &[&str]) -> Output {
    let mut arguments = args!["quantize", doclet(), output, "--rounding", "feedback", "-f", calibration()];
    arguments.extend(few());
    run_with(arguments, more)
}

/// A copy of the bundled model with other metadata.
fn changed_model(dir: &Path, change: impl FnOnce(&mut Metadata)) -> PathBuf {
    use lwq::gguf::{GgufLayout, GgufWriter, NewTensor};
    let source = Gguf::open(doclet()).unwrap();
    let mut metadata = source.metadata().clone();
    change(&mut metadata);
    let path = dir.join("changed.gguf");
    let layout = GgufLayout::new("changed", &metadata, source.tensors().iter().map(NewTensor::from)).unwrap();
    let mut writer = GgufWriter::new(std::fs::File::create(&path).unwrap(), layout).unwrap();
    for (index, tensor) in source.tensors().iter().enumerate() {
        writer.write(index, source.data(tensor).unwrap()).unwrap();
    }
    writer.finish().unwrap();
    path
}

fn check_blocks(path: &Path) {
    let gguf = Gguf::open(path).unwrap();
    for tensor in gguf.tensors() {
        quant::validate(tensor.ty, gguf.data(tensor).unwrap()).unwrap_or_else(|e| panic!("{}: {e}", tensor.name));
    }
}

#[test]
fn ggml_is_the_default_and_leaves_no_trace() {
    let dir = tempfile::tempdir().unwrap();
    let (plain, named) = (dir.path().join("plain.gguf"), dir.path().join("named.gguf"));
    stdout_of(run(args!["quantize", doclet(), &plain, "--target", "Q4_K_M"]));
    stdout_of(run(args!["quantize", doclet(), &named, "--target", "Q4_K_M", "--rounding", "ggml"]));
    assert_eq!(std::fs::read(&plain).unwrap(), std::fs::read(&named).unwrap());
    let gguf = Gguf::open(&plain).unwrap();
    assert!(gguf.metadata().iter().all(|(key, _)| !key.starts_with("lwq.")));
}

#[test]
fn search_needs_no_text_and_makes_sound_blocks_of_the_same_types() {
    let dir = tempfile::tempdir().unwrap();
    let (ggml, search) = (dir.path().join("ggml.gguf"), dir.path().join("search.gguf"));
    let imatrix = data("golden/doclet.imatrix.gguf");
    stdout_of(run(args!["quantize", doclet(), &ggml, "--target", "Q3_K_M", "--imatrix", &imatrix]));
    let report = json_of(run(args![
        "quantize",
        doclet(),
        &search,
        "--target",
        "Q3_K_M",
        "--imatrix",
        &imatrix,
        "--rounding",
        "search",
        "--json"
    ]));
    assert_eq!(report["rounding"]["method"], "search");
    check_blocks(&search);
    let types = |path: &Path| -> Vec<_> {
        Gguf::open(path).unwrap().tensors().iter().map(|t| (t.name.clone(), t.ty)).collect()
    };
    assert_eq!(types(&ggml), types(&search));
    assert_ne!(tensor_digest(&ggml), tensor_digest(&search));
    let gguf = Gguf::open(&search).unwrap();
    assert_eq!(gguf.metadata().str("lwq.rounding.method").unwrap(), Some("search"));
    assert!(gguf.metadata().get("lwq.rounding.damping").is_none());
}

#[test]
fn feedback_rounds_every_matrix_judges_it_and_records_how() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("o.gguf");
    let report = json_of(feedback(&output, &["--target", "Q4_K_M", "--damping", "0.05", "--json"]));
    check_blocks(&output);
    assert_eq!(files_in(dir.path()), ["o.gguf"], "nothing else is left");

    let rounding = &report["rounding"];
    assert_eq!(rounding["method"], "feedback");
    assert_eq!(rounding["calibration"]["tokens"], 2048);
    let tensors = report["tensors"].as_array().unwrap();
    let rounded: Vec<&Json> = tensors.iter().filter(|tensor| tensor["rounding"].is_object()).collect();
    // Seven matrices a layer, and the embedding, which is the output here.
    assert_eq!(rounded.len(), 6 * 7 + 1);
    let with_feedback = rounded.iter().filter(|tensor| tensor["rounding"]["method"] == "feedback").count();
    assert!(with_feedback >= 36, "{rounding}");
    for tensor in rounded {
        let kept = tensor["rounding"]["method"] != "feedback";
        assert_eq!(kept, tensor["rounding"]["kept"] == "held-out-error", "{tensor}");
        let ratio = tensor["rounding"]["held_out_ratio"].as_f64().unwrap();
        assert_eq!(kept, ratio > 1.0, "{tensor}");
    }
    let roles = rounding["roles"].as_array().unwrap();
    let of_role =
        |role: &str| roles.iter().find(|row| row["role"] == role).unwrap()["held_out_ratio"].as_f64().unwrap();
    assert!(of_role("attn_output") < 0.9 && of_role("attn_q") < 0.95, "{roles:?}");

    let gguf = Gguf::open(&output).unwrap();
    let metadata = gguf.metadata();
    assert_eq!(metadata.str("lwq.rounding.method").unwrap(), Some("feedback"));
    assert_eq!(metadata.u64("lwq.rounding.tokens").unwrap(), Some(2048));
    assert_eq!(metadata.f32("lwq.rounding.damping").unwrap(), Some(0.05));
    assert_eq!(metadata.str("lwq.version").unwrap(), Some(env!("CARGO_PKG_VERSION")));
    let sha256 = metadata.str("lwq.rounding.text_sha256").unwrap().unwrap();
    assert_eq!((sha256.len(), rounding["calibration"]["text_sha256"].as_str()), (64, Some(sha256)));
}

#[test]
fn damping_is_chosen_for_each_input_unless_it_is_given() {
    let dir = tempfile::tempdir().unwrap();
    let [chosen, given] = ["chosen.gguf", "given.gguf"].map(|name| dir.path().join(name));
    let reports = [
        json_of(feedback(&chosen, &["--target", "Q4_K_M", "--json"])),
        json_of(feedback(&given, &["--target", "Q4_K_M", "--damping", "0.02", "--json"])),
    ];
    let [chosen_of, given_of] = reports.each_ref().map(|report| {
        let tensors = report["tensors"].as_array().unwrap().iter();
        let rounding = tensors.filter(|tensor| tensor["name"].as_str().unwrap().contains("ffn_down"));
        let of = |tensor: &Json, key: &str| tensor["rounding"][key].as_f64().unwrap();
        rounding.map(|tensor| (of(tensor, "damping"), of(tensor, "held_out_ratio"))).collect::<Vec<_>>()
    });
    assert_eq!((chosen_of.len(), given_of.len()), (6, 6));
    assert!(given_of.iter().all(|(damping, _)| *damping == 0.02));
    // 2,048 tokens are few for inputs 512 wide.
    for ((damping, with_chosen), (_, with_given)) in chosen_of.iter().zip(&given_of) {
        assert!(*damping > 0.1 && with_chosen < with_given, "{chosen_of:?} {given_of:?}");
    }
    let gguf = Gguf::open(&chosen).unwrap();
    assert_eq!(gguf.metadata().str("lwq.rounding.damping").unwrap(), Some("chosen"));
    assert!(reports[0]["rounding"]["calibration"]["damping"].is_null(), "{}", reports[0]["rounding"]);
}

#[test]
fn the_table_says_what_was_kept_and_a_text_alone_means_feedback() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("o.gguf");
    let arguments = args!["quantize", doclet(), &output, "--target", "Q8_0", "-f", calibration()];
    let text = stdout_of(run([arguments, few()].concat()));
    assert!(text.lines().any(|line| line.starts_with("ffn_down") && line.contains(" 6 ")), "{text}");
    assert!(text.contains("held-out error, ratio") && text.contains("rounded: "), "{text}");
}

#[test]
fn bytes_depend_neither_on_threads_nor_on_memory() {
    let dir = tempfile::tempdir().unwrap();
    // The second moments of a layer take 1.8 MB: less memory means several passes over it.
    let bytes = |threads: &str, memory: &str| {
        let output = dir.path().join(format!("{threads}.gguf"));
        let options = ["--target", "Q4_K_S", "--threads", threads, "--moment-memory", memory, "--quiet"];
        stdout_of(feedback(&output, &options));
        std::fs::read(output).unwrap()
    };
    assert!(bytes("1", "1G") == bytes("3", "600K"));
}

#[test]
fn bytes_do_not_depend_on_the_instruction_set() {
    let dir = tempfile::tempdir().unwrap();
    // Two layers are enough, as scalar code takes its time.
    let model = dir.path().join("two-layers.gguf");
    stdout_of(run(args!["quantize", doclet(), &model, "--target", "COPY", "--prune-layers", "1,2,3,4", "--quiet"]));
    // Types by columns, by table and by groups of eight.
    let types = ["--tensor-type", "ffn_up=iq3_s", "--tensor-type", "ffn_gate=iq4_xs", "--token-embedding-type", "f16"];
    let bytes = |isa: &str| {
        let output = dir.path().join(format!("{isa}.gguf"));
        let mut command = lwq();
        command.env("LWQ_ISA", isa).args(args!["quantize", &model, &output, "-f", calibration()]);
        command.args(args!["--calibration-tokens", "512", "--gate-file", gate(), "--target", "Q4_K_S", "--quiet"]);
        stdout_of(command.args(types).output().unwrap());
        std::fs::read(output).unwrap()
    };
    let expected = bytes(Level::Scalar.name());
    for level in Level::ALL.into_iter().filter(|l| l.is_of_this_architecture() && *l != Level::Scalar) {
        let isa = level.name();
        if level.is_available() {
            assert!(bytes(isa) == expected, "{isa}");
        } else {
            // Past what the test harness keeps to itself.
            writeln!(std::io::stderr(), "skipped: feedback with {isa} (this CPU lacks it, or LWQ_ISA forbids it)")
                .unwrap();
        }
    }
}

/// Starts to round with few tokens and interrupts the run when it has written `step`.
#[cfg(unix)]
fn interrupted_after(step: &Path, arguments: Vec<OsString>) {
    let mut command = lwq();
    command.args(arguments).args(args!["-f", calibration(), "--quiet"]).args(few());
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    common::wait_for_work(&mut child, || step.exists());
    common::interrupt(child, libc::SIGINT);
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_goes_on_and_ends_with_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, output) = (dir.path().join("whole.gguf"), dir.path().join("o.gguf"));
    let options = ["--target", "Q5_K_S", "--quiet"];
    stdout_of(feedback(&whole, &options));
    let first_step = dir.path().join("o.gguf.partial/step-0001.gguf");
    interrupted_after(&first_step, args!["quantize", doclet(), &output, "--target", "Q5_K_S"]);
    assert!(!output.exists() && first_step.exists());

    let other = feedback(&output, &["--target", "Q4_K_S", "--quiet"]);
    let line = error_line(&other);
    assert!(line.contains("other settings or types") && line.contains("--force"), "{line}");
    let again = feedback(&output, &["--target", "Q5_K_S"]);
    assert!(String::from_utf8_lossy(&again.stderr).contains("going on after"), "{again:?}");
    stdout_of(again);
    assert!(std::fs::read(&output).unwrap() == std::fs::read(&whole).unwrap());
    assert_eq!(files_in(dir.path()), ["o.gguf", "whole.gguf"]);
}

/// The numbers that the gate of the whole file left in a file.
fn verdict(path: &Path) -> (Option<f32>, Option<f32>, Option<u32>) {
    let gguf = Gguf::open(path).unwrap();
    let key = |part: &str| format!("lwq.rounding.gate.{part}");
    let metadata = gguf.metadata();
    let number = |part: &str| metadata.f32(&key(part)).unwrap();
    (number("kld"), number("search_kld"), metadata.u32(&key("searched_layers")).unwrap())
}

#[test]
fn the_whole_file_is_judged_unless_that_is_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let (judged, plain) = (dir.path().join("judged.gguf"), dir.path().join("plain.gguf"));
    let report = json_of(feedback(&judged, &["--target", "Q3_K_S", "--json"]));
    let whole = &report["rounding"]["whole"];
    let (kld, search) = (whole["kld"].as_f64().unwrap(), whole["search_kld"].as_f64().unwrap());
    assert!(0.0 < kld && kld < 0.9 * search, "{whole}");
    assert_eq!(whole["searched_layers"], serde_json::json!([]));
    assert_eq!(verdict(&judged), (Some(kld as f32), Some(search as f32), Some(0)));
    assert_eq!(std::fs::metadata(&judged).unwrap().len(), report["size_bytes"].as_u64().unwrap());

    let report = json_of(feedback(&plain, &["--target", "Q3_K_S", "--no-final-gate", "--json"]));
    assert!(report["rounding"]["whole"].is_null());
    assert_eq!(verdict(&plain), (None, None, None));
    assert_eq!(tensor_digest(&judged), tensor_digest(&plain));
    let text = stdout_of(feedback(&judged, &["--target", "Q3_K_S", "--force"]));
    assert!(text.contains(&format!("KL divergence {kld:.6}, rounded by search {search:.6}")), "{text}");
    let wrong = run(args!["quantize", doclet(), dir.path().join("x.gguf"), "--target", "Q4_0", "--no-final-gate"]);
    assert_eq!(wrong.status.code(), Some(2));
}

#[cfg(unix)]
#[test]
fn a_layer_that_does_harm_to_the_whole_keeps_search() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("o.gguf");
    let partial = dir.path().join("o.gguf.partial");
    // Steps 0 to 5 are the layers, the last one is the output matrix.
    interrupted_after(&partial.join("step-0006.gguf"), args!["quantize", doclet(), &output, "--target", "Q4_0"]);
    // What a layer's feedback gave is spoilt: blocks of zeros.
    let step = partial.join("step-0003.gguf");
    let data_start = Gguf::open(&step).unwrap().shards()[0].data_start() as usize;
    let mut bytes = std::fs::read(&step).unwrap();
    bytes[data_start..].fill(0);
    std::fs::write(&step, bytes).unwrap();
    let searched = Gguf::from_bytes(std::fs::read(partial.join("searched-0003.gguf")).unwrap()).unwrap();
    let _ = std::fs::remove_file(partial.join("judged.json"));

    let report = json_of(feedback(&output, &["--target", "Q4_0", "--json"]));
    let whole = &report["rounding"]["whole"];
    assert_eq!(whole["searched_layers"], serde_json::json!([3]));
    let (kld, search) = (whole["kld"].as_f64().unwrap(), whole["search_kld"].as_f64().unwrap());
    assert!(kld < search, "{whole}");
    assert_eq!(verdict(&output), (Some(kld as f32), Some(search as f32), Some(1)));
    let written = Gguf::open(&output).unwrap();
    assert!(searched.tensors().len() >= 5);
    for tensor in searched.tensors() {
        let found = written.data(written.tensor(&tensor.name).unwrap()).unwrap();
        assert!(found == searched.data(tensor).unwrap(), "{}", tensor.name);
        let rows = report["tensors"].as_array().unwrap();
        let row = rows.iter().find(|row| row["name"] == tensor.name.as_str()).unwrap();
        assert_eq!((&row["rounding"]["method"], &row["rounding"]["kept"]), (&"search".into(), &"whole-file".into()));
    }
    check_blocks(&output);
    assert_eq!(files_in(dir.path()), ["o.gguf"]);
}

#[cfg(unix)]
#[test]
fn judging_the_whole_goes_on_where_it_was_interrupted() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, output) = (dir.path().join("whole.gguf"), dir.path().join("o.gguf"));
    stdout_of(feedback(&whole, &["--target", "Q4_0", "--quiet"]));
    let judged = dir.path().join("o.gguf.partial/judged.json");
    interrupted_after(&judged, args!["quantize", doclet(), &output, "--target", "Q4_0"]);
    assert!(!output.exists() && judged.exists());
    stdout_of(feedback(&output, &["--target", "Q4_0", "--quiet"]));
    assert!(std::fs::read(&output).unwrap() == std::fs::read(&whole).unwrap());
    assert_eq!(files_in(dir.path()), ["o.gguf", "whole.gguf"]);
}

#[cfg(unix)]
#[test]
fn several_outputs_share_a_pass_and_have_the_bytes_of_single_ones() {
    let dir = tempfile::tempdir().unwrap();
    let name = |target: &str| dir.path().join(format!("doclet-4m-f16-{target}.gguf"));
    let alone = |target: &str| {
        let output = dir.path().join("alone.gguf");
        stdout_of(feedback(&output, &["--target", target, "--quiet", "--force"]));
        std::fs::read(output).unwrap()
    };
    let expected = [alone("Q4_K_M"), alone("Q3_K_S")];
    // One of them has been begun by itself: what is done of it is kept, the other starts from the beginning.
    let first_step = name("Q3_K_S").with_extension("gguf.partial").join("step-0001.gguf");
    interrupted_after(&first_step, args!["quantize", doclet(), name("Q3_K_S"), "--target", "Q3_K_S"]);

    let report = json_of(feedback(dir.path(), &["--target", "q4_k_m,Q3_K_S", "--json"]));
    let outputs = report["outputs"].as_array().unwrap();
    assert_eq!(outputs.iter().map(|o| o["target"].as_str().unwrap()).collect::<Vec<_>>(), ["Q4_K_M", "Q3_K_S"]);
    assert!(std::fs::read(name("Q4_K_M")).unwrap() == expected[0]);
    assert!(std::fs::read(name("Q3_K_S")).unwrap() == expected[1]);
    assert_eq!(files_in(dir.path()).len(), 3, "nothing else is left");
}

#[test]
fn types_that_need_importance_get_it_from_the_text() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("o.gguf");
    let refused = run(args!["quantize", doclet(), &output, "--target", "IQ2_XXS"]);
    assert!(error_line(&refused).contains("add --imatrix"));
    let one =
        ["--target", "Q8_0", "--tensor-type", "blk\\.0\\.attn_k=iq2_xxs", "--tensor-type", "blk\\.1\\.attn_k=iq1_s"];
    let report = json_of(feedback(&output, &[&one[..], &["--json"]].concat()));
    check_blocks(&output);
    let gguf = Gguf::open(&output).unwrap();
    assert_eq!(gguf.tensor("blk.0.attn_k.weight").unwrap().ty, TensorType::IQ2_XXS);
    let tensor = |name: &str| report["tensors"].as_array().unwrap().iter().find(|t| t["name"] == name).unwrap().clone();
    assert_eq!(tensor("blk.1.attn_k.weight")["rounding"]["kept"], "type");
}

#[test]
fn what_cannot_be_done_is_refused_in_one_line_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("o.gguf");
    let short = dir.path().join("short.txt");
    std::fs::write(&short, "Too short.\n").unwrap();
    let line = error_line(&run(args!["quantize", doclet(), &output, "--target", "Q4_K_M", "-f", &short]));
    assert!(line.contains("short.txt") && line.contains("two sequences of 256"), "{line}");
    let line = error_line(&run(args![
        "quantize",
        doclet(),
        &output,
        "--target",
        "Q4_K_M",
        "-f",
        calibration(),
        "--gate-file",
        &short
    ]));
    assert!(line.contains("short.txt"), "{line}");
    let line = error_line(&feedback(&output, &["--target", "Q4_K_M", "--calibration-ctx", "100000", "--quiet"]));
    assert!(line.contains("100000"), "{line}");
    let unknown = changed_model(dir.path(), |metadata| metadata.set("general.architecture", "rwkv9"));
    let line = error_line(&run(args!["quantize", &unknown, &output, "--target", "Q4_K_M", "--rounding", "feedback"]));
    assert!(line.contains("\"rwkv9\"") && line.contains("--rounding search"), "{line}");
    let search = args!["quantize", &unknown, &output, "--target", "Q4_K_M", "--rounding", "search"];
    stdout_of(run_with(search, &["--override-kv", "rwkv9.block_count=int:6"]));

    for (options, part) in [
        (&["--rounding", "search", "--damping", "0.1"][..], "--damping"),
        (&["--rounding", "ggml", "-f", "x"], "calibration text"),
        (&["--fast"], "--fast"),
        (&["--rounding", "feedback", "--prune-layers", "1"], "--prune-layers"),
        (&["--rounding", "feedback", "--damping", "1.5"], "from 0 to 1"),
        (&["--rounding", "best"], "possible values"),
    ] {
        let refused = run_with(args!["quantize", doclet(), dir.path().join("p.gguf"), "--target", "Q4_K_M"], options);
        let stderr = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(refused.status.code() == Some(2) && stderr.contains(part), "{options:?}: {stderr}");
    }
    assert!(!dir.path().join("p.gguf").exists() && !dir.path().join("p.gguf.partial").exists());
}

#[test]
fn a_dry_run_reads_the_text_and_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("o.gguf");
    let report = json_of(feedback(&output, &["--target", "IQ2_XXS", "--dry-run", "--json"]));
    assert_eq!(report["problems"].as_array().unwrap().len(), 0, "{}", report["problems"]);
    assert_eq!(report["rounding"]["calibration"]["tokens"], 2048);
    assert_eq!(report["rounding"]["methods"].as_object().unwrap().len(), 0);
    assert!(files_in(dir.path()).is_empty());
    let real = json_of(feedback(&output, &["--target", "Q4_K_M", "--dry-run", "--json"]));
    stdout_of(feedback(&output, &["--target", "Q4_K_M", "--quiet"]));
    assert_eq!(real["size_bytes"].as_u64().unwrap(), std::fs::metadata(&output).unwrap().len());
}

#[test]
fn quantized_sources_and_split_outputs_work_as_without_feedback() {
    let dir = tempfile::tempdir().unwrap();
    let (source, output) = (dir.path().join("q8.gguf"), dir.path().join("o.gguf"));
    stdout_of(run(args!["quantize", doclet(), &source, "--target", "Q8_0"]));
    let few = [few(), args!["-f", calibration(), "--quiet"]].concat();
    let base = args!["quantize", &source, &output, "--target", "Q5_K_S"];
    let refused = run([base.clone(), few.clone()].concat());
    assert!(error_line(&refused).contains("--allow-requantize"));
    assert!(!dir.path().join("o.gguf.partial").exists());
    stdout_of(run([base, few.clone(), args!["--allow-requantize", "--split-max-size", "1M"]].concat()));
    let first = files_in(dir.path()).into_iter().find(|name| name.contains("00001-of")).unwrap();
    check_blocks(&dir.path().join(first));
    assert!(files_in(dir.path()).iter().all(|name| !name.contains("partial")));
}

/// Plans for the bundled model, keeping the measurement in `dir`.
fn plan(dir: &Path, name: &str, more: &[&str]) -> (PathBuf, Output) {
    let path = dir.join(name);
    let mut arguments = args!["plan", doclet(), "-o", &path, "--sensitivity", dir.join("m.sens.json")];
    arguments.extend(args!["--probe-tokens", "512", "--types", "IQ2_XXS,Q3_K,Q4_K,Q5_K,Q6_K"]);
    (path, run_with(arguments, more))
}

#[test]
fn a_plan_for_feedback_takes_its_errors_and_quantize_follows_it() {
    let dir = tempfile::tempdir().unwrap();
    let limit = ["--target-size", "2.3MB", "--quiet"];
    let (plain, output) = plan(dir.path(), "plain.json", &limit);
    stdout_of(output);
    let sens = dir.path().join("m.sens.json");
    let before: Json = serde_json::from_str(&std::fs::read_to_string(&sens).unwrap()).unwrap();
    assert!(before.get("feedback").is_none());
    let text = calibration();
    let with = ["--rounding", "feedback", "--calibration", text.to_str().unwrap(), "--calibration-tokens", "2048"];
    let gate = gate();
    let with = [&with[..], &["--gate-file", gate.to_str().unwrap()]].concat();
    let (path, output) = plan(dir.path(), "feedback.json", &[&limit[..], &with[..]].concat());
    stdout_of(output);
    let after: Json = serde_json::from_str(&std::fs::read_to_string(&sens).unwrap()).unwrap();
    let section = &after["feedback"];
    assert_eq!((&section["steps"], &section["steps_done"]), (&7.into(), &7.into()));
    let down = &section["tensors"]["blk.2.attn_output.weight"];
    let error = |kind: &str, ty: &str| down[kind][ty].as_f64().unwrap();
    assert!(error("errors", "Q4_K") < 0.9 * error("plain", "Q4_K"), "{down}");
    assert_eq!(before["tensors"], after["tensors"], "what was measured before stays");
    let names: Vec<String> = files_in(dir.path());
    assert_eq!(names, ["feedback.json", "m.sens.json", "plain.json"]);

    let read = |path: &Path| -> Json { serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap() };
    let (plain, planned) = (read(&plain), read(&path));
    assert!(plain.get("rounding").is_none());
    assert_eq!(planned["rounding"]["method"], "feedback");
    let predicted = |plan: &Json| plan["predicted_kld"].as_f64().unwrap();
    assert!(predicted(&planned) < 0.9 * predicted(&plain), "{} {}", predicted(&planned), predicted(&plain));

    // The section is used again: nothing is run, nothing is written.
    let written = std::fs::metadata(&sens).unwrap().modified().unwrap();
    let (_, again) = plan(dir.path(), "again.json", &[&["--target-size", "2.5MB"], &with[..]].concat());
    assert!(!String::from_utf8_lossy(&again.stderr).contains("measuring"), "{again:?}");
    assert_eq!(std::fs::metadata(&sens).unwrap().modified().unwrap(), written);

    let file = dir.path().join("o.gguf");
    let quantized = run([args!["quantize", doclet(), &file, "--plan", &path, "-f", &text, "--json"], few()].concat());
    assert!(!String::from_utf8_lossy(&quantized.stderr).contains("was made for"), "{quantized:?}");
    assert_eq!(json_of(quantized)["rounding"]["method"], "feedback");
    assert_eq!(std::fs::metadata(&file).unwrap().len(), planned["file_bytes"].as_u64().unwrap());
    let other = run(args!["quantize", doclet(), &file, "--plan", &path, "--rounding", "ggml", "--force"]);
    assert!(String::from_utf8_lossy(&other.stderr).contains("made for rounding by feedback, not ggml"), "{other:?}");
}

#[test]
fn a_limit_is_planned_and_rounded_in_one_command_without_an_imatrix() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("o.gguf");
    let planned = ["--like", "IQ3_XXS", "--method", "error", "--types", "IQ2_XXS,Q2_K,Q4_K,Q6_K", "--json"];
    let report = json_of(feedback(&output, &planned));
    assert_eq!(report["problems"].as_array().unwrap().len(), 0);
    check_blocks(&output);
    let gguf = Gguf::open(&output).unwrap();
    assert_eq!(gguf.metadata().str("lwq.rounding.method").unwrap(), Some("feedback"));
    assert!(gguf.metadata().str("lwq.plan.sha256").unwrap().is_some());
}

#[test]
fn corrected_targets_leave_less_divergence() {
    let dir = tempfile::tempdir().unwrap();
    let files = ["model", "corrected"].map(|targets| {
        let file = dir.path().join(format!("{targets}.gguf"));
        let mut arguments = args!["quantize", doclet(), &file, "--rounding", "feedback", "--target", "Q4_0"];
        arguments.extend(args!["--calibration-tokens", "8192", "--gate-file", gate(), "--targets", targets]);
        stdout_of(run(arguments));
        file
    });
    let found = json_of(run(args!["eval", "kld", "--base", doclet(), &files[0], &files[1], "--chunks", "6", "--json"]));
    let mean = |at: usize| found["models"][at]["mean_kld"].as_f64().unwrap();
    assert!(mean(1) < 0.95 * mean(0), "{} {}", mean(1), mean(0));

    let wrong =
        run(args!["quantize", doclet(), dir.path().join("x.gguf"), "--target", "Q4_K_M", "--targets", "corrected"]);
    assert_eq!(wrong.status.code(), Some(2));
}

#[test]
fn corrected_targets_make_one_file_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model.gguf");
    std::fs::copy(doclet(), &model).unwrap();
    let arguments = args![
        "quantize",
        &model,
        "--target",
        "Q4_0",
        "--target",
        "Q8_0",
        "--rounding",
        "feedback",
        "--targets",
        "corrected"
    ];
    let line = error_line(&run(arguments));
    assert!(line.contains("files are rounded one at a time; write each by itself"), "{line}");
    assert_eq!(files_in(dir.path()), ["model.gguf"]);
}
