//! The definition of the accurate product, for every CPU.

use super::{Kernel, ROW_STRIDE, pack_row_f32};
use crate::cpu::Level;

const MR: usize = 4;
const NR: usize = 8;

pub(super) static F32: Kernel = Kernel {
    name: "scalar-f32",
    level: Level::Scalar,
    mr: MR,
    nr: NR,
    columns_per_element: 1,
    tile,
    pack_panel,
    pack_row: pack_row_f32,
};

/// See [`super::TileFn`]. `mul_add` rounds once; on CPUs without the instruction it is a slow call, which is the
/// price of having one result everywhere.
unsafe fn tile(rows: usize, depth: usize, a: *const u32, b: *const u32, c: *mut f32, ldc: usize, accumulate: bool) {
    for row in 0..rows {
        let mut sums = [0f32; NR];
        for k in 0..depth {
            // SAFETY: (row, k) lies within the activation panel, by the contract of `TileFn`.
            let x = f32::from_bits(unsafe { *a.add(row * ROW_STRIDE + k) });
            for (lane, sum) in sums.iter_mut().enumerate() {
                // SAFETY: (k, lane) lies within the weight panel.
                let w = f32::from_bits(unsafe { *b.add(k * NR + lane) });
                *sum = x.mul_add(w, *sum);
            }
        }
        for (lane, sum) in sums.into_iter().enumerate() {
            // SAFETY: (row, lane) lies within C.
            let target = unsafe { &mut *c.add(row * ldc + lane) };
            *target = if accumulate { *target + sum } else { sum };
        }
    }
}

/// See [`super::PackPanelFn`].
unsafe fn pack_panel(src: *const f32, stride: usize, depth: usize, panel: *mut u32) {
    for k in 0..depth {
        for lane in 0..NR {
            // SAFETY: row `lane` has `depth` floats and the panel `depth * NR` elements, by contract.
            unsafe { *panel.add(k * NR + lane) = (*src.add(lane * stride + k)).to_bits() };
        }
    }
}
