//! Derivatives of the element-wise functions and row reductions in [`math`](crate::model::math), in f32, with a fixed order of
//! operations.
//!
//! Each takes what the function saw and the gradient at what it gave, and leaves the gradient at what it saw.

use crate::model::math::{exp, rms_scale, sigmoid, square_sum, tanh};
use crate::vectorized::vectorized;

const LANES: usize = 16;

vectorized! {
    /// Of `silu(gate) * up`: `gate` and `up` become their gradients, `d` is that of the product.
    pub(super) fn silu_mul(gate: &mut [f32], up: &mut [f32], d: &[f32]) {
        for ((g, u), &d) in gate.iter_mut().zip(up).zip(d) {
            let s = sigmoid(*g);
            let value = *g * s;
            let slope = s * (1.0 + *g * (1.0 - s));
            *g = d * *u * slope;
            *u = d * value;
        }
    }
}

vectorized! {
    /// Of `min(silu(gate), limit) * up` with `up` within `limit` of 0, in the same way. What is cut off has no gradient.
    pub(super) fn silu_clamped_mul(gate: &mut [f32], up: &mut [f32], d: &[f32], limit: f32) {
        for ((g, u), &d) in gate.iter_mut().zip(up).zip(d) {
            let s = sigmoid(*g);
            let silu = *g * s;
            let slope = s * (1.0 + *g * (1.0 - s));
            let (value, slope) = if silu > limit { (limit, 0.0) } else { (silu, slope) };
            let linear = if *u > limit { limit } else { *u };
            let linear = if linear < -limit { -limit } else { linear };
            let passes = if linear == *u { 1.0 } else { 0.0 };
            *g = d * linear * slope;
            *u = d * value * passes;
        }
    }
}

vectorized! {
    /// Of `gelu(gate) * up`, tanh form, in the same way.
    pub(super) fn gelu_mul(gate: &mut [f32], up: &mut [f32], d: &[f32]) {
        const SQRT_2_OVER_PI: f32 = 0.797_884_6;
        for ((g, u), &d) in gate.iter_mut().zip(up).zip(d) {
            let x = *g;
            let t = tanh(SQRT_2_OVER_PI * x * (1.0 + 0.044_715 * x * x));
            let inner = SQRT_2_OVER_PI * (1.0 + 0.134_145 * x * x);
            let slope = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner;
            *g = d * *u * slope;
            *u = d * (0.5 * x * (1.0 + t));
        }
    }
}

vectorized! {
    /// Of gpt-oss's `g * sigmoid(1.702 g) * (u + 1)`, g at most 7, u within 7 of 0, in the same way.
    pub(super) fn swiglu_oai_mul(gate: &mut [f32], up: &mut [f32], d: &[f32]) {
        const ALPHA: f32 = 1.702;
        const LIMIT: f32 = 7.0;
        for ((gate, up), &d) in gate.iter_mut().zip(up).zip(d) {
            let g = if *gate > LIMIT { LIMIT } else { *gate };
            let u = if *up > LIMIT { LIMIT } else { *up };
            let u = if u < -LIMIT { -LIMIT } else { u };
            let s = sigmoid(ALPHA * g);
            let slope = s * (1.0 + ALPHA * g * (1.0 - s));
            let gate_passes = if g == *gate { 1.0 } else { 0.0 };
            let up_passes = if u == *up { 1.0 } else { 0.0 };
            *gate = d * (u + 1.0) * slope * gate_passes;
            *up = d * (g * s) * up_passes;
        }
    }
}

vectorized! {
    /// Of `silu(x)`: multiplies `d` by its slope at `x`.
    pub(super) fn silu(x: &[f32], d: &mut [f32]) {
        for (d, &x) in d.iter_mut().zip(x) {
            let s = sigmoid(x);
            *d *= s * (1.0 + x * (1.0 - s));
        }
    }
}

vectorized! {
    /// Of `sigmoid(gate) * x`: `gate` becomes its gradient, and `d` that of `x`.
    pub(super) fn sigmoid_mul(gate: &mut [f32], x: &[f32], d: &mut [f32]) {
        for ((g, &x), d) in gate.iter_mut().zip(x).zip(d) {
            let s = sigmoid(*g);
            *g = *d * x * (s * (1.0 - s));
            *d *= s;
        }
    }
}

