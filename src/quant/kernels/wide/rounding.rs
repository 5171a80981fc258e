//! Q4_0 to Q5_1, Q8_0 and Q2_0 without a search: a block of 32 weights as two vectors, of 64 as four. Blocks whose numbers leave the range
//! of the rounding here go to the scalar functions.

use super::{Floats, Isa, LANES, Mask};
use crate::quant::types::{legacy as scalar, low_bit};

const LEN: usize = 32;

/// The weights of a block.
#[derive(Clone, Copy)]
struct Pair<F>(F, F);

impl<F: Floats> Pair<F> {
    #[inline(always)]
    fn load<I: Isa<Floats = F>>(isa: I, x: &[f32; LEN]) -> Self {
        let [low, high] = x.as_chunks::<LANES>().0 else { return Pair(isa.splat(0.0), isa.splat(0.0)) };
        Pair(isa.load(low), isa.load(high))
    }

    /// Index of the first weight for which `find` is true of its half.
    #[inline(always)]
    fn first(low: F::Mask, high: F::Mask) -> Option<usize> {
        low.first().or_else(|| high.first().map(|lane| LANES + lane))
    }

    /// [`search::peak`](crate::quant::search::peak).
    #[inline(always)]
    fn peak<I: Isa<Floats = F>>(self, isa: I, x: &[f32; LEN]) -> f32 {
        let highest = isa.splat(self.0.abs().greater(self.1.abs()).highest());
        let first = Self::first(self.0.abs().equals(highest), self.1.abs().equals(highest));
        first.map_or(0.0, |index| if x[index] == 0.0 { 0.0 } else { x[index] })
    }

    /// Smallest and largest weight, the first of equals.
    #[inline(always)]
    fn extremes<I: Isa<Floats = F>>(self, isa: I, x: &[f32; LEN]) -> (f32, f32) {
        let (mut low, mut high) = (self.0.lesser(self.1).lowest(), self.0.greater(self.1).highest());
        if low == 0.0 || high == 0.0 {
            let zero = isa.splat(0.0);
            if let Some(first) = Self::first(self.0.equals(zero), self.1.equals(zero)) {
                // Zeros of either sign are equal.
                low = if low == 0.0 { x[first] } else { low };
                high = if high == 0.0 { x[first] } else { high };
            }
        }
        (low, high)
    }

    /// Levels `0..=top` of scaled weights, by truncation.
    #[inline(always)]
    fn truncated<I: Isa<Floats = F>>(self, isa: I, top: u8) -> Self {
        let limit = isa.splat(f32::from(top) + 0.5);
        Pair(self.0.lesser(limit).truncated_small(), self.1.lesser(limit).truncated_small())
    }

    #[inline(always)]
    fn to_bytes(self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        let (low, high) = bytes.split_at_mut(LANES);
        low.copy_from_slice(&self.0.to_bytes());
        high.copy_from_slice(&self.1.to_bytes());
        bytes
    }
}

/// Rounds halves away from zero: half of a unit less a little is added before the fraction is cut off, which no weight
/// below a half reaches and every half does, by rounding.
#[inline(always)]
fn round_away<I: Isa>(isa: I, value: I::Floats) -> I::Floats {
    const BELOW_HALF: f32 = 0.5_f32.next_down();
    let minus = value.below(isa.splat(0.0));
    let half = I::Floats::select(minus, isa.splat(-BELOW_HALF), isa.splat(BELOW_HALF));
    (value + half).truncated_small()
}

/// [`scalar::quantize_q8_0`].
#[inline(always)]
pub fn q8_0<I: Isa>(isa: I, src: &[f32], _row_len: usize, _importance: Option<&[f32]>, dst: &mut [u8]) {
    for (x, block) in src.as_chunks::<LEN>().0.iter().zip(dst.as_chunks_mut().0) {
        let Pair(low, high) = Pair::load(isa, x);
        let d = low.abs().greater(high.abs()).highest() / 127.0;
        let inverse = scalar::inverse(d);
        if inverse.is_finite() {
            let inverse = isa.splat(inverse);
            let levels = Pair(round_away(isa, low * inverse), round_away(isa, high * inverse));
            scalar::put_q8_0(d, &levels.to_bytes(), block);
        } else {
            scalar::encode_q8_0(x, block);
        }
    }
}

