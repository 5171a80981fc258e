//! Texts in every encoding, and files that are none, as every command that reads a text takes them.

mod common;

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use common::{args, data, doclet, error_line, json_of, lwq, run, run_with, stdout_of};
use tempfile::TempDir;

const NEEDED: usize = 12_000;

/// A text long enough for two sequences, of characters that Windows-1252 and UTF-16 have, too.
fn sample() -> String {
    let line = "Le naïf café coûte 3 £ — it’s “cheap”, über alles.\n";
    line.repeat(NEEDED / line.len())
}

fn utf16(text: &str, little: bool, mark: bool) -> Vec<u8> {
    let units = mark.then_some(0xfeff).into_iter().chain(text.encode_utf16());
    units.flat_map(|unit: u16| if little { unit.to_le_bytes() } else { unit.to_be_bytes() }).collect()
}

fn file(folder: &TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Every command line that reads the text at `path`, with outputs in `folder`.
fn readers(path: &Path, folder: &TempDir) -> Vec<Vec<OsString>> {
    let out = |name: &str| folder.path().join(name);
    let good = data("golden/calib-sample.txt");
    let model = doclet();
    vec![
        args!["tokenize", &model, "--ids", "-f", path],
        args!["imatrix", &model, "-f", path, "-o", out("i.gguf"), "-c", "64"],
        args!["eval", "ppl", &model, "-f", path, "-c", "64", "--chunks", "2"],
        args!["eval", "kld", &model, "--base", &model, "-f", path, "-c", "64", "--chunks", "2"],
        args!["compare", &model, &model, "-f", path, "-c", "64", "--chunks", "2"],
        args!["measure", &model, "-f", path, "--probe-tokens", "64", "-o", out("m.json")],
        args!["quantize", &model, out("q.gguf"), "--target", "Q4_0", "-f", path, "--calibration-ctx", "64"],
        args!["quantize", &model, out("q.gguf"), "--target", "Q4_0", "-f", &good, "--gate-file", path],
        args!["plan", &model, "--like", "Q4_0", "--calibration", path, "--calibration-ctx", "64", "--method", "error"],
        args!["plan", &model, "--like", "Q4_0", "-f", path, "--sensitivity", out("s.json")],
    ]
}

#[test]
fn every_reader_refuses_what_is_no_text_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let latin: Vec<u8> = sample().chars().map(|c| u8::try_from(u32::from(c)).unwrap_or(b'?')).collect();
    let nul = [sample().as_bytes(), b"\0\x01\x02"].concat();
    let gzip = [b"\x1f\x8b\x08\0", sample().as_bytes()].concat();
    for (name, bytes, expected) in [
        ("latin.txt", latin, "byte 5 (0xef, in line 1) is not valid UTF-8"),
        ("nul.txt", nul, "is NUL; this is binary data, no text"),
        ("text.txt.gz", gzip, "is gzip data, no text; unpack it first"),
        ("model.txt", std::fs::read(doclet()).unwrap(), "is a GGUF file, no text"),
    ] {
        let path = file(&folder, name, &bytes);
        for arguments in readers(&path, &folder) {
            let line = error_line(&run(&arguments));
            assert!(line.contains(name) && line.contains(expected), "{arguments:?}: {line}");
        }
    }
    assert!(common::files_in(folder.path()).iter().all(|name| name.contains("txt")), "an output was left");
}

#[test]
fn a_text_gives_the_same_tokens_in_every_encoding() {
    let folder = tempfile::tempdir().unwrap();
    let text = sample();
    let plain = file(&folder, "plain.txt", text.as_bytes());
    let expected = stdout_of(run(args!["tokenize", doclet(), "--ids", "-f", &plain]));
    for (name, bytes, said) in [
        ("marked.txt", [b"\xef\xbb\xbf", text.as_bytes()].concat(), "byte order mark"),
        ("le.txt", utf16(&text, true, true), "is UTF-16LE; decoded"),
        ("be.txt", utf16(&text, false, true), "is UTF-16BE; decoded"),
        ("bare-le.txt", utf16(&text, true, false), "warning: "),
        ("bare-be.txt", utf16(&text, false, false), "warning: "),
        ("cut.txt", [text.as_bytes(), &"é".as_bytes()[..1]].concat(), "middle of a character"),
    ] {
        let path = file(&folder, name, &bytes);
        let found = run(args!["tokenize", doclet(), "--ids", "-f", &path]);
        let stderr = String::from_utf8_lossy(&found.stderr).into_owned();
        assert!(stderr.lines().count() == 1 && stderr.contains(said) && stderr.contains(name), "{name}: {stderr}");
        assert_eq!(stdout_of(found), expected, "{name}");
    }
    let crlf = file(&folder, "crlf.txt", text.replace('\n', "\r\n").as_bytes());
    let found = run(args!["tokenize", doclet(), "--ids", "-f", &crlf]);
    let lines = text.lines().count();
    let note = format!("{}: lines end in CRLF ({lines} of them); the carriage returns are kept", crlf.display());
    assert!(String::from_utf8_lossy(&found.stderr).starts_with(&note), "{found:?}");
    assert_ne!(stdout_of(found), expected);
}

