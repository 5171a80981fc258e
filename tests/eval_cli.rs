//! `lwq eval ppl` and `lwq eval kld` as a user runs them: agreement with llama-perplexity, saved logits, refusals.

mod common;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use common::{args, data, doclet, error_line, files_in, lwq, run, run_with, stdout_of};
use half::f16;
use lwq::gguf::Gguf;
use serde_json::Value;
use tempfile::TempDir;

/// The text of the reference figures.
fn text() -> PathBuf {
    data("golden/eval-sample.txt")
}

fn json_of(arguments: Vec<OsString>) -> Value {
    common::json_of(run_with(arguments, &["--json", "--quiet"]))
}

/// What a model's divergence from the bundled one is on the reference text.
fn kld(model: &Path, more: &[&str]) -> Value {
    let arguments = args!["eval", "kld", model, "--base", doclet(), "-f", text(), "--json", "--quiet"];
    common::json_of(run_with(arguments, more))
}

/// The bundled model quantized with the imatrix of the reference figures.
fn quantized(folder: &TempDir, target: &str) -> PathBuf {
    let path = folder.path().join(format!("{target}.gguf"));
    if !path.exists() {
        let imatrix = data("golden/doclet.imatrix.gguf");
        stdout_of(run(args!["quantize", doclet(), &path, "--target", target, "--imatrix", imatrix, "--quiet"]));
    }
    path
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("{key} is no number in {value}"))
}

const TARGETS: [&str; 7] = ["Q2_K", "Q3_K_M", "IQ3_XXS", "Q4_K_M", "IQ4_XS", "Q6_K", "Q8_0"];

fn golden() -> Value {
    serde_json::from_slice(&std::fs::read(data("golden/doclet-eval.json")).unwrap()).unwrap()
}

fn within(found: f64, expected: f64, share: f64, what: &str) {
    assert!((found / expected - 1.0).abs() <= share, "{what}: {found}, expected {expected} within {share}");
}

#[test]
fn perplexity_and_divergence_agree_with_llama_perplexity() {
    let folder = tempfile::tempdir().unwrap();
    let golden = golden();
    let ppl = json_of(args!["eval", "ppl", doclet(), "-f", text()]);
    within(number(&ppl, "ppl"), golden["f16"]["ppl"].as_f64().unwrap(), 0.001, "PPL");
    within(number(&ppl, "ppl_error"), golden["f16"]["error"].as_f64().unwrap(), 0.01, "error of PPL");

    let files: Vec<PathBuf> = TARGETS.iter().map(|target| quantized(&folder, target)).collect();
    let mut arguments = args!["eval", "kld", "--base", doclet(), "-f", text(), "--activations", "ggml"];
    arguments.extend(files.iter().map(OsString::from));
    let all = json_of(arguments);
    assert_eq!(all["activations"], "ggml");
    for (target, found) in TARGETS.iter().zip(all["models"].as_array().unwrap()) {
        let expected = &golden["kld"][target];
        let expected = |key: &str| expected[key].as_f64().unwrap();
        within(number(found, "mean_kld"), expected("mean_kld"), 0.03, target);
        within(number(found, "median_kld"), expected("median_kld"), 0.03, target);
        // The reference prints six digits.
        let error = (number(found, "mean_kld_error"), expected("mean_kld_error"));
        assert!((error.0 - error.1).abs() < 0.03 * error.1 + 1e-6, "{target}: {error:?}");
        within(number(found, "ppl"), expected("ppl"), 0.001, target);
        within(number(found, "ppl_base"), expected("ppl_base"), 0.001, target);
        within(100.0 * number(found, "rms_delta_p"), expected("rms_delta_p_percent"), 0.03, target);
        within(100.0 * number(found, "same_top_p"), expected("same_top_p_percent"), 0.003, target);
        within(100.0 * number(found, "correlation"), expected("correlation_percent"), 0.001, target);
        assert_eq!(number(found, "size_bytes"), expected("file_bytes"));
    }
}

