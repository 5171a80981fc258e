//! Q2_K: 256 weights in 16 groups of 16, weight = `d * scale * level - dmin * min` with 2-bit levels.
//!
//! Block of 84 bytes: 16 bytes with the group's 4-bit scale below and 4-bit min above, 64 bytes of levels (see
//! `pack_2bit`), binary16 `d`, binary16 `dmin`.

use super::pack::pack_2bit;
use super::{decode_blocks, encode_by_importance, error_weights, get_f16, put_f16, sum_of_squares};
use crate::quant::levels::{Scalar, ToLevels};
use crate::quant::round::nearest_int;
use crate::quant::search::{AffineFit, AffineSearch, ErrorMeasure, LevelMap, PositiveFit, fit_affine, fit_positive};

const LEN: usize = 256;
pub(in crate::quant) const BYTES: usize = 84;
pub(in crate::quant) const GROUP: usize = 16;
pub(in crate::quant) const GROUPS: usize = LEN / GROUP;
const LEVELS: usize = GROUPS;
/// Byte offset of the scale of scales.
pub(crate) const D: usize = LEVELS + 64;
/// Byte offset of the scale of minima.
pub(crate) const DMIN: usize = D + 2;
const _: () = assert!(DMIN + 2 == BYTES);

/// Highest scale and min of a group.
pub(in crate::quant) const TOP: f32 = 15.0;

/// What is tried without importance.
pub(in crate::quant) const PLAIN: AffineSearch =
    AffineSearch { max_level: 3.0, first: -0.5, step: 0.1, steps: 15, error: ErrorMeasure::Absolute };
/// What is tried with importance.
pub(in crate::quant) const WEIGHTED: AffineSearch =
    AffineSearch { max_level: 3.0, first: -0.9, step: 0.05, steps: 36, error: ErrorMeasure::Squared };

/// Encodes Q2_K (`quantize_q2_K`).
pub(crate) fn quantize(src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]) {
    let weighted = |(): &(), x: &_, w: &_, block: &mut _| encode_weighted(x, w, block);
    encode_by_importance(src, row_len, importance, dst, encode, |_| (), weighted);
}

/// Scales and minima rounded against their maxima.
fn encode(x: &[f32; LEN], block: &mut [u8; BYTES]) {
    let fits = std::array::from_fn(|j| fit_affine(&groups(x)[j], &groups(x)[j].map(f32::abs), &PLAIN));
    finish_plain(Scalar, x, &fits, block);
}

/// Writes the block for fits of its groups, their scales and minima rounded against the largest.
#[inline(always)]
pub(in crate::quant) fn finish_plain(
    to_levels: impl ToLevels,
    x: &[f32; LEN],
    fits: &[AffineFit; GROUPS],
    block: &mut [u8; BYTES],
) {
    let max_scale = fits.iter().fold(0.0, |max, fit| if fit.scale > max { fit.scale } else { max });
    let max_min = fits.iter().fold(0.0, |max, fit| if fit.min > max { fit.min } else { max });
    let mut packed = [0u8; GROUPS];
    let mut d = 0.0;
    if max_scale > 0.0 {
        let inverse = TOP / max_scale;
        packed = fits.map(|fit| nearest_int(inverse * fit.scale) as u8);
        d = max_scale / TOP;
    }
    let mut dmin = 0.0;
    if max_min > 0.0 {
        let inverse = TOP / max_min;
        for (packed, fit) in packed.iter_mut().zip(fits) {
            *packed |= (nearest_int(inverse * fit.min) << 4) as u8;
        }
        dmin = max_min / TOP;
    }
    finish(to_levels, x, d, dmin, &packed, |j| fits[j].level_map, block);
}

