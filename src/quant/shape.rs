//! How the weights of a block follow from the numbers that it stores, as facts of a [`Codec`](super::Codec) row.
//!
//! For whoever chooses scales and levels by rules of their own, and for products of integers. Types whose scales are
//! not at hand in the block have no shape.

use super::grid::{IQ2_S_POINTS, IQ2_XS_POINTS, IQ2_XXS_POINTS, IQ3_S_POINTS, IQ3_XXS_POINTS};

/// How the weights of a block follow from the numbers that it stores.
#[derive(Clone, Copy, Debug)]
pub(crate) enum BlockShape {
    /// Weights are rounded one by one.
    Levels(LevelShape),
    /// Magnitudes of eight or four weights are a point of a lattice, and signs stand beside them.
    Lattice(LatticeShape),
}

/// A level for each weight, scales for groups or the whole block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LevelShape {
    /// Weights of a group; those of the block where there is only one.
    pub group: usize,
    pub scales: ScaleShape,
    pub levels: LevelSet,
}

/// How scales are stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum ScaleShape {
    /// One binary16 step per block.
    Step,
    /// A binary16 step and a binary16 value of level 0 per block.
    Line,
    /// A binary16 per block times a whole number in `lowest..=highest` per group.
    GroupSteps { lowest: i16, highest: i16 },
    /// Two binary16 per block times whole numbers in `0..=top` per group: step, and minus the value of level 0.
    GroupLines { top: i16 },
}

impl ScaleShape {
    /// Whether level 0 may stand for another value than 0.
    pub(crate) fn is_affine(self) -> bool {
        matches!(self, ScaleShape::Line | ScaleShape::GroupLines { .. })
    }
}

/// What the levels of a format stand for, in units of the step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum LevelSet {
    /// All whole numbers of `lowest..=highest`.
    Whole { lowest: i16, highest: i16 },
    /// The sixteen values of IQ4.
    Iq4,
}

/// A lattice with the scales of its groups: a binary16 per block, and a code of four bits for each group.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LatticeShape {
    /// Weights that share a scale.
    pub group: usize,
    pub points: LatticePoints,
    /// Whether the number of minus signs of eight weights is even, so that seven are stored.
    pub even_signs: bool,
    code: ScaleCode,
}

/// The points of a lattice, their coordinates as bytes, the first lowest.
#[derive(Clone, Copy, Debug)]
pub(crate) enum LatticePoints {
    /// Eight coordinates.
    Of8(&'static [u64]),
    /// Four coordinates.
    Of4(&'static [u32]),
}

/// What the code of a group stands for, in units of the block's scale.
#[derive(Clone, Copy, Debug)]
enum ScaleCode {
    /// `1 + 2 code`.
    Odd,
    /// `(0.5 + code) * unit`.
    FromHalf { unit: f32 },
}

impl LatticeShape {
    /// The number that magnitudes are multiplied with, rounded as in decoding.
    #[inline(always)]
    pub(crate) fn scale(&self, d: f32, code: u8) -> f32 {
        match self.code {
            ScaleCode::Odd => d * f32::from(1 + 2 * code),
            ScaleCode::FromHalf { unit } => d * (0.5 + f32::from(code)) * unit,
        }
    }
}

const fn levels(group: usize, scales: ScaleShape, levels: LevelSet) -> BlockShape {
    BlockShape::Levels(LevelShape { group, scales, levels })
}

const fn whole(lowest: i16, highest: i16) -> LevelSet {
    LevelSet::Whole { lowest, highest }
}

const fn lattice(group: usize, points: LatticePoints, even_signs: bool, code: ScaleCode) -> BlockShape {
    BlockShape::Lattice(LatticeShape { group, points, even_signs, code })
}

pub(super) const Q4_0: BlockShape = levels(32, ScaleShape::Step, whole(-8, 7));
pub(super) const Q4_1: BlockShape = levels(32, ScaleShape::Line, whole(0, 15));
pub(super) const Q5_0: BlockShape = levels(32, ScaleShape::Step, whole(-16, 15));
pub(super) const Q5_1: BlockShape = levels(32, ScaleShape::Line, whole(0, 31));
/// -128 would decode too, but ggml never writes it.
pub(super) const Q8_0: BlockShape = levels(32, ScaleShape::Step, whole(-127, 127));
pub(super) const IQ4_NL: BlockShape = levels(32, ScaleShape::Step, LevelSet::Iq4);
pub(super) const IQ4_XS: BlockShape = levels(32, ScaleShape::GroupSteps { lowest: -32, highest: 31 }, LevelSet::Iq4);
pub(super) const Q2_K: BlockShape = levels(16, ScaleShape::GroupLines { top: 15 }, whole(0, 3));
pub(super) const Q3_K: BlockShape = levels(16, ScaleShape::GroupSteps { lowest: -32, highest: 31 }, whole(-4, 3));
pub(super) const Q4_K: BlockShape = levels(32, ScaleShape::GroupLines { top: 63 }, whole(0, 15));
pub(super) const Q5_K: BlockShape = levels(32, ScaleShape::GroupLines { top: 63 }, whole(0, 31));
pub(super) const Q6_K: BlockShape = levels(16, ScaleShape::GroupSteps { lowest: -128, highest: 127 }, whole(-32, 31));
pub(super) const IQ2_XXS: BlockShape = lattice(32, LatticePoints::Of8(&IQ2_XXS_POINTS), true, QUARTERS);
pub(super) const IQ2_XS: BlockShape = lattice(16, LatticePoints::Of8(&IQ2_XS_POINTS), true, QUARTERS);
pub(super) const IQ2_S: BlockShape = lattice(16, LatticePoints::Of8(&IQ2_S_POINTS), false, QUARTERS);
pub(super) const IQ3_XXS: BlockShape = lattice(32, LatticePoints::Of4(&IQ3_XXS_POINTS), true, HALVES);
pub(super) const IQ3_S: BlockShape = lattice(32, LatticePoints::Of4(&IQ3_S_POINTS), false, ScaleCode::Odd);

const QUARTERS: ScaleCode = ScaleCode::FromHalf { unit: 0.25 };
const HALVES: ScaleCode = ScaleCode::FromHalf { unit: 0.5 };
