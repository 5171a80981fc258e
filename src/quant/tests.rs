//! Properties of every codec; the bytes themselves are compared with ggml's in `tests/interop`.

use proptest::prelude::*;

use super::*;
use crate::gguf::TypeInfo;
use crate::testing::Random;

const ROW_LEN: usize = 512;

fn encoders() -> impl Iterator<Item = (&'static Codec, &'static TypeInfo)> {
    CODECS.iter().filter(|codec| codec.quantize.is_some()).map(|codec| (codec, codec.ty.info().unwrap()))
}

fn encode(codec: &Codec, weights: &[f32], importance: Option<&[f32]>) -> Vec<u8> {
    let bytes = codec.ty.info().unwrap().row_bytes(weights.len() as u64).unwrap();
    let mut blocks = vec![0xa5; bytes as usize];
    quantize_rows(codec.ty, weights, ROW_LEN, importance, &mut blocks).unwrap();
    blocks
}

fn decode(codec: &Codec, blocks: &[u8]) -> Vec<f32> {
    let info = codec.ty.info().unwrap();
    let mut weights = vec![f32::NAN; blocks.len() / info.block_bytes * info.block_len];
    dequantize(codec.ty, blocks, &mut weights).unwrap();
    weights
}

/// Bell-shaped numbers of standard deviation near `sigma`, the same for the same seed.
fn bell(seed: u64, count: usize, sigma: f32) -> Vec<f32> {
    let mut random = Random::new(seed);
    (0..count).map(|_| random.bell() * sigma).collect()
}

/// Root mean square error over root mean square of what is decoded from bell-shaped rows, rounded up.
const RELATIVE_ERRORS: &[(TensorType, f64)] = &[
    (TensorType::F32, 0.0),
    (TensorType::F16, 0.0004),
    (TensorType::BF16, 0.003),
    (TensorType::Q4_0, 0.11),
    (TensorType::Q4_1, 0.10),
    (TensorType::Q5_0, 0.055),
    (TensorType::Q5_1, 0.05),
    (TensorType::Q8_0, 0.008),
    (TensorType::Q2_K, 0.33),
    (TensorType::Q3_K, 0.19),
    (TensorType::Q4_K, 0.09),
    (TensorType::Q5_K, 0.045),
    (TensorType::Q6_K, 0.025),
    (TensorType::IQ2_XXS, 0.42),
    (TensorType::IQ2_XS, 0.38),
    (TensorType::IQ3_XXS, 0.25),
    (TensorType::IQ1_S, 0.62),
    (TensorType::IQ4_NL, 0.09),
    (TensorType::IQ3_S, 0.21),
    (TensorType::IQ2_S, 0.35),
    (TensorType::IQ4_XS, 0.09),
    (TensorType::IQ1_M, 0.57),
    (TensorType::TQ1_0, 0.9),
    (TensorType::TQ2_0, 0.9),
    (TensorType::MXFP4, 0.16),
    (TensorType::NVFP4, 0.12),
    (TensorType::Q1_0, 0.65),
    (TensorType::Q2_0, 0.8),
];

#[test]
fn error_of_bell_shaped_rows_stays_below_what_the_bits_allow() {
    for (codec, info) in encoders() {
        let (_, bound) = RELATIVE_ERRORS.iter().find(|(ty, _)| *ty == codec.ty).expect("every encoder has a bound");
        for sigma in [0.02, 3.0] {
            let weights = bell(5, 16 * ROW_LEN, sigma);
            let importance = vec![1.0; ROW_LEN];
            let decoded = decode(codec, &encode(codec, &weights, Some(&importance)));
            let energy: f64 = weights.iter().map(|&v| f64::from(v).powi(2)).sum();
            let loss: f64 = weights.iter().zip(&decoded).map(|(&a, &b)| f64::from(a - b).powi(2)).sum();
            let error = (loss / energy).sqrt();
            assert!(error <= *bound, "{}: relative error {error:.4} exceeds {bound}", info.name);
        }
    }
}

#[test]
fn zeros_decode_to_zeros() {
    let ones = [1.0; ROW_LEN];
    for (codec, info) in encoders() {
        for importance in [None, Some(&ones[..]), Some(&[0.0; ROW_LEN][..])] {
            if importance.is_none() && codec.needs_importance() {
                continue;
            }
            let decoded = decode(codec, &encode(codec, &[0.0; ROW_LEN], importance));
            assert!(decoded.iter().all(|&v| v == 0.0), "{}", info.name);
        }
    }
}

#[test]
fn a_row_encodes_alike_alone_and_among_others() {
    let weights = bell(17, 4 * ROW_LEN, 0.1);
    let importance: Vec<f32> = bell(18, ROW_LEN, 1.0).iter().map(|v| v.exp()).collect();
    for (codec, info) in encoders() {
        let together = encode(codec, &weights, Some(&importance));
        let alone: Vec<u8> = weights.chunks(ROW_LEN).flat_map(|row| encode(codec, row, Some(&importance))).collect();
        assert!(together == alone, "{}", info.name);
    }
}