#[test]
fn unrounded_activations_show_the_weights_alone() {
    let folder = tempfile::tempdir().unwrap();
    let golden = golden();
    let targets = ["Q2_K", "Q3_K_M", "IQ3_XXS", "Q6_K"];
    let mut arguments = args!["eval", "kld", "--base", doclet(), "-f", text()];
    arguments.extend(targets.iter().map(|target| quantized(&folder, target).into()));
    let all = json_of(arguments);
    assert_eq!(all["activations"], "f32");
    for (target, found) in targets.iter().zip(all["models"].as_array().unwrap()) {
        let expected = golden["kld"][target]["mean_kld"].as_f64().unwrap();
        match *target {
            "Q6_K" => assert!(number(found, "mean_kld") < 0.6 * expected, "{target}"),
            _ => within(number(found, "mean_kld"), expected, 0.05, target),
        }
    }
}

#[test]
fn a_model_does_not_diverge_from_itself() {
    for activations in ["f32", "ggml"] {
        let found = kld(&doclet(), &["--chunks", "4", "--activations", activations]);
        assert_eq!(number(&found, "mean_kld"), 0.0);
        assert_eq!(number(&found["kld"], "maximum"), 0.0);
        assert_eq!((number(&found, "same_top_p"), number(&found, "rms_delta_p")), (1.0, 0.0));
        assert_eq!(number(&found, "ppl"), number(&found, "ppl_base"));
    }
}

#[test]
fn saved_logits_take_the_place_of_the_base() {
    let folder = tempfile::tempdir().unwrap();
    let model = quantized(&folder, "Q4_K_M");
    let saved = folder.path().join("base.kld");
    let live = kld(&model, &["--chunks", "20", "--save-logits", saved.to_str().unwrap()]);
    let (n_ctx, n_vocab, chunks) = (256u64, 2048u64, 20u64);
    let expected = 20 + 4 * chunks * n_ctx + chunks * (n_ctx - 1 - n_ctx / 2) * 2 * (n_vocab + 4);
    assert_eq!(std::fs::metadata(&saved).unwrap().len(), expected);
    let found = json_of(args!["eval", "kld", &model, "--base-logits", &saved]);
    within(number(&found, "mean_kld"), number(&live, "mean_kld"), 0.01, "mean KLD");
    within(number(&found, "ppl_base"), number(&live, "ppl_base"), 0.0005, "PPL of the base");
    assert_eq!(number(&found, "tokens"), number(&live, "tokens"));

    // What a run over the base alone saves is the same file.
    let again = folder.path().join("again.kld");
    json_of(args!["eval", "ppl", doclet(), "-f", text(), "--chunks", "20", "--save-logits", &again]);
    assert!(std::fs::read(&saved).unwrap() == std::fs::read(&again).unwrap());

    let refused = run(args!["eval", "ppl", doclet(), "-f", text(), "--chunks", "4", "--save-logits", &again]);
    assert!(error_line(&refused).contains("--force"));

    // Fewer chunks than the file holds.
    let part = json_of(args!["eval", "kld", &model, "--base-logits", &saved, "--chunks", "3"]);
    assert_eq!(number(&part, "tokens"), 3.0 * 127.0);

    let whole = std::fs::read(&saved).unwrap();
    std::fs::write(&saved, &whole[..whole.len() - 1000]).unwrap();
    let line = error_line(&run(args!["eval", "kld", &model, "--base-logits", &saved]));
    assert!(line.contains("base.kld") && line.contains("bytes"), "{line}");
    std::fs::write(&saved, b"_logits_").unwrap();
    error_line(&run(args!["eval", "kld", &model, "--base-logits", &saved]));
    let mut bytes = whole;
    bytes[20 + 4 * 5120..20 + 4 * 5120 + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&saved, bytes).unwrap();
    let line = error_line(&run(args!["eval", "kld", &model, "--base-logits", &saved]));
    assert!(line.contains("scale NaN"), "{line}");
}

#[test]
fn strided_windows_score_every_token_after_the_first_window() {
    let found =
        json_of(args!["eval", "ppl", doclet(), "-f", text(), "-c", "128", "--ppl-stride", "64", "--chunks", "30"]);
    assert_eq!((number(&found, "tokens"), number(&found, "ctx")), (30.0 * 64.0, 160.0));
    assert_eq!(found["stride"], 64);
    for stride in ["0", "1000"] {
        let output = run(args!["eval", "ppl", doclet(), "-f", text(), "-c", "128", "--ppl-stride", stride]);
        assert!(!output.status.success());
    }
}

