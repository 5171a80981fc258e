//! GELU as ggml's CPU backend computes it: looked up in a table of 16-bit floats.
//!
//! The table has an entry for every binary16 argument, `ggml_table_gelu_f16` of llama.cpp b10605
//! (`ggml/src/ggml-cpu/vec.h`); beyond 10 the function is 0 or its argument.

use std::sync::LazyLock;

use half::f16;

use super::math;
use super::pass::{Activations, Pass};

const EDGE: f32 = 10.0;

static TABLE: LazyLock<Vec<f32>> = LazyLock::new(|| {
    // In single precision, whose cancellation near -5 the table has. The tangent itself is taken from double precision,
    // which is the same on every machine.
    let tanh = |x: f32| f64::from(x).tanh() as f32;
    let gelu = |x: f32| 0.5 * x * (1.0 + tanh(0.797_884_6 * x * (1.0 + 0.044_715 * x * x)));
    (0..=u16::MAX).map(|bits| f16::from_f32(gelu(f16::from_bits(bits).to_f32())).to_f32()).collect()
});

impl Pass<'_, '_, '_> {
    /// `up[i] = gelu(gate[i]) * up[i]`, exact or as ggml runs it.
    pub(super) fn gelu_mul(&self, gate: &[f32], up: &mut [f32]) {
        if self.options.tabled_gelu || self.options.activations == Activations::Ggml {
            tabled_gelu_mul(gate, up);
        } else {
            math::gelu_mul(gate, up);
        }
    }
}

fn tabled_gelu_mul(gate: &[f32], up: &mut [f32]) {
    let table = &*TABLE;
    for (u, &g) in up.iter_mut().zip(gate) {
        *u *= if g <= -EDGE {
            0.0
        } else if g >= EDGE {
            g
        } else {
            table[usize::from(f16::from_f32(g).to_bits())]
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_gelu_in_sixteen_bits() {
        let gate: Vec<f32> = (-12_000..12_000).map(|i| i as f32 * 1e-3).collect();
        let (mut tabled, mut exact) = (vec![1.0; gate.len()], vec![1.0; gate.len()]);
        tabled_gelu_mul(&gate, &mut tabled);
        math::gelu_mul(&gate, &mut exact);
        for ((tabled, exact), g) in tabled.iter().zip(&exact).zip(&gate) {
            // The argument and the value are rounded to 11 bits each; the slope is at most 1.13.
            assert!(
                (tabled - exact).abs() <= g.abs() * 1.13 * 2f32.powi(-11) + exact.abs() * 2f32.powi(-11) + 2e-6,
                "{g}"
            );
        }
        assert_ne!(tabled, exact);
    }

    #[test]
    fn beyond_the_edges_nothing_is_looked_up() {
        let mut up = [3.0, 3.0, 3.0];
        tabled_gelu_mul(&[-10.0, 10.0, f32::NAN], &mut up);
        assert_eq!(up[..2], [0.0, 30.0]);
        assert!(up[2].is_nan());
    }
}
