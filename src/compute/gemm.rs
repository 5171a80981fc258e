//! Products of strided f32 matrices on the calling thread: the scores and the mixing of attention.

use super::Precision;
use super::activations::check_rows;
use super::aligned::AlignedBuf;
use super::matmul::{SCRATCH, Scratch, add_or_store};
use super::micro::{DEPTH, Kernel, MAX_NR, MAX_TILE, ROW_STRIDE};

/// The right operand of [`gemm_f32`].
#[derive(Clone, Copy, Debug)]
pub enum GemmOperand<'a> {
    /// Row-major `[k, n]`: the values of an attention head.
    Plain {
        /// Floats of the matrix.
        data: &'a [f32],
        /// Floats between the starts of two rows.
        stride: usize,
    },
    /// Row-major `[n, k]`, used transposed: the keys of an attention head.
    Transposed {
        /// Floats of the matrix.
        data: &'a [f32],
        /// Floats between the starts of two rows.
        stride: usize,
    },
}

/// Rows of C that are packed at a time.
const BLOCK_ROWS: usize = 10 * 14;

/// Columns of C that are packed at a time.
const BLOCK_COLS: usize = 8 * MAX_NR;

/// `C[i, j] = sum over l < k of A[i, l] * B[l, j]`, or `+=` with `accumulate`; `C` is `[m, n]`, `A` is `[m, k]`, both
/// row-major with rows `ldc` and `lda` floats apart.
///
/// Runs on the calling thread, with f32 arithmetic in the order of [`Precision::Accurate`]: the same bytes on
/// every instruction set, and each element depends on its row of A and its column of B alone. Keeps a
/// few hundred kilobytes of scratch per thread.
///
/// # Panics
/// When an operand is shorter than its shape or a stride is shorter than its row.
#[allow(clippy::too_many_arguments)] // the operands of a matrix product, in BLAS's order
pub fn gemm_f32(
    m: usize,
    n: usize,
    k: usize,
    a: &[f32],
    lda: usize,
    b: GemmOperand,
    c: &mut [f32],
    ldc: usize,
    accumulate: bool,
) {
    gemm_with(Kernel::best(Precision::Accurate), (m, n, k), (a, lda), b, (c, ldc), accumulate);
}