vectorized! {
    /// Of `capped = cap * tanh(x / cap)`: multiplies `d` by the slope.
    pub(super) fn soft_cap(capped: &[f32], d: &mut [f32], cap: f32) {
        let inverse = 1.0 / cap;
        for (d, &y) in d.iter_mut().zip(capped) {
            let t = y * inverse;
            *d *= 1.0 - t * t;
        }
    }
}

vectorized! {
    /// Of the root-mean-square norm of a row without weights: `d` becomes the gradient at `x`.
    pub(super) fn rms_unit(x: &[f32], epsilon: f32, d: &mut [f32]) {
        let scale = rms_scale(x, epsilon);
        // The part of the gradient along the row, which the norm takes away.
        let along = (dot_lanes(x, d) / x.len() as f64) as f32 * scale * scale;
        for (d, &x) in d.iter_mut().zip(x) {
            *d = scale * (*d - along * x);
        }
    }
}

vectorized! {
    /// Of the root-mean-square norm of a row with weights.
    pub(super) fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, d: &mut [f32]) {
        for (d, &w) in d.iter_mut().zip(weight) {
            *d *= w;
        }
        let scale = rms_scale(x, epsilon);
        let along = (dot_lanes(x, d) / x.len() as f64) as f32 * scale * scale;
        for (d, &x) in d.iter_mut().zip(x) {
            *d = scale * (*d - along * x);
        }
    }
}

vectorized! {
    /// Of the division of a row by its Euclidean norm, or by `least` where that is larger.
    pub(super) fn l2_unit(x: &[f32], least: f32, d: &mut [f32]) {
        let norm = square_sum(x).sqrt() as f32;
        let (norm, along) =
            if norm > least { (norm, (dot_lanes(x, d) / square_sum(x)) as f32) } else { (least, 0.0) };
        let scale = 1.0 / norm;
        for (d, &x) in d.iter_mut().zip(x) {
            *d = scale * (*d - along * x);
        }
    }
}

vectorized! {
    /// Of a softmax that gave `p`: `d` becomes the gradient at what it was taken of. What takes part without a place in the
    /// output changes nothing.
    pub(super) fn soft_max(p: &[f32], d: &mut [f32]) {
        let mean = dot_lanes(p, d) as f32;
        for (d, &p) in d.iter_mut().zip(p) {
            *d = p * (*d - mean);
        }
    }
}

vectorized! {
    /// `sum(x[i] * y[i])`, products in f32, their sum in f64.
    pub(super) fn dot(x: &[f32], y: &[f32]) -> f64 {
        dot_lanes(x, y)
    }
}

