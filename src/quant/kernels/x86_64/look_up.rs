//! Decoders with AVX-512 that look weights up. A scale has 16 or 32 weights in these types, or 3 for each shift: all of
//! them fit into one or two vectors, are computed as scalar code computes one weight, and then picked by their levels.

use std::arch::x86_64::*;

use crate::cpu::Avx512;
use crate::gguf::TensorType;
use crate::quant::DequantizeFn;
use crate::quant::grid::IQ1_PACKED;
use crate::quant::types::affine_k;
use crate::quant::types::iq1::DELTA;
use crate::quant::types::ternary::TQ1_0_D;

/// The decoder of `ty`, if it looks weights up.
pub(super) fn decoder(ty: TensorType) -> Option<DequantizeFn> {
    match ty {
        TensorType::Q4_0 => Some(|src, dst| checked(src, dst, q4_0)),
        TensorType::Q4_1 => Some(|src, dst| checked(src, dst, q4_1)),
        TensorType::Q5_0 => Some(|src, dst| checked(src, dst, q5_0)),
        TensorType::Q5_1 => Some(|src, dst| checked(src, dst, q5_1)),
        TensorType::Q8_0 => Some(|src, dst| checked(src, dst, q8_0)),
        TensorType::Q4_K => Some(|src, dst| checked(src, dst, q4_k)),
        TensorType::Q5_K => Some(|src, dst| checked(src, dst, q5_k)),
        TensorType::Q8_K => Some(|src, dst| checked(src, dst, q8_k)),
        TensorType::IQ1_S => Some(|src, dst| checked(src, dst, iq1_s)),
        TensorType::IQ1_M => Some(|src, dst| checked(src, dst, iq1_m)),
        TensorType::TQ1_0 => Some(|src, dst| checked(src, dst, tq1_0)),
        _ => None,
    }
}

#[inline]
fn checked(src: &[u8], dst: &mut [f32], decode: unsafe fn(&[u8], &mut [f32])) {
    Avx512::new().expect("the level was available when this decoder was chosen");
    // SAFETY: the proof is of the features of every decoder here, and they need no more.
    unsafe { decode(src, dst) }
}

/// The binary16 in every lane.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw")]
fn half(bytes: [u8; 2]) -> __m512 {
    _mm512_cvtph_ps(_mm256_set1_epi16(i16::from_le_bytes(bytes)))
}

/// `first` and the fifteen whole numbers after it.
#[inline]
#[target_feature(enable = "avx512f")]
fn from(first: f32) -> __m512 {
    let steps = _mm512_setr_ps(0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0);
    _mm512_add_ps(_mm512_set1_ps(first), steps)
}

