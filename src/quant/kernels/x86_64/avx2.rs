//! Sixteen lanes in two registers of AVX2: the two halves keep units busy that wait for each other in one.

use std::arch::x86_64::*;
use std::ops::{Add, BitAnd, BitOr, Div, Mul, Sub};

use crate::cpu::Avx2;
use crate::quant::kernels::wide::{Floats, Isa, LANES, Mask};

/// Sixteen floats; exist only where [`Avx2`] does.
#[derive(Clone, Copy)]
pub(crate) struct F32x8x2(__m256, __m256);

/// Sixteen truth values, all bits of a lane alike; exist only where [`Avx2`] does.
#[derive(Clone, Copy)]
pub(crate) struct Mask8x2(__m256, __m256);

// SAFETY, for all of this file: values of these types exist only where the CPU has AVX2.

impl Isa for Avx2 {
    type Floats = F32x8x2;

    const MANY_REGISTERS: bool = false;

    #[inline(always)]
    fn splat(self, value: f32) -> F32x8x2 {
        // SAFETY: see above.
        let half = unsafe { _mm256_set1_ps(value) };
        F32x8x2(half, half)
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> F32x8x2 {
        // SAFETY: see above; two times eight floats are read.
        unsafe { F32x8x2(_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values.as_ptr().add(8))) }
    }

    #[inline(always)]
    fn extremes_of_each(self, blocks: &[[f32; 2 * LANES]; LANES]) -> (F32x8x2, F32x8x2) {
        let [first, second] = blocks.as_chunks::<8>().0 else { return (self.splat(0.0), self.splat(0.0)) };
        // SAFETY: see above.
        let ((low_a, high_a), (low_b, high_b)) = unsafe { (extremes_of_eight(first), extremes_of_eight(second)) };
        (F32x8x2(low_a, low_b), F32x8x2(high_a, high_b))
    }

    #[inline(always)]
    fn transpose(self, rows: [&[f32; LANES]; LANES]) -> [F32x8x2; LANES] {
        let mut columns = [self.splat(0.0); LANES];
        for half in 0..2 {
            for column in 0..2 {
                let mut block = [&[0.0; 8]; 8];
                for k in 0..8 {
                    block[k] = &rows[8 * half + k].as_chunks::<8>().0[column];
                }
                let block = transpose_8x8(self, block);
                for k in 0..8 {
                    let F32x8x2(low, high) = &mut columns[8 * column + k];
                    if half == 0 {
                        *low = block[k];
                    } else {
                        *high = block[k];
                    }
                }
            }
        }
        columns
    }

    #[inline(always)]
    fn costs<const D: usize>(self, points: &[u16; LANES], table: &[f32; 32]) -> F32x8x2 {
        let [low, high] = points.as_chunks::<8>().0 else { return self.splat(0.0) };
        // SAFETY: see above.
        unsafe { F32x8x2(costs::<D>(low, table), costs::<D>(high, table)) }
    }

    #[inline(always)]
    fn cheapest_of_eight<const D: usize>(self, points: &[u16; 8], count: usize, table: &[f32; 32]) -> usize {
        // SAFETY: see above.
        unsafe { cheapest_of_eight::<D>(points, count, table) }
    }
}

/// [`Isa::extremes_of_each`] of eight blocks.
#[inline]
#[target_feature(enable = "avx2")]
fn extremes_of_eight(blocks: &[[f32; 2 * LANES]; 8]) -> (__m256, __m256) {
    let zero = _mm256_setzero_ps();
    let (mut lows, mut highs) = ([zero; 2], [zero; 2]);
    for (g, blocks) in blocks.as_chunks::<4>().0.iter().enumerate() {
        let (mut low, mut high) = ([zero; 4], [zero; 4]);
        for (k, block) in blocks.iter().enumerate() {
            // SAFETY: four times eight floats are read from 32.
            let (a, b) = unsafe { (_mm256_loadu_ps(block.as_ptr()), _mm256_loadu_ps(block.as_ptr().add(8))) };
            // SAFETY: as above.
            let (c, d) = unsafe { (_mm256_loadu_ps(block.as_ptr().add(16)), _mm256_loadu_ps(block.as_ptr().add(24))) };
            low[k] = _mm256_min_ps(_mm256_min_ps(a, b), _mm256_min_ps(c, d));
            high[k] = _mm256_max_ps(_mm256_max_ps(a, b), _mm256_max_ps(c, d));
        }
        let ab = _mm256_min_ps(_mm256_unpacklo_ps(low[0], low[1]), _mm256_unpackhi_ps(low[0], low[1]));
        let cd = _mm256_min_ps(_mm256_unpacklo_ps(low[2], low[3]), _mm256_unpackhi_ps(low[2], low[3]));
        lows[g] = _mm256_min_ps(_mm256_shuffle_ps::<0x44>(ab, cd), _mm256_shuffle_ps::<0xee>(ab, cd));
        let ab = _mm256_max_ps(_mm256_unpacklo_ps(high[0], high[1]), _mm256_unpackhi_ps(high[0], high[1]));
        let cd = _mm256_max_ps(_mm256_unpacklo_ps(high[2], high[3]), _mm256_unpackhi_ps(high[2], high[3]));
        highs[g] = _mm256_max_ps(_mm256_shuffle_ps::<0x44>(ab, cd), _mm256_shuffle_ps::<0xee>(ab, cd));
    }
    // What is left of each half of four blocks.
    let low = [_mm256_permute2f128_ps::<0x20>(lows[0], lows[1]), _mm256_permute2f128_ps::<0x31>(lows[0], lows[1])];
    let high = [_mm256_permute2f128_ps::<0x20>(highs[0], highs[1]), _mm256_permute2f128_ps::<0x31>(highs[0], highs[1])];
    (_mm256_min_ps(low[0], low[1]), _mm256_max_ps(high[0], high[1]))
}

