//! Element-wise functions and row reductions of a transformer, in f32, with a fixed order of operations.
//!
//! Polynomials instead of libm calls, so that loops over rows vectorize; all reductions have a fixed number of
//! lanes, so that the result depends neither on the vector width nor on the number of threads.

use crate::vectorized::vectorized;

const LANES: usize = 16;

/// `e^x`, relative error below 2e-7 for -87.3 <= x <= 88.0; arguments outside are clamped to that range, NaN stays.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer held in the low mantissa bits
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let x = if x < -87.336_54 { -87.336_54 } else { x };
    let x = if x > 88.029_69 { 88.029_69 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + SHIFT;
    let n = shifted - SHIFT;
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    let mut p = 1.987_569_2e-4_f32;
    p = p * r + 1.398_2e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 0.166_666_65;
    p = p * r + 0.5;
    let y = (p * (r * r) + r) + 1.0;
    let exponent = (shifted.to_bits() as i32).wrapping_sub(SHIFT.to_bits() as i32);
    y * f32::from_bits((exponent.wrapping_add(127) << 23) as u32)
}

/// Hyperbolic tangent, relative error below 3e-7.
#[inline(always)]
pub(super) fn tanh(x: f32) -> f32 {
    let a = x.abs();
    let large = 1.0 - 2.0 / (exp(2.0 * a) + 1.0);
    let z = x * x;
    let mut p = -5.704_988_7e-3_f32;
    p = p * z + 2.063_909e-2;
    p = p * z - 5.373_971_6e-2;
    p = p * z + 0.133_314_42;
    p = p * z - 0.333_332_8;
    let small = a + a * (z * p);
    let magnitude = if a < 0.625 { small } else { large };
    magnitude.copysign(x)
}

/// Logistic function.
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `ln(1 + e^x)`; above 20 it is `x` to f32's precision, as in ggml.
pub(super) fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

vectorized! {
    /// `out[i] = e^(to - from[i])`: what is left of each after a decay, given sums of its logarithm.
    pub(super) fn decays(from: &[f64], to: f64, out: &mut [f32]) {
        for (o, &f) in out.iter_mut().zip(from) {
            *o = exp((to - f) as f32);
        }
    }
}

vectorized! {
    /// `up[i] = silu(gate[i]) * up[i]`.
    pub(super) fn silu_mul(gate: &[f32], up: &mut [f32]) {
        for (u, &g) in up.iter_mut().zip(gate) {
            *u *= g / (1.0 + exp(-g));
        }
    }
}

vectorized! {
    /// `x[i] = silu(x[i])`.
    pub(super) fn silu(x: &mut [f32]) {
        for v in x {
            *v /= 1.0 + exp(-*v);
        }
    }
}

vectorized! {
    /// `x[i] *= sigmoid(gate[i])`.
    pub(super) fn sigmoid_mul(gate: &[f32], x: &mut [f32]) {
        for (v, &g) in x.iter_mut().zip(gate) {
            *v *= sigmoid(g);
        }
    }
}

vectorized! {
    /// `up[i] = min(silu(gate[i]), limit) * up[i]`, with `up[i]` within `limit` of 0.
    pub(super) fn silu_clamped_mul(gate: &[f32], up: &mut [f32], limit: f32) {
        for (u, &g) in up.iter_mut().zip(gate) {
            let silu = g / (1.0 + exp(-g));
            let silu = if silu > limit { limit } else { silu };
            let linear = if *u > limit { limit } else { *u };
            let linear = if linear < -limit { -limit } else { linear };
            *u = silu * linear;
        }
    }
}

vectorized! {
    /// `up[i] = gelu(gate[i]) * up[i]` with the tanh form of GELU.
    pub(super) fn gelu_mul(gate: &[f32], up: &mut [f32]) {
        const SQRT_2_OVER_PI: f32 = 0.797_884_6;
        for (u, &g) in up.iter_mut().zip(gate) {
            *u *= 0.5 * g * (1.0 + tanh(SQRT_2_OVER_PI * g * (1.0 + 0.044_715 * g * g)));
        }
    }
}

vectorized! {
    /// The clamped SwiGLU of gpt-oss: `up[i] = g * sigmoid(1.702 g) * (u + 1)`, g at most 7, u within 7 of 0.
    pub(super) fn swiglu_oai_mul(gate: &[f32], up: &mut [f32]) {
        const ALPHA: f32 = 1.702;
        const LIMIT: f32 = 7.0;
        for (u, &g) in up.iter_mut().zip(gate) {
            let g = if g > LIMIT { LIMIT } else { g };
            let linear = if *u > LIMIT { LIMIT } else { *u };
            let linear = if linear < -LIMIT { -LIMIT } else { linear };
            *u = g / (1.0 + exp(-ALPHA * g)) * (linear + 1.0);
        }
    }
}

