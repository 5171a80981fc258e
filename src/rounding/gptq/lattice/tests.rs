use super::super::columns::column_weights;
use super::super::factor::Factor;
use super::super::format::Prepared;
use super::super::tests::{fed_back, moment, noise};
use super::points::{Lookup, Portable};
use super::*;

const TYPES: [TensorType; 5] =
    [TensorType::IQ2_XXS, TensorType::IQ2_XS, TensorType::IQ2_S, TensorType::IQ3_XXS, TensorType::IQ3_S];

#[test]
fn the_nearest_point_is_found_when_columns_are_independent() {
    let costs: Vec<f32> = noise(8, 1).iter().map(|x| x * x + 0.1).collect();
    for ty in TYPES {
        let layout = LatticeLayout::of(ty).unwrap();
        let dims = layout.points.dims;
        let metric = Metric::new(&costs, None, 0);
        let (mut sum, mut sum_expected, mut room) = (0.0, 0.0, NO_COSTS);
        for seed in 0..20 {
            let t: [f32; 8] = noise(8, seed + 2).try_into().unwrap();
            let largest = (0..layout.points.len()).map(|point| layout.points.row(point as u16)[0]).max().unwrap();
            let scale = 0.9 / f32::from(largest);
            let found = layout.nearest(&t, &metric, scale, &mut room);
            let loss = |values: &[f32; 8]| (0..8).map(|i| costs[i] * (t[i] - values[i]).powi(2)).sum::<f32>();
            assert!((loss(&found.values) - found.best).abs() <= 1e-4 * found.best);
            assert!(!layout.shape.even_signs || found.octet.signs.count_ones().is_multiple_of(2), "{ty}");
            // Every point, with the best legal signs of one turn at most.
            let mut expected = f32::INFINITY;
            for point in 0..layout.points.len() {
                let others = if dims == 4 { layout.points.len() } else { 1 };
                for other in 0..others {
                    let magnitude = |i: usize| {
                        scale * f32::from(layout.points.row(if i < dims { point } else { other } as u16)[i % dims])
                    };
                    let values: [f32; 8] = std::array::from_fn(|i| magnitude(i).copysign(t[i]));
                    let odd = t.iter().filter(|t| **t < 0.0).count() % 2 == 1;
                    if !(layout.shape.even_signs && odd) {
                        expected = expected.min(loss(&values));
                        continue;
                    }
                    let least = (0..8).map(|i| 4.0 * costs[i] * (t[i] * values[i])).fold(f32::INFINITY, f32::min);
                    expected = expected.min(loss(&values) + least);
                }
            }
            sum += found.best;
            sum_expected += expected;
            if !layout.shape.even_signs {
                assert!(found.best <= expected * 1.0001, "{ty}: {} for {expected}", found.best);
            }
        }
        // The list is made without regard to parity.
        assert!(sum <= 1.02 * sum_expected, "{ty}: {sum} for {sum_expected}");
    }
}

/// What the small functions of a search find in `x` and `y`: all NaN are one, and so are both zeros.
fn found_by<L: Lookup>(lookup: L, x: &[f32; 16], y: &[f32; 16]) -> (u32, u32, (u32, usize)) {
    let [[a, b], [c, _]] = [x, y].map(|v| [0, 8].map(|at| v[at..at + 8].try_into().unwrap()));
    let bits = |x: f32| if x.is_nan() { f32::NAN.to_bits() } else { (x + 0.0).to_bits() };
    let (least, place) = lookup.least_turn(x[3], &a, &b, &c);
    (lookup.near(x, y[0]), bits(lookup.dot(&a, &b)), (bits(least), place))
}

#[test]
fn vector_code_finds_what_portable_code_finds() {
    let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1e38, 1.0, 1.0];
    for seed in 0..200 {
        let mut numbers = noise(32, seed);
        // Ties, and every second time numbers that no model has.
        numbers.iter_mut().for_each(|x| *x = (*x * 4.0).round() / 4.0);
        if seed % 2 == 1 {
            numbers[seed as usize % 32] = odd[seed as usize / 2 % 8];
        }
        let [x, y] = [0, 16].map(|at| numbers[at..at + 16].try_into().unwrap());
        let expected = found_by(Portable, &x, &y);
        assert_eq!(expected.0.count_ones() as usize, x.iter().filter(|x| **x <= y[0]).count());
        #[cfg(target_arch = "x86_64")]
        {
            use crate::cpu::{Avx2, Avx512};
            if let Some(isa) = Avx2::new() {
                assert_eq!(found_by(isa, &x, &y), expected, "{x:?} {y:?}");
            }
            if let Some(isa) = Avx512::new() {
                assert_eq!(found_by(isa, &x, &y), expected, "{x:?} {y:?}");
            }
        }
    }
}

