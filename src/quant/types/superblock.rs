//! What the encoders of the IQ types share: walking blocks, and the weights of squared errors.

use super::error_weights;

/// Every block of `src` with its part of the importance weights and its bytes.
#[inline(always)]
pub fn blocks<'a, const LEN: usize, const BYTES: usize>(
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
pub fn error_weights_or<const N: usize>(
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
