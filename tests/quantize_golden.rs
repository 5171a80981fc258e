//! The binary's output for the bundled model equals llama-quantize's (b10605), tensor by tensor, for every target
//! with and without importance.

mod common;

use common::{args, data, doclet, error_line, run, stdout_of, tensor_digest};
use lwq::gguf::Gguf;
use serde_json::Value;

#[test]
fn every_target_has_the_bytes_of_llama_quantize() {
    let text = std::fs::read_to_string(data("golden/doclet-quantize.json")).unwrap();
    let golden: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(tensor_digest(&doclet()), golden["source"].as_str().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let (mut agreed, mut refused, mut wrong) = (0, 0, Vec::new());
    for (name, expected) in golden["targets"].as_object().unwrap() {
        let (target, with_imatrix) = match name.strip_suffix("+imatrix") {
            Some(target) => (target, true),
            None => (name.as_str(), false),
        };
        let output = dir.path().join(format!("{name}.gguf"));
        let mut arguments = args!["quantize", doclet(), &output, "--target", target];
        if with_imatrix {
            arguments.extend(args!["--imatrix", data("golden/doclet.imatrix.gguf")]);
        }
        let outcome = run(arguments);
        if expected.get("refused").is_some() {
            assert!(error_line(&outcome).contains("needs an importance matrix"));
            assert!(!output.exists());
            refused += 1;
            continue;
        }
        stdout_of(outcome);
        let gguf = Gguf::open(&output).unwrap();
        let bytes: u64 = gguf.tensors().iter().map(|tensor| tensor.bytes.unwrap()).sum();
        if tensor_digest(&output) == expected["digest"] && bytes == expected["tensor_bytes"] {
            agreed += 1;
        } else {
            wrong.push(name.clone());
        }
    }
    assert!(wrong.is_empty(), "these differ: {wrong:?}");
    assert_eq!(agreed + refused, golden["targets"].as_object().unwrap().len());
    assert!(agreed > 60, "only {agreed} targets were compared");
}
