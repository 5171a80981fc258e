//! Decoders: levels as bytes by AVX2, 32 weights at a time, then to floats by whole vectors of the level.
//!
//! Every weight is one conversion, one product and at most one sum, each rounded as the scalar decoders round
//! theirs: no fused multiply-add.

use crate::cpu::{Avx2, Avx512};
use crate::gguf::TensorType;
use crate::quant::DequantizeFn;
use crate::quant::types::affine_k;
use crate::quant::types::float::dequantize_f16;
use crate::quant::types::{fp4, get_f16, iq4, q3_k, ternary};
use std::arch::x86_64::*;

/// 16 bytes of nibbles as 32 bytes: low nibbles first, then high ones.
#[inline]
#[target_feature(enable = "avx2")]
fn nibbles_of_16(bytes: &[u8; 16]) -> __m256i {
    // SAFETY: 16 bytes are read.
    let bytes = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
    let both = _mm256_set_m128i(_mm_srli_epi16::<4>(bytes), bytes);
    _mm256_and_si256(both, _mm256_set1_epi8(0x0f))
}

/// The levels that nibbles stand for, by a table of 16.
#[inline]
#[target_feature(enable = "avx2")]
fn look_up(table: &[i8; 16], nibbles: __m256i) -> __m256i {
    // SAFETY: 16 bytes are read.
    let table = unsafe { _mm_loadu_si128(table.as_ptr().cast()) };
    _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), nibbles)
}

/// Byte i is 16 where bit i is set, else 0.
#[inline]
#[target_feature(enable = "avx2")]
fn fifth_bits(bits: [u8; 4]) -> __m256i {
    let spread = _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
    let bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(i32::from_le_bytes(bits)), spread);
    let mask = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
    let set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, mask), mask);
    _mm256_and_si256(set, _mm256_set1_epi8(16))
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_32(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: 32 bytes are read.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// `value << bit` where bit `index` of the byte is set, else 0.
#[inline]
#[target_feature(enable = "avx2")]
fn plane(bytes: __m256i, index: usize, value: i8) -> __m256i {
    let mask = _mm256_set1_epi8((1u8 << index) as i8);
    let set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, mask), mask);
    _mm256_and_si256(set, _mm256_set1_epi8(value))
}

/// Bits `shift` and above of each byte, `mask` of them; `shift` below 8.
#[inline]
#[target_feature(enable = "avx2")]
fn field(bytes: __m256i, shift: usize, mask: i8) -> __m256i {
    let shifted = _mm256_srl_epi16(bytes, _mm_cvtsi64_si128(shift as i64));
    _mm256_and_si256(shifted, _mm256_set1_epi8(mask))
}

/// The bytes of a TQ1_0 block with as many leading trits removed as have been decoded before: entry `c` begins with
/// the trits of weights `32 c..32 c + 32`.
#[inline]
#[target_feature(enable = "avx2")]
fn trit_fractions(block: &[u8; 54]) -> [[u8; 32]; 8] {
    const POWERS: [u8; 5] = [1, 3, 9, 27, 81];
    let mut fractions = [[0; 32]; 8];
    for (fractions, power) in fractions.iter_mut().zip(POWERS) {
        *fractions = std::array::from_fn(|m| block[m].wrapping_mul(power));
    }
    let (bytes, last) = (&block[32..48], &block[48..52]);
    let sixteen = |n: usize, m: usize| bytes[m].wrapping_mul(POWERS[n]);
    for (c, fractions) in fractions[5..7].iter_mut().enumerate() {
        *fractions = std::array::from_fn(|i| sixteen(2 * c + i / 16, i % 16));
    }
    fractions[7] =
        std::array::from_fn(|i| if i < 16 { sixteen(4, i) } else { last[i % 4].wrapping_mul(POWERS[i % 16 / 4]) });
    fractions
}

/// Two times eight bytes as nibbles: of each eight the low nibbles, then the high ones.
#[inline]
#[target_feature(enable = "avx2")]
fn nibbles_of_two_8(bytes: &[u8; 16]) -> __m256i {
    // SAFETY: sixteen bytes are read.
    let bytes = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
    let low = _mm_and_si128(bytes, _mm_set1_epi8(0x0f));
    let high = _mm_and_si128(_mm_srli_epi16::<4>(bytes), _mm_set1_epi8(0x0f));
    _mm256_set_m128i(_mm_unpackhi_epi64(low, high), _mm_unpacklo_epi64(low, high))
}

