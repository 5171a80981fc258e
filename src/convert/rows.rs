//! Rows of an output, read from the tensors that hold them: in order, with a stride, permuted or transposed.

use super::ConvertError;
use super::checkpoint::{Checkpoint, Dense};
use super::plan::Part;
use super::weights::{self, Coding, Factors, Weight};
use crate::gguf::TensorType;
use crate::quant::float16::{bf16_to_f32, f16_to_f32};

/// A part of an output, with what reading its rows takes.
pub(super) struct Rows<'a> {
    pub checkpoint: &'a Checkpoint,
    pub weight: &'a Weight,
    pub part: &'a Part,
    /// Values of a row.
    pub row_len: u64,
    /// Rows of a head, inside which they are permuted.
    pub permuted_rows: Option<u64>,
}

/// Bytes that are read before rows are put in order, kept from piece to piece.
#[derive(Default)]
pub(super) struct Scratch {
    pub(super) bytes: Vec<u8>,
    codes: Vec<u8>,
}

impl Rows<'_> {
    pub(super) fn wrong(&self, problem: impl Into<String>) -> ConvertError {
        weights::wrong(self.checkpoint, self.weight.tensor, problem)
    }

    /// Element type, where values are stored as they are.
    pub(super) fn dense(&self) -> Option<Dense> {
        match &self.weight.coding {
            Coding::Dense(dense) => Some(*dense),
            _ => None,
        }
    }

    /// The row of the tensor, counted over all its matrices, that is row `row` of the part.
    fn source_row(&self, row: u64) -> u64 {
        let row = match self.permuted_rows {
            None => row,
            Some(head_rows) => permuted(row, head_rows),
        };
        self.part.first + row * self.part.step
    }

    /// The error for value `index` of these rows, counted from row `first`.
    pub(super) fn non_finite(&self, first: u64, index: u64) -> ConvertError {
        let (row, column) = (self.source_row(first + index / self.row_len), index % self.row_len);
        let at = match self.part.transposed {
            None => row * self.row_len + column,
            Some(matrix) => (matrix * self.row_len + column) * self.columns() + row,
        };
        self.wrong(format!("weight {at} is NaN or infinite; the model is damaged, download it again"))
    }

    fn columns(&self) -> u64 {
        self.weight.shape.last().copied().unwrap_or(1)
    }

    /// Stored bytes of `rows` rows from row `first` of the part, one row after the other.
    pub(super) fn read(
        &self,
        first: u64,
        rows: u64,
        raw: &mut Vec<u8>,
        scratch: &mut Scratch,
    ) -> Result<(), ConvertError> {
        if let Some(matrix) = self.part.transposed {
            return self.read_transposed(matrix, first, rows, raw, scratch);
        }
        let row_bytes = self.weight.row_bytes(self.row_len) as usize;
        raw.clear();
        if let Some(head_rows) = self.permuted_rows {
            let mut row = first;
            // All rows of a head are read at once: those of a piece lie scattered in it.
            while row < first + rows {
                let head_first = row - row % head_rows;
                let end = (head_first + head_rows).min(first + rows);
                self.read_span(self.part.first + head_first, head_rows, &mut scratch.bytes)?;
                for row in row..end {
                    let from = (permuted(row, head_rows) - head_first) as usize * row_bytes;
                    raw.extend_from_slice(&scratch.bytes[from..from + row_bytes]);
                }
                row = end;
            }
            return Ok(());
        }
        if self.part.step == 1 {
            return self.read_span(self.part.first + first, rows, raw);
        }
        let span = (rows - 1) * self.part.step + 1;
        self.read_span(self.source_row(first), span, &mut scratch.bytes)?;
        scratch.bytes.chunks(row_bytes).step_by(self.part.step as usize).for_each(|row| raw.extend_from_slice(row));
        Ok(())
    }

    fn read_span(&self, first: u64, rows: u64, raw: &mut Vec<u8>) -> Result<(), ConvertError> {
        let row_bytes = self.weight.row_bytes(self.row_len);
        raw.resize((rows * row_bytes) as usize, 0);
        self.checkpoint.read_at(self.weight.tensor, first * row_bytes, raw)
    }

    /// Columns of a matrix as rows: of each of its rows the few values that belong to them.
    fn read_transposed(
        &self,
        matrix: u64,
        first: u64,
        rows: u64,
        raw: &mut Vec<u8>,
        scratch: &mut Scratch,
    ) -> Result<(), ConvertError> {
        let bytes = self.weight.row_bytes(1) as usize;
        let (step, columns) = (self.part.step as usize, self.columns());
        scratch.bytes.resize(((rows as usize - 1) * step + 1) * bytes, 0);
        raw.resize((rows * self.row_len) as usize * bytes, 0);
        for inner in 0..self.row_len {
            let at = (matrix * self.row_len + inner) * columns + self.source_row(first);
            self.checkpoint.read_at(self.weight.tensor, at * bytes as u64, &mut scratch.bytes)?;
            let values = scratch.bytes.chunks(bytes).step_by(step);
            for (row, value) in raw.chunks_mut(self.row_len as usize * bytes).zip(values) {
                row[inner as usize * bytes..][..bytes].copy_from_slice(value);
            }
        }
        Ok(())
    }

    /// The floats that `raw`, the bytes of rows from row `first`, stands for.
    pub(super) fn widen(&self, first: u64, raw: &[u8], floats: &mut [f32]) -> Result<(), ConvertError> {
        match &self.weight.coding {
            Coding::Dense(dense) => dense.widen(raw, floats),
            Coding::Coded(coded) => {
                let (row_bytes, row_len) = (self.weight.row_bytes(self.row_len) as usize, self.row_len as usize);
                let factors = self.factors(first, (floats.len() / row_len) as u64)?;
                for ((row, raw), values) in (first..).zip(raw.chunks(row_bytes)).zip(floats.chunks_mut(row_len)) {
                    coded.widen(self.source_row(row), raw, &factors, values);
                }
            }
            Coding::Other(dtype) => return Err(self.wrong(format!("has dtype {dtype:?}, which holds no weights"))),
        }
        Ok(())
    }

    /// The blocks of `ty` that hold the codes of `raw` unchanged.
    pub(super) fn to_blocks(
        &self,
        ty: TensorType,
        first: u64,
        raw: &[u8],
        blocks: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<(), ConvertError> {
        let Some(coded) = self.weight.coded() else { return Err(self.wrong(format!("has no codes for {ty}"))) };
        let row_bytes = self.weight.row_bytes(self.row_len) as usize;
        let rows = raw.len() / row_bytes;
        let factors = self.factors(first, rows as u64)?;
        scratch.codes.resize(self.row_len as usize, 0);
        let out = blocks.chunks_mut(blocks.len() / rows);
        for ((row, raw), blocks) in (first..).zip(raw.chunks(row_bytes)).zip(out) {
            coded.to_blocks(ty, self.source_row(row), raw, &factors, &mut scratch.codes, blocks);
        }
        Ok(())
    }

    fn factors(&self, first: u64, rows: u64) -> Result<Factors, ConvertError> {
        let source_rows = (first..first + rows).map(|row| self.source_row(row));
        let (low, high) = (source_rows.clone().min().unwrap_or(0), source_rows.max().unwrap_or(0));
        match self.weight.coded() {
            Some(coded) => coded.load(self.checkpoint, low..=high),
            None => Err(self.wrong("has no scales")),
        }
    }
}

