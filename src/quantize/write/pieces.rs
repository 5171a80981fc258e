//! How tensors are cut into pieces of work.

use crate::gguf::TensorInfo;
use crate::workers;

/// Weights per piece: large enough that a piece's overhead vanishes, small enough that the threads finish together.
pub(super) const PIECE_WEIGHTS: u64 = 1 << 18;

/// Weights that are decoded and encoded at a time: their floats stay in a core's own cache.
pub(super) const CHUNK_WEIGHTS: u64 = 1 << 16;

/// The encoders put sixteen blocks of up to 256 weights side by side; other counts leave lanes empty.
const BATCH_WEIGHTS: u64 = 16 * 256;

/// Bytes of a piece of a tensor whose rows are unknown.
const PIECE_BYTES: u64 = 1 << 20;

/// Rows of one matrix of one tensor. Of a tensor whose type is unknown its bytes take the part of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// Index of the tensor in the work list.
    pub work: usize,
    /// First row, counted over all matrices of the tensor.
    pub first_row: u64,
    pub rows: u64,
    pub matrix: u64,
}

/// The largest number of rows with at most `weights` weights, at least one; a multiple of what fills the lanes of the
/// encoders, if that is not more.
pub(super) fn rows_within(weights: u64, row_len: u64) -> u64 {
    let rows = (weights / row_len).max(1);
    let batch = BATCH_WEIGHTS / gcd(BATCH_WEIGHTS, row_len);
    if rows >= batch { rows / batch * batch } else { rows }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The pieces of all tensors, in the order of the work list.
pub(super) fn cut<'a>(sources: impl IntoIterator<Item = &'a TensorInfo>) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for (index, source) in sources.into_iter().enumerate() {
        if source.ty.info().is_none() {
            let bytes = source.bytes.unwrap_or(0);
            let piece = |bytes: std::ops::Range<u64>| Piece {
                work: index,
                first_row: bytes.start,
                rows: bytes.end - bytes.start,
                matrix: 0,
            };
            pieces.extend(workers::cut(bytes, PIECE_BYTES).map(piece));
            continue;
        }
        let row_len = source.row_len();
        let rows_per_matrix = source.rows_per_matrix();
        if row_len == 0 || rows_per_matrix == 0 {
            continue;
        }
        let rows_per_piece = rows_within(PIECE_WEIGHTS, row_len);
        for matrix in 0..source.matrices() {
            pieces.extend(workers::cut(rows_per_matrix, rows_per_piece).map(|rows| Piece {
                work: index,
                first_row: matrix * rows_per_matrix + rows.start,
                rows: rows.end - rows.start,
                matrix,
            }));
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::TensorType;

    fn tensor(shape: &[u64]) -> TensorInfo {
        let bytes = Some(2 * shape.iter().product::<u64>());
        TensorInfo { name: "t".to_owned(), shape: shape.to_vec(), ty: TensorType::F16, offset: 0, bytes, shard: 0 }
    }

    #[test]
    fn rows_fill_the_lanes_where_they_can() {
        for (weights, row_len, rows) in [
            (1 << 18, 4096, 64),
            (1 << 18, 1536, 168),
            (1 << 18, 8960, 16),
            (1 << 16, 8960, 7),
            (1 << 18, 1 << 20, 1),
            (1 << 18, 1, 1 << 18),
            (1 << 18, 33, 4096),
        ] {
            assert_eq!(rows_within(weights, row_len), rows, "{row_len}");
        }
    }

    #[test]
    fn every_row_is_in_one_piece_and_no_piece_in_two_matrices() {
        for shape in [&[2048, 512, 512][..], &[512, 2048, 3], &[8960, 1536], &[64], &[1 << 19, 3, 2], &[40, 7, 5, 3]] {
            let source = tensor(shape);
            let mut row = 0;
            for piece in cut([&source]) {
                assert_eq!(piece.first_row, row, "{shape:?}");
                assert!(piece.rows > 0 && (piece.rows == 1 || piece.rows * shape[0] <= PIECE_WEIGHTS), "{shape:?}");
                row += piece.rows;
                let matrix = |row| row / source.rows_per_matrix();
                assert_eq!((matrix(piece.first_row), matrix(row - 1)), (piece.matrix, piece.matrix), "{shape:?}");
            }
            assert_eq!(row, source.rows(), "{shape:?}");
        }
    }

    /// The experts of one tensor as well as tensors that are a piece each keep many threads busy.
    #[test]
    fn pieces_are_many() {
        let experts = tensor(&[2048, 512, 512]);
        assert_eq!(cut([&experts]).len() as u64, 512 * 2048 * 512 / PIECE_WEIGHTS);
        let small: Vec<TensorInfo> = (0..512).map(|_| tensor(&[512, 64])).collect();
        assert_eq!(cut(&small).len(), 512);
    }
}