/// Eight bytes as 32 pairs of bits, lowest first.
#[inline]
#[target_feature(enable = "avx2")]
fn pairs_of_8(bytes: &[u8; 8]) -> __m256i {
    let fourfold = _mm256_setr_epi8(
        0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7,
    );
    let bytes = _mm256_shuffle_epi8(_mm256_set1_epi64x(i64::from_le_bytes(*bytes)), fourfold);
    // The four copies of a byte are one 32-bit number; of copy n, bits 2 n and 2 n + 1 are wanted.
    let mut pairs = _mm256_and_si256(bytes, _mm256_set1_epi32(0x03));
    let second = _mm256_and_si256(_mm256_srli_epi32::<2>(bytes), _mm256_set1_epi32(0x03 << 8));
    let third = _mm256_and_si256(_mm256_srli_epi32::<4>(bytes), _mm256_set1_epi32(0x03 << 16));
    let fourth = _mm256_and_si256(_mm256_srli_epi32::<6>(bytes), _mm256_set1_epi32(0x03 << 24));
    pairs = _mm256_or_si256(pairs, second);
    _mm256_or_si256(pairs, _mm256_or_si256(third, fourth))
}

/// `(3 * byte >> 8) - 1` for each byte: the trit that a fraction of 256 begins with.
#[inline]
#[target_feature(enable = "avx2")]
fn first_trits(fractions: __m256i) -> __m256i {
    let at_least = |bound: u8| {
        let bound = _mm256_set1_epi8(bound as i8);
        _mm256_cmpeq_epi8(_mm256_max_epu8(fractions, bound), fractions)
    };
    // Each comparison that holds is -1.
    _mm256_sub_epi8(_mm256_sub_epi8(_mm256_set1_epi8(-1), at_least(86)), at_least(171))
}

