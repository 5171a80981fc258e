//! Encoders: the text of [`wide`] compiled for each instruction set.

use crate::cpu::Level;
use crate::gguf::TensorType;
use crate::quant::QuantizeFn;
use crate::quant::kernels::wide;

/// The encoder of `ty` written for `level`.
pub(in crate::quant::kernels) fn encoder(ty: TensorType, level: Level) -> Option<QuantizeFn> {
    // Plain loops that the compiler makes slower code of when it may use AVX-512.
    let better_with_avx2 = matches!(ty, TensorType::TQ1_0 | TensorType::TQ2_0 | TensorType::MXFP4 | TensorType::NVFP4);
    match level {
        Level::Avx2 => avx2::quantizer_of_level(ty),
        Level::Avx512 if !better_with_avx2 => avx512::quantizer_of_level(ty),
        _ => None,
    }
}

mod avx2 {
    use super::*;
    use crate::cpu::Avx2;

    wide::encoders!(Avx2, "avx2,f16c");
}

mod avx512 {
    use super::*;
    use crate::cpu::Avx512;

    wide::encoders!(Avx512, "avx2,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl");
}
