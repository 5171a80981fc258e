//! Decoders of the lattice types: runs of 16 weights, taken apart as the scalar decoders do, to floats by whole
//! vectors.

use std::arch::x86_64::*;

use crate::cpu::{Avx2, Avx512};
use crate::gguf::TensorType;
use crate::quant::DequantizeFn;
use crate::quant::types::runs::{ShiftedRun, SignedRun};
use crate::quant::types::{decode_blocks, iq1, iq2, iq3};

/// The decoders of one level; `store_signed` and `store_shifted` of the module around it turn runs into floats.
macro_rules! decoders {
    ($feature:literal, $isa:ident, $($ty:ident = $name:ident: $block:literal bytes, $runs:path, $store:ident;)*) => {
        /// The decoder of `ty` written for this level.
        pub(in crate::quant::kernels::x86_64) fn decoder(ty: TensorType) -> Option<DequantizeFn> {
            match ty {
                $(TensorType::$ty => Some(|src, dst| {
                    $isa::new().expect("the level was available when this decoder was chosen");
                    // SAFETY: the proof is of every feature that the function is compiled with.
                    unsafe { $name(src, dst) }
                }),)*
                _ => None,
            }
        }

        $(
            #[target_feature(enable = $feature)]
            fn $name(src: &[u8], dst: &mut [f32]) {
                decode_blocks(src, dst, |block: &[u8; $block], out: &mut [f32; 256]| {
                    let (out, _) = out.as_chunks_mut();
                    $runs(block, |n, run| $store(run, &mut out[n]));
                });
            }
        )*
    };
    ($feature:literal, $isa:ident; $($others:tt)*) => {
        decoders! {
            $feature, $isa,
            $($others)*
            IQ2_XXS = iq2_xxs: 66 bytes, iq2::runs_xxs, store_signed;
            IQ2_XS = iq2_xs: 74 bytes, iq2::runs_xs, store_signed;
            IQ2_S = iq2_s: 82 bytes, iq2::runs_s, store_signed;
            IQ3_XXS = iq3_xxs: 98 bytes, iq3::runs_xxs, store_signed;
            IQ3_S = iq3_s: 110 bytes, iq3::runs_s, store_signed;
        }
    };
}

pub(super) mod avx2 {
    use super::*;

    decoders! {
        "avx2,f16c", Avx2;
        IQ1_S = iq1_s: 50 bytes, iq1::runs_s, store_shifted;
        IQ1_M = iq1_m: 56 bytes, iq1::runs_m, store_shifted;
    }

    /// [`SignedRun::store`].
    #[inline]
    #[target_feature(enable = "avx2")]
    fn store_signed(run: SignedRun, out: &mut [f32; 16]) {
        // Shifts that bring the sign of lane i to the top.
        let to_top = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
        let scale = _mm256_set1_ps(run.scale);
        let signs = i32::from(run.signs);
        for (k, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let magnitudes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(run.magnitudes[k] as i64));
            let values = _mm256_mul_ps(scale, _mm256_cvtepi32_ps(magnitudes));
            let signs = _mm256_sllv_epi32(_mm256_set1_epi32(signs >> (8 * k)), to_top);
            let minus = _mm256_and_ps(_mm256_castsi256_ps(signs), _mm256_set1_ps(-0.0));
            // SAFETY: eight floats are written to an array of eight.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), _mm256_xor_ps(values, minus)) }
        }
    }

    /// [`ShiftedRun::store`].
    #[inline]
    #[target_feature(enable = "avx2")]
    fn store_shifted(run: ShiftedRun, out: &mut [f32; 16]) {
        let scale = _mm256_set1_ps(run.scale);
        for (k, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let values = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(run.values[k] as i64)));
            let values = _mm256_mul_ps(scale, _mm256_add_ps(values, _mm256_set1_ps(run.shifts[k])));
            // SAFETY: eight floats are written to an array of eight.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), values) }
        }
    }
}

pub(super) mod avx512 {
    use super::*;

    // Those of IQ1 look weights up (`look_up`).
    decoders! { "avx2,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl", Avx512; }

    /// [`SignedRun::store`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    fn store_signed(run: SignedRun, out: &mut [f32; 16]) {
        let magnitudes = _mm512_cvtepu8_epi32(bytes(run.magnitudes));
        let values = _mm512_mul_ps(_mm512_set1_ps(run.scale), _mm512_cvtepi32_ps(magnitudes));
        let values = _mm512_mask_xor_ps(values, run.signs, values, _mm512_set1_ps(-0.0));
        // SAFETY: sixteen floats are written to an array of sixteen.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), values) }
    }

    /// Two times eight bytes as one vector.
    #[inline]
    #[target_feature(enable = "sse2")]
    fn bytes(parts: [u64; 2]) -> __m128i {
        _mm_set_epi64x(parts[1] as i64, parts[0] as i64)
    }
}