#[test]
fn scoring_may_begin_early_and_texts_take_turns() {
    let folder = tempfile::tempdir().unwrap();
    let parts = std::fs::read_to_string(text()).unwrap();
    let (start, end) = parts.split_at(parts.floor_char_boundary(parts.len() / 2));
    let (start, end) = (write(&folder, "start.txt", start.as_bytes()), write(&folder, "end.txt", end.as_bytes()));
    let ppl =
        |more: Vec<OsString>| json_of(args!["eval", "ppl", doclet(), "-c", "128"].into_iter().chain(more).collect());

    let one = |file: &Path, from: &str| ppl(args!["-f", file, "--chunks", "3", "--score-from", from]);
    let both = ppl(args!["-f", &start, "-f", &end, "--chunks", "6", "--score-from", "16"]);
    let (a, b) = (one(&start, "16"), one(&end, "16"));
    assert_eq!(number(&both, "tokens"), 6.0 * 111.0);
    // Windows of equal length: the mean of the logarithms.
    within(number(&both, "ppl"), (number(&a, "ppl") * number(&b, "ppl")).sqrt(), 1e-9, "PPL of both texts");
    assert_eq!(one(&start, "64")["ppl"], ppl(args!["-f", &start, "--chunks", "3"])["ppl"], "the default is the middle");

    let refused = error_line(&run(args!["eval", "ppl", doclet(), "-f", &start, "-c", "128", "--score-from", "127"]));
    assert!(refused.contains("start.txt") && refused.contains("position 127"), "{refused}");
    let arguments = args!["eval", "ppl", doclet(), "-f", &start, "--score-from", "1", "--save-logits", "x"];
    assert_eq!(run(arguments).status.code(), Some(2), "saved logits begin in the middle");
}

#[test]
fn a_sequential_test_ends_when_models_differ() {
    let folder = tempfile::tempdir().unwrap();
    let (good, bad) = (quantized(&folder, "Q4_K_M"), quantized(&folder, "Q2_K"));
    let common = args!["eval", "kld", "--base", doclet(), "-f", text(), "--sequential-test"];
    let found = json_of([common.clone(), args![&bad, &good]].concat());
    assert_eq!(found["complete"], false);
    assert!(number(&found, "windows") <= 48.0, "{found}");
    assert_eq!(found["sequential_test"]["decided"], true);
    assert!(found["sequential_test"]["best"].as_str().unwrap().ends_with("Q4_K_M.gguf"));
    let pair = &found["models"][1]["kld_against_first"];
    assert!(number(pair, "ratio_low") < number(pair, "ratio") && number(pair, "ratio_high") < 0.5, "{pair}");

    // A model against its copy is never decided.
    let copy = folder.path().join("copy.gguf");
    std::fs::copy(&good, &copy).unwrap();
    let found = json_of([common.clone(), args![&copy, &good, "--chunks", "40"]].concat());
    assert_eq!((found["complete"].as_bool(), found["sequential_test"]["decided"].as_bool()), (Some(true), Some(false)));

    let alone = run([common, args![&good]].concat());
    assert_eq!(alone.status.code(), Some(2));
}

#[test]
fn results_do_not_depend_on_threads() {
    let folder = tempfile::tempdir().unwrap();
    let model = quantized(&folder, "Q3_K_M");
    let figures = |threads: &str| {
        let found = kld(&model, &["--chunks", "6", "--threads", threads]);
        (found["mean_kld"].clone(), found["ppl"].clone(), found["kld"].clone())
    };
    assert_eq!(figures("1"), figures("3"));
}

fn write(folder: &TempDir, name: &str, content: &[u8]) -> PathBuf {
    let path = folder.path().join(name);
    std::fs::write(&path, content).unwrap();
    path
}

