//! Codes of quantized weights: to floats, and unchanged into the blocks of ggml that can hold them.

use std::ops::RangeInclusive;

use byteorder::{ByteOrder, LittleEndian};

use super::fp8::{e4m3_byte, e4m3_to_f32};
use super::scales::{Loaded, Scales, Stored};
use super::wrong;
use crate::convert::ConvertError;
use crate::convert::checkpoint::Checkpoint;
use crate::gguf::TensorType;
use crate::quant::float16::{f16_to_f32, f32_to_f16};

/// Columns of a block of Q4_0, Q4_1, Q8_0 and MXFP4.
const BLOCK: usize = 32;

/// Values of the 4-bit floats (E2M1): sign, two exponent bits, one mantissa bit.
const E2M1: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// What a code is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Codes {
    /// 8-bit floats.
    E4M3,
    /// Signed bytes.
    I8,
    /// Unsigned integers of this many bits in words of 32, the first in the lowest bits.
    Packed { bits: u32 },
    /// 4-bit floats, two a byte, the first in the lower half.
    E2M1,
}

impl Codes {
    /// Stored bytes of a row.
    pub(super) fn row_bytes(self, columns: u64) -> u64 {
        match self {
            Codes::E4M3 | Codes::I8 => columns,
            Codes::Packed { bits } => (columns * u64::from(bits)).div_ceil(32) * 4,
            Codes::E2M1 => columns / 2,
        }
    }

    /// The code of the value zero where no zero points are stored.
    fn middle(self) -> f32 {
        match self {
            Codes::Packed { bits } => (1u32 << (bits - 1)) as f32,
            _ => 0.0,
        }
    }

    /// Bits of a packed code; those of other codes are whole bytes or halves.
    fn unpack(self, raw: &[u8], mut each: impl FnMut(usize, u8), columns: usize) {
        match self {
            Codes::E4M3 | Codes::I8 | Codes::Packed { bits: 8 } => {
                raw.iter().take(columns).enumerate().for_each(|(column, byte)| each(column, *byte));
            }
            // Little-endian words keep the order of their bytes.
            Codes::Packed { .. } | Codes::E2M1 => {
                for column in 0..columns {
                    each(column, (raw[column / 2] >> (column % 2 * 4)) & 15);
                }
            }
        }
    }

    fn widen(self, raw: &[u8], values: &mut [f32]) {
        let columns = values.len();
        match self {
            Codes::E4M3 => self.unpack(raw, |column, byte| values[column] = e4m3_to_f32(byte), columns),
            Codes::I8 => self.unpack(raw, |column, byte| values[column] = f32::from(byte as i8), columns),
            Codes::Packed { .. } => self.unpack(raw, |column, code| values[column] = f32::from(code), columns),
            Codes::E2M1 => self.unpack(raw, |column, code| values[column] = E2M1[usize::from(code)], columns),
        }
    }
}

/// Codes that stand for zero, one for each scale.
#[derive(Debug)]
pub(super) enum ZeroPoints {
    /// Packed like the codes, but down the rows of a column.
    Packed { tensor: usize, bits: u32, groups: u64 },
    /// A signed byte each.
    Bytes { tensor: usize, groups: u64 },
}

impl ZeroPoints {
    /// Values of these rows, relative to the codes as they are widened.
    fn load(
        &self,
        checkpoint: &Checkpoint,
        rows: &RangeInclusive<u64>,
        codes: Codes,
    ) -> Result<Vec<f32>, ConvertError> {
        let (first, last) = (*rows.start(), *rows.end());
        match *self {
            ZeroPoints::Bytes { tensor, groups } => {
                let mut raw = vec![0; ((last + 1 - first) * groups) as usize];
                checkpoint.read_at(tensor, first * groups, &mut raw)?;
                Ok(raw.iter().map(|byte| f32::from(*byte as i8) + codes.middle()).collect())
            }
            ZeroPoints::Packed { tensor, bits, groups } => {
                let share = u64::from(32 / bits);
                let (top, bottom) = (first / share, last / share);
                let mut raw = vec![0; ((bottom + 1 - top) * groups * 4) as usize];
                checkpoint.read_at(tensor, top * groups * 4, &mut raw)?;
                let mask = (1u32 << bits) - 1;
                let of_row = |row: u64| {
                    let words = raw[((row / share - top) * groups * 4) as usize..].as_chunks::<4>().0;
                    let shift = (row % share) as u32 * bits;
                    words
                        .iter()
                        .take(groups as usize)
                        .map(move |word| ((LittleEndian::read_u32(word) >> shift) & mask) as f32)
                };
                Ok((first..=last).flat_map(of_row).collect())
            }
        }
    }
}

/// A weight tensor that is stored as codes and scales.
#[derive(Debug)]
pub(in crate::convert) struct Coded {
    pub(super) codes: Codes,
    pub(super) scales: Scales,
    pub(super) zero_points: Option<ZeroPoints>,
    /// The group of each column, where groups are not runs of neighbours.
    pub(super) groups: Option<Vec<u32>>,
    /// Multiplies the scales of a matrix: the second-level scales of NVFP4. Empty where there are none.
    pub(super) global: Vec<f32>,
    /// Scale of the activations, by matrix, for programs that round them to 4 bits as well.
    pub(super) input: Vec<f32>,
}

