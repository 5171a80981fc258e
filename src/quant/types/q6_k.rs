//! Q6_K: 256 weights in 16 groups of 16, weight = `d * scale * (level - 32)` with 6-bit levels.
//!
//! Block of 210 bytes: 128 bytes of low nibbles, 64 bytes of upper two bits, 16 signed bytes of scales, binary16
//! `d`. Each half of 128 weights is four planes of 32: in nibble byte `l` weights `l` and `l + 64`, in nibble byte
//! `l + 32` weights `l + 32` and `l + 96`; in upper byte `l` weight `l + 32 p` at bit `2 p`.

use super::{decode_blocks, encode_by_importance, get_f16, put_f16};
use crate::quant::levels::{Scalar, ToLevels};
use crate::quant::round::nearest_int;
use crate::quant::search::{NEGLIGIBLE, fit_symmetric};

const LEN: usize = 256;
pub(in crate::quant) const BYTES: usize = 210;
pub(in crate::quant) const GROUP: usize = 16;
pub(in crate::quant) const GROUPS: usize = LEN / GROUP;
const HIGH: usize = LEN / 2;
pub(super) const SCALES: usize = HIGH + LEN / 4;
/// Byte offset of the scale of scales.
pub(crate) const D: usize = SCALES + GROUPS;
const _: () = assert!(D + 2 == BYTES);

/// Levels on either side of zero.
pub(in crate::quant) const HALF: i32 = 32;

/// Encodes Q6_K (`quantize_q6_K`). Without importance, errors count by the squared weight.
pub(crate) fn quantize(src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]) {
    let plain = |x: &[f32; LEN], block: &mut _| encode(x, &x.map(|v| v * v), block);
    let weighted = |(): &(), x: &_, w: &_, block: &mut _| encode(x, w, block);
    encode_by_importance(src, row_len, importance, dst, plain, |_| (), weighted);
}

fn encode(x: &[f32; LEN], weights: &[f32; LEN], block: &mut [u8; BYTES]) {
    let (mut scales, mut inverses) = ([0.0; GROUPS], [0.0; GROUPS]);
    for (j, (x, w)) in groups(x).iter().zip(groups(weights)).enumerate() {
        let fit = fit_symmetric(x, w, HALF);
        (scales[j], inverses[j]) = (fit.scale, fit.inverse);
    }
    finish(Scalar, x, &scales, &inverses, block);
}

/// Rounds the scales of the groups against their peak and the weights anew with the scales as stored, and writes the
/// block. Groups whose stored scale is zero keep the levels of the search, for which the inverses are.
#[inline(always)]
pub(in crate::quant) fn finish(
    to_levels: impl ToLevels,
    x: &[f32; LEN],
    scales: &[f32; GROUPS],
    inverses: &[f32; GROUPS],
    block: &mut [u8; BYTES],
) {
    let peak = scales.iter().fold(0.0f32, |peak, scale| if scale.abs() > peak.abs() { *scale } else { peak });
    if peak.abs() < NEGLIGIBLE {
        *block = [0; BYTES];
        return;
    }
    let mut levels = [0; LEN];
    let inverse = -128.0 / peak;
    put_f16(block, D, 1.0 / inverse);
    let d = get_f16(block, D);
    for (j, (x, levels)) in groups(x).iter().zip(levels.as_chunks_mut::<GROUP>().0).enumerate() {
        let stored = nearest_int(inverse * scales[j]).min(127) as i8;
        block[SCALES + j] = stored as u8;
        let scale = d * f32::from(stored);
        *levels = if scale != 0.0 {
            to_levels.of_quotients(x, scale, HALF)
        } else {
            to_levels.of_products(x, inverses[j], HALF)
        };
    }
    put_levels(&levels, block);
}

/// Writes a block from its numbers; levels count from zero.
pub(super) fn put(d: f32, scales: &[i8; GROUPS], levels: &[u8; LEN], block: &mut [u8; BYTES]) {
    for (stored, scale) in block[SCALES..D].iter_mut().zip(scales) {
        *stored = *scale as u8;
    }
    put_f16(block, D, d);
    put_levels(levels, block);
}

#[inline(always)]
fn put_levels(levels: &[u8; LEN], block: &mut [u8; BYTES]) {
    let (low, rest) = block.split_at_mut(HIGH);
    for ((levels, low), high) in
        levels.as_chunks::<128>().0.iter().zip(low.as_chunks_mut::<64>().0).zip(rest.as_chunks_mut::<32>().0)
    {
        for l in 0..32 {
            let [a, b, c, d] = [levels[l], levels[l + 32], levels[l + 64], levels[l + 96]];
            low[l] = (a & 0x0f) | (c << 4);
            low[l + 32] = (b & 0x0f) | (d << 4);
            high[l] = (a >> 4) | ((b >> 4) << 2) | ((c >> 4) << 4) | ((d >> 4) << 6);
        }
    }
}

#[inline(always)]
fn groups(x: &[f32; LEN]) -> &[[f32; GROUP]] {
    x.as_chunks().0
}

/// Decodes Q6_K (`dequantize_row_q6_K`).
pub(crate) fn dequantize(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &[u8; BYTES], x: &mut [f32; LEN]| {
        let d = get_f16(block, D);
        for (j, x) in x.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
            let scale = d * f32::from(block[SCALES + j] as i8);
            let (half, plane, column) = (j / 8, j % 8 / 2, j % 2 * GROUP);
            let low = &block[half * 64 + plane % 2 * 32 + column..][..GROUP];
            let high = &block[HIGH + half * 32 + column..][..GROUP];
            for i in 0..GROUP {
                let level = ((low[i] >> (plane / 2 * 4)) & 0x0f) | (((high[i] >> (plane * 2)) & 3) << 4);
                x[i] = scale * f32::from(level as i8 - HALF as i8);
            }
        }
    });
}
