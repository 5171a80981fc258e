//! Products with the transpose of a weight matrix: what carries gradients from its outputs to its inputs.

use std::ops::Range;

use rayon::prelude::*;

use super::activations::{PackedActivations, check_rows};
use super::matmul::{Output, PackedTile, Plan, SCRATCH, Scratch, multiply_packed};
use super::matrix::Matrix;
use super::micro::{DEPTH, MAX_TILE};

/// Columns of the matrix that are packed at a time: whole blocks of every storage type, whole panels of every kernel, and as
/// many as fit beside the activations into a common second-level cache.
const UNIT_COLUMNS: usize = 256;

/// `Y[t, i] = sum over o of X[t, o] * W[o, i]`, or `+=` with `accumulate`, with X of `x.tokens()` rows and Y row-major with
/// rows `ldy` floats apart, of which the first `w.cols()` are written.
///
/// The arithmetic is that of [`Precision::Accurate`](super::Precision::Accurate), with blocks of 256 rows of W: the same bytes
/// on every instruction set and for any size of rayon's current pool.
///
/// # Panics
/// When `x.cols() != w.rows()`, `ldy < w.cols()`, `y` is too short, or `x` was packed for another precision.
pub fn matmul_transposed(x: &PackedActivations, w: &Matrix, y: &mut [f32], ldy: usize, accumulate: bool) {
    assert_eq!(x.cols(), w.rows(), "columns of the gradients and rows of the weights");
    assert!(!x.kernel().is_bf16(), "gradients are multiplied as 32-bit floats");
    check_rows("y", y.len(), x.tokens(), w.cols(), ldy);
    if x.tokens() == 0 || w.cols() == 0 {
        return;
    }
    if x.cols() == 0 {
        if !accumulate {
            y.chunks_mut(ldy).take(x.tokens()).for_each(|row| row[..w.cols()].fill(0.0));
        }
        return;
    }
    let threads = rayon::current_num_threads();
    let plan = Plan::of_units(w.cols().div_ceil(UNIT_COLUMNS), x.panels(), threads);
    let output = Output { start: y.as_mut_ptr(), stride: ldy };
    let run = |index: usize| {
        SCRATCH.with_borrow_mut(|scratch| {
            let (unit, panels) = plan.tile(index);
            // SAFETY: tiles of a plan do not overlap, and `check_rows` found all of them within `y`, which is
            // borrowed mutably until every tile is done.
            unsafe { multiply_unit(x, w, unit.start, panels, output, scratch, accumulate) }
        });
    };
    if threads == 1 || plan.count() == 1 {
        (0..plan.count()).for_each(run);
    } else {
        (0..plan.count()).into_par_iter().with_max_len(1).for_each(run);
    }
}

/// The products of some token panels with [`UNIT_COLUMNS`] columns, over all rows.
///
/// # Safety
/// The columns and tokens lie within `output`, and nobody else uses that part of it.
unsafe fn multiply_unit(
    x: &PackedActivations,
    w: &Matrix,
    unit: usize,
    token_panels: Range<usize>,
    output: Output,
    scratch: &mut Scratch,
    accumulate: bool,
) {
    let nr = x.kernel().nr;
    let first_column = unit * UNIT_COLUMNS;
    let columns = UNIT_COLUMNS.min(w.cols() - first_column);
    scratch.panels.reserve(columns.div_ceil(nr) * nr * DEPTH);
    scratch.tile.reserve(MAX_TILE);
    for block in 0..x.blocks() {
        let first_row = block * DEPTH;
        let depth = DEPTH.min(w.rows() - first_row);
        pack_rows(w, first_row..first_row + depth, first_column, columns, nr, scratch);
        let first_panel = first_column / nr;
        let output_panels = first_panel..first_panel + columns.div_ceil(nr);
        let tile = PackedTile { block, depth, token_panels: token_panels.clone(), output_panels };
        // SAFETY: as promised for this function; the panels were packed above, all of them within `w.cols()` outputs.
        unsafe { multiply_packed(x, &tile, w.cols(), output, scratch, accumulate || block > 0) };
    }
}

