//! GPTQ as llm-compressor runs it when nothing is set (0.14): for comparison.

use rayon::prelude::*;

use super::cells::{Cell, Grids, in_order};
use super::numbers::Levels;
use super::pass::pass_over;
use super::plain::plain;
use super::{Layout, Rounded};
use crate::quant::float16::{bf16_to_f32, f32_to_bf16};
use crate::rounding::gptq::{FeedbackError, SecondMoment, TASK_ROWS, factor_in_place, zeros};

/// Added to the diagonal, in units of its mean (`dampening_frac`).
const DAMPING: f64 = 0.01;

/// Rounds `weights`, `[rows, columns]`, as llm-compressor's default does: min-max scales of the stored order, fixed before;
/// columns by descending diagonal of the second moment (`actorder` static), which is damped by .01 of its mean diagonal;
/// inputs that were always zero get weight 0; plain rounding where there is no factor. The moment should be of all tokens
/// as they are, see [`SecondMoment::uncapped`].
///
/// What the order of the blocks of 128 columns there changes is the rounding of sums alone.
///
/// # Errors
/// [`FeedbackError`] when a weight is not finite, the moment is of other inputs, or there is no memory.
#[doc(alias = "actorder")]
pub fn gptq_default(
    layout: Layout,
    weights: &[f32],
    rows: usize,
    columns: usize,
    moment: &SecondMoment,
    global: Option<f32>,
) -> Result<Rounded, FeedbackError> {
    if moment.n() != columns {
        return Err(FeedbackError::Inputs { row_len: columns, found: moment.n() });
    }
    if let Some(index) = crate::quant::first_non_finite(weights) {
        return Err(FeedbackError::NonFinite { index, value: weights[index] });
    }
    let start = plain(layout, weights, rows, columns, global);
    let diagonal: Vec<f64> = (0..columns).map(|j| f64::from(moment.upper_row(j)[0])).collect();
    let order = moment.descending();
    let mean = diagonal.iter().sum::<f64>() / columns.max(1) as f64;
    let scale = if mean > 0.0 && mean.is_finite() { 1.0 / mean } else { 1.0 };
    let mut feedback = zeros(columns)?;
    feedback.par_chunks_exact_mut(columns.max(1)).enumerate().for_each(|(i, row)| {
        for (j, target) in row.iter_mut().enumerate().skip(i) {
            let (low, high) = (order[i].min(order[j]), order[i].max(order[j]));
            let sum = f64::from(moment.upper_row(low)[high - low]);
            let own = if sum == 0.0 { 1.0 } else { sum * scale };
            *target = if i == j { own + DAMPING } else { sum * scale } as f32;
        }
    });
    let Some(cost) = factor_in_place(&mut feedback, columns) else { return Ok(start) };
    let grids = Grids::new(&layout, start.global_scale, true);
    let mut cells = layout.cells(&start, rows, columns);
    let task = TASK_ROWS * columns.max(1);
    weights.par_chunks(task).zip(cells.par_chunks_mut(task)).for_each(|(weights, cells)| {
        let mut moved = in_order(weights, &order);
        for row in moved.chunks_exact_mut(columns) {
            row.iter_mut().zip(&order).filter(|(_, at)| diagonal[**at] == 0.0).for_each(|(w, _)| *w = 0.0);
        }
        let mut moved_cells = in_order(cells, &order);
        let mut errors = vec![0.0; moved.len()];
        pass_over(grids, &moved, &cost, &feedback, &mut errors, &mut moved_cells);
        for (row, moved) in cells.chunks_exact_mut(columns).zip(moved_cells.chunks_exact(columns)) {
            order.iter().zip(moved).for_each(|(&at, cell)| row[at] = *cell);
        }
    });
    Ok(layout.rounded(&cells, rows, columns, start.global_scale))
}

/// What llm-compressor stores of `rounded` where the model is in bfloat16: the decoded weights are rounded to that type, and
/// their codes are found again by dividing in it. 4-bit codes come back, a part of the 8-bit ones does not.
pub fn resaved_in_bf16(layout: Layout, rounded: &Rounded, rows: usize, columns: usize) -> Rounded {
    let bf16 = |value: f32| bf16_to_f32(f32_to_bf16(value));
    let levels = Levels::of(layout.grid);
    let cells = layout.cells(rounded, rows, columns);
    let again = |cell: &Cell| {
        let scale = bf16(cell.scale / rounded.global_scale);
        let divided = bf16(bf16(bf16(cell.level) * scale) / scale);
        let level = levels.nearest(bf16(divided + cell.zero)) - cell.zero;
        Cell { level, ..*cell }
    };
    let cells: Vec<Cell> = cells.par_iter().map(again).collect();
    layout.rounded(&cells, rows, columns, rounded.global_scale)
}
