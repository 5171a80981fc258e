//! AVX-512 kernels: f32 by fused multiply-add and bfloat16 by `vdpbf16ps`.
//!
//! 14 tokens x 32 outputs: 28 accumulators, two vectors of weights and one broadcast fill 31 of 32 registers; each
//! column costs 16 loads for 28 multiply-adds.

use super::{DEPTH, Kernel, ROW_STRIDE, dispatch_rows, pack_row_f32};
use crate::cpu::Level;
use std::arch::x86_64::*;

const MR: usize = 14;
const NR: usize = 32;

pub(super) static F32: Kernel = Kernel {
    name: "avx512-f32",
    level: Level::Avx512,
    mr: MR,
    nr: NR,
    columns_per_element: 1,
    tile: tile_f32,
    pack_panel: pack_panel_f32,
    pack_row: pack_row_f32,
};

pub(super) static BF16: Kernel = Kernel {
    name: "avx512-bf16",
    level: Level::Avx512Bf16,
    mr: MR,
    nr: NR,
    columns_per_element: 2,
    tile: tile_bf16,
    pack_panel: pack_panel_bf16,
    pack_row: pack_row_bf16,
};

macro_rules! tile {
    ($name:ident, $rows:ident, $feature:literal, $product:ident) => {
        /// See [`super::TileFn`].
        #[target_feature(enable = $feature)]
        unsafe fn $name(
            rows: usize,
            depth: usize,
            a: *const u32,
            b: *const u32,
            c: *mut f32,
            ldc: usize,
            accumulate: bool,
        ) {
            // SAFETY: passed on unchanged.
            unsafe {
                dispatch_rows!(rows, $rows(depth, a, b, c, ldc, accumulate), 1 2 3 4 5 6 7 8 9 10 11 12 13 14)
            }
        }

        #[target_feature(enable = $feature)]
        unsafe fn $rows<const ROWS: usize>(
            depth: usize,
            a: *const u32,
            b: *const u32,
            c: *mut f32,
            ldc: usize,
            accumulate: bool,
        ) {
            // SAFETY: rows below ROWS, columns of k below `depth` and lanes below NR lie within A, B and C by the
            // contract of `TileFn`; B is aligned; prefetching may name any address.
            unsafe {
                if accumulate {
                    for row in 0..ROWS {
                        let line = c.add(row * ldc).cast::<i8>();
                        _mm_prefetch::<_MM_HINT_T0>(line);
                        _mm_prefetch::<_MM_HINT_T0>(line.add(64));
                    }
                }
                let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
                for k in 0..depth {
                    let w0 = _mm512_load_ps(b.add(k * NR).cast());
                    let w1 = _mm512_load_ps(b.add(k * NR + 16).cast());
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let x = _mm512_set1_ps(f32::from_bits(*a.add(row * ROW_STRIDE + k)));
                        sums[0] = $product(sums[0], x, w0);
                        sums[1] = $product(sums[1], x, w1);
                    }
                }
                for (row, sums) in sums.iter().enumerate() {
                    for (half, &sum) in sums.iter().enumerate() {
                        let target = c.add(row * ldc + half * 16);
                        let value = if accumulate { _mm512_add_ps(_mm512_loadu_ps(target), sum) } else { sum };
                        _mm512_storeu_ps(target, value);
                    }
                }
            }
        }
    };
}

tile!(tile_f32, tile_f32_rows, "avx512f", multiply_add);
tile!(tile_bf16, tile_bf16_rows, "avx512f,avx512bf16", dot_pairs_add);

