//! Weights to levels, once a search has settled on scales.
//!
//! The finishing steps of the encoders are generic over [`ToLevels`], so that one text serves scalar code and vectors.

use super::round::nearest_int;
use super::search::LevelMap;

/// How levels are computed. Every implementation gives the same.
pub(super) trait ToLevels: Copy {
    /// Levels `0..2 * half` of weights on both sides of zero: the nearest to `x / scale`, plus `half`.
    fn of_quotients<const N: usize>(self, x: &[f32; N], scale: f32, half: i32) -> [u8; N];

    /// Levels `0..=max_level`: the nearest to `(x + min) / scale`.
    fn of_affine_quotients<const N: usize>(self, x: &[f32; N], scale: f32, min: f32, max_level: f32) -> [u8; N];

    /// Levels `0..2 * half`: the nearest to `inverse * x`, plus `half`. All 0 if `inverse` is NaN, as the search leaves
    /// it in a negligible group.
    fn of_products<const N: usize>(self, x: &[f32; N], inverse: f32, half: i32) -> [u8; N];

    /// Levels `0..=max_level`, as a search rounded.
    fn of_search<const N: usize>(self, x: &[f32; N], level_map: LevelMap, max_level: f32) -> [u8; N];
}

/// One weight after the other.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scalar;

impl ToLevels for Scalar {
    #[inline(always)]
    fn of_quotients<const N: usize>(self, x: &[f32; N], scale: f32, half: i32) -> [u8; N] {
        x.map(|v| (nearest_int(v / scale).clamp(-half, half - 1) + half) as u8)
    }

    #[inline(always)]
    fn of_affine_quotients<const N: usize>(self, x: &[f32; N], scale: f32, min: f32, max_level: f32) -> [u8; N] {
        x.map(|v| nearest_int((v + min) / scale).clamp(0, max_level as i32) as u8)
    }

    #[inline(always)]
    fn of_products<const N: usize>(self, x: &[f32; N], inverse: f32, half: i32) -> [u8; N] {
        if inverse.is_nan() {
            return [0; N];
        }
        x.map(|v| (half + nearest_int(inverse * v).clamp(-half, half - 1)) as u8)
    }

    #[inline(always)]
    fn of_search<const N: usize>(self, x: &[f32; N], level_map: LevelMap, max_level: f32) -> [u8; N] {
        x.map(|v| level_map.level(v, max_level) as u8)
    }
}
