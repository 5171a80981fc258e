use proptest::prelude::*;

use super::columns::{TILE, column_weights};
use super::format::{Prepared, TileFormat};
use super::layout::Layout;
use super::*;
use crate::gguf::TensorType;
use crate::quant::types::parts::Parts;
use crate::quant::{QuantError, dequantize, quantize_rows, validate};
use crate::testing::Random;

pub(super) const BY_COLUMNS: [TensorType; 12] = [
    TensorType::Q2_K,
    TensorType::Q3_K,
    TensorType::Q4_K,
    TensorType::Q5_K,
    TensorType::Q6_K,
    TensorType::Q4_0,
    TensorType::Q4_1,
    TensorType::Q5_0,
    TensorType::Q5_1,
    TensorType::Q8_0,
    TensorType::IQ4_NL,
    TensorType::IQ4_XS,
];

pub(super) const ALL: [TensorType; 17] = {
    let mut all = [TensorType::IQ2_XXS; 17];
    let mut i = 0;
    while i < BY_COLUMNS.len() {
        all[i] = BY_COLUMNS[i];
        i += 1;
    }
    (all[13], all[14]) = (TensorType::IQ2_XS, TensorType::IQ2_S);
    (all[15], all[16]) = (TensorType::IQ3_XXS, TensorType::IQ3_S);
    all
};

/// Numbers that look normally distributed.
pub(in crate::rounding) fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut random = Random::new(seed);
    (0..len).map(|_| random.bell()).collect()
}

/// Inputs of which each depends on those before it, with very different sizes.
pub(in crate::rounding) fn inputs(tokens: usize, n: usize, seed: u64) -> Vec<f32> {
    let mut rows = noise(tokens * n, seed);
    for row in rows.chunks_exact_mut(n) {
        for j in 1..n {
            row[j] = 0.5 * row[j] + 0.8 * row[j - 1] + if j > 7 { 0.2 * row[j - 7] } else { 0.0 };
        }
        for (j, x) in row.iter_mut().enumerate() {
            *x *= 0.2 + (j % 13) as f32;
        }
    }
    rows
}

pub(in crate::rounding) fn moment(tokens: usize, n: usize, seed: u64) -> SecondMoment {
    let mut moment = SecondMoment::new(n).unwrap();
    moment.accumulate(&inputs(tokens, n, seed), None);
    moment
}

pub(super) fn row_bytes(ty: TensorType, n: usize) -> usize {
    ty.info().unwrap().row_bytes(n as u64).unwrap() as usize
}

pub(super) fn rounded(ty: TensorType, rows: &[f32], n: usize, factor: &Factor) -> Vec<u8> {
    let mut out = vec![0; rows.len() / n * row_bytes(ty, n)];
    round_rows(ty, rows, n, factor, &mut out).unwrap();
    validate(ty, &out).unwrap();
    out
}

pub(super) fn searched(ty: TensorType, rows: &[f32], n: usize, weights: Option<&[f32]>) -> Vec<u8> {
    let mut out = vec![0; rows.len() / n * row_bytes(ty, n)];
    search_rows(ty, rows, n, weights, &mut out).unwrap();
    validate(ty, &out).unwrap();
    out
}

pub(super) fn decoded(ty: TensorType, bytes: &[u8], len: usize) -> Vec<f32> {
    let mut out = vec![0.0; len];
    dequantize(ty, bytes, &mut out).unwrap();
    out
}

/// Weight `j` of a row with the feedback of the errors of all columns before `end`, every sum written out.
pub(super) fn fed_back(weights: &[f32], errors: &[f32], feedback: &[f32], j: usize, end: usize) -> f32 {
    let n = weights.len();
    let mut target = weights[j];
    let tile = j / TILE * TILE;
    for start in (0..tile).step_by(TILE) {
        let products = (start..start + TILE).fold(0.0f32, |sum, k| errors[k].mul_add(feedback[k * n + j], sum));
        target += products;
    }
    for k in tile..end {
        target += errors[k] * feedback[k * n + j];
    }
    target
}

