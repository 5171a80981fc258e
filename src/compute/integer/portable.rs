//! Exact sums of integers in floats, by the matrix kernels of every instruction set.

use super::activations::{RECORD, STEPS, SUMS_16, SUMS_32};
use super::panel::Panel;
use super::{BLOCK, Engine, Steps, Target, TileShape};
use crate::compute::Precision;
use crate::compute::aligned::AlignedBuf;
use crate::compute::micro::{Kernel, ROW_STRIDE};
use crate::vectorized::vectorized;

pub(super) fn engine() -> Engine {
    let kernel = Kernel::best(Precision::Accurate);
    Engine { name: kernel.name, mr: kernel.mr, nr: kernel.nr, tile, pack }
}

fn pack(panel: &mut Panel) {
    let kernel = Kernel::best(Precision::Accurate);
    panel.packed.reserve(BLOCK * panel.lanes);
    // SAFETY: there are `nr` rows of BLOCK floats, a multiple of 16 of which are used, and BLOCK elements for each
    // lane; the level of the best kernel is available.
    unsafe {
        (kernel.pack_panel)(panel.codes.as_ptr().cast(), BLOCK, panel.columns, panel.packed.as_mut_ptr());
    }
}

/// See [`super::TileFn`].
unsafe fn tile(shape: TileShape, rows: usize, x: *const u32, panel: &Panel, target: Target, scratch: &mut AlignedBuf) {
    let kernel = Kernel::best(Precision::Accurate);
    let lanes = panel.lanes;
    // SAFETY: `rows` records lie at `x` by contract.
    let records = unsafe { std::slice::from_raw_parts(x, rows * RECORD) };
    scratch.reserve(kernel.mr * ROW_STRIDE + 2 * kernel.mr * lanes);
    let (levels, rest) = scratch.as_mut_f32().split_at_mut(kernel.mr * ROW_STRIDE);
    let (sums, totals) = rest.split_at_mut(kernel.mr * lanes);
    for (levels, record) in levels.chunks_exact_mut(ROW_STRIDE).zip(records.chunks_exact(RECORD)) {
        for (quad, element) in levels.as_chunks_mut::<4>().0.iter_mut().zip(&record[..shape.columns / 4]) {
            *quad = element.to_le_bytes().map(|byte| f32::from((byte ^ 0x80) as i8));
        }
    }
    let totals = &mut totals[..rows * lanes];
    totals.fill(0.0);
    let group = shape.lines.group;
    for index in 0..shape.columns / group {
        // SAFETY: the rows of `levels` have ROW_STRIDE floats, the panel `lanes` floats a column from a multiple of 16
        // columns on, which keeps it aligned; `sums` has room for any tile; the level of the best kernel is available.
        unsafe {
            let a = levels.as_ptr().add(index * group).cast();
            let b = panel.packed.as_ptr().add(index * group * lanes);
            (kernel.tile)(rows, group, a, b, sums.as_mut_ptr(), lanes, false);
        }
        // SAFETY: the buffers hold a line for each group and lane.
        let (scales, offsets) = unsafe { (lines(&panel.scales, index, lanes), lines(&panel.offsets, index, lanes)) };
        for ((totals, sums), record) in
            totals.chunks_exact_mut(lanes).zip(sums.chunks_exact(lanes)).zip(records.chunks_exact(RECORD))
        {
            let level_sum = match group {
                16 => f32::from_bits(record[SUMS_16 + index]),
                _ => f32::from_bits(record[SUMS_32 + index]),
            };
            let step = f32::from_bits(record[STEPS + index * group / 32]);
            let group = Group {
                sums,
                scales,
                offsets,
                level_sum: shape.lines.affine.then_some(level_sum),
                step: (shape.steps == Steps::Of32).then_some(step),
            };
            add_group(group, totals);
        }
    }
    for (row, (totals, record)) in totals.chunks_exact(lanes).zip(records.chunks_exact(RECORD)).enumerate() {
        // SAFETY: the target has `rows` rows of `lanes` floats by contract.
        let places = unsafe { std::slice::from_raw_parts_mut(target.start.add(row * target.stride), lanes) };
        let step = if shape.steps == Steps::Of256 { f32::from_bits(record[STEPS]) } else { 1.0 };
        for (place, total) in places.iter_mut().zip(totals) {
            let value = total * step;
            *place = if target.accumulate { *place + value } else { value };
        }
    }
}

/// # Safety
/// The buffer holds `index + 1` lines of `lanes` floats.
unsafe fn lines(buffer: &AlignedBuf, index: usize, lanes: usize) -> &[f32] {
    // SAFETY: by contract; every bit pattern is a valid f32.
    unsafe { std::slice::from_raw_parts(buffer.as_ptr().add(index * lanes).cast(), lanes) }
}

/// What a group of weights adds to the outputs of a token, a lane each; see the arithmetic of the module.
#[derive(Clone, Copy)]
struct Group<'a> {
    sums: &'a [f32],
    scales: &'a [f32],
    offsets: &'a [f32],
    /// Of types with offsets.
    level_sum: Option<f32>,
    /// Of steps of 32.
    step: Option<f32>,
}

vectorized! {
    /// [`Group::add_fused`].
    fn add_group(group: Group<'_>, totals: &mut [f32]) {
        group.add_fused(totals);
    }
}

impl Group<'_> {
    #[inline(always)]
    fn add_fused(self, totals: &mut [f32]) {
        let lanes = totals.iter_mut().zip(self.sums).zip(self.scales);
        match (self.step, self.level_sum) {
            (None, None) => lanes.for_each(|((total, sum), scale)| *total = sum.mul_add(*scale, *total)),
            (None, Some(level_sum)) => lanes.zip(self.offsets).for_each(|(((total, sum), scale), offset)| {
                *total = level_sum.mul_add(*offset, sum.mul_add(*scale, *total));
            }),
            (Some(step), None) => lanes.for_each(|((total, sum), scale)| *total = (sum * scale).mul_add(step, *total)),
            (Some(step), Some(level_sum)) => lanes.zip(self.offsets).for_each(|(((total, sum), scale), offset)| {
                *total = level_sum.mul_add(*offset, sum * scale).mul_add(step, *total);
            }),
        }
    }
}
