//! Which type a row gets whose length the intended type's block does not divide.

use crate::gguf::TensorType;

/// The result of fitting a type to a row length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fit {
    /// A type whose block divides the row.
    pub ty: TensorType,
    /// The intended type, where it is another one.
    pub from: Option<TensorType>,
    /// True where llama-quantize gives up instead: it has no substitute for this type.
    pub beyond_reference: bool,
}

/// Intended type → the type with a shorter block that takes its place (`tensor_type_fallback`).
const SUBSTITUTES: &[(TensorType, TensorType)] = &[
    (TensorType::IQ1_S, TensorType::IQ4_NL),
    (TensorType::IQ1_M, TensorType::IQ4_NL),
    (TensorType::IQ2_XXS, TensorType::IQ4_NL),
    (TensorType::IQ2_XS, TensorType::IQ4_NL),
    (TensorType::IQ2_S, TensorType::IQ4_NL),
    (TensorType::IQ3_XXS, TensorType::IQ4_NL),
    (TensorType::IQ3_S, TensorType::IQ4_NL),
    (TensorType::IQ4_XS, TensorType::IQ4_NL),
    (TensorType::Q2_0, TensorType::Q4_0),
    (TensorType::Q2_K, TensorType::Q4_0),
    (TensorType::Q3_K, TensorType::Q4_0),
    (TensorType::TQ1_0, TensorType::Q4_0),
    (TensorType::TQ2_0, TensorType::Q4_0),
    (TensorType::Q4_K, TensorType::Q5_0),
    (TensorType::Q5_K, TensorType::Q5_1),
    (TensorType::Q6_K, TensorType::Q8_0),
];

/// The same for types that llama-quantize has no substitute for and stops at.
const FURTHER_SUBSTITUTES: &[(TensorType, TensorType)] =
    &[(TensorType::Q1_0, TensorType::Q4_0), (TensorType::NVFP4, TensorType::MXFP4)];

fn divides(ty: TensorType, row_len: u64) -> bool {
    ty.info().is_some_and(|info| row_len.is_multiple_of(info.block_len as u64))
}

/// The type of 16 bits that holds the weights of a source of this type: what is used where no block fits.
pub(crate) fn half_type(source: TensorType) -> TensorType {
    // Of bfloat16's range float16 has only the middle.
    if source == TensorType::BF16 { TensorType::BF16 } else { TensorType::F16 }
}

/// Fits `ty` to rows of `row_len` weights of type `source`: the type itself, its substitute, or one of 16 bits where
/// neither fits.
pub(crate) fn fit(ty: TensorType, row_len: u64, source: TensorType) -> Fit {
    if divides(ty, row_len) {
        return Fit { ty, from: None, beyond_reference: false };
    }
    let look_up = |table: &[(TensorType, TensorType)]| table.iter().find(|row| row.0 == ty).map(|row| row.1);
    let known = look_up(SUBSTITUTES);
    let substitute = known.or_else(|| look_up(FURTHER_SUBSTITUTES)).filter(|&other| divides(other, row_len));
    Fit { ty: substitute.unwrap_or(half_type(source)), from: Some(ty), beyond_reference: known.is_none() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::TENSOR_TYPES;

    #[test]
    fn whatever_comes_out_fits_the_row() {
        for info in TENSOR_TYPES {
            for row_len in [1, 31, 32, 64, 96, 100, 128, 255, 256, 576, 1152, 4096] {
                let fit = fit(info.ty, row_len, TensorType::F32);
                assert!(divides(fit.ty, row_len), "{} in rows of {row_len}", info.name);
                assert_eq!(fit.from.is_none(), divides(info.ty, row_len));
                assert!(fit.from.is_none() || fit.ty != info.ty);
            }
        }
    }

    #[test]
    fn known_substitutes() {
        assert_eq!(fit(TensorType::Q4_K, 576, TensorType::F16).ty, TensorType::Q5_0);
        assert_eq!(fit(TensorType::IQ2_XXS, 576, TensorType::F16).ty, TensorType::IQ4_NL);
        assert_eq!(fit(TensorType::Q6_K, 100, TensorType::F16).ty, TensorType::F16);
        assert_eq!(
            fit(TensorType::Q4_K, 768, TensorType::F16),
            Fit { ty: TensorType::Q4_K, from: None, beyond_reference: false }
        );
        assert!(fit(TensorType::Q8_0, 100, TensorType::F16).beyond_reference);
        assert!(fit(TensorType::Q1_0, 576, TensorType::F16).beyond_reference);
        assert_eq!(fit(TensorType::Q1_0, 576, TensorType::F16).ty, TensorType::Q4_0);
        assert_eq!(fit(TensorType::Q6_K, 100, TensorType::F32).ty, TensorType::F16);
        assert_eq!(fit(TensorType::Q6_K, 100, TensorType::BF16).ty, TensorType::BF16);
        assert_eq!(fit(TensorType::Q6_K, 96, TensorType::BF16).ty, TensorType::Q8_0);
    }
}
