//! Advanced SIMD code. Decoders need none: the compiler makes vectors of the scalar ones, since every aarch64 CPU has
//! them.

mod neon;

use crate::cpu::{Level, Neon};
use crate::gguf::TensorType;
use crate::quant::QuantizeFn;
use crate::quant::kernels::wide;

/// The encoder of `ty` written for `level`.
pub(super) fn encoder(ty: TensorType, level: Level) -> Option<QuantizeFn> {
    match level {
        Level::Neon => quantizer_of_level(ty),
        _ => None,
    }
}

wide::encoders!(Neon, "neon");