/// [`Isa::cheapest_of_eight`].
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn cheapest_of_eight<const D: usize>(points: &[u16; 8], count: usize, table: &[f32; 32]) -> usize {
    let highest = _mm256_set1_ps(f32::MAX);
    let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    let valid = _mm256_cmpgt_epi32(_mm256_set1_epi32(count as i32), lanes);
    let cost = _mm256_blendv_ps(highest, costs::<D>(points, table), _mm256_castsi256_ps(valid));
    // Of a NaN and a number, the second operand is taken.
    let cost = _mm256_min_ps(cost, highest);
    let least = _mm256_min_ps(cost, _mm256_permute2f128_ps::<1>(cost, cost));
    let least = _mm256_min_ps(least, _mm256_shuffle_ps::<0b01_00_11_10>(least, least));
    let least = _mm256_min_ps(least, _mm256_shuffle_ps::<0b10_11_00_01>(least, least));
    let equal = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_EQ_OQ>(cost, least));
    equal.trailing_zeros() as usize & 7
}

/// [`Isa::costs`] of eight points.
#[inline]
#[target_feature(enable = "avx2")]
fn costs<const D: usize>(points: &[u16; 8], table: &[f32; 32]) -> __m256 {
    // SAFETY: eight points are read, and of the table each coordinate's 4 or 8 floats.
    unsafe {
        let points = _mm256_cvtepu16_epi32(_mm_loadu_si128(points.as_ptr().cast()));
        let mut sum = _mm256_setzero_ps();
        for i in 0..D {
            let row = table.as_ptr().add(32 / D * i);
            // The permutations look at the lowest 2 or 3 bits of an index only.
            let cost = if D == 8 {
                let level = _mm256_srlv_epi32(points, _mm256_set1_epi32(2 * i as i32));
                _mm256_permutevar_ps(_mm256_broadcast_ps(&_mm_loadu_ps(row)), level)
            } else {
                let level = _mm256_srlv_epi32(points, _mm256_set1_epi32(3 * i as i32));
                _mm256_permutevar8x32_ps(_mm256_loadu_ps(row), level)
            };
            sum = _mm256_add_ps(sum, cost);
        }
        sum
    }
}

#[inline(always)]
fn transpose_8x8(isa: Avx2, rows: [&[f32; 8]; 8]) -> [__m256; 8] {
    let mut quads = [isa.splat(0.0).0; 8];
    // SAFETY: see above; eight floats are read from each row.
    unsafe {
        for g in 0..2 {
            let (a, b) = (_mm256_loadu_ps(rows[4 * g].as_ptr()), _mm256_loadu_ps(rows[4 * g + 1].as_ptr()));
            let (c, d) = (_mm256_loadu_ps(rows[4 * g + 2].as_ptr()), _mm256_loadu_ps(rows[4 * g + 3].as_ptr()));
            let (ab_low, ab_high) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            let (cd_low, cd_high) = (_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
            quads[4 * g] = _mm256_shuffle_ps::<0x44>(ab_low, cd_low);
            quads[4 * g + 1] = _mm256_shuffle_ps::<0xee>(ab_low, cd_low);
            quads[4 * g + 2] = _mm256_shuffle_ps::<0x44>(ab_high, cd_high);
            quads[4 * g + 3] = _mm256_shuffle_ps::<0xee>(ab_high, cd_high);
        }
        let mut columns = quads;
        for i in 0..4 {
            columns[i] = _mm256_permute2f128_ps::<0x20>(quads[i], quads[4 + i]);
            columns[4 + i] = _mm256_permute2f128_ps::<0x31>(quads[i], quads[4 + i]);
        }
        columns
    }
}

/// Applies an intrinsic to both halves of one or two values.
macro_rules! halves {
    ($intrinsic:path, $a:expr) => {
        // SAFETY: see above.
        unsafe { Self($intrinsic($a.0), $intrinsic($a.1)) }
    };
    ($intrinsic:path, $a:expr, $b:expr) => {
        // SAFETY: see above.
        unsafe { Self($intrinsic($a.0, $b.0), $intrinsic($a.1, $b.1)) }
    };
}

macro_rules! operators {
    ($($operator:ident $method:ident $on:ident $intrinsic:ident;)*) => {$(
        impl $operator for $on {
            type Output = Self;

            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                halves!($intrinsic, self, other)
            }
        }
    )*};
}

