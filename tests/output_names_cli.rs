//! Names of outputs that say something else than what is written.

mod common;

use std::ffi::OsString;

use common::{args, data, doclet, run, stdout_of};

/// Runs a command that succeeds; its warnings about what a name says.
fn warnings(arguments: Vec<OsString>) -> Vec<String> {
    let output = run(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    stdout_of(output);
    let warnings = stderr.lines().filter_map(|line| line.strip_prefix("warning: "));
    warnings.filter(|line| line.contains(" says ")).map(str::to_owned).collect()
}

#[test]
fn a_quantized_file_with_a_name_of_something_else_is_warned_of() {
    let folder = tempfile::tempdir().unwrap();
    let named = |name: &str, more: &[&str]| {
        let mut arguments = args!["quantize", doclet(), folder.path().join(name)];
        arguments.extend(more.iter().map(OsString::from));
        warnings(arguments)
    };
    let target = |target| ["--target", target, "--dry-run"];
    for (name, more, says) in [
        ("m.safetensors", &target("Q4_0")[..], Some(".safetensors says that this is safetensors; the file is GGUF")),
        ("m.bin", &target("Q4_0"), Some(".bin says")),
        ("model-Q8_0.gguf", &target("Q4_0"), Some("the name says Q8_0; the file is Q4_0")),
        ("model-f16.gguf", &target("Q8_0"), Some("the name says F16; the file is Q8_0")),
        ("model-Q8_0.gguf", &target("COPY"), Some("the name says Q8_0; no tensor of the file has that type")),
        ("model-f16.gguf", &target("COPY"), None),
        ("model-Q4_0.gguf", &target("Q4_0"), None),
        ("doclet-f16-q4_0.gguf", &target("Q4_0"), None),
        ("m.gguf", &target("Q4_0"), None),
        ("model-Q8_0.gguf", &["--target", "Q4_0", "--dry-run", "--tensor-type", "attn_v=q8_0"], None),
        ("model-Q4_K_M.gguf", &["--like", "Q4_0", "--method", "error", "--dry-run"], None),
        ("model.bin", &["--like", "Q4_0", "--method", "error", "--dry-run"], Some(".bin says")),
    ] {
        let found = named(name, more);
        match says {
            Some(says) => assert!(found.len() == 1 && found[0].contains(says) && found[0].contains(name), "{found:?}"),
            None => assert!(found.is_empty(), "{name} {more:?}: {found:?}"),
        }
    }
    let several = named("files", &["--target", "Q4_0,Q8_0", "--dry-run"]);
    assert!(several.is_empty(), "{several:?}");
}

#[test]
fn an_importance_matrix_with_a_name_of_another_form_is_warned_of() {
    let folder = tempfile::tempdir().unwrap();
    let out = |name: &str| folder.path().join(name);
    let given = data("golden/doclet.imatrix.gguf");
    let collect = |name: &str| {
        args!["imatrix", doclet(), "-f", data("golden/calib-sample.txt"), "--chunks", "1", "-c", "64", "-o", out(name)]
    };
    let found = warnings(collect("imx.txt"));
    assert!(
        found.iter().any(|line| line.contains("imx.txt: .txt says that this is text; the file is GGUF")),
        "{found:?}"
    );
    assert!(warnings(collect("imx.gguf")).is_empty());
    for command in ["merge", "convert"] {
        let line = |name: &str, form: &str| {
            let output = out(&format!("{command}-{name}"));
            match command {
                "merge" => args!["imatrix", "merge", &given, "-o", output, "--format", form],
                _ => args!["imatrix", "convert", &given, output, "--format", form],
            }
        };
        let told = |name: &str, form: &str, says: &str| {
            let found = warnings(line(name, form));
            assert!(found.len() == usize::from(!says.is_empty()), "{name}: {found:?}");
            assert!(found.iter().all(|line| line.contains(says)), "{name}: {found:?}");
        };
        told("a.dat", "gguf", "says that this is an importance matrix in .dat form; the file is GGUF");
        told("a.bin", "gguf", "the file is GGUF");
        told("a.gguf", "dat", "says that this is GGUF; the file is an importance matrix in .dat form");
        told("b.dat", "dat", "");
        told("b.gguf", "gguf", "");
    }
}
