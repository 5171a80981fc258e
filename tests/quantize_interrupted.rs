//! What an interrupted, starved or sabotaged run leaves behind: the input, the old output, and nothing else.
#![cfg(unix)]

mod common;

use std::path::Path;
use std::process::{Child, Command, Stdio};

use common::{
    args, doclet, error_line, files_in, interrupt, json_of, lwq, run, sparse_model, stdout_of, wait_for_work,
};

/// Large enough that the run is still busy when the signal comes, sparse enough to cost no disk.
fn slow_model(dir: &Path) -> std::path::PathBuf {
    let model = dir.join("model.gguf");
    sparse_model(&model, 24, 4096, 4096);
    model
}

/// Starts a run and waits until its temporary file is there.
fn start(model: &Path) -> Child {
    let mut child = lwq()
        .args(["quantize", "--target", "Q6_K", "--quiet", "--force", "--threads", "8"])
        .arg(model)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let folder = model.parent().unwrap();
    wait_for_work(&mut child, || files_in(folder).iter().any(|name| name.ends_with(".part")));
    child
}

#[test]
fn signals_leave_the_old_output_and_no_other_file() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let dir = tempfile::tempdir().unwrap();
        let model = slow_model(dir.path());
        std::fs::write(dir.path().join("model-Q6_K.gguf"), b"old").unwrap();
        let output = interrupt(start(&model), signal);
        assert_eq!(String::from_utf8_lossy(&output.stderr).lines().count(), 1);
        assert_eq!(files_in(dir.path()), ["model-Q6_K.gguf", "model.gguf"]);
        assert_eq!(std::fs::read(dir.path().join("model-Q6_K.gguf")).unwrap(), b"old");
    }
}

#[test]
fn the_run_after_a_kill_cleans_up() {
    let dir = tempfile::tempdir().unwrap();
    let model = slow_model(dir.path());
    interrupt(start(&model), libc::SIGKILL);
    let left = files_in(dir.path());
    assert!(left.len() == 2 && !left.contains(&"model-Q6_K.gguf".to_string()), "{left:?}");
    let small = dir.path().join("small.gguf");
    sparse_model(&small, 1, 256, 4);
    let output = dir.path().join("model-Q6_K.gguf");
    stdout_of(run(args!["quantize", &small, &output, "--target", "Q6_K"]));
    assert_eq!(files_in(dir.path()), ["model-Q6_K.gguf", "model.gguf", "small.gguf"]);
}

#[test]
fn two_runs_onto_one_output_do_not_mix() {
    let dir = tempfile::tempdir().unwrap();
    let model = slow_model(dir.path());
    let first = start(&model);
    let line = error_line(&run(args!["quantize", &model, "--target", "Q6_K"]));
    assert!(line.contains("another run is writing"), "{line}");
    interrupt(first, libc::SIGTERM);
    assert_eq!(files_in(dir.path()), ["model.gguf"]);
}

#[test]
fn an_input_cut_short_while_in_use_ends_in_one_line() {
    // Several rounds, for the threads that meet the lost pages at the same moment.
    for _ in 0..5 {
        let dir = tempfile::tempdir().unwrap();
        let model = slow_model(dir.path());
        let child = start(&model);
        std::fs::OpenOptions::new().write(true).open(&model).unwrap().set_len(1 << 16).unwrap();
        let output = child.wait_with_output().unwrap();
        let line = error_line(&output);
        assert!(line.contains("cut short"), "{line}");
        assert_eq!(files_in(dir.path()), ["model.gguf"]);
    }
}

#[test]
fn a_full_disk_is_found_before_the_work() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(&disk).status();
    if !mounted.is_ok_and(|status| status.success()) {
        eprintln!("skipped: mounting a small tmpfs is not permitted here");
        return;
    }
    let output = disk.join("out.gguf");
    let result = run(args!["quantize", doclet(), &output, "--target", "Q4_0"]);
    let left = files_in(&disk);
    assert!(Command::new("umount").arg(&disk).status().unwrap().success());
    let line = error_line(&result);
    assert!(line.contains("are needed and") && line.contains("are free"), "{line}");
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn peak_memory_does_not_grow_with_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model.gguf");
    // 1.6 GB of weights in tensors of 17 MB.
    sparse_model(&model, 48, 4096, 1024);
    let report = json_of(run(args!["quantize", &model, "--target", "Q8_0", "--json"]));
    let peak = report["peak_memory_bytes"].as_u64().unwrap();
    let bound = 5 * (4096 * 1024 * 4) / 2 + 200_000_000;
    assert!(peak <= bound, "{peak} bytes, at most {bound} expected");
}