operators! {
    Add add F32x8x2 _mm256_add_ps;
    Sub sub F32x8x2 _mm256_sub_ps;
    Mul mul F32x8x2 _mm256_mul_ps;
    Div div F32x8x2 _mm256_div_ps;
    BitAnd bitand Mask8x2 _mm256_and_ps;
    BitOr bitor Mask8x2 _mm256_or_ps;
}

/// Both halves of a comparison.
macro_rules! compare {
    ($predicate:ident, $a:expr, $b:expr) => {
        // SAFETY: see above.
        unsafe { Mask8x2(_mm256_cmp_ps::<$predicate>($a.0, $b.0), _mm256_cmp_ps::<$predicate>($a.1, $b.1)) }
    };
}

impl Floats for F32x8x2 {
    type Mask = Mask8x2;

    #[inline(always)]
    fn to_array(self) -> [f32; LANES] {
        let mut array = [0.0; LANES];
        // SAFETY: see above; two times eight floats are written.
        unsafe {
            _mm256_storeu_ps(array.as_mut_ptr(), self.0);
            _mm256_storeu_ps(array.as_mut_ptr().add(8), self.1);
        }
        array
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        halves!(_mm256_sqrt_ps, self)
    }

    #[inline(always)]
    fn abs(self) -> Self {
        // SAFETY: see above.
        let sign = unsafe { _mm256_set1_ps(-0.0) };
        halves!(_mm256_andnot_ps, Self(sign, sign), self)
    }

    #[inline(always)]
    fn negated(self) -> Self {
        // SAFETY: see above.
        let sign = unsafe { _mm256_set1_ps(-0.0) };
        halves!(_mm256_xor_ps, self, Self(sign, sign))
    }

    #[inline(always)]
    fn lesser(self, other: Self) -> Self {
        halves!(_mm256_min_ps, self, other)
    }

    #[inline(always)]
    fn greater(self, other: Self) -> Self {
        halves!(_mm256_max_ps, self, other)
    }

    #[inline(always)]
    fn below(self, other: Self) -> Mask8x2 {
        compare!(_CMP_LT_OQ, self, other)
    }

    #[inline(always)]
    fn above(self, other: Self) -> Mask8x2 {
        compare!(_CMP_GT_OQ, self, other)
    }

    #[inline(always)]
    fn equals(self, other: Self) -> Mask8x2 {
        compare!(_CMP_EQ_OQ, self, other)
    }

