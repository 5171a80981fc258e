//! Sixteen lanes in four registers of Advanced SIMD.

use std::arch::aarch64::*;
use std::ops::{Add, BitAnd, BitOr, Div, Mul, Sub};

use crate::cpu::Neon;
use crate::quant::kernels::wide::{Floats, Isa, LANES, Mask};

/// Sixteen floats; exist only where [`Neon`] does.
#[derive(Clone, Copy)]
pub(crate) struct F32x4x4([float32x4_t; 4]);

/// Sixteen truth values, all bits of a lane alike; exist only where [`Neon`] does.
#[derive(Clone, Copy)]
pub(crate) struct Mask4x4([uint32x4_t; 4]);

// SAFETY, for all of this file: values of these types exist only where the CPU has Advanced SIMD.

impl Isa for Neon {
    type Floats = F32x4x4;

    const MANY_REGISTERS: bool = false;

    #[inline(always)]
    fn splat(self, value: f32) -> F32x4x4 {
        // SAFETY: see above.
        F32x4x4([unsafe { vdupq_n_f32(value) }; 4])
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> F32x4x4 {
        let mut parts = self.splat(0.0);
        for (part, values) in parts.0.iter_mut().zip(values.as_chunks::<4>().0) {
            // SAFETY: see above; four floats are read.
            *part = unsafe { vld1q_f32(values.as_ptr()) };
        }
        parts
    }

    #[inline(always)]
    fn extremes_of_each(self, blocks: &[[f32; 2 * LANES]; LANES]) -> (F32x4x4, F32x4x4) {
        let (mut lows, mut highs) = (self.splat(0.0), self.splat(0.0));
        for (g, blocks) in blocks.as_chunks::<4>().0.iter().enumerate() {
            let (mut low, mut high) = ([lows.0[0]; 4], [lows.0[0]; 4]);
            for (k, block) in blocks.iter().enumerate() {
                let mut quads = block.as_chunks::<4>().0.iter();
                // SAFETY: see above; four floats are read at a time.
                unsafe {
                    if let Some(first) = quads.next() {
                        (low[k], high[k]) = (vld1q_f32(first.as_ptr()), vld1q_f32(first.as_ptr()));
                    }
                    for quad in quads {
                        let quad = vld1q_f32(quad.as_ptr());
                        (low[k], high[k]) = (vminq_f32(low[k], quad), vmaxq_f32(high[k], quad));
                    }
                }
            }
            // SAFETY: see above.
            unsafe {
                lows.0[g] = vpminq_f32(vpminq_f32(low[0], low[1]), vpminq_f32(low[2], low[3]));
                highs.0[g] = vpmaxq_f32(vpmaxq_f32(high[0], high[1]), vpmaxq_f32(high[2], high[3]));
            }
        }
        (lows, highs)
    }

    #[inline(always)]
    fn transpose(self, rows: [&[f32; LANES]; LANES]) -> [F32x4x4; LANES] {
        let mut columns = [self.splat(0.0); LANES];
        for part in 0..4 {
            for quad in 0..4 {
                // SAFETY: see above; the loads read four floats from sixteen.
                unsafe {
                    let a = vld1q_f32(rows[4 * part].as_chunks::<4>().0[quad].as_ptr());
                    let b = vld1q_f32(rows[4 * part + 1].as_chunks::<4>().0[quad].as_ptr());
                    let c = vld1q_f32(rows[4 * part + 2].as_chunks::<4>().0[quad].as_ptr());
                    let d = vld1q_f32(rows[4 * part + 3].as_chunks::<4>().0[quad].as_ptr());
                    let (ab_even, ab_odd) = (doubles(vtrn1q_f32(a, b)), doubles(vtrn2q_f32(a, b)));
                    let (cd_even, cd_odd) = (doubles(vtrn1q_f32(c, d)), doubles(vtrn2q_f32(c, d)));
                    columns[4 * quad].0[part] = vreinterpretq_f32_f64(vtrn1q_f64(ab_even, cd_even));
                    columns[4 * quad + 1].0[part] = vreinterpretq_f32_f64(vtrn1q_f64(ab_odd, cd_odd));
                    columns[4 * quad + 2].0[part] = vreinterpretq_f32_f64(vtrn2q_f64(ab_even, cd_even));
                    columns[4 * quad + 3].0[part] = vreinterpretq_f32_f64(vtrn2q_f64(ab_odd, cd_odd));
                }
            }
        }
        columns
    }

    #[inline(always)]
    fn costs<const D: usize>(self, points: &[u16; LANES], table: &[f32; 32]) -> F32x4x4 {
        let mut sums = self.splat(0.0);
        for (sum, points) in sums.0.iter_mut().zip(points.as_chunks::<4>().0) {
            // SAFETY: see above; four points are read, and each coordinate's 16 or 32 bytes of the table.
            unsafe {
                let points = vmovl_u16(vld1_u16(points.as_ptr()));
                for i in 0..D {
                    let shift = vdupq_n_s32(-((16 / D * i) as i32 - if D == 4 { i as i32 } else { 0 }));
                    let level = vandq_u32(vshlq_u32(points, shift), vdupq_n_u32((32 / D - 1) as u32));
                    // Byte `b` of the float for level `l` is byte `4 l + b` of the row.
                    let bytes = vmlaq_u32(vdupq_n_u32(0x0302_0100), level, vdupq_n_u32(0x0404_0404));
                    let bytes = vreinterpretq_u8_u32(bytes);
                    let row = table.as_ptr().add(32 / D * i).cast::<u8>();
                    let cost = if D == 8 {
                        vqtbl1q_u8(vld1q_u8(row), bytes)
                    } else {
                        vqtbl2q_u8(uint8x16x2_t(vld1q_u8(row), vld1q_u8(row.add(16))), bytes)
                    };
                    *sum = vaddq_f32(*sum, vreinterpretq_f32_u8(cost));
                }
            }
        }
        sums
    }

    #[inline(always)]
    fn cheapest_of_eight<const D: usize>(self, points: &[u16; 8], count: usize, table: &[f32; 32]) -> usize {
        let mut padded = [0; LANES];
        padded[..8].copy_from_slice(points);
        let costs = self.costs::<D>(&padded, table).to_array();
        let (mut best, mut winner) = (f32::MAX, 0);
        for (n, &cost) in costs[..count.min(8)].iter().enumerate() {
            if cost < best {
                (best, winner) = (cost, n);
            }
        }
        winner
    }
}

#[inline(always)]
fn doubles(value: float32x4_t) -> float64x2_t {
    // SAFETY: see above.
    unsafe { vreinterpretq_f64_f32(value) }
}

/// Applies an intrinsic to the parts of one, two or three values.
macro_rules! parts {
    ($result:ident: $intrinsic:path, $a:expr) => {{
        // SAFETY: see above.
        $result(unsafe { [$intrinsic($a.0[0]), $intrinsic($a.0[1]), $intrinsic($a.0[2]), $intrinsic($a.0[3])] })
    }};
    ($result:ident: $intrinsic:path, $a:expr, $b:expr) => {{
        let (a, b) = ($a.0, $b.0);
        // SAFETY: see above.
        $result(unsafe {
            [$intrinsic(a[0], b[0]), $intrinsic(a[1], b[1]), $intrinsic(a[2], b[2]), $intrinsic(a[3], b[3])]
        })
    }};
    ($result:ident: $intrinsic:path, $a:expr, $b:expr, $c:expr) => {{
        let (a, b, c) = ($a.0, $b.0, $c.0);
        // SAFETY: see above.
        $result(unsafe {
            [
                $intrinsic(a[0], b[0], c[0]),
                $intrinsic(a[1], b[1], c[1]),
                $intrinsic(a[2], b[2], c[2]),
                $intrinsic(a[3], b[3], c[3]),
            ]
        })
    }};
}

macro_rules! operators {
    ($($operator:ident $method:ident $on:ident $intrinsic:ident;)*) => {$(
        impl $operator for $on {
            type Output = Self;

            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                parts!($on: $intrinsic, self, other)
            }
        }
    )*};
}