/// What the tiled loop has to agree with: one row, column by column.
pub(super) fn naive_row(layout: &Layout, weights: &[f32], cost: &[f32], feedback: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let n = weights.len();
    let mut errors = vec![0.0f32; n];
    let target = |errors: &[f32], j: usize, end: usize| fed_back(weights, errors, feedback, j, end);
    let mut bytes = Vec::new();
    for block in (0..n).step_by(layout.len) {
        let columns = block..block + layout.len;
        let targets: Vec<f32> = columns.clone().map(|j| target(&errors, j, block)).collect();
        let (scales, _) = layout.block_scales(&targets, &cost[columns.clone()], true);
        let mut parts = Parts { d: scales.d, dmin: scales.dmin, ..Parts::ZERO };
        for (index, group) in columns.step_by(layout.group).enumerate() {
            let columns = group..group + layout.group;
            let targets: Vec<f32> = columns.clone().map(|j| target(&errors, j, group)).collect();
            let choice = layout.group_choice(scales, None, &targets, &cost[columns.clone()]);
            (parts.scales[index], parts.mins[index]) = (choice.scale, choice.min);
            for j in columns {
                let (value, level) = choice.grid.round(target(&errors, j, j));
                parts.levels[j - block] = level;
                errors[j] = weights[j] - value;
            }
        }
        let mut encoded = vec![0; layout.bytes];
        parts.write(layout.ty, &mut encoded);
        bytes.extend(encoded);
    }
    (bytes, errors)
}

#[test]
fn the_tiled_loop_agrees_with_the_naive_one() {
    for (n, seed) in [(576, 1), (768, 2), (256, 3)] {
        let factor = Factor::new(&moment(400, n, seed), 0.02).unwrap();
        let feedback = factor.feedback().unwrap();
        let weights = noise(3 * n, seed + 10);
        for ty in BY_COLUMNS {
            let layout = Layout::of(ty).unwrap();
            if n % layout.len != 0 {
                continue;
            }
            let cost = column_weights(Some(factor.weights()), n);
            let mut errors = vec![0.0; weights.len()];
            let mut bytes = vec![0; 3 * row_bytes(ty, n)];
            let (parts, _) = Prepared::new(&layout, &factor, feedback).round_task(&weights, &mut errors, 0).unwrap();
            layout.write(&parts, &mut bytes);
            for (row, weights) in weights.chunks_exact(n).enumerate() {
                let (expected, expected_errors) = naive_row(&layout, weights, &cost, feedback);
                assert!(bytes[row * expected.len()..][..expected.len()] == expected, "{ty}, {n} columns, row {row}");
                assert_eq!(errors[row * n..][..n], expected_errors, "{ty}");
            }
            let expected: Vec<f32> =
                weights.iter().zip(decoded(ty, &bytes, weights.len())).map(|(w, q)| w - q).collect();
            assert_eq!(errors, expected, "{ty}: the values that rounding reckons with are those that readers decode");
        }
    }
}

#[test]
fn a_diagonal_moment_means_plain_rounding() {
    let n = 512;
    let mut diagonal = SecondMoment::new(n).unwrap();
    for j in 0..n {
        let mut row = vec![0.0; n];
        row[j] = 0.5 + (j % 5) as f32;
        diagonal.accumulate(&row, None);
    }
    let factor = Factor::new(&diagonal, 0.02).unwrap();
    let weights = noise(5 * n, 4);
    for ty in ALL {
        let plain = searched(ty, &weights, n, Some(factor.weights()));
        assert!(rounded(ty, &weights, n, &factor) == plain, "{ty}");
        assert!(rounded(ty, &weights, n, &Factor::diagonal(factor.weights())) == plain, "{ty}");
    }
}