/// The decoders that both levels have. `store` of the module around it writes 32 signed bytes as `level * scale (+ offset)`, with the first scale and
/// offset for the first 16 weights and the second for the rest.
macro_rules! decoders {
    ($feature:literal, $isa:ident, $others:expr) => {
        /// The decoder of `ty` written for this level.
        pub(in crate::quant::kernels::x86_64) fn decoder(ty: TensorType) -> Option<DequantizeFn> {
            match ty {
                TensorType::F16 => Some(|src, dst| checked(src, dst, f16)),
                TensorType::Q2_K => Some(|src, dst| checked(src, dst, q2_k)),
                TensorType::Q3_K => Some(|src, dst| checked(src, dst, q3_k)),
                TensorType::Q6_K => Some(|src, dst| checked(src, dst, q6_k)),
                TensorType::IQ4_NL => Some(|src, dst| checked(src, dst, iq4_nl)),
                TensorType::IQ4_XS => Some(|src, dst| checked(src, dst, iq4_xs)),
                TensorType::TQ2_0 => Some(|src, dst| checked(src, dst, tq2_0)),
                TensorType::MXFP4 => Some(|src, dst| checked(src, dst, mxfp4)),
                TensorType::NVFP4 => Some(|src, dst| checked(src, dst, nvfp4)),
                TensorType::Q2_0 => Some(|src, dst| checked(src, dst, q2_0)),
                ty => $others(ty),
            }
        }

        #[inline]
        fn checked(src: &[u8], dst: &mut [f32], decode: unsafe fn(&[u8], &mut [f32])) {
            $isa::new().expect("the level was available when this decoder was chosen");
            // SAFETY: the proof is of the features of every decoder here, and they need no more.
            unsafe { decode(src, dst) }
        }

        #[target_feature(enable = $feature)]
        fn q2_k(src: &[u8], dst: &mut [f32]) {
            for (block, x) in src.as_chunks::<84>().0.iter().zip(dst.as_chunks_mut::<256>().0) {
                let (d, dmin) = (get_f16(block, 80), get_f16(block, 82));
                let planes = block[16..80].as_chunks().0;
                for (j, x) in x.as_chunks_mut().0.iter_mut().enumerate() {
                    let codes = [block[2 * j], block[2 * j + 1]];
                    let scales = codes.map(|code| d * f32::from(code & 0x0f));
                    let offsets = codes.map(|code| -(dmin * f32::from(code >> 4)));
                    store(field(load_32(&planes[j / 4]), j % 4 * 2, 3), scales, Some(offsets), x);
                }
            }
        }

        #[target_feature(enable = $feature)]
        fn q3_k(src: &[u8], dst: &mut [f32]) {
            for (block, x) in src.as_chunks::<110>().0.iter().zip(dst.as_chunks_mut::<256>().0) {
                let d = get_f16(block, 108);
                let scales = q3_k::unpack_scales(&block[96..108]);
                let [high, planes @ ..] = block[..96].as_chunks().0 else { continue };
                let high = load_32(high);
                for (j, x) in x.as_chunks_mut().0.iter_mut().enumerate() {
                    let levels = _mm256_or_si256(field(load_32(&planes[j / 4]), j % 4 * 2, 3), plane(high, j, 4));
                    let scales = [2 * j, 2 * j + 1].map(|group| d * f32::from(scales[group]));
                    store(_mm256_sub_epi8(levels, _mm256_set1_epi8(4)), scales, None, x);
                }
            }
        }

        #[target_feature(enable = $feature)]
        fn q6_k(src: &[u8], dst: &mut [f32]) {
            for (block, x) in src.as_chunks::<210>().0.iter().zip(dst.as_chunks_mut::<256>().0) {
                let d = get_f16(block, 208);
                let (low, high) = (block[..128].as_chunks().0, block[128..192].as_chunks().0);
                for (j, x) in x.as_chunks_mut().0.iter_mut().enumerate() {
                    let (half, quarter) = (j / 4, j % 4);
                    let low = field(load_32(&low[half * 2 + quarter % 2]), quarter / 2 * 4, 0x0f);
                    let high = _mm256_slli_epi16::<4>(field(load_32(&high[half]), quarter * 2, 3));
                    let levels = _mm256_sub_epi8(_mm256_or_si256(low, high), _mm256_set1_epi8(32));
                    let scales = [2 * j, 2 * j + 1].map(|group| d * f32::from(block[192 + group] as i8));
                    store(levels, scales, None, x);
                }
            }
        }

        #[target_feature(enable = $feature)]
        fn iq4_nl(src: &[u8], dst: &mut [f32]) {
            for ([d0, d1, codes @ ..], x) in src.as_chunks::<18>().0.iter().zip(dst.as_chunks_mut().0) {
                let levels = look_up(&iq4::VALUES, nibbles_of_16(codes));
                store(levels, [get_f16(&[*d0, *d1], 0); 2], None, x);
            }
        }

        #[target_feature(enable = $feature)]
        fn iq4_xs(src: &[u8], dst: &mut [f32]) {
            for (block, x) in src.as_chunks::<136>().0.iter().zip(dst.as_chunks_mut::<256>().0) {
                let d = get_f16(block, 0);
                let high = u16::from_le_bytes([block[2], block[3]]);
                let codes = block[8..].as_chunks().0;
                for (g, x) in x.as_chunks_mut().0.iter_mut().enumerate() {
                    let low = (block[4 + g / 2] >> (g % 2 * 4)) & 0x0f;
                    let code = i32::from(low) | i32::from((high >> (2 * g)) & 3) << 4;
                    let scale = d * (code - 32) as f32;
                    store(look_up(&iq4::VALUES, nibbles_of_16(&codes[g])), [scale; 2], None, x);
                }
            }
        }

        #[target_feature(enable = $feature)]
        fn tq2_0(src: &[u8], dst: &mut [f32]) {
            for (block, x) in src.as_chunks::<66>().0.iter().zip(dst.as_chunks_mut::<256>().0) {
                let d = get_f16(block, ternary::TQ2_0_D);
                let planes = block[..64].as_chunks().0;
                for (j, x) in x.as_chunks_mut().0.iter_mut().enumerate() {
                    let levels = field(load_32(&planes[j / 4]), j % 4 * 2, 3);
                    store(_mm256_sub_epi8(levels, _mm256_set1_epi8(1)), [d; 2], None, x);
                }
            }
        }

        #[target_feature(enable = $feature)]
        fn nvfp4(src: &[u8], dst: &mut [f32]) {
            for ([s0, s1, s2, s3, codes @ ..], x) in src.as_chunks::<36>().0.iter().zip(dst.as_chunks_mut::<64>().0) {
                let scales = [[*s0, *s1], [*s2, *s3]];
                for ((codes, scales), x) in codes.as_chunks().0.iter().zip(scales).zip(x.as_chunks_mut().0) {
                    let levels = look_up(&fp4::DOUBLED, nibbles_of_two_8(codes));
                    store(levels, scales.map(fp4::ue4m3_half), None, x);
                }
            }
        }

        #[target_feature(enable = $feature)]
        fn q2_0(src: &[u8], dst: &mut [f32]) {
            for ([d0, d1, codes @ ..], x) in src.as_chunks::<18>().0.iter().zip(dst.as_chunks_mut::<64>().0) {
                let scales = [get_f16(&[*d0, *d1], 0); 2];
                for (codes, x) in codes.as_chunks().0.iter().zip(x.as_chunks_mut().0) {
                    store(_mm256_sub_epi8(pairs_of_8(codes), _mm256_set1_epi8(1)), scales, None, x);
                }
            }
        }

        #[target_feature(enable = $feature)]
        fn mxfp4(src: &[u8], dst: &mut [f32]) {
            for ([exponent, codes @ ..], x) in src.as_chunks::<17>().0.iter().zip(dst.as_chunks_mut().0) {
                let levels = look_up(&fp4::DOUBLED, nibbles_of_16(codes));
                store(levels, [fp4::e8m0_half(*exponent); 2], None, x);
            }
        }
    };
}

