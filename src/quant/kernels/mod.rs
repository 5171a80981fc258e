//! Vector code beside the scalar codecs, chosen at run time by [`cpu::level`].
//!
//! The scalar functions of `types` are the definition; everything here gives the same bits.

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
pub(crate) fn dequantizer(ty: TensorType) -> Option<DequantizeFn> {
    dequantizer_at(ty, cpu::level())
}

/// The fastest decoder of `ty` at or below `level` among those that this machine can run.
pub fn dequantizer_at(ty: TensorType, level: Level) -> Option<DequantizeFn> {
    usable(level).find_map(|level| decoder(ty, level)).or_else(|| codec(ty).map(|codec| codec.dequantize))
}

/// The fastest encoder of `ty` on this machine, or `None` when the type has none.
pub(crate) fn quantizer(ty: TensorType) -> Option<QuantizeFn> {
    quantizer_at(ty, cpu::level())
}

/// The fastest encoder of `ty` at or below `level` among those that this machine can run.
pub fn quantizer_at(ty: TensorType, level: Level) -> Option<QuantizeFn> {
    usable(level).find_map(|level| encoder(ty, level)).or_else(|| codec(ty).and_then(|codec| codec.quantize))
}

/// Levels up to `level` that this machine can run, the best first.
fn usable(level: Level) -> impl Iterator<Item = Level> {
    let top = level.min(cpu::level());
    Level::ALL.into_iter().rev().filter(move |level| *level <= top)
}

/// The row of the decoders for `level`: what was written for `ty` with its instructions, whether the CPU has them or
/// not; `None` where a lesser level or scalar code does as well. What it gives asks for the proof when it is called.
pub(crate) fn decoder(ty: TensorType, level: Level) -> Option<DequantizeFn> {
    #[cfg(target_arch = "x86_64")]
    return x86_64::decoder(ty, level);
    // Elsewhere the compiler makes vectors of the scalar ones.
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (ty, level);
        None
    }
}

/// The row of the encoders for `level`, as [`decoder`].
pub(crate) fn encoder(ty: TensorType, level: Level) -> Option<QuantizeFn> {
    #[cfg(target_arch = "x86_64")]
    return x86_64::encoder(ty, level);
    #[cfg(target_arch = "aarch64")]
    return aarch64::encoder(ty, level);
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        let _ = (ty, level);
        None
    }
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
    use crate::testing::Random;

    /// Random blocks rather than encoded weights: they reach every field, and scales that are infinite, subnormal
    /// or not numbers too.
    #[test]
    fn every_level_decodes_random_blocks_as_scalar_code_does() {
        let mut random = Random::new(1);
        for level in Level::ALL {
            if !level.is_available() {
                skipped("decoders", level);
                continue;
            }
            for codec in CODECS {
                let info = codec.ty.info().unwrap();
                for blocks in [0, 1, 2, 7, 300] {
                    let bytes: Vec<u8> = (0..blocks * info.block_bytes).map(|_| (random.bits() >> 32) as u8).collect();
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
