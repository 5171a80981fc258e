//! Vector code beside the scalar codecs, chosen at run time by [`cpu::level`](crate::cpu::level).
//!
//! The scalar functions of [`types`](super::types) are the definition; everything here gives the same bits.

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
    let _ = level;
    codec(ty).and_then(|codec| codec.quantize)
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
                eprintln!("skipped: {} (this CPU lacks it, or LWQ_ISA forbids it)", level.name());
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

    /// xorshift64*.
    struct Random(u64);

    impl Random {
        fn bits(&mut self) -> u64 {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
        }

        /// Between -4 and 4, bell-shaped.
        fn weight(&mut self) -> f32 {
            let bits = self.bits();
            (0..4).map(|i| i32::from((bits >> (16 * i)) as i16)).sum::<i32>() as f32 / 32768.0
        }
    }

    #[test]
    fn every_level_encodes_as_scalar_code_does() {
        const ROW: usize = 768;
        let mut random = Random(11);
        let importance: Vec<f32> = (0..ROW).map(|i| if i % 50 == 3 { 0.0 } else { random.weight().powi(4) }).collect();
        type Family = (&'static str, fn(&mut Random, usize) -> f32);
        let families: [Family; 7] = [
            ("bell", |random, _| random.weight() * 0.03),
            ("heavy", |random, _| random.weight().powi(9)),
            ("zero", |_, _| 0.0),
            ("sparse", |random, i| if i % 97 == 5 { random.weight() } else { 0.0 }),
            ("alternating", |_, i| if i % 2 == 0 { 0.25 } else { -0.25 }),
            ("denormal", |random, _| random.weight() * 1e-39),
            ("any bits", |random, _| {
                let value = f32::from_bits(random.bits() as u32);
                if value.is_finite() { value } else { 1.0 }
            }),
        ];
        for codec in CODECS {
            let Some(quantize) = codec.quantize else { continue };
            let info = codec.ty.info().unwrap();
            if !ROW.is_multiple_of(info.block_len) {
                continue;
            }
            for (family, generate) in families {
                let weights: Vec<f32> = (0..4 * ROW).map(|i| generate(&mut random, i)).collect();
                for importance in [None, Some(&importance[..])] {
                    let bytes = info.row_bytes(weights.len() as u64).unwrap() as usize;
                    let mut expected = vec![0x55; bytes];
                    quantize(&weights, ROW, importance, &mut expected);
                    for level in Level::ALL.into_iter().filter(|level| level.is_available()) {
                        let mut found = vec![0xaa; bytes];
                        quantizer_at(codec.ty, level).unwrap()(&weights, ROW, importance, &mut found);
                        let at = expected.iter().zip(&found).position(|(e, f)| e != f);
                        assert_eq!(
                            at,
                            None,
                            "{} {} {family}, importance {}",
                            codec.ty,
                            level.name(),
                            importance.is_some()
                        );
                    }
                }
            }
        }
    }
}