#[inline]
#[target_feature(enable = "avx512f")]
fn multiply_add(sum: __m512, x: __m512, w: __m512) -> __m512 {
    _mm512_fmadd_ps(x, w, sum)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn dot_pairs_add(sum: __m512, x: __m512, w: __m512) -> __m512 {
    // SAFETY: both are 64 bytes, valid for every bit pattern.
    let (x, w) = unsafe { (std::mem::transmute::<__m512, __m512bh>(x), std::mem::transmute::<__m512, __m512bh>(w)) };
    _mm512_dpbf16_ps(sum, x, w)
}

/// Lane r of result c is lane c of input r.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose_16x16(rows: [__m512; 16]) -> [__m512; 16] {
    // Within 128-bit lanes: quads[4q + j] holds, in its lane L, column 4L + j of rows 4q .. 4q + 4.
    let mut quads = rows;
    for q in 0..4 {
        let [r0, r1, r2, r3] = [rows[4 * q], rows[4 * q + 1], rows[4 * q + 2], rows[4 * q + 3]];
        let low01 = _mm512_castps_pd(_mm512_unpacklo_ps(r0, r1));
        let high01 = _mm512_castps_pd(_mm512_unpackhi_ps(r0, r1));
        let low23 = _mm512_castps_pd(_mm512_unpacklo_ps(r2, r3));
        let high23 = _mm512_castps_pd(_mm512_unpackhi_ps(r2, r3));
        quads[4 * q] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
        quads[4 * q + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
        quads[4 * q + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
        quads[4 * q + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
    }
    let mut columns = rows;
    for j in 0..4 {
        let even01 = _mm512_shuffle_f32x4::<0x88>(quads[j], quads[4 + j]);
        let odd01 = _mm512_shuffle_f32x4::<0xdd>(quads[j], quads[4 + j]);
        let even23 = _mm512_shuffle_f32x4::<0x88>(quads[8 + j], quads[12 + j]);
        let odd23 = _mm512_shuffle_f32x4::<0xdd>(quads[8 + j], quads[12 + j]);
        columns[j] = _mm512_shuffle_f32x4::<0x88>(even01, even23);
        columns[4 + j] = _mm512_shuffle_f32x4::<0x88>(odd01, odd23);
        columns[8 + j] = _mm512_shuffle_f32x4::<0xdd>(even01, even23);
        columns[12 + j] = _mm512_shuffle_f32x4::<0xdd>(odd01, odd23);
    }
    columns
}

/// See [`super::PackPanelFn`].
#[target_feature(enable = "avx512f")]
unsafe fn pack_panel_f32(src: *const f32, stride: usize, depth: usize, panel: *mut u32) {
    debug_assert!(depth <= DEPTH);
    for lane in (0..NR).step_by(16) {
        for k in (0..depth).step_by(16) {
            let mut rows = [_mm512_setzero_ps(); 16];
            for (row, vector) in rows.iter_mut().enumerate() {
                // SAFETY: each of the NR rows has `depth` rounded up to 16 floats, by contract.
                *vector = unsafe { _mm512_loadu_ps(src.add((lane + row) * stride + k)) };
            }
            for (column, vector) in transpose_16x16(rows).into_iter().enumerate() {
                // SAFETY: the panel has `depth` rounded up to 16 times NR elements, aligned to 64 bytes.
                unsafe { _mm512_store_ps(panel.add((k + column) * NR + lane).cast(), vector) };
            }
        }
    }
}

/// 32 floats as 16 pairs of bfloat16, each rounded to nearest even, in order.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn load_pairs(src: *const f32) -> __m512 {
    // SAFETY: the caller vouches for 32 floats; the cast keeps 64 bytes, valid for every bit pattern.
    unsafe {
        let (low, high) = (_mm512_loadu_ps(src), _mm512_loadu_ps(src.add(16)));
        std::mem::transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(high, low))
    }
}

/// See [`super::PackPanelFn`].
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn pack_panel_bf16(src: *const f32, stride: usize, depth: usize, panel: *mut u32) {
    debug_assert!(depth <= DEPTH);
    for lane in (0..NR).step_by(16) {
        for k in (0..depth).step_by(16) {
            let mut rows = [_mm512_setzero_ps(); 16];
            for (row, vector) in rows.iter_mut().enumerate() {
                // SAFETY: each of the NR rows has `depth` rounded up to 16 pairs of floats, by contract.
                *vector = unsafe { load_pairs(src.add((lane + row) * stride + 2 * k)) };
            }
            for (column, vector) in transpose_16x16(rows).into_iter().enumerate() {
                // SAFETY: the panel has `depth` rounded up to 16 times NR elements, aligned to 64 bytes.
                unsafe { _mm512_store_ps(panel.add((k + column) * NR + lane).cast(), vector) };
            }
        }
    }
}

/// See [`super::PackRowFn`].
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn pack_row_bf16(src: &[f32], dst: &mut [u32]) {
    let dst = &mut dst[..src.len().div_ceil(2)];
    let mut targets = dst.chunks_exact_mut(16);
    let mut sources = src.chunks_exact(32);
    for (target, source) in (&mut targets).zip(&mut sources) {
        // SAFETY: 32 floats are read and 16 elements written.
        unsafe { _mm512_storeu_ps(target.as_mut_ptr().cast(), load_pairs(source.as_ptr())) };
    }
    let rest = sources.remainder();
    if rest.is_empty() {
        return;
    }
    let mut padded = [0f32; 32];
    padded[..rest.len()].copy_from_slice(rest);
    let mut pairs = [0u32; 16];
    // SAFETY: `padded` has 32 floats, `pairs` 16 elements.
    unsafe { _mm512_storeu_ps(pairs.as_mut_ptr().cast(), load_pairs(padded.as_ptr())) };
    let done = src.len() / 32 * 16;
    let tail = &mut dst[done..];
    let count = tail.len();
    tail.copy_from_slice(&pairs[..count]);
}
