//! Q4_0 to Q5_1, Q8_0 and Q2_0 without a search. Scales are found for sixteen blocks of 32 weights at once, one block
//! per lane, and then levels for one block after the other. Blocks whose numbers leave the range of the rounding here
//! go to the scalar functions.

use super::{Floats, Isa, LANES, Mask};
use crate::quant::types::{legacy as scalar, low_bit};

const LEN: usize = 32;

/// Scales of sixteen blocks, each in its lane.
struct Scales<F: Floats> {
    d: F,
    /// `1 / d`, or 0 for an empty block.
    inverse: F,
    /// Whether the functions here round the block right.
    usable: F::Mask,
}

impl<F: Floats> Scales<F> {
    #[inline(always)]
    fn new<I: Isa<Floats = F>>(isa: I, d: F) -> Self {
        let zero = isa.splat(0.0);
        let inverse = F::select(d.equals(zero), zero, isa.splat(1.0) / d);
        Scales { d, inverse, usable: inverse.abs().below(isa.splat(f32::INFINITY)) }
    }

    /// The weight of largest magnitude goes to level `-half`.
    #[inline(always)]
    fn symmetric<I: Isa<Floats = F>>(isa: I, blocks: &[[f32; LEN]; LANES], half: f32) -> Self {
        let (low, high) = isa.extremes_of_each(blocks);
        let peak = F::select(high.above(low.negated()), high, low);
        let mut scales = Self::new(isa, peak / isa.splat(-half));
        // Of two that are as large, the first counts, which is not known here.
        scales.usable = scales.usable & high.equals(low.negated()).negated();
        scales
    }

    /// The range is divided evenly; also returns where it begins.
    #[inline(always)]
    fn affine<I: Isa<Floats = F>>(isa: I, blocks: &[[f32; LEN]; LANES], top: f32) -> (Self, F) {
        let zero = isa.splat(0.0);
        let (low, high) = isa.extremes_of_each(blocks);
        let d = (high - low) / isa.splat(top);
        let mut scales = Self::new(isa, d);
        // Of zeros of both signs, the first counts.
        let certain = low.equals(zero).negated() & high.equals(zero).negated();
        scales.usable = scales.usable & d.below(isa.splat(f32::INFINITY)) & certain;
        (scales, low)
    }

    /// Levels go to -127 to 127.
    #[inline(always)]
    fn of_bytes<I: Isa<Floats = F>>(isa: I, blocks: &[[f32; LEN]; LANES]) -> Self {
        let (low, high) = isa.extremes_of_each(blocks);
        // Zeros may have come out with either sign.
        Self::new(isa, low.negated().greater(high).abs() / isa.splat(127.0))
    }
}

/// The weights of a block, or their levels.
#[derive(Clone, Copy)]
pub(super) struct Pair<F>(F, F);

impl<F: Floats> Pair<F> {
    #[inline(always)]
    pub(super) fn load<I: Isa<Floats = F>>(isa: I, x: &[f32; LEN]) -> Self {
        let [low, high] = x.as_chunks::<LANES>().0 else { return Pair(isa.splat(0.0), isa.splat(0.0)) };
        Pair(isa.load(low), isa.load(high))
    }

    /// No more than halfway to the level above `top`.
    #[inline(always)]
    fn at_most<I: Isa<Floats = F>>(self, isa: I, top: f32) -> Self {
        let limit = isa.splat(top + 0.5);
        Pair(self.0.at_most(limit), self.1.at_most(limit))
    }

    /// Levels `0..2 * half`, as [`ToLevels::of_products`](crate::quant::levels::ToLevels::of_products) has them.
    #[inline(always)]
    pub(super) fn of_products<I: Isa<Floats = F>>(self, isa: I, inverse: f32, half: f32) -> Self {
        let (lowest, highest) = (isa.splat(-half), isa.splat(half - 1.0));
        if inverse.is_nan() {
            return Pair(isa.splat(0.0), isa.splat(0.0));
        }
        let inverse = isa.splat(inverse);
        let low = (self.0 * inverse).nearest_any().greater(lowest).lesser(highest);
        let high = (self.1 * inverse).nearest_any().greater(lowest).lesser(highest);
        Pair(low - lowest, high - lowest)
    }

