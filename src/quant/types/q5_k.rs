//! Q5_K: 256 weights in 8 groups of 32, weight = `d * scale * level - dmin * min` with 5-bit levels.
//!
//! Block of 176 bytes: binary16 `d` and `dmin`, 12 bytes of 6-bit scales and minima (see `affine_k`), 32 bytes with
//! the fifth bits (bit `g` of byte `l` belongs to weight `32 g + l`), 128 bytes of nibbles (see `pack_4bit`).

use super::affine_k::{self, Format, GROUP, HEADER, LEN};
use super::pack::{pack_4bit, pack_bit_plane};
use super::{decode_blocks, encode_by_importance};

const BYTES: usize = 176;
const _: () = assert!(HEADER + LEN / 8 + LEN / 2 == BYTES);

pub(in crate::quant) const FORMAT: Format = Format::new(31.0, -0.5, 15, true);

/// Encodes Q5_K (`quantize_q5_K`).
pub(crate) fn quantize(src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]) {
    let plain = |x: &_, block: &mut _| finish(block, |header| FORMAT.encode(x, header));
    let weighted = |(): &(), x: &_, w: &_, block: &mut _| finish(block, |header| FORMAT.encode_weighted(x, w, header));
    encode_by_importance(src, row_len, importance, dst, plain, |_| (), weighted);
}

/// Writes a block whose header and levels `encode` makes.
#[inline(always)]
pub(in crate::quant) fn finish(block: &mut [u8; BYTES], encode: impl FnOnce(&mut [u8; HEADER]) -> [u8; LEN]) {
    let (header, bits) = affine_k::split_header(block);
    let levels = encode(header);
    if let Some((high, nibbles)) = bits.split_first_chunk_mut() {
        pack_bit_plane(&levels, 4, high);
        if let Some(out) = nibbles.first_chunk_mut() {
            pack_4bit(&levels.map(|level| level & 0x0f), out);
        }
    }
}

/// Decodes Q5_K (`dequantize_row_q5_K`).
pub(crate) fn dequantize(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &[u8; BYTES], x: &mut [f32; LEN]| {
        let Some((header, bits)) = block.split_first_chunk() else { return };
        let Some((high, nibbles)) = bits.split_first_chunk::<GROUP>() else { return };
        let lines = affine_k::group_lines(header);
        for (g, (x, &(scale, min))) in x.as_chunks_mut::<GROUP>().0.iter_mut().zip(&lines).enumerate() {
            let (bytes, shift) = (&nibbles[g / 2 * GROUP..][..GROUP], g % 2 * 4);
            for l in 0..GROUP {
                let level = ((bytes[l] >> shift) & 0x0f) | (((high[l] >> g) & 1) << 4);
                x[l] = scale * f32::from(level) - min;
            }
        }
    });
}
