//! Vector code beside the scalar codecs, chosen at run time by [`cpu::level`](crate::cpu::level).
//!
//! The scalar functions of [`types`](super::types) are the definition; everything here gives the same bits.

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod wide;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use super::{DequantizeFn, QuantizeFn, codec};
use crate::cpu::{self, Level};
use crate::gguf::TensorType;

/// The fastest decoder of `ty` on this machine, or `None` when the type has no codec.
pub fn dequantizer(ty: TensorType) -> Option<DequantizeFn> {
    dequantizer_at(ty, cpu::level())
}

/// The fastest decoder of `ty` at or below `level` among those that this machine can run.
pub fn dequantizer_at(ty: TensorType, level: Level) -> Option<DequantizeFn> {
    #[cfg(target_arch = "x86_64")]
    if let Some(decode) = x86_64::dequantizer(ty, level.min(cpu::level())) {
        return Some(decode);
    }
    let _ = level;
    codec(ty).map(|codec| codec.dequantize)
}

/// The fastest encoder of `ty` on this machine, or `None` when the type has none.
pub fn quantizer(ty: TensorType) -> Option<QuantizeFn> {
    quantizer_at(ty, cpu::level())
}

/// The fastest encoder of `ty` at or below `level` among those that this machine can run.
pub fn quantizer_at(ty: TensorType, level: Level) -> Option<QuantizeFn> {
    #[cfg(target_arch = "x86_64")]
    if let Some(encode) = x86_64::quantizer(ty, level.min(cpu::level())) {
        return Some(encode);
    }
    #[cfg(target_arch = "aarch64")]
    if let Some(encode) = aarch64::quantizer(ty, level.min(cpu::level())) {
        return Some(encode);
    }
    let _ = level;
    codec(ty).and_then(|codec| codec.quantize)
}

#[cfg(test)]
mod encoder_tests;

/// Names what a test leaves out, on the terminal itself: what a test that passes prints is not shown.
#[cfg(test)]
fn skipped(what: &str, level: Level) {
    use std::io::Write as _;
    let line = format!("skipped: {what} for {} (this CPU lacks it, or LWQ_ISA forbids it)\n", level.name());
    // A terminal that is gone is no reason to fail.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::CODECS;

    /// Random blocks rather than encoded weights: they reach every field, and scales that are infinite, subnormal
    /// or not numbers too.
    #[test]
    fn every_level_decodes_random_blocks_as_scalar_code_does() {
        let mut state = 0x1234_5678_9abc_def1u64;
        let mut byte = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        };
        for level in Level::ALL {
            if !level.is_available() {
                skipped("decoders", level);
                continue;
            }
            for codec in CODECS {
                let info = codec.ty.info().unwrap();
                for blocks in [0, 1, 2, 7, 300] {
                    let bytes: Vec<u8> = (0..blocks * info.block_bytes).map(|_| byte()).collect();
                    let mut expected = vec![0f32; blocks * info.block_len];
                    let mut found = expected.clone();
                    (codec.dequantize)(&bytes, &mut expected);
                    dequantizer_at(codec.ty, level).unwrap()(&bytes, &mut found);
                    for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
                        let same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
                        assert!(same, "{} at {}: [{index}] {found} for {expected}", codec.ty, level.name());
                    }
                }
            }
        }
    }
}
