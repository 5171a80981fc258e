//! A whole tensor rounded to a type, in memory.

use rayon::prelude::*;

use super::WeightErrorProblem;
use crate::gguf::{Gguf, TensorInfo, TensorType};
use crate::quant::{self, QuantError};
use crate::rows::read_rows;

/// Weights that a task rounds.
const TASK_WEIGHTS: u64 = 1 << 16;

/// Rounds all rows of `tensor` to `ty` with the quantizers of the file, `importance` being `[matrices, row_len]`.
/// The result is what `lwq quantize` would write.
///
/// # Errors
/// When the tensor cannot be read or the codec refuses.
pub fn encode_tensor(
    gguf: &Gguf,
    tensor: &TensorInfo,
    importance: Option<&[f32]>,
    ty: TensorType,
) -> Result<Vec<u8>, WeightErrorProblem> {
    let codec_error = |source| WeightErrorProblem::Codec { tensor: tensor.shown_name(), source };
    let row_len = tensor.row_len();
    let row_bytes = ty.info().and_then(|info| info.row_bytes(row_len));
    let row_bytes = row_bytes.ok_or_else(|| codec_error(QuantError::NoCodec { ty }))? as usize;
    let mut encoded = vec![0u8; row_bytes * tensor.rows() as usize];
    let per_matrix = tensor.rows_per_matrix().max(1);
    let rows_per_task = (TASK_WEIGHTS / row_len.max(1)).clamp(1, per_matrix);
    // Tasks must not reach over the end of a matrix, whose columns have weights of their own.
    let mut tasks = Vec::new();
    let mut rest = encoded.as_mut_slice();
    for matrix in 0..tensor.matrices() {
        let mut row = 0;
        while row < per_matrix {
            let rows = rows_per_task.min(per_matrix - row);
            let (part, after) = rest.split_at_mut(rows as usize * row_bytes);
            tasks.push((matrix, matrix * per_matrix + row, rows, part));
            rest = after;
            row += rows;
        }
    }
    tasks.into_par_iter().try_for_each(|(matrix, first, rows, out)| {
        let values = read_rows(gguf, tensor, first, rows)?;
        let start = (matrix * row_len) as usize;
        let importance = importance.map(|all| &all[start..start + row_len as usize]);
        quant::quantize_rows(ty, &values, row_len as usize, importance, out).map_err(codec_error)
    })?;
    Ok(encoded)
}
