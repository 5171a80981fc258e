//! Q8_K: 256 weights, weight = `d * level` with signed bytes. ggml rounds activations to it; it is never stored.
//!
//! Block of 292 bytes: binary32 `d`, 256 signed bytes, 16 little-endian `i16` with the sums of 16 levels each.

use super::{decode_blocks, encode_blocks};
use crate::quant::round::nearest_int;
use crate::quant::search;

const LEN: usize = 256;
const BYTES: usize = 292;
const LEVELS: usize = 4;
const SUMS: usize = LEVELS + LEN;
const _: () = assert!(SUMS + 2 * (LEN / 16) == BYTES);

/// Rounds activations as ggml does before it multiplies them with K-quants (`quantize_row_q8_K_ref`): the peak goes
/// to -127. `src` and `dst` must be whole blocks of 256 values and 292 bytes; a rest is left alone. In an all-zero
/// block the sums, which ggml leaves unset, are zero.
pub fn quantize_row(src: &[f32], dst: &mut [u8]) {
    encode_blocks(src, dst, |x: &[f32; LEN], block: &mut [u8; BYTES]| {
        let peak = search::peak(x);
        if peak == 0.0 {
            *block = [0; BYTES];
            return;
        }
        let inverse = -127.0 / peak;
        let levels = x.map(|v| nearest_int(inverse * v).min(127) as i8);
        block[..LEVELS].copy_from_slice(&(1.0 / inverse).to_le_bytes());
        for (out, level) in block[LEVELS..SUMS].iter_mut().zip(levels) {
            *out = level as u8;
        }
        for (out, levels) in block[SUMS..].as_chunks_mut::<2>().0.iter_mut().zip(levels.as_chunks::<16>().0) {
            *out = levels.iter().map(|&level| i16::from(level)).sum::<i16>().to_le_bytes();
        }
    });
}

/// Decodes Q8_K (`dequantize_row_q8_K`).
pub fn dequantize(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &[u8; BYTES], x: &mut [f32; LEN]| {
        let d = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
        for (v, &level) in x.iter_mut().zip(&block[LEVELS..SUMS]) {
            *v = d * f32::from(level as i8);
        }
    });
}