/// Scales and minima fitted with the summed weights of their groups.
fn encode_weighted(x: &[f32; LEN], importance: &[f32; LEN], block: &mut [u8; BYTES]) {
    let mut sums = [0.0; GROUPS];
    let sigma2 = sum_of_squares(x) / LEN as f32;
    let fits: [_; GROUPS] = std::array::from_fn(|j| {
        let weights = error_weights(&groups(x)[j], &groups(importance)[j], sigma2);
        sums[j] = weights.iter().fold(0.0, |sum, w| sum + w);
        fit_affine(&groups(x)[j], &weights, &WEIGHTED)
    });
    let scales = fit_positive(&fits.map(|fit| fit.scale), &sums, TOP as i32);
    let mins = fit_positive(&fits.map(|fit| fit.min), &sums, TOP as i32);
    finish_weighted(Scalar, x, &scales, &mins, |j| fits[j].level_map, block);
}

/// Writes the block for fitted scales and minima of its groups. `searched` is how the search of a group rounded.
#[inline(always)]
pub(in crate::quant) fn finish_weighted(
    to_levels: impl ToLevels,
    x: &[f32; LEN],
    scales: &PositiveFit<GROUPS>,
    mins: &PositiveFit<GROUPS>,
    searched: impl Fn(usize) -> LevelMap,
    block: &mut [u8; BYTES],
) {
    let packed = std::array::from_fn(|j| scales.levels[j] | (mins.levels[j] << 4));
    finish(to_levels, x, scales.scale, mins.scale, &packed, searched, block);
}

/// Rounds the weights anew with the scales as stored, and writes the block. Groups whose stored scale is zero keep
/// the levels of the search.
#[inline(always)]
fn finish(
    to_levels: impl ToLevels,
    x: &[f32; LEN],
    d: f32,
    dmin: f32,
    scales: &[u8; GROUPS],
    searched: impl Fn(usize) -> LevelMap,
    block: &mut [u8; BYTES],
) {
    block[..GROUPS].copy_from_slice(scales);
    put_f16(block, D, d);
    put_f16(block, DMIN, dmin);
    let (d, dmin) = (get_f16(block, D), get_f16(block, DMIN));
    let mut levels = [0; LEN];
    for (j, (x, levels)) in groups(x).iter().zip(levels.as_chunks_mut::<GROUP>().0).enumerate() {
        let scale = d * f32::from(scales[j] & 0x0f);
        *levels = if scale != 0.0 {
            to_levels.of_affine_quotients(x, scale, dmin * f32::from(scales[j] >> 4), PLAIN.max_level)
        } else {
            to_levels.of_search(x, searched(j), PLAIN.max_level)
        };
    }
    if let Some(out) = block[LEVELS..].first_chunk_mut() {
        pack_2bit(&levels, out);
    }
}

/// Writes a block from its numbers: scale of each group below, min above.
pub(super) fn put(d: f32, dmin: f32, scales: &[u8; GROUPS], levels: &[u8; LEN], block: &mut [u8; BYTES]) {
    block[..GROUPS].copy_from_slice(scales);
    put_f16(block, D, d);
    put_f16(block, DMIN, dmin);
    if let Some(out) = block[LEVELS..].first_chunk_mut() {
        pack_2bit(levels, out);
    }
}

#[inline(always)]
fn groups(x: &[f32; LEN]) -> &[[f32; GROUP]] {
    x.as_chunks().0
}

/// Decodes Q2_K (`dequantize_row_q2_K`).
pub(crate) fn dequantize(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &[u8; BYTES], x: &mut [f32; LEN]| {
        let (d, dmin) = (get_f16(block, D), get_f16(block, DMIN));
        for (j, x) in x.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
            let scale = d * f32::from(block[j] & 0x0f);
            let min = dmin * f32::from(block[j] >> 4);
            let (bytes, shift) = (&block[LEVELS + j / 8 * 32 + j % 2 * GROUP..][..GROUP], j % 8 / 2 * 2);
            for (v, byte) in x.iter_mut().zip(bytes) {
                *v = scale * f32::from((byte >> shift) & 3) - min;
            }
        }
    });
}
