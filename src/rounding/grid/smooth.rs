//! Large inputs moved into the weights, for matrices whose inputs are rounded as well.
//!
//! An input that is a hundred times as large as the others sets the step that a whole token is rounded with. Divided by a
//! factor, with the weights of its column multiplied by the same, it leaves the product as it was and the rounding better
//! (SmoothQuant, Xiao et al., arXiv 2211.10438). Factors are powers of two here, so that a norm before the matrices takes
//! them up without any rounding.

use super::{Layout, plain};
use crate::compute::{GemmOperand, gemm_f32};
use crate::rounding::gptq::{Nearest, Whole};

/// Shares of the inputs' largest magnitudes in the factors that are tried; the weights' have the rest.
const STRENGTHS: [f32; 5] = [0.35, 0.45, 0.55, 0.65, 0.8];

/// Largest exponent of a factor, in both directions.
const MOST: f32 = 8.0;

/// An error that is not below this part of that without factors is not worth them: other text may tell otherwise.
const WORTH: f64 = 0.97;

/// Half of the inputs give the factors, half judge them; fewer than this do neither.
const LEAST_INPUTS: usize = 32;

/// Exponents `e` for the columns of matrices that share an input: its values are to be divided by `2^e`, weights multiplied
/// with it. `None` where no factors make the products, of weights in `layout` and inputs in 8-bit whole numbers with a scale
/// a token, clearly better.
///
/// `weights` are rows `[.., n]` of the matrices, `inputs` rows `[tokens, n]` that they are multiplied with.
///
/// # Panics
/// When one of the two is not whole rows.
#[doc(alias = "SmoothQuant")]
pub fn smooth(layout: Layout, weights: &[f32], inputs: &[f32], n: usize) -> Option<Vec<i8>> {
    assert!(weights.len().is_multiple_of(n) && inputs.len().is_multiple_of(n), "rows of {n}");
    if weights.is_empty() || inputs.len() / n < LEAST_INPUTS {
        return None;
    }
    // Every other input, since neighbours are alike.
    let of_half =
        |first: usize| -> Vec<f32> { inputs.chunks_exact(n).skip(first).step_by(2).flatten().copied().collect() };
    let (shown, judged) = (of_half(0), of_half(1));
    let (of_inputs, of_weights) = (largest(&shown, n), largest(weights, n));
    let exact = products(&judged, weights, n);
    let error = |exponents: &[i8]| -> f64 {
        let scaled = |rows: &[f32], sign: i32| -> Vec<f32> {
            let by: Vec<f32> = exponents.iter().map(|e| 2f32.powi(sign * i32::from(*e))).collect();
            rows.chunks_exact(n).flat_map(|row| row.iter().zip(&by).map(|(value, by)| value * by)).collect()
        };
        let rows = weights.len() / n;
        let rounded = plain(layout, &scaled(weights, 1), rows, n, None);
        let inputs = rounded_tokens(&scaled(&judged, -1), n);
        let found = products(&inputs, &layout.dequantize(&rounded, rows, n), n);
        found.iter().zip(&exact).map(|(found, exact)| f64::from(found - exact).powi(2)).sum()
    };
    let without = error(&vec![0; n]);
    let candidates = STRENGTHS.map(|strength| {
        let exponents = exponents(&of_inputs, &of_weights, strength);
        (error(&exponents), exponents)
    });
    let best = candidates.into_iter().min_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 < WORTH * without && best.1.iter().any(|e| *e != 0)).then_some(best.1)
}

/// Largest magnitude in each column.
fn largest(rows: &[f32], n: usize) -> Vec<f32> {
    rows.chunks_exact(n).fold(vec![0.0; n], |mut largest, row| {
        largest.iter_mut().zip(row).for_each(|(largest, value)| *largest = largest.max(value.abs()));
        largest
    })
}

/// `log2(inputs^strength / weights^(1 - strength))`, with a mean of zero, to whole numbers.
fn exponents(inputs: &[f32], weights: &[f32], strength: f32) -> Vec<i8> {
    let wanted = |(x, w): (&f32, &f32)| {
        let exponent = strength * x.log2() - (1.0 - strength) * w.log2();
        exponent.is_finite().then_some(exponent)
    };
    let wanted: Vec<Option<f32>> = inputs.iter().zip(weights).map(wanted).collect();
    let count = wanted.iter().flatten().count().max(1);
    let mean = wanted.iter().flatten().sum::<f32>() / count as f32;
    wanted.iter().map(|e| e.map_or(0, |e| (e - mean).round_ties_even().clamp(-MOST, MOST) as i8)).collect()
}

/// Rows as 8-bit whole numbers with a scale a row, as vLLM rounds the inputs of W8A8.
fn rounded_tokens(rows: &[f32], n: usize) -> Vec<f32> {
    const BYTE: Whole = Whole { lowest: -128.0, highest: 127.0 };
    let mut rounded = rows.to_vec();
    for row in rounded.chunks_exact_mut(n) {
        let step = row.iter().fold(0.0f32, |peak, value| peak.max(value.abs())) / 127.5;
        if step > 0.0 {
            row.iter_mut().for_each(|value| *value = step * BYTE.nearest(*value / step));
        }
    }
    rounded
}

/// Products of all rows of `inputs` with all rows of `weights`.
fn products(inputs: &[f32], weights: &[f32], n: usize) -> Vec<f32> {
    let (tokens, rows) = (inputs.len() / n, weights.len() / n);
    let mut products = vec![0.0; tokens * rows];
    let transposed = GemmOperand::Transposed { data: weights, stride: n };
    gemm_f32(tokens, rows, n, inputs, n, transposed, &mut products, rows, false);
    products
}

#[cfg(test)]
mod tests {
    use super::super::{Grid, Groups, ScaleType};
    use super::*;
    use crate::rounding::gptq::tests::noise;

    const W8: Layout =
        Layout { grid: Grid::Int { bits: 8, symmetric: true }, groups: Groups::Channel, scale_type: ScaleType::Bf16 };

    #[test]
    fn large_inputs_move_into_the_weights() {
        let n = 64;
        let weights = noise(96 * n, 1);
        let mut inputs = noise(128 * n, 2);
        inputs.iter_mut().skip(5).step_by(n).for_each(|x| *x *= 200.0);
        let exponents = smooth(W8, &weights, &inputs, n).unwrap();
        assert!(exponents.iter().enumerate().all(|(at, e)| at == 5 || *e <= 1), "{exponents:?}");
        assert!(exponents[5] >= 3, "{exponents:?}");
    }

    #[test]
    fn even_inputs_stay_as_they_are() {
        let n = 64;
        assert_eq!(smooth(W8, &noise(96 * n, 1), &noise(128 * n, 2), n), None);
        assert_eq!(smooth(W8, &noise(96 * n, 1), &noise(8 * n, 2), n), None);
        assert_eq!(smooth(W8, &[], &noise(128 * n, 2), n), None);
    }

    #[test]
    fn dead_columns_get_no_factor() {
        assert_eq!(exponents(&[0.0, 4.0, 1.0], &[1.0, 1.0, 1.0], 0.5), [0, 0, 0]);
        assert_eq!(exponents(&[1.0, 1e30, 1.0, 1e-30], &[1.0, 1e-30, 1.0, 1e30], 0.5), [0, 8, 0, -8]);
    }
}
