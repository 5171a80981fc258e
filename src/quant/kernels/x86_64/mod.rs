//! AVX2 and AVX-512 code.

mod avx2;
mod avx512;
mod dequantize;
mod lattice;
mod look_up;
mod quantize;

use crate::cpu::Level;
use crate::gguf::TensorType;
use crate::quant::DequantizeFn;

pub(super) use quantize::quantizer;

/// The decoder of `ty` for `level`, which the CPU must have; `None` where scalar code does as well.
pub(super) fn dequantizer(ty: TensorType, level: Level) -> Option<DequantizeFn> {
    look_up::dequantizer(ty, level)
        .or_else(|| dequantize::dequantizer(ty, level))
        .or_else(|| lattice::dequantizer(ty, level))
}
