#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lwq_fuzz::convert_checkpoint(bytes));
