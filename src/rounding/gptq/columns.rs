//! Rounding one row of a tile, column by column.

use super::layout::Layout;
use crate::quant::types::parts::Parts;
use crate::vectorized::vectorized;

/// Columns of a tile: those whose feedback is applied column by column. Feedback from before the tile comes as one
/// matrix product. Every block format divides it.
pub(in crate::rounding) const TILE: usize = 256;

/// Least rows of one task.
pub(in crate::rounding) const TASK_ROWS: usize = 64;

/// Rows that are worth multiplying with a matrix of `n` columns at once: enough to make good use of each tile that is
/// read, and more where the matrix is larger than the caches and reading takes the time.
pub(super) fn rows_at_once(n: usize) -> usize {
    TASK_ROWS * (n / 384).clamp(1, 4)
}

/// Weights of columns with mean one, none of them zero, so that no block is left without any.
pub(in crate::rounding) fn column_weights(weights: Option<&[f32]>, n: usize) -> Vec<f32> {
    let Some(weights) = weights else { return vec![1.0; n] };
    let usable = |w: f32| if w.is_finite() && w > 0.0 { f64::from(w) } else { 0.0 };
    let mean = weights.iter().map(|&w| usable(w)).sum::<f64>() / n.max(1) as f64;
    if mean <= 0.0 {
        return vec![1.0; n];
    }
    weights.iter().map(|&w| (usable(w) / mean + 1e-6) as f32).collect()
}

/// One row of a tile. All slices have one element per column of the tile.
pub(super) struct TileRow<'a, P> {
    /// The weights themselves.
    pub weights: &'a [f32],
    /// The weights with the feedback from columns before the tile; afterwards, with all feedback.
    pub targets: &'a mut [f32],
    /// Gets weight minus rounded weight.
    pub errors: &'a mut [f32],
    /// Gets the blocks.
    pub parts: &'a mut [P],
}

impl Layout {
    /// Rounds a row of a tile. `cost` holds what an error of each column costs; `feedback`, if there is any, the
    /// rows of A that belong to the tile's columns, with the distance in floats from each to the next: element `j` of a
    /// row is for the tile's column `j`.
    ///
    /// Afterwards `targets[j]` minus the rounded weight is `u[j]` of the loss.
    pub(super) fn round_tile(&self, row: TileRow<'_, Parts>, cost: &[f32], feedback: Option<(&[f32], usize)>) {
        let TileRow { weights, targets, errors, parts } = row;
        for (block, parts) in parts.iter_mut().enumerate() {
            let start = block * self.len;
            let end = start + self.len;
            let (scales, fits) = self.block_scales(&targets[start..end], &cost[start..end], feedback.is_some());
            (parts.d, parts.dmin) = (scales.d, scales.dmin);
            for (index, first) in (start..end).step_by(self.group).enumerate() {
                let group = first..first + self.group;
                // The targets are still those that the block's scales were chosen for.
                let fit = (index == 0 || feedback.is_none()).then_some(&fits[index]);
                let choice = self.group_choice(scales, fit, &targets[group.clone()], &cost[group.clone()]);
                (parts.scales[index], parts.mins[index]) = (choice.scale, choice.min);
                for j in group.clone() {
                    let (value, level) = choice.grid.round(targets[j]);
                    parts.levels[j - start] = level;
                    errors[j] = weights[j] - value;
                    if let Some((a, stride)) = feedback {
                        let rest = j + 1..group.end;
                        for (target, a) in targets[rest.clone()].iter_mut().zip(&a[j * stride..][rest]) {
                            *target += errors[j] * a;
                        }
                    }
                }
                if let Some((a, stride)) = feedback {
                    pass_on(
                        &errors[group.clone()],
                        &a[group.start * stride..],
                        stride,
                        &mut targets[group.end..],
                        group.end,
                    );
                }
            }
        }
    }
}

vectorized! {
    /// Adds `errors[k] * a[k * stride + first + j]` to `targets[j]`, for each `k` in order.
    pub(super) fn pass_on(errors: &[f32], a: &[f32], stride: usize, targets: &mut [f32], first: usize) {
        pass_on_in_parts(errors, a, stride, targets, first);
    }
}

#[inline(always)]
fn pass_on_in_parts(errors: &[f32], a: &[f32], stride: usize, targets: &mut [f32], first: usize) {
    // Targets of a part stay in registers. Groups are 8, 16 or 32 columns, so that nothing is left over in the end.
    const PART: usize = 8;
    for (part, targets) in targets.as_chunks_mut::<PART>().0.iter_mut().enumerate() {
        let mut sums = *targets;
        for (error, a) in errors.iter().zip(a[first + part * PART..].chunks(stride)) {
            for (sum, a) in sums.iter_mut().zip(&a[..PART]) {
                *sum += error * a;
            }
        }
        *targets = sums;
    }
}
