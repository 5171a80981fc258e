//! Rounding to the grids of compressed-tensors, the format that vLLM and transformers load.
//!
//! A [`Layout`] says what the weights of a matrix may become, which of them share a scale, and in which type the scale is
//! stored; [`Rounded`] is a matrix after that. Scales are rounded to their stored type before codes are chosen, and all
//! divisions are in f32: what is chosen is what readers decode.
//!
//! - [`plain`] is the rounding that compressed-tensors defines, with scales from the largest weights.
//! - [`search`] takes the scales that leave the least squared error, weighed by the importance of columns.
//! - [`feedback`] lets columns answer for the errors of those before them, given the second moment of the inputs, and then
//!   improves scales and codes by coordinate descent.
//! - [`smooth`] finds powers of two that large inputs are better divided by, where inputs are rounded too.
//! - [`gptq_default`] is what llm-compressor does by default, for comparison.
//!
//! Matrices are row-major `[rows, columns]`: outputs, inputs.

mod cells;
mod feedback;
mod gptq_default;
mod numbers;
mod pass;
mod plain;
mod refit;
#[cfg(test)]
mod rounding_tests;
mod search;
mod smooth;
#[cfg(test)]
mod tests;

pub use feedback::feedback;
pub use gptq_default::{gptq_default, resaved_in_bf16};
pub use numbers::{e4m3_bits, e4m3_value, e8m0_bits, e8m0_value, fp4_value};
pub use plain::{common_global_scale, plain};
pub use search::search;
pub use smooth::smooth;

use numbers::Levels;

/// What a weight may become.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Grid {
    /// Whole numbers of `bits` (4 or 8) in two's complement; with a zero point unless symmetric.
    Int {
        /// 4 or 8.
        bits: u32,
        /// Without a zero point.
        symmetric: bool,
    },
    /// FP8 E4M3: no infinity, largest 448.
    Fp8,
    /// FP4 E2M1 with a scale in E4M3 for 16 weights and one f32 divisor of all scales.
    Nvfp4,
    /// FP4 E2M1 with a power of two (E8M0) for 32 weights.
    Mxfp4,
}

/// Which weights share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Groups {
    /// So many consecutive columns of a row, which divide the row.
    Columns(usize),
    /// A row.
    Channel,
    /// A block of rows and columns; the last ones may be smaller.
    Blocks {
        /// Rows of a block.
        rows: usize,
        /// Columns of a block.
        columns: usize,
    },
}

/// The type in which scales are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleType {
    /// binary32.
    F32,
    /// binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// FP8 E4M3, as NVFP4 has it.
    F8E4M3,
    /// A power of two, `2^(e - 127)`, as MXFP4 has it.
    E8M0,
}

/// How a matrix is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    /// What a weight may become.
    pub grid: Grid,
    /// Which weights share a scale.
    pub groups: Groups,
    /// The type of the scales.
    pub scale_type: ScaleType,
}

/// A rounded matrix `[rows, columns]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rounded {
    /// A byte a weight, row-major: two's complement (whole numbers), bits (FP8), 0..=15 (FP4).
    pub codes: Vec<u8>,
    /// `[rows, groups]`, of blocks `[ceil(rows / block rows), ceil(columns / block columns)]`; each is a number of the
    /// scales' type.
    pub scales: Vec<f32>,
    /// `[rows, groups]`; empty for symmetric grids.
    pub zero_points: Vec<i8>,
    /// NVFP4's divisor of all scales; 1 elsewhere.
    pub global_scale: f32,
}

impl Layout {
    /// Whether rows of `columns` weights can be stored so: groups of columns have to divide them.
    pub fn fits(&self, columns: usize) -> bool {
        match self.groups {
            Groups::Columns(group) => group > 0 && columns > 0 && columns.is_multiple_of(group),
            Groups::Channel => columns > 0,
            Groups::Blocks { rows, columns: of_block } => rows > 0 && of_block > 0 && columns > 0,
        }
    }

    /// Columns that share a scale in a row; the last group of a row may have fewer.
    pub fn group_columns(&self, columns: usize) -> usize {
        match self.groups {
            Groups::Columns(group) => group,
            Groups::Channel => columns,
            Groups::Blocks { columns: of_block, .. } => of_block,
        }
    }

    /// Rows and columns of the matrix of scales.
    pub fn scale_shape(&self, rows: usize, columns: usize) -> [usize; 2] {
        let across = columns.div_ceil(self.group_columns(columns).max(1));
        match self.groups {
            Groups::Blocks { rows: of_block, .. } => [rows.div_ceil(of_block.max(1)), across],
            _ => [rows, across],
        }
    }

    /// Whether each group has a zero point.
    pub fn has_zero_points(&self) -> bool {
        matches!(self.grid, Grid::Int { symmetric: false, .. })
    }

    /// The weights as readers decode them, `[rows, columns]`, in f32: `(code - zero point) * scale`; for NVFP4 the scale is
    /// divided by the global scale first.
    ///
    /// # Panics
    /// When `rounded` is no matrix of this layout and size.
    pub fn dequantize(&self, rounded: &Rounded, rows: usize, columns: usize) -> Vec<f32> {
        let [_, across] = self.scale_shape(rows, columns);
        self.check(rounded, rows, columns);
        let levels = Levels::of(self.grid);
        let group = self.group_columns(columns);
        let mut weights = Vec::with_capacity(rows * columns);
        for (row, codes) in rounded.codes.chunks_exact(columns.max(1)).enumerate() {
            for (index, codes) in codes.chunks(group).enumerate() {
                let at = self.scale_row(row) * across + index;
                let step = rounded.scales[at] / rounded.global_scale;
                let zero = rounded.zero_points.get(at).map_or(0.0, |&zero| f32::from(zero));
                weights.extend(codes.iter().map(|&code| (levels.value(code) - zero) * step));
            }
        }
        weights
    }

    /// The row of the matrix of scales that a row of weights belongs to.
    fn scale_row(&self, row: usize) -> usize {
        match self.groups {
            Groups::Blocks { rows, .. } => row / rows,
            _ => row,
        }
    }

    fn check(&self, rounded: &Rounded, rows: usize, columns: usize) {
        let [down, across] = self.scale_shape(rows, columns);
        assert!(self.fits(columns) || rows * columns == 0, "rows of {columns} weights do not fit {self:?}");
        assert_eq!(rounded.codes.len(), rows * columns, "codes of {rows} rows of {columns}");
        assert_eq!(rounded.scales.len(), down * across, "scales of {rows} rows of {columns}");
        let zero_points = if self.has_zero_points() { down * across } else { 0 };
        assert_eq!(rounded.zero_points.len(), zero_points, "zero points of {rows} rows of {columns}");
    }
}