/// Packs columns from `first_column` on of some rows into panels of [`DEPTH`] elements per lane.
fn pack_rows(w: &Matrix, rows: Range<usize>, first_column: usize, columns: usize, nr: usize, scratch: &mut Scratch) {
    scratch.decoded.reserve(UNIT_COLUMNS);
    let decoded = &mut scratch.decoded.as_mut_f32()[..columns];
    let panels = scratch.panels.as_mut_f32();
    for (element, row) in rows.enumerate() {
        w.decode_columns(row, first_column, decoded);
        for (panel, lanes) in panels.chunks_exact_mut(DEPTH * nr).zip(decoded.chunks(nr)) {
            let target = &mut panel[element * nr..][..nr];
            target[..lanes.len()].copy_from_slice(lanes);
            target[lanes.len()..].fill(0.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::random_floats;
    use super::super::{Kernel, Precision};
    use super::*;
    use crate::gguf::TensorType;
    use crate::quant;

    /// A matrix of values that the type holds, as bytes and decoded.
    fn matrix(ty: TensorType, rows: usize, cols: usize) -> (Vec<u8>, Vec<f32>) {
        let values = random_floats(rows as u64, rows * cols);
        let mut bytes = vec![0; ty.info().unwrap().row_bytes(cols as u64).unwrap() as usize * rows];
        quant::quantize_rows(ty, &values, cols, None, &mut bytes).unwrap();
        let mut decoded = vec![0.0; values.len()];
        quant::dequantize(ty, &bytes, &mut decoded).unwrap();
        (bytes, decoded)
    }

    fn product(kernel: &'static Kernel, y: &[f32], tokens: usize, w: &Matrix, out: &mut [f32], accumulate: bool) {
        let mut packed = PackedActivations::for_kernel(kernel);
        packed.pack(y, tokens, w.rows(), w.rows());
        matmul_transposed(&packed, w, out, w.cols() + 3, accumulate);
    }

    #[test]
    fn transposed_products_follow_their_definition_on_every_instruction_set_and_any_number_of_threads() {
        let shapes: [(usize, usize, usize); 5] =
            [(1, 1, 32), (9, 257, 256), (70, 300, 544), (33, 40, 96), (130, 513, 512)];
        for (tokens, rows, cols) in shapes {
            for ty in [TensorType::F32, TensorType::F16, TensorType::Q8_0, TensorType::Q4_K] {
                if !cols.is_multiple_of(ty.info().unwrap().block_len) {
                    continue;
                }
                let (bytes, w) = matrix(ty, rows, cols);
                let matrix = Matrix::new(ty, rows, cols, &bytes).unwrap();
                let y = random_floats(3, tokens * rows);
                let stride = cols + 3;
                let mut first: Option<Vec<f32>> = None;
                for threads in [1, 3] {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    for kernel in Kernel::all().iter().filter(|k| k.level.is_available() && !k.is_bf16()) {
                        let mut out = vec![0.5; tokens * stride];
                        pool.install(|| product(kernel, &y, tokens, &matrix, &mut out, false));
                        pool.install(|| product(kernel, &y, tokens, &matrix, &mut out, true));
                        assert!(out.chunks(stride).all(|row| row[cols..].iter().all(|x| *x == 0.5)), "behind the row");
                        let expected = first.get_or_insert_with(|| out.clone());
                        assert_eq!(*expected, out, "{} with {threads} threads", kernel.name);
                    }
                }
                for (t, row) in first.unwrap().chunks(stride).enumerate() {
                    for (i, found) in row[..cols].iter().enumerate() {
                        let exact: f64 =
                            (0..rows).map(|o| f64::from(y[t * rows + o]) * f64::from(w[o * cols + i])).sum();
                        assert!((f64::from(*found) - 2.0 * exact).abs() < 2e-4, "{ty} {tokens}x{rows}x{cols}");
                    }
                }
            }
        }
    }

    #[test]
    fn without_outputs_gradients_are_zero() {
        let matrix = Matrix::new(TensorType::F32, 0, 8, &[]).unwrap();
        let mut packed = PackedActivations::new(Precision::Accurate);
        packed.pack(&[], 2, 0, 0);
        let mut out = vec![1.0; 16];
        matmul_transposed(&packed, &matrix, &mut out, 8, false);
        assert!(out.iter().all(|x| *x == 0.0));
    }
}