#[test]
fn unusable_input_is_refused_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let ppl = |file: &Path, more: &[&str]| run_with(args!["eval", "ppl", doclet(), "-f", file], more);
    let line = error_line(&ppl(&text(), &["-c", "512"]));
    assert!(line.contains("512") && line.contains("256"), "{line}");
    let line = error_line(&ppl(&text(), &["-c", "240", "--ppl-stride", "64"]));
    assert!(line.contains("272"), "{line}");
    for (name, content) in
        [("empty.txt", &b""[..]), ("one.txt", b"x"), ("short.txt", b"not enough words"), ("newline.txt", b"\n")]
    {
        let line = error_line(&ppl(&write(&folder, name, content), &[]));
        assert!(line.contains(name) && line.contains("512"), "{line}");
    }
    assert!(error_line(&ppl(&folder.path().join("absent.txt"), &[])).contains("absent.txt"));
    let binary: Vec<u8> = (0..4000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let line = error_line(&ppl(&write(&folder, "binary.txt", &binary), &[]));
    assert!(line.contains("binary.txt: byte 0 is NUL; this is binary data, no text"), "{line}");

    let damaged = write(&folder, "damaged.gguf", &std::fs::read(doclet()).unwrap()[..5000]);
    let line = error_line(&run(args!["eval", "kld", &damaged, "--base", doclet(), "-f", text()]));
    assert!(line.contains("damaged.gguf"), "{line}");
    assert_eq!(run(args!["eval", "kld", doclet(), "-f", text()]).status.code(), Some(2), "no base");
}

#[test]
fn without_a_text_the_built_in_one_is_scored() {
    let small = ["-c", "64", "--chunks", "3", "--json"].map(Into::into);
    let of_built_in = data("../../calibration/eval.txt");
    for command in [args!["eval", "ppl", doclet()], args!["eval", "kld", doclet(), "--base", doclet()]] {
        let without = run([command.clone(), small.to_vec()].concat());
        let note = String::from_utf8_lossy(&without.stderr).into_owned();
        assert!(note.contains("text: lwq built-in evaluation text"), "{note}");
        let with = run([command, small.to_vec(), args!["-f", &of_built_in]].concat());
        assert!(!String::from_utf8_lossy(&with.stderr).contains("text: "));
        let [without, with]: [Value; 2] =
            [without, with].map(|output| serde_json::from_str(&stdout_of(output)).unwrap());
        for key in ["ppl", "windows", "tokens"] {
            assert_eq!(without[key], with[key], "{key}");
        }
    }
}

#[test]
fn models_of_other_vocabularies_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    // One token of the vocabulary spelled differently: same sizes, other meaning.
    let mut bytes = std::fs::read(doclet()).unwrap();
    let key = b"tokenizer.ggml.tokens";
    let at = bytes.windows(key.len()).position(|w| w == key).unwrap();
    let place = (at..).find(|&i| bytes[i..].starts_with(b"the")).unwrap();
    bytes[place..place + 3].copy_from_slice(b"zzz");
    let other = write(&folder, "other.gguf", &bytes);
    let line = error_line(&run(args!["eval", "kld", &other, "--base", doclet(), "-f", text()]));
    assert!(line.contains("other.gguf") && line.contains("vocabulary"), "{line}");
}

