//! What Q4_K and Q5_K share: 256 weights in 8 groups of 32, weight = `d * scale * level - dmin * min`, binary16 `d`
//! and `dmin` at the start of the block, then 12 bytes with 6-bit scales and minima.
//!
//! Of the 12 bytes, byte `j` holds scale `j` and byte `j + 4` holds min `j` for `j < 4`, in their low 6 bits. Byte
//! `j + 4` for `j >= 4` holds the low nibbles of scale `j` (below) and min `j` (above), whose top two bits are the
//! top two bits of bytes `j - 4` and `j`.

use super::{error_weights, get_f16, put_f16, sum_of_squares};
use crate::quant::levels::{Scalar, ToLevels};
use crate::quant::round::nearest_int;
use crate::quant::search::{AffineFit, AffineSearch, ErrorMeasure, LevelMap, PositiveFit, fit_affine, fit_positive};

pub(in crate::quant) const LEN: usize = 256;
pub(in crate::quant) const GROUP: usize = 32;
pub(in crate::quant) const GROUPS: usize = LEN / GROUP;
/// Bytes of `d`, `dmin` and the packed scales.
pub(in crate::quant) const HEADER: usize = 4 + 12;

/// Highest scale and min of a group.
pub(in crate::quant) const TOP: u8 = 63;

/// How the two formats differ.
pub(in crate::quant) struct Format {
    /// What is tried without importance.
    pub plain: AffineSearch,
    /// What is tried with importance.
    pub weighted: AffineSearch,
    /// Whether fitted scales are limited to 63. Only a scale that rounding made negative, and that wraps around
    /// therefore, ever exceeds it; ggml limits it in Q5_K and not in Q4_K.
    pub limit_fitted_scales: bool,
}

impl Format {
    pub(super) const fn new(max_level: f32, plain_first: f32, plain_steps: usize, limit_fitted_scales: bool) -> Self {
        let error = ErrorMeasure::Squared;
        Format {
            plain: AffineSearch { max_level, first: plain_first, step: 0.1, steps: plain_steps, error },
            weighted: AffineSearch { max_level, first: -0.9, step: 0.05, steps: 36, error },
            limit_fitted_scales,
        }
    }

    /// Writes the header and gives the levels, for scales rounded against their maxima.
    #[inline(always)]
    pub(super) fn encode(&self, x: &[f32; LEN], header: &mut [u8; HEADER]) -> [u8; LEN] {
        let fits = std::array::from_fn(|j| {
            let x = &groups(x)[j];
            let spread = (sum_of_squares(x) / GROUP as f32).sqrt();
            fit_affine(x, &x.map(|v| spread + v.abs()), &self.plain)
        });
        self.finish_plain(Scalar, x, &fits, header)
    }

    /// [`Self::encode`] for fits of the groups.
    #[inline(always)]
    pub(in crate::quant) fn finish_plain(
        &self,
        to_levels: impl ToLevels,
        x: &[f32; LEN],
        fits: &[AffineFit; GROUPS],
        header: &mut [u8; HEADER],
    ) -> [u8; LEN] {
        let max_scale = fits.iter().fold(0.0, |max, fit| if fit.scale > max { fit.scale } else { max });
        let max_min = fits.iter().fold(0.0, |max, fit| if fit.min > max { fit.min } else { max });
        let top = f32::from(TOP);
        let rounded = |values: [f32; GROUPS], max: f32| {
            let inverse = if max > 0.0 { top / max } else { 0.0 };
            values.map(|v| (nearest_int(inverse * v) as u8).min(TOP))
        };
        put_f16(header, 0, max_scale / top);
        put_f16(header, 2, max_min / top);
        let scales = rounded(fits.map(|fit| fit.scale), max_scale);
        let mins = rounded(fits.map(|fit| fit.min), max_min);
        pack_scales(&scales, &mins, header);
        self.round_with_stored_scales(to_levels, x, header, |j| fits[j].level_map)
    }