/// The order of rows that GGUF's llama wants: inside a head of `n` rows, row `2i + s` is source row `s * n / 2 + i`.
pub(super) fn permuted(row: u64, head_rows: u64) -> u64 {
    let inside = row % head_rows;
    row - inside + (inside % 2) * (head_rows / 2) + inside / 2
}

impl Dense {
    /// The GGUF type with the same bytes.
    pub(super) fn tensor_type(self) -> Option<TensorType> {
        match self {
            Dense::F32 => Some(TensorType::F32),
            Dense::F16 => Some(TensorType::F16),
            Dense::BF16 => Some(TensorType::BF16),
            Dense::F8E4M3 => None,
        }
    }

    /// Index of the first value whose exponent is all ones.
    pub(super) fn first_non_finite(self, raw: &[u8]) -> Option<u64> {
        let of_16_bits = |mask: u16| {
            // Whole chunks at a time: the inner test has no branch and becomes vector code.
            let wrong = |bytes: &[u8; 2]| u16::from_le_bytes(*bytes) & mask == mask;
            let mut chunks = raw.as_chunks::<2>().0.chunks(4096).enumerate();
            let found = chunks.find(|(_, chunk)| chunk.iter().fold(false, |any, bytes| any | wrong(bytes)));
            found.and_then(|(index, chunk)| chunk.iter().position(wrong).map(|at| (index * 4096 + at) as u64))
        };
        match self {
            Dense::F16 => of_16_bits(0x7C00),
            Dense::BF16 => of_16_bits(0x7F80),
            Dense::F32 => {
                raw.as_chunks().0.iter().position(|bytes| !f32::from_le_bytes(*bytes).is_finite()).map(|at| at as u64)
            }
            Dense::F8E4M3 => raw.iter().position(|byte| byte & 0x7F == 0x7F).map(|at| at as u64),
        }
    }

    pub(super) fn widen(self, raw: &[u8], floats: &mut [f32]) {
        match self {
            Dense::F32 => widen(raw, floats, f32::from_le_bytes),
            Dense::F16 => widen(raw, floats, |bytes| f16_to_f32(u16::from_le_bytes(bytes))),
            Dense::BF16 => widen(raw, floats, |bytes| bf16_to_f32(u16::from_le_bytes(bytes))),
            Dense::F8E4M3 => widen(raw, floats, |[byte]| weights::e4m3_to_f32(byte)),
        }
    }
}

fn widen<const N: usize>(raw: &[u8], floats: &mut [f32], value: impl Fn([u8; N]) -> f32) {
    for (float, bytes) in floats.iter_mut().zip(raw.as_chunks::<N>().0) {
        *float = value(*bytes);
    }
}
