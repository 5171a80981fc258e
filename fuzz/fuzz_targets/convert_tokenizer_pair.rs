#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lwq_fuzz::convert_tokenizer_pair(bytes));
