#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lwq_fuzz::imatrix_gguf(bytes));
