//! Every kernel against exact sums and against the scalar definition.

use super::gemm::gemm_with;
use super::second_moment::accumulate_with;
use super::*;
use crate::gguf::TensorType;
use crate::testing::Random;

/// Uniform in [-1, 1).
pub(super) fn random_floats(seed: u64, count: usize) -> Vec<f32> {
    let mut random = Random::new(seed);
    (0..count).map(|_| random.signed()).collect()
}

fn to_bytes(ty: TensorType, values: &[f32]) -> Vec<u8> {
    match ty {
        TensorType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        TensorType::F16 => values.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect(),
        TensorType::BF16 => values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect(),
        _ => unreachable!("{ty}"),
    }
}

/// Kernels that run here; the others are named on stderr.
fn kernels() -> Vec<&'static Kernel> {
    let (usable, skipped): (Vec<_>, Vec<_>) =
        Kernel::all().iter().copied().partition(|kernel: &&'static Kernel| kernel.level.is_available());
    for kernel in skipped {
        eprintln!("skipped: {} (this CPU lacks {}, or LWQ_ISA forbids it)", kernel.name, kernel.level.name());
    }
    usable
}

fn product(kernel: &'static Kernel, x: &[f32], tokens: usize, w: &Matrix, ldy: usize) -> Vec<f32> {
    let mut packed = PackedActivations::for_kernel(kernel);
    packed.pack(x, tokens, w.cols(), w.cols());
    let mut y = vec![7.0; tokens * ldy];
    matmul(&packed, w, &mut y, ldy);
    y
}

const SHAPES: &[(usize, usize, usize)] = &[
    (1, 1, 1),
    (1, 33, 257),
    (2, 31, 64),
    (3, 64, 255),
    (5, 17, 513),
    (7, 1, 1000),
    (14, 32, 256),
    (15, 65, 511),
    (29, 97, 770),
    (43, 130, 100),
    (64, 300, 2),
];

#[test]
fn every_kernel_stays_within_its_bound_and_accurate_ones_agree_to_the_byte() {
    for &(tokens, rows, cols) in SHAPES {
        for ty in [TensorType::F32, TensorType::F16, TensorType::BF16] {
            let x = random_floats(1 + cols as u64, tokens * cols);
            let bytes = to_bytes(ty, &random_floats(99 + rows as u64, rows * cols));
            // An odd address: mapped tensors need not be aligned to their elements.
            let mut shifted = vec![0u8; bytes.len() + 1];
            shifted[1..].copy_from_slice(&bytes);
            let w = Matrix::new(ty, rows, cols, &shifted[1..]).unwrap();
            let mut weights = vec![0f32; rows * cols];
            for (row, target) in weights.chunks_exact_mut(cols).enumerate() {
                w.decode_row(row, target);
            }
            let ldy = rows + 3;
            let mut accurate: Option<Vec<f32>> = None;
            for kernel in kernels() {
                let y = product(kernel, &x, tokens, &w, ldy);
                for token in 0..tokens {
                    for row in 0..rows {
                        let pairs = || x[token * cols..][..cols].iter().zip(&weights[row * cols..][..cols]);
                        let exact: f64 = pairs().map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                        let size: f64 = pairs().map(|(&a, &b)| (f64::from(a) * f64::from(b)).abs()).sum();
                        let summing = (256.0 + cols as f64 / 256.0) * 2f64.powi(-24);
                        let rounding = if kernel.is_bf16() { 2f64.powi(-7) + 2f64.powi(-16) } else { 0.0 };
                        let got = f64::from(y[token * ldy + row]);
                        assert!(
                            (got - exact).abs() <= (rounding + summing) * size + 1e-30,
                            "{} {ty} {tokens}x{rows}x{cols}: [{token}, {row}] is {got}, exactly {exact}",
                            kernel.name
                        );
                    }
                    assert_eq!(y[token * ldy + rows..][..3], [7.0; 3], "{} wrote beside its rows", kernel.name);
                }
                if !kernel.is_bf16() {
                    let bits: Vec<u32> = y.iter().map(|v| v.to_bits()).collect();
                    let first = accurate.get_or_insert_with(|| y.clone());
                    let expected: Vec<u32> = first.iter().map(|v| v.to_bits()).collect();
                    assert_eq!(bits, expected, "{} {ty} {tokens}x{rows}x{cols}", kernel.name);
                }
            }
        }
    }
}

