//! Q3_K: 256 weights in 16 groups of 16, weight = `d * (scale - 32) * (level - 4)` with 3-bit levels.
//!
//! Block of 110 bytes: 32 bytes with the third bits (bit plane `p` of byte `l` belongs to weight `32 p + l`), 64
//! bytes of lower bits (see `pack_2bit`), 12 bytes with 6-bit scales, binary16 `d`. Scale `j` has its low nibble in
//! byte `j % 8`, upper half for `j >= 8`, and its top two bits in byte `8 + j % 4` at bit `2 (j / 4)`.

use super::pack::{pack_2bit, pack_bit_plane};
use super::{decode_blocks, encode_by_importance, error_weights, get_f16, put_f16, sum_of_squares};
use crate::quant::levels::{Scalar, ToLevels};
use crate::quant::round::nearest_int;
use crate::quant::search::{SymmetricFit, fit_symmetric, fit_symmetric_by_descent};

const LEN: usize = 256;
pub(in crate::quant) const BYTES: usize = 110;
pub(in crate::quant) const GROUP: usize = 16;
pub(in crate::quant) const GROUPS: usize = LEN / GROUP;
const LEVELS: usize = 32;
pub(super) const SCALES: usize = LEVELS + 64;
/// Byte offset of the scale of scales.
pub(crate) const D: usize = SCALES + 12;
const _: () = assert!(D + 2 == BYTES);

/// Levels on either side of zero.
pub(in crate::quant) const HALF: i32 = 4;
/// Group scales on either side of zero.
pub(in crate::quant) const SCALE_HALF: i32 = 32;

/// Encodes Q3_K (`quantize_q3_K`).
pub(crate) fn quantize(src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]) {
    let weighted = |(): &(), x: &_, w: &_, block: &mut _| encode_weighted(x, w, block);
    encode_by_importance(src, row_len, importance, dst, encode, |_| (), weighted);
}

/// Group scales by descent, rounded against the largest.
fn encode(x: &[f32; LEN], block: &mut [u8; BYTES]) {
    let fits: [_; GROUPS] = std::array::from_fn(|j| fit_symmetric_by_descent(&groups(x)[j], HALF));
    finish_plain(Scalar, x, &fits.map(|(scale, _)| scale), |j| fits[j].1, block);
}

/// Rounds the scales of the groups against the largest and writes the block. `searched` gives the levels that the
/// search ended with.
#[inline(always)]
pub(in crate::quant) fn finish_plain(
    to_levels: impl ToLevels,
    x: &[f32; LEN],
    scales: &[f32; GROUPS],
    searched: impl Fn(usize) -> [u8; GROUP],
    block: &mut [u8; BYTES],
) {
    let peak = scales.iter().fold(0.0f32, |peak, scale| if scale.abs() > peak.abs() { *scale } else { peak });
    let mut d = 0.0;
    let mut packed = [0; 12];
    if peak != 0.0 {
        let inverse = -SCALE_HALF as f32 / peak;
        packed = pack_scales(scales.map(|scale| {
            let rounded = i32::from(nearest_int(inverse * scale) as i8);
            (rounded.clamp(-SCALE_HALF, SCALE_HALF - 1) + SCALE_HALF) as u8
        }));
        d = 1.0 / inverse;
    }
    finish(to_levels, x, d, packed, searched, block);
}

/// Group scales by search over candidates, fitted with the summed weights of their groups.
fn encode_weighted(x: &[f32; LEN], importance: &[f32; LEN], block: &mut [u8; BYTES]) {
    let (mut scales, mut inverses, mut sums) = ([0.0; GROUPS], [0.0; GROUPS], [0.0; GROUPS]);
    let sigma2 = 2.0 * sum_of_squares(x) / LEN as f32;
    for (j, (x, w)) in groups(x).iter().zip(groups(importance)).enumerate() {
        let weights = error_weights(x, w, sigma2);
        sums[j] = weights.iter().fold(0.0, |sum, w| sum + w);
        let fit = fit_symmetric(x, &weights, HALF);
        (scales[j], inverses[j]) = (fit.scale, fit.inverse);
    }
    finish_weighted(Scalar, x, &scales, &inverses, &fit_symmetric(&scales, &sums, SCALE_HALF), block);
}

