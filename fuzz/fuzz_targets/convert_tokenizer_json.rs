//! Any bytes as tokenizer.json: a pre-tokenizer that the tokenizer knows, or none, never a panic.

#![no_main]

use libfuzzer_sys::fuzz_target;
use lwq::convert::fuzzing;
use lwq::tokenizer::pretokenize::known_names;

fuzz_target!(|bytes: &[u8]| {
    if let Some(name) = fuzzing::tokenizer_json(bytes) {
        assert!(known_names().any(|known| known == name));
    }
});
