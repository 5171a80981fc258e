//! `lwq quantize` as a user runs it: names, refusals, options, output forms.

mod common;

use std::path::Path;

use common::{args, data, doclet, error_line, files_in, json_of, run, stdout_of, tensor_digest};
use lwq::gguf::{Gguf, TensorType, Value};
use serde_json::Value as Json;

/// A copy of the bundled model under a short name.
fn model_in(dir: &Path) -> std::path::PathBuf {
    let path = dir.join("model.gguf");
    std::fs::copy(doclet(), &path).unwrap();
    path
}

#[test]
fn output_stands_beside_the_input_under_the_target_name() {
    let dir = tempfile::tempdir().unwrap();
    let model = model_in(dir.path());
    let text = stdout_of(run(args!["quantize", &model, "--target", "q4_k"]));
    assert_eq!(files_in(dir.path()), ["model-Q4_K_M.gguf", "model.gguf"]);
    for expected in ["q6_K", "bits per weight", "peak memory"] {
        assert!(text.contains(expected), "{text}");
    }
    let output = Gguf::open(dir.path().join("model-Q4_K_M.gguf")).unwrap();
    assert_eq!(output.metadata().u32("general.file_type").unwrap(), Some(15));
    assert_eq!(output.metadata().u32("general.quantization_version").unwrap(), Some(2));
    let keys: Vec<&str> = output.metadata().iter().map(|(key, _)| key).collect();
    let source = Gguf::open(&model).unwrap();
    let source_keys: Vec<&str> = source.metadata().iter().map(|(key, _)| key).collect();
    assert_eq!(keys[..source_keys.len()], source_keys, "metadata keep their order");
}

#[test]
fn several_targets_and_plans_make_a_file_each() {
    let dir = tempfile::tempdir().unwrap();
    let (model, folder) = (model_in(dir.path()), dir.path().join("out"));
    let usage = |arguments| {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let file = usage(args!["quantize", &model, &model, "--target", "Q4_K_M,Q6_K", "--force"]);
    assert!(file.contains("several outputs need a folder"), "{file}");
    assert!(usage(args!["quantize", &model, &folder, "--target", "Q4_K_M,q4_k"]).contains("would have this name"));
    assert_eq!(run(args!["quantize", &model, "--target", "Q6_K", "--like", "Q6_K"]).status.code(), Some(2));

    let (plan, imatrix) = (dir.path().join("plan.json"), data("golden/doclet.imatrix.gguf"));
    let made = args!["plan", &model, "--imatrix", &imatrix, "--like", "Q4_K_M", "--method", "error", "-o", &plan];
    stdout_of(run(made.into_iter().chain(args!["--quiet"])));
    let report = |goals: Vec<std::ffi::OsString>| -> Json {
        let several = args!["quantize", &model, &folder, "--imatrix", &imatrix, "--json"];
        json_of(run(several.into_iter().chain(goals)))
    };
    let targets = report(args!["--target", "Q4_K_M,Q6_K"]);
    assert_eq!(targets["outputs"].as_array().unwrap().len(), 2);
    let larger = dir.path().join("larger.json");
    let made = args!["plan", &model, "--imatrix", &imatrix, "--like", "Q6_K", "--method", "error", "-o", &larger];
    stdout_of(run(made.into_iter().chain(args!["--quiet"])));
    let plans = report(args!["--plan", &plan, "--plan", &larger]);
    assert_eq!(plans["outputs"][1]["target"].as_str(), Some("plan: like Q6_K"));
    assert_eq!(files_in(&folder).len(), 4);
    let twin = dir.path().join("twin.json");
    std::fs::copy(&plan, &twin).unwrap();
    report(args!["--plan", &plan, "--plan", &twin]);
    assert!(folder.join("model-plan.gguf").is_file(), "plans of the same bits per weight name their outputs");
    assert!(folder.join("model-twin.gguf").is_file());
    let alone = dir.path().join("alone.gguf");
    stdout_of(run(args!["quantize", &model, &alone, "--imatrix", &imatrix, "--plan", &plan, "--quiet"]));
    let planned = plans["outputs"][0]["output"][0].as_str().unwrap();
    assert!(std::fs::read(&alone).unwrap() == std::fs::read(planned).unwrap());
    stdout_of(run(args!["quantize", &model, &alone, "--imatrix", &imatrix, "--target", "Q6_K", "--quiet", "--force"]));
    assert!(std::fs::read(&alone).unwrap() == std::fs::read(folder.join("model-Q6_K.gguf")).unwrap());
}

#[test]
fn dry_run_tells_the_exact_file_size_and_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let model = model_in(dir.path());
    let plan = json_of(run(args!["quantize", &model, "--target", "Q5_K_S", "--dry-run", "--json"]));
    assert_eq!(files_in(dir.path()), ["model.gguf"]);
    let done = json_of(run(args!["quantize", &model, "--target", "Q5_K_S", "--json"]));
    let size = std::fs::metadata(dir.path().join("model-Q5_K_S.gguf")).unwrap().len();
    assert_eq!(plan["size_bytes"], size);
    assert_eq!(done["size_bytes"], size);
    for key in ["tensors", "types", "bits_per_weight", "fallbacks"] {
        assert_eq!(plan[key], done[key], "{key}");
    }
    let first = &plan["tensors"][1];
    assert_eq!(first["name"], "token_embd.weight");
    assert_eq!(first["type"], "q6_K");
    assert_eq!(first["source_type"], "f16");
    assert_eq!(first["shape"], serde_json::json!([256, 2048]));
    assert_eq!(first["bytes"], 430_080);
}