#[test]
fn a_model_that_fails_is_named_by_its_number_from_1() {
    let folder = tempfile::tempdir().unwrap();
    let mut bytes = std::fs::read(doclet()).unwrap();
    let name = "blk.0.attn_q.weight";
    let weights = {
        let gguf = Gguf::open(doclet()).unwrap();
        gguf.data(gguf.tensor(name).unwrap()).unwrap()[..64].to_vec()
    };
    let at = bytes.windows(weights.len()).position(|w| w == weights).unwrap();
    bytes[at..at + 2].copy_from_slice(&f16::NAN.to_le_bytes());
    let bad = write(&folder, "bad.gguf", &bytes);
    let state = folder.path().join("run.state");
    let failing = |models: &[&Path]| {
        let mut arguments = args!["eval", "kld", "--base", doclet(), "-f", text(), "--chunks", "1", "--state", &state];
        arguments.extend(models.iter().map(OsString::from));
        error_line(&run_with(arguments, &["--quiet"]))
    };
    let good = doclet();
    assert!(failing(&[&bad, &good]).contains(&format!("model 1: layer 0: {name} gave NaN")));
    assert!(failing(&[&good, &bad]).contains("model 2: layer 0"));
    // The same where the first model need not run, since its windows are known from before.
    json_of(args!["eval", "kld", "--base", doclet(), "-f", text(), "--chunks", "1", "--state", &state, &good]);
    assert!(failing(&[&good, &bad]).contains("model 2: layer 0"));
    // The base has no number.
    let line = error_line(&run(args!["eval", "kld", "--base", &bad, &good, "-f", text(), "--chunks", "1"]));
    assert!(line.contains(&format!("layer 0: {name} gave NaN")) && !line.contains("model "), "{line}");
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_prints_what_it_covers() {
    use std::io::Read;

    let folder = tempfile::tempdir().unwrap();
    let long = folder.path().join("long.txt");
    std::fs::write(&long, std::fs::read(text()).unwrap().repeat(40)).unwrap();
    let state = folder.path().join("run.state");
    let mut child = lwq()
        .args(args!["eval", "ppl", doclet(), "-f", &long, "--json", "--threads", "1", "--state", &state])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // Plain progress lines say when the first windows are done.
    let mut stderr = child.stderr.take().unwrap();
    let mut seen = String::new();
    while !seen.contains("window ") {
        let mut buffer = [0; 256];
        let n = stderr.read(&mut buffer).unwrap();
        assert!(n > 0, "the run ended by itself: {seen}");
        seen.push_str(&String::from_utf8_lossy(&buffer[..n]));
    }
    child.stderr = Some(stderr);
    let output = common::interrupt(child, libc::SIGINT);
    let rest = String::from_utf8_lossy(&output.stderr);
    assert!(rest.contains("interrupted"), "{rest}");
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["complete"], false);
    assert!(number(&found, "windows") >= 1.0 && number(&found, "ppl") > 1.0);
    assert_eq!(files_in(folder.path()), ["long.txt", "run.state"]);
    let again = run(args!["eval", "ppl", doclet(), "-f", &long, "--chunks", "1", "--state", &state]);
    assert!(String::from_utf8_lossy(&again.stderr).contains("1 of 1 windows were scored before"));
}

#[test]
fn a_state_file_lets_a_run_go_on_and_take_in_another_model() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (quantized(&folder, "Q4_0"), quantized(&folder, "Q8_0"));
    let state = folder.path().join("run.state");
    let kld = |models: &[&PathBuf], chunks: &str, state: Option<&PathBuf>| {
        let mut arguments = args!["eval", "kld", "--base", doclet(), "-f", text(), "--json", "--chunks", chunks];
        arguments.extend(models.iter().map(|path| path.as_os_str().to_owned()));
        if let Some(state) = state {
            arguments.extend(args!["--state", state]);
        }
        run(arguments)
    };
    let first = common::json_of(kld(&[&a], "5", Some(&state)));
    assert_eq!(number(&first, "windows"), 5.0);
    let output = kld(&[&a, &b], "8", Some(&state));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("5 of 24 windows were scored before"), "{said}");
    let (continued, fresh) = (common::json_of(output), common::json_of(kld(&[&a, &b], "8", None)));
    assert_eq!(continued["models"], fresh["models"], "the figures are those of one run");

    // All of it is there now, also for other windows of the same run, and the model alone.
    let again = kld(&[&b], "8", Some(&state));
    assert!(String::from_utf8_lossy(&again.stderr).contains("16 of 16 windows"));
    // Other activations are other figures.
    let rounded = run(args![
        "eval",
        "kld",
        &a,
        "--base",
        doclet(),
        "-f",
        text(),
        "--chunks",
        "2",
        "--activations",
        "ggml",
        "--state",
        &state
    ]);
    assert!(!String::from_utf8_lossy(&rounded.stderr).contains("scored before"));
    let line = error_line(&run(args!["eval", "kld", &a, "--base", doclet(), "-f", text(), "--state", &a]));
    assert!(line.contains("Q4_0.gguf") && line.contains("--state"), "{line}");
}
