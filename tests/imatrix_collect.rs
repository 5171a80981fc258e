//! `lwq imatrix MODEL` as a user runs it: agreement with llama-imatrix, shards, interruption, refusals.

mod common;

use std::path::Path;

use common::{args, data, doclet, error_line, files_in, json_of, lwq, run, run_with, stdout_of};
use lwq::imatrix::Imatrix;

/// The text of the reference files.
fn text() -> std::path::PathBuf {
    data("golden/calib-sample.txt")
}

fn collect(output: &Path, more: &[&str]) -> String {
    stdout_of(run_with(args!["imatrix", doclet(), "-f", text(), "-c", "256", "-o", output], more))
}

/// Largest relative differences of single values (where they matter) and of tensor sums.
fn differences(found: &Imatrix, expected: &Imatrix) -> (f64, f64) {
    assert_eq!(found.entries.keys().collect::<Vec<_>>(), expected.entries.keys().collect::<Vec<_>>());
    let (mut of_values, mut of_sums) = (0.0f64, 0.0f64);
    for (name, expected) in &expected.entries {
        let found = &found.entries[name];
        assert_eq!(found.counts, expected.counts, "{name}");
        let sum = |values: &[f32]| values.iter().map(|v| f64::from(*v)).sum::<f64>();
        let mean = sum(&expected.sums) / expected.sums.len() as f64;
        of_sums = of_sums.max((sum(&found.sums) / sum(&expected.sums) - 1.0).abs());
        for (found, expected) in found.sums.iter().zip(&expected.sums) {
            if f64::from(*expected) > mean / 1000.0 {
                of_values = of_values.max((f64::from(*found) / f64::from(*expected) - 1.0).abs());
            }
        }
    }
    (of_values, of_sums)
}

#[test]
fn both_modes_agree_with_llama_imatrix() {
    let dir = tempfile::tempdir().unwrap();
    let golden = Imatrix::open(&data("golden/doclet.imatrix.gguf")).unwrap();
    for (flags, value_bound, sum_bound) in [(&["--accurate"][..], 0.01, 0.001), (&["--no-ppl"][..], 0.03, 0.005)] {
        let output = dir.path().join("imx.gguf");
        collect(&output, &[flags, &["--force"]].concat());
        let found = Imatrix::open(&output).unwrap();
        assert_eq!((found.chunk_count, found.chunk_size), (golden.chunk_count, golden.chunk_size));
        let (values, sums) = differences(&found, &golden);
        assert!(values < value_bound && sums < sum_bound, "{flags:?}: {values} {sums}");

        // The same recipe and nearly the same bytes with either file.
        let quantized = |imatrix: &Path, name: &str| {
            let path = dir.path().join(name);
            stdout_of(run(args!["quantize", doclet(), &path, "--target", "IQ3_M", "--force", "--imatrix", imatrix]));
            lwq::gguf::Gguf::open(path).unwrap()
        };
        let (ours, theirs) = (quantized(&output, "a.gguf"), quantized(&data("golden/doclet.imatrix.gguf"), "b.gguf"));
        let (mut different, mut all) = (0, 0);
        for (a, b) in ours.tensors().iter().zip(theirs.tensors()) {
            assert_eq!((&a.name, a.ty), (&b.name, b.ty));
            let (a, b) = (ours.data(a).unwrap(), theirs.data(b).unwrap());
            different += a.iter().zip(b).filter(|(a, b)| a != b).count();
            all += a.len();
        }
        assert!(different * 100 < all, "{different} of {all} bytes differ");
    }
}

#[test]
fn threads_and_memory_do_not_change_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let mut files = Vec::new();
    for (threads, memory, save_every) in [("1", "1M", "1"), ("3", "4G", "64")] {
        let output = dir.path().join(format!("{threads}.gguf"));
        collect(&output, &["--chunks", "20", "-t", threads, "--memory", memory, "--save-every", save_every]);
        files.push(std::fs::read(output).unwrap());
    }
    assert_eq!(files[0], files[1]);
}

#[test]
fn merged_shards_equal_the_single_run() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole.gguf");
    collect(&whole, &["--chunks", "30", "--no-ppl"]);
    let mut arguments = args!["imatrix", "merge"];
    for part in ["1/3", "2/3", "3/3"] {
        let output = dir.path().join(format!("part{}.gguf", &part[..1]));
        collect(&output, &["--chunks", "30", "--no-ppl", "--shard", part]);
        arguments.push(output.into());
    }
    let merged = dir.path().join("merged.gguf");
    arguments.extend(args!["-o", &merged]);
    stdout_of(run(arguments));
    let (merged, whole) = (Imatrix::open(&merged).unwrap(), Imatrix::open(&whole).unwrap());
    assert_eq!(merged.chunk_count, whole.chunk_count);
    let (values, _) = differences(&merged, &whole);
    assert!(values < 1e-6, "{values}");
}

