//! Tests that all lattice and non-linear types share.

use proptest::prelude::*;
use sha2::{Digest, Sha256};

use crate::gguf::TensorType;
use crate::quant::{QuantError, codec, dequantize, quantize_rows};
use crate::testing::Random;

const TYPES: [TensorType; 9] = [
    TensorType::IQ1_S,
    TensorType::IQ1_M,
    TensorType::IQ2_XXS,
    TensorType::IQ2_XS,
    TensorType::IQ2_S,
    TensorType::IQ3_XXS,
    TensorType::IQ3_S,
    TensorType::IQ4_NL,
    TensorType::IQ4_XS,
];

const ROW: usize = 1024;

fn encode(ty: TensorType, weights: &[f32], importance: Option<&[f32]>) -> Vec<u8> {
    let bytes = ty.info().unwrap().row_bytes(weights.len() as u64).unwrap();
    let mut encoded = vec![0xaa; bytes as usize];
    let row_len = importance.map_or(weights.len(), <[f32]>::len);
    quantize_rows(ty, weights, row_len, importance, &mut encoded).unwrap();
    encoded
}

fn decode(ty: TensorType, encoded: &[u8], len: usize) -> Vec<f32> {
    let mut weights = vec![f32::NAN; len];
    dequantize(ty, encoded, &mut weights).unwrap();
    weights
}

fn needs_importance(ty: TensorType) -> bool {
    codec(ty).unwrap().needs_importance()
}