#[test]
fn bf16_products_are_those_of_operands_rounded_to_nearest_even() {
    for kernel in kernels().into_iter().filter(|kernel| kernel.is_bf16()) {
        // Ties in both directions, and values whose products and sums are exact in f32.
        let x = [1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, -1.0 - 1.0 / 256.0, 3.0f32, 0.0];
        let w = [1.0f32, 2.0, 4.0, 8.0, 16.0];
        let bytes = to_bytes(TensorType::F32, &w);
        let y = product(kernel, &x, 1, &Matrix::new(TensorType::F32, 1, 5, &bytes).unwrap(), 1);
        let rounded = |v: f32| half::bf16::from_f32(v).to_f32();
        let expected: f32 = x.iter().zip(w).map(|(&x, w)| rounded(x) * rounded(w)).sum();
        assert_eq!(y, [expected]);
    }
}

#[test]
fn thread_counts_and_neighbours_do_not_change_a_byte() {
    let (tokens, rows, cols) = (61, 530, 700);
    let x = random_floats(5, tokens * cols);
    let bytes_of_rows = to_bytes(TensorType::F16, &random_floats(6, rows * cols));
    let w = Matrix::new(TensorType::F16, rows, cols, &bytes_of_rows).unwrap();
    for kernel in kernels() {
        let bits = |y: Vec<f32>| y.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        let with_threads = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            bits(pool.install(|| product(kernel, &x, tokens, &w, rows)))
        };
        let one = with_threads(1);
        for threads in [2, 3, 7] {
            assert!(with_threads(threads) == one, "{} with {threads} threads", kernel.name);
        }
        for token in [0, 13, 60] {
            let alone = bits(product(kernel, &x[token * cols..][..cols], 1, &w, rows));
            assert!(alone == one[token * rows..][..rows], "{}: token {token} alone", kernel.name);
        }
        let some = Matrix::new(TensorType::F16, 62, cols, &bytes_of_rows[37 * cols * 2..99 * cols * 2]).unwrap();
        let some = bits(product(kernel, &x, tokens, &some, 62));
        for token in 0..tokens {
            assert!(some[token * 62..][..62] == one[token * rows + 37..][..62], "{}: rows 37..99", kernel.name);
        }
    }
}

#[test]
fn empty_shapes_give_empty_or_zero_outputs() {
    for kernel in kernels() {
        for (tokens, rows, cols) in [(0, 4, 8), (4, 0, 8), (4, 3, 0), (0, 0, 0)] {
            let x = vec![1.0; tokens * cols];
            let bytes = to_bytes(TensorType::F32, &vec![1.0; rows * cols]);
            let w = Matrix::new(TensorType::F32, rows, cols, &bytes).unwrap();
            let y = product(kernel, &x, tokens, &w, rows);
            assert!(y.iter().all(|&v| v == 0.0), "{} {tokens}x{rows}x{cols}: {y:?}", kernel.name);
        }
    }
}

#[test]
fn nan_and_infinity_reach_the_outputs_they_belong_to_and_no_other() {
    for kernel in kernels() {
        let (tokens, rows, cols) = (3, 40, 300);
        let mut x = vec![1.0f32; tokens * cols];
        x[cols + 299] = f32::NAN;
        let mut weights = vec![1.0f32; rows * cols];
        weights[35 * cols] = f32::INFINITY;
        let bytes = to_bytes(TensorType::F32, &weights);
        let y = product(kernel, &x, tokens, &Matrix::new(TensorType::F32, rows, cols, &bytes).unwrap(), rows);
        for (index, value) in y.iter().enumerate() {
            match (index / rows, index % rows) {
                (1, _) => assert!(value.is_nan(), "{}", kernel.name),
                (_, 35) => assert_eq!(*value, f32::INFINITY, "{}", kernel.name),
                _ => assert_eq!(*value, 300.0, "{}", kernel.name),
            }
        }
    }
}

#[test]
fn matrices_that_do_not_fit_their_bytes_are_refused() {
    let bytes = [0u8; 144];
    assert!(Matrix::new(TensorType::F32, 3, 12, &bytes).is_ok());
    assert!(matches!(Matrix::new(TensorType::F32, 3, 13, &bytes), Err(MatrixError::Size { .. })));
    assert!(matches!(Matrix::new(TensorType::F32, usize::MAX, 12, &bytes), Err(MatrixError::Size { .. })));
    assert!(matches!(Matrix::new(TensorType::F32, 1, usize::MAX, &bytes), Err(MatrixError::Size { .. })));
    assert!(matches!(Matrix::new(TensorType(4000), 1, 1, &bytes), Err(MatrixError::Type { .. })));
    assert!(matches!(Matrix::new(TensorType::I32, 1, 36, &bytes), Err(MatrixError::Type { .. })));
}