/// Sixteen bytes, each widened. Looking up considers the low four bits of them only.
#[inline]
#[target_feature(enable = "avx512f")]
fn widened(bytes: &[u8; 16]) -> __m512i {
    // SAFETY: sixteen bytes are read.
    _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(values: __m512, out: &mut [f32; 16]) {
    // SAFETY: sixteen floats are written.
    unsafe { _mm512_storeu_ps(out.as_mut_ptr(), values) }
}

/// Weights for the low nibbles of sixteen bytes, then for the high ones.
#[inline]
#[target_feature(enable = "avx512f")]
fn nibbles(bytes: &[u8; 16], weights: __m512, out: &mut [f32; 32]) {
    let ([low, high], _) = out.as_chunks_mut() else { return };
    let bytes = widened(bytes);
    store(_mm512_permutexvar_ps(bytes, weights), low);
    store(_mm512_permutexvar_ps(_mm512_srli_epi32::<4>(bytes), weights), high);
}

/// [`nibbles`] with a fifth bit for each weight, which decides between two vectors.
#[inline]
#[target_feature(enable = "avx512f")]
fn five_bits(bytes: &[u8; 16], fifth: &[u8; 4], weights: [__m512; 2], out: &mut [f32; 32]) {
    let ([low, high], _) = out.as_chunks_mut() else { return };
    let fifth = u32::from_le_bytes(*fifth);
    let bytes = widened(bytes);
    store(pick(bytes, fifth as __mmask16, weights), low);
    store(pick(_mm512_srli_epi32::<4>(bytes), (fifth >> 16) as __mmask16, weights), high);
}

/// From the second vector where the bit is set.
#[inline]
#[target_feature(enable = "avx512f")]
fn pick(levels: __m512i, bits: __mmask16, [clear, set]: [__m512; 2]) -> __m512 {
    _mm512_mask_permutexvar_ps(_mm512_permutexvar_ps(levels, clear), bits, levels, set)
}

#[target_feature(enable = "avx512f,avx512vl,avx512bw")]
fn q4_0(src: &[u8], dst: &mut [f32]) {
    let levels = from(-8.0);
    for ([d0, d1, bytes @ ..], x) in src.as_chunks::<18>().0.iter().zip(dst.as_chunks_mut().0) {
        nibbles(bytes, _mm512_mul_ps(levels, half([*d0, *d1])), x);
    }
}

#[target_feature(enable = "avx512f,avx512vl,avx512bw")]
fn q4_1(src: &[u8], dst: &mut [f32]) {
    let levels = from(0.0);
    for ([d0, d1, m0, m1, bytes @ ..], x) in src.as_chunks::<20>().0.iter().zip(dst.as_chunks_mut().0) {
        let weights = _mm512_add_ps(_mm512_mul_ps(levels, half([*d0, *d1])), half([*m0, *m1]));
        nibbles(bytes, weights, x);
    }
}

#[target_feature(enable = "avx512f,avx512vl,avx512bw")]
fn q5_0(src: &[u8], dst: &mut [f32]) {
    let levels = [from(-16.0), from(0.0)];
    for (block, x) in src.as_chunks::<22>().0.iter().zip(dst.as_chunks_mut().0) {
        let [d0, d1, b0, b1, b2, b3, bytes @ ..] = block;
        let d = half([*d0, *d1]);
        let weights = [_mm512_mul_ps(levels[0], d), _mm512_mul_ps(levels[1], d)];
        five_bits(bytes, &[*b0, *b1, *b2, *b3], weights, x);
    }
}

#[target_feature(enable = "avx512f,avx512vl,avx512bw")]
fn q5_1(src: &[u8], dst: &mut [f32]) {
    let levels = [from(0.0), from(16.0)];
    for (block, x) in src.as_chunks::<24>().0.iter().zip(dst.as_chunks_mut().0) {
        let [d0, d1, m0, m1, b0, b1, b2, b3, bytes @ ..] = block;
        let (d, m) = (half([*d0, *d1]), half([*m0, *m1]));
        let weights = [_mm512_add_ps(_mm512_mul_ps(levels[0], d), m), _mm512_add_ps(_mm512_mul_ps(levels[1], d), m)];
        five_bits(bytes, &[*b0, *b1, *b2, *b3], weights, x);
    }
}

/// Signed bytes times `d`.
#[inline]
#[target_feature(enable = "avx512f")]
fn scaled<const N: usize>(bytes: &[u8; N], d: __m512, out: &mut [f32; N]) {
    for (bytes, out) in bytes.as_chunks::<16>().0.iter().zip(out.as_chunks_mut().0) {
        // SAFETY: sixteen bytes are read.
        let levels = _mm512_cvtepi8_epi32(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) });
        store(_mm512_mul_ps(_mm512_cvtepi32_ps(levels), d), out);
    }
}

#[target_feature(enable = "avx512f,avx512vl,avx512bw")]
fn q8_0(src: &[u8], dst: &mut [f32]) {
    for ([d0, d1, bytes @ ..], x) in src.as_chunks::<34>().0.iter().zip(dst.as_chunks_mut::<32>().0) {
        scaled(bytes, half([*d0, *d1]), x);
    }
}

#[target_feature(enable = "avx512f")]
fn q8_k(src: &[u8], dst: &mut [f32]) {
    for (block, x) in src.as_chunks::<292>().0.iter().zip(dst.as_chunks_mut::<256>().0) {
        let [d0, d1, d2, d3, rest @ ..] = block;
        let Some(bytes) = rest.first_chunk::<256>() else { continue };
        scaled(bytes, _mm512_set1_ps(f32::from_le_bytes([*d0, *d1, *d2, *d3])), x);
    }
}