/// Bell-shaped weights with outliers, 64 rows of falling size, by integer arithmetic alone.
fn sample() -> (Vec<f32>, Vec<f32>) {
    let mut random = Random::new(1);
    let mut weights = Vec::with_capacity(64 * ROW);
    for row in 0..64 {
        for column in 0..ROW {
            let bits = random.bits();
            let sum: i32 = (0..4).map(|i| i32::from((bits >> (16 * i)) as i16)).sum();
            let outlier = if column % 37 == 5 { 8.0 } else { 1.0 };
            weights.push(sum as f32 * outlier * f32::powi(0.5, 17 + row % 20));
        }
    }
    let importance = (0..ROW).map(|_| ((random.bits() >> 48) as f32 / 4096.0).powi(2)).collect();
    (weights, importance)
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn encoders_write_the_bytes_that_ggml_writes() {
    // First 8 bytes of the SHA-256 of what `ggml_quantize_chunk` of libggml-python 0.20.2 writes for `sample()`,
    // with and without importance; tests/interop compares byte by byte on far more data.
    const GGML: [(TensorType, &str, &str); 9] = [
        (TensorType::IQ1_S, "1c05a46bc8cc33d2", ""),
        (TensorType::IQ1_M, "c63764a913f580b2", "f6d161fffc3090d7"),
        (TensorType::IQ2_XXS, "478f9155e5f6473b", ""),
        (TensorType::IQ2_XS, "4b78abf96f6568cf", ""),
        (TensorType::IQ2_S, "d0afdb07d42a6ea9", "ca233cc7a8b6df86"),
        (TensorType::IQ3_XXS, "d227281830474b07", "53b46c351bda854f"),
        (TensorType::IQ3_S, "4e14c6cc36c0bd89", "d4c5c87b90d57b31"),
        (TensorType::IQ4_NL, "f45b03aa1b3fc52c", "70ce05a85e5db37d"),
        (TensorType::IQ4_XS, "91d0af4a3ae84912", "2682b0930f1af8ea"),
    ];
    let (weights, importance) = sample();
    for (ty, weighted, plain) in GGML {
        let rows: Vec<u8> = weights.chunks(ROW).flat_map(|row| encode(ty, row, Some(&importance))).collect();
        assert_eq!(digest(&rows), weighted, "{ty} with importance");
        if plain.is_empty() {
            assert!(needs_importance(ty), "{ty}");
            continue;
        }
        let rows: Vec<u8> = weights.chunks(ROW).flat_map(|row| encode(ty, row, None)).collect();
        assert_eq!(digest(&rows), plain, "{ty} without importance");
    }
}

#[test]
fn several_rows_at_once_equal_row_by_row() {
    let (weights, importance) = sample();
    for ty in TYPES {
        let at_once = encode(ty, &weights[..3 * ROW], Some(&importance));
        let one_by_one: Vec<u8> =
            weights[..3 * ROW].chunks(ROW).flat_map(|row| encode(ty, row, Some(&importance))).collect();
        assert_eq!(at_once, one_by_one, "{ty}");
    }
}

#[test]
fn rows_of_zeros_decode_to_zeros() {
    for ty in TYPES {
        for zero in [0.0, -0.0] {
            let encoded = encode(ty, &[zero; ROW], Some(&[1.0; ROW]));
            assert!(decode(ty, &encoded, ROW).iter().all(|&x| x == 0.0), "{ty}");
        }
    }
}

#[test]
fn relative_error_is_what_the_bits_allow() {
    let bounds = [0.72, 0.54, 0.58, 0.46, 0.42, 0.25, 0.21, 0.13, 0.13];
    let (weights, _) = sample();
    for (ty, bound) in TYPES.into_iter().zip(bounds) {
        let encoded = encode(ty, &weights[..ROW], Some(&[1.0; ROW]));
        let decoded = decode(ty, &encoded, ROW);
        let (mut error, mut power) = (0.0, 0.0);
        for (x, y) in weights.iter().zip(&decoded) {
            error += f64::from(x - y).powi(2);
            power += f64::from(*x).powi(2);
        }
        let relative = (error / power).sqrt();
        assert!(relative < bound, "{ty}: {relative}");
        assert!(relative > bound * 0.8 / 3.0, "{ty}: suspiciously good, {relative}");
    }
}

#[test]
fn types_that_need_importance_refuse_to_go_without() {
    for ty in TYPES {
        let mut encoded = vec![0; ty.info().unwrap().row_bytes(256).unwrap() as usize];
        let result = quantize_rows(ty, &[1.0; 256], 256, None, &mut encoded);
        let expected = if needs_importance(ty) { Err(QuantError::NeedsImportance { ty }) } else { Ok(()) };
        assert_eq!(result, expected, "{ty}");
    }
    assert_eq!(TYPES.into_iter().filter(|&ty| needs_importance(ty)).count(), 3);
}

/// Weights of a block of 256: any bits, or numbers of a size that a model may have.
fn block(finite: impl Strategy<Value = f32> + Clone) -> impl Strategy<Value = Vec<f32>> {
    prop::collection::vec(finite, 256)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_finite_weights_encode_without_panic(
        weights in block(any::<f32>().prop_filter("finite", |x| x.is_finite())),
        importance in block(prop_oneof![Just(0.0), 0.0f32..1e30, Just(f32::MIN_POSITIVE / 4.0)]),
    ) {
        for ty in TYPES {
            let encoded = encode(ty, &weights, Some(&importance));
            decode(ty, &encoded, 256);
            if !needs_importance(ty) {
                decode(ty, &encode(ty, &weights, None), 256);
            }
        }
    }

    #[test]
    fn weights_of_sane_size_decode_to_finite_weights(
        weights in block(prop_oneof![Just(0.0), -1e4f32..1e4, -1e-3f32..1e-3, -1e-38f32..1e-38]),
        importance in block(prop_oneof![Just(0.0), 0.0f32..1e10]),
    ) {
        for ty in TYPES {
            let decoded = decode(ty, &encode(ty, &weights, Some(&importance)), 256);
            prop_assert!(decoded.iter().all(|x| x.is_finite()), "{ty}: {decoded:?}");
        }
    }

    #[test]
    fn any_bytes_decode_without_panic(bytes in prop::collection::vec(any::<u8>(), 136)) {
        for ty in TYPES {
            let info = ty.info().unwrap();
            decode(ty, &bytes[..info.block_bytes], info.block_len);
        }
    }
}