    /// Levels `0..=top`, as [`ToLevels::of_search`](crate::quant::levels::ToLevels::of_search) has them.
    #[inline(always)]
    pub(super) fn of_search<I: Isa<Floats = F>>(self, isa: I, inverse: f32, min: f32, top: f32) -> Self {
        let (lowest, highest) = (isa.splat(0.0), isa.splat(top));
        let (inverse, min) = (isa.splat(inverse), isa.splat(min));
        let low = (inverse * (self.0 - min)).nearest_any().greater(lowest).lesser(highest);
        let high = (inverse * (self.1 - min)).nearest_any().greater(lowest).lesser(highest);
        Pair(low, high)
    }

    #[inline(always)]
    pub(super) fn nibbles(self) -> [u8; LANES] {
        F::truncated_nibbles(self.0, self.1)
    }

    /// A bit for each weight that has come to level 16 or more.
    #[inline(always)]
    pub(super) fn fifth_bits<I: Isa<Floats = F>>(self, isa: I) -> [u8; 4] {
        let sixteen = isa.splat(16.0);
        let below = |bits: u16| u32::from(!bits);
        (below(self.0.below(sixteen).bits()) | below(self.1.below(sixteen).bits()) << 16).to_le_bytes()
    }
}

/// Half of a unit less a little, away from zero: cutting off the fraction of a value after it is added rounds halves
/// away from zero. No weight below a half reaches the next whole number so, and every half does, by rounding.
#[inline(always)]
fn away<I: Isa>(isa: I, value: I::Floats) -> I::Floats {
    value + isa.splat(0.5_f32.next_down()).with_sign_of(value)
}

/// Batches of sixteen blocks whose scales are found before the first level: a scale waits for a chain of comparisons and
/// divisions, and chains run side by side. The weights stay in the innermost cache.
const CHUNK: usize = 8;

/// Scales, inverses and minima of the blocks of a chunk.
struct Found {
    d: [[u16; LANES]; CHUNK],
    inverse: [[f32; LANES]; CHUNK],
    m: [[u16; LANES]; CHUNK],
    min: [[f32; LANES]; CHUNK],
    /// The blocks left to scalar code, a bit each.
    unusable: [u16; CHUNK],
}

impl Found {
    const NOTHING: Self = Found {
        d: [[0; LANES]; CHUNK],
        inverse: [[0.0; LANES]; CHUNK],
        m: [[0; LANES]; CHUNK],
        min: [[0.0; LANES]; CHUNK],
        unusable: [0; CHUNK],
    };

    #[inline(always)]
    fn set<F: Floats>(&mut self, batch: usize, scales: &Scales<F>) {
        self.d[batch] = scales.d.to_f16();
        self.inverse[batch] = scales.inverse.to_array();
        self.unusable[batch] = !scales.usable.bits();
    }

    #[inline(always)]
    fn set_min<F: Floats>(&mut self, batch: usize, min: F) {
        self.m[batch] = min.to_f16();
        self.min[batch] = min.to_array();
    }
}

/// Encodes the blocks whose bits are set.
#[inline(always)]
fn encode_each<const BYTES: usize>(
    mut which: u16,
    blocks: &[[f32; LEN]; LANES],
    out: &mut [[u8; BYTES]; LANES],
    encode: impl Fn(&[f32; LEN], &mut [u8; BYTES]),
) {
    while which != 0 {
        let k = which.trailing_zeros() as usize;
        encode(&blocks[k], &mut out[k]);
        which &= which - 1;
    }
}

/// Encodes blocks: `$find` puts the scales of sixteen `$blocks` into batch `$n` of `$found`, and `$put` writes block
/// `$k` of a batch, `$x`, to `$block`. Those that this does not get right, and those left over, go to `$encode`.
macro_rules! encode_blocks {
    (
        $src:ident, $dst:ident, $bytes:literal, $encode:path,
        |$found:ident, $n:ident, $blocks:ident| $find:expr,
        |$k:ident, $x:ident, $block:ident| $put:expr
    ) => {
        let (batches, rest) = $src.as_chunks::<LEN>().0.as_chunks::<LANES>();
        let (outs, rest_out) = $dst.as_chunks_mut::<$bytes>().0.as_chunks_mut::<LANES>();
        let mut $found = Found::NOTHING;
        for (batches, outs) in batches.chunks(CHUNK).zip(outs.chunks_mut(CHUNK)) {
            for ($n, $blocks) in batches.iter().enumerate() {
                $find;
            }
            for (($n, blocks), out) in batches.iter().enumerate().zip(outs) {
                for $k in 0..LANES {
                    let ($x, $block) = (&blocks[$k], &mut out[$k]);
                    $put;
                }
                encode_each($found.unusable[$n], blocks, out, $encode);
            }
        }
        for (x, block) in rest.iter().zip(rest_out) {
            $encode(x, block);
        }
    };
}

