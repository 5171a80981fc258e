//! Weights that are sound but too large for the type that they are to have.

use std::fmt;

use crate::gguf::{TensorInfo, TensorType};
use crate::quant::QuantError;

/// A weight that is too large for a type.
#[derive(Clone, Debug, PartialEq)]
pub struct Overflow {
    /// The tensor's name, quoted and escaped.
    tensor: String,
    /// Its row, counted over all matrices of the tensor.
    row: u64,
    /// The weight, the largest of its block.
    value: f32,
    target: TensorType,
    /// A type that holds it.
    advice: TensorType,
}

impl Overflow {
    /// From the answer of [`quant::validate`](crate::quant::validate) to `rows`, the first of which is number `first_row`.
    pub(crate) fn new(
        tensor: &TensorInfo,
        first_row: u64,
        rows: &[f32],
        target: TensorType,
        error: &QuantError,
    ) -> Overflow {
        let block_len = target.info().map_or(1, |info| info.block_len.max(1));
        let start = match error {
            QuantError::NonFinite { block, .. } => block.saturating_mul(block_len).min(rows.len()),
            _ => 0,
        };
        let block = &rows[start..rows.len().min(start + block_len)];
        let value = block.iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap_or_default();
        let row = first_row + start as u64 / tensor.row_len().max(1);
        // Bfloat16 has the range of 32-bit floats but for a last step.
        let advice = if target == TensorType::BF16 { TensorType::F32 } else { TensorType::BF16 };
        Overflow { tensor: tensor.shown_name(), row, value, target, advice }
    }
}

impl fmt::Display for Overflow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Overflow { tensor, row, value, target, advice } = self;
        let limit = if *target == TensorType::F16 { ", whose largest number is 65504" } else { "" };
        write!(
            f,
            "tensor {tensor}, row {row}: weight {value} is too large for {target}{limit}; give the tensor a type with a \
             wider range, such as --tensor-type PATTERN={advice}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant;

    #[test]
    fn the_row_and_the_weight_are_those_of_the_block() {
        let tensor = |ty| TensorInfo { name: "w".to_owned(), shape: vec![64, 4], ty, offset: 0, bytes: None, shard: 0 };
        let mut rows = vec![1.0_f32; 128];
        rows[100] = -9e6;
        rows[101] = 6e6;
        for (ty, text) in [
            (TensorType::F16, "row 8: weight -9000000 is too large for f16, whose largest number is 65504"),
            (TensorType::Q8_0, "row 8: weight -9000000 is too large for q8_0;"),
        ] {
            let mut encoded = vec![0; 2 * ty.info().unwrap().row_bytes(64).unwrap() as usize];
            quant::quantize_rows(ty, &rows, 64, None, &mut encoded).unwrap();
            let error = quant::validate(ty, &encoded).unwrap_err();
            let line = Overflow::new(&tensor(ty), 7, &rows, ty, &error).to_string();
            assert!(line.contains(text) && line.contains("=bf16") && !line.contains("damaged"), "{line}");
        }
    }
}
