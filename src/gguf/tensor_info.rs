//! A tensor's description: name, shape, type and place in its shard.

use super::error::{DAMAGED, GgufError, shown};
use super::tensor_type::TensorType;

/// Most dimensions a tensor may have in ggml (`GGML_MAX_DIMS`).
pub(crate) const MAX_DIMS: usize = 4;

/// Longest tensor name in bytes: llama.cpp keeps 64 with the final NUL (`GGML_MAX_NAME`) and refuses longer ones.
pub(crate) const MAX_TENSOR_NAME: usize = 63;

/// What tables of tensors may hold. Image and video models are read by other programs than llama.cpp, which take more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Most dimensions.
    pub dims: usize,
    /// Longest name in bytes.
    pub name: usize,
    /// Whose limits these are.
    whose: &'static str,
}

impl Limits {
    /// What llama.cpp reads.
    pub(crate) const GGML: Limits = Limits { dims: MAX_DIMS, name: MAX_TENSOR_NAME, whose: "by ggml" };
    /// What is read and carried over.
    pub(crate) const CARRIED: Limits = Limits { dims: 8, name: 1024, whose: "here" };
}

/// One tensor of a file, as its header describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name, unique over all shards; llama.cpp reads up to 63 bytes. May hold anything but NUL: escape it before showing it.
    pub name: String,
    /// Dimensions as stored, fastest first: `shape[0]` is the length of a row. A missing one counts as 1, a zero makes the
    /// tensor empty; llama.cpp reads up to 4 of them.
    pub shape: Vec<u64>,
    /// Storage type, known or not.
    pub ty: TensorType,
    /// First byte, counted from the start of the shard's data section.
    pub offset: u64,
    /// Size of the data in bytes without padding. For an unknown type it is what the offsets tell, padding included; `None`
    /// if they tell nothing.
    pub bytes: Option<u64>,
    /// The shard that holds the data, from 0.
    pub shard: usize,
}

impl TensorInfo {
    /// Weights in a row (`ne[0]`).
    pub fn row_len(&self) -> u64 {
        self.shape.first().copied().unwrap_or(1)
    }

    /// Rows: the product of all dimensions but the first.
    pub fn rows(&self) -> u64 {
        product(self.shape.iter().skip(1))
    }

    /// Rows of one matrix (`ne[1]`).
    pub fn rows_per_matrix(&self) -> u64 {
        self.shape.get(1).copied().unwrap_or(1)
    }

    /// Matrices stacked in the tensor, one per expert: the product of all dimensions but the first two.
    pub fn matrices(&self) -> u64 {
        self.shape.iter().skip(2).product()
    }

    /// Weights in all (`ggml_nelements`).
    pub fn elements(&self) -> u64 {
        product(self.shape.iter())
    }

    /// The shape for messages: `4096 x 32000`, or `scalar`.
    pub fn shape_text(&self) -> String {
        shape_text(&self.shape)
    }

    /// The name for messages: quoted, control characters escaped.
    pub fn shown_name(&self) -> String {
        shown(self.name.as_bytes())
    }

    /// Why llama.cpp cannot read this tensor, if it is for its name or shape.
    pub fn beyond_ggml(&self) -> Option<String> {
        if self.name.len() > MAX_TENSOR_NAME {
            let length = self.name.len();
            return Some(format!("its name has {length} bytes, and ggml takes {MAX_TENSOR_NAME} (GGML_MAX_NAME)"));
        }
        let dims = self.shape.len();
        (dims > MAX_DIMS).then(|| format!("it has {dims} dimensions, and ggml takes {MAX_DIMS} (GGML_MAX_DIMS)"))
    }

    /// Bytes of one row, `None` if the type is unknown.
    pub fn row_bytes(&self) -> Option<u64> {
        self.ty.info()?.row_bytes(self.row_len())
    }
}

/// Weights and bytes of several tensors, such as those of a whole model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TensorTotals {
    /// Weights in all.
    pub parameters: u64,
    /// Bytes of data without padding; for tensors of unknown type what their offsets tell.
    pub bytes: u64,
}

impl TensorTotals {
    /// Bits of data per weight, scales included; 0 without tensors.
    pub fn bits_per_weight(self) -> f64 {
        super::bits_per_weight(self.bytes, self.parameters)
    }
}

impl<'a> FromIterator<&'a TensorInfo> for TensorTotals {
    fn from_iter<I: IntoIterator<Item = &'a TensorInfo>>(tensors: I) -> TensorTotals {
        tensors.into_iter().fold(TensorTotals::default(), |sum, tensor| TensorTotals {
            parameters: sum.parameters.saturating_add(tensor.elements()),
            bytes: sum.bytes.saturating_add(tensor.bytes.unwrap_or(0)),
        })
    }
}

/// The product of dimensions. Shapes that were read never reach the limit, those that a caller makes up may.
fn product<'a>(dims: impl Iterator<Item = &'a u64>) -> u64 {
    dims.fold(1, |product: u64, dim| product.saturating_mul(*dim))
}