#[test]
fn any_thread_count_gives_the_same_file() {
    let dir = tempfile::tempdir().unwrap();
    let imatrix = data("golden/doclet.imatrix.gguf");
    let mut files = Vec::new();
    for threads in ["1", "2", "7"] {
        let output = dir.path().join(format!("{threads}.gguf"));
        let arguments = args!["quantize", doclet(), &output, "--target", "IQ3_M", "--imatrix", &imatrix, "-t", threads];
        stdout_of(run(arguments));
        files.push(std::fs::read(output).unwrap());
    }
    assert!(files.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn both_forms_of_an_imatrix_give_the_same_tensors_and_are_recorded() {
    let dir = tempfile::tempdir().unwrap();
    let gguf_form = data("golden/doclet.imatrix.gguf");
    let dat_form = dir.path().join("imx.dat");
    stdout_of(run(args!["imatrix", "convert", &gguf_form, &dat_form]));
    let mut digests = Vec::new();
    for imatrix in [&gguf_form, &dat_form] {
        let output = dir.path().join("out.gguf");
        stdout_of(run(args!["quantize", doclet(), &output, "--target", "IQ2_XS", "--imatrix", imatrix, "--force"]));
        digests.push(tensor_digest(&output));
        let written = Gguf::open(&output).unwrap();
        let metadata = written.metadata();
        assert_eq!(metadata.str("quantize.imatrix.file").unwrap(), imatrix.to_str());
        assert_eq!(metadata.u32("quantize.imatrix.entries_count").unwrap(), Some(42));
        assert!(metadata.u32("quantize.imatrix.chunks_count").unwrap().unwrap() > 0);
        assert!(metadata.str("quantize.imatrix.dataset").unwrap().is_some());
    }
    assert_eq!(digests[0], digests[1]);
}

#[test]
fn split_outputs_hold_the_tensors_of_the_single_file() {
    let dir = tempfile::tempdir().unwrap();
    let model = model_in(dir.path());
    stdout_of(run(args!["quantize", &model, dir.path().join("one.gguf"), "--target", "Q4_K_S"]));
    let whole = tensor_digest(&dir.path().join("one.gguf"));

    let parts = dir.path().join("parts.gguf");
    stdout_of(run(args!["quantize", &model, &parts, "--target", "Q4_K_S", "--split-max-size", "1M"]));
    let first = dir.path().join("parts-00001-of-00003.gguf");
    assert_eq!(tensor_digest(&first), whole);

    // The shards again as input, once kept and once merged.
    let kept = dir.path().join("kept");
    stdout_of(run(args!["quantize", &first, &kept, "--target", "COPY", "--keep-split"]));
    assert_eq!(tensor_digest(&dir.path().join("kept-00001-of-00003.gguf")), whole);
    for number in 1..=3 {
        let part = |name: &str| std::fs::read(dir.path().join(format!("{name}-0000{number}-of-00003.gguf"))).unwrap();
        assert_eq!(part("kept"), part("parts"));
    }
    stdout_of(run(args!["quantize", &first, dir.path().join("merged.gguf"), "--target", "COPY"]));
    assert_eq!(tensor_digest(&dir.path().join("merged.gguf")), whole);
    let merged = Gguf::open(dir.path().join("merged.gguf")).unwrap();
    assert!(merged.metadata().iter().all(|(key, _)| !key.starts_with("split.")));
    let by_default = stdout_of(run(args!["quantize", &first, "--target", "Q8_0", "--dry-run", "--allow-requantize"]));
    assert!(by_default.contains("parts-Q8_0.gguf would be"), "{by_default}");
}

#[test]
fn the_input_is_never_the_output() {
    let dir = tempfile::tempdir().unwrap();
    let model = model_in(dir.path());
    let before = std::fs::read(&model).unwrap();
    std::fs::hard_link(&model, dir.path().join("hard.gguf")).unwrap();
    std::os::unix::fs::symlink(&model, dir.path().join("soft.gguf")).unwrap();
    for output in ["model.gguf", "./model.gguf", "hard.gguf", "soft.gguf"] {
        let output = dir.path().join(output);
        let line = error_line(&run(args!["quantize", &model, output, "--target", "Q8_0", "--force"]));
        assert!(line.contains("is the input"), "{line}");
    }
    assert_eq!(std::fs::read(&model).unwrap(), before);
    assert_eq!(files_in(dir.path()).len(), 3);
}

#[test]
fn outputs_that_cannot_be_written_are_refused_before_the_work() {
    let dir = tempfile::tempdir().unwrap();
    let model = model_in(dir.path());
    let existing = dir.path().join("existing.gguf");
    std::fs::write(&existing, b"precious").unwrap();
    let fifo = dir.path().join("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let cases = [
        (existing.clone(), "add --force"),
        (dir.path().to_path_buf(), "not a regular file"),
        (dir.path().join("no/such/folder/out.gguf"), "does not exist"),
        ("/dev/full".into(), "not a regular file"),
        (fifo, "not a regular file"),
    ];
    for (output, expected) in cases {
        let line = error_line(&run(args!["quantize", &model, &output, "--target", "Q8_0"]));
        assert!(line.contains(expected) && line.contains(&*output.to_string_lossy()), "{line}");
    }
    assert_eq!(std::fs::read(&existing).unwrap(), b"precious");
    stdout_of(run(args!["quantize", &model, &existing, "--target", "Q8_0", "--force"]));
    assert!(Gguf::open(&existing).is_ok());
}

#[test]
fn wrong_usage_exits_with_2() {
    let wrong = [
        args!["quantize"],
        args!["quantize", doclet()],
        args!["quantize", doclet(), "--target", "Q9_X"],
        args!["quantize", doclet(), "--target", "Q4_0", "--output-tensor-type", "q7"],
        args!["quantize", doclet(), "--target", "Q4_0", "--split-max-size", "0G"],
        args!["quantize", doclet(), "--target", "Q4_0", "--keep-split", "--split-max-size", "1G"],
        args!["quantize", doclet(), "--target", "Q4_0", "--threads", "0"],
        args!["no-such-command"],
    ];
    for arguments in wrong {
        let output = run(&arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty());
    }
}

#[test]
fn requests_that_cannot_be_met_say_what_to_add() {
    let dir = tempfile::tempdir().unwrap();
    let model = model_in(dir.path());
    stdout_of(run(args!["quantize", &model, dir.path().join("q4_1.gguf"), "--target", "Q4_1"]));
    let quantized = dir.path().join("q4_1.gguf");
    let cases = [
        (args!["quantize", &model, "--target", "IQ2_XS"], vec!["IQ2_XS needs an importance matrix", "--imatrix"]),
        (args!["quantize", &quantized, "--target", "Q4_K_M"], vec!["is Q4_1", "--allow-requantize"]),
        (args!["quantize", &model, "--target", "Q4_0", "--tensor-type", "attn_v"], vec!["attn_v", "REGEX=TYPE"]),
        (args!["quantize", &model, "--target", "Q4_0", "--tensor-type", "(=q8_0"], vec!["not a valid regular"]),
        (args!["quantize", &model, "--target", "Q4_0", "--tensor-type", "a=q99"], vec!["q99", "q4_K"]),
        (args!["quantize", &model, "--target", "Q4_0", "--override-kv", "a=u8:1"], vec!["KEY=TYPE:VALUE"]),
        (args!["quantize", &model, "--target", "Q4_0", "--prune-layers", "0,1,2,3,4,5"], vec!["keep at least one"]),
        (args!["quantize", &model, "--target", "Q4_0", "--imatrix", &model], vec!["model.gguf"]),
        (
            args!["quantize", data("golden/doclet.imatrix.gguf"), "--target", "Q4_0"],
            vec!["importance matrix", "--imatrix"],
        ),
        (args!["quantize", dir.path().join("none.gguf"), "--target", "Q4_0"], vec!["none.gguf"]),
        (args!["quantize", dir.path(), "--target", "Q4_0"], vec![dir.path().to_str().unwrap()]),
    ];
    for (arguments, expected) in cases {
        let line = error_line(&run(&arguments));
        for part in expected {
            assert!(line.contains(part), "{part:?} not in {line}");
        }
    }
    assert_eq!(files_in(dir.path()), ["model.gguf", "q4_1.gguf"]);
}

#[test]
fn overrides_reach_types_metadata_and_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let list = dir.path().join("types.txt");
    std::fs::write(&list, "attn_k=q5_0\nffn_(up|gate)=iq4_nl ffn_down=q8_0\n").unwrap();
    let output = dir.path().join("out.gguf");
    stdout_of(run(args![
        "quantize",
        doclet(),
        &output,
        "--target",
        "Q4_K_M",
        "--tensor-type",
        "blk\\.1\\.attn_k=q6_K",
        "--tensor-type-file",
        &list,
        "--token-embedding-type",
        "Q8_0",
        "--override-kv",
        "general.name=str:renamed",
        "--override-kv",
        "lwq.test=float:0.5",
        "--prune-layers",
        "0,4",
    ]));
    let gguf = Gguf::open(&output).unwrap();
    let type_of = |name: &str| gguf.tensor(name).unwrap().ty;
    assert_eq!(type_of("blk.0.attn_k.weight"), TensorType::Q5_0, "patterns see the new block numbers");
    assert_eq!(type_of("blk.1.attn_k.weight"), TensorType::Q6_K);
    assert_eq!(type_of("blk.3.ffn_gate.weight"), TensorType::IQ4_NL);
    assert_eq!(type_of("blk.2.ffn_down.weight"), TensorType::Q8_0);
    assert_eq!(type_of("token_embd.weight"), TensorType::Q8_0);
    assert!(gguf.tensor("blk.4.attn_k.weight").is_none());
    assert_eq!(gguf.metadata().u32("llama.block_count").unwrap(), Some(4));
    assert_eq!(gguf.metadata().str("general.name").unwrap(), Some("renamed"));
    assert_eq!(gguf.metadata().get("lwq.test"), Some(&Value::F32(0.5)));
}

#[test]
fn importance_follows_the_blocks_that_pruning_renumbers() {
    let dir = tempfile::tempdir().unwrap();
    let imatrix = data("golden/doclet.imatrix.gguf");
    let (whole, pruned) = (dir.path().join("whole.gguf"), dir.path().join("pruned.gguf"));
    stdout_of(run(args!["quantize", doclet(), &whole, "--target", "Q4_0", "--pure", "--imatrix", &imatrix]));
    let outcome = run(args![
        "quantize",
        doclet(),
        &pruned,
        "--target",
        "Q4_0",
        "--pure",
        "--imatrix",
        &imatrix,
        "--prune-layers",
        "1,2"
    ]);
    assert!(!String::from_utf8_lossy(&outcome.stderr).contains("belong to no tensor"));
    stdout_of(outcome);
    let (whole, pruned) = (Gguf::open(whole).unwrap(), Gguf::open(pruned).unwrap());
    for (new, old) in [(0, 0), (1, 3), (3, 5)] {
        let data_of = |gguf: &Gguf, block: u32| {
            let name = format!("blk.{block}.ffn_down.weight");
            gguf.data(gguf.tensor(&name).unwrap()).unwrap().to_vec()
        };
        assert_eq!(data_of(&pruned, new), data_of(&whole, old));
    }
}

#[test]
fn filters_restrict_the_importance() {
    let dir = tempfile::tempdir().unwrap();
    let imatrix = data("golden/doclet.imatrix.gguf");
    let output = dir.path().join("out.gguf");
    let report = json_of(run(args![
        "quantize",
        doclet(),
        &output,
        "--target",
        "Q4_K_S",
        "--imatrix",
        &imatrix,
        "--include-weights",
        "ffn_up",
        "--json",
    ]));
    for tensor in report["tensors"].as_array().unwrap() {
        let name = tensor["name"].as_str().unwrap();
        assert_eq!(tensor["weighted"], name.contains("ffn_up"), "{name}");
    }
    let line = error_line(&run(args![
        "quantize",
        doclet(),
        &output,
        "--target",
        "IQ2_XXS",
        "--imatrix",
        &imatrix,
        "--exclude-weights",
        "attn_q",
        "--force",
    ]));
    assert!(line.contains("blk.0.attn_q.weight"), "{line}");
}

#[test]
fn fallback_types_are_counted_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("narrow.gguf");
    common::sparse_model(&model, 2, 96, 64);
    let report = json_of(run(args!["quantize", &model, "--target", "Q4_K_S", "--json"]));
    assert_eq!(report["fallbacks"], 4);
    assert_eq!(report["tensors"][0]["fallback_from"], "q4_K");
    assert!(report["fallback_extra_bytes"].as_u64().unwrap() > 0);
    let line = error_line(&run(args!["quantize", &model, "--target", "Q4_K_S", "--no-fallback", "--force"]));
    assert!(line.contains("rows of 96"), "{line}");
}