/// What the tiled loop has to agree with: one row, one scale code after the other, with all feedback anew for each.
fn naive_row(layout: &LatticeLayout, weights: &[f32], factor: &Factor) -> (Vec<u8>, Vec<f32>) {
    let n = weights.len();
    let feedback = factor.feedback().unwrap();
    let cost = column_weights(Some(factor.weights()), n);
    let mut errors = vec![0.0f32; n];
    let mut bytes = Vec::new();
    for block in (0..n).step_by(LEN) {
        let target = |errors: &[f32], j: usize, end: usize| fed_back(weights, errors, feedback, j, end);
        let targets: Vec<f32> = (block..block + LEN).map(|j| target(&errors, j, block)).collect();
        let mut guess = vec![0; layout.bytes];
        quant::quantize_rows(layout.ty, &targets, LEN, Some(&cost[block..block + LEN]), &mut guess).unwrap();
        let mut parts = LatticeParts::ZERO;
        parts.read_scales(layout.ty, &guess);
        for (index, group) in (block..block + LEN).step_by(layout.group).enumerate() {
            let guess = i32::from(parts.scales[index]);
            let (before, mut room) = (errors.clone(), NO_COSTS);
            let mut least = f32::INFINITY;
            for code in (guess - REACH).max(0)..=(guess + REACH).min(TOP) {
                let (mut tried, mut loss) = (before.clone(), 0.0);
                let mut octets = Vec::new();
                for first in (group..group + layout.group).step_by(8) {
                    let metric = Metric::new(&cost, Some((feedback, n)), first);
                    let targets: Vec<f32> = (first..first + 8).map(|j| target(&tried, j, first)).collect();
                    let wanted = metric.target(&weights[first..first + 8], &targets);
                    let found = layout.nearest(&wanted, &metric, layout.scale(parts.d, code as u8), &mut room);
                    for (j, value) in (first..).zip(found.values) {
                        loss += cost[j] * (target(&tried, j, j) - value).powi(2);
                        tried[j] = weights[j] - value;
                    }
                    octets.push(found.octet);
                }
                if loss < least {
                    (least, errors, parts.scales[index]) = (loss, tried, code as u8);
                    for (at, octet) in (group % LEN / 8..).zip(&octets) {
                        (parts.points[at], parts.signs[at]) = (octet.points, octet.signs);
                    }
                }
            }
        }
        let mut encoded = vec![0; layout.bytes];
        parts.write(layout.ty, &mut encoded);
        bytes.extend(encoded);
    }
    (bytes, errors)
}

/// Blocks, errors and losses of the tiled loop.
fn tiled(layout: &LatticeLayout, rows: &[f32], factor: &Factor, sweeps: usize) -> (Vec<u8>, Vec<f32>, Vec<f64>) {
    let mut errors = vec![0.0; rows.len()];
    let prepared = Prepared::new(layout, factor, factor.feedback().unwrap());
    let (parts, losses) = prepared.round_task(rows, &mut errors, sweeps).unwrap();
    let mut bytes = vec![0; parts.len() * layout.bytes];
    layout.write(&parts, &mut bytes);
    (bytes, errors, losses)
}

#[test]
fn the_tiled_loop_agrees_with_the_naive_one() {
    let n = 768;
    let factor = Factor::new(&moment(900, n, 5), 0.02).unwrap();
    let rows = noise(3 * n, 6);
    for ty in TYPES {
        let layout = LatticeLayout::of(ty).unwrap();
        let (bytes, errors, _) = tiled(&layout, &rows, &factor, 0);
        for (row, weights) in rows.chunks_exact(n).enumerate() {
            let (expected, expected_errors) = naive_row(&layout, weights, &factor);
            assert!(bytes[row * expected.len()..][..expected.len()] == expected, "{ty}, row {row}");
            assert_eq!(errors[row * n..][..n], expected_errors, "{ty}");
        }
    }
}

#[test]
fn rounding_reckons_with_the_values_that_readers_decode() {
    let n = 512;
    let factor = Factor::new(&moment(700, n, 3), 0.02).unwrap();
    let rows = noise(3 * n, 4);
    for ty in TYPES {
        let (bytes, errors, _) = tiled(&LatticeLayout::of(ty).unwrap(), &rows, &factor, 2);
        let mut decoded = vec![0.0; rows.len()];
        quant::dequantize(ty, &bytes, &mut decoded).unwrap();
        for ((w, q), error) in rows.iter().zip(&decoded).zip(&errors) {
            assert_eq!(w - q, *error, "{ty}");
        }
    }
}

#[test]
fn sweeps_lower_the_loss_of_every_row() {
    let n = 768;
    let moment = moment(900, n, 8);
    let factor = Factor::new(&moment, 0.02).unwrap();
    let rows = noise(4 * n, 9);
    for ty in TYPES {
        let layout = LatticeLayout::of(ty).unwrap();
        let [before, one, two] = [0, 1, 2].map(|sweeps| tiled(&layout, &rows, &factor, sweeps).2);
        for row in 0..rows.len() / n {
            // Sweeps go by the damped moment, losses are those of the moment itself.
            let falls = one[row] < before[row] && two[row] <= 1.02 * one[row];
            assert!(falls, "{ty}, row {row}: {before:?} {one:?} {two:?}");
        }
        let (sum, sum_before): (f64, f64) = (two.iter().sum(), before.iter().sum());
        assert!(sum < 0.97 * sum_before, "{ty}: {sum} after {sum_before}");
    }
}

#[test]
fn the_gradient_of_a_tile_leads_to_its_least_loss() {
    // An octet alone, with errors and gradient as of another rounding: what is wanted leaves no gradient.
    let n = 256;
    let factor = Factor::new(&moment(600, n, 10), 0.02).unwrap();
    let tile = &factor.tiles()[0];
    let descents = Descent::of_tile(tile);
    for (octet, descent) in descents.iter().enumerate() {
        let gradient: [f32; 8] = noise(8, octet as u64 + 1).try_into().unwrap();
        let step = descent.step(&gradient);
        for (i, gradient) in gradient.iter().enumerate() {
            let row = &tile[(8 * octet + i) * n + 8 * octet..][..8];
            let moved: f32 = row.iter().zip(&step).map(|(h, x)| h * x).sum();
            assert!((moved - gradient).abs() < 1e-3, "{octet}: {moved} for {gradient}");
        }
    }
}
