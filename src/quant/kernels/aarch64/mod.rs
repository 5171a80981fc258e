//! Advanced SIMD code. Decoders need none: the compiler makes vectors of the scalar ones, since every aarch64 CPU has
//! them.

mod neon;

use crate::cpu::Level;
use crate::gguf::TensorType;
use crate::quant::QuantizeFn;
use crate::quant::kernels::wide;
use neon::Neon;

/// The encoder of `ty` for `level`, which the CPU must have; `None` where scalar code does as well.
pub(super) fn quantizer(ty: TensorType, level: Level) -> Option<QuantizeFn> {
    if level >= Level::Neon && Level::Neon.is_available() { quantizer_of_level(ty) } else { None }
}

wide::encoders!(Neon, "neon");
