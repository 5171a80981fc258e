//! What the encoders of the IQ types share: walking blocks, and the weights of squared errors.

use super::error_weights;

/// Every block of `src` with its part of the importance weights and its bytes.
#[inline(always)]
pub(super) fn blocks<'a, const LEN: usize, const BYTES: usize>(
    src: &'a [f32],
    row_len: usize,
    importance: Option<&'a [f32]>,
    dst: &'a mut [u8],
) -> impl Iterator<Item = (&'a [f32; LEN], Option<&'a [f32; LEN]>, &'a mut [u8; BYTES])> {
    let (blocks, outputs) = (src.as_chunks::<LEN>().0, dst.as_chunks_mut::<BYTES>().0);
    let importance = importance.map(|weights| weights.as_chunks::<LEN>().0);
    blocks.iter().zip(outputs).enumerate().map(move |(n, (block, out))| {
        let importance = importance.map(|weights| &weights[n % (row_len / LEN)]);
        (block, importance, out)
    })
}

/// [`error_weights`] of a group, or, where no importance is known, `otherwise(x)`.
#[inline(always)]
pub(super) fn error_weights_or<const N: usize>(
    values: &[f32; N],
    importance: Option<&[f32; N]>,
    variance: f32,
    otherwise: impl Fn(f32) -> f32,
) -> [f32; N] {
    match importance {
        Some(importance) => error_weights(values, importance, variance),
        None => values.map(otherwise),
    }
}

/// Defines the two faces of an encoder that a lattice type has: the scalar one, and one whose steps the caller
/// chooses. `$encode` encodes a block with these steps.
macro_rules! lattice_encoder {
    ($(#[$doc:meta])* $name:ident, $with:ident: $steps:ident, $encode:ident) => {
        $(#[$doc])*
        pub(crate) fn $name(src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]) {
            $with(crate::quant::grid::InOrder, src, row_len, importance, dst);
        }

        #[doc = concat!("[`", stringify!($name), "`] with another way to do some of its steps.")]
        #[inline(always)]
        pub(in crate::quant) fn $with(
            steps: impl $steps,
            src: &[f32],
            row_len: usize,
            importance: Option<&[f32]>,
            dst: &mut [u8],
        ) {
            for (x, importance, out) in $crate::quant::types::superblock::blocks(src, row_len, importance, dst) {
                $encode(steps, x, importance, out);
            }
        }
    };
}

pub(super) use lattice_encoder;