#[test]
fn gemm_takes_strided_operands_either_way_and_agrees_on_every_instruction_set() {
    for (m, n, k) in [(1, 1, 1), (3, 5, 7), (20, 64, 300), (150, 33, 64), (17, 600, 40), (2, 3, 0), (0, 4, 4)] {
        let (lda, ldc) = (k + 2, n + 1);
        let a = random_floats(11, m * lda);
        let plain = random_floats(12, k * (n + 3));
        let mut transposed = vec![0f32; n * (k + 1)];
        for l in 0..k {
            for j in 0..n {
                transposed[j * (k + 1) + l] = plain[l * (n + 3) + j];
            }
        }
        for accumulate in [false, true] {
            let mut expected: Option<Vec<u32>> = None;
            for kernel in kernels().into_iter().filter(|kernel| !kernel.is_bf16()) {
                let operands = [
                    GemmOperand::Plain { data: &plain, stride: n + 3 },
                    GemmOperand::Transposed { data: &transposed, stride: k + 1 },
                ];
                for operand in operands {
                    let mut c = vec![0.5f32; m * ldc];
                    gemm_with(kernel, (m, n, k), (&a, lda), operand, (&mut c, ldc), accumulate);
                    for i in 0..m {
                        for j in 0..n {
                            let sum: f64 =
                                (0..k).map(|l| f64::from(a[i * lda + l]) * f64::from(plain[l * (n + 3) + j])).sum();
                            let sum = sum + if accumulate { 0.5 } else { 0.0 };
                            assert!((f64::from(c[i * ldc + j]) - sum).abs() < 1e-4, "{} {m}x{n}x{k}", kernel.name);
                        }
                        assert_eq!(c[i * ldc + n], 0.5, "{} wrote beside its columns", kernel.name);
                    }
                    let bits: Vec<u32> = c.iter().map(|v| v.to_bits()).collect();
                    assert_eq!(&bits, expected.get_or_insert_with(|| bits.clone()), "{} {m}x{n}x{k}", kernel.name);
                }
            }
        }
    }
}

#[test]
fn second_moments_add_up_over_calls() {
    // Odd numbers of tokens, more than a block of pairs.
    let (tokens, n) = (581, 75);
    let stride = n + 2;
    let inputs = random_floats(21, tokens * stride);
    for kernel in kernels() {
        let rounded = |v: &f32| if kernel.is_bf16() { half::bf16::from_f32(*v).to_f32() } else { *v };
        let x: Vec<f32> = inputs.iter().map(rounded).collect();
        let mut sums = vec![0f32; n * n];
        let mut at_once = vec![0f32; n * n];
        let (first, rest) = x.split_at(41 * stride);
        accumulate_with(kernel, first, 41, n, stride, &mut sums);
        accumulate_with(kernel, rest, tokens - 41, n, stride, &mut sums);
        accumulate_with(kernel, &x, tokens, n, stride, &mut at_once);
        for i in 0..n {
            assert!(sums[i * n..][..i].iter().all(|sum| *sum == 0.0), "{} touched the lower part", kernel.name);
            for j in i..n {
                let exact: f64 = (0..tokens).map(|t| f64::from(x[t * stride + i]) * f64::from(x[t * stride + j])).sum();
                for sums in [&sums, &at_once] {
                    assert!((f64::from(sums[i * n + j]) - exact).abs() < 1e-3, "{} [{i}, {j}]", kernel.name);
                }
            }
        }
    }
}

/// The order of operations is part of the definition, so this holds on every architecture. Input and digest (FNV-1a
/// over the outputs' bits) were computed by the scalar kernel on x86-64.
#[test]
fn accurate_products_have_the_same_bits_on_every_architecture() {
    let (tokens, rows, cols) = (5, 37, 600);
    let x = random_floats(31, tokens * cols);
    let bytes = to_bytes(TensorType::F16, &random_floats(32, rows * cols));
    let w = Matrix::new(TensorType::F16, rows, cols, &bytes).unwrap();
    for kernel in kernels().into_iter().filter(|kernel| !kernel.is_bf16()) {
        let y = product(kernel, &x, tokens, &w, rows);
        let digest = y
            .iter()
            .flat_map(|v| v.to_bits().to_le_bytes())
            .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
        assert_eq!(digest, 0x48e5_612a_7e96_0eb9, "{}: {digest:#018x}", kernel.name);
    }
}
