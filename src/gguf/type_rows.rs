//! Tensors summed up by type.

use serde::Serialize;

use super::{TENSOR_TYPES, TensorType};

/// Tensors of one type, summed up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TypeRow {
    /// ggml's name of the type.
    #[serde(rename = "type")]
    pub name: String,
    /// Tensors of the type.
    pub tensors: u64,
    /// Weights in them.
    pub parameters: u64,
    /// Their bytes, without padding.
    pub bytes: u64,
}

/// Sums up (type, parameters, bytes) by type, in the order of the type ids.
pub fn rows_by_type(items: impl Iterator<Item = (TensorType, u64, u64)>) -> Vec<TypeRow> {
    let mut sums: Vec<(TensorType, TypeRow)> = Vec::new();
    for (ty, parameters, bytes) in items {
        let at = match sums.iter().position(|(known, _)| *known == ty) {
            Some(at) => at,
            None => {
                sums.push((ty, TypeRow { name: ty.to_string(), tensors: 0, parameters: 0, bytes: 0 }));
                sums.len() - 1
            }
        };
        let row = &mut sums[at].1;
        row.tensors += 1;
        row.parameters = row.parameters.saturating_add(parameters);
        row.bytes = row.bytes.saturating_add(bytes);
    }
    sums.sort_by_key(|(ty, _)| TENSOR_TYPES.iter().position(|row| row.ty == *ty).unwrap_or(usize::MAX));
    sums.into_iter().map(|(_, row)| row).collect()
}
