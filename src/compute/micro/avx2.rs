//! AVX2 and FMA kernel: 6 tokens x 16 outputs, 12 accumulators, two vectors of weights and one broadcast.

use super::{DEPTH, Kernel, ROW_STRIDE, dispatch_rows, pack_row_f32};
use crate::cpu::Level;
use std::arch::x86_64::*;

const MR: usize = 6;
const NR: usize = 16;

pub(super) static F32: Kernel = Kernel {
    name: "avx2-f32",
    level: Level::Avx2,
    mr: MR,
    nr: NR,
    columns_per_element: 1,
    tile,
    pack_panel,
    pack_row: pack_row_f32,
};

/// See [`super::TileFn`].
#[target_feature(enable = "avx2,fma")]
unsafe fn tile(rows: usize, depth: usize, a: *const u32, b: *const u32, c: *mut f32, ldc: usize, accumulate: bool) {
    // SAFETY: passed on unchanged.
    unsafe { dispatch_rows!(rows, tile_rows(depth, a, b, c, ldc, accumulate), 1 2 3 4 5 6) }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn tile_rows<const ROWS: usize>(
    depth: usize,
    a: *const u32,
    b: *const u32,
    c: *mut f32,
    ldc: usize,
    accumulate: bool,
) {
    // SAFETY: rows below ROWS, columns of k below `depth` and lanes below NR lie within A, B and C by the contract of
    // `TileFn`; B is aligned; prefetching may name any address.
    unsafe {
        if accumulate {
            for row in 0..ROWS {
                _mm_prefetch::<_MM_HINT_T0>(c.add(row * ldc).cast::<i8>());
            }
        }
        let mut sums = [[_mm256_setzero_ps(); 2]; ROWS];
        for k in 0..depth {
            let w0 = _mm256_load_ps(b.add(k * NR).cast());
            let w1 = _mm256_load_ps(b.add(k * NR + 8).cast());
            for (row, sums) in sums.iter_mut().enumerate() {
                let x = _mm256_set1_ps(f32::from_bits(*a.add(row * ROW_STRIDE + k)));
                sums[0] = _mm256_fmadd_ps(x, w0, sums[0]);
                sums[1] = _mm256_fmadd_ps(x, w1, sums[1]);
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (half, &sum) in sums.iter().enumerate() {
                let target = c.add(row * ldc + half * 8);
                let value = if accumulate { _mm256_add_ps(_mm256_loadu_ps(target), sum) } else { sum };
                _mm256_storeu_ps(target, value);
            }
        }
    }
}

/// Lane r of result c is lane c of input r.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose_8x8(rows: [__m256; 8]) -> [__m256; 8] {
    // quads[4q + j] holds, in its 128-bit lane L, column 4L + j of rows 4q .. 4q + 4.
    let mut quads = rows;
    for q in 0..2 {
        let [r0, r1, r2, r3] = [rows[4 * q], rows[4 * q + 1], rows[4 * q + 2], rows[4 * q + 3]];
        let (low01, high01) = (_mm256_unpacklo_ps(r0, r1), _mm256_unpackhi_ps(r0, r1));
        let (low23, high23) = (_mm256_unpacklo_ps(r2, r3), _mm256_unpackhi_ps(r2, r3));
        quads[4 * q] = _mm256_shuffle_ps::<0x44>(low01, low23);
        quads[4 * q + 1] = _mm256_shuffle_ps::<0xee>(low01, low23);
        quads[4 * q + 2] = _mm256_shuffle_ps::<0x44>(high01, high23);
        quads[4 * q + 3] = _mm256_shuffle_ps::<0xee>(high01, high23);
    }
    let mut columns = rows;
    for j in 0..4 {
        columns[j] = _mm256_permute2f128_ps::<0x20>(quads[j], quads[4 + j]);
        columns[4 + j] = _mm256_permute2f128_ps::<0x31>(quads[j], quads[4 + j]);
    }
    columns
}

/// See [`super::PackPanelFn`].
#[target_feature(enable = "avx2")]
unsafe fn pack_panel(src: *const f32, stride: usize, depth: usize, panel: *mut u32) {
    debug_assert!(depth <= DEPTH);
    for lane in (0..NR).step_by(8) {
        for k in (0..depth).step_by(8) {
            let mut rows = [_mm256_setzero_ps(); 8];
            for (row, vector) in rows.iter_mut().enumerate() {
                // SAFETY: each of the NR rows has `depth` rounded up to 16 floats, by contract.
                *vector = unsafe { _mm256_loadu_ps(src.add((lane + row) * stride + k)) };
            }
            for (column, vector) in transpose_8x8(rows).into_iter().enumerate() {
                // SAFETY: the panel has `depth` rounded up to 16 times NR elements, aligned to 64 bytes.
                unsafe { _mm256_store_ps(panel.add((k + column) * NR + lane).cast(), vector) };
            }
        }
    }
}
