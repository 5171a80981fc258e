//! Bit planes and nibbles that several formats share.

/// Packs 256 levels of 2 bits: byte `32 h + l` of the result holds levels `128 h + l + 32 p` at bit `2 p`.
/// Higher bits of a level spill into the next plane, as they do in ggml.
#[inline(always)]
pub(super) fn pack_2bit(levels: &[u8; 256], out: &mut [u8; 64]) {
    for (half, out) in levels.as_chunks::<128>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        for l in 0..32 {
            out[l] = half[l] | (half[l + 32] << 2) | (half[l + 64] << 4) | (half[l + 96] << 6);
        }
    }
}

/// Packs 256 levels of 4 bits: byte `32 c + l` holds level `64 c + l` below and `64 c + l + 32` above.
#[inline(always)]
pub(super) fn pack_4bit(levels: &[u8; 256], out: &mut [u8; 128]) {
    for (chunk, out) in levels.as_chunks::<64>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        for l in 0..32 {
            out[l] = chunk[l] | (chunk[l + 32] << 4);
        }
    }
}

/// Packs one bit of each level: byte `l` holds bit `shift` of level `32 p + l` at bit `p`.
#[inline(always)]
pub(super) fn pack_bit_plane(levels: &[u8; 256], shift: u32, out: &mut [u8; 32]) {
    *out = [0; 32];
    for (plane, levels) in levels.as_chunks::<32>().0.iter().enumerate() {
        for l in 0..32 {
            out[l] |= ((levels[l] >> shift) & 1) << plane;
        }
    }
}
