//! Levels of sixteen weights of one block at a time, for the finishing steps that run block by block.

use super::{Floats, Isa, LANES, Mask, Wide};
use crate::quant::levels::ToLevels;
use crate::quant::search::LevelMap;

/// Whole numbers of `lowest..=highest` for each vector of weights, less `lowest`.
macro_rules! levels {
    ($isa:ident, $x:ident, $lowest:expr, $highest:expr, |$v:ident| $scaled:expr) => {{
        let (lowest, highest) = ($isa.splat($lowest), $isa.splat($highest));
        let mut levels = [0; N];
        for (x, out) in $x.as_chunks::<LANES>().0.iter().zip(levels.as_chunks_mut::<LANES>().0) {
            let $v = $isa.load(x);
            *out = ($scaled.nearest_any().greater(lowest).lesser(highest) - lowest).to_bytes();
        }
        levels
    }};
}

impl<I: Isa> ToLevels for Wide<I> {
    #[inline(always)]
    fn of_quotients<const N: usize>(self, x: &[f32; N], scale: f32, half: i32) -> [u8; N] {
        const { assert!(N.is_multiple_of(LANES)) };
        let Wide(isa) = self;
        let scale = isa.splat(scale);
        levels!(isa, x, -half as f32, (half - 1) as f32, |v| (v / scale))
    }

    #[inline(always)]
    fn of_affine_quotients<const N: usize>(self, x: &[f32; N], scale: f32, min: f32, max_level: f32) -> [u8; N] {
        const { assert!(N.is_multiple_of(LANES)) };
        let Wide(isa) = self;
        let (scale, min) = (isa.splat(scale), isa.splat(min));
        levels!(isa, x, 0.0, max_level, |v| ((v + min) / scale))
    }

    #[inline(always)]
    fn of_products<const N: usize>(self, x: &[f32; N], inverse: f32, half: i32) -> [u8; N] {
        const { assert!(N.is_multiple_of(LANES)) };
        let Wide(isa) = self;
        let inverse = isa.splat(inverse);
        if !inverse.equals(inverse).all() {
            return [0; N];
        }
        levels!(isa, x, -half as f32, (half - 1) as f32, |v| (inverse * v))
    }

    #[inline(always)]
    fn of_search<const N: usize>(self, x: &[f32; N], level_map: LevelMap, max_level: f32) -> [u8; N] {
        const { assert!(N.is_multiple_of(LANES)) };
        let Wide(isa) = self;
        let (inverse, min) = (isa.splat(level_map.inverse), isa.splat(level_map.min));
        levels!(isa, x, 0.0, max_level, |v| (inverse * (v - min)))
    }
}
