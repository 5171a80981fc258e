//! The small number formats: whole numbers, FP8 E4M3, FP4 E2M1, and those of scales.

use super::{Grid, ScaleType};
use crate::quant::float16::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use crate::quant::round::nearest_small;
use crate::rounding::gptq::{Nearest, Whole};

/// Largest number of E4M3.
pub(super) const E4M3_MAX: f32 = 448.0;

/// Largest number of E2M1.
pub(super) const FP4_MAX: f32 = 6.0;

/// Magnitudes of E2M1 by code.
const FP4_VALUES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// The bits of the E4M3 number nearest to `value`, ties to even, magnitudes above 448 cut off; NaN gives 0. Minus zero
/// keeps its sign.
pub fn e4m3_bits(value: f32) -> u8 {
    let sign = ((value.to_bits() >> 24) & 0x80) as u8;
    let magnitude = e4m3_magnitude(value);
    let bits = magnitude.to_bits();
    match bits >> 23 {
        // Below 2^-6: units of 2^-9.
        exponent if exponent < 121 => sign | (magnitude * 512.0) as u8,
        exponent => sign | ((exponent - 120) << 3) as u8 | ((bits >> 20) & 7) as u8,
    }
}

/// The magnitude of the E4M3 number nearest to `value`.
#[inline(always)]
fn e4m3_magnitude(value: f32) -> f32 {
    let magnitude = value.abs();
    // NaN is not below.
    let magnitude = if magnitude < E4M3_MAX { magnitude } else { E4M3_MAX };
    let magnitude = if value.is_nan() { 0.0 } else { magnitude };
    let bits = magnitude.to_bits();
    // Three bits of the mantissa stay; a carry goes into the exponent as it should.
    let normal = f32::from_bits((bits + 0x0007_ffff + ((bits >> 20) & 1)) & !0x000f_ffff);
    let small = nearest_small(magnitude * 512.0) / 512.0;
    if magnitude < 0.015_625 { small } else { normal }
}

/// The number with these bits of E4M3; NaN for 0x7f and 0xff.
#[inline(always)]
pub fn e4m3_value(bits: u8) -> f32 {
    let (exponent, mantissa) = (u32::from(bits >> 3) & 15, u32::from(bits) & 7);
    let magnitude = match (exponent, mantissa) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa as f32 / 512.0,
        _ => f32::from_bits(((exponent + 120) << 23) | (mantissa << 20)),
    };
    if bits & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The number with this code (0..=15) of E2M1.
#[inline(always)]
pub fn fp4_value(code: u8) -> f32 {
    let magnitude = FP4_VALUES[usize::from(code & 7)];
    if code & 8 == 0 { magnitude } else { -magnitude }
}

/// The code of the E2M1 number nearest to `value`, ties to even, magnitudes above 6 cut off; NaN gives 0. Minus zero
/// keeps its sign.
#[inline(always)]
fn fp4_code(value: f32) -> u8 {
    let m = value.abs();
    let above = [m > 0.25, m >= 0.75, m > 1.25, m >= 1.75, m > 2.5, m >= 3.5, m > 5.0];
    let code = above.into_iter().fold(0, |code, above| code + u8::from(above));
    code | if value.is_sign_negative() { 8 } else { 0 }
}

/// `2^(bits - 127)`; NaN for 255.
pub fn e8m0_value(bits: u8) -> f32 {
    match bits {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        exponent => f32::from_bits(u32::from(exponent) << 23),
    }
}

/// The bits of the power of two at or below `value`, as far as E8M0 reaches.
pub fn e8m0_bits(value: f32) -> u8 {
    if value.is_finite() { ((value.to_bits() >> 23) & 255) as u8 } else { 254 }
}

/// E4M3.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct E4m3;

impl Nearest for E4m3 {
    #[inline(always)]
    fn nearest(self, t: f32) -> f32 {
        e4m3_magnitude(t).copysign(t)
    }
}

/// E2M1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct E2m1;

impl Nearest for E2m1 {
    #[inline(always)]
    fn nearest(self, t: f32) -> f32 {
        let m = t.abs();
        let part = |above: bool, value: f32| if above { value } else { 0.0 };
        let low = part(m > 0.25, 0.5) + part(m >= 0.75, 0.5) + part(m > 1.25, 0.5) + part(m >= 1.75, 0.5);
        let high = part(m > 2.5, 1.0) + part(m >= 3.5, 1.0) + part(m > 5.0, 2.0);
        (low + high).copysign(t)
    }
}

/// The numbers that codes stand for, in units of the scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Levels {
    Whole(Whole),
    Fp8,
    Fp4,
}

/// Runs `$body` with `$set` the numbers of `$levels` as a type of their own.
macro_rules! with_levels {
    ($levels:expr, $set:ident => $body:expr) => {
        match $levels {
            $crate::rounding::grid::numbers::Levels::Whole($set) => $body,
            $crate::rounding::grid::numbers::Levels::Fp8 => {
                let $set = $crate::rounding::grid::numbers::E4m3;
                $body
            }
            $crate::rounding::grid::numbers::Levels::Fp4 => {
                let $set = $crate::rounding::grid::numbers::E2m1;
                $body
            }
        }
    };
}
pub(super) use with_levels;