/// What a stretch of rows is multiplied by.
pub(in crate::convert) struct Factors {
    scales: Loaded,
    /// By row and group.
    zero_points: Option<Vec<f32>>,
    first: u64,
}

impl Coded {
    /// Stored bytes of a row.
    pub(in crate::convert) fn row_bytes(&self, columns: u64) -> u64 {
        self.codes.row_bytes(columns)
    }

    /// Reads what these rows need.
    pub(in crate::convert) fn load(
        &self,
        checkpoint: &Checkpoint,
        rows: RangeInclusive<u64>,
    ) -> Result<Factors, ConvertError> {
        let zero_points =
            self.zero_points.as_ref().map(|zeros| zeros.load(checkpoint, &rows, self.codes)).transpose()?;
        let first = *rows.start();
        Ok(Factors { scales: self.scales.load(checkpoint, rows)?, zero_points, first })
    }

    /// Second-level scale of matrix `matrix`.
    pub(in crate::convert) fn global_of(&self, matrix: u64) -> f32 {
        of_matrix(&self.global, matrix)
    }

    /// Activation scale of matrix `matrix`; 1 where there is none.
    pub(in crate::convert) fn input_of(&self, matrix: u64) -> f32 {
        of_matrix(&self.input, matrix)
    }

    fn zero(&self, factors: &Factors, row: u64, group: usize, groups: usize) -> f32 {
        match &factors.zero_points {
            None => self.codes.middle(),
            Some(zeros) => zeros[(row - factors.first) as usize * groups + group],
        }
    }

    /// The values of row `row`, counted over all matrices.
    pub(in crate::convert) fn widen(&self, row: u64, raw: &[u8], factors: &Factors, values: &mut [f32]) {
        self.codes.widen(raw, values);
        let scales = self.scales.of_row(&factors.scales, row);
        let global = self.global_of(row / self.scales.rows_per_matrix);
        if let Some(groups) = &self.groups {
            for (value, group) in values.iter_mut().zip(groups) {
                let group = *group as usize;
                *value = (*value - self.zero(factors, row, group, scales.len())) * scales[group] * global;
            }
            return;
        }
        for (group, (values, scale)) in values.chunks_mut(self.scales.group()).zip(scales).enumerate() {
            let zero = self.zero(factors, row, group, scales.len());
            for value in values {
                // The global scale comes last, as ggml multiplies a finished product by it.
                *value = (*value - zero) * scale * global;
            }
        }
    }

    /// The type of ggml whose blocks hold codes and scales of rows of `columns` values as they are. With `integers`
    /// the scales of integer codes are looked through as well.
    pub(in crate::convert) fn block_type(
        &self,
        checkpoint: &Checkpoint,
        columns: u64,
        integers: bool,
    ) -> Result<Option<TensorType>, ConvertError> {
        let group = self.scales.block[1];
        let one_row = self.scales.block[0] == 1;
        match self.codes {
            Codes::E4M3 => Ok(None),
            Codes::E2M1 if self.scales.stored == Stored::E8M0 => {
                Ok((one_row && group == 32 && self.global.is_empty()).then_some(TensorType::MXFP4))
            }
            Codes::E2M1 => {
                let fits = one_row && group == 16 && columns.is_multiple_of(64) && self.scales.stored == Stored::E4M3;
                Ok(fits.then_some(TensorType::NVFP4))
            }
            Codes::I8 | Codes::Packed { .. } if !integers => Ok(None),
            Codes::I8 | Codes::Packed { .. } => {
                let whole_blocks =
                    columns.is_multiple_of(BLOCK as u64) && (group >= columns || group.is_multiple_of(32));
                if !whole_blocks || self.groups.is_some() {
                    return Ok(None);
                }
                self.integer_type(checkpoint)
            }
        }
    }

    /// Q4_0 or Q8_0 where scales are half-precision numbers and zero points in the middle, Q4_1 where minima are
    /// half-precision numbers, too.
    fn integer_type(&self, checkpoint: &Checkpoint) -> Result<Option<TensorType>, ConvertError> {
        let half = |value: f32| f16_to_f32(f32_to_f16(value)) == value;
        if !self.scales.all(checkpoint, &mut |scale| half(scale))? {
            return Ok(None);
        }
        let four_bits = self.codes == Codes::Packed { bits: 4 };
        let symmetric = if four_bits { TensorType::Q4_0 } else { TensorType::Q8_0 };
        if self.zero_points.is_none() {
            return Ok(Some(symmetric));
        }
        let (mut centred, mut minima) = (true, true);
        const ROWS: u64 = 1024;
        let rows = self.scales.rows_per_matrix;
        for first in (0..rows).step_by(ROWS as usize) {
            let last = (first + ROWS).min(rows) - 1;
            let factors = self.load(checkpoint, first..=last)?;
            for row in first..=last {
                let scales = self.scales.of_row(&factors.scales, row);
                for (group, scale) in scales.iter().enumerate() {
                    let zero = self.zero(&factors, row, group, scales.len());
                    centred &= zero == self.codes.middle();
                    minima &= half(0.0 - zero * scale);
                }
            }
        }
        Ok(match (centred, minima && four_bits) {
            (true, _) => Some(symmetric),
            (false, true) => Some(TensorType::Q4_1),
            (false, false) => None,
        })
    }

