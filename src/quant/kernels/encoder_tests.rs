//! Every encoder that this machine can run against the scalar one, byte by byte.

use std::sync::Once;

use proptest::prelude::*;

use super::{quantizer_at, skipped};
use crate::cpu::Level;
use crate::gguf::TensorType;
use crate::quant::{CODECS, Codec};
use crate::testing::Random;

/// Any float but NaN and infinities.
fn finite(random: &mut Random) -> f32 {
    let value = f32::from_bits(random.bits() as u32);
    if value.is_finite() { value } else { 1.0 }
}

type Family = (&'static str, fn(&mut Random, usize) -> f32);

const FAMILIES: &[Family] = &[
    ("bell", |random, _| random.bell() * 0.03),
    ("heavy", |random, _| random.bell().powi(9)),
    ("zero", |_, _| 0.0),
    ("minus zero", |_, _| -0.0),
    ("constant", |_, _| -0.7),
    ("sparse", |random, i| if i % 97 == 5 { random.bell() } else { 0.0 }),
    ("alternating", |_, i| if i.is_multiple_of(2) { 0.25 } else { -0.25 }),
    // Few distinct values: ties everywhere.
    ("ties", |random, _| (random.below(9) as f32 - 4.0) * 0.5),
    ("halves", |random, _| random.below(64) as f32 - 31.5),
    ("positive", |random, _| random.bell().abs() + 1.0),
    ("negative", |random, _| -random.bell().abs() - 1e-3),
    ("denormal", |random, _| random.bell() * 1e-39),
    ("tiny", |random, _| random.bell() * 1e-15),
    ("huge", |random, _| random.bell() * 8e37),
    ("far from zero", |random, _| 1e6 + random.bell()),
    ("any bits", |random, _| finite(random)),
];

fn encoders() -> impl Iterator<Item = &'static Codec> {
    CODECS.iter().filter(|codec| codec.quantize.is_some())
}

/// Levels to compare with scalar code. What is left out is printed by name, once.
fn levels() -> impl Iterator<Item = Level> {
    static SKIPPED: Once = Once::new();
    SKIPPED.call_once(|| Level::ALL.iter().filter(|level| !level.is_available()).for_each(|l| skipped("encoders", *l)));
    Level::ALL.into_iter().filter(|level| level.is_available() && *level != Level::Scalar)
}

/// Compares the encoders of `codec`; `about` describes the weights.
fn compare(codec: &Codec, weights: &[f32], row_len: usize, importance: Option<&[f32]>, about: &str) {
    let Some(quantize) = codec.quantize else { return };
    let bytes = codec.ty.info().unwrap().row_bytes(weights.len() as u64).unwrap() as usize;
    let mut expected = vec![0x55; bytes];
    quantize(weights, row_len, importance, &mut expected);
    for level in levels() {
        let mut found = vec![0xaa; bytes];
        quantizer_at(codec.ty, level).unwrap()(weights, row_len, importance, &mut found);
        let at = expected.iter().zip(&found).position(|(e, f)| e != f);
        let with = if importance.is_some() { "with" } else { "without" };
        assert_eq!(at, None, "{} for {} {with} importance, {about}: first byte that differs", codec.ty, level.name());
    }
}

#[test]
fn every_level_encodes_each_family_as_scalar_code_does() {
    const ROW: usize = 768;
    let mut random = Random::new(11);
    let importance: Vec<f32> = (0..ROW).map(|i| if i % 50 == 3 { 0.0 } else { random.bell().powi(4) }).collect();
    for codec in encoders() {
        for (family, generate) in FAMILIES {
            // Not a multiple of sixteen blocks of 256.
            let weights: Vec<f32> = (0..6 * ROW).map(|i| generate(&mut random, i)).collect();
            for importance in [None, Some(&importance[..])] {
                compare(codec, &weights, ROW, importance, family);
            }
        }
    }
}