    #[inline(always)]
    fn select(mask: Mask8x2, yes: Self, no: Self) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm256_blendv_ps(no.0, yes.0, mask.0), _mm256_blendv_ps(no.1, yes.1, mask.1)) }
    }

    #[inline(always)]
    fn nearest_small(self) -> Self {
        halves!(_mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>, self)
    }

    #[inline(always)]
    fn truncated_small(self) -> Self {
        halves!(_mm256_round_ps::<{ _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC }>, self)
    }

    #[inline(always)]
    fn with_sign_of(self, other: Self) -> Self {
        // SAFETY: see above.
        unsafe {
            let sign = _mm256_set1_ps(-0.0);
            Self(with_sign_of(self.0, other.0, sign), with_sign_of(self.1, other.1, sign))
        }
    }

    #[inline(always)]
    fn to_bf16(self) -> [u16; LANES] {
        let mut halves = [0; LANES];
        // SAFETY: see above; 32 bytes are written.
        unsafe {
            let words = _mm256_packus_epi32(rounded_high_words(self.0), rounded_high_words(self.1));
            // Packing works on the 128-bit halves.
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
            _mm256_storeu_si256(halves.as_mut_ptr().cast(), words);
        }
        halves
    }

    #[inline(always)]
    fn to_bytes(self) -> [u8; LANES] {
        // SAFETY: see above.
        unsafe { low_bytes(_mm256_cvtps_epi32(self.0), _mm256_cvtps_epi32(self.1)) }
    }

    #[inline(always)]
    fn truncated_bytes(self) -> [u8; LANES] {
        // SAFETY: see above.
        unsafe { low_bytes(_mm256_cvttps_epi32(self.0), _mm256_cvttps_epi32(self.1)) }
    }

    #[inline(always)]
    fn truncated_nibbles(low: Self, high: Self) -> [u8; LANES] {
        let mut bytes = [0; LANES];
        // SAFETY: see above; sixteen bytes are written.
        unsafe {
            // Numbers below 128, so that words and bytes hold them; see `low_bytes` for the order.
            let low = _mm256_packs_epi32(_mm256_cvttps_epi32(low.0), _mm256_cvttps_epi32(low.1));
            let high = _mm256_packs_epi32(_mm256_cvttps_epi32(high.0), _mm256_cvttps_epi32(high.1));
            let nibble = _mm256_set1_epi16(0x0f);
            let high = _mm256_slli_epi16::<4>(_mm256_and_si256(high, nibble));
            let words = _mm256_or_si256(_mm256_and_si256(low, nibble), high);
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
            let (low, high) = (_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(bytes.as_mut_ptr().cast(), _mm_packus_epi16(low, high));
        }
        bytes
    }

    #[inline(always)]
    fn to_f16(self) -> [u16; LANES] {
        let mut halves = [0; LANES];
        // SAFETY: see above; twice 16 bytes are written. The level has F16C.
        unsafe {
            let (low, high) = halves.split_at_mut(8);
            _mm_storeu_si128(low.as_mut_ptr().cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0));
            _mm_storeu_si128(high.as_mut_ptr().cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.1));
        }
        halves
    }

    #[inline(always)]
    fn nearest_any(self) -> Self {
        halves!(nearest_any, self)
    }

    #[inline(always)]
    fn nearest_byte(self) -> Self {
        halves!(nearest_byte, self)
    }

    #[inline(always)]
    fn lowest(self) -> f32 {
        // SAFETY: see above.
        unsafe {
            let four = _mm256_min_ps(self.0, self.1);
            let four = _mm_min_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps::<1>(four));
            let two = _mm_min_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_min_ss(two, _mm_movehdup_ps(two)))
        }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn with_sign_of(value: __m256, other: __m256, sign: __m256) -> __m256 {
    _mm256_or_ps(_mm256_andnot_ps(sign, value), _mm256_and_ps(sign, other))
}

/// [`f32_to_bf16`](crate::quant::float16::f32_to_bf16) of floats that are not NaN.
#[inline]
#[target_feature(enable = "avx2")]
fn rounded_high_words(value: __m256) -> __m256i {
    let bits = _mm256_castps_si256(value);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, half))
}

/// Numbers in `-128..128` as bytes.
#[inline]
#[target_feature(enable = "avx2")]
fn low_bytes(low: __m256i, high: __m256i) -> [u8; LANES] {
    let mut bytes = [0; LANES];
    // Packing works on the 128-bit halves: the middle two quarters of the words change places after it.
    let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(low, high));
    let (low, high) = (_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
    // SAFETY: sixteen bytes are written.
    unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), _mm_packs_epi16(low, high)) };
    bytes
}

#[inline]
#[target_feature(enable = "avx2")]
fn nearest_any(value: __m256) -> __m256 {
    let bits = _mm256_castps_si256(_mm256_add_ps(value, _mm256_set1_ps(12_582_912.0)));
    let mantissa = _mm256_and_si256(bits, _mm256_set1_epi32(0x007f_ffff));
    _mm256_cvtepi32_ps(_mm256_sub_epi32(mantissa, _mm256_set1_epi32(0x0040_0000)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn nearest_byte(value: __m256) -> __m256 {
    let bits = _mm256_castps_si256(_mm256_add_ps(value, _mm256_set1_ps(12_582_912.0)));
    _mm256_cvtepi32_ps(_mm256_and_si256(bits, _mm256_set1_epi32(0xff)))
}

impl Mask for Mask8x2 {
    #[inline(always)]
    fn bits(self) -> u16 {
        // SAFETY: see above.
        unsafe { (_mm256_movemask_ps(self.0) | _mm256_movemask_ps(self.1) << 8) as u16 }
    }

    #[inline(always)]
    fn any(self) -> bool {
        // SAFETY: see above.
        unsafe { _mm256_movemask_ps(_mm256_or_ps(self.0, self.1)) != 0 }
    }

    #[inline(always)]
    fn all(self) -> bool {
        // SAFETY: see above.
        unsafe { _mm256_movemask_ps(_mm256_and_ps(self.0, self.1)) == 0xff }
    }

    #[inline(always)]
    fn negated(self) -> Self {
        // SAFETY: see above.
        let ones = unsafe { _mm256_castsi256_ps(_mm256_set1_epi32(-1)) };
        halves!(_mm256_xor_ps, self, Self(ones, ones))
    }
}
