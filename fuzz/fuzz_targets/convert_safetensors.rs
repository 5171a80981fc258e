//! Any bytes as a safetensors file: refused or read, never a panic, never more memory than the file explains.

#![no_main]

use libfuzzer_sys::fuzz_target;
use lwq::convert::fuzzing;

fuzz_target!(|bytes: &[u8]| {
    if fuzzing::safetensors(bytes) {
        // A sound header must also survive on disk, with every tensor inside the file.
        let path = std::env::temp_dir().join(format!("lwq-fuzz-{}.safetensors", std::process::id()));
        std::fs::write(&path, bytes).expect("the temporary folder is writable");
        assert!(fuzzing::safetensors_file(&path));
    }
});
