//! Rounding one row of a tile, column by column.

use super::layout::Layout;
use crate::quant::types::parts::Parts;

/// Columns of a tile: those whose feedback is applied column by column. Feedback from before the tile comes as one
/// matrix product. Every block format divides it.
pub(super) const TILE: usize = 256;

/// One row of a tile. All slices have one element per column of the tile.
pub(super) struct TileRow<'a> {
    /// The weights themselves.
    pub weights: &'a [f32],
    /// The weights with the feedback from columns before the tile; afterwards, with all feedback.
    pub targets: &'a mut [f32],
    /// Gets weight minus rounded weight.
    pub errors: &'a mut [f32],
    /// Gets the encoded blocks.
    pub bytes: &'a mut [u8],
}

impl Layout {
    /// Rounds a row of a tile. `cost` holds what an error of each column costs; `feedback`, if there is any, the
    /// rows of A that belong to the tile's columns, with the distance in floats from each to the next: element `j` of a
    /// row is for the tile's column `j`.
    ///
    /// Afterwards `targets[j]` minus the rounded weight is `u[j]` of the loss.
    pub(super) fn round_tile(&self, row: TileRow<'_>, cost: &[f32], feedback: Option<(&[f32], usize)>) {
        let TileRow { weights, targets, errors, bytes } = row;
        let columns = weights.len();
        let mut parts = Parts::ZERO;
        for (block, bytes) in bytes.chunks_exact_mut(self.bytes).enumerate() {
            let start = block * self.len;
            let end = start + self.len;
            let scales = self.block_scales(&targets[start..end], &cost[start..end]);
            (parts.d, parts.dmin) = (scales.d, scales.dmin);
            for (index, first) in (start..end).step_by(self.group).enumerate() {
                let group = first..first + self.group;
                let choice = self.group_choice(scales, &targets[group.clone()], &cost[group.clone()]);
                (parts.scales[index], parts.mins[index]) = (choice.scale, choice.min);
                for j in group {
                    let (value, level) = choice.grid.round(targets[j]);
                    parts.levels[j - start] = level;
                    let error = weights[j] - value;
                    errors[j] = error;
                    if let Some((a, stride)) = feedback {
                        for (target, a) in targets[j + 1..].iter_mut().zip(&a[j * stride..][j + 1..columns]) {
                            *target += error * a;
                        }
                    }
                }
            }
            parts.write(self.ty, bytes);
        }
    }
}
