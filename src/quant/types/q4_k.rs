//! Q4_K: 256 weights in 8 groups of 32, weight = `d * scale * level - dmin * min` with 4-bit levels.
//!
//! Block of 144 bytes: binary16 `d` and `dmin`, 12 bytes of 6-bit scales and minima (see `affine_k`), 128 bytes of
//! nibbles (see `pack_4bit`).

use super::affine_k::{self, Format, GROUP, HEADER, LEN};
use super::pack::pack_4bit;
use super::{decode_blocks, encode_by_importance};

const BYTES: usize = 144;
const _: () = assert!(HEADER + LEN / 2 == BYTES);

pub(in crate::quant) const FORMAT: Format = Format::new(15.0, -1.0, 20, false);

/// Encodes Q4_K (`quantize_q4_K`).
pub(crate) fn quantize(src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]) {
    let plain = |x: &_, block: &mut _| finish(block, |header| FORMAT.encode(x, header));
    let weighted = |(): &(), x: &_, w: &_, block: &mut _| finish(block, |header| FORMAT.encode_weighted(x, w, header));
    encode_by_importance(src, row_len, importance, dst, plain, |_| (), weighted);
}

/// Writes a block whose header and levels `encode` makes.
#[inline(always)]
pub(in crate::quant) fn finish(block: &mut [u8; BYTES], encode: impl FnOnce(&mut [u8; HEADER]) -> [u8; LEN]) {
    let (header, nibbles) = affine_k::split_header(block);
    let levels = encode(header);
    if let Some(out) = nibbles.first_chunk_mut() {
        pack_4bit(&levels, out);
    }
}

/// Decodes Q4_K (`dequantize_row_q4_K`).
pub(crate) fn dequantize(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &[u8; BYTES], x: &mut [f32; LEN]| {
        let Some((header, nibbles)) = block.split_first_chunk() else { return };
        let lines = affine_k::group_lines(header);
        for ((x, bytes), lines) in x
            .as_chunks_mut::<{ 2 * GROUP }>()
            .0
            .iter_mut()
            .zip(nibbles.as_chunks::<GROUP>().0)
            .zip(lines.as_chunks::<2>().0)
        {
            let [(scale_low, min_low), (scale_high, min_high)] = *lines;
            for l in 0..GROUP {
                x[l] = scale_low * f32::from(bytes[l] & 0x0f) - min_low;
                x[l + GROUP] = scale_high * f32::from(bytes[l] >> 4) - min_high;
            }
        }
    });
}
