//! Encoders with sixteen blocks or groups side by side, one text for all instruction sets.
//!
//! The searches are short sums in a fixed order, for many candidate scales: one group leaves the units of a CPU idle
//! most of the time. Here lane `k` of every vector belongs to group `k`, and each lane does what the scalar function
//! of [`search`](crate::quant::search) does, operation by operation: additions, products, quotients, roots and
//! roundings of a lane are those of scalar code, nothing is fused and no sum is reordered, so the bytes are the same.
//! Where scalar code branches, lanes compute both ways and select.
//!
//! The functions are generic over [`Isa`]. All of them are `#[inline(always)]` and hold no closures with vectors in
//! them: they must end up inside the function that enables the instruction set, or every operation becomes a call.

pub mod k_quants;
pub mod search;

use std::ops::{Add, BitAnd, BitOr, Div, Mul, Sub};

/// Lanes of a vector, whatever number of registers they take.
pub const LANES: usize = 16;

/// An instruction set. A value of the type is the proof that this CPU has it.
pub trait Isa: Copy {
    /// Vectors of this instruction set.
    type Floats: Floats;

    /// `value` in every lane.
    fn splat(self, value: f32) -> Self::Floats;

    /// One float per lane.
    fn load(self, values: &[f32; LANES]) -> Self::Floats;

    /// Column `i` of the rows becomes vector `i`, with row `k` in lane `k`.
    fn transpose(self, rows: [&[f32; LANES]; LANES]) -> [Self::Floats; LANES];
}

/// Sixteen floats. Values come from an [`Isa`] only, so having one proves that its operations can run.
pub trait Floats: Copy + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Div<Output = Self> {
    /// The outcome of a comparison, per lane.
    type Mask: Mask;

    /// The floats in order.
    fn to_array(self) -> [f32; LANES];

    /// Square root, correctly rounded.
    fn sqrt(self) -> Self;

    /// Magnitude: the sign bit cleared.
    fn abs(self) -> Self;

    /// The sign bit turned.
    fn negated(self) -> Self;

    /// `if self < other { self } else { other }`.
    fn lesser(self, other: Self) -> Self;

    /// `if self > other { self } else { other }`.
    fn greater(self, other: Self) -> Self;

    /// `self < other`.
    fn below(self, other: Self) -> Self::Mask;

    /// `self > other`.
    fn above(self, other: Self) -> Self::Mask;

    /// `self == other`.
    fn equals(self, other: Self) -> Self::Mask;

    /// `if mask { yes } else { no }`.
    fn select(mask: Self::Mask, yes: Self, no: Self) -> Self;

    /// [`nearest_small`](crate::quant::round::nearest_small), but for the sign of zeros, which is any.
    fn nearest_small(self) -> Self;

    /// [`nearest_int`](crate::quant::round::nearest_int) as a float.
    fn nearest_any(self) -> Self;

    /// The low byte of [`nearest_int`](crate::quant::round::nearest_int) as a float.
    fn nearest_byte(self) -> Self;
}

/// One truth value per lane.
pub trait Mask: Copy + BitAnd<Output = Self> + BitOr<Output = Self> {
    /// Whether any lane is true.
    fn any(self) -> bool;

    /// Whether all lanes are true.
    fn all(self) -> bool;

    /// True where this is false.
    fn negated(self) -> Self;
}

/// Up to sixteen consecutive blocks. Lanes that are left over repeat the last block.
pub struct Batch<'a, const LEN: usize> {
    /// The weights of the blocks.
    pub blocks: [&'a [f32; LEN]; LANES],
    /// The importance of their columns.
    pub importance: Option<[&'a [f32; LEN]; LANES]>,
}

impl<'a, const LEN: usize> Batch<'a, LEN> {
    /// The blocks from `first` on, of rows of `row_len` weights.
    #[inline(always)]
    pub fn new(src: &'a [f32], row_len: usize, importance: Option<&'a [f32]>, first: usize) -> Self {
        let blocks = src.as_chunks::<LEN>().0;
        let mut batch = Batch { blocks: [&blocks[0]; LANES], importance: None };
        let index = |lane: usize| (first + lane).min(blocks.len() - 1);
        for lane in 0..LANES {
            batch.blocks[lane] = &blocks[index(lane)];
        }
        if let Some(importance) = importance {
            let columns = importance.as_chunks::<LEN>().0;
            let mut lanes = [&columns[0]; LANES];
            for lane in 0..LANES {
                lanes[lane] = &columns[index(lane) % (row_len / LEN)];
            }
            batch.importance = Some(lanes);
        }
        batch
    }
}

/// Weight `i` of all blocks as vector `i`.
#[inline(always)]
pub fn side_by_side<I: Isa, const LEN: usize>(isa: I, blocks: &[&[f32; LEN]; LANES], out: &mut [I::Floats; LEN]) {
    for (chunk, out) in out.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        let mut rows = [&[0.0; LANES]; LANES];
        for lane in 0..LANES {
            rows[lane] = &blocks[lane].as_chunks::<LANES>().0[chunk];
        }
        *out = isa.transpose(rows);
    }
}

/// [`sum_of_squares`](crate::quant::types) in every lane.
#[inline(always)]
pub fn sum_of_squares<I: Isa>(isa: I, x: &[I::Floats]) -> I::Floats {
    let mut sum = isa.splat(0.0);
    for &v in x {
        sum = sum + v * v;
    }
    sum
}

/// `importance * sqrt(sigma2 + x^2)`, in place of the importance.
#[inline(always)]
pub fn error_weights<F: Floats>(x: &[F], importance: &mut [F], sigma2: F) {
    for (w, &v) in importance.iter_mut().zip(x) {
        *w = *w * (sigma2 + v * v).sqrt();
    }
}

/// Sum in order.
#[inline(always)]
pub fn sum<I: Isa>(isa: I, values: &[I::Floats]) -> I::Floats {
    let mut sum = isa.splat(0.0);
    for &v in values {
        sum = sum + v;
    }
    sum
}