#[test]
fn wrong_lengths_are_errors_that_name_them() {
    let weights = [0.5; 512];
    let mut blocks = [0; 288];
    let mut quantize = |ty, src: &[f32], row_len, importance, bytes: usize| {
        quantize_rows(ty, src, row_len, importance, &mut blocks[..bytes]).map_err(|error| error.to_string())
    };
    let ty = TensorType::Q4_K;
    assert_eq!(quantize(ty, &weights, 512, None, 288), Ok(()));
    for (result, expected) in [
        (quantize(ty, &weights, 500, None, 288), "row of 500 weights"),
        (quantize(ty, &weights, 0, None, 288), "row of 0 weights"),
        (quantize(ty, &weights[..256], 512, None, 144), "256 weights for q4_K are not a whole number of rows of 512"),
        (quantize(ty, &weights, 512, Some(&weights[1..]), 288), "511 importance weights"),
        (quantize(ty, &weights, 512, None, 287), "take 288 bytes, but the buffer has 287"),
        (quantize(TensorType::Q8_K, &weights, 512, None, 288), "type q8_K can be read but not written"),
        (quantize(TensorType::I32, &weights, 512, None, 288), "type i32 cannot be converted"),
        (quantize(TensorType(4711), &weights, 512, None, 288), "type#4711"),
    ] {
        let message = result.unwrap_err();
        assert!(message.contains(expected), "{message}");
    }
    let mut weights = [0.0; 512];
    let message = dequantize(ty, &blocks[..144], &mut weights).unwrap_err().to_string();
    assert!(message.contains("512 weights of type q4_K take 288 bytes, but the buffer has 144"), "{message}");
    assert!(dequantize(ty, &blocks, &mut weights[..300]).is_err());
    assert!(dequantize(TensorType::Q8_1, &blocks, &mut weights).is_err());
}

#[test]
fn every_non_finite_scale_is_found_with_its_block() {
    for codec in CODECS {
        let info = codec.ty.info().unwrap();
        let blocks = vec![0u8; 5 * info.block_bytes];
        assert_eq!(validate(codec.ty, &blocks), Ok(()), "{}", info.name);
        for field in codec.scales {
            let patterns: &[&[u8]] = match field.format {
                ScaleFormat::F16 => &[&[0x00, 0x7c], &[0x00, 0xfc], &[0x01, 0x7e]],
                ScaleFormat::Bf16 => &[&[0x80, 0x7f], &[0x80, 0xff], &[0xc1, 0x7f]],
                ScaleFormat::F32 => &[&[0, 0, 0x80, 0x7f], &[0, 0, 0x80, 0xff], &[1, 0, 0xc0, 0x7f]],
                ScaleFormat::E8m0 => &[&[0xff]],
                ScaleFormat::Iq1mNibbles => &[&[0, 0, 0, 0, 0, 0xc0, 0, 0x70], &[0xff; 8]],
            };
            for pattern in patterns {
                let mut damaged = blocks.clone();
                let start = 3 * info.block_bytes + field.offset;
                damaged[start..start + pattern.len()].copy_from_slice(pattern);
                match validate(codec.ty, &damaged) {
                    Err(QuantError::NonFinite { block: 3, field: name, .. }) => assert_eq!(name, field.name),
                    other => panic!("{}: {pattern:x?} gave {other:?}", info.name),
                }
            }
        }
        if info.block_bytes > 1 {
            let partial = validate(codec.ty, &blocks[1..]).unwrap_err();
            assert!(matches!(partial, QuantError::EncodedLength { .. }), "{partial}");
        }
    }
}

#[test]
fn the_first_value_that_is_not_finite_is_found_anywhere() {
    let mut values = vec![1.0f32; 200];
    assert_eq!(first_non_finite(&values), None);
    assert_eq!(first_non_finite(&[]), None);
    for index in (0..values.len()).rev() {
        values[index] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][index % 3];
        assert_eq!(first_non_finite(&values), Some(index));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any bits at all, NaN and infinities among them: no panic, and every byte is written.
    #[test]
    fn no_weights_make_an_encoder_panic(
        bits in prop::collection::vec(any::<u32>(), ROW_LEN),
        importance in prop::collection::vec(prop_oneof![Just(0.0f32), Just(f32::MAX), Just(1e-40), 0.0f32..10.0], ROW_LEN),
        weighted in any::<bool>(),
    ) {
        let weights: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        for (codec, _) in encoders() {
            let importance = (weighted || codec.needs_importance()).then_some(&importance[..]);
            decode(codec, &encode(codec, &weights, importance));
        }
    }

    /// What a type has decoded, it encodes with no more than its own rounding.
    #[test]
    fn decoded_blocks_of_even_formats_survive_a_second_round(seed in any::<u64>(), exponent in -20i32..10) {
        let weights = bell(seed, ROW_LEN, (exponent as f32).exp2());
        for ty in [TensorType::F32, TensorType::F16, TensorType::BF16, TensorType::Q8_0, TensorType::TQ2_0, TensorType::TQ1_0] {
            let codec = codec(ty).unwrap();
            let first = decode(codec, &encode(codec, &weights, None));
            let second = decode(codec, &encode(codec, &first, None));
            let peak = first.iter().fold(0.0f32, |max, v| max.max(v.abs()));
            prop_assert!(first.iter().zip(&second).all(|(a, b)| (a - b).abs() <= peak * 0.002), "{ty}");
        }
    }
}