#[test]
fn every_level_encodes_blocks_that_differ_side_by_side_as_scalar_code_does() {
    let mut random = Random::new(77);
    for codec in encoders() {
        let block = codec.ty.info().unwrap().block_len.max(32);
        for round in 0..12 {
            let row_len = block * (1 + random.below(5));
            let rows = 1 + random.below(9);
            let mut weights = Vec::new();
            while weights.len() < rows * row_len {
                // A run of 16 or 32 weights per family, so that groups of one block differ too.
                let run = if round % 2 == 0 { 32 } else { 16 };
                let (_, generate) = FAMILIES[random.below(FAMILIES.len())];
                weights.extend((0..run).map(|i| generate(&mut random, i)));
            }
            let importance: Vec<f32> = (0..row_len)
                .map(|_| match random.below(12) {
                    0 => 0.0,
                    1 => 1e-40,
                    2 => 3e38,
                    _ => random.bell().powi(4),
                })
                .collect();
            for importance in [None, Some(&importance[..])] {
                compare(codec, &weights[..rows * row_len], row_len, importance, &format!("round {round}"));
            }
        }
    }
}

/// Each row has a mean square of its own, and there are more rows than lanes.
#[test]
fn every_level_encodes_many_rows_of_different_scale_as_scalar_code_does() {
    const ROW: usize = 256;
    let mut random = Random::new(5);
    let importance: Vec<f32> = (0..ROW).map(|_| random.bell().powi(2) + 0.01).collect();
    let weights: Vec<f32> = (0..37 * ROW).map(|i| random.bell() * ((i / ROW * 7 % 12) as f32 - 6.0).exp2()).collect();
    for codec in encoders() {
        compare(codec, &weights, ROW, Some(&importance), "rows of different scale");
        compare(codec, &weights, ROW, None, "rows of different scale");
    }
}

/// NaN has no place in other types.
#[test]
fn every_level_encodes_any_bits_as_16_bit_floats_as_scalar_code_does() {
    let mut random = Random::new(3);
    let any = |random: &mut Random| f32::from_bits(random.bits() as u32);
    let weights: Vec<f32> = (0..1 << 16).map(|_| any(&mut random)).collect();
    // NaN in every place of a step, and in none.
    let sparse: Vec<f32> = (0..64 * 130).map(|i| if i % 65 == 0 && i > 640 { any(&mut random) } else { 1.5 }).collect();
    for ty in [TensorType::F16, TensorType::BF16] {
        let codec = CODECS.iter().find(|codec| codec.ty == ty).unwrap();
        for weights in [&weights[..], &sparse, &weights[..77]] {
            compare(codec, weights, weights.len(), None, "any bits");
        }
    }
}

/// Weights as a strategy: ordinary ones, special ones, and any bits that are finite.
fn weight() -> impl Strategy<Value = f32> {
    prop_oneof![
        4 => -1f32..1.0,
        2 => prop::sample::select(vec![0.0, -0.0, 1.0, -1.0, 0.5, 1e-15, -1e-15, 1e-40, f32::MAX, f32::MIN, f32::MIN_POSITIVE]),
        1 => any::<u32>().prop_map(|bits| {
            let value = f32::from_bits(bits);
            if value.is_finite() { value } else { -2.0 }
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_level_encodes_any_finite_weights_as_scalar_code_does(
        values in prop::collection::vec(weight(), 512),
        scale in prop::sample::select(vec![1.0f32, 1e-3, 1e-20, 1e20]),
        importance in prop::collection::vec(prop_oneof![Just(0.0f32), 0.0f32..4.0, Just(1e30)], 256),
    ) {
        let weights: Vec<f32> = values.iter().map(|v| v * scale).map(|v| if v.is_finite() { v } else { 1.0 }).collect();
        for codec in encoders() {
            for importance in [None, Some(&importance[..])] {
                compare(codec, &weights, 256, importance, "proptest");
            }
        }
    }
}
