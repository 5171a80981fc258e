//! A tensor that is to be measured.

use super::fits_row;
use crate::gguf::{TensorInfo, TensorType};
use crate::quant;
use crate::recipe::candidates::tried_types;

/// Types that probes round to, where they fit: the first is used unless a plan asks for another.
const PROBE_TYPES: [TensorType; 3] = [TensorType::Q3_K, TensorType::Q4_0, TensorType::Q8_0];

/// A tensor that a plan chooses a type for.
pub struct MeasuredTensor<'a> {
    /// The tensor.
    pub tensor: &'a TensorInfo,
    /// Types whose error is measured.
    pub types: Vec<TensorType>,
    /// Types that a probe rounds it to.
    pub probe_types: Vec<TensorType>,
    /// Column weights, `[matrices, row_len]`.
    pub importance: Option<&'a [f32]>,
    /// Factors of its rows in the error.
    pub row_factors: Option<Vec<f64>>,
}

impl<'a> MeasuredTensor<'a> {
    /// A tensor with the types that a plan may give it; those that need importance only where there is some.
    pub fn new(
        tensor: &'a TensorInfo,
        importance: Option<&'a [f32]>,
        row_factors: Option<Vec<f64>>,
    ) -> MeasuredTensor<'a> {
        let encodable = |ty: TensorType| {
            quant::codec(ty)
                .is_some_and(|codec| codec.quantize.is_some() && (importance.is_some() || !codec.needs_importance()))
        };
        let fits = |ty: &TensorType| fits_row(*ty, tensor.row_len()) && encodable(*ty);
        let mut types: Vec<TensorType> = tried_types().filter(fits).collect();
        if !types.contains(&tensor.ty) && encodable(tensor.ty) {
            types.push(tensor.ty);
        }
        let probe = PROBE_TYPES.into_iter().find(|ty| types.contains(ty)).or(types.first().copied());
        MeasuredTensor { tensor, types, probe_types: probe.into_iter().collect(), importance, row_factors }
    }
}
