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

mod descent;
pub(super) mod floats;
pub(super) mod grids;
pub(super) mod iq4;
pub(super) mod k_quants;
pub(super) mod legacy_plain;
pub(super) mod legacy_weighted;
mod levels;
pub(super) mod search;

use crate::quant::float16::{f32_to_bf16, f32_to_f16};
use std::ops::{Add, BitAnd, BitOr, Div, Mul, Sub};

/// Lanes of a vector, whatever number of registers they take.
pub(super) const LANES: usize = 16;

/// An instruction set. A value of the type is the proof that this CPU has it, see [`cpu`](crate::cpu).
pub(super) trait Isa: Copy {
    /// Vectors of this instruction set.
    type Floats: Floats;

    /// Whether registers hold more than a dozen vectors of sixteen lanes.
    const MANY_REGISTERS: bool;

    /// `value` in every lane.
    fn splat(self, value: f32) -> Self::Floats;

    /// One float per lane.
    fn load(self, values: &[f32; LANES]) -> Self::Floats;

    /// The smallest and the largest of the weights of block `k` in lane `k`, if none is NaN. Zeros may have either sign.
    fn extremes_of_each(self, blocks: &[[f32; 2 * LANES]; LANES]) -> (Self::Floats, Self::Floats);

    /// Column `i` of the rows becomes vector `i`, with row `k` in lane `k`.
    fn transpose(self, rows: [&[f32; LANES]; LANES]) -> [Self::Floats; LANES];

    /// What each of sixteen points of `D` coordinates costs: the sum over the coordinates in order, from zero, of
    /// `table[coordinate * 32 / D + level]`. Points are packed as in [`grid`](crate::quant::grid).
    fn costs<const D: usize>(self, points: &[u16; LANES], table: &[f32; 32]) -> Self::Floats;

    /// Position of the cheapest of the first `count` of eight points, see
    /// [`Chooser::cheapest`](crate::quant::grid::Chooser::cheapest).
    fn cheapest_of_eight<const D: usize>(self, points: &[u16; 8], count: usize, table: &[f32; 32]) -> usize;
}

/// Sixteen floats. Values come from an [`Isa`] only, so having one proves that its operations can run.
pub(super) trait Floats:
    Copy + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Div<Output = Self>
{
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

    /// [`lesser`](Self::lesser) of positive numbers.
    #[inline(always)]
    fn at_most(self, other: Self) -> Self {
        self.lesser(other)
    }

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

    /// Toward zero, for numbers within +-2^22.
    fn truncated_small(self) -> Self;

    /// The magnitude of this with the sign of `other`.
    fn with_sign_of(self, other: Self) -> Self;

    /// The low bytes of lanes that are whole numbers in `-128..128`.
    fn to_bytes(self) -> [u8; LANES];

    /// The low bytes of lanes in `-128..128`, rounded toward zero.
    #[inline(always)]
    fn truncated_bytes(self) -> [u8; LANES] {
        self.truncated_small().to_bytes()
    }

    /// Both of lanes in `0..128`, rounded toward zero: the low four bits of `low` below, those of `high` above.
    #[inline(always)]
    fn truncated_nibbles(low: Self, high: Self) -> [u8; LANES] {
        let (mut bytes, high) = (low.truncated_bytes(), high.truncated_bytes());
        for k in 0..LANES {
            bytes[k] = (bytes[k] & 0x0f) | (high[k] << 4);
        }
        bytes
    }

    /// [`f32_to_f16`] of lanes that are not NaN.
    #[inline(always)]
    fn to_f16(self) -> [u16; LANES] {
        let (floats, mut halves) = (self.to_array(), [0; LANES]);
        for k in 0..LANES {
            halves[k] = f32_to_f16(floats[k]);
        }
        halves
    }

    /// [`f32_to_bf16`] of lanes that are not NaN.
    #[inline(always)]
    fn to_bf16(self) -> [u16; LANES] {
        let (floats, mut halves) = (self.to_array(), [0; LANES]);
        for k in 0..LANES {
            halves[k] = f32_to_bf16(floats[k]);
        }
        halves
    }

    /// [`nearest_int`](crate::quant::round::nearest_int) as a float.
    fn nearest_any(self) -> Self;

    /// The low byte of [`nearest_int`](crate::quant::round::nearest_int) as a float.
    fn nearest_byte(self) -> Self;

    /// The least of the floats, of which none is NaN.
    fn lowest(self) -> f32;

    /// The greatest of the floats, of which none is NaN.
    #[inline(always)]
    fn highest(self) -> f32 {
        -self.negated().lowest()
    }
}