/// [`affine_k::group_lines`], with subtrahends as minus addends: a row of factors, a row of addends.
#[inline]
#[target_feature(enable = "avx2,f16c,avx512f,avx512vl,avx512bw")]
fn group_lines(header: &[u8; affine_k::HEADER]) -> [[f32; affine_k::GROUPS]; 2] {
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let (halves, a, b, c) = (word(0), word(4), word(8), word(12));
    // Four bytes at a time: groups 0 to 3 below, 4 to 7 above.
    let both = |low: u32, high: u32| (u64::from(high) << 32 | u64::from(low)) as i64;
    let scales = both(a & 0x3f3f_3f3f, c & 0x0f0f_0f0f | a >> 2 & 0x3030_3030);
    let mins = both(b & 0x3f3f_3f3f, c >> 4 & 0x0f0f_0f0f | b >> 2 & 0x3030_3030);
    let d = _mm_cvtph_ps(_mm_cvtsi32_si128(halves as i32));
    let factors = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(scales)));
    let addends = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(mins)));
    let factors = _mm256_mul_ps(_mm256_broadcastss_ps(d), factors);
    let addends = _mm256_mul_ps(_mm256_broadcastss_ps(_mm_movehdup_ps(d)), addends);
    let mut lines = [[0.0; affine_k::GROUPS]; 2];
    // SAFETY: eight floats are written to each row.
    unsafe {
        _mm256_storeu_ps(lines[0].as_mut_ptr(), factors);
        _mm256_storeu_ps(lines[1].as_mut_ptr(), _mm256_xor_ps(addends, _mm256_set1_ps(-0.0)));
    }
    lines
}

#[target_feature(enable = "avx2,f16c,avx512f,avx512vl,avx512bw")]
fn q4_k(src: &[u8], dst: &mut [f32]) {
    let levels = from(0.0);
    for (block, x) in src.as_chunks::<144>().0.iter().zip(dst.as_chunks_mut::<256>().0) {
        let Some((header, bytes)) = block.split_first_chunk() else { continue };
        let [factors, addends] = group_lines(header);
        for (pair, (bytes, x)) in bytes.as_chunks::<32>().0.iter().zip(x.as_chunks_mut::<64>().0).enumerate() {
            let line = |g: usize| {
                let scaled = _mm512_mul_ps(levels, _mm512_set1_ps(factors[g]));
                _mm512_add_ps(scaled, _mm512_set1_ps(addends[g]))
            };
            let (low, high) = (line(2 * pair), line(2 * pair + 1));
            let ([a, b, c, d], _) = x.as_chunks_mut() else { continue };
            let ([first, second], _) = bytes.as_chunks() else { continue };
            let (first, second) = (widened(first), widened(second));
            store(_mm512_permutexvar_ps(first, low), a);
            store(_mm512_permutexvar_ps(second, low), b);
            store(_mm512_permutexvar_ps(_mm512_srli_epi32::<4>(first), high), c);
            store(_mm512_permutexvar_ps(_mm512_srli_epi32::<4>(second), high), d);
        }
    }
}

#[target_feature(enable = "avx2,f16c,avx512f,avx512vl,avx512bw")]
fn q5_k(src: &[u8], dst: &mut [f32]) {
    let levels = [from(0.0), from(16.0)];
    for (block, x) in src.as_chunks::<176>().0.iter().zip(dst.as_chunks_mut::<256>().0) {
        let Some((header, bits)) = block.split_first_chunk() else { continue };
        let Some((fifth, bytes)) = bits.split_first_chunk::<32>() else { continue };
        let [factors, addends] = group_lines(header);
        // SAFETY: 32 bytes are read.
        let fifth = unsafe { _mm256_loadu_si256(fifth.as_ptr().cast()) };
        for (pair, (bytes, x)) in bytes.as_chunks::<32>().0.iter().zip(x.as_chunks_mut::<64>().0).enumerate() {
            // SAFETY: 32 bytes are read.
            let low = unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) };
            for (half, (low, x)) in
                [low, _mm256_srli_epi16::<4>(low)].into_iter().zip(x.as_chunks_mut::<32>().0).enumerate()
            {
                let g = 2 * pair + half;
                // Bit g of each byte as bit 4; what comes from another byte is masked out.
                let fifth = if g < 4 {
                    _mm256_sll_epi16(fifth, _mm_cvtsi64_si128(4 - g as i64))
                } else {
                    _mm256_srl_epi16(fifth, _mm_cvtsi64_si128(g as i64 - 4))
                };
                let fifth = _mm256_and_si256(fifth, _mm256_set1_epi8(0x10));
                let levels5 = _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi8(0x0f)), fifth);
                let (factor, addend) = (_mm512_set1_ps(factors[g]), _mm512_set1_ps(addends[g]));
                let weights = levels.map(|level| _mm512_add_ps(_mm512_mul_ps(level, factor), addend));
                let ([a, b], _) = x.as_chunks_mut() else { continue };
                let (first, second) = (_mm256_castsi256_si128(levels5), _mm256_extracti128_si256::<1>(levels5));
                for (bytes, x) in [(first, a), (second, b)] {
                    store(_mm512_permutex2var_ps(weights[0], _mm512_cvtepu8_epi32(bytes), weights[1]), x);
                }
            }
        }
    }
}

