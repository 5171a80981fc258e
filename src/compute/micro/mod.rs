//! The innermost products: one register tile of `tokens x outputs` over one block of columns.
//!
//! Each instruction set offers the same few functions behind a [`Kernel`] row; all of them repeat the order of
//! operations of [`scalar`], which is the definition.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;

use super::Precision;
use crate::cpu::{self, Level};

/// Elements (4 bytes: one f32, or two bfloat16) of one block of columns. Changing it changes results.
pub(super) const DEPTH: usize = 256;

/// Distance in elements between the rows of a packed activation panel. One cache line more than a block, so
/// that the rows of a panel do not start in the same cache sets.
pub(super) const ROW_STRIDE: usize = DEPTH + 16;

/// Largest register tile of all kernels, in outputs: tokens x outputs.
pub(super) const MAX_TILE: usize = 14 * 32;

/// Largest panel width of all kernels.
pub(super) const MAX_NR: usize = 32;

/// `C[r, c] = or += sum over k < depth of A[r, k] * B[k, c]` for `r < rows`, `c < nr`.
///
/// `a`: element (r, k) at `r * ROW_STRIDE + k`. `b`: element (k, c) at `k * nr + c`, 64-byte aligned.
/// `c`: float (r, c) at `r * ldc + c`. The sum starts from zero; `accumulate` adds it to C, otherwise it is stored.
///
/// # Safety
/// `1 <= rows <= mr`; `depth <= DEPTH`; the places above are readable, those of C writable; the CPU has the
/// kernel's level.
pub(super) type TileFn =
    unsafe fn(rows: usize, depth: usize, a: *const u32, b: *const u32, c: *mut f32, ldc: usize, accumulate: bool);

/// Transposes `nr` rows of floats, `stride` floats apart, into a panel of `depth` elements per lane, converting them
/// to the kernel's elements.
///
/// # Safety
/// Every row has `depth.next_multiple_of(16) * columns_per_element` readable floats; `panel` has room for
/// `depth.next_multiple_of(16) * nr` elements and is 64-byte aligned; the CPU has the kernel's level.
pub(super) type PackPanelFn = unsafe fn(src: *const f32, stride: usize, depth: usize, panel: *mut u32);

/// Converts `src` to elements; an odd last column of a pair is paired with zero.
///
/// # Safety
/// `dst` has `src.len()` columns' worth of elements, rounded up; the CPU has the kernel's level.
pub(super) type PackRowFn = unsafe fn(src: &[f32], dst: &mut [u32]);

/// The functions of one instruction set and element format.
pub struct Kernel {
    /// Name for reports, such as `avx512-f32`.
    pub name: &'static str,
    /// Instruction set that the functions need.
    pub level: Level,
    /// Tokens of the register tile.
    pub(super) mr: usize,
    /// Outputs of the register tile, which is the width of a packed panel.
    pub(super) nr: usize,
    /// 1: elements are f32. 2: elements are pairs of bfloat16, the lower column in the lower half.
    pub(super) columns_per_element: usize,
    pub(super) tile: TileFn,
    pub(super) pack_panel: PackPanelFn,
    pub(super) pack_row: PackRowFn,
}

impl Kernel {
    /// Columns of one block: sums of longer rows are cut here.
    pub(super) fn block_columns(&self) -> usize {
        DEPTH * self.columns_per_element
    }

    /// True for kernels that multiply bfloat16.
    pub fn is_bf16(&self) -> bool {
        self.columns_per_element == 2
    }

    /// The kernel that the current level and `precision` select. Fast is never a slower one than accurate.
    pub fn best(precision: Precision) -> &'static Kernel {
        let takes_bf16 = precision == Precision::Fast && cpu::bf16_products().are_used();
        let usable = |kernel: &&&Kernel| kernel.level.is_available() && (takes_bf16 || !kernel.is_bf16());
        KERNELS.iter().filter(usable).max_by_key(|kernel| kernel.level).expect("scalar is always available")
    }

    /// Kernels of this architecture, those the CPU lacks included; check [`Level::is_available`].
    pub fn all() -> &'static [&'static Kernel] {
        KERNELS
    }
}

#[cfg(target_arch = "x86_64")]
static KERNELS: &[&Kernel] = &[&scalar::F32, &avx2::F32, &avx512::F32, &avx512::BF16];
#[cfg(target_arch = "aarch64")]
static KERNELS: &[&Kernel] = &[&scalar::F32, &neon::F32];
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
static KERNELS: &[&Kernel] = &[&scalar::F32];

/// Copies the bits of `src` into `dst`: the row conversion of every f32 kernel.
///
/// # Safety
/// None needed; the signature is that of [`PackRowFn`].
unsafe fn pack_row_f32(src: &[f32], dst: &mut [u32]) {
    for (element, value) in dst[..src.len()].iter_mut().zip(src) {
        *element = value.to_bits();
    }
}

/// Calls `$tile::<ROWS>` for the run-time number of rows, so that each count has its own registers.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! dispatch_rows {
    ($rows:expr, $tile:ident $args:tt, $($count:literal)*) => {
        match $rows {
            $($count => $tile::<$count> $args,)*
            rows => unreachable!("a tile of {rows} rows"),
        }
    };
}
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use dispatch_rows;
