//! What the IQ types have in common: walking blocks, and the weights of squared errors.

/// Calls `encode` with every block of `src`, its part of the importance weights and its bytes.
#[inline(always)]
pub fn for_each_block<const LEN: usize, const BYTES: usize>(
    src: &[f32],
    row_len: usize,
    importance: Option<&[f32]>,
    dst: &mut [u8],
    mut encode: impl FnMut(&[f32; LEN], Option<&[f32; LEN]>, &mut [u8; BYTES]),
) {
    let (blocks, outputs) = (src.as_chunks::<LEN>().0, dst.as_chunks_mut::<BYTES>().0);
    let importance = importance.map(|weights| weights.as_chunks::<LEN>().0);
    for (n, (block, out)) in blocks.iter().zip(outputs).enumerate() {
        encode(block, importance.map(|weights| &weights[n % (row_len / LEN)]), out);
    }
}

/// Calls `decode` with every block of `src` and its place in `dst`.
#[inline(always)]
pub fn for_each_encoded<const BYTES: usize, const LEN: usize>(
    src: &[u8],
    dst: &mut [f32],
    mut decode: impl FnMut(&[u8; BYTES], &mut [f32; LEN]),
) {
    for (block, out) in src.as_chunks::<BYTES>().0.iter().zip(dst.as_chunks_mut::<LEN>().0) {
        decode(block, out);
    }
}

/// Sum of squares, in order.
#[inline(always)]
pub fn sum_of_squares(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |sum, &x| sum + x * x)
}

/// Weights of the squared errors of a group: its importance times `sqrt(variance + x^2)`, or, where no importance
/// is known, `otherwise(x)`.
#[inline(always)]
pub fn error_weights<const N: usize>(
    values: &[f32; N],
    importance: Option<&[f32; N]>,
    variance: f32,
    otherwise: impl Fn(f32) -> f32,
) -> [f32; N] {
    match importance {
        Some(importance) => std::array::from_fn(|i| importance[i] * (variance + values[i] * values[i]).sqrt()),
        None => values.map(otherwise),
    }
}
