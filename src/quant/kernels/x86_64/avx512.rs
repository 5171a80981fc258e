//! Sixteen lanes in one register of AVX-512.

use std::arch::x86_64::*;
use std::ops::{Add, BitAnd, BitOr, Div, Mul, Sub};

use crate::cpu::Avx512;
use crate::quant::kernels::wide::{Floats, Isa, LANES, Mask};

/// Sixteen floats; exists only where [`Avx512`] does.
#[derive(Clone, Copy)]
pub(crate) struct F32x16(__m512);

/// Sixteen truth values; exist only where [`Avx512`] does.
#[derive(Clone, Copy)]
pub(crate) struct Mask16(__mmask16);

// SAFETY, for all of this file: values of these types exist only where the CPU has AVX-512 F, BW, CD, DQ and VL.

impl Isa for Avx512 {
    type Floats = F32x16;

    const MANY_REGISTERS: bool = true;

    #[inline(always)]
    fn splat(self, value: f32) -> F32x16 {
        // SAFETY: see above.
        F32x16(unsafe { _mm512_set1_ps(value) })
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> F32x16 {
        // SAFETY: see above; sixteen floats are read.
        F32x16(unsafe { _mm512_loadu_ps(values.as_ptr()) })
    }

    #[inline(always)]
    fn extremes_of_each(self, blocks: &[[f32; 2 * LANES]; LANES]) -> (F32x16, F32x16) {
        let zero = self.splat(0.0);
        let (mut lows, mut highs) = ([zero; 4], [zero; 4]);
        for (g, blocks) in blocks.as_chunks::<4>().0.iter().enumerate() {
            let (mut low, mut high) = ([zero; 4], [zero; 4]);
            for (k, block) in blocks.iter().enumerate() {
                if let [a, b] = block.as_chunks().0 {
                    let (a, b) = (self.load(a), self.load(b));
                    (low[k], high[k]) = (a.lesser(b), a.greater(b));
                }
            }
            let ([ab, ba], [cd, dc]) = (interleaved(low[0], low[1]), interleaved(low[2], low[3]));
            let [even, odd] = interleaved_pairs(ab.lesser(ba), cd.lesser(dc));
            lows[g] = even.lesser(odd);
            let ([ab, ba], [cd, dc]) = (interleaved(high[0], high[1]), interleaved(high[2], high[3]));
            let [even, odd] = interleaved_pairs(ab.greater(ba), cd.greater(dc));
            highs[g] = even.greater(odd);
        }
        // Quarter `q` of vector `g` has what is left of a quarter of blocks 4 g .. 4 g + 4.
        let ([a, b], [c, d]) = (quarters(lows[0], lows[1]), quarters(lows[2], lows[3]));
        let [even, odd] = quarters(a.lesser(b), c.lesser(d));
        let low = even.lesser(odd);
        let ([a, b], [c, d]) = (quarters(highs[0], highs[1]), quarters(highs[2], highs[3]));
        let [even, odd] = quarters(a.greater(b), c.greater(d));
        (low, even.greater(odd))
    }

    #[inline(always)]
    fn transpose(self, rows: [&[f32; LANES]; LANES]) -> [F32x16; LANES] {
        let mut quads = [self.splat(0.0).0; LANES];
        // SAFETY: see above.
        unsafe {
            // Transposes the 4 x 4 blocks: after this, register 4 g + i holds column i mod 4 of rows 4 g .. 4 g + 4, for
            // four blocks of columns.
            for g in 0..4 {
                let (a, b) = (self.load(rows[4 * g]).0, self.load(rows[4 * g + 1]).0);
                let (c, d) = (self.load(rows[4 * g + 2]).0, self.load(rows[4 * g + 3]).0);
                let (ab_low, ab_high) = (_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
                let (cd_low, cd_high) = (_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
                quads[4 * g] = _mm512_shuffle_ps::<0x44>(ab_low, cd_low);
                quads[4 * g + 1] = _mm512_shuffle_ps::<0xee>(ab_low, cd_low);
                quads[4 * g + 2] = _mm512_shuffle_ps::<0x44>(ab_high, cd_high);
                quads[4 * g + 3] = _mm512_shuffle_ps::<0xee>(ab_high, cd_high);
            }
            // Then the blocks themselves.
            let mut columns = [self.splat(0.0); LANES];
            for i in 0..4 {
                let [a, b, c, d] = [quads[i], quads[4 + i], quads[8 + i], quads[12 + i]];
                let ab_even = _mm512_shuffle_f32x4::<0x88>(a, b);
                let ab_odd = _mm512_shuffle_f32x4::<0xdd>(a, b);
                let cd_even = _mm512_shuffle_f32x4::<0x88>(c, d);
                let cd_odd = _mm512_shuffle_f32x4::<0xdd>(c, d);
                columns[i] = F32x16(_mm512_shuffle_f32x4::<0x88>(ab_even, cd_even));
                columns[4 + i] = F32x16(_mm512_shuffle_f32x4::<0x88>(ab_odd, cd_odd));
                columns[8 + i] = F32x16(_mm512_shuffle_f32x4::<0xdd>(ab_even, cd_even));
                columns[12 + i] = F32x16(_mm512_shuffle_f32x4::<0xdd>(ab_odd, cd_odd));
            }
            columns
        }
    }

    #[inline(always)]
    fn costs<const D: usize>(self, points: &[u16; LANES], table: &[f32; 32]) -> F32x16 {
        // SAFETY: see above; sixteen points are read, and of the table each coordinate's 4 or 8 floats.
        unsafe {
            let points = _mm512_cvtepu16_epi32(_mm256_loadu_si256(points.as_ptr().cast()));
            let mut sum = _mm512_setzero_ps();
            for i in 0..D {
                let row = table.as_ptr().add(32 / D * i);
                // The permutations look at the lowest bits of an index only: 2 for 4 levels, and 3 for the 8 levels
                // that are there twice.
                let cost = if D == 8 {
                    let level = _mm512_srlv_epi32(points, _mm512_set1_epi32(2 * i as i32));
                    _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(row)), level)
                } else {
                    let level = _mm512_srlv_epi32(points, _mm512_set1_epi32(3 * i as i32));
                    _mm512_permutexvar_ps(level, _mm512_broadcast_f32x8(_mm256_loadu_ps(row)))
                };
                sum = _mm512_add_ps(sum, cost);
            }
            F32x16(sum)
        }
    }

    #[inline(always)]
    fn cheapest_of_eight<const D: usize>(self, points: &[u16; 8], count: usize, table: &[f32; 32]) -> usize {
        // SAFETY: see above.
        unsafe { super::avx2::cheapest_of_eight::<D>(points, count, table) }
    }
}

/// Floats 0 and 1 of each quarter of both, in turn, and floats 2 and 3.
#[inline(always)]
fn interleaved(F32x16(a): F32x16, F32x16(b): F32x16) -> [F32x16; 2] {
    // SAFETY: see above.
    unsafe { [F32x16(_mm512_unpacklo_ps(a, b)), F32x16(_mm512_unpackhi_ps(a, b))] }
}

/// Floats 0 and 1 of each quarter of `a`, then of `b`, and floats 2 and 3.
#[inline(always)]
fn interleaved_pairs(F32x16(a): F32x16, F32x16(b): F32x16) -> [F32x16; 2] {
    // SAFETY: see above.
    unsafe { [F32x16(_mm512_shuffle_ps::<0x44>(a, b)), F32x16(_mm512_shuffle_ps::<0xee>(a, b))] }
}

/// Quarters 0 and 2 of both, and quarters 1 and 3.
#[inline(always)]
fn quarters(F32x16(a): F32x16, F32x16(b): F32x16) -> [F32x16; 2] {
    // SAFETY: see above.
    unsafe { [F32x16(_mm512_shuffle_f32x4::<0x88>(a, b)), F32x16(_mm512_shuffle_f32x4::<0xdd>(a, b))] }
}

macro_rules! operators {
    ($($operator:ident $method:ident $intrinsic:ident;)*) => {$(
        impl $operator for F32x16 {
            type Output = Self;

            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                // SAFETY: see above.
                Self(unsafe { $intrinsic(self.0, other.0) })
            }
        }
    )*};
}

