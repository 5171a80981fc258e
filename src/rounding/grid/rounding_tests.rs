//! Search, feedback and the default of llm-compressor on matrices without a pattern.

use super::tests::layout;
use super::*;
use crate::rounding::gptq::tests::{inputs, moment, noise};
use crate::rounding::gptq::{Factor, SecondMoment};

const INT4: Grid = Grid::Int { bits: 4, symmetric: true };
const INT4_ASYM: Grid = Grid::Int { bits: 4, symmetric: false };
const INT8: Grid = Grid::Int { bits: 8, symmetric: true };
const BLOCKS: Groups = Groups::Blocks { rows: 8, columns: 128 };

const LAYOUTS: [Layout; 11] = [
    layout(INT4, Groups::Columns(128), ScaleType::Bf16),
    layout(INT4, Groups::Columns(64), ScaleType::F16),
    layout(INT4, Groups::Columns(32), ScaleType::F32),
    layout(INT4, Groups::Channel, ScaleType::Bf16),
    layout(INT4_ASYM, Groups::Columns(128), ScaleType::Bf16),
    layout(INT8, Groups::Columns(128), ScaleType::Bf16),
    layout(INT8, Groups::Channel, ScaleType::F32),
    layout(Grid::Fp8, Groups::Channel, ScaleType::Bf16),
    layout(Grid::Fp8, BLOCKS, ScaleType::Bf16),
    layout(Grid::Nvfp4, Groups::Columns(16), ScaleType::F8E4M3),
    layout(Grid::Mxfp4, Groups::Columns(32), ScaleType::E8M0),
];

/// Rows of more than one tile, the last of which is partial.
const N: usize = 384;
const ROWS: usize = 20;

/// Weights with outliers, as those of models have.
fn weights(seed: u64) -> Vec<f32> {
    noise(ROWS * N, seed).into_iter().map(|w| 0.02 * w * (1.0 + 0.3 * w * w)).collect()
}

fn squared_error(layout: Layout, weights: &[f32], rounded: &Rounded, importance: &[f32]) -> f64 {
    let decoded = layout.dequantize(rounded, ROWS, N);
    let terms = weights.iter().zip(&decoded).zip(importance.iter().cycle());
    terms.map(|((w, q), h)| f64::from(*h) * f64::from(w - q).powi(2)).sum()
}

/// Everything stored is a number of its type, and codes are within their range.
fn check_stored(layout: Layout, rounded: &Rounded) {
    for scale in &rounded.scales {
        let signed = matches!(layout.grid, INT4);
        assert!((signed || *scale > 0.0) && layout.scale_type.round(scale.abs()) == scale.abs(), "{layout:?}: {scale}");
    }
    let in_range = |code: &u8| match layout.grid {
        Grid::Int { bits: 4, .. } => (-8..8).contains(&(*code as i8)),
        Grid::Int { .. } => true,
        Grid::Fp8 => code & 0x7f != 0x7f,
        Grid::Nvfp4 | Grid::Mxfp4 => *code < 16,
    };
    assert!(rounded.codes.iter().all(in_range), "{layout:?}");
    assert!(rounded.zero_points.iter().all(|zero| (-8..8).contains(zero)));
}

#[test]
fn search_is_better_than_plain_rounding_in_its_own_measure() {
    let (weights, importance) = (weights(1), moment(400, N, 2).diagonal());
    for layout in LAYOUTS {
        let plain = plain(layout, &weights, ROWS, N, None);
        for importance in [None, Some(&importance[..])] {
            let found = search(layout, &weights, ROWS, N, importance, None);
            check_stored(layout, &found);
            let measure = importance.unwrap_or(&[1.0; N]);
            let ratio =
                squared_error(layout, &weights, &found, measure) / squared_error(layout, &weights, &plain, measure);
            // Whole numbers of 8 bits, FP8 and powers of two leave little choice.
            let most = if matches!(layout.grid, INT8 | Grid::Fp8 | Grid::Mxfp4) { 1.0 } else { 0.95 };
            assert!(ratio < most, "{layout:?}: {ratio}");
        }
    }
}

#[test]
fn feedback_is_better_than_search_and_than_the_default_of_others() {
    let (weights, calibration, other) = (weights(3), moment(2000, N, 4), moment(2000, N, 5));
    let natural = Factor::new(&calibration, 0.02).unwrap();
    let descending = Factor::descending(calibration.clone(), 0.02).unwrap();
    let mut raw = SecondMoment::new(N).unwrap().uncapped();
    raw.accumulate(&inputs(2000, N, 4), None);
    for layout in LAYOUTS {
        let searched = search(layout, &weights, ROWS, N, Some(&calibration.diagonal()), None);
        let factor = if layout.grid == Grid::Nvfp4 { &natural } else { &descending };
        let improved = feedback(layout, &weights, ROWS, N, factor, &searched).unwrap();
        let gptq = gptq_default(layout, &weights, ROWS, N, &raw, None).unwrap();
        let plain = plain(layout, &weights, ROWS, N, None);
        check_stored(layout, &improved);
        let loss = |rounded: &Rounded| other.loss(&weights, &layout.dequantize(rounded, ROWS, N));
        let [plain, searched, gptq, improved] = [&plain, &searched, &gptq, &improved].map(loss);
        println!(
            "{layout:?}: plain 1, search {}, gptq {}, feedback {}",
            searched / plain,
            gptq / plain,
            improved / plain
        );
        assert!(improved < 0.7 * searched && improved < gptq && gptq < plain, "{layout:?}");
    }
}

