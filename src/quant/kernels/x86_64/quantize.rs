//! Encoders: the text of [`wide`] compiled for each instruction set, and scalar functions compiled again with vectors
//! allowed, for types where that pays.

use super::avx2::Avx2;
use super::avx512::Avx512;
use crate::cpu::Level;
use crate::gguf::TensorType;
use crate::quant::QuantizeFn;
use crate::quant::kernels::wide::k_quants;
use crate::quant::types::iq1;

/// The encoder of `ty` for `level`, which the CPU must have; `None` where scalar code does as well.
pub(in crate::quant::kernels) fn quantizer(ty: TensorType, level: Level) -> Option<QuantizeFn> {
    if level >= Level::Avx512 && Level::Avx512.is_available() {
        avx512::quantizer(ty)
    } else if level >= Level::Avx2 && Level::Avx2.is_available() {
        avx2::quantizer(ty)
    } else {
        None
    }
}

/// The encoders of one level.
macro_rules! encoders {
    ($isa:ident, $feature:literal) => {
        encoders! {
            $isa, $feature,
            Q2_K = q2_k: k_quants::q2_k;
            Q3_K = q3_k: k_quants::q3_k;
            Q4_K = q4_k: k_quants::q4_k;
            Q5_K = q5_k: k_quants::q5_k;
            Q6_K = q6_k: k_quants::q6_k;
            IQ1_M = iq1_m: recompiled_iq1_m;
        }
    };
    ($isa:ident, $feature:literal, $($ty:ident = $name:ident: $encode:path;)*) => {
        pub(super) fn quantizer(ty: TensorType) -> Option<QuantizeFn> {
            match ty {
                $(TensorType::$ty => Some(|src, row_len, importance, dst| {
                    let isa = $isa::new().expect("the level was available when this encoder was chosen");
                    // SAFETY: the value proves that the CPU has the features.
                    unsafe { $name(isa, src, row_len, importance, dst) }
                }),)*
                _ => None,
            }
        }

        $(
            #[target_feature(enable = $feature)]
            fn $name(isa: $isa, src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]) {
                $encode(isa, src, row_len, importance, dst);
            }
        )*
    };
}

/// Loops over arrays of fixed size, which the compiler turns into vector code; it neither reorders nor contracts float
/// operations, so the bytes cannot differ.
#[inline(always)]
fn recompiled_iq1_m<I>(_isa: I, src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]) {
    iq1::quantize_iq1_m(src, row_len, importance, dst);
}

mod avx2 {
    use super::*;

    encoders!(Avx2, "avx2,f16c");
}

mod avx512 {
    use super::*;

    encoders!(Avx512, "avx2,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl");
}
