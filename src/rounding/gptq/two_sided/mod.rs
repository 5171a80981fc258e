//! Feedback on both sides: a row makes up for the errors of the rows before it, too, as far as the loss lets one output
//! stand in for another.
//!
//! With the second moment `H_O` of the loss's gradients at a matrix's outputs, an error of the weights costs
//! `tr(H_O E H_I E^T)`, where one-sided feedback knows `tr(E H_I E^T)` (Tseng et al., YAQA, arXiv 2505.22988). With
//! `H_O = (I + A_O) D_O (I + A_O)^T` that is the sum over rows i of `D_O[i]` times the loss by `H_I` of row i of
//! `F = (I + A_O)^T E`, and `F_i = T_i - Q_i` for the target `T_i = W_i + sum over k < i of A_O[k, i] (W_k - Q_k)`: rows are
//! rounded in order, each as if its weights were `T_i`. Improving a rounded row i knows all others: its target is
//! `W_i + sum over k != i of H_O[k, i] / H_O[i, i] (W_k - Q_k)`.
//!
//! Blocks of rows pass through tiles of columns (see [`pipeline`]): a cell needs the block before it in its tile, for the
//! targets, and the tile before it in its block, for the feedback between columns. Sweeps go the same way: a cell sees what
//! cells above and to the left have changed, and of all others what was there before the sweep, whichever thread is where.
//! So the bytes depend neither on the number of threads nor on the instruction set.

mod cells;
mod outputs;
mod pipeline;
#[cfg(test)]
mod tests;

use super::error::FeedbackError;
use super::factor::Factor;
use super::format::{Prepared, TileFormat};
use super::round::{Format, checked_format, checked_row_bytes, decoded_errors, losses};
use crate::gguf::TensorType;
use cells::Matrix;
use rayon::prelude::*;

pub use outputs::{OUTPUT_DAMPING, OutputFactor};

/// Passes of coordinate descent after rounding. On a model of 4 million weights four leave .984 (Q4_K) and .992 (Q2_K) of the
/// divergence that two leave.
const SWEEPS: usize = 4;

/// Rows of a task that measures losses.
const TASK_ROWS: usize = 64;

/// As [`improve_rows`](super::improve_rows) for all rows of a matrix, which `outputs` ties together. `out` holds them
/// rounded in another way, as by [`search_rows`](super::search_rows), and is left alone unless the loss
/// `tr(H_O E H_I E^T)` falls, with `H_O` as damped and `H_I` as it was before damping.
///
/// Takes about 16 bytes a weight. Uses rayon's current pool.
///
/// # Errors
/// Those of [`improve_rows`](super::improve_rows), and [`FeedbackError::Outputs`] when there are other rows than outputs.
#[doc(alias = "YAQA")]
pub fn improve_two_sided(
    ty: TensorType,
    rows: &[f32],
    n: usize,
    inputs: &Factor,
    outputs: &OutputFactor,
    out: &mut [u8],
) -> Result<(), FeedbackError> {
    let format = checked_format(ty, n, inputs)?;
    checked_row_bytes(ty, rows, n, out)?;
    if rows.len() / n != outputs.m() {
        return Err(FeedbackError::Outputs { rows: rows.len() / n, found: outputs.m() });
    }
    let Some(feedback) = inputs.feedback() else { return Ok(()) };
    let bytes = match &format {
        Format::Columns(layout) => round(ty, &Prepared::new(layout, inputs, feedback), rows, outputs)?,
        Format::Lattice(layout) => round(ty, &Prepared::new(layout, inputs, feedback), rows, outputs)?,
    };
    let loss = |bytes: &[u8]| two_sided_loss(&decoded_errors(ty, rows, bytes)?, inputs, feedback, outputs);
    if loss(&bytes)? < loss(out)? {
        out.copy_from_slice(&bytes);
    }
    Ok(())
}

/// `tr(H_O E H_I E^T)`.
fn two_sided_loss(
    errors: &[f32],
    inputs: &Factor,
    feedback: &[f32],
    outputs: &OutputFactor,
) -> Result<f64, FeedbackError> {
    let n = inputs.n();
    let carried = outputs.carried(errors);
    let of_rows = |rows: &[f32]| losses(rows, n, inputs, feedback);
    let of_rows: Vec<f64> = carried.par_chunks(TASK_ROWS * n).flat_map_iter(of_rows).collect();
    Ok(of_rows.iter().zip(outputs.weights()).map(|(loss, weight)| loss * f64::from(*weight)).sum())
}

/// The bytes of all rows, rounded in order and improved.
fn round<F: TileFormat>(
    ty: TensorType,
    prepared: &Prepared<'_, F>,
    rows: &[f32],
    outputs: &OutputFactor,
) -> Result<Vec<u8>, FeedbackError> {
    let matrix = Matrix { ty, prepared, outputs, weights: rows };
    let mut parts = matrix.round()?;
    for _ in 0..SWEEPS {
        parts = matrix.sweep(parts)?;
    }
    matrix.bytes(&parts)
}