    /// Writes the header and gives the levels, for scales fitted with the summed weights of their groups.
    #[inline(always)]
    pub(super) fn encode_weighted(
        &self,
        x: &[f32; LEN],
        importance: &[f32; LEN],
        header: &mut [u8; HEADER],
    ) -> [u8; LEN] {
        let mut sums = [0.0; GROUPS];
        let sigma2 = 2.0 * sum_of_squares(x) / LEN as f32;
        let fits: [_; GROUPS] = std::array::from_fn(|j| {
            let weights = error_weights(&groups(x)[j], &groups(importance)[j], sigma2);
            sums[j] = weights.iter().fold(0.0, |sum, w| sum + w);
            fit_affine(&groups(x)[j], &weights, &self.weighted)
        });
        let scales = fit_positive(&fits.map(|fit| fit.scale), &sums, TOP.into());
        let mins = fit_positive(&fits.map(|fit| fit.min), &sums, TOP.into());
        self.finish_weighted(Scalar, x, scales, mins, |j| fits[j].level_map, header)
    }

    /// [`Self::encode_weighted`] for fitted scales and minima. `searched` is how the search of a group rounded.
    #[inline(always)]
    pub(in crate::quant) fn finish_weighted(
        &self,
        to_levels: impl ToLevels,
        x: &[f32; LEN],
        mut scales: PositiveFit<GROUPS>,
        mut mins: PositiveFit<GROUPS>,
        searched: impl Fn(usize) -> LevelMap,
        header: &mut [u8; HEADER],
    ) -> [u8; LEN] {
        if self.limit_fitted_scales {
            scales.levels = scales.levels.map(|level| level.min(TOP));
            mins.levels = mins.levels.map(|level| level.min(TOP));
        }
        put_f16(header, 0, scales.scale);
        put_f16(header, 2, mins.scale);
        pack_scales(&scales.levels, &mins.levels, header);
        self.round_with_stored_scales(to_levels, x, header, searched)
    }

    /// Groups whose stored scale is zero keep the levels of the search.
    #[inline(always)]
    fn round_with_stored_scales(
        &self,
        to_levels: impl ToLevels,
        x: &[f32; LEN],
        header: &[u8; HEADER],
        searched: impl Fn(usize) -> LevelMap,
    ) -> [u8; LEN] {
        let max_level = self.weighted.max_level;
        let (d, dmin) = (get_f16(header, 0), get_f16(header, 2));
        let mut levels = [0; LEN];
        for (j, (x, levels)) in groups(x).iter().zip(levels.as_chunks_mut::<GROUP>().0).enumerate() {
            let (scale, min) = unpack_scale(header, j);
            let scale = d * f32::from(scale);
            *levels = if scale != 0.0 {
                to_levels.of_affine_quotients(x, scale, dmin * f32::from(min), max_level)
            } else {
                to_levels.of_search(x, searched(j), max_level)
            };
        }
        levels
    }
}

#[inline(always)]
fn groups(x: &[f32; LEN]) -> &[[f32; GROUP]] {
    x.as_chunks().0
}

#[inline(always)]
pub(super) fn pack_scales(scales: &[u8; GROUPS], mins: &[u8; GROUPS], header: &mut [u8; HEADER]) {
    let packed = &mut header[4..];
    for j in 0..4 {
        packed[j] = scales[j] | ((scales[j + 4] >> 4) << 6);
        packed[j + 4] = mins[j] | ((mins[j + 4] >> 4) << 6);
        packed[j + 8] = (scales[j + 4] & 0x0f) | ((mins[j + 4] & 0x0f) << 4);
    }
}

/// Scale and min of group `j` (`get_scale_min_k4`).
#[inline(always)]
pub(super) fn unpack_scale(header: &[u8; HEADER], j: usize) -> (u8, u8) {
    let packed = &header[4..];
    if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        let nibbles = packed[j + 4];
        ((nibbles & 0x0f) | ((packed[j - 4] >> 6) << 4), (nibbles >> 4) | ((packed[j] >> 6) << 4))
    }
}

/// Factor and subtrahend of each group: weight = `factor * level - subtrahend`.
#[inline(always)]
pub(in crate::quant) fn group_lines(header: &[u8; HEADER]) -> [(f32, f32); GROUPS] {
    let (d, dmin) = (get_f16(header, 0), get_f16(header, 2));
    std::array::from_fn(|j| {
        let (scale, min) = unpack_scale(header, j);
        (d * f32::from(scale), dmin * f32::from(min))
    })
}

/// Splits a block into its header and the rest.
#[inline(always)]
pub(super) fn split_header(block: &mut [u8]) -> (&mut [u8; HEADER], &mut [u8]) {
    match block.split_first_chunk_mut() {
        Some(parts) => parts,
        None => unreachable!("a block is longer than its header"),
    }
}