#[test]
fn feedback_loses_less_than_plain_rounding_on_its_own_moment_and_on_another() {
    let n = 512;
    let (own, other) = (moment(6000, n, 1), moment(6000, n, 2));
    let factor = Factor::new(&own, DEFAULT_DAMPING).unwrap();
    let weights = noise(24 * n, 5);
    for ty in ALL {
        let plain = decoded(ty, &searched(ty, &weights, n, Some(&own.diagonal())), weights.len());
        let found = decoded(ty, &rounded(ty, &weights, n, &factor), weights.len());
        for (name, moment) in [("own", &own), ("other", &other)] {
            let ratio = moment.loss(&weights, &found) / moment.loss(&weights, &plain);
            assert!(ratio < 0.75, "{ty}: {ratio} of plain rounding on the {name} moment");
        }
    }
}

#[test]
fn no_row_is_worse_than_plain_rounding_on_the_calibration_moment() {
    let n = 256;
    // Fewer tokens than inputs, strong damping: feedback has little to offer. The losses that decide are kept track of in
    // single precision, not measured on the bytes; on such moments they are wrong for a row in some thousands, none of
    // these.
    let own = moment(40, n, 14);
    for damping in [0.0, 0.02, 0.9] {
        let factor = Factor::new(&own, damping).unwrap();
        let weights = noise(12 * n, 7);
        for ty in ALL {
            let plain = decoded(ty, &searched(ty, &weights, n, Some(&own.diagonal())), weights.len());
            let found = decoded(ty, &rounded(ty, &weights, n, &factor), weights.len());
            for ((w, plain), found) in weights.chunks(n).zip(plain.chunks(n)).zip(found.chunks(n)) {
                let (found, plain) = (own.loss(w, found), own.loss(w, plain));
                assert!(found <= plain * 1.0005, "{ty}, damping {damping}: {found} > {plain}");
            }
        }
    }
}

#[test]
fn search_never_loses_more_than_ggml_in_any_block() {
    let n = 512;
    let mut weights = noise(16 * n, 8);
    for (i, w) in weights.iter_mut().enumerate() {
        *w *= [1.0, 1e-3, 40.0, 1e-6][i / n % 4] * if i % 97 == 0 { 6.0 } else { 1.0 };
    }
    let importance: Vec<f32> = noise(n, 9).iter().map(|x| x * x).collect();
    for ty in ALL {
        for importance in [None, Some(&importance[..])] {
            let found = decoded(ty, &searched(ty, &weights, n, importance), weights.len());
            let mut ggml = vec![0; weights.len() / n * row_bytes(ty, n)];
            match quantize_rows(ty, &weights, n, importance, &mut ggml) {
                Err(QuantError::NeedsImportance { .. }) => continue,
                encoded => encoded.unwrap(),
            }
            let ggml = decoded(ty, &ggml, weights.len());
            let len = ty.info().unwrap().block_len;
            let cost = column_weights(importance, n);
            let loss = |q: &[f32], start: usize| -> f64 {
                let square = |i: usize| f64::from(cost[i % n]) * (f64::from(weights[i]) - f64::from(q[i])).powi(2);
                (start..start + len).map(square).sum()
            };
            let (mut sum, mut sum_ggml) = (0.0, 0.0);
            for start in (0..weights.len()).step_by(len) {
                let (found, ggml) = (loss(&found, start), loss(&ggml, start));
                assert!(found <= ggml, "{ty}: {found} > {ggml}");
                let norm: f64 = (start..start + len).map(|i| f64::from(weights[i]).powi(2)).sum();
                (sum, sum_ggml) = (sum + found / norm, sum_ggml + ggml / norm);
            }
            assert!(sum < 0.9999 * sum_ggml, "{ty}: {sum} of ggml's {sum_ggml}");
        }
    }
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let n = 512;
    let weights = noise(200 * n, 11);
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let moment = moment(700, n, 12);
            let factor = Factor::new(&moment, 0.02).unwrap();
            let bytes = rounded(TensorType::Q3_K, &weights, n, &factor);
            let loss = moment.loss(&weights, &decoded(TensorType::Q3_K, &bytes, weights.len()));
            (bytes, loss.to_bits())
        })
    };
    assert!(run(1) == run(3));
}

