//! Rounding as compressed-tensors defines it: scales from the largest weights, every weight to the nearest.
//!
//! The formulas are those of compressed-tensors 0.20 (`quantization/utils/helpers.py`), except that divisions are in f32
//! there as in the rest of this module, not in the type of the weights.

use rayon::prelude::*;

use super::numbers::{E4M3_MAX, FP4_MAX, Levels, e8m0_value};
use super::{Grid, Groups, Layout, Rounded};
use crate::rounding::gptq::Whole;

/// Smallest and largest weight of a group, with zero between them.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Range {
    pub low: f32,
    pub high: f32,
}

impl Range {
    pub(super) fn with(self, weights: &[f32]) -> Range {
        weights.iter().fold(self, |Range { low, high }, &w| Range { low: low.min(w), high: high.max(w) })
    }

    pub(super) fn peak(self) -> f32 {
        self.high.max(-self.low)
    }
}

/// NVFP4's global scale for tensors that share one: 448 * 6 over their largest magnitude; 1 where all weights are zero.
pub fn common_global_scale<'a>(tensors: impl IntoIterator<Item = &'a [f32]>) -> f32 {
    let peak = tensors.into_iter().fold(Range::default(), Range::with).peak();
    let scale = E4M3_MAX * FP4_MAX / peak;
    if scale.is_finite() && scale > 0.0 { scale } else { 1.0 }
}

impl Layout {
    /// The global scale to use: that given, or the tensor's own.
    pub(super) fn global_scale(&self, weights: &[f32], global: Option<f32>) -> f32 {
        match self.grid {
            Grid::Nvfp4 => global.unwrap_or_else(|| common_global_scale([weights])),
            _ => 1.0,
        }
    }

    /// The scale as stored, and the zero point, of a group with this range.
    pub(super) fn min_max_scale(&self, range: Range, global: f32) -> (f32, f32) {
        let levels = Levels::of(self.grid);
        match self.grid {
            Grid::Int { symmetric: false, .. } => {
                let Levels::Whole(Whole { lowest, highest }) = levels else { unreachable!("whole numbers") };
                let scale = self.scale_type.round((range.high - range.low) / (highest - lowest));
                (scale, zero_point(lowest - range.low / scale, lowest, highest))
            }
            Grid::Int { .. } | Grid::Fp8 => (self.scale_type.round(range.peak() / levels.reach()), 0.0),
            Grid::Nvfp4 => (self.scale_type.round(global * (range.peak() / FP4_MAX)), 0.0),
            Grid::Mxfp4 => (mx_scale(range.peak()), 0.0),
        }
    }
}

/// The nearest whole number of a range, ties to even.
pub(super) fn zero_point(value: f32, lowest: f32, highest: f32) -> f32 {
    if value.is_nan() { 0.0 } else { value.clamp(lowest, highest).round_ties_even() }
}

/// The power of two under which `peak` lies between 3.5 and 7: peaks with a mantissa of 1.75 and more count as the next
/// power of two, whose quarter it is.
fn mx_scale(peak: f32) -> f32 {
    if !peak.is_finite() {
        return e8m0_value(254);
    }
    // Adding an eighth of the mantissa's range carries exactly from 1.75 on.
    let rounded = peak.to_bits() + (1 << 21);
    let exponent = (rounded >> 23) as i32 - 2;
    e8m0_value(exponent.clamp(0, 254) as u8)
}

/// One row, or the part of it that a group covers, to its codes.
#[inline(always)]
pub(super) fn round_group(levels: Levels, weights: &[f32], step: f32, zero: f32, codes: &mut [u8]) {
    for (code, w) in codes.iter_mut().zip(weights) {
        *code = levels.code(levels.nearest(w / step + zero));
    }
}

/// Rounds `weights`, `[rows, columns]`, by scales from the least and the largest weight of each group, as compressed-tensors
/// does. `global` is NVFP4's global scale where the tensor shares one with others.
///
/// The result does not depend on the number of threads of rayon's current pool.
///
/// # Panics
/// When `weights` is not whole rows or [`Layout::fits`] says no.
#[doc(alias = "RTN")]
#[doc(alias = "round to nearest")]
pub fn plain(layout: Layout, weights: &[f32], rows: usize, columns: usize, global: Option<f32>) -> Rounded {
    let global = layout.global_scale(weights, global);
    let scales = min_max_scales(layout, weights, rows, columns, global);
    round_to_scales(layout, weights, rows, columns, scales, global)
}

/// Scales and zero points of all groups.
pub(super) fn min_max_scales(
    layout: Layout,
    weights: &[f32],
    rows: usize,
    columns: usize,
    global: f32,
) -> Vec<(f32, f32)> {
    assert_eq!(weights.len(), rows * columns, "weights of {rows} rows of {columns}");
    assert!(layout.fits(columns) || weights.is_empty(), "rows of {columns} weights do not fit {layout:?}");
    if weights.is_empty() {
        return Vec::new();
    }
    let group = layout.group_columns(columns);
    let across = columns.div_ceil(group);
    let rows_of_block = match layout.groups {
        Groups::Blocks { rows, .. } => rows,
        _ => 1,
    };
    let blocks = weights.par_chunks(rows_of_block * columns).map(|block| {
        let mut ranges = vec![Range::default(); across];
        for row in block.chunks_exact(columns) {
            for (range, weights) in ranges.iter_mut().zip(row.chunks(group)) {
                *range = range.with(weights);
            }
        }
        ranges.into_iter().map(|range| layout.min_max_scale(range, global)).collect::<Vec<_>>()
    });
    blocks.collect::<Vec<_>>().concat()
}

/// Every weight to the nearest, with these scales and zero points.
pub(super) fn round_to_scales(
    layout: Layout,
    weights: &[f32],
    rows: usize,
    columns: usize,
    scales: Vec<(f32, f32)>,
    global: f32,
) -> Rounded {
    let levels = Levels::of(layout.grid);
    let [_, across] = layout.scale_shape(rows, columns);
    let group = layout.group_columns(columns);
    let mut codes = vec![0u8; rows * columns];
    let chunk = columns.max(1);
    codes.par_chunks_mut(chunk).zip(weights.par_chunks(chunk)).enumerate().for_each(|(row, (codes, weights))| {
        let scales = &scales[layout.scale_row(row) * across..][..across];
        for ((codes, weights), (scale, zero)) in codes.chunks_mut(group).zip(weights.chunks(group)).zip(scales) {
            round_group(levels, weights, scale / global, *zero, codes);
        }
    });
    let zero_points =
        if layout.has_zero_points() { scales.iter().map(|(_, zero)| *zero as i8).collect() } else { vec![] };
    Rounded { codes, scales: scales.into_iter().map(|(scale, _)| scale).collect(), zero_points, global_scale: global }
}