#[test]
fn blocks_and_global_scales_stay_as_they_are() {
    let (weights, calibration) = (weights(6), moment(2000, N, 7));
    let factor = Factor::new(&calibration, 0.02).unwrap();
    let layout = layout(Grid::Fp8, BLOCKS, ScaleType::Bf16);
    let searched = search(layout, &weights, ROWS, N, None, None);
    let improved = feedback(layout, &weights, ROWS, N, &factor, &searched).unwrap();
    assert_eq!(improved.scales, searched.scales);
    assert_ne!(improved.codes, searched.codes);
    let nvfp4 = LAYOUTS[9];
    let searched = search(nvfp4, &weights, ROWS, N, None, Some(100.0));
    assert_eq!(feedback(nvfp4, &weights, ROWS, N, &factor, &searched).unwrap().global_scale, 100.0);
}

#[test]
fn bytes_depend_neither_on_threads_nor_on_neighbouring_rows() {
    let (weights, calibration) = (weights(8), moment(1500, N, 9));
    let natural = Factor::new(&calibration, 0.05).unwrap();
    let descending = Factor::descending(calibration.clone(), 0.05).unwrap();
    let all = |layout: Layout, weights: &[f32], factor: &Factor| {
        let rows = weights.len() / N;
        let searched = search(layout, weights, rows, N, Some(&calibration.diagonal()), Some(3000.0));
        feedback(layout, weights, rows, N, factor, &searched).unwrap()
    };
    for (layout, factor) in LAYOUTS.into_iter().flat_map(|layout| [(layout, &natural), (layout, &descending)]) {
        let expected = all(layout, &weights, factor);
        let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        for threads in [1, 3] {
            assert_eq!(pool(threads).install(|| all(layout, &weights, factor)), expected, "{layout:?}");
        }
        let first = all(layout, &weights[..8 * N], factor);
        assert_eq!(
            (&first.codes[..], &first.scales[..]),
            (&expected.codes[..8 * N], &expected.scales[..first.scales.len()])
        );
    }
}

#[test]
fn what_nothing_is_known_about_is_still_rounded() {
    let layout = LAYOUTS[0];
    let empty = SecondMoment::new(N).unwrap();
    let factor = Factor::new(&empty, 0.02).unwrap();
    let searched = search(layout, &[], 0, N, None, None);
    assert_eq!(feedback(layout, &[], 0, N, &factor, &searched).unwrap(), searched);
    let zeros = vec![0.0; N];
    let searched = search(layout, &zeros, 1, N, Some(&vec![0.0; N]), None);
    let factor = Factor::new(&moment(600, N, 3), 0.02).unwrap();
    let improved = feedback(layout, &zeros, 1, N, &factor, &searched).unwrap();
    assert!(layout.dequantize(&improved, 1, N).iter().all(|w| *w == 0.0));
    // Without inputs there is nothing to go by, and all columns count as dead.
    let gptq = gptq_default(layout, &weights(1), ROWS, N, &empty, None).unwrap();
    assert!(layout.dequantize(&gptq, ROWS, N).iter().all(|w| *w == 0.0));
    let mut broken = weights(1);
    broken[7] = f32::INFINITY;
    let searched = search(layout, &broken, ROWS, N, None, None);
    let error = feedback(layout, &broken, ROWS, N, &factor, &searched).unwrap_err().to_string();
    assert!(error.contains("weight 7 is inf"), "{error}");
}

#[test]
fn saving_in_bfloat16_again_keeps_4_bits_and_loses_some_of_8() {
    let weights = weights(10);
    let changed = |layout: Layout| {
        let rounded = plain(layout, &weights, ROWS, N, None);
        let saved = resaved_in_bf16(layout, &rounded, ROWS, N);
        assert_eq!(saved.scales, rounded.scales);
        rounded.codes.iter().zip(&saved.codes).filter(|(a, b)| a != b).count()
    };
    assert_eq!(changed(LAYOUTS[0]), 0);
    let eight = changed(layout(INT8, Groups::Channel, ScaleType::Bf16));
    assert!(eight > 0 && eight < ROWS * N / 10, "{eight}");
}