operators! {
    Add add F32x4x4 vaddq_f32;
    Sub sub F32x4x4 vsubq_f32;
    Mul mul F32x4x4 vmulq_f32;
    Div div F32x4x4 vdivq_f32;
    BitAnd bitand Mask4x4 vandq_u32;
    BitOr bitor Mask4x4 vorrq_u32;
}

impl Floats for F32x4x4 {
    type Mask = Mask4x4;

    #[inline(always)]
    fn to_array(self) -> [f32; LANES] {
        let mut array = [0.0; LANES];
        for (out, part) in array.as_chunks_mut::<4>().0.iter_mut().zip(self.0) {
            // SAFETY: see above; four floats are written.
            unsafe { vst1q_f32(out.as_mut_ptr(), part) };
        }
        array
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        parts!(Self: vsqrtq_f32, self)
    }

    #[inline(always)]
    fn abs(self) -> Self {
        parts!(Self: vabsq_f32, self)
    }

    #[inline(always)]
    fn negated(self) -> Self {
        parts!(Self: vnegq_f32, self)
    }

    // Not vminq and vmaxq, which make NaN of NaN.

    #[inline(always)]
    fn lesser(self, other: Self) -> Self {
        Self::select(self.below(other), self, other)
    }

    #[inline(always)]
    fn greater(self, other: Self) -> Self {
        Self::select(self.above(other), self, other)
    }

    #[inline(always)]
    fn below(self, other: Self) -> Mask4x4 {
        parts!(Mask4x4: vcltq_f32, self, other)
    }

    #[inline(always)]
    fn above(self, other: Self) -> Mask4x4 {
        parts!(Mask4x4: vcgtq_f32, self, other)
    }

