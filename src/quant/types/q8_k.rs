//! Q8_K: 256 weights, weight = `d * level` with signed bytes. ggml rounds activations to it; it is never stored.
//!
//! Block of 292 bytes: binary32 `d`, 256 signed bytes, 16 little-endian `i16` with the sums of 16 levels each.

use super::decode_blocks;

const LEN: usize = 256;
const BYTES: usize = 292;
const LEVELS: usize = 4;
const SUMS: usize = LEVELS + LEN;
const _: () = assert!(SUMS + 2 * (LEN / 16) == BYTES);

/// Decodes Q8_K (`dequantize_row_q8_K`).
pub(crate) fn dequantize(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &[u8; BYTES], x: &mut [f32; LEN]| {
        let d = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
        for (v, &level) in x.iter_mut().zip(&block[LEVELS..SUMS]) {
            *v = d * f32::from(level as i8);
        }
    });
}
