//! What the tests of the binary share.
#![allow(dead_code, unused_imports, unused_macros)] // each test file uses a part

#[path = "../../src/testing.rs"]
pub(crate) mod random;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use lwq::gguf::{Gguf, GgufLayout, Metadata, NewTensor, TensorType};
use serde_json::Value as Json;
use sha2::{Digest, Sha256};

/// The bundled model.
pub(crate) fn doclet() -> PathBuf {
    data("doclet-4m-f16.gguf")
}

/// The bundled model under a name of its own, so that nothing is written beside the one of the repository.
pub(crate) fn model_in(folder: &Path) -> PathBuf {
    let path = folder.join("m.gguf");
    std::fs::copy(doclet(), &path).unwrap();
    path
}

/// A file below tests/data.
pub(crate) fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

/// A command line of strings and paths.
macro_rules! args {
    ($($argument:expr),* $(,)?) => { vec![$(std::ffi::OsString::from($argument)),*] };
}
pub(crate) use args;

/// The binary, ready for arguments.
pub(crate) fn lwq() -> Command {
    Command::new(env!("CARGO_BIN_EXE_lwq"))
}

/// Runs a command line, given as separate arguments.
pub(crate) fn run<S: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = S>) -> Output {
    lwq().args(arguments).output().expect("the binary starts")
}

/// Runs a command line with more arguments at its end.
pub(crate) fn run_with(mut arguments: Vec<OsString>, more: &[&str]) -> Output {
    arguments.extend(more.iter().map(OsString::from));
    run(arguments)
}

/// Waits until `ready` says that `child` has got as far as a test wants it; the child must still be at work then.
#[track_caller]
pub(crate) fn wait_for_work(child: &mut Child, mut ready: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !ready() {
        assert_at_work(child);
        assert!(Instant::now() < deadline, "the run has not got to work");
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_at_work(child);
}

/// Asserts that a run has not ended by itself: then what a test does to it would prove nothing.
#[track_caller]
pub(crate) fn assert_at_work(child: &mut Child) {
    assert_eq!(child.try_wait().expect("the child can be asked"), None, "the run ended by itself; give it more to do");
}

/// Sends a signal to a run at work and waits for the end, which must be the one that the signal brings.
#[cfg(unix)]
#[track_caller]
pub(crate) fn interrupt(mut child: Child, signal: i32) -> Output {
    use std::os::unix::process::ExitStatusExt;
    assert_at_work(&mut child);
    // SAFETY: kill(2) on a child that has not been waited for yet.
    assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
    let output = child.wait_with_output().expect("the child can be waited for");
    match signal {
        libc::SIGKILL => assert_eq!(output.status.signal(), Some(signal)),
        _ => assert_eq!(output.status.code(), Some(128 + signal), "{output:?}"),
    }
    output
}

/// Asserts success and returns the JSON on stdout.
#[track_caller]
pub(crate) fn json_of(output: Output) -> Json {
    serde_json::from_str(&stdout_of(output)).expect("stdout is JSON")
}

/// Asserts success and returns stdout.
#[track_caller]
pub(crate) fn stdout_of(output: Output) -> String {
    assert!(output.status.success(), "{}\nstderr: {}", output.status, String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("stdout is UTF-8")
}

/// What a run said beside its results.
pub(crate) fn stderr_of(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Asserts a failure with exit code 1 and exactly one error line on stderr; returns that line.
#[track_caller]
pub(crate) fn error_line(output: &Output) -> String {
    let stderr = stderr_of(output);
    assert_eq!(output.status.code(), Some(1), "stderr: {stderr}");
    // A run that takes long says how far it is before it fails.
    let progress = |line: &str| line.split_once(": ").is_some_and(|(_, rest)| rest.contains("%, "));
    let errors: Vec<&str> = stderr.lines().filter(|line| !line.starts_with("warning: ") && !progress(line)).collect();
    assert_eq!(errors.len(), 1, "one error line expected: {stderr}");
    assert!(errors[0].starts_with("error: "), "{stderr}");
    errors[0].to_string()
}

/// Names in a folder, sorted.
pub(crate) fn files_in(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("folder is readable");
    let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Digest of a file's tensors, independent of their order and of the metadata: SHA-256 over the sorted lines
/// `name type_id ne0xne1.. sha256(data)`.
pub(crate) fn tensor_digest(path: &Path) -> String {
    let gguf = Gguf::open(path).expect("output opens");
    let mut lines: Vec<String> = gguf
        .tensors()
        .iter()
        .map(|tensor| {
            // Of a row that is a vector llama-quantize drops the second dimension.
            let dims = tensor.shape.iter().rposition(|&dim| dim != 1).map_or(1, |last| last + 1);
            let shape: Vec<String> = tensor.shape.iter().take(dims).map(u64::to_string).collect();
            let data = hex(&Sha256::digest(gguf.data(tensor).expect("data is readable")));
            format!("{} {} {} {data}\n", tensor.name, tensor.ty.0, shape.join("x"))
        })
        .collect();
    lines.sort();
    hex(&Sha256::digest(lines.concat()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A llama-like model of `blocks` blocks whose F32 weights are all zero, so that the file is sparse on disk:
/// `rows x row_len` weights in each of two tensors per block.
pub(crate) fn sparse_model(path: &Path, blocks: u32, row_len: u64, rows: u64) {
    let mut metadata = Metadata::new(path.display().to_string());
    metadata.set("general.architecture", "llama");
    metadata.set("llama.block_count", blocks);
    metadata.set("llama.embedding_length", row_len as u32);
    metadata.set("llama.attention.head_count", 8u32);
    metadata.set("llama.attention.head_count_kv", 8u32);
    let mut tensors = Vec::new();
    for block in 0..blocks {
        for role in ["ffn_down", "ffn_up"] {
            let name = format!("blk.{block}.{role}.weight");
            tensors.push(NewTensor { name, shape: vec![row_len, rows], ty: TensorType::F32 });
        }
    }
    let layout = GgufLayout::new("sparse", &metadata, tensors).unwrap();
    let file = std::fs::File::create(path).unwrap();
    file.set_len(layout.file_bytes()).unwrap();
    layout.write_header_at(&file).unwrap();
}