pub(super) mod avx2 {
    use super::*;

    decoders!("avx2,f16c", Avx2, alone);

    /// Types that AVX-512 looks up instead (`look_up`).
    fn alone(ty: TensorType) -> Option<DequantizeFn> {
        match ty {
            TensorType::Q4_0 => Some(|src, dst| checked(src, dst, q4_0)),
            TensorType::Q4_1 => Some(|src, dst| checked(src, dst, q4_1)),
            TensorType::Q5_0 => Some(|src, dst| checked(src, dst, q5_0)),
            TensorType::Q5_1 => Some(|src, dst| checked(src, dst, q5_1)),
            TensorType::Q8_0 => Some(|src, dst| checked(src, dst, q8_0)),
            TensorType::Q4_K => Some(|src, dst| checked(src, dst, q4_k)),
            TensorType::Q5_K => Some(|src, dst| checked(src, dst, q5_k)),
            TensorType::TQ1_0 => Some(|src, dst| checked(src, dst, tq1_0)),
            _ => None,
        }
    }

    #[target_feature(enable = "avx2,f16c")]
    fn q4_0(src: &[u8], dst: &mut [f32]) {
        for ([d0, d1, levels @ ..], x) in src.as_chunks::<18>().0.iter().zip(dst.as_chunks_mut().0) {
            let levels = _mm256_sub_epi8(nibbles_of_16(levels), _mm256_set1_epi8(8));
            store(levels, [get_f16(&[*d0, *d1], 0); 2], None, x);
        }
    }

    #[target_feature(enable = "avx2,f16c")]
    fn q4_1(src: &[u8], dst: &mut [f32]) {
        for ([d0, d1, m0, m1, levels @ ..], x) in src.as_chunks::<20>().0.iter().zip(dst.as_chunks_mut().0) {
            let (d, m) = (get_f16(&[*d0, *d1], 0), get_f16(&[*m0, *m1], 0));
            store(nibbles_of_16(levels), [d; 2], Some([m; 2]), x);
        }
    }

    #[target_feature(enable = "avx2,f16c")]
    fn q5_0(src: &[u8], dst: &mut [f32]) {
        for (block, x) in src.as_chunks::<22>().0.iter().zip(dst.as_chunks_mut().0) {
            let [d0, d1, b0, b1, b2, b3, low @ ..] = block;
            let levels = _mm256_or_si256(nibbles_of_16(low), fifth_bits([*b0, *b1, *b2, *b3]));
            let levels = _mm256_sub_epi8(levels, _mm256_set1_epi8(16));
            store(levels, [get_f16(&[*d0, *d1], 0); 2], None, x);
        }
    }

    #[target_feature(enable = "avx2,f16c")]
    fn q5_1(src: &[u8], dst: &mut [f32]) {
        for (block, x) in src.as_chunks::<24>().0.iter().zip(dst.as_chunks_mut().0) {
            let [d0, d1, m0, m1, b0, b1, b2, b3, low @ ..] = block;
            let levels = _mm256_or_si256(nibbles_of_16(low), fifth_bits([*b0, *b1, *b2, *b3]));
            let (d, m) = (get_f16(&[*d0, *d1], 0), get_f16(&[*m0, *m1], 0));
            store(levels, [d; 2], Some([m; 2]), x);
        }
    }

    #[target_feature(enable = "avx2,f16c")]
    fn q8_0(src: &[u8], dst: &mut [f32]) {
        for ([d0, d1, levels @ ..], x) in src.as_chunks::<34>().0.iter().zip(dst.as_chunks_mut().0) {
            store(load_32(levels), [get_f16(&[*d0, *d1], 0); 2], None, x);
        }
    }

    #[target_feature(enable = "avx2,f16c")]
    fn q4_k(src: &[u8], dst: &mut [f32]) {
        for (block, x) in src.as_chunks::<144>().0.iter().zip(dst.as_chunks_mut::<256>().0) {
            let Some((header, nibbles)) = block.split_first_chunk() else { continue };
            let lines = affine_k::group_lines(header);
            let nibbles = nibbles.as_chunks().0;
            for (g, (x, (scale, min))) in x.as_chunks_mut().0.iter_mut().zip(lines).enumerate() {
                store(field(load_32(&nibbles[g / 2]), g % 2 * 4, 0x0f), [scale; 2], Some([-min; 2]), x);
            }
        }
    }

