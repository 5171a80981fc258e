//! Search for numbers that are not finite, in floats and in the scales of encoded blocks.

use super::error::QuantError;
use super::{checked_codec, float16};
use crate::gguf::TensorType;

/// How a scale is stored inside a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ScaleFormat {
    /// Little-endian IEEE binary16.
    F16,
    /// Little-endian bfloat16.
    Bf16,
    /// Little-endian IEEE binary32.
    F32,
    /// A power of two as its biased exponent; 255 stands for NaN.
    E8m0,
    /// IQ1_M: a binary16 spread over the top nibbles of four little-endian words of 16 bits, lowest first.
    Iq1mNibbles,
}

/// A float inside a block.
#[derive(Debug, Clone, Copy)]
pub(super) struct ScaleField {
    /// ggml's name of the field, such as `d` or `dmin`.
    pub name: &'static str,
    /// Byte offset inside the block.
    pub offset: usize,
    /// How it is stored.
    pub format: ScaleFormat,
}

impl ScaleField {
    /// The text of the stored number if it is not finite.
    fn non_finite(&self, block: &[u8]) -> Option<String> {
        let field = &block[self.offset..];
        let word = |i: usize| u16::from_le_bytes([field[2 * i], field[2 * i + 1]]);
        let value = match self.format {
            ScaleFormat::F16 => float16::f16_to_f32(word(0)),
            ScaleFormat::Bf16 => float16::bf16_to_f32(word(0)),
            ScaleFormat::F32 => f32::from_le_bytes([field[0], field[1], field[2], field[3]]),
            ScaleFormat::E8m0 => return (field[0] == 0xff).then(|| "exponent 255 (NaN)".to_string()),
            ScaleFormat::Iq1mNibbles => {
                float16::f16_to_f32((0..4).fold(0, |bits, i| bits | ((word(i) >> 12) << (4 * i))))
            }
        };
        (!value.is_finite()).then(|| value.to_string())
    }
}

/// Index of the first NaN or infinity.
pub(crate) fn first_non_finite(values: &[f32]) -> Option<usize> {
    const EXPONENT: u32 = 0x7f80_0000;
    const CHUNK: usize = 64;
    // A branch per chunk instead of one per value, so that the scan runs at the speed of memory.
    let chunks = values.chunks_exact(CHUNK);
    let tail = values.len() - chunks.remainder().len();
    let suspicious = chunks
        .enumerate()
        .find(|(_, chunk)| chunk.iter().fold(false, |bad, v| bad | (v.to_bits() & EXPONENT == EXPONENT)))
        .map_or(tail, |(i, _)| i * CHUNK);
    values[suspicious..].iter().position(|v| !v.is_finite()).map(|i| suspicious + i)
}

/// Checks the scales of encoded blocks (the values themselves for F32, F16 and BF16), as
/// `ggml_validate_row_data` does.
///
/// # Errors
/// [`QuantError::NonFinite`] with the first block whose scale is NaN or infinite; other errors when the type has
/// no codec or `src` is not a whole number of blocks.
#[doc(alias = "ggml_validate_row_data")]
pub fn validate(ty: TensorType, src: &[u8]) -> Result<(), QuantError> {
    let (codec, info) = checked_codec(ty)?;
    let blocks = src.chunks_exact(info.block_bytes);
    if !blocks.remainder().is_empty() {
        let whole = blocks.len();
        let expected = whole * info.block_bytes;
        return Err(QuantError::EncodedLength { ty, weights: whole * info.block_len, expected, found: src.len() });
    }
    for (index, block) in blocks.enumerate() {
        for field in codec.scales {
            if let Some(value) = field.non_finite(block) {
                return Err(QuantError::NonFinite { ty, block: index, field: field.name, value });
            }
        }
    }
    Ok(())
}
