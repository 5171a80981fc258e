//! `lwq publish` as a user runs it.

mod common;
mod convert_support;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::{args, data, doclet, error_line, files_in, json_of, lwq, run, run_with, stdout_of};
use convert_support::Source;
use serde_json::Value;
use sha2::{Digest, Sha256};

/// Little work, and results that do not depend on the processor.
const QUICK: [&str; 12] = [
    "--imatrix-chunks",
    "2",
    "--accurate",
    "--probe-tokens",
    "512",
    "--rounding",
    "ggml",
    "--eval-chunks",
    "2",
    "--eval-ctx",
    "64",
    "--quiet",
];

fn publish(source: &Path, output: &Path, more: &[&str]) -> std::process::Output {
    let mut arguments = args!["publish", source, output];
    arguments.extend(QUICK.map(OsString::from));
    run_with(arguments, more)
}

/// Names and contents of all files of a repository.
fn contents(output: &Path) -> Vec<(String, Vec<u8>)> {
    let mut names = files_in(output);
    names.retain(|name| output.join(name).is_file());
    names.into_iter().map(|name| (name.clone(), fs::read(output.join(name)).unwrap())).collect()
}

fn assert_checksums(output: &Path) {
    let sums = fs::read_to_string(output.join("SHA256SUMS")).unwrap();
    for line in sums.lines() {
        let (digest, name) = line.split_once("  ").unwrap();
        let found = format!("{:x}", Sha256::digest(fs::read(output.join(name)).unwrap()));
        assert_eq!(found, digest, "{name}");
    }
    let listed = sums.lines().count();
    let there = files_in(output).iter().filter(|name| output.join(name).is_file()).count();
    assert_eq!(listed + 1, there, "{sums}");
}

/// The row of the card's first table that begins with a link to `file`.
fn row<'a>(card: &'a str, file: &str) -> Vec<&'a str> {
    let start = format!("| [{file}]");
    let line = card.lines().find(|line| line.starts_with(&start)).unwrap_or_else(|| panic!("{file} in {card}"));
    line.trim_matches('|').split('|').map(str::trim).collect()
}

fn status(output: &Path) -> Value {
    json_of(run(args!["publish", "--list", output, "--json"]))
}

fn step<'a>(status: &'a Value, name: &str) -> &'a Value {
    status["steps"].as_array().unwrap().iter().find(|step| step["step"] == name).unwrap()
}

/// A program that prints what llama-bench printed once.
#[cfg(unix)]
fn recorded_bench(folder: &Path) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let program = folder.join("llama-bench");
    fs::write(&program, format!("#!/bin/sh\ncat '{}'\n", data("llama-bench.json").display())).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    program
}

