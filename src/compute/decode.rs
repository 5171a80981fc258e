//! Weights to floats: the decoder of each storage type, vectorized where that matters.

use crate::cpu::Level;
use crate::gguf::TensorType;
use crate::quant::{self, DequantizeFn};

/// Decodes whole blocks of one type; made only for levels that the CPU has.
#[derive(Clone, Copy)]
pub(super) struct Decoder(DequantizeFn);

impl Decoder {
    /// The fastest decoder of `ty` at or below `level`, or `None` when the type cannot be decoded.
    pub fn of(ty: TensorType, level: Level) -> Option<Decoder> {
        #[cfg(target_arch = "x86_64")]
        if let Some(decode) = x86_64::decoder(ty, level) {
            return Some(Decoder(decode));
        }
        let _ = level;
        quant::codec(ty).map(|codec| Decoder(codec.dequantize))
    }

    /// Decodes `src` into `dst`; both must be the same number of whole blocks.
    pub fn run(self, src: &[u8], dst: &mut [f32]) {
        (self.0)(src, dst);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use super::{DequantizeFn, Level, TensorType};
    use crate::quant::types::float::dequantize_f16;
    use std::arch::x86_64::*;

    pub(super) fn decoder(ty: TensorType, level: Level) -> Option<DequantizeFn> {
        if !level.is_available() || level < Level::Avx2 {
            return None;
        }
        match ty {
            TensorType::F16 => Some(decode_f16_checked),
            _ => None,
        }
    }

    fn decode_f16_checked(src: &[u8], dst: &mut [f32]) {
        assert!(Level::Avx2.is_available());
        // SAFETY: the level includes F16C.
        unsafe { decode_f16_avx2(src, dst) }
    }

    #[target_feature(enable = "avx2,f16c")]
    fn decode_f16_avx2(src: &[u8], dst: &mut [f32]) {
        let mut sources = src.chunks_exact(16);
        let mut targets = dst.chunks_exact_mut(8);
        for (target, source) in (&mut targets).zip(&mut sources) {
            // SAFETY: 16 bytes are read and 8 floats written.
            unsafe {
                let halves = _mm_loadu_si128(source.as_ptr().cast());
                _mm256_storeu_ps(target.as_mut_ptr(), _mm256_cvtph_ps(halves));
            }
        }
        dequantize_f16(sources.remainder(), targets.into_remainder());
    }
}