    #[target_feature(enable = "avx2,f16c")]
    fn q5_k(src: &[u8], dst: &mut [f32]) {
        for (block, x) in src.as_chunks::<176>().0.iter().zip(dst.as_chunks_mut::<256>().0) {
            let Some((header, bits)) = block.split_first_chunk() else { continue };
            let [high, nibbles @ ..] = bits.as_chunks().0 else { continue };
            let lines = affine_k::group_lines(header);
            let high = load_32(high);
            for (g, (x, (scale, min))) in x.as_chunks_mut().0.iter_mut().zip(lines).enumerate() {
                let low = field(load_32(&nibbles[g / 2]), g % 2 * 4, 0x0f);
                store(_mm256_or_si256(low, plane(high, g, 16)), [scale; 2], Some([-min; 2]), x);
            }
        }
    }

    #[target_feature(enable = "avx2,f16c")]
    fn tq1_0(src: &[u8], dst: &mut [f32]) {
        for (block, x) in src.as_chunks::<54>().0.iter().zip(dst.as_chunks_mut::<256>().0) {
            let scales = [get_f16(block, ternary::TQ1_0_D); 2];
            let (chunks, _) = x.as_chunks_mut();
            // 32 bytes hold the first 160 weights, 32 to a trit; of the rest, two trits of 16 bytes make 32 weights.
            let mut fractions = trit_fractions(block).into_iter();
            for x in chunks {
                if let Some(fractions) = fractions.next() {
                    store(first_trits(load_32(&fractions)), scales, None, x);
                }
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn store(levels: __m256i, scales: [f32; 2], offsets: Option<[f32; 2]>, x: &mut [f32; 32]) {
        let halves = [_mm256_castsi256_si128(levels), _mm256_extracti128_si256::<1>(levels)];
        for (half, x) in x.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let (bytes, scale) = (halves[half], _mm256_set1_ps(scales[half]));
            for (bytes, x) in [bytes, _mm_srli_si128::<8>(bytes)].into_iter().zip(x.as_chunks_mut::<8>().0) {
                let mut value = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), scale);
                if let Some(offsets) = offsets {
                    value = _mm256_add_ps(value, _mm256_set1_ps(offsets[half]));
                }
                // SAFETY: 8 floats are written.
                unsafe { _mm256_storeu_ps(x.as_mut_ptr(), value) };
            }
        }
    }

    #[target_feature(enable = "avx2,f16c")]
    fn f16(src: &[u8], dst: &mut [f32]) {
        let (blocks, rest) = src.as_chunks::<16>();
        let (vectors, tail) = dst.as_chunks_mut::<8>();
        for (halves, x) in blocks.iter().zip(&mut *vectors) {
            // SAFETY: 16 bytes are read, 8 floats written.
            unsafe { _mm256_storeu_ps(x.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(halves.as_ptr().cast()))) };
        }
        dequantize_f16(rest, tail);
    }
}

pub(super) mod avx512 {
    use super::*;

    decoders!("avx2,f16c,avx512f", Avx512, |_| None);

    #[inline]
    #[target_feature(enable = "avx2,avx512f")]
    fn store(levels: __m256i, scales: [f32; 2], offsets: Option<[f32; 2]>, x: &mut [f32; 32]) {
        let halves = [_mm256_castsi256_si128(levels), _mm256_extracti128_si256::<1>(levels)];
        for (half, x) in x.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let floats = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(halves[half]));
            let mut value = _mm512_mul_ps(floats, _mm512_set1_ps(scales[half]));
            if let Some(offsets) = offsets {
                value = _mm512_add_ps(value, _mm512_set1_ps(offsets[half]));
            }
            // SAFETY: 16 floats are written.
            unsafe { _mm512_storeu_ps(x.as_mut_ptr(), value) };
        }
    }

    #[target_feature(enable = "avx512f")]
    fn f16(src: &[u8], dst: &mut [f32]) {
        let (blocks, rest) = src.as_chunks::<32>();
        let (vectors, tail) = dst.as_chunks_mut::<16>();
        for (halves, x) in blocks.iter().zip(&mut *vectors) {
            // SAFETY: 32 bytes are read, 16 floats written.
            unsafe { _mm512_storeu_ps(x.as_mut_ptr(), _mm512_cvtph_ps(_mm256_loadu_si256(halves.as_ptr().cast()))) };
        }
        dequantize_f16(rest, tail);
    }
}