/// Starts a run that saves its state after every chunk and waits for the first state, or for a newer one than it found:
/// a signal that comes before the run knows what to do with it says nothing.
#[cfg(unix)]
fn start_and_wait_for_state(output: &Path) -> std::process::Child {
    let state = lwq::unfinished::partial_path(output);
    let time = || state.metadata().and_then(|metadata| metadata.modified()).ok();
    let found = time();
    let mut child = lwq()
        .args(args!["imatrix", doclet(), "-f", text(), "-c", "256", "-o", output, "--save-every", "1", "--quiet"])
        .spawn()
        .unwrap();
    common::wait_for_work(&mut child, || time() != found);
    child
}

#[cfg(unix)]
#[test]
fn a_killed_run_goes_on_to_the_same_file() {
    let dir = tempfile::tempdir().unwrap();
    let (stopped, straight) = (dir.path().join("stopped.gguf"), dir.path().join("straight.gguf"));
    for signal in [libc::SIGKILL, libc::SIGINT] {
        common::interrupt(start_and_wait_for_state(&stopped), signal);
        assert!(!stopped.exists());
    }
    let resumed = run(args!["imatrix", doclet(), "-f", text(), "-c", "256", "-o", &stopped]);
    assert!(String::from_utf8_lossy(&resumed.stderr).contains("going on after chunk"));
    stdout_of(resumed);
    collect(&straight, &[]);
    assert_eq!(std::fs::read(&stopped).unwrap(), std::fs::read(&straight).unwrap());
    assert_eq!(files_in(dir.path()), ["stopped.gguf", "straight.gguf"]);
}

#[cfg(unix)]
#[test]
fn a_state_of_other_conditions_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("imx.gguf");
    common::interrupt(start_and_wait_for_state(&output), libc::SIGKILL);
    let other_text = dir.path().join("other.txt");
    std::fs::write(&other_text, "x = 1\n".repeat(2000)).unwrap();
    let other_model = dir.path().join("other.gguf");
    stdout_of(run(args!["quantize", doclet(), &other_model, "--target", "Q8_0"]));
    let cases = [
        (args!["imatrix", doclet(), "-f", &other_text, "-c", "256", "-o", &output], "another text"),
        (args!["imatrix", doclet(), "-f", text(), "-c", "256", "-o", &output, "--accurate"], "other settings"),
        (args!["imatrix", &other_model, "-f", text(), "-c", "256", "-o", &output], "another model"),
    ];
    for (arguments, expected) in cases {
        let line = error_line(&run(arguments));
        assert!(line.contains(expected) && line.contains("--force"), "{line}");
    }
}

#[test]
fn the_built_in_text_needs_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("imx.gguf");
    let report = json_of(run(args!["imatrix", doclet(), "-o", &output, "--chunks", "3", "--json"]));
    assert_eq!(report["chunk_count"], 3);
    assert_eq!(report["chunk_size"], 256, "chunks are no longer than the model's context");
    assert!(report["ppl"].as_f64().unwrap() > 1.0);
    assert_eq!(Imatrix::open(&output).unwrap().datasets, ["lwq built-in calibration mix"]);
}

#[test]
fn without_a_name_the_file_lies_beside_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("small.gguf");
    std::fs::copy(doclet(), &model).unwrap();
    let common = ["--chunks", "2", "-c", "64", "--json"].map(Into::into);
    for (format, expected) in [("gguf", "small.imatrix.gguf"), ("dat", "small.imatrix.dat")] {
        let arguments = [args!["imatrix", &model, "--format", format], common.to_vec()].concat();
        let report: serde_json::Value = serde_json::from_str(&stdout_of(run(arguments))).unwrap();
        assert_eq!(Path::new(report["output"].as_str().unwrap()), dir.path().join(expected));
    }
    assert_eq!(files_in(dir.path()), ["small.gguf", "small.imatrix.dat", "small.imatrix.gguf"]);
    let again = error_line(&run([args!["imatrix", &model], common.to_vec()].concat()));
    assert!(again.contains("small.imatrix.gguf: exists already"), "{again}");
}

#[test]
fn texts_and_models_that_do_not_serve_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("imx.gguf");
    let (empty, short) = (dir.path().join("empty.txt"), dir.path().join("short.txt"));
    std::fs::write(&empty, "").unwrap();
    std::fs::write(&short, "two words").unwrap();
    let cases = [
        (args!["imatrix", doclet(), "-f", &empty, "-o", &output], "empty.txt"),
        (args!["imatrix", doclet(), "-f", &short, "-o", &output], "at least two chunks"),
        (args!["imatrix", doclet(), "-f", dir.path().join("none.txt"), "-o", &output], "none.txt"),
        (args!["imatrix", doclet(), "-f", text(), "-o", &output, "--from-chunk", "9999"], "--from-chunk 9999"),
        (args!["imatrix", doclet(), "-f", text(), "-o", &output, "--pre", "no-such-pre"], "no-such-pre"),
        (args!["imatrix", data("golden/doclet.imatrix.gguf"), "-f", text(), "-o", &output], "general.architecture"),
    ];
    for (arguments, expected) in cases {
        let line = error_line(&run(&arguments));
        assert!(line.contains(expected), "{expected:?} not in {line}");
    }
    assert_eq!(run(args!["imatrix"]).status.code(), Some(2));
    assert_eq!(files_in(dir.path()), ["empty.txt", "short.txt"]);
}