#[test]
fn figures_are_those_of_the_decoded_text() {
    let folder = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(data("golden/eval-sample.txt")).unwrap();
    let figures = |path: &Path| {
        let output = run(args!["eval", "ppl", doclet(), "-f", path, "-c", "64", "--chunks", "4", "--json"]);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        (json_of(output)["ppl"].as_f64().unwrap(), stderr)
    };
    let (expected, _) = figures(&data("golden/eval-sample.txt"));
    let (found, said) = figures(&file(&folder, "wide.txt", &utf16(&text, true, true)));
    assert!(found == expected && said.contains("wide.txt: is UTF-16LE; decoded"), "{found} {expected} {said}");
}

#[test]
fn stdin_is_read_like_a_file() {
    let ask = |bytes: &[u8]| {
        let mut child = lwq()
            .args(args!["tokenize", doclet(), "--ids"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(bytes).unwrap();
        child.wait_with_output().unwrap()
    };
    let expected = stdout_of(ask("naïve".as_bytes()));
    assert_eq!(stdout_of(ask(&utf16("naïve", true, true))), expected);
    assert_eq!(stdout_of(ask("\u{feff}naïve".as_bytes())), expected);
    let line = error_line(&ask(b"na\xefve"));
    assert!(line.starts_with("error: stdin: byte 2 (0xef, in line 1) is not valid UTF-8"), "{line}");
}

#[test]
fn tasks_are_read_in_every_encoding() {
    let folder = tempfile::tempdir().unwrap();
    let kinds = [
        ("hellaswag", "tasks/hellaswag.txt"),
        ("winogrande", "tasks/winogrande.csv"),
        ("multiple-choice", "tasks/multiple-choice.jsonl"),
    ];
    for (kind, name) in kinds {
        let text = std::fs::read_to_string(data(name)).unwrap();
        let results = |path: &Path| {
            let output = run_with(args!["eval", kind, doclet(), path, "--details", "--json"], &[]);
            let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
            (json_of(output)["results"].clone(), stderr)
        };
        let (expected, _) = results(&data(name));
        let extension = name.rsplit('.').next().unwrap();
        let variants = [
            (utf16(&text, true, true), "is UTF-16LE; decoded"),
            ([b"\xef\xbb\xbf", text.as_bytes()].concat(), "byte order mark"),
            (text.replace('\n', "\r\n").into_bytes(), "lines end in CRLF"),
        ];
        for (bytes, said) in variants {
            let (found, stderr) = results(&file(&folder, &format!("t.{extension}"), &bytes));
            assert!(found == expected && stderr.contains(said), "{kind} {said}: {stderr}");
        }
        let latin = text.replacen('e', "\u{1}", 1).bytes().map(|b| if b == 1 { 0xe9 } else { b }).collect::<Vec<_>>();
        let path = file(&folder, &format!("latin.{extension}"), &latin);
        let line = error_line(&run(args!["eval", kind, doclet(), &path]));
        assert!(line.contains("latin.") && line.contains("(0xe9, in line 1) is not valid UTF-8"), "{line}");
    }
    let packed = file(&folder, "t.bin", b"\x1f\x8b\x08\0 and so on");
    let line = error_line(&run(args!["eval", "multiple-choice", doclet(), &packed]));
    assert!(line.contains("t.bin: is gzip data"), "{line}");
    let mut binary = std::fs::read(data("tasks/multiple-choice.bin")).unwrap();
    let first = binary.windows(4).position(|bytes| bytes.iter().all(u8::is_ascii_alphabetic)).unwrap();
    binary[first] = 0xe9;
    let line = error_line(&run(args!["eval", "multiple-choice", doclet(), file(&folder, "m.bin", &binary)]));
    assert!(line.contains("task 1: the question is not valid UTF-8 at byte"), "{line}");
}

#[test]
fn plans_and_measurements_are_read_behind_a_mark_and_refused_in_utf16() {
    let folder = tempfile::tempdir().unwrap();
    let plan = stdout_of(run(args!["plan", doclet(), "--like", "Q4_0", "--method", "error"]));
    let marked = file(&folder, "marked.json", format!("\u{feff}{plan}").as_bytes());
    stdout_of(run(args!["quantize", doclet(), folder.path().join("q.gguf"), "--plan", &marked, "--dry-run"]));
    let wide = file(&folder, "wide.json", &utf16(&plan, true, true));
    for arguments in [args!["plan", "show", &wide], args!["plan", doclet(), "--like", "Q4_0", "--sensitivity", &wide]] {
        let line = error_line(&run_with(arguments, &["--quiet"]));
        assert!(line.contains("wide.json") && line.contains("is UTF-16LE; save it as UTF-8"), "{line}");
    }
}
