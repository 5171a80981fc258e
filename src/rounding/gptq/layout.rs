//! The formats whose weights are rounded one by one, as a table.

use super::grid::{Grid, Whole, level_number};
use crate::gguf::TensorType;
use crate::quant::types::parts::Parts;

/// How scales are stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Kind {
    /// One binary16 step per block.
    Step,
    /// A binary16 step and a binary16 value of level 0 per block.
    Line,
    /// A binary16 per block times a whole number in `lowest..=highest` per group.
    GroupSteps { lowest: i16, highest: i16 },
    /// Two binary16 per block times whole numbers in `0..=top` per group: step, and minus the value of level 0.
    GroupLines { top: i16 },
}

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
    pub kind: Kind,
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
        let signed =
            |half: f32| (Some(Whole { lowest: -half, highest: half - 1.0 }), bounds(-half, half - 1.0, 0.1, 9));
        let counted = |top: f32| (Some(Whole { lowest: 0.0, highest: top }), Vec::new());
        let (group, kind, (whole, bounds)) = match ty {
            TensorType::Q4_0 => (32, Kind::Step, signed(8.0)),
            TensorType::Q5_0 => (32, Kind::Step, signed(16.0)),
            // -128 would decode too, but ggml never writes it.
            TensorType::Q8_0 => {
                (32, Kind::Step, (Some(Whole { lowest: -127.0, highest: 127.0 }), bounds(-127.0, 127.0, 0.5, 12)))
            }
            TensorType::IQ4_NL => (32, Kind::Step, (None, bounds(-127.0, 113.0, 1.5, 9))),
            TensorType::Q4_1 => (32, Kind::Line, counted(15.0)),
            TensorType::Q5_1 => (32, Kind::Line, counted(31.0)),
            TensorType::Q2_K => (16, Kind::GroupLines { top: 15 }, counted(3.0)),
            TensorType::Q4_K => (32, Kind::GroupLines { top: 63 }, counted(15.0)),
            TensorType::Q5_K => (32, Kind::GroupLines { top: 63 }, counted(31.0)),
            TensorType::Q3_K => (16, Kind::GroupSteps { lowest: -32, highest: 31 }, signed(4.0)),
            TensorType::Q6_K => (16, Kind::GroupSteps { lowest: -128, highest: 127 }, signed(32.0)),
            TensorType::IQ4_XS => {
                (32, Kind::GroupSteps { lowest: -32, highest: 31 }, (None, bounds(-127.0, 113.0, 1.5, 9)))
            }
            _ => return None,
        };
        let info = ty.info()?;
        Some(Layout { ty, len: info.block_len, bytes: info.block_bytes, group, kind, whole, bounds })
    }

    /// The values of a group, from what its block stores.
    pub(super) fn grid(&self, parts: &Parts, group: usize) -> Grid {
        let step = parts.d * f32::from(parts.scales[group]);
        match self.kind {
            Kind::Step | Kind::Line => Grid::new(parts.d, parts.dmin, self.whole),
            Kind::GroupSteps { .. } => Grid::new(step, 0.0, self.whole),
            Kind::GroupLines { .. } => Grid::new(step, -(parts.dmin * f32::from(parts.mins[group])), self.whole),
        }
    }

    /// The number that a stored level stands for, in units of the step.
    pub(super) fn level(&self, level: u8) -> f32 {
        level_number(level, self.whole)
    }
}
