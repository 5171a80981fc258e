//! NEON kernel: 6 tokens x 16 outputs, 24 accumulators and four vectors of weights.

use super::{DEPTH, Kernel, ROW_STRIDE, dispatch_rows, pack_row_f32};
use crate::cpu::Level;
use std::arch::aarch64::*;

const MR: usize = 6;
const NR: usize = 16;
const VECTORS: usize = NR / 4;

pub(super) static F32: Kernel = Kernel {
    name: "neon-f32",
    level: Level::Neon,
    mr: MR,
    nr: NR,
    columns_per_element: 1,
    tile,
    pack_panel,
    pack_row: pack_row_f32,
};

/// See [`super::TileFn`].
#[target_feature(enable = "neon")]
unsafe fn tile(rows: usize, depth: usize, a: *const u32, b: *const u32, c: *mut f32, ldc: usize, accumulate: bool) {
    // SAFETY: passed on unchanged.
    unsafe { dispatch_rows!(rows, tile_rows(depth, a, b, c, ldc, accumulate), 1 2 3 4 5 6) }
}

#[target_feature(enable = "neon")]
unsafe fn tile_rows<const ROWS: usize>(
    depth: usize,
    a: *const u32,
    b: *const u32,
    c: *mut f32,
    ldc: usize,
    accumulate: bool,
) {
    // SAFETY: rows below ROWS, columns of k below `depth` and lanes below NR lie within A, B and C by the contract of
    // `TileFn`.
    unsafe {
        let mut sums = [[vdupq_n_f32(0.0); VECTORS]; ROWS];
        for k in 0..depth {
            let mut weights = [vdupq_n_f32(0.0); VECTORS];
            for (part, vector) in weights.iter_mut().enumerate() {
                *vector = vld1q_f32(b.add(k * NR + part * 4).cast());
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let x = vld1q_dup_f32(a.add(row * ROW_STRIDE + k).cast());
                for (sum, w) in sums.iter_mut().zip(weights) {
                    *sum = vfmaq_f32(*sum, x, w);
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (part, &sum) in sums.iter().enumerate() {
                let target = c.add(row * ldc + part * 4);
                let value = if accumulate { vaddq_f32(vld1q_f32(target), sum) } else { sum };
                vst1q_f32(target, value);
            }
        }
    }
}

/// See [`super::PackPanelFn`].
#[target_feature(enable = "neon")]
unsafe fn pack_panel(src: *const f32, stride: usize, depth: usize, panel: *mut u32) {
    debug_assert!(depth <= DEPTH);
    for lane in (0..NR).step_by(4) {
        for k in (0..depth).step_by(4) {
            // SAFETY: each of the NR rows has `depth` rounded up to 16 floats and the panel as many times NR
            // elements, by contract.
            unsafe {
                let row = |index: usize| vld1q_f32(src.add((lane + index) * stride + k));
                let (r0, r1, r2, r3) = (row(0), row(1), row(2), row(3));
                let (low01, high01) = (vzip1q_f32(r0, r1), vzip2q_f32(r0, r1));
                let (low23, high23) = (vzip1q_f32(r2, r3), vzip2q_f32(r2, r3));
                let store = |column: usize, low: float32x2_t, high: float32x2_t| {
                    vst1q_f32(panel.add((k + column) * NR + lane).cast(), vcombine_f32(low, high));
                };
                store(0, vget_low_f32(low01), vget_low_f32(low23));
                store(1, vget_high_f32(low01), vget_high_f32(low23));
                store(2, vget_low_f32(high01), vget_low_f32(high23));
                store(3, vget_high_f32(high01), vget_high_f32(high23));
            }
        }
    }
}