#[inline(always)]
fn dot_lanes(x: &[f32], y: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let ((x_chunks, x_rest), (y_chunks, y_rest)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    for (x, y) in x_chunks.iter().zip(y_chunks) {
        for (lane, (&x, &y)) in lanes.iter_mut().zip(x.iter().zip(y)) {
            *lane += f64::from(x * y);
        }
    }
    for (lane, (&x, &y)) in lanes.iter_mut().zip(x_rest.iter().zip(y_rest)) {
        *lane += f64::from(x * y);
    }
    lanes.iter().sum()
}

vectorized! {
    /// Probabilities from logits whose largest is `shift` and the sum of whose exponentials, less that, is `sum`.
    pub(super) fn probabilities(logits: &mut [f32], shift: f32, sum: f64) {
        let scale = (1.0 / sum) as f32;
        for x in logits {
            *x = exp(*x - shift) * scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::math;
    use crate::testing::Random;

    /// Compares a derivative, given as the gradient at each input of `sum(c * function(inputs))`, with central differences.
    fn check(
        name: &str,
        inputs: &[f32],
        function: impl Fn(&[f32]) -> Vec<f32>,
        gradient: impl Fn(&[f32], &[f32]) -> Vec<f32>,
    ) {
        let mut random = Random::new(9);
        let c: Vec<f32> = function(inputs).iter().map(|_| random.signed()).collect();
        let loss = |x: &[f32]| -> f64 { function(x).iter().zip(&c).map(|(y, c)| f64::from(*y) * f64::from(*c)).sum() };
        let found = gradient(inputs, &c);
        assert_eq!(found.len(), inputs.len());
        for (i, found) in found.iter().enumerate() {
            let step = 4e-3;
            let moved = |by: f32| {
                let mut x = inputs.to_vec();
                x[i] += by;
                (loss(&x), f64::from(x[i]))
            };
            let ((above, to), (below, from)) = (moved(step), moved(-step));
            let expected = (above - below) / (to - from);
            assert!(
                (f64::from(*found) - expected).abs() < 1e-3 * (1.0 + expected.abs()),
                "{name} {i}: {found} {expected}"
            );
        }
    }

    fn values(n: usize, seed: u64, scale: f32) -> Vec<f32> {
        let mut random = Random::new(seed);
        (0..n).map(|_| scale * random.signed()).collect()
    }

    type Gated = fn(&[f32], &mut [f32]);
    type GatedBack = fn(&mut [f32], &mut [f32], &[f32]);

    #[test]
    fn gated_products_have_the_slopes_of_their_functions() {
        let table: [(&str, Gated, GatedBack); 4] = [
            ("silu", math::silu_mul, silu_mul),
            ("gelu", math::gelu_mul, gelu_mul),
            ("swiglu_oai", math::swiglu_oai_mul, swiglu_oai_mul),
            ("silu clamped", |g, u| math::silu_clamped_mul(g, u, 1.5), |g, u, d| silu_clamped_mul(g, u, d, 1.5)),
        ];
        for (name, forward, back) in table {
            // Some of them beyond every limit; none so close to one that a difference would straddle it.
            let inputs: Vec<f32> = values(74, 1, 8.5).into_iter().filter(|x| (x.abs() - 7.0).abs() > 0.02).collect();
            let inputs = &inputs[..inputs.len() / 2 * 2];
            let n = inputs.len() / 2;
            let function = |x: &[f32]| {
                let mut up = x[n..].to_vec();
                forward(&x[..n], &mut up);
                up
            };
            let gradient = |x: &[f32], c: &[f32]| {
                let (mut gate, mut up) = (x[..n].to_vec(), x[n..].to_vec());
                back(&mut gate, &mut up, c);
                [gate, up].concat()
            };
            check(name, inputs, function, gradient);
        }
    }

    #[test]
    fn norms_take_away_what_lies_along_the_row() {
        let (x, w) = (values(37, 2, 2.0), values(37, 3, 1.5));
        let of_row = |name: &str, there: &dyn Fn(&mut [f32]), back: &dyn Fn(&[f32], &mut [f32])| {
            let function = |x: &[f32]| {
                let mut y = x.to_vec();
                there(&mut y);
                y
            };
            let gradient = |x: &[f32], c: &[f32]| {
                let mut d = c.to_vec();
                back(x, &mut d);
                d
            };
            check(name, &x, function, gradient);
        };
        of_row("rms", &|y| math::rms_norm_in_place(y, &w, 1e-3), &|x, d| rms_norm(x, &w, 1e-3, d));
        of_row("unit", &|y| math::rms_unit(y, 1e-3), &|x, d| rms_unit(x, 1e-3, d));
        for least in [1e-6, 50.0] {
            of_row("l2", &|y| math::l2_unit(y, least), &|x, d| l2_unit(x, least, d));
        }
        of_row("silu", &|y| math::silu(y), &|x, d| silu(x, d));
    }

    #[test]
    fn softmax_caps_and_sigmoids_have_their_slopes() {
        let x = values(19, 4, 2.0);
        for sink in [None, Some(0.7)] {
            let function = |x: &[f32]| {
                let mut p = x.to_vec();
                math::soft_max(&mut p, sink);
                p
            };
            check("softmax", &x, function, |x, c| {
                let (p, mut d) = (function(x), c.to_vec());
                soft_max(&p, &mut d);
                d
            });
        }
        let capped = |x: &[f32]| {
            let mut y = x.to_vec();
            math::soft_cap(&mut y, 1.5);
            y
        };
        check("cap", &x, capped, |x, c| {
            let mut d = c.to_vec();
            soft_cap(&capped(x), &mut d, 1.5);
            d
        });
        let both = values(18, 5, 3.0);
        let gated = |x: &[f32]| {
            let mut y = x[9..].to_vec();
            math::sigmoid_mul(&x[..9], &mut y);
            y
        };
        check("sigmoid", &both, gated, |x, c| {
            let (mut gate, mut d) = (x[..9].to_vec(), c.to_vec());
            sigmoid_mul(&mut gate, &x[9..], &mut d);
            [gate, d].concat()
        });
    }
}