    /// Puts row `row` into blocks of `ty`, a type that [`Coded::block_type`] gave; `codes` is as long as the row.
    pub(in crate::convert) fn to_blocks(
        &self,
        ty: TensorType,
        row: u64,
        raw: &[u8],
        factors: &Factors,
        codes: &mut [u8],
        blocks: &mut [u8],
    ) {
        let columns = codes.len();
        self.codes.unpack(raw, |column, code| codes[column] = code, columns);
        let scales = self.scales.of_row(&factors.scales, row);
        let per_block = |index: usize| {
            let group = (index * BLOCK / self.scales.group()).min(scales.len() - 1);
            (scales[group], self.zero(factors, row, group, scales.len()))
        };
        let half = |value: f32| f32_to_f16(value).to_le_bytes();
        let halves = |codes: &[u8], out: &mut [u8]| {
            let (low, high) = codes.split_at(codes.len() / 2);
            out.iter_mut().zip(low).zip(high).for_each(|((out, low), high)| *out = low | high << 4);
        };
        match ty {
            TensorType::NVFP4 => {
                for (blocks, (codes, scales)) in blocks.chunks_mut(36).zip(codes.chunks_mut(64).zip(scales.chunks(4))) {
                    let (heads, nibbles) = blocks.split_at_mut(4);
                    for (group, (codes, scale)) in codes.chunks_mut(16).zip(scales).enumerate() {
                        // ggml's scale has no sign; the codes have one each.
                        if scale.is_sign_negative() {
                            codes.iter_mut().for_each(|code| *code ^= 8);
                        }
                        heads[group] = e4m3_byte(scale.abs());
                        halves(codes, &mut nibbles[group * 8..group * 8 + 8]);
                    }
                }
            }
            TensorType::MXFP4 => {
                for (blocks, (codes, scale)) in blocks.chunks_mut(17).zip(codes.chunks(32).zip(scales)) {
                    // A power of two: its exponent is the byte that it was made of, 2^-127 that of the byte 0.
                    blocks[0] = (scale.to_bits() >> 23) as u8;
                    halves(codes, &mut blocks[1..]);
                }
            }
            TensorType::Q4_0 => {
                for (index, (blocks, codes)) in blocks.chunks_mut(18).zip(codes.chunks(BLOCK)).enumerate() {
                    blocks[..2].copy_from_slice(&half(per_block(index).0));
                    halves(codes, &mut blocks[2..]);
                }
            }
            TensorType::Q4_1 => {
                for (index, (blocks, codes)) in blocks.chunks_mut(20).zip(codes.chunks(BLOCK)).enumerate() {
                    let (scale, zero) = per_block(index);
                    blocks[..2].copy_from_slice(&half(scale));
                    blocks[2..4].copy_from_slice(&half(0.0 - zero * scale));
                    halves(codes, &mut blocks[4..]);
                }
            }
            _ => {
                let offset = self.codes.middle() as u8;
                for (index, (blocks, codes)) in blocks.chunks_mut(34).zip(codes.chunks(BLOCK)).enumerate() {
                    blocks[..2].copy_from_slice(&half(per_block(index).0));
                    blocks[2..].iter_mut().zip(codes).for_each(|(out, code)| *out = code.wrapping_sub(offset));
                }
            }
        }
    }
}

/// One value serves all matrices; none means 1.
fn of_matrix(values: &[f32], matrix: u64) -> f32 {
    match values {
        [] => 1.0,
        [one] => *one,
        many => many[matrix as usize],
    }
}

/// Second-level or activation scales: one, or one for each of `matrices`.
pub(super) fn read_global(
    checkpoint: &Checkpoint,
    index: usize,
    matrices: u64,
    inverse: bool,
) -> Result<Vec<f32>, ConvertError> {
    let tensor = &checkpoint.tensors()[index];
    let mut raw = match tensor.elements() {
        count if count == 1 || count == matrices => vec![0; tensor.bytes as usize],
        count => return Err(wrong(checkpoint, index, format!("has {count} values, expected 1 or {matrices}"))),
    };
    checkpoint.read_at(index, 0, &mut raw)?;
    let Some(dense) = tensor.dense() else {
        return Err(wrong(checkpoint, index, format!("has dtype {:?}, expected F32", tensor.dtype)));
    };
    let mut values = vec![0.0; tensor.elements() as usize];
    dense.widen(&raw, &mut values);
    if inverse {
        values.iter_mut().for_each(|value| *value = value.recip());
    }
    match values.iter().position(|value| !value.is_finite() || *value == 0.0) {
        None => Ok(values),
        Some(at) => Err(wrong(checkpoint, index, format!("value {at} is no scale; the scales are damaged"))),
    }
}