impl Levels {
    pub(super) fn of(grid: Grid) -> Levels {
        match grid {
            Grid::Int { bits, .. } => {
                let half = (1u32 << (bits.clamp(1, 8) - 1)) as f32;
                Levels::Whole(Whole { lowest: -half, highest: half - 1.0 })
            }
            Grid::Fp8 => Levels::Fp8,
            Grid::Nvfp4 | Grid::Mxfp4 => Levels::Fp4,
        }
    }

    /// The magnitude, in units of a min-max scale, that the largest weight of a group gets: half of the range for whole
    /// numbers.
    pub(super) fn reach(self) -> f32 {
        match self {
            Levels::Whole(Whole { lowest, highest }) => (highest - lowest) / 2.0,
            Levels::Fp8 => E4M3_MAX,
            Levels::Fp4 => FP4_MAX,
        }
    }

    /// The number of a code.
    #[inline(always)]
    pub(super) fn value(self, code: u8) -> f32 {
        match self {
            Levels::Whole(_) => f32::from(code as i8),
            Levels::Fp8 => e4m3_value(code),
            Levels::Fp4 => fp4_value(code),
        }
    }

    /// [`Nearest::nearest`].
    #[inline(always)]
    pub(super) fn nearest(self, t: f32) -> f32 {
        with_levels!(self, set => set.nearest(t))
    }

    /// The code of a number of the format.
    #[inline(always)]
    pub(super) fn code(self, level: f32) -> u8 {
        match self {
            Levels::Whole(_) => level as i8 as u8,
            Levels::Fp8 => e4m3_bits(level),
            Levels::Fp4 => fp4_code(level),
        }
    }
}

impl ScaleType {
    /// The number of the type that compressed-tensors would store for `scale`, which is not negative: the nearest, ties to
    /// even, within the type's range; of E8M0 the power of two at or below. Zero becomes the type's epsilon.
    pub(super) fn round(self, scale: f32) -> f32 {
        let scale = if scale.is_nan() { 0.0 } else { scale.clamp(0.0, f32::MAX) };
        let rounded = match self {
            ScaleType::F32 => scale,
            ScaleType::F16 => f16_to_f32(f32_to_f16(scale.min(65504.0))),
            // The largest bfloat16.
            ScaleType::Bf16 => bf16_to_f32(f32_to_bf16(scale.min(f32::from_bits(0x7f7f_0000)))),
            ScaleType::F8E4M3 => e4m3_value(e4m3_bits(scale)),
            ScaleType::E8M0 => e8m0_value(e8m0_bits(scale).min(254)),
        };
        if rounded > 0.0 { rounded } else { self.epsilon() }
    }

    /// The number of the type nearest to `scale`, at least its smallest; for refits, where a least-squares scale is not to
    /// be cut down to the power of two below.
    pub(super) fn nearest(self, scale: f32) -> f32 {
        match self {
            ScaleType::E8M0 => self.round(scale * std::f32::consts::SQRT_2),
            _ => self.round(scale),
        }
    }

    /// Distance from 1 to the next number.
    fn epsilon(self) -> f32 {
        match self {
            ScaleType::F32 => f32::EPSILON,
            ScaleType::F16 => 2f32.powi(-10),
            ScaleType::Bf16 => 2f32.powi(-7),
            ScaleType::F8E4M3 => 0.125,
            ScaleType::E8M0 => e8m0_value(0),
        }
    }

    /// The positive number of the type `count` places above `scale` (below if negative), which is one; `None` where
    /// there is none.
    pub(super) fn neighbour(self, scale: f32, count: i32) -> Option<f32> {
        let within = |bits: i32, end: i32| (1..end).contains(&bits);
        match self {
            ScaleType::F32 => {
                // A place is a bfloat16's: finer ones are told apart by nothing.
                let bits = i64::from(scale.to_bits()) + (i64::from(count) << 16);
                (1..0x7f80_0000).contains(&bits).then(|| f32::from_bits(bits as u32))
            }
            ScaleType::F16 => {
                let bits = i32::from(f32_to_f16(scale)) + count;
                within(bits, 0x7c00).then(|| f16_to_f32(bits as u16))
            }
            ScaleType::Bf16 => {
                let bits = i32::from(f32_to_bf16(scale)) + count;
                within(bits, 0x7f80).then(|| bf16_to_f32(bits as u16))
            }
            ScaleType::F8E4M3 => {
                let bits = i32::from(e4m3_bits(scale)) + count;
                within(bits, 0x7f).then(|| e4m3_value(bits as u8))
            }
            ScaleType::E8M0 => {
                let bits = i32::from(e8m0_bits(scale)) + count;
                (0..255).contains(&bits).then(|| e8m0_value(bits as u8))
            }
        }
    }
}
