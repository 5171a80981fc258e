//! Encoders: the text of [`wide`] compiled for each instruction set.

use crate::cpu::Level;
use crate::gguf::TensorType;
use crate::quant::QuantizeFn;
use crate::quant::kernels::wide;

/// The encoder of `ty` for `level`, which the CPU must have; `None` where scalar code does as well.
pub(in crate::quant::kernels) fn quantizer(ty: TensorType, level: Level) -> Option<QuantizeFn> {
    // Plain loops that the compiler makes slower code of when it may use AVX-512.
    let better_with_avx2 = matches!(ty, TensorType::TQ1_0 | TensorType::TQ2_0 | TensorType::MXFP4 | TensorType::NVFP4);
    if level >= Level::Avx512 && Level::Avx512.is_available() && !better_with_avx2 {
        avx512::quantizer_of_level(ty)
    } else if level >= Level::Avx2 && Level::Avx2.is_available() {
        avx2::quantizer_of_level(ty)
    } else {
        None
    }
}

mod avx2 {
    use super::super::avx2::Avx2;
    use super::*;

    wide::encoders!(Avx2, "avx2,f16c");
}

mod avx512 {
    use super::super::avx512::Avx512;
    use super::*;

    wide::encoders!(Avx512, "avx2,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl");
}
