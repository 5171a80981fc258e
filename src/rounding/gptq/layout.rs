//! The formats whose weights are rounded one by one.

use super::columns::TileRow;
use super::format::{TileColumns, TileFormat};
use super::grid::{Grid, Whole, level_number};
use super::sweep::{TileState, descend};
use crate::gguf::TensorType;
use crate::quant::shape::{BlockShape, LevelSet, ScaleShape};
use crate::quant::types::parts::Parts;
use crate::quant::{QuantError, codec};

/// One format.
#[derive(Debug)]
pub(super) struct Layout {
    pub ty: TensorType,
    /// Weights per block.
    pub len: usize,
    /// Bytes per block.
    pub bytes: usize,
    /// Weights per group.
    pub group: usize,
    pub kind: ScaleShape,
    /// Levels, or `None` for the values of IQ4.
    pub whole: Option<Whole>,
    /// Levels that the largest weight of a group is tried at.
    pub bounds: Vec<f32>,
}

/// Levels around the ends of the range that the largest weight of a group is tried at: `count` of them on either side
/// of each end, `spacing` apart.
fn bounds(lowest: f32, highest: f32, spacing: f32, count: i32) -> Vec<f32> {
    let around = |end: f32| (-count..=count).map(move |i| end + spacing * i as f32);
    around(lowest).chain(around(highest)).collect()
}

impl Layout {
    /// The format of `ty`, if its weights are rounded one by one.
    pub(super) fn of(ty: TensorType) -> Option<Layout> {
        let Some(BlockShape::Levels(shape)) = codec(ty)?.shape else { return None };
        let (whole, bounds) = match shape.levels {
            LevelSet::Whole { lowest, highest } => {
                let whole = Whole { lowest: lowest.into(), highest: highest.into() };
                let bounds = match highest - lowest {
                    // Lines are fitted without.
                    _ if shape.scales.is_affine() => Vec::new(),
                    // Levels of bytes: a tenth of one changes next to nothing.
                    128.. => bounds(whole.lowest, whole.highest, 0.5, 12),
                    _ => bounds(whole.lowest, whole.highest, 0.1, 9),
                };
                (Some(whole), bounds)
            }
            LevelSet::Iq4 => (None, bounds(-127.0, 113.0, 1.5, 9)),
        };
        let info = ty.info()?;
        Some(Layout {
            ty,
            len: info.block_len,
            bytes: info.block_bytes,
            group: shape.group,
            kind: shape.scales,
            whole,
            bounds,
        })
    }

    /// The values of a group, from what its block stores.
    pub(super) fn grid(&self, parts: &Parts, group: usize) -> Grid {
        let step = parts.d * f32::from(parts.scales[group]);
        match self.kind {
            ScaleShape::Step | ScaleShape::Line => Grid::new(parts.d, parts.dmin, self.whole),
            ScaleShape::GroupSteps { .. } => Grid::new(step, 0.0, self.whole),
            ScaleShape::GroupLines { .. } => Grid::new(step, -(parts.dmin * f32::from(parts.mins[group])), self.whole),
        }
    }

    /// The number that a stored level stands for, in units of the step.
    pub(super) fn level(&self, level: u8) -> f32 {
        level_number(level, self.whole)
    }
}

impl TileFormat for Layout {
    type Parts = Parts;
    type Tile = ();

    const ZERO: Parts = Parts::ZERO;

    fn block_len(&self) -> usize {
        self.len
    }

    fn tile(&self, _: TileColumns<'_>) {}

    fn round(&self, _: &(), columns: TileColumns<'_>, row: TileRow<'_, Parts>) -> Result<(), QuantError> {
        self.round_tile(row, columns.cost, Some((columns.feedback, columns.stride)));
        Ok(())
    }

    fn descend(&self, _: &(), state: TileState<'_>, parts: &mut [Parts]) {
        descend(self, state, parts);
    }

    fn write(&self, parts: &[Parts], bytes: &mut [u8]) {
        for (parts, block) in parts.iter().zip(bytes.chunks_exact_mut(self.bytes)) {
            parts.write(self.ty, block);
        }
    }
}
