//! AVX2 and AVX-512 code.

mod dequantize;

pub(super) use dequantize::dequantizer;