/// [`gemm_f32`] with one of the f32 kernels: shape `(m, n, k)`, operands with their strides.
pub(super) fn gemm_with(
    kernel: &Kernel,
    (m, n, k): (usize, usize, usize),
    (a, lda): (&[f32], usize),
    b: GemmOperand,
    (c, ldc): (&mut [f32], usize),
    accumulate: bool,
) {
    assert!(kernel.level.is_available() && !kernel.is_bf16(), "{} cannot multiply here", kernel.name);
    check_rows("a", a.len(), m, k, lda);
    check_rows("c", c.len(), m, n, ldc);
    match b {
        GemmOperand::Plain { data, stride } => check_rows("b", data.len(), k, n, stride),
        GemmOperand::Transposed { data, stride } => check_rows("b", data.len(), n, k, stride),
    }
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        if !accumulate {
            c.chunks_mut(ldc).take(m).for_each(|row| row[..n].fill(0.0));
        }
        return;
    }
    SCRATCH.with_borrow_mut(|scratch| {
        GEMM_ROWS.with_borrow_mut(|packed_rows| {
            let (mr, nr) = (kernel.mr, kernel.nr);
            let block_rows = BLOCK_ROWS / mr * mr;
            packed_rows.reserve(block_rows * ROW_STRIDE);
            scratch.panels.reserve(BLOCK_COLS * DEPTH);
            scratch.tile.reserve(MAX_TILE);
            for first_k in (0..k).step_by(DEPTH) {
                let depth = DEPTH.min(k - first_k);
                let add = accumulate || first_k > 0;
                for first_col in (0..n).step_by(BLOCK_COLS) {
                    let cols = BLOCK_COLS.min(n - first_col);
                    pack_columns(kernel, b, first_k, depth, first_col, cols, scratch);
                    for first_row in (0..m).step_by(block_rows) {
                        let rows = block_rows.min(m - first_row);
                        let targets = packed_rows.as_mut_slice().chunks_exact_mut(ROW_STRIDE);
                        for (row, target) in (first_row..first_row + rows).zip(targets) {
                            // SAFETY: `depth <= DEPTH` elements fit; the level was checked above.
                            unsafe { (kernel.pack_row)(&a[row * lda + first_k..][..depth], target) };
                        }
                        for row in (0..rows).step_by(mr) {
                            let tile_rows = mr.min(rows - row);
                            for col in (0..cols).step_by(nr) {
                                let tile_cols = nr.min(cols - col);
                                let start = (first_row + row) * ldc + first_col + col;
                                let target = &mut c[start..];
                                // SAFETY: both panels were packed above with `depth` columns; a whole tile lies
                                // within C by `check_rows`, and a part of one goes through `scratch.tile`.
                                unsafe {
                                    let a = packed_rows.as_ptr().add(row * ROW_STRIDE);
                                    let b = scratch.panels.as_ptr().add(col * DEPTH);
                                    if tile_cols == nr {
                                        (kernel.tile)(tile_rows, depth, a, b, target.as_mut_ptr(), ldc, add);
                                        continue;
                                    }
                                    (kernel.tile)(tile_rows, depth, a, b, scratch.tile.as_mut_ptr().cast(), nr, false);
                                }
                                let sums = scratch.tile.as_mut_f32().chunks_exact(nr).take(tile_rows);
                                for (target, sums) in target.chunks_mut(ldc).zip(sums) {
                                    add_or_store(&mut target[..tile_cols], sums, add);
                                }
                            }
                        }
                    }
                }
            }
        });
    });
}

thread_local! {
    static GEMM_ROWS: std::cell::RefCell<AlignedBuf> = std::cell::RefCell::default();
}

/// Packs columns `first_col .. first_col + cols` of B, rows `first_k .. first_k + depth`, into panels of DEPTH
/// elements per lane.
fn pack_columns(
    kernel: &Kernel,
    b: GemmOperand,
    first_k: usize,
    depth: usize,
    first_col: usize,
    cols: usize,
    scratch: &mut Scratch,
) {
    let nr = kernel.nr;
    match b {
        GemmOperand::Plain { data, stride } => {
            for (panel, packed) in (0..cols).step_by(nr).zip(scratch.panels.as_mut_f32().chunks_exact_mut(DEPTH * nr)) {
                let width = nr.min(cols - panel);
                for (l, target) in packed.chunks_exact_mut(nr).take(depth).enumerate() {
                    let source = &data[(first_k + l) * stride + first_col + panel..][..width];
                    target[..width].copy_from_slice(source);
                    target[width..].fill(0.0);
                }
            }
        }
        GemmOperand::Transposed { data, stride } => {
            scratch.decoded.reserve(MAX_NR * DEPTH);
            let rows = scratch.decoded.as_mut_f32();
            for (panel, packed) in (0..cols).step_by(nr).zip(scratch.panels.as_mut_slice().chunks_exact_mut(DEPTH * nr))
            {
                let width = nr.min(cols - panel);
                for (lane, target) in rows.chunks_exact_mut(DEPTH).take(nr).enumerate() {
                    if lane < width {
                        let source = &data[(first_col + panel + lane) * stride + first_k..][..depth];
                        target[..depth].copy_from_slice(source);
                    } else {
                        target[..depth].fill(0.0);
                    }
                }
                // SAFETY: rows of DEPTH floats, a panel of DEPTH elements per lane; the caller checked the level.
                unsafe { (kernel.pack_panel)(rows.as_ptr(), DEPTH, depth, packed.as_mut_ptr()) };
            }
        }
    }
}
