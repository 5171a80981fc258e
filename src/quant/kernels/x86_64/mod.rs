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

pub(super) use quantize::encoder;

/// The decoder of `ty` written for `level`.
pub(super) fn decoder(ty: TensorType, level: Level) -> Option<DequantizeFn> {
    match level {
        Level::Avx2 => dequantize::avx2::decoder(ty).or_else(|| lattice::avx2::decoder(ty)),
        Level::Avx512 => {
            look_up::decoder(ty).or_else(|| dequantize::avx512::decoder(ty)).or_else(|| lattice::avx512::decoder(ty))
        }
        _ => None,
    }
}