/// One truth value per lane.
pub(super) trait Mask: Copy + BitAnd<Output = Self> + BitOr<Output = Self> {
    /// Bit `k` for lane `k`.
    fn bits(self) -> u16;

    /// The first lane that is true.
    #[inline(always)]
    fn first(self) -> Option<usize> {
        let bits = self.bits();
        (bits != 0).then_some(bits.trailing_zeros() as usize)
    }

    /// Whether any lane is true.
    fn any(self) -> bool;

    /// Whether all lanes are true.
    fn all(self) -> bool;

    /// True where this is false.
    fn negated(self) -> Self;
}

/// Makes `quantizer_of_level`, which gives the encoder of a tensor type, for a type that is [`Isa`] and the features
/// that a value of it proves.
macro_rules! encoders {
    ($isa:ident, $feature:literal) => {
        $crate::quant::kernels::wide::encoders! {
            $isa, $feature,
            Q4_0 = q4_0: legacy_weighted::q4_0;
            Q4_1 = q4_1: legacy_weighted::q4_1;
            Q5_0 = q5_0: legacy_weighted::q5_0;
            Q5_1 = q5_1: legacy_weighted::q5_1;
            F16 = f16: floats::f16;
            BF16 = bf16: floats::bf16;
            Q8_0 = q8_0: legacy_plain::q8_0;
            Q2_K = q2_k: k_quants::q2_k;
            Q3_K = q3_k: k_quants::q3_k;
            Q4_K = q4_k: k_quants::q4_k;
            Q5_K = q5_k: k_quants::q5_k;
            Q6_K = q6_k: k_quants::q6_k;
            IQ2_XXS = iq2_xxs: grids::iq2_xxs;
            IQ2_XS = iq2_xs: grids::iq2_xs;
            IQ3_XXS = iq3_xxs: grids::iq3_xxs;
            IQ1_S = iq1_s: grids::iq1_s;
            IQ4_NL = iq4_nl: iq4::iq4_nl;
            IQ3_S = iq3_s: grids::iq3_s;
            IQ2_S = iq2_s: grids::iq2_s;
            IQ4_XS = iq4_xs: iq4::iq4_xs;
            IQ1_M = iq1_m: grids::iq1_m;
            TQ1_0 = tq1_0: recompiled::tq1_0;
            TQ2_0 = tq2_0: recompiled::tq2_0;
            MXFP4 = mxfp4: recompiled::mxfp4;
            NVFP4 = nvfp4: recompiled::nvfp4;
            Q1_0 = q1_0: recompiled::q1_0;
            Q2_0 = q2_0: legacy_plain::q2_0;
        }
    };
    ($isa:ident, $feature:literal, $($ty:ident = $name:ident: $module:ident::$encode:ident;)*) => {
        pub(super) fn quantizer_of_level(ty: TensorType) -> Option<QuantizeFn> {
            match ty {
                $(TensorType::$ty => Some(|src, row_len, importance, dst| {
                    let isa = $isa::new().expect("the level was available when this encoder was chosen");
                    // SAFETY: the value proves that the CPU has the features.
                    unsafe { $name(isa, src, row_len, importance, dst) }
                }),)*
                _ => None,
            }
        }

        $(
            #[target_feature(enable = $feature)]
            fn $name(isa: $isa, src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]) {
                $crate::quant::kernels::wide::$module::$encode(isa, src, row_len, importance, dst);
            }
        )*
    };
}
pub(super) use encoders;