#[test]
fn weights_that_are_not_finite_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let model = model_in(dir.path());
    let gguf = Gguf::open(&model).unwrap();
    let tensor = gguf.tensor("blk.2.ffn_up.weight").unwrap();
    let at = gguf.shards()[0].data_start() + tensor.offset + 2 * 70_000;
    drop(gguf);
    for (bits, shown) in [(0x7e00u16, "NaN"), (0x7c00, "inf"), (0xfc00, "-inf")] {
        let mut bytes = std::fs::read(&model).unwrap();
        bytes[at as usize..at as usize + 2].copy_from_slice(&bits.to_le_bytes());
        std::fs::write(&model, bytes).unwrap();
        let line = error_line(&run(args!["quantize", &model, "--target", "Q4_K_M"]));
        for part in ["blk.2.ffn_up.weight", "weight 70000", shown] {
            assert!(line.contains(part), "{line}");
        }
        assert_eq!(files_in(dir.path()), ["model.gguf"]);
    }
}

#[test]
fn quiet_is_silent_and_a_closed_pipe_is_no_failure() {
    let dir = tempfile::tempdir().unwrap();
    let model = model_in(dir.path());
    let output = run(args!["quantize", &model, "--target", "Q4_K_M", "--quiet"]);
    assert!(output.status.success() && output.stdout.is_empty() && output.stderr.is_empty());
    let pipe = format!("{} inspect --tensors {} | head -c 10", env!("CARGO_BIN_EXE_lwq"), model.display());
    let script = format!("set -o pipefail; {pipe}");
    let output = std::process::Command::new("bash").args(["-c", &script]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}
