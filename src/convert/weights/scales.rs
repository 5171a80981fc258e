//! Scales of quantized weights: one for a tensor, a row, a group of columns or a block of rows and columns.
//!
//! Single values are read at once. Larger tensors stay on disk; the run loads those of the rows that it converts, since
//! a scale for every 16 weights is a sizable part of a model.

use std::ops::RangeInclusive;

use safetensors::tensor::Dtype;

use super::fp8::{e4m3_to_f32, e8m0_to_f32};
use super::wrong;
use crate::convert::ConvertError;
use crate::convert::checkpoint::{Checkpoint, shape_text};
use crate::quant::float16::{bf16_to_f32, f16_to_f32};

/// How a scale is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stored {
    F32,
    F16,
    BF16,
    E4M3,
    /// A power of two in a byte, of dtype F8_E8M0 or U8.
    E8M0,
}

impl Stored {
    fn of(dtype: Dtype) -> Option<Stored> {
        match dtype {
            Dtype::F32 => Some(Stored::F32),
            Dtype::F16 => Some(Stored::F16),
            Dtype::BF16 => Some(Stored::BF16),
            Dtype::F8_E4M3 => Some(Stored::E4M3),
            Dtype::F8_E8M0 | Dtype::U8 => Some(Stored::E8M0),
            _ => None,
        }
    }

    fn bytes(self) -> u64 {
        match self {
            Stored::F32 => 4,
            Stored::F16 | Stored::BF16 => 2,
            Stored::E4M3 | Stored::E8M0 => 1,
        }
    }

    fn widen(self, raw: &[u8]) -> Vec<f32> {
        let of_16_bits =
            |value: fn(u16) -> f32| raw.as_chunks().0.iter().map(|b| value(u16::from_le_bytes(*b))).collect();
        match self {
            Stored::F32 => raw.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
            Stored::F16 => of_16_bits(f16_to_f32),
            Stored::BF16 => of_16_bits(bf16_to_f32),
            Stored::E4M3 => raw.iter().map(|byte| e4m3_to_f32(*byte)).collect(),
            Stored::E8M0 => raw.iter().map(|byte| e8m0_to_f32(*byte)).collect(),
        }
    }
}

/// Scales of one weight tensor: `values[matrix][row block][column block]`.
#[derive(Debug)]
pub(in crate::convert) struct Scales {
    tensor: usize,
    pub(super) stored: Stored,
    /// Rows and columns that share a scale.
    pub(super) block: [u64; 2],
    pub(super) rows_per_matrix: u64,
    /// Rows and columns of scales in a matrix.
    grid: [u64; 2],
    /// The one value that serves all matrices, where there is only one.
    single: Option<f32>,
}

/// Scales of a stretch of rows.
pub(in crate::convert) struct Loaded {
    values: Vec<f32>,
    /// Row of scales that `values` begin with.
    first: u64,
}

impl Scales {
    /// Describes and checks tensor `index`, the scales of `weight` whose values have `shape`. `blocks` are sizes of
    /// blocks that the configuration names or implies, the likeliest first.
    pub(super) fn read(
        checkpoint: &Checkpoint,
        index: usize,
        weight: usize,
        shape: &[u64],
        blocks: &[[u64; 2]],
    ) -> Result<Scales, ConvertError> {
        let tensor = &checkpoint.tensors()[index];
        let [leading @ .., rows, columns] = shape else {
            return Err(wrong(checkpoint, weight, "is quantized but no matrix; use an unquantized model"));
        };
        let (rows, columns) = (*rows, *columns);
        if shape.contains(&0) || tensor.elements() == 0 {
            return Err(wrong(checkpoint, weight, "or its scales hold nothing; download the weights again"));
        }
        let matrices: u64 = leading.iter().product();
        let Some(stored) = Stored::of(tensor.dtype) else {
            let problem = format!("has dtype {:?}, expected F32, BF16, F16, F8_E4M3 or F8_E8M0 scales", tensor.dtype);
            return Err(wrong(checkpoint, index, problem));
        };
        let under = |tail: &[u64]| [leading, tail].concat();
        let by_block = blocks.iter().copied().find(|block| {
            tensor.shape == under(&[rows.div_ceil(block[0]), columns.div_ceil(block[1])]) && tensor.elements() > 0
        });
        let by_group = match tensor.shape.as_slice() {
            [front @ .., groups] if front == under(&[rows]) && *groups > 0 => {
                columns.is_multiple_of(*groups).then(|| columns / groups)
            }
            _ => None,
        };
        let (block, grid) = if tensor.elements() == 1 {
            ([u64::MAX, u64::MAX], [1, 1])
        } else if let Some(block) = by_block {
            (block, [rows.div_ceil(block[0]), columns.div_ceil(block[1])])
        } else if let Some(group) = by_group {
            ([1, group], [rows, columns / group])
        } else if tensor.shape == under(&[rows]) {
            ([1, u64::MAX], [rows, 1])
        } else if !leading.is_empty() && tensor.elements() == matrices {
            ([u64::MAX, u64::MAX], [1, 1])
        } else {
            let [tall, wide] = blocks.first().copied().unwrap_or([1, 1]);
            let problem = format!(
                "has shape {}; weights of shape {} have one scale, one a row, one a group, or {} for blocks of {tall} x \
                 {wide}",
                tensor.shape_text(),
                shape_text(shape),
                shape_text(&under(&[rows.div_ceil(tall), columns.div_ceil(wide)])),
            );
            return Err(wrong(checkpoint, index, problem));
        };
        let mut scales = Scales { tensor: index, stored, block, rows_per_matrix: rows, grid, single: None };
        if tensor.elements() == 1 {
            scales.single = Some(scales.values_at(checkpoint, 0, 1)?[0]);
        }
        scales.refuse_zeros(checkpoint)?;
        Ok(scales)
    }