/// [`scalar::quantize_q8_0`].
#[inline(always)]
pub(crate) fn q8_0<I: Isa>(isa: I, src: &[f32], _row_len: usize, _importance: Option<&[f32]>, dst: &mut [u8]) {
    encode_blocks! {
        src, dst, 34, scalar::encode_q8_0,
        |found, n, blocks| found.set(n, &Scales::of_bytes(isa, blocks)),
        |k, x, block| {
            let Pair(low, high) = Pair::load(isa, x);
            let inverse = isa.splat(found.inverse[n][k]);
            block[..2].copy_from_slice(&found.d[n][k].to_le_bytes());
            block[2..18].copy_from_slice(&away(isa, low * inverse).truncated_bytes());
            block[18..].copy_from_slice(&away(isa, high * inverse).truncated_bytes());
        }
    }
}

/// [`low_bit::quantize_q2_0`].
#[inline(always)]
pub(crate) fn q2_0<I: Isa>(isa: I, src: &[f32], _row_len: usize, _importance: Option<&[f32]>, dst: &mut [u8]) {
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
                *levels = (away(isa, part * inverse).truncated_small() + one).to_bytes();
            }
            low_bit::put_q2_0(d, &levels, block);
        } else {
            low_bit::encode_q2_0(x, block);
        }
    }
}

/// The bytes of a block after its scale (and minimum): the fifth bits of five-bit levels, then nibbles.
macro_rules! put_levels {
    ($isa:ident, $levels:ident, $out:expr, 15) => {
        $out.copy_from_slice(&$levels.nibbles());
    };
    ($isa:ident, $levels:ident, $out:expr, 31) => {{
        let (bits, nibbles) = $out.split_at_mut(4);
        bits.copy_from_slice(&$levels.fifth_bits($isa));
        nibbles.copy_from_slice(&$levels.nibbles());
    }};
}

pub(super) use put_levels;

macro_rules! symmetric {
    ($name:ident: $half:literal, $top:tt, $bytes:literal, $encode:ident) => {
        #[doc = concat!("[`", stringify!($encode), "`](scalar::", stringify!($encode), ") of every block.")]
        #[inline(always)]
        pub(crate) fn $name<I: Isa>(isa: I, src: &[f32], dst: &mut [u8]) {
            let offset = isa.splat($half + 0.5);
            encode_blocks! {
                src, dst, $bytes, scalar::$encode,
                |found, n, blocks| found.set(n, &Scales::symmetric(isa, blocks, $half)),
                |k, x, block| {
                    let Pair(low, high) = Pair::load(isa, x);
                    let inverse = isa.splat(found.inverse[n][k]);
                    let levels = Pair(low * inverse + offset, high * inverse + offset).at_most(isa, f32::from($top as u8));
                    block[..2].copy_from_slice(&found.d[n][k].to_le_bytes());
                    put_levels!(isa, levels, block[2..], $top);
                }
            }
        }
    };
}

macro_rules! affine {
    ($name:ident: $top:tt, $bytes:literal, $encode:ident) => {
        #[doc = concat!("[`", stringify!($encode), "`](scalar::", stringify!($encode), ") of every block.")]
        #[inline(always)]
        pub(crate) fn $name<I: Isa>(isa: I, src: &[f32], dst: &mut [u8]) {
            let half = isa.splat(0.5);
            encode_blocks! {
                src, dst, $bytes, scalar::$encode,
                |found, n, blocks| {
                    let (scales, min) = Scales::affine(isa, blocks, f32::from($top as u8));
                    found.set(n, &scales);
                    found.set_min(n, min);
                },
                |k, x, block| {
                    let Pair(low, high) = Pair::load(isa, x);
                    let (inverse, min) = (isa.splat(found.inverse[n][k]), isa.splat(found.min[n][k]));
                    // The largest comes to the top level and a half, give or take a rounding error: no limit is needed.
                    let levels = Pair((low - min) * inverse + half, (high - min) * inverse + half);
                    block[..2].copy_from_slice(&found.d[n][k].to_le_bytes());
                    block[2..4].copy_from_slice(&found.m[n][k].to_le_bytes());
                    put_levels!(isa, levels, block[4..], $top);
                }
            }
        }
    };
}

symmetric!(q4_0: 8.0, 15, 18, encode_q4_0);
symmetric!(q5_0: 16.0, 31, 22, encode_q5_0);
affine!(q4_1: 15, 20, encode_q4_1);
affine!(q5_1: 31, 24, encode_q5_1);