vectorized! {
    /// `x[i] = cap * tanh(x[i] / cap)`.
    pub(super) fn soft_cap(x: &mut [f32], cap: f32) {
        let inverse = 1.0 / cap;
        for v in x {
            *v = cap * tanh(*v * inverse);
        }
    }
}

vectorized! {
    /// Root-mean-square norm of one row: `out = x / sqrt(mean(x^2) + epsilon) * weight`, the mean in f64.
    pub(super) fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
        let scale = rms_scale(x, epsilon);
        for ((o, &v), &w) in out.iter_mut().zip(x).zip(weight) {
            *o = v * scale * w;
        }
    }
}

vectorized! {
    /// [`rms_norm`] of a row onto itself.
    pub(super) fn rms_norm_in_place(x: &mut [f32], weight: &[f32], epsilon: f32) {
        let scale = rms_scale(x, epsilon);
        for (v, &w) in x.iter_mut().zip(weight) {
            *v = *v * scale * w;
        }
    }
}

vectorized! {
    /// [`rms_norm_in_place`] with weights of one.
    pub(super) fn rms_unit(x: &mut [f32], epsilon: f32) {
        let scale = rms_scale(x, epsilon);
        for v in x {
            *v *= scale;
        }
    }
}

vectorized! {
    /// Divides a row by its Euclidean norm, or by `least` where that is larger.
    pub(super) fn l2_unit(x: &mut [f32], least: f32) {
        let norm = square_sum(x).sqrt() as f32;
        let scale = 1.0 / if norm > least { norm } else { least };
        for v in x {
            *v *= scale;
        }
    }
}

#[inline(always)]
pub(super) fn rms_scale(x: &[f32], epsilon: f32) -> f32 {
    let mean = (square_sum(x) / x.len() as f64) as f32;
    1.0 / (mean + epsilon).sqrt()
}

#[inline(always)]
pub(super) fn square_sum(x: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(v * v);
        }
    }
    for (lane, &v) in lanes.iter_mut().zip(rest) {
        *lane += f64::from(v * v);
    }
    lanes.iter().sum()
}

vectorized! {
    /// `x[i] += y[i]`.
    pub(super) fn add(x: &mut [f32], y: &[f32]) {
        for (a, &b) in x.iter_mut().zip(y) {
            *a += b;
        }
    }
}

vectorized! {
    /// `x[i] += y[i] * z[i]`.
    pub(super) fn add_product(x: &mut [f32], y: &[f32], z: &[f32]) {
        for ((a, &b), &c) in x.iter_mut().zip(y).zip(z) {
            *a += b * c;
        }
    }
}

vectorized! {
    /// `x[i] += scale * y[i]`.
    pub(super) fn add_scaled(x: &mut [f32], y: &[f32], scale: f32) {
        for (a, &b) in x.iter_mut().zip(y) {
            *a += scale * b;
        }
    }
}

vectorized! {
    /// `x[i] *= scale`.
    pub(super) fn scale(x: &mut [f32], scale: f32) {
        for v in x {
            *v *= scale;
        }
    }
}

vectorized! {
    /// Largest value of `x`, negative infinity when empty. NaN is ignored.
    pub(crate) fn max(x: &[f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let chunks = x.chunks_exact(LANES);
        let rest = chunks.remainder();
        for chunk in chunks {
            for (lane, &v) in lanes.iter_mut().zip(chunk) {
                *lane = if v > *lane { v } else { *lane };
            }
        }
        for (lane, &v) in lanes.iter_mut().zip(rest) {
            *lane = if v > *lane { v } else { *lane };
        }
        lanes.into_iter().fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a })
    }
}

vectorized! {
    /// Replaces `x[i]` by `exp(x[i] - shift)` and returns the sum.
    fn exp_sum_in_place(x: &mut [f32], shift: f32) -> f32 {
        let mut lanes = [0.0f32; LANES];
        let mut chunks = x.chunks_exact_mut(LANES);
        for chunk in chunks.by_ref() {
            for (lane, v) in lanes.iter_mut().zip(chunk) {
                *v = exp(*v - shift);
                *lane += *v;
            }
        }
        for (lane, v) in lanes.iter_mut().zip(chunks.into_remainder()) {
            *v = exp(*v - shift);
            *lane += *v;
        }
        lanes.iter().sum()
    }
}

vectorized! {
    /// `sum(exp(x[i] - shift))`, accumulated in f64.
    pub(crate) fn exp_sum(x: &[f32], shift: f32) -> f64 {
        let mut lanes = [0.0f64; LANES];
        let chunks = x.chunks_exact(LANES);
        let rest = chunks.remainder();
        for chunk in chunks {
            for (lane, &v) in lanes.iter_mut().zip(chunk) {
                *lane += f64::from(exp(v - shift));
            }
        }
        for (lane, &v) in lanes.iter_mut().zip(rest) {
            *lane += f64::from(exp(v - shift));
        }
        lanes.iter().sum()
    }
}