    /// Scales that are all zero make all weights zero: the file was not written to its end, or never filled.
    fn refuse_zeros(&self, checkpoint: &Checkpoint) -> Result<(), ConvertError> {
        if !self.all(checkpoint, &mut |value| value == 0.0)? {
            return Ok(());
        }
        Err(wrong(checkpoint, self.tensor, "holds nothing but zeros; the scales are damaged, download them again"))
    }

    fn values_at(&self, checkpoint: &Checkpoint, first: u64, count: u64) -> Result<Vec<f32>, ConvertError> {
        let bytes = self.stored.bytes();
        let mut raw = vec![0; (count * bytes) as usize];
        checkpoint.read_at(self.tensor, first * bytes, &mut raw)?;
        let values = self.stored.widen(&raw);
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(values),
            Some(at) => {
                let problem = format!("value {} is {}; the scales are damaged", first + at as u64, values[at]);
                Err(wrong(checkpoint, self.tensor, problem))
            }
        }
    }

    /// The row of scales that serves row `row`, counted over all matrices.
    fn grid_row(&self, row: u64) -> u64 {
        row / self.rows_per_matrix * self.grid[0] + row % self.rows_per_matrix / self.block[0]
    }

    /// Reads the scales of these rows, counted over all matrices.
    pub(super) fn load(&self, checkpoint: &Checkpoint, rows: RangeInclusive<u64>) -> Result<Loaded, ConvertError> {
        if self.single.is_some() {
            return Ok(Loaded { values: Vec::new(), first: 0 });
        }
        let (first, last) = (self.grid_row(*rows.start()), self.grid_row(*rows.end()));
        let values = self.values_at(checkpoint, first * self.grid[1], (last + 1 - first) * self.grid[1])?;
        Ok(Loaded { values, first })
    }

    /// The scales of a row, one for each group of [`Scales::group`] columns.
    pub(super) fn of_row<'a>(&'a self, loaded: &'a Loaded, row: u64) -> &'a [f32] {
        if let Some(single) = &self.single {
            return std::slice::from_ref(single);
        }
        let first = ((self.grid_row(row) - loaded.first) * self.grid[1]) as usize;
        &loaded.values[first..first + self.grid[1] as usize]
    }

    /// Columns that share a scale.
    pub(super) fn group(&self) -> usize {
        usize::try_from(self.block[1]).unwrap_or(usize::MAX)
    }

    /// True if `each` holds for every scale of the tensor, read piece by piece up to the first that it does not hold for.
    pub(super) fn all(&self, checkpoint: &Checkpoint, each: &mut dyn FnMut(f32) -> bool) -> Result<bool, ConvertError> {
        const PIECE: u64 = 1 << 16;
        let count = checkpoint.tensors()[self.tensor].elements();
        for first in (0..count).step_by(PIECE as usize) {
            let values = self.values_at(checkpoint, first, PIECE.min(count - first))?;
            if !values.into_iter().all(&mut *each) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
