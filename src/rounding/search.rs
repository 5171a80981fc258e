//! Rounding that knows the importance of columns and nothing else.

use super::gptq::{search_rows, supports_search};
use crate::gguf::TensorType;
use crate::quant::{self, QuantError};

/// Rounds rows by search, or as ggml does where the type has no search or it leads out of the type's range. The arguments
/// are those of [`quant::quantize_rows`].
///
/// # Errors
/// Those of [`quant::quantize_rows`].
pub fn round_by_search(
    ty: TensorType,
    weights: &[f32],
    row_len: usize,
    importance: Option<&[f32]>,
    out: &mut [u8],
) -> Result<(), QuantError> {
    let found = supports_search(ty)
        && search_rows(ty, weights, row_len, importance, out).is_ok()
        && quant::validate(ty, out).is_ok();
    if found { Ok(()) } else { quant::quantize_rows(ty, weights, row_len, importance, out) }
}
