//! Every engine against exact sums and against one another.

use super::*;
use crate::compute::tests::random_floats;
use crate::gguf::TensorType;
use crate::quant::{codec, quantize_rows};

fn engines() -> Vec<Engine> {
    #[cfg(target_arch = "x86_64")]
    match crate::cpu::Avx512Vnni::new() {
        Some(isa) => return vec![portable::engine(), vnni::engine(isa)],
        None => eprintln!("skipped: avx512-vnni (this CPU lacks it, or LWQ_ISA forbids it)"),
    }
    vec![portable::engine()]
}

fn product(engine: Engine, x: &IntegerActivations, w: &Matrix, ldy: usize) -> Vec<f32> {
    let mut y = vec![7.0; x.tokens() * ldy];
    matmul_with(engine, x, w, &mut y, ldy);
    y
}

#[test]
fn products_are_those_of_rounded_rows_and_the_same_in_every_engine() {
    for codec_of in crate::quant::CODECS {
        let ty = codec_of.ty;
        let Some(info) = ty.info().filter(|_| multiplies_as_integers(ty)) else { continue };
        let steps = if info.block_len == 256 { Steps::Of256 } else { Steps::Of32 };
        for (seed, (tokens, rows, blocks)) in
            [(1, 1, 1), (5, 31, 3), (6, 32, 2), (13, 97, 9), (29, 66, 17)].into_iter().enumerate()
        {
            let cols = blocks * info.block_len;
            let weights = random_floats(seed as u64 + 1, rows * cols);
            let mut bytes = vec![0; rows * blocks * info.block_bytes];
            quantize_rows(ty, &weights, cols, Some(&vec![1.0; cols]), &mut bytes).unwrap();
            let w = Matrix::new(ty, rows, cols, &bytes).unwrap();
            let mut x = random_floats(seed as u64 + 100, tokens * cols);
            // Rows of zeros, and of one large value.
            x[..cols].fill(0.0);
            x[(tokens - 1) * cols] = -50.0;
            let rounded = IntegerActivations::round(&x, cols, steps);
            let results: Vec<Vec<f32>> =
                engines().into_iter().map(|engine| product(engine, &rounded, &w, rows + 3)).collect();
            for other in &results[1..] {
                assert!(results[0].iter().map(|v| v.to_bits()).eq(other.iter().map(|v| v.to_bits())), "{ty}");
            }
            x.chunks_exact_mut(cols).for_each(|row| round_to_steps(row, steps));
            let mut decoded = vec![0.0; rows * cols];
            (codec(ty).unwrap().dequantize)(&bytes, &mut decoded);
            for (x, y) in x.chunks_exact(cols).zip(results[0].chunks_exact(rows + 3)) {
                assert_eq!(y[rows..], [7.0; 3], "what lies behind the rows is left alone");
                for (w, y) in decoded.chunks_exact(cols).zip(y) {
                    let terms = || x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
                    let (exact, magnitude) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
                    let error = (f64::from(*y) - exact).abs();
                    assert!(error <= 2e-6 * magnitude + 1e-30, "{ty}: {y}, exactly {exact}, of {magnitude}");
                }
            }
        }
    }
}

#[test]
fn integer_products_have_the_same_bits_on_every_architecture() {
    let (tokens, rows, cols) = (7, 37, 768);
    let x = random_floats(31, tokens * cols);
    let weights = random_floats(32, rows * cols);
    for engine in engines() {
        let mut digest = 0xcbf2_9ce4_8422_2325u64;
        for (ty, steps) in [
            (TensorType::Q4_1, Steps::Of32),
            (TensorType::Q8_0, Steps::Of32),
            (TensorType::Q2_K, Steps::Of256),
            (TensorType::Q5_K, Steps::Of256),
            (TensorType::Q6_K, Steps::Of256),
            (TensorType::IQ4_XS, Steps::Of256),
        ] {
            let info = ty.info().unwrap();
            let mut bytes = vec![0; rows * cols / info.block_len * info.block_bytes];
            quantize_rows(ty, &weights, cols, None, &mut bytes).unwrap();
            let w = Matrix::new(ty, rows, cols, &bytes).unwrap();
            let y = product(engine, &IntegerActivations::round(&x, cols, steps), &w, rows);
            let bytes = y.iter().flat_map(|v| v.to_bits().to_le_bytes());
            digest = bytes.fold(digest, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
        }
        assert_eq!(digest, 0xe8f6_5b21_da5f_f504, "{}: {digest:#018x}", engine.name);
    }
}

#[test]
fn results_do_not_depend_on_threads_or_neighbours() {
    let (ty, rows, cols, tokens) = (TensorType::Q4_K, 150, 512, 23);
    let weights = random_floats(3, rows * cols);
    let mut bytes = vec![0; rows * cols / 256 * 144];
    quantize_rows(ty, &weights, cols, None, &mut bytes).unwrap();
    let w = Matrix::new(ty, rows, cols, &bytes).unwrap();
    let x = random_floats(4, tokens * cols);
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| product(Engine::best(), &IntegerActivations::round(&x, cols, Steps::Of256), &w, rows))
    };
    let all = on(1);
    assert_eq!(all, on(3));
    let alone = IntegerActivations::round(&x[7 * cols..8 * cols], cols, Steps::Of256);
    assert_eq!(product(Engine::best(), &alone, &w, rows), all[7 * rows..8 * rows]);
}

#[test]
fn values_that_are_no_numbers_end_in_such() {
    let (rows, cols) = (2, 256);
    let mut bytes = vec![0x55; rows * 144];
    bytes[144..146].copy_from_slice(&f32_to_f16_bits(f32::INFINITY));
    let w = Matrix::new(TensorType::Q4_K, rows, cols, &bytes).unwrap();
    let x = IntegerActivations::round(&[0.5; 256], cols, Steps::Of256);
    for engine in engines() {
        let y = product(engine, &x, &w, rows);
        assert!(y[0].is_finite() && !y[1].is_finite(), "{}: {y:?}", engine.name);
    }
}

fn f32_to_f16_bits(value: f32) -> [u8; 2] {
    half::f16::from_f32(value).to_le_bytes()
}