operators! {
    Add add _mm512_add_ps;
    Sub sub _mm512_sub_ps;
    Mul mul _mm512_mul_ps;
    Div div _mm512_div_ps;
}

impl Floats for F32x16 {
    type Mask = Mask16;

    #[inline(always)]
    fn to_array(self) -> [f32; LANES] {
        let mut array = [0.0; LANES];
        // SAFETY: see above; sixteen floats are written.
        unsafe { _mm512_storeu_ps(array.as_mut_ptr(), self.0) };
        array
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm512_sqrt_ps(self.0) })
    }

    #[inline(always)]
    fn abs(self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm512_abs_ps(self.0) })
    }

    #[inline(always)]
    fn negated(self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm512_xor_ps(self.0, _mm512_set1_ps(-0.0)) })
    }

    #[inline(always)]
    fn lesser(self, other: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm512_min_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn at_most(self, other: Self) -> Self {
        // SAFETY: see above. Positive floats compare as integers, which every unit of the CPU can do.
        unsafe {
            let (this, other) = (_mm512_castps_si512(self.0), _mm512_castps_si512(other.0));
            Self(_mm512_castsi512_ps(_mm512_min_epi32(this, other)))
        }
    }

    #[inline(always)]
    fn greater(self, other: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm512_max_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn below(self, other: Self) -> Mask16 {
        // SAFETY: see above.
        Mask16(unsafe { _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, other.0) })
    }

    #[inline(always)]
    fn above(self, other: Self) -> Mask16 {
        // SAFETY: see above.
        Mask16(unsafe { _mm512_cmp_ps_mask::<_CMP_GT_OQ>(self.0, other.0) })
    }

    #[inline(always)]
    fn equals(self, other: Self) -> Mask16 {
        // SAFETY: see above.
        Mask16(unsafe { _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(self.0, other.0) })
    }

    #[inline(always)]
    fn select(mask: Mask16, yes: Self, no: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm512_mask_blend_ps(mask.0, no.0, yes.0) })
    }

    #[inline(always)]
    fn nearest_small(self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT }>(self.0) })
    }

    #[inline(always)]
    fn truncated_small(self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_ZERO }>(self.0) })
    }

    #[inline(always)]
    fn with_sign_of(self, other: Self) -> Self {
        // SAFETY: see above. The table picks `self` where the sign's bit is clear and `other` where it is set.
        unsafe {
            let sign = _mm512_set1_epi32(i32::MIN);
            let (this, other) = (_mm512_castps_si512(self.0), _mm512_castps_si512(other.0));
            Self(_mm512_castsi512_ps(_mm512_ternarylogic_epi32::<0xca>(sign, other, this)))
        }
    }

    #[inline(always)]
    fn truncated_bytes(self) -> [u8; LANES] {
        let mut bytes = [0; LANES];
        // SAFETY: see above; sixteen bytes are written.
        unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(self.0))) };
        bytes
    }

    #[inline(always)]
    fn truncated_nibbles(low: Self, high: Self) -> [u8; LANES] {
        let mut bytes = [0; LANES];
        // SAFETY: see above; sixteen bytes are written.
        unsafe {
            let high = _mm512_slli_epi32::<4>(_mm512_cvttps_epi32(high.0));
            // Of the low four bits those of `low`, of others those of `high`.
            let mask = _mm512_set1_epi32(0x0f);
            let both = _mm512_ternarylogic_epi32::<0xca>(mask, _mm512_cvttps_epi32(low.0), high);
            _mm_storeu_si128(bytes.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(both));
        }
        bytes
    }

    #[inline(always)]
    fn to_f16(self) -> [u16; LANES] {
        let mut halves = [0; LANES];
        // SAFETY: see above; 32 bytes are written.
        unsafe {
            let found = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0);
            _mm256_storeu_si256(halves.as_mut_ptr().cast(), found);
        }
        halves
    }

    #[inline(always)]
    fn to_bf16(self) -> [u16; LANES] {
        let mut halves = [0; LANES];
        // SAFETY: see above; 32 bytes are written.
        unsafe {
            let bits = _mm512_castps_si512(self.0);
            // Half of the last place that stays, less one where that place is even.
            let odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x1_0000));
            let bits = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
            let bits = _mm512_mask_add_epi32(bits, odd, bits, _mm512_set1_epi32(1));
            _mm256_storeu_si256(halves.as_mut_ptr().cast(), _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(bits)));
        }
        halves
    }

    #[inline(always)]
    fn to_bytes(self) -> [u8; LANES] {
        let mut bytes = [0; LANES];
        // SAFETY: see above; sixteen bytes are written.
        unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(self.0))) };
        bytes
    }

    #[inline(always)]
    fn nearest_any(self) -> Self {
        // SAFETY: see above.
        unsafe {
            let bits = _mm512_castps_si512(_mm512_add_ps(self.0, _mm512_set1_ps(12_582_912.0)));
            let mantissa = _mm512_and_si512(bits, _mm512_set1_epi32(0x007f_ffff));
            Self(_mm512_cvtepi32_ps(_mm512_sub_epi32(mantissa, _mm512_set1_epi32(0x0040_0000))))
        }
    }

    #[inline(always)]
    fn nearest_byte(self) -> Self {
        // SAFETY: see above.
        unsafe {
            let bits = _mm512_castps_si512(_mm512_add_ps(self.0, _mm512_set1_ps(12_582_912.0)));
            Self(_mm512_cvtepi32_ps(_mm512_and_si512(bits, _mm512_set1_epi32(0xff))))
        }
    }

    #[inline(always)]
    fn lowest(self) -> f32 {
        // SAFETY: see above.
        unsafe { _mm512_reduce_min_ps(self.0) }
    }
}

impl BitAnd for Mask16 {
    type Output = Self;

    #[inline(always)]
    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl BitOr for Mask16 {
    type Output = Self;

    #[inline(always)]
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl Mask for Mask16 {
    #[inline(always)]
    fn bits(self) -> u16 {
        self.0
    }

    #[inline(always)]
    fn any(self) -> bool {
        self.0 != 0
    }

    #[inline(always)]
    fn all(self) -> bool {
        self.0 == !0
    }

    #[inline(always)]
    fn negated(self) -> Self {
        Self(!self.0)
    }
}