/// Level plus shift for the three levels of IQ1, four floats for each four weights: by bit 0 of the index, the first
/// eight weights are shifted down, by bit 1 the others.
static SHIFTED: [[f32; 16]; 4] = {
    let mut tables = [[0.0; 16]; 4];
    let mut n = 0;
    while n < 64 {
        let (table, lane) = (n / 16, n % 16);
        let down = table >> (lane / 8) & 1 == 1;
        let level = (lane % 4) as f32 - 1.0;
        tables[table][lane] = if down { level - DELTA } else { level + DELTA };
        n += 1;
    }
    tables
};

/// Sixteen weights for two points of IQ1.
#[inline]
#[target_feature(enable = "avx512f")]
fn two_points(points: [usize; 2], shifts: usize, scale: f32, out: &mut [f32; 16]) {
    let levels = u32::from(IQ1_PACKED[points[0]]) | u32::from(IQ1_PACKED[points[1]]) << 16;
    let places = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    // Looking up among four considers the low two bits only.
    let levels = _mm512_srlv_epi32(_mm512_set1_epi32(levels as i32), places);
    // SAFETY: sixteen floats are read.
    let shifted = unsafe { _mm512_loadu_ps(SHIFTED[shifts].as_ptr()) };
    store(_mm512_permutevar_ps(_mm512_mul_ps(_mm512_set1_ps(scale), shifted), levels), out);
}

/// `d * (2 code + 1)` of eight three-bit codes, the low three bits of each lane.
#[inline]
#[target_feature(enable = "avx2")]
fn odd_multiples(d: __m256, codes: __m256i) -> [f32; 8] {
    let codes = _mm256_and_si256(codes, _mm256_set1_epi32(7));
    let odd = _mm256_add_epi32(_mm256_add_epi32(codes, codes), _mm256_set1_epi32(1));
    let mut scales = [0.0; 8];
    // SAFETY: eight floats are written.
    unsafe { _mm256_storeu_ps(scales.as_mut_ptr(), _mm256_mul_ps(d, _mm256_cvtepi32_ps(odd))) };
    scales
}

#[target_feature(enable = "avx2,f16c,avx512f")]
fn iq1_s(src: &[u8], dst: &mut [f32]) {
    for (block, x) in src.as_chunks::<50>().0.iter().zip(dst.as_chunks_mut::<256>().0) {
        let [d0, d1, points @ ..] = block;
        let d = _mm_cvtph_ps(_mm_cvtsi32_si128(u16::from_le_bytes([*d0, *d1]).into()));
        let (points, words) = points.split_at(32);
        // SAFETY: sixteen bytes are read of the sixteen that are left.
        let codes = _mm256_cvtepu16_epi32(unsafe { _mm_loadu_si128(words.as_ptr().cast()) });
        let scales = odd_multiples(_mm256_broadcastss_ps(d), _mm256_srli_epi32::<12>(codes));
        let groups = points.as_chunks::<4>().0.iter().zip(words.as_chunks::<2>().0);
        for ((([a, b, c, d], word), scale), x) in groups.zip(scales).zip(x.as_chunks_mut::<32>().0) {
            let word = usize::from(u16::from_le_bytes(*word));
            let point = |low: u8, n: usize| usize::from(low) | (word >> (3 * n) & 7) << 8;
            let shifts = 3 * (word >> 15);
            let ([first, second], _) = x.as_chunks_mut() else { continue };
            two_points([point(*a, 0), point(*b, 1)], shifts, scale, first);
            two_points([point(*c, 2), point(*d, 3)], shifts, scale, second);
        }
    }
}