vectorized! {
    /// `sum(p[i] * (base[i] - other[i] - offset))` with `p[i] = exp(base[i] - base_lse)`, over the entries whose
    /// logarithm `base[i] - base_lse` is above `cut`; accumulated in f64.
    ///
    /// With `offset = base_lse - other_lse` this is the KL divergence of two rows of logits, in nats.
    pub(crate) fn divergence_sum(base: &[f32], base_lse: f32, other: &[f32], offset: f32, cut: f32) -> f64 {
        let mut lanes = [0.0f64; LANES];
        let term = |b: f32, o: f32| {
            let log_p = b - base_lse;
            let value = exp(log_p) * ((b - o) - offset);
            f64::from(if log_p > cut { value } else { 0.0 })
        };
        let (base_chunks, base_rest) = base.as_chunks::<LANES>();
        let (other_chunks, other_rest) = other.as_chunks::<LANES>();
        for (b, o) in base_chunks.iter().zip(other_chunks) {
            for (lane, (&b, &o)) in lanes.iter_mut().zip(b.iter().zip(o)) {
                *lane += term(b, o);
            }
        }
        for (lane, (&b, &o)) in lanes.iter_mut().zip(base_rest.iter().zip(other_rest)) {
            *lane += term(b, o);
        }
        lanes.iter().sum()
    }
}

vectorized! {
    /// True when no value is NaN or infinite.
    pub(super) fn all_finite(x: &[f32]) -> bool {
        const EXPONENT: u32 = 0x7f80_0000;
        let mut bad = 0u32;
        for v in x {
            bad |= u32::from(v.to_bits() & EXPONENT == EXPONENT);
        }
        bad == 0
    }
}

/// Softmax of `x` in place. `sink` takes part in the maximum and the sum but has no place in the output.
pub(super) fn soft_max(x: &mut [f32], sink: Option<f32>) {
    let mut shift = max(x);
    if let Some(sink) = sink {
        shift = shift.max(sink);
    }
    let mut sum = exp_sum_in_place(x, shift);
    if let Some(sink) = sink {
        sum += exp(sink - shift);
    }
    scale(x, 1.0 / sum);
}

/// `log(sum(exp(logits)))`: subtract it from a logit to get its log-probability.
pub(crate) fn log_sum_exp(logits: &[f32]) -> f64 {
    let shift = max(logits);
    f64::from(shift) + exp_sum(logits, shift).ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_over_its_range() {
        let mut worst = 0.0f64;
        for i in -87_000..88_000 {
            let x = i as f32 * 1e-3;
            let want = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - want).abs() / want);
        }
        assert!(worst < 2e-7, "{worst}");
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(f32::NEG_INFINITY) < 1e-37);
    }

    #[test]
    fn tanh_is_close_and_odd() {
        for i in -20_000..20_000 {
            let x = i as f32 * 1e-3;
            let want = f64::from(x).tanh();
            assert!((f64::from(tanh(x)) - want).abs() <= 3e-7 * want.abs().max(1e-30), "{x}");
        }
        assert!(tanh(f32::NAN).is_nan());
    }

    #[test]
    fn soft_max_with_sink_leaves_its_share_out() {
        let mut x = [1.0, 2.0];
        soft_max(&mut x, Some(2.0));
        let total = 1f32.exp() + 2.0 * 2f32.exp();
        assert!((x[0] - 1f32.exp() / total).abs() < 1e-6);
        assert!((x[1] - 2f32.exp() / total).abs() < 1e-6);
    }

    #[test]
    fn divergence_follows_the_definition_and_is_zero_of_itself() {
        let a: Vec<f32> = (0..37).map(|i| ((i * 31) % 17) as f32 * 0.5 - 3.0).collect();
        let b: Vec<f32> = a.iter().enumerate().map(|(i, v)| v + (i % 5) as f32 * 0.1).collect();
        let lse = |x: &[f32]| x.iter().map(|v| f64::from(*v).exp()).sum::<f64>().ln();
        let (lse_a, lse_b) = (lse(&a), lse(&b));
        let want: f64 = a
            .iter()
            .zip(&b)
            .map(|(&a, &b)| {
                let (log_a, log_b) = (f64::from(a) - lse_a, f64::from(b) - lse_b);
                log_a.exp() * (log_a - log_b)
            })
            .sum();
        let got = divergence_sum(&a, lse_a as f32, &b, (lse_a - lse_b) as f32, f32::NEG_INFINITY);
        assert!((got - want).abs() < 1e-6, "{got} {want}");
        assert_eq!(divergence_sum(&a, lse_a as f32, &a, 0.0, f32::NEG_INFINITY), 0.0);
        assert_eq!(divergence_sum(&a, lse_a as f32, &b, 0.5, 0.0), 0.0);
    }

    #[test]
    fn non_finite_values_are_found_anywhere() {
        let mut x = vec![1.0f32; 37];
        assert!(all_finite(&x));
        x[36] = f32::NAN;
        assert!(!all_finite(&x));
        x[36] = 0.0;
        x[3] = f32::NEG_INFINITY;
        assert!(!all_finite(&x));
    }
}
