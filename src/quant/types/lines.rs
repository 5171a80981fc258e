//! The straight lines that weights lie on: within a group of 16 or 32, weight = `scale * code + offset` with an integer
//! code of eight bits.
//!
//! For products of integers. Only types whose scales are at hand in the block are here.

use super::parts::LatticeParts;
use super::{affine_k, get_f16, q2_k, q3_k, q6_k};
use crate::gguf::TensorType;
use crate::quant::codec;
use crate::quant::shape::BlockShape;

/// Groups of the type with most of them in a block.
pub(crate) const MAX_LINES: usize = 16;

/// How the blocks of a type are divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LineShape {
    /// Weights of a group: 16 or 32.
    pub group: usize,
    /// True if offsets are not all zero.
    pub affine: bool,
}

/// The line of one group.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Line {
    /// What a code is multiplied with.
    pub scale: f32,
    /// What is added.
    pub offset: f32,
}

/// The division of `ty`, if its weights lie on lines that can be read.
pub(crate) fn line_shape(ty: TensorType) -> Option<LineShape> {
    Some(match codec(ty)?.shape? {
        BlockShape::Levels(shape) => LineShape { group: shape.group, affine: shape.scales.is_affine() },
        BlockShape::Lattice(shape) => LineShape { group: shape.group, affine: false },
    })
}

/// Reads the lines of a block's groups.
///
/// # Panics
/// When `ty` has none, or `block` has another length than its blocks.
pub(crate) fn read_lines(ty: TensorType, block: &[u8], lines: &mut [Line; MAX_LINES]) {
    let symmetric = |lines: &mut [Line; MAX_LINES], scale: &dyn Fn(usize) -> f32| {
        lines.iter_mut().enumerate().for_each(|(j, line)| *line = Line { scale: scale(j), offset: 0.0 });
    };
    match ty {
        TensorType::Q4_0 | TensorType::Q5_0 | TensorType::Q8_0 | TensorType::IQ4_NL => {
            lines[0] = Line { scale: get_f16(block, 0), offset: 0.0 };
        }
        TensorType::Q4_1 | TensorType::Q5_1 => {
            lines[0] = Line { scale: get_f16(block, 0), offset: get_f16(block, 2) };
        }
        TensorType::Q2_K => {
            let (d, dmin) = (get_f16(block, q2_k::D), get_f16(block, q2_k::DMIN));
            for (line, byte) in lines.iter_mut().zip(block) {
                *line = Line { scale: d * f32::from(byte & 15), offset: -(dmin * f32::from(byte >> 4)) };
            }
        }
        TensorType::Q3_K => {
            let (d, scales) = (get_f16(block, q3_k::D), q3_k::unpack_scales(&block[q3_k::SCALES..q3_k::D]));
            symmetric(lines, &|j| d * f32::from(scales[j]));
        }
        TensorType::Q4_K | TensorType::Q5_K => {
            let Some(header) = block.first_chunk() else { unreachable!("a block is longer than its header") };
            for (line, (factor, subtrahend)) in lines.iter_mut().zip(affine_k::group_lines(header)) {
                *line = Line { scale: factor, offset: -subtrahend };
            }
        }
        TensorType::Q6_K => {
            let d = get_f16(block, q6_k::D);
            symmetric(lines, &|j| d * f32::from(block[q6_k::SCALES + j] as i8));
        }
        TensorType::IQ4_XS => {
            let (d, high) = (get_f16(block, 0), u16::from_le_bytes([block[2], block[3]]));
            for (ib, line) in lines[..8].iter_mut().enumerate() {
                let low = block[4 + ib / 2] >> (4 * (ib % 2)) & 15;
                let code = i32::from(low) | i32::from(high >> (2 * ib) & 3) << 4;
                *line = Line { scale: d * (code - 32) as f32, offset: 0.0 };
            }
        }
        ty => {
            let Some(BlockShape::Lattice(shape)) = codec(ty).and_then(|codec| codec.shape) else {
                unreachable!("{ty} has no lines")
            };
            let mut parts = LatticeParts::ZERO;
            parts.read_scales(ty, block);
            symmetric(lines, &|j| shape.scale(parts.d, parts.scales[j]));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::quantize_rows;

    #[test]
    fn weights_are_whole_codes_on_their_lines() {
        for codec_of in crate::quant::CODECS {
            let ty = codec_of.ty;
            let (Some(shape), Some(info)) = (line_shape(ty), ty.info()) else { continue };
            let row: Vec<f32> =
                (0..512).map(|i| ((i * 7919) % 1013) as f32 / 500.0 - 1.0 + (i / 64) as f32 * 0.1).collect();
            let mut bytes = vec![0; 512 / info.block_len * info.block_bytes];
            quantize_rows(ty, &row, 512, Some(&[1.0; 512]), &mut bytes).unwrap();
            let mut decoded = vec![0.0; 512];
            (codec(ty).unwrap().dequantize)(&bytes, &mut decoded);
            for (block, weights) in bytes.chunks(info.block_bytes).zip(decoded.chunks(info.block_len)) {
                let mut lines = [Line::default(); MAX_LINES];
                read_lines(ty, block, &mut lines);
                for (line, weights) in lines.iter().zip(weights.chunks(shape.group)) {
                    assert!(shape.affine || line.offset == 0.0, "{ty}");
                    for &weight in weights {
                        if line.scale == 0.0 {
                            assert_eq!(weight, line.offset, "{ty}");
                            continue;
                        }
                        let code = (weight - line.offset) / line.scale;
                        assert!((code - code.round()).abs() < 2e-3 && code.abs() < 127.5, "{ty}: {code}");
                    }
                }
            }
        }
    }
}
