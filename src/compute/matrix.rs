//! Weight matrices as mapped bytes.

use crate::gguf::{TensorType, TypeInfo};
use crate::quant::types::lines::{Line, MAX_LINES, read_lines};
use crate::quant::{DequantizeFn, kernels};

/// A weight matrix, row-major `[rows, cols]`, in any storage type that can be decoded.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    info: &'static TypeInfo,
    decode: DequantizeFn,
    rows: usize,
    cols: usize,
    row_bytes: usize,
    data: &'a [u8],
}

/// Why bytes are not a matrix that can be multiplied with.
#[derive(Debug, thiserror::Error)]
pub enum MatrixError {
    /// The type has no decoder.
    #[error("weights of type {ty} cannot be decoded")]
    Type {
        /// The storage type found.
        ty: TensorType,
    },
    /// Rows do not consist of whole blocks.
    #[error("rows of {cols} weights are not whole blocks of {ty} ({block_len} weights each)")]
    RowLength {
        /// The storage type.
        ty: TensorType,
        /// Weights per row found.
        cols: usize,
        /// Weights per block of the type.
        block_len: usize,
    },
    /// The bytes are too few or too many for the shape.
    #[error("{rows} rows of {cols} weights in {ty} do not fit {found} bytes")]
    Size {
        /// The storage type.
        ty: TensorType,
        /// Rows asked for.
        rows: usize,
        /// Weights per row asked for.
        cols: usize,
        /// Bytes given.
        found: usize,
    },
}

impl<'a> Matrix<'a> {
    /// A matrix of `rows` rows with `cols` weights each (ggml's `ne[0] = cols`) over exactly its bytes.
    ///
    /// # Errors
    /// [`MatrixError`] when the type cannot be decoded or `data` does not have the size of the shape.
    pub fn new(ty: TensorType, rows: usize, cols: usize, data: &'a [u8]) -> Result<Self, MatrixError> {
        let info = ty.info().ok_or(MatrixError::Type { ty })?;
        let decode = kernels::dequantizer(ty).ok_or(MatrixError::Type { ty })?;
        if !cols.is_multiple_of(info.block_len) {
            return Err(MatrixError::RowLength { ty, cols, block_len: info.block_len });
        }
        let row_bytes = (cols / info.block_len).checked_mul(info.block_bytes);
        match row_bytes.and_then(|row_bytes| row_bytes.checked_mul(rows)) {
            Some(bytes) if bytes == data.len() => {
                Ok(Matrix { info, decode, rows, cols, row_bytes: bytes.checked_div(rows).unwrap_or(0), data })
            }
            _ => Err(MatrixError::Size { ty, rows, cols, found: data.len() }),
        }
    }

    /// Storage type of the weights.
    pub fn ty(&self) -> TensorType {
        self.info.ty
    }

    /// Rows: outputs of the product.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Weights per row: inputs of the product.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Decodes one row into `dst` (`cols` floats), for embedding lookups.
    ///
    /// # Panics
    /// When `row` is out of range or `dst` has another length.
    pub fn decode_row(&self, row: usize, dst: &mut [f32]) {
        assert!(row < self.rows && dst.len() == self.cols, "row {row} of {} x {}", self.rows, self.cols);
        self.decode_columns(row, 0, dst);
    }

    /// Decodes `dst.len()` weights of `row` from column `start` on; both must be whole blocks.
    pub(super) fn decode_columns(&self, row: usize, start: usize, dst: &mut [f32]) {
        (self.decode)(self.columns_bytes(row, start, dst.len()), dst);
    }

    /// The lines of the groups of `columns` weights of `row` from column `start` on; both must be whole blocks, and the
    /// type one that has lines.
    pub(super) fn lines(&self, row: usize, start: usize, columns: usize, lines: &mut [Line; MAX_LINES]) {
        let blocks = self.columns_bytes(row, start, columns).chunks_exact(self.info.block_bytes);
        if self.info.block_len > 32 {
            return blocks.take(1).for_each(|block| read_lines(self.info.ty, block, lines));
        }
        let mut of_block = [Line::default(); MAX_LINES];
        for (line, block) in lines.iter_mut().zip(blocks) {
            read_lines(self.info.ty, block, &mut of_block);
            *line = of_block[0];
        }
    }

    /// The bytes of `columns` weights of `row` from column `start` on; both must be whole blocks.
    pub(super) fn columns_bytes(&self, row: usize, start: usize, columns: usize) -> &'a [u8] {
        let first = row * self.row_bytes + start / self.info.block_len * self.info.block_bytes;
        &self.data[first..first + columns / self.info.block_len * self.info.block_bytes]
    }
}