/// Scalar encoders compiled for an instruction set: loops over arrays of fixed size, which the compiler turns into
/// vectors. It neither reorders nor contracts float operations, so the bytes cannot differ.
pub(super) mod recompiled {
    use crate::quant::types::{fp4, low_bit, ternary};

    macro_rules! recompiled {
        ($($name:ident: $scalar:path;)*) => {$(
            /// The scalar encoder of the name.
            #[inline(always)]
            pub(crate) fn $name<I>(_isa: I, src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]) {
                $scalar(src, row_len, importance, dst);
            }
        )*};
    }

    recompiled! {
        tq1_0: ternary::quantize_tq1_0;
        tq2_0: ternary::quantize_tq2_0;
        mxfp4: fp4::quantize_mxfp4;
        nvfp4: fp4::quantize_nvfp4;
        q1_0: low_bit::quantize_q1_0;
    }
}

/// Steps of the encoders with the vectors of an instruction set.
#[derive(Clone, Copy)]
pub(super) struct Wide<I>(pub I);

/// Up to sixteen consecutive blocks. Lanes that are left over repeat the last block.
pub(super) struct Batch<'a, const LEN: usize> {
    /// The weights of the blocks.
    pub blocks: [&'a [f32; LEN]; LANES],
    /// The importance of their columns.
    pub importance: Option<[&'a [f32; LEN]; LANES]>,
}

impl<'a, const LEN: usize> Batch<'a, LEN> {
    /// The blocks from `first` on, of rows of `row_len` weights.
    #[inline(always)]
    pub(super) fn new(src: &'a [f32], row_len: usize, importance: Option<&'a [f32]>, first: usize) -> Self {
        let blocks = src.as_chunks::<LEN>().0;
        let mut batch = Batch { blocks: [&blocks[0]; LANES], importance: None };
        let index = |lane: usize| (first + lane).min(blocks.len() - 1);
        for lane in 0..LANES {
            batch.blocks[lane] = &blocks[index(lane)];
        }
        if let Some(importance) = importance {
            let columns = &importance.as_chunks::<LEN>().0[..row_len / LEN];
            let mut lanes = [&columns[0]; LANES];
            // Counted along, not divided: a division for each lane is a twentieth of the time of a whole search.
            let mut column = first % columns.len();
            for (lane, weights) in lanes.iter_mut().enumerate() {
                *weights = &columns[column];
                if first + lane + 1 < blocks.len() {
                    column = if column + 1 == columns.len() { 0 } else { column + 1 };
                }
            }
            batch.importance = Some(lanes);
        }
        batch
    }
}

/// Weight `i` of all blocks as vector `i`.
#[inline(always)]
pub(super) fn side_by_side<I: Isa, const LEN: usize>(
    isa: I,
    blocks: &[&[f32; LEN]; LANES],
    out: &mut [I::Floats; LEN],
) {
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
pub(super) fn sum_of_squares<I: Isa>(isa: I, x: &[I::Floats]) -> I::Floats {
    let mut sum = isa.splat(0.0);
    for &v in x {
        sum = sum + v * v;
    }
    sum
}

/// `importance * sqrt(sigma2 + x^2)`, in place of the importance.
#[inline(always)]
pub(super) fn error_weights<F: Floats>(x: &[F], importance: &mut [F], sigma2: F) {
    for (w, &v) in importance.iter_mut().zip(x) {
        *w = *w * (sigma2 + v * v).sqrt();
    }
}

/// Sum in order.
#[inline(always)]
pub(super) fn sum<I: Isa>(isa: I, values: &[I::Floats]) -> I::Floats {
    let mut sum = isa.splat(0.0);
    for &v in values {
        sum = sum + v;
    }
    sum
}
