//! Some rows of weights, taken apart into codes and lines.

use super::BLOCK;
use super::activations::TO_INTEGER;
use crate::compute::aligned::AlignedBuf;
use crate::compute::matrix::Matrix;
use crate::quant::types::lines::{Line, LineShape, MAX_LINES};
use crate::vectorized::vectorized;

/// One block of columns of as many rows as an engine has lanes.
#[derive(Default)]
pub(super) struct Panel {
    /// Codes as floats, `[lane][BLOCK]`.
    pub codes: AlignedBuf,
    /// Codes as the engine reads them.
    pub packed: AlignedBuf,
    /// Scales, `[group][lane]`.
    pub scales: AlignedBuf,
    /// Offsets, `[group][lane]`.
    pub offsets: AlignedBuf,
    /// What sums of products start from, `[group][lane]`: used where levels are not signed.
    pub starts: AlignedBuf,
    pub lanes: usize,
    /// Columns of the block.
    pub columns: usize,
    /// Weights of a group.
    pub group: usize,
}

impl Panel {
    /// Decodes `rows` rows from `row` on; the other lanes are zero.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn fill(
        &mut self,
        w: &Matrix,
        row: usize,
        rows: usize,
        lanes: usize,
        first: usize,
        columns: usize,
        shape: LineShape,
    ) {
        (self.lanes, self.columns, self.group) = (lanes, columns, shape.group);
        self.codes.reserve(lanes * BLOCK);
        for buffer in [&mut self.scales, &mut self.offsets, &mut self.starts] {
            buffer.reserve(MAX_LINES * lanes);
        }
        let codes = self.codes.as_mut_f32();
        let (scales, offsets) = (self.scales.as_mut_f32(), self.offsets.as_mut_f32());
        for lane in 0..lanes {
            let codes = &mut codes[lane * BLOCK..][..columns];
            let mut lines = [Line::default(); MAX_LINES];
            if lane < rows {
                w.decode_columns(row + lane, first, codes);
                w.lines(row + lane, first, columns, &mut lines);
                to_codes(codes, &lines, shape.group);
            } else {
                codes.fill(0.0);
            }
            for (group, line) in lines[..columns / shape.group].iter().enumerate() {
                scales[group * lanes + lane] = line.scale;
                offsets[group * lanes + lane] = line.offset;
            }
        }
    }
}

vectorized! {
    /// Replaces weights by their codes.
    fn to_codes(weights: &mut [f32], lines: &[Line; MAX_LINES], group: usize) {
        for (weights, line) in weights.chunks_exact_mut(group).zip(lines) {
            let inverse = if line.scale == 0.0 { 0.0 } else { 1.0 / line.scale };
            for chunk in weights.as_chunks_mut::<16>().0 {
                for v in chunk {
                    let code = ((*v - line.offset) * inverse + TO_INTEGER) - TO_INTEGER;
                    // Not `clamp`: what is no number becomes a number, and stays none through its scale.
                    let code = if code < 127.0 { code } else { 127.0 };
                    *v = if code > -127.0 { code } else { -127.0 };
                }
            }
        }
    }
}
