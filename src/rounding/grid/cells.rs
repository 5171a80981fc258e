//! Rounded weights one by one, as long as they may change.

use rayon::prelude::*;

use super::numbers::Levels;
use super::{Groups, Layout, Rounded};
use crate::rounding::gptq::TILE;

/// One rounded weight: `step * level`, where the step is the scale over the global scale.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cell {
    /// Number of the code minus the zero point.
    pub level: f32,
    /// The group's, as stored.
    pub scale: f32,
    pub zero: f32,
}

/// What does not change from row to row.
#[derive(Clone, Copy)]
pub(super) struct Grids<'a> {
    pub layout: &'a Layout,
    pub levels: Levels,
    pub global: f32,
    /// Columns of a group whose scale is chosen when it comes up; `None` where all scales are given.
    pub chosen: Option<usize>,
}

impl<'a> Grids<'a> {
    /// Columns that stand in another order than their own have given scales.
    pub(super) fn new(layout: &'a Layout, global: f32, reordered: bool) -> Grids<'a> {
        let chosen = match layout.groups {
            Groups::Columns(group) if TILE.is_multiple_of(group) && !reordered => Some(group),
            _ => None,
        };
        Grids { layout, levels: Levels::of(layout.grid), global, chosen }
    }
}

impl Layout {
    /// The weights of a matrix one by one.
    pub(super) fn cells(&self, rounded: &Rounded, rows: usize, columns: usize) -> Vec<Cell> {
        let [_, across] = self.scale_shape(rows, columns);
        let group = self.group_columns(columns);
        let levels = Levels::of(self.grid);
        let cell = |(at, code): (usize, &u8)| {
            let at = self.scale_row(at / columns) * across + at % columns / group;
            let zero = rounded.zero_points.get(at).map_or(0.0, |&zero| f32::from(zero));
            Cell { level: levels.value(*code) - zero, scale: rounded.scales[at], zero }
        };
        rounded.codes.par_iter().enumerate().map(cell).collect()
    }

    /// The matrix of these weights.
    pub(super) fn rounded(&self, cells: &[Cell], rows: usize, columns: usize, global_scale: f32) -> Rounded {
        let levels = Levels::of(self.grid);
        let codes = cells.par_iter().map(|cell| levels.code(cell.level + cell.zero)).collect();
        let (down, group) = match self.groups {
            Groups::Blocks { rows, columns } => (rows, columns),
            _ => (1, self.group_columns(columns)),
        };
        let firsts = (0..rows).step_by(down).flat_map(|row| (0..columns).step_by(group).map(move |at| (row, at)));
        let firsts: Vec<Cell> = firsts.map(|(row, at)| cells[row * columns + at]).collect();
        let zero_points =
            if self.has_zero_points() { firsts.iter().map(|cell| cell.zero as i8).collect() } else { Vec::new() };
        Rounded { codes, scales: firsts.iter().map(|cell| cell.scale).collect(), zero_points, global_scale }
    }
}

/// Rows `[.., order.len()]` with their columns in another order.
pub(super) fn in_order<T: Copy>(rows: &[T], order: &[usize]) -> Vec<T> {
    rows.chunks_exact(order.len().max(1)).flat_map(|row| order.iter().map(|&at| row[at])).collect()
}
