//! Encoders: the scalar functions compiled again with AVX2 allowed, for types where that pays.
//!
//! They are loops over arrays of fixed size, which the compiler turns into vector code; it neither reorders nor
//! contracts float operations, so the bytes cannot differ. It makes nothing better of them when allowed AVX-512. The
//! other IQ encoders gain nothing from this: they wait for sums in order or for table look-ups.

use crate::cpu::Level;
use crate::gguf::TensorType;
use crate::quant::QuantizeFn;
use crate::quant::types::iq1;

macro_rules! encoders {
    ($($ty:ident = $name:ident: $scalar:path;)*) => {
        /// The encoder of `ty` for `level`, which the CPU must have; `None` where scalar code does as well.
        pub(in crate::quant::kernels) fn quantizer(ty: TensorType, level: Level) -> Option<QuantizeFn> {
            if level < Level::Avx2 || !Level::Avx2.is_available() {
                return None;
            }
            match ty {
                $(TensorType::$ty => Some(|src, row_len, importance, dst| {
                    assert!(Level::Avx2.is_available());
                    // SAFETY: the level, just checked, has every feature that the function is compiled with.
                    unsafe { $name(src, row_len, importance, dst) }
                }),)*
                _ => None,
            }
        }

        $(
            #[target_feature(enable = "avx2,f16c")]
            fn $name(src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]) {
                $scalar(src, row_len, importance, dst);
            }
        )*
    };
}

encoders! {
    IQ1_M = iq1_m: iq1::quantize_iq1_m;
}
