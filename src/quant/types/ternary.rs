//! TQ1_0 and TQ2_0: 256 weights of three levels, weight = `d * (level - 1)`, `d` the largest magnitude as binary16 at
//! the end of the block. Importance plays no part.
//!
//! TQ1_0 packs five levels (trits) into a byte as a fraction of 256: the first is the integer part of `3 byte / 256`,
//! and so on with `byte * 3^n` modulo 256. Its 54 bytes: 32 bytes for weights `0..160` (byte `m` has weights
//! `m + 32 n`), 16 for `160..240` (`160 + m + 16 n`), 4 with four trits each for the rest (`240 + m + 4 n`), `d`.
//! TQ2_0 packs two bits per level like Q2_K: 64 bytes, `d`.

use super::pack::pack_2bit;
use super::{decode_blocks, encode_blocks, get_f16, largest_magnitude, put_f16};
use crate::quant::round::{round_away, round_away_small};

const LEN: usize = 256;
const TQ1_0_BYTES: usize = 54;
const TQ2_0_BYTES: usize = 66;
/// Byte offset of the scale in TQ1_0.
pub(crate) const TQ1_0_D: usize = TQ1_0_BYTES - 2;
/// Byte offset of the scale in TQ2_0.
pub(crate) const TQ2_0_D: usize = TQ2_0_BYTES - 2;

/// Runs of bytes in TQ1_0: number of bytes, trits per byte.
const RUNS: [(usize, usize); 3] = [(32, 5), (16, 5), (4, 4)];

/// Scale and levels 0, 1, 2. Where the inverse of the scale overflows, ggml's conversion of infinity and NaN yields
/// level 1, which is zero.
#[inline(always)]
fn round(x: &[f32; LEN]) -> (f32, [u8; LEN]) {
    let d = largest_magnitude(x);
    let inverse = if d != 0.0 { 1.0 / d } else { 0.0 };
    // Weights that are not finite may round to anything; they must not panic.
    let level = |rounded: i32| (rounded as u8).wrapping_add(1);
    if inverse.is_finite() {
        (d, x.map(|v| level(round_away_small(v * inverse))))
    } else {
        (d, x.map(|v| level(round_away(v * inverse))))
    }
}

/// Encodes TQ1_0 (`quantize_tq1_0`).
#[inline(always)]
pub(crate) fn quantize_tq1_0(src: &[f32], _row_len: usize, _importance: Option<&[f32]>, dst: &mut [u8]) {
    encode_blocks(src, dst, |x, block: &mut [u8; TQ1_0_BYTES]| {
        let (d, levels) = round(x);
        let (mut level, mut byte) = (0, 0);
        for (width, trits) in RUNS {
            for m in 0..width {
                let mut packed: u8 = 0;
                for n in 0..5 {
                    let trit = if n < trits { levels[level + m + n * width] } else { 0 };
                    packed = packed.wrapping_mul(3).wrapping_add(trit);
                }
                // Rounded up, so that the decoder's rounding down finds every trit.
                block[byte + m] = (u32::from(packed) * 256).div_ceil(243) as u8;
            }
            level += width * trits;
            byte += width;
        }
        put_f16(block, TQ1_0_D, d);
    });
}

/// Decodes TQ1_0 (`dequantize_row_tq1_0`).
pub(crate) fn dequantize_tq1_0(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &[u8; TQ1_0_BYTES], x: &mut [f32; LEN]| {
        let d = get_f16(block, TQ1_0_D);
        let (mut weight, mut byte) = (0, 0);
        for (width, trits) in RUNS {
            let bytes = &block[byte..byte + width];
            let mut power: u8 = 1;
            for _ in 0..trits {
                for (v, &packed) in x[weight..weight + width].iter_mut().zip(bytes) {
                    let level = (u16::from(packed.wrapping_mul(power)) * 3) >> 8;
                    *v = f32::from(level as i16 - 1) * d;
                }
                weight += width;
                power = power.wrapping_mul(3);
            }
            byte += width;
        }
    });
}

/// Encodes TQ2_0 (`quantize_tq2_0`).
#[inline(always)]
pub(crate) fn quantize_tq2_0(src: &[f32], _row_len: usize, _importance: Option<&[f32]>, dst: &mut [u8]) {
    encode_blocks(src, dst, |x, block: &mut [u8; TQ2_0_BYTES]| {
        let (d, levels) = round(x);
        if let Some(out) = block.first_chunk_mut() {
            pack_2bit(&levels.map(|level| level & 3), out);
        }
        put_f16(block, TQ2_0_D, d);
    });
}

/// Decodes TQ2_0 (`dequantize_row_tq2_0`); level 3, which no encoder writes, is twice the scale.
pub(crate) fn dequantize_tq2_0(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &[u8; TQ2_0_BYTES], x: &mut [f32; LEN]| {
        let d = get_f16(block, TQ2_0_D);
        for (x, bytes) in x.as_chunks_mut::<128>().0.iter_mut().zip(block.as_chunks::<32>().0) {
            for l in 0..32 {
                // Widened once for four levels.
                let byte = i32::from(bytes[l]);
                x[l] = ((byte & 3) - 1) as f32 * d;
                x[l + 32] = (((byte >> 2) & 3) - 1) as f32 * d;
                x[l + 64] = (((byte >> 4) & 3) - 1) as f32 * d;
                x[l + 96] = ((byte >> 6) - 1) as f32 * d;
            }
        }
    });
}