/// A shape for messages: `4096 x 32000`, or `scalar`.
pub(crate) fn shape_text(shape: &[u64]) -> String {
    if shape.is_empty() {
        return "scalar".to_owned();
    }
    let dims: Vec<String> = shape.iter().map(u64::to_string).collect();
    dims.join(" x ")
}

/// Checks name and shape as b10605's reader would, and computes the size in bytes: `None` for an unknown type.
/// Used for tensors that were read and for those about to be written.
pub(crate) fn checked_bytes(
    file: &str,
    name: &str,
    shape: &[u64],
    ty: TensorType,
    limits: Limits,
) -> Result<Option<u64>, GgufError> {
    let bad = |problem: String, advice: &'static str| GgufError::Tensor {
        file: file.to_owned(),
        tensor: shown(name.as_bytes()),
        problem,
        advice,
    };
    if let Some(problem) = limits.dims_problem(shape.len()) {
        return Err(bad(problem, if limits == Limits::GGML { REDUCE } else { DAMAGED }));
    }
    if let Some(dim) = shape.iter().position(|len| *len > i64::MAX as u64) {
        return Err(bad(format!("dimension {dim} is {}, expected 0 to 2^63 - 1", shape[dim].cast_signed()), DAMAGED));
    }
    // Zeros are left out: the other dimensions must make a sane product too, as rows are counted without the first.
    let product = shape.iter().filter(|len| **len > 0).try_fold(1u64, |product, len| product.checked_mul(*len));
    if product.is_none_or(|product| product >= i64::MAX as u64) {
        return Err(bad(format!("shape {} has 2^63 elements or more", shape_text(shape)), DAMAGED));
    }
    let Some(info) = ty.info() else { return Ok(None) };
    let row_len = shape.first().copied().unwrap_or(1);
    if !row_len.is_multiple_of(info.block_len as u64) {
        return Err(bad(
            format!("row length {row_len} is not a multiple of {}, the block of type {}", info.block_len, info.name),
            DAMAGED,
        ));
    }
    let rows: u64 = shape.iter().skip(1).product();
    info.row_bytes(row_len).and_then(|row| row.checked_mul(rows)).map(Some).ok_or_else(|| {
        bad(format!("shape {} of type {} has 2^64 bytes or more", shape_text(shape), info.name), DAMAGED)
    })
}

/// Advice for shapes that only other programs read.
const REDUCE: &str = "give the tensor fewer dimensions";

impl Limits {
    /// What is wrong with a name of this many bytes.
    pub(crate) fn name_problem(self, length: u64) -> Option<String> {
        let Limits { name, whose, .. } = self;
        let constant = if self == Limits::GGML { " (GGML_MAX_NAME)" } else { "" };
        (length > name as u64).then(|| format!("name has {length} bytes, at most {name} are taken {whose}{constant}"))
    }

    /// What is wrong with this many dimensions.
    pub(crate) fn dims_problem(self, count: usize) -> Option<String> {
        let Limits { dims, whose, .. } = self;
        let constant = if self == Limits::GGML { " (GGML_MAX_DIMS)" } else { "" };
        (count > dims).then(|| format!("has {count} dimensions, at most {dims} are taken {whose}{constant}"))
    }
}

/// Checks that a name can be stored in a GGUF file within the limits: says what is wrong with it, if anything.
pub(crate) fn name_problem(name: &[u8], limits: Limits) -> Option<String> {
    if name.is_empty() {
        Some("has an empty name".to_owned())
    } else if let Some(problem) = limits.name_problem(name.len() as u64) {
        Some(problem)
    } else if name.contains(&0) {
        Some("name holds a NUL byte".to_owned())
    } else if std::str::from_utf8(name).is_err() {
        Some("name is not valid UTF-8".to_owned())
    } else {
        None
    }
}

/// The next multiple of `alignment`, a power of two; `None` on overflow.
pub(crate) fn align_up(offset: u64, alignment: u64) -> Option<u64> {
    offset.checked_next_multiple_of(alignment)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_have_the_weights_of_all_tensors_and_the_bytes_of_known_types() {
        let tensor = |shape: &[u64], ty: TensorType, bytes| TensorInfo {
            name: "w".to_owned(),
            shape: shape.to_vec(),
            ty,
            offset: 0,
            bytes,
            shard: 0,
        };
        let tensors = [tensor(&[32, 2], TensorType::Q4_0, Some(36)), tensor(&[16], TensorType(36), None)];
        let totals: TensorTotals = tensors.iter().collect();
        assert_eq!(totals, TensorTotals { parameters: 80, bytes: 36 });
        assert_eq!(totals.bits_per_weight(), 3.6);
        assert_eq!(TensorTotals::default().bits_per_weight(), 0.0);
        let huge: TensorTotals =
            [tensor(&[u64::MAX], TensorType::I8, Some(u64::MAX)); 1].iter().chain(&tensors).collect();
        assert_eq!(huge, TensorTotals { parameters: u64::MAX, bytes: u64::MAX });
    }
}
