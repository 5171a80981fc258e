//! The values that one group of weights can take once its scales are stored.

use crate::quant::float16::{f16_to_f32, f32_to_f16};
use crate::quant::round::nearest_small;
use crate::quant::types::iq4;

/// Levels of a format and how numbers in units of the step are rounded to them, as a type of its own: loops over weights
/// are compiled for each.
pub(in crate::rounding) trait Nearest: Copy {
    /// The level nearest to `t`, as a number, ties to even; NaN gives some level, the highest of whole numbers.
    fn nearest(self, t: f32) -> f32;
}

/// Whole numbers `lowest..=highest`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::rounding) struct Whole {
    pub lowest: f32,
    pub highest: f32,
}

impl Nearest for Whole {
    #[inline(always)]
    fn nearest(self, t: f32) -> f32 {
        let t = if t < self.highest { t } else { self.highest };
        nearest_small(if t > self.lowest { t } else { self.lowest })
    }
}

/// The sixteen values of IQ4.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table;

impl Nearest for Table {
    #[inline(always)]
    fn nearest(self, t: f32) -> f32 {
        let mut value = f32::from(iq4::VALUES[0]);
        for (i, &border) in iq4::BORDERS.iter().enumerate() {
            let gap = f32::from(iq4::VALUES[i + 1]) - f32::from(iq4::VALUES[i]);
            value += if t < border { 0.0 } else { gap };
        }
        value
    }
}

/// The values of one group: `step * level + shift`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grid {
    step: f32,
    inverse: f32,
    shift: f32,
    /// `None` for the values of IQ4.
    whole: Option<Whole>,
}

impl Grid {
    pub(super) fn new(step: f32, shift: f32, whole: Option<Whole>) -> Grid {
        Grid { step, inverse: inverse(step), shift, whole }
    }

    /// The value of a stored level, as the decoder gives it.
    #[inline(always)]
    pub(super) fn value(&self, level: u8) -> f32 {
        self.step * level_number(level, self.whole) + self.shift
    }

    /// The nearest value as the decoder gives it, and its stored level.
    #[inline(always)]
    pub(super) fn round(&self, v: f32) -> (f32, u8) {
        let t = (v - self.shift) * self.inverse;
        match self.whole {
            Some(whole) => {
                let level = whole.nearest(t);
                (self.step * level + self.shift, (level - whole.lowest) as u8)
            }
            None => {
                let code = iq4::BORDERS.iter().filter(|&&border| t >= border).count();
                (self.step * f32::from(iq4::VALUES[code]) + self.shift, code as u8)
            }
        }
    }
}

/// The number that a stored level stands for, in units of the step.
#[inline(always)]
pub(super) fn level_number(level: u8, whole: Option<Whole>) -> f32 {
    match whole {
        Some(whole) => f32::from(level) + whole.lowest,
        None => f32::from(iq4::VALUES[usize::from(level & 15)]),
    }
}

/// `1 / step`, and 0 where that is not finite: then every weight is rounded to level 0 or the one nearest to it.
#[inline(always)]
pub(in crate::rounding) fn inverse(step: f32) -> f32 {
    let inverse = 1.0 / step;
    if inverse.is_finite() { inverse } else { 0.0 }
}

/// The finite binary16 nearest to `value`; NaN gives 0.
pub(super) fn snap(value: f32) -> f32 {
    const MAX: f32 = 65504.0;
    if value.is_nan() { 0.0 } else { f16_to_f32(f32_to_f16(value.clamp(-MAX, MAX))) }
}

/// The binary16 `count` units in the last place further from zero (nearer if negative) than `value`, which is one;
/// `None` where there is none that is finite and has the same sign.
pub(super) fn neighbour(value: f32, count: i32) -> Option<f32> {
    let bits = i32::from(f32_to_f16(value));
    let (sign, magnitude) = (bits & 0x8000, (bits & 0x7fff) + count);
    (0..0x7c00).contains(&magnitude).then(|| f16_to_f32((sign | magnitude) as u16))
}