#[test]
fn a_repository_agrees_with_itself_and_serves_the_next_run() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let targets = ["--targets", "Q3_K_M,Q4_K_M", "--json"];
    let report = json_of(publish(&doclet(), &out, &targets));
    assert_checksums(&out);
    let card = fs::read_to_string(out.join("README.md")).unwrap();
    assert!(card.starts_with("---\nbase_model:\n- doclet-4M\n"), "{card}");
    let files = report["files"].as_array().unwrap();
    assert_eq!(files.len(), 2);
    for file in files {
        let name = file["file"].as_str().unwrap();
        let (size, kld) = (file["size_bytes"].as_u64().unwrap(), file["mean_kld"].as_f64().unwrap());
        assert_eq!(size, out.join(name).metadata().unwrap().len());
        let standard = &file["standard"];
        assert!(size <= standard["size_bytes"].as_u64().unwrap() && kld <= standard["mean_kld"].as_f64().unwrap());
        let cells = row(&card, name);
        assert!(cells[5].starts_with(&format!("{kld:.6} ± ")), "{cells:?}");
        assert_eq!(cells[9], format!("{:.6}", standard["mean_kld"].as_f64().unwrap()));
        let (ours, theirs) = (size as f64, standard["size_bytes"].as_f64().unwrap());
        assert!((file["standard"]["shrinkage"].as_f64().unwrap() - (1.0 - ours / theirs)).abs() < 1e-12);
    }
    let written: Value = serde_json::from_slice(&fs::read(out.join("report.json")).unwrap()).unwrap();
    assert_eq!(written, report);
    assert_eq!(files_in(&out.join(".lwq-publish")), ["journal.json", "lock"]);
    assert!(!fs::read_to_string(out.join("report.json")).unwrap().contains(dir.path().to_str().unwrap()));

    // The same command has nothing to do, and says the same.
    let before = contents(&out);
    let seconds = step(&status(&out), "measure")["seconds"].clone();
    assert_eq!(json_of(publish(&doclet(), &out, &targets)), report);
    assert_eq!(contents(&out), before);

    // The commands in the card make the same bytes.
    let work = dir.path().join("again");
    fs::create_dir(&work).unwrap();
    fs::copy(doclet(), work.join("doclet-4m-f16.gguf")).unwrap();
    fs::copy(out.join("doclet-4m.sens.json"), work.join("doclet-4m.sens.json")).unwrap();
    let commands = report["provenance"]["commands"].as_array().unwrap().iter();
    let commands = commands.chain(files[1]["commands"].as_array().unwrap()).map(|line| line.as_str().unwrap());
    for line in commands.filter(|line| !line.starts_with("lwq measure")) {
        let words: Vec<&str> = line.split(' ').skip(1).collect();
        let done = lwq().args(&words).arg("--quiet").current_dir(&work).output().unwrap();
        stdout_of(done);
    }
    let name = files[1]["file"].as_str().unwrap();
    assert!(fs::read(work.join(name)).unwrap() == fs::read(out.join(name)).unwrap(), "{name} by its commands");

    // Others beside them, tasks, speeds and smaller files: what is known is not measured again.
    let other = dir.path().join("theirs-Q4_K_M.gguf");
    stdout_of(run_with(args!["quantize", doclet(), &other], &["--target", "Q4_K_M", "--no-imatrix", "--quiet"]));
    let against = format!("theirs={}", other.display());
    let (tasks, bench) = (data("tasks"), recorded_bench(dir.path()));
    let more = [
        "--targets",
        "Q3_K_M,Q4_K_M",
        "--sizes",
        "3MB",
        "--shrink",
        "--trials",
        "2",
        "--against",
        &against,
        "--most-tasks",
        "2",
        "--tasks",
        tasks.to_str().unwrap(),
        "--llama-bench",
        bench.to_str().unwrap(),
        "--json",
    ];
    let report = json_of(publish(&doclet(), &out, &more));
    assert_checksums(&out);
    assert_eq!(step(&status(&out), "measure")["seconds"], seconds);
    let card = fs::read_to_string(out.join("README.md")).unwrap();
    assert!(card.contains("| theirs | Q4_K_M |") && card.contains("## Tasks") && card.contains("pp512"), "{card}");
    let files = report["files"].as_array().unwrap();
    let of = |label: &str| files.iter().find(|file| file["made_for"] == label).unwrap();
    assert!(of("3MB")["size_bytes"].as_u64().unwrap() <= 3_000_000 && of("3MB")["standard"].is_null());
    let smaller = of("Q4_K_M");
    assert!(smaller["standard"]["shrinkage"].as_f64().unwrap() > 0.02, "{smaller}");
    assert!(smaller["standard"]["kld_ratio"].as_f64().unwrap() <= 1.0, "{smaller}");
    let theirs = &smaller["against"]["theirs"];
    assert_eq!(theirs["size_bytes"], other.metadata().unwrap().len());
    let recorded: Value = serde_json::from_slice(&fs::read(data("llama-bench.json")).unwrap()).unwrap();
    let speed = &smaller["speed"];
    assert_eq!((&speed["pp512"], &speed["tg128"]), (&recorded[0]["avg_ts"], &recorded[1]["avg_ts"]));
    assert!(speed["on"].as_str().unwrap().contains("a processor, 2 threads"), "{speed}");
    assert_eq!(smaller["tasks"].as_array().unwrap().len(), report["base"]["tasks"].as_array().unwrap().len());
    let tried = report["tried"].as_array().unwrap();
    assert!(tried.iter().any(|tried| tried["kind"] == "planned" && tried["made_for"] == "Q4_K_M"), "{tried:?}");

    // A file that is not asked for any more is not thrown away by itself, and a changed card not written over.
    let line = error_line(&publish(&doclet(), &out, &["--targets", "Q4_K_M"]));
    assert!(line.contains("earlier run") && line.contains("--force"), "{line}");
    fs::write(out.join("README.md"), card.replace("quantized_by: lwq", "quantized_by: me")).unwrap();
    let line = error_line(&publish(
        &doclet(),
        &out,
        &targets[..2].iter().copied().chain(["--sizes", "3MB"]).collect::<Vec<_>>(),
    ));
    assert!(line.contains("README.md") && line.contains("was changed"), "{line}");
    let template = dir.path().join("card.txt");
    fs::write(&template, "{% for f in report.files %}{{ f.file }} {{ f.mean_kld|fixed(6) }}\n{% endfor %}").unwrap();
    let forced = ["--targets", "Q4_K_M", "--force", "--json", "--card-template", template.to_str().unwrap()];
    let report = json_of(publish(&doclet(), &out, &forced));
    assert_checksums(&out);
    assert!(!out.join("doclet-4m-3MB.gguf").exists() && !out.join("doclet-4m-Q3_K_M.gguf").exists());
    let kld = report["files"][0]["mean_kld"].as_f64().unwrap();
    let card = fs::read_to_string(out.join("README.md")).unwrap();
    assert_eq!(card, format!("doclet-4m-Q4_K_M.gguf {kld:.6}\n"));

    // The measurement serves another run of the model, and not one of another model.
    let (found, fresh) = (out.join("doclet-4m.sens.json"), dir.path().join("fresh"));
    let imatrix = out.join("doclet-4m.imatrix.gguf");
    let reuse = ["--targets", "Q4_K_M", "--json", "--measured-on", found.to_str().unwrap()];
    let quick: Vec<OsString> = QUICK[3..].iter().map(OsString::from).collect();
    let mut arguments = args!["publish", doclet(), &fresh, "--imatrix", &imatrix];
    arguments.extend(quick);
    let report = json_of(run_with(arguments, &reuse));
    let check = &report["measured_on"];
    assert_eq!((&check["holds"], &check["ratio"], &check["within"]), (&true.into(), &1.0.into(), &8.into()));
    assert!(
        fs::read_to_string(fresh.join("README.md"))
            .unwrap()
            .contains("taken from the measurement of doclet-4m-f16.gguf")
    );
    let listed = status(&out);
    let listed = listed["files"].as_array().unwrap().iter().find(|file| file["file"] == "doclet-4m-Q4_K_M.gguf");
    assert_eq!(report["files"][0]["sha256"], listed.unwrap()["sha256"]);
}