#[test]
fn rows_do_not_depend_on_their_neighbours() {
    // Wide rows come in larger tasks, unless there are threads enough to share them out.
    for (n, ty, threads) in [(256, TensorType::Q4_K, 1), (2048, TensorType::Q4_K, 1), (2048, TensorType::IQ3_S, 2)] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let factor = Factor::new(&moment(300, n, 13), 0.02).unwrap();
            let weights = noise(140 * n, 14);
            let all = rounded(ty, &weights, n, &factor);
            for row in [0, 63, 65, 139] {
                let alone = rounded(ty, &weights[row * n..(row + 1) * n], n, &factor);
                assert!(all[row * alone.len()..(row + 1) * alone.len()] == alone, "{ty}, {n} columns, row {row}");
            }
        });
    }
}

#[test]
fn weights_out_of_the_ordinary_end_in_sound_blocks() {
    let n = 256;
    let factor = Factor::new(&moment(300, n, 15), 0.02).unwrap();
    let ordinary = noise(n, 16);
    let mut rows = vec![0.0; n];
    rows.extend(vec![1.0; n]);
    for factor in [1e-38, 1e-20, 1e-9, 1e-7, 1e-5, 1e5, 1e9, 3e37] {
        rows.extend(ordinary.iter().map(|w| w * factor));
        rows.extend(ordinary.iter().map(|w| w.abs() * factor));
    }
    rows.extend((0..n).map(|j| if j % 37 == 0 { 1e30 } else { 1e-30 }));
    for ty in ALL {
        let bytes = rounded(ty, &rows, n, &factor);
        assert!(decoded(ty, &bytes, rows.len()).iter().all(|q| q.is_finite()), "{ty}");
        assert!(decoded(ty, &bytes, rows.len())[..n].iter().all(|q| *q == 0.0), "{ty}");
        searched(ty, &rows, n, None);
        searched(ty, &rows, n, Some(&vec![0.0; n]));
    }
}

#[test]
fn bad_calls_are_refused() {
    let n = 256;
    let factor = Factor::diagonal(&vec![1.0; n]);
    let rows = noise(n, 17);
    let refused = |ty, rows: &[f32], n, bytes: usize| {
        round_rows(ty, rows, n, &factor, &mut vec![0; bytes]).unwrap_err().to_string()
    };
    assert!(refused(TensorType::IQ1_S, &rows, n, 50).contains("round it by search"));
    assert!(refused(TensorType::Q4_0, &rows, 128, 144).contains("second moments of 256 inputs"));
    assert!(refused(TensorType::Q4_K, &rows, n, 143).contains("144"));
    let mut broken = rows.clone();
    broken[7] = f32::NAN;
    assert!(refused(TensorType::Q4_K, &broken, n, 144).contains("weight 7 is NaN"));
    let search = |weights: &[f32]| search_rows(TensorType::Q4_K, &rows, n, Some(weights), &mut [0; 144]);
    assert!(search(&[1.0; 3]).unwrap_err().to_string().contains("3 importance weights"));
    assert!(search_rows(TensorType::F64, &rows, n, None, &mut []).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn any_finite_weights_give_sound_blocks(
        bits in proptest::collection::vec(any::<u32>(), 256), ty in 0..ALL.len(), scale in -30i32..30,
    ) {
        let n = 256;
        let rows: Vec<f32> = bits.iter().enumerate().map(|(i, bits)| {
            // Half of them of like size, the others any float there is.
            let value = if i % 2 == 0 { (*bits as f32 / u32::MAX as f32 - 0.5) * 2f32.powi(scale) } else { f32::from_bits(*bits) };
            if value.is_finite() { value } else { 0.0 }
        }).collect();
        let factor = Factor::new(&moment(100, n, 3), 0.02).unwrap();
        rounded(ALL[ty], &rows, n, &factor);
        searched(ALL[ty], &rows, n, None);
    }
}
