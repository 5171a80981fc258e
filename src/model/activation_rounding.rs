//! Rounding of activations as ggml's CPU backend does before a product.
//!
//! ggml converts the input rows of a product to a type that its dot product with the weight's type reads
//! (`vec_dot_type` of llama.cpp b10605, `ggml/src/ggml-cpu/ggml-cpu.c`): blocks of 32 or 256 eight-bit integers, or
//! 16-bit floats.

use half::{bf16, f16};

use crate::compute::{Steps, round_to_steps};
use crate::gguf::TensorType;
use crate::vectorized::vectorized;

/// What happens to the input rows of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum ActivationRounding {
    /// Nothing: f32 as it is.
    None,
    /// Rounded to binary16.
    F16,
    /// Rounded to bfloat16.
    Bf16,
    /// Blocks of 32 eight-bit integers with a binary16 scale (Q8_0; also Q8_1, whose second figure, a block sum
    /// rounded to binary16 for the minima of Q4_1 and Q5_1, has no counterpart here).
    Q8,
    /// Blocks of 256 eight-bit integers with an f32 scale (Q8_K).
    Q8K,
}

impl ActivationRounding {
    /// The rounding that belongs to weights of type `ty`.
    pub(super) fn of_weight(ty: TensorType) -> Self {
        match ty {
            TensorType::F32 => ActivationRounding::None,
            TensorType::F16 => ActivationRounding::F16,
            TensorType::BF16 => ActivationRounding::Bf16,
            _ if ty.info().is_some_and(|info| info.block_len == 256) => ActivationRounding::Q8K,
            _ => ActivationRounding::Q8,
        }
    }

    /// The steps of roundings to integers.
    pub(super) fn steps(self) -> Option<Steps> {
        match self {
            ActivationRounding::Q8 => Some(Steps::Of32),
            ActivationRounding::Q8K => Some(Steps::Of256),
            ActivationRounding::None | ActivationRounding::F16 | ActivationRounding::Bf16 => None,
        }
    }

    /// Rounds one row in place.
    pub(super) fn apply(self, row: &mut [f32]) {
        match self {
            ActivationRounding::None => {}
            ActivationRounding::F16 => round_row_f16(row),
            ActivationRounding::Bf16 => row.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32()),
            ActivationRounding::Q8 => round_to_steps(row, Steps::Of32),
            ActivationRounding::Q8K => round_to_steps(row, Steps::Of256),
        }
    }
}

vectorized! {
    fn round_row_f16(row: &mut [f32]) {
        for v in row {
            *v = f16::from_f32(*v).to_f32();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_roundings_keep_the_largest_value_and_err_by_half_a_step() {
        let row: Vec<f32> = (0..256).map(|i| ((i * 37) % 101) as f32 - 50.0).collect();
        for (rounding, step) in [(ActivationRounding::Q8, 50.0 / 127.0), (ActivationRounding::Q8K, 50.0 / 127.0)] {
            let mut rounded = row.clone();
            rounding.apply(&mut rounded);
            for (a, b) in row.iter().zip(&rounded) {
                assert!((a - b).abs() <= step * 0.51 + 0.03, "{a} {b}");
            }
        }
        let mut zeros = vec![0.0; 256];
        ActivationRounding::Q8K.apply(&mut zeros);
        ActivationRounding::Q8.apply(&mut zeros);
        assert!(zeros.iter().all(|v| *v == 0.0));
    }

    #[test]
    fn types_map_to_the_dot_product_type_of_ggml() {
        assert_eq!(ActivationRounding::of_weight(TensorType::Q4_0), ActivationRounding::Q8);
        assert_eq!(ActivationRounding::of_weight(TensorType::MXFP4), ActivationRounding::Q8);
        assert_eq!(ActivationRounding::of_weight(TensorType::IQ2_XXS), ActivationRounding::Q8K);
        assert_eq!(ActivationRounding::of_weight(TensorType::BF16), ActivationRounding::Bf16);
        assert_eq!(ActivationRounding::of_weight(TensorType::F32), ActivationRounding::None);
    }
}