#[cfg(unix)]
#[test]
fn a_run_that_is_killed_again_and_again_gives_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (straight, killed) = (dir.path().join("straight"), dir.path().join("killed"));
    let more = ["--targets", "Q4_K_M,IQ3_S", "--shrink", "--trials", "1"];
    stdout_of(publish(&doclet(), &straight, &more));
    let (mut kills, mut state) = (0u64, 0x2545_f491_4f6c_dd1d_u64);
    loop {
        // Up to 1.2 seconds, as a generator of random numbers has it.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let patience = 150 + (state >> 33) % 1050;
        let mut arguments = args!["publish", doclet(), &killed];
        arguments.extend(QUICK.map(OsString::from));
        let mut child = lwq().args(arguments).args(more).spawn().unwrap();
        let until = Instant::now() + Duration::from_millis(patience);
        let status = loop {
            match child.try_wait().unwrap() {
                Some(status) => break Some(status),
                None if kills < 20 && Instant::now() > until => break None,
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        if let Some(status) = status {
            assert!(status.success());
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
        // Whatever is there is whole.
        for (name, bytes) in contents(&killed).iter().filter(|(name, _)| name.ends_with(".gguf")) {
            assert!(bytes.starts_with(b"GGUF"), "{name}");
        }
    }
    assert!(kills >= 3, "the run was too quick to be killed");
    let (a, b) = (contents(&straight), contents(&killed));
    let names = |files: &[(String, Vec<u8>)]| files.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&a), names(&b));
    for ((name, straight), (_, killed)) in a.iter().zip(&b) {
        assert!(straight == killed, "{name} differs");
    }
}