    #[inline(always)]
    fn equals(self, other: Self) -> Mask4x4 {
        parts!(Mask4x4: vceqq_f32, self, other)
    }

    #[inline(always)]
    fn select(mask: Mask4x4, yes: Self, no: Self) -> Self {
        parts!(Self: vbslq_f32, mask, yes, no)
    }

    #[inline(always)]
    fn nearest_small(self) -> Self {
        parts!(Self: vrndnq_f32, self)
    }

    #[inline(always)]
    fn truncated_small(self) -> Self {
        parts!(Self: vrndq_f32, self)
    }

    #[inline(always)]
    fn with_sign_of(self, other: Self) -> Self {
        // SAFETY: see above.
        let sign = F32x4x4([unsafe { vdupq_n_f32(-0.0) }; 4]);
        parts!(Self: with_sign_of, self, other, sign)
    }

    #[inline(always)]
    fn to_bytes(self) -> [u8; LANES] {
        let mut bytes = [0u8; LANES];
        let [a, b, c, d] = self.0;
        // SAFETY: see above; sixteen bytes are written.
        unsafe {
            let low = vcombine_s16(vmovn_s32(vcvtq_s32_f32(a)), vmovn_s32(vcvtq_s32_f32(b)));
            let high = vcombine_s16(vmovn_s32(vcvtq_s32_f32(c)), vmovn_s32(vcvtq_s32_f32(d)));
            vst1q_s8(bytes.as_mut_ptr().cast(), vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
        }
        bytes
    }

    #[inline(always)]
    fn nearest_any(self) -> Self {
        parts!(Self: nearest_any, self)
    }

    #[inline(always)]
    fn nearest_byte(self) -> Self {
        parts!(Self: nearest_byte, self)
    }

    #[inline(always)]
    fn lowest(self) -> f32 {
        let [a, b, c, d] = self.0;
        // SAFETY: see above.
        unsafe { vminvq_f32(vminq_f32(vminq_f32(a, b), vminq_f32(c, d))) }
    }
}

/// The magnitude of `value`, the sign of `other`; `sign` is minus zero.
#[inline]
#[target_feature(enable = "neon")]
fn with_sign_of(value: float32x4_t, other: float32x4_t, sign: float32x4_t) -> float32x4_t {
    vbslq_f32(vreinterpretq_u32_f32(sign), other, value)
}

#[inline]
#[target_feature(enable = "neon")]
fn nearest_any(value: float32x4_t) -> float32x4_t {
    let bits = vreinterpretq_u32_f32(vaddq_f32(value, vdupq_n_f32(12_582_912.0)));
    let mantissa = vreinterpretq_s32_u32(vandq_u32(bits, vdupq_n_u32(0x007f_ffff)));
    vcvtq_f32_s32(vsubq_s32(mantissa, vdupq_n_s32(0x0040_0000)))
}

#[inline]
#[target_feature(enable = "neon")]
fn nearest_byte(value: float32x4_t) -> float32x4_t {
    let bits = vreinterpretq_u32_f32(vaddq_f32(value, vdupq_n_f32(12_582_912.0)));
    vcvtq_f32_u32(vandq_u32(bits, vdupq_n_u32(0xff)))
}

impl Mask for Mask4x4 {
    #[inline(always)]
    fn bits(self) -> u16 {
        let mut bits = 0;
        for (k, part) in self.0.into_iter().enumerate() {
            // SAFETY: see above; four words are read.
            let four = unsafe { vaddvq_u32(vandq_u32(part, vld1q_u32([1, 2, 4, 8].as_ptr()))) };
            bits |= (four as u16) << (4 * k);
        }
        bits
    }

    #[inline(always)]
    fn first(self) -> Option<usize> {
        let [a, b, c, d] = self.0;
        // SAFETY: see above.
        let bytes = unsafe {
            let low = vcombine_u16(vmovn_u32(a), vmovn_u32(b));
            let high = vcombine_u16(vmovn_u32(c), vmovn_u32(d));
            let bytes = vcombine_u8(vmovn_u16(low), vmovn_u16(high));
            // Four bits of each byte: a mask of 64 bits.
            vget_lane_u64::<0>(vreinterpret_u64_u8(vshrn_n_u16::<4>(vreinterpretq_u16_u8(bytes))))
        };
        (bytes != 0).then_some(bytes.trailing_zeros() as usize / 4)
    }

    #[inline(always)]
    fn any(self) -> bool {
        let [a, b, c, d] = self.0;
        // SAFETY: see above.
        unsafe { vmaxvq_u32(vorrq_u32(vorrq_u32(a, b), vorrq_u32(c, d))) != 0 }
    }

    #[inline(always)]
    fn all(self) -> bool {
        let [a, b, c, d] = self.0;
        // SAFETY: see above.
        unsafe { vminvq_u32(vandq_u32(vandq_u32(a, b), vandq_u32(c, d))) != 0 }
    }

    #[inline(always)]
    fn negated(self) -> Self {
        parts!(Self: vmvnq_u32, self)
    }
}