#[target_feature(enable = "avx2,f16c,avx512f")]
fn iq1_m(src: &[u8], dst: &mut [f32]) {
    for (block, x) in src.as_chunks::<56>().0.iter().zip(dst.as_chunks_mut::<256>().0) {
        let [points @ .., w0, w1, w2, w3, w4, w5, w6, w7] = block;
        let words = u64::from_le_bytes([*w0, *w1, *w2, *w3, *w4, *w5, *w6, *w7]);
        // The top nibbles of the four words.
        let half = words >> 12 & 0x000f | words >> 24 & 0x00f0 | words >> 36 & 0x0f00 | words >> 48 & 0xf000;
        let d = _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(half as i32)));
        let places = _mm256_setr_epi32(0, 3, 6, 9, 16, 19, 22, 25);
        let scales = [words, words >> 32]
            .map(|words| odd_multiples(d, _mm256_srlv_epi32(_mm256_set1_epi32(words as u32 as i32), places)));
        let (low, high) = points.split_at(32);
        let runs = low.as_chunks::<2>().0.iter().zip(high).zip(scales.as_flattened());
        for ((([a, b], high), scale), x) in runs.zip(x.as_chunks_mut().0) {
            let high = usize::from(*high);
            let points = [usize::from(*a) | (high & 7) << 8, usize::from(*b) | (high >> 4 & 7) << 8];
            two_points(points, high >> 3 & 1 | high >> 6 & 2, *scale, x);
        }
    }
}

/// The three weights of a ternary block, ascending by level.
type Ternary = [__m512; 3];

/// Sixteen weights by whether the level is at least 1 and at least 2.
#[inline]
#[target_feature(enable = "avx512f")]
fn store_ternary([minus, zero, plus]: Ternary, at_least: [__mmask16; 2], out: &mut [f32; 16]) {
    let values = _mm512_mask_blend_ps(at_least[0], minus, zero);
    store(_mm512_mask_blend_ps(at_least[1], values, plus), out);
}

/// Sixteen weights: the level of a byte is the integer part of `3 byte / 256`.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw")]
fn sixteen_trits(bytes: __m128i, weights: Ternary, out: &mut [f32; 16]) {
    let at_least = |bound: u8| _mm_cmpge_epu8_mask(bytes, _mm_set1_epi8(bound as i8));
    store_ternary(weights, [at_least(86), at_least(171)], out);
}

#[target_feature(enable = "avx2,avx512f,avx512vl,avx512bw")]
fn tq1_0(src: &[u8], dst: &mut [f32]) {
    for (block, x) in src.as_chunks::<54>().0.iter().zip(dst.as_chunks_mut::<256>().0) {
        let d = half([block[TQ1_0_D], block[TQ1_0_D + 1]]);
        let weights = [-1.0, 0.0, 1.0].map(|level| _mm512_mul_ps(_mm512_set1_ps(level), d));
        let (x, _) = x.as_chunks_mut::<16>();
        let ([of_32 @ .., a, b, c, d, e, last], _) = x.split_at_mut(16) else { continue };
        // SAFETY: 32, 16 and 4 bytes are read from the 52 before the scale.
        let (mut fractions, mut sixteen, four) = unsafe {
            let four = block.as_ptr().add(48).cast::<i32>().read_unaligned();
            (
                _mm256_loadu_si256(block.as_ptr().cast()),
                _mm_loadu_si128(block.as_ptr().add(32).cast()),
                _mm_set1_epi32(four),
            )
        };
        for pair in of_32.as_chunks_mut::<2>().0 {
            let at_least = |bound: u8| _mm256_cmpge_epu8_mask(fractions, _mm256_set1_epi8(bound as i8));
            let (one, two) = (at_least(86), at_least(171));
            let [low, high] = pair;
            store_ternary(weights, [one as __mmask16, two as __mmask16], low);
            store_ternary(weights, [(one >> 16) as __mmask16, (two >> 16) as __mmask16], high);
            // The next trit: three times the fraction, less its integer part.
            fractions = _mm256_add_epi8(fractions, _mm256_add_epi8(fractions, fractions));
        }
        for x in [a, b, c, d, e] {
            sixteen_trits(sixteen, weights, x);
            sixteen = _mm_add_epi8(sixteen, _mm_add_epi8(sixteen, sixteen));
        }
        // Four bytes with four trits each: quarter n has lost n of them.
        let tripled = _mm_add_epi8(four, _mm_add_epi8(four, four));
        let ninefold = _mm_add_epi8(tripled, _mm_add_epi8(tripled, tripled));
        let rest = _mm_add_epi8(ninefold, _mm_add_epi8(ninefold, ninefold));
        let quarters = _mm_blend_epi32::<0b1100>(
            _mm_blend_epi32::<0b0010>(four, tripled),
            _mm_blend_epi32::<0b1000>(ninefold, rest),
        );
        sixteen_trits(quarters, weights, last);
    }
}