#[test]
fn a_folder_is_converted_and_exported_and_its_card_is_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("doclet");
    Source::doclet(&doclet()).write(&folder);
    let card = "---\nlicense: apache-2.0\nlanguage: [en]\nbase_model: org/doclet-base\ntags:\n- docs\npipeline_tag: text-generation\n---\n";
    fs::write(folder.join("README.md"), card).unwrap();
    let out = dir.path().join("out");
    let more =
        ["--sizes", "3MB", "--schemes", "W8A16", "--calibration-tokens", "512", "--calibration-ctx", "64", "--json"];
    let forecast = json_of(publish(&folder, &out, &[&more[..], &["--dry-run"]].concat()));
    let steps: Vec<&str> =
        forecast["steps"].as_array().unwrap().iter().map(|step| step["step"].as_str().unwrap()).collect();
    assert_eq!(steps, ["convert", "imatrix", "measure", "plan", "round", "export W8A16", "evaluate", "card"]);
    assert!(forecast["seconds"].as_f64().unwrap() > 0.0 && forecast["peak_disk_bytes"].as_u64().unwrap() > 11_000_000);
    assert!(!out.exists(), "a dry run has made something");
    let report = json_of(publish(&folder, &out, &more));
    let front = &report["front_matter"];
    assert_eq!((&front["license"], &front["base_model"][0]), (&"apache-2.0".into(), &"org/doclet-base".into()));
    let card = fs::read_to_string(out.join("README.md")).unwrap();
    assert!(
        card.contains("\nlicense: apache-2.0\n") && card.contains("\n- docs\n- gguf\n- compressed-tensors\n"),
        "{card}"
    );
    assert!(card.contains("lwq convert doclet -o doclet-f16.gguf"), "{card}");
    assert!(out.join("doclet-W8A16/model.safetensors").is_file() && out.join("doclet-3MB.gguf").is_file());
    let exported = &report["folders"][0];
    let kld = exported["divergence"]["mean_kld"].as_f64().unwrap();
    assert!(kld > 0.0 && kld < 0.01, "{exported}");
    let sums = fs::read_to_string(out.join("SHA256SUMS")).unwrap();
    assert!(sums.contains("  doclet-W8A16/model.safetensors\n") && !sums.contains("doclet-f16.gguf"), "{sums}");
    assert_eq!(files_in(&out.join(".lwq-publish")), ["journal.json", "lock"]);
}

#[test]
fn wrong_choices_are_one_line_and_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let bad = dir.path().join("bad.md");
    fs::write(&bad, "{% if %}").unwrap();
    let missing = dir.path().join("missing");
    let missing = missing.to_str().unwrap();
    let against = format!("x={missing}");
    for (more, expected) in [
        (vec!["--schemes", "W4A16"], "needs a Hugging Face folder"),
        (vec!["--targets", "F16"], "quantizes nothing"),
        (vec!["--sizes", "1kB"], "smallest possible file"),
        (vec!["--fit", "1MB"], "--ctx"),
        (vec!["--fit", "200MB", "--cache-type", "q4_0", "--ctx", "999999999"], "--fit 200MB"),
        (vec!["--card-template", bad.to_str().unwrap()], "line 1"),
        (vec!["--llama-bench", missing], "missing"),
        (vec!["--llama-bench", bad.to_str().unwrap()], "no program"),
        (vec!["--measured-on", bad.to_str().unwrap()], "bad.md"),
        (vec!["--against", &against], "missing"),
        (vec!["--tasks", missing], "missing"),
        (vec!["--base-model", "a b"], "ORG/NAME"),
        (vec!["--disk", "1M"], "--disk"),
        (vec!["--name", "a/b"], "--name"),
    ] {
        let line = error_line(&publish(&doclet(), &out, &more));
        assert!(line.contains(expected), "{more:?}: {line}");
        assert!(!out.exists(), "{more:?} has made something");
    }
    let line = error_line(&run(args!["publish", "--list", dir.path()]));
    assert!(line.contains("no journal"), "{line}");
    // Files of others are not touched.
    fs::create_dir(&out).unwrap();
    fs::write(out.join("README.md"), "mine").unwrap();
    let line = error_line(&publish(&doclet(), &out, &["--targets", "Q4_K_M"]));
    assert!(line.contains("README.md") && line.contains("--force"), "{line}");
    assert_eq!(files_in(&out), ["README.md"]);
    for wrong in [&["publish"][..], &["publish", "--list", "a", "b", "c"], &["publish", "a", "b", "--cache-type", "q9"]]
    {
        assert_eq!(run(wrong).status.code(), Some(2), "{wrong:?}");
    }
}