/// [`low_bit::quantize_q2_0`].
#[inline(always)]
pub fn q2_0<I: Isa>(isa: I, src: &[f32], _row_len: usize, _importance: Option<&[f32]>, dst: &mut [u8]) {
    for (x, block) in src.as_chunks::<64>().0.iter().zip(dst.as_chunks_mut().0) {
        let mut parts = [isa.splat(0.0); 4];
        let mut magnitude = isa.splat(0.0);
        for (part, x) in parts.iter_mut().zip(x.as_chunks().0) {
            *part = isa.load(x);
            magnitude = part.abs().greater(magnitude);
        }
        let d = magnitude.highest();
        let inverse = scalar::inverse(d);
        if inverse.is_finite() {
            let (inverse, one) = (isa.splat(inverse), isa.splat(1.0));
            let mut levels = [0; 64];
            for (levels, part) in levels.as_chunks_mut().0.iter_mut().zip(parts) {
                // At most a rounding error beyond one, so no limit is needed.
                *levels = (round_away(isa, part * inverse) + one).to_bytes();
            }
            low_bit::put_q2_0(d, &levels, block);
        } else {
            low_bit::encode_q2_0(x, block);
        }
    }
}

macro_rules! symmetric {
    ($name:ident: $half:literal, $encode:ident, $put:ident) => {
        #[doc = concat!("[`", stringify!($encode), "`](scalar::", stringify!($encode), ") of every block.")]
        #[inline(always)]
        pub fn $name<I: Isa>(isa: I, src: &[f32], dst: &mut [u8]) {
            for (x, block) in src.as_chunks::<LEN>().0.iter().zip(dst.as_chunks_mut().0) {
                let pair = Pair::load(isa, x);
                let d = pair.peak(isa, x) / -$half;
                let inverse = scalar::inverse(d);
                if inverse.is_finite() {
                    let (inverse, offset) = (isa.splat(inverse), isa.splat($half + 0.5));
                    let scaled = Pair(pair.0 * inverse + offset, pair.1 * inverse + offset);
                    scalar::$put(d, &scaled.truncated(isa, 2 * $half as u8 - 1).to_bytes(), block);
                } else {
                    scalar::$encode(x, block);
                }
            }
        }
    };
}

macro_rules! affine {
    ($name:ident: $top:literal, $encode:ident, $put:ident) => {
        #[doc = concat!("[`", stringify!($encode), "`](scalar::", stringify!($encode), ") of every block.")]
        #[inline(always)]
        pub fn $name<I: Isa>(isa: I, src: &[f32], dst: &mut [u8]) {
            for (x, block) in src.as_chunks::<LEN>().0.iter().zip(dst.as_chunks_mut().0) {
                let pair = Pair::load(isa, x);
                let (min, max) = pair.extremes(isa, x);
                let d = (max - min) / f32::from($top);
                let inverse = scalar::inverse(d);
                if d.is_finite() && inverse.is_finite() {
                    let (inverse, low, half) = (isa.splat(inverse), isa.splat(min), isa.splat(0.5));
                    let scaled = Pair((pair.0 - low) * inverse + half, (pair.1 - low) * inverse + half);
                    scalar::$put(d, min, &scaled.truncated(isa, $top).to_bytes(), block);
                } else {
                    scalar::$encode(x, block);
                }
            }
        }
    };
}

symmetric!(q4_0: 8.0, encode_q4_0, put_q4_0);
symmetric!(q5_0: 16.0, encode_q5_0, put_q5_0);
affine!(q4_1: 15u8, encode_q4_1, put_q4_1);
affine!(q5_1: 31u8, encode_q5_1, put_q5_1);
