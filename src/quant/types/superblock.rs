//! What the encoders of the IQ types share: walking blocks, and the weights of squared errors.

use super::error_weights;

/// Calls `encode` with every block of `src`, its part of the importance weights and its bytes.
#[inline(always)]
pub fn for_each_block<const LEN: usize, const BYTES: usize>(
    src: &[f32],
    row_len: usize,
    importance: Option<&[f32]>,
    dst: &mut [u8],
    encode: impl Fn(&[f32; LEN], Option<&[f32; LEN]>, &mut [u8; BYTES]),
) {
    let (blocks, outputs) = (src.as_chunks::<LEN>().0, dst.as_chunks_mut::<BYTES>().0);
    let importance = importance.map(|weights| weights.as_chunks::<LEN>().0);
    for (n, (block, out)) in blocks.iter().zip(outputs).enumerate() {
        encode(block, importance.map(|weights| &weights[n % (row_len / LEN)]), out);
    }
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