/// Writes the block for scales of groups that `fit` puts onto their 6-bit levels. The inverses are those of the
/// groups' searches.
#[inline(always)]
pub(in crate::quant) fn finish_weighted(
    to_levels: impl ToLevels,
    x: &[f32; LEN],
    scales: &[f32; GROUPS],
    inverses: &[f32; GROUPS],
    fit: &SymmetricFit,
    block: &mut [u8; BYTES],
) {
    let searched = |j: usize| to_levels.of_products(&groups(x)[j], inverses[j], HALF);
    finish(
        to_levels,
        x,
        fit.scale,
        pack_scales(to_levels.of_products(scales, fit.inverse, SCALE_HALF)),
        searched,
        block,
    );
}

#[inline(always)]
fn pack_scales(scales: [u8; GROUPS]) -> [u8; 12] {
    let mut packed = [0; 12];
    for (j, scale) in scales.into_iter().enumerate() {
        packed[j % 8] |= (scale & 0x0f) << (j / 8 * 4);
        packed[8 + j % 4] |= (scale >> 4) << (j / 4 * 2);
    }
    packed
}

/// Scales with their offset removed, `-32..=31`.
#[inline(always)]
pub(in crate::quant) fn unpack_scales(packed: &[u8]) -> [i8; GROUPS] {
    std::array::from_fn(|j| {
        let low = (packed[j % 8] >> (j / 8 * 4)) & 0x0f;
        let high = (packed[8 + j % 4] >> (j / 4 * 2)) & 3;
        (low | (high << 4)) as i8 - SCALE_HALF as i8
    })
}

/// Rounds the weights anew with the scales as stored, and writes the block. Groups whose stored scale is zero keep
/// the levels of the search.
#[inline(always)]
fn finish(
    to_levels: impl ToLevels,
    x: &[f32; LEN],
    d: f32,
    scales: [u8; 12],
    searched: impl Fn(usize) -> [u8; GROUP],
    block: &mut [u8; BYTES],
) {
    block[SCALES..D].copy_from_slice(&scales);
    put_f16(block, D, d);
    let d = get_f16(block, D);
    let stored = unpack_scales(&scales);
    let mut levels = [0; LEN];
    for (j, (x, levels)) in groups(x).iter().zip(levels.as_chunks_mut::<GROUP>().0).enumerate() {
        let scale = d * f32::from(stored[j]);
        *levels = if scale != 0.0 { to_levels.of_quotients(x, scale, HALF) } else { searched(j) };
    }
    put_levels(&levels, block);
}

#[inline(always)]
fn put_levels(levels: &[u8; LEN], block: &mut [u8; BYTES]) {
    if let Some(out) = block.first_chunk_mut() {
        pack_bit_plane(levels, 2, out);
    }
    if let Some(out) = block[LEVELS..].first_chunk_mut() {
        pack_2bit(&levels.map(|level| level & 3), out);
    }
}

/// Writes a block from its numbers; scales and levels count from zero.
pub(super) fn put(d: f32, scales: [u8; GROUPS], levels: &[u8; LEN], block: &mut [u8; BYTES]) {
    block[SCALES..D].copy_from_slice(&pack_scales(scales));
    put_f16(block, D, d);
    put_levels(levels, block);
}

#[inline(always)]
pub(in crate::quant) fn groups(x: &[f32; LEN]) -> &[[f32; GROUP]] {
    x.as_chunks().0
}

/// Decodes Q3_K (`dequantize_row_q3_K`).
pub(crate) fn dequantize(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &[u8; BYTES], x: &mut [f32; LEN]| {
        let d = get_f16(block, D);
        let scales = unpack_scales(&block[SCALES..D]);
        for (j, x) in x.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
            let scale = d * f32::from(scales[j]);
            let column = j % 2 * GROUP;
            let high = &block[column..][..GROUP];
            let (low, shift) = (&block[LEVELS + j / 8 * 32 + column..][..GROUP], j % 8 / 2 * 2);
            for i in 0..GROUP {
                let level = ((low[i] >> shift) & 3) | (((high[i] >> (j / 2)) & 1) << 2);
                x[i] = scale * f32::from(level as i8 - HALF as i8);
            }
        }
    });
}
