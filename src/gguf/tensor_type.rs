//! Tensor types: one row of constants per ggml type, and the newtype that carries a type id.

use std::fmt;

/// The ggml id of a tensor's storage type, known to this program or not.
///
/// Unknown ids survive reading and writing; only the operations that need to know the block layout
/// ask for [`TensorType::info`] and refuse where there is none.
#[doc(alias = "ggml_type")]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TensorType(pub u32);

/// Facts about one tensor type, as ggml b10605 defines them.
#[derive(Debug)]
pub struct TypeInfo {
    /// The type this row describes.
    pub ty: TensorType,
    /// ggml's name (`ggml_type_name`), such as `q4_K`.
    pub name: &'static str,
    /// Weights per block; a row's length must be a multiple of it. 1 for plain numbers.
    pub block_len: usize,
    /// Bytes per block.
    pub block_bytes: usize,
    /// True for block formats, false for plain integers and floats (`ggml_is_quantized`).
    pub quantized: bool,
}

macro_rules! tensor_types {
    ($($konst:ident = $id:literal, $name:literal, $len:literal, $bytes:literal, $quantized:literal;)*) => {
        #[allow(missing_docs)] // the names are ggml's own
        impl TensorType {
            $(pub const $konst: TensorType = TensorType($id);)*
        }

        /// Every type that b10605 can store or compute with, in the order of their ids.
        pub const TENSOR_TYPES: &[TypeInfo] = &[
            $(TypeInfo {
                ty: TensorType::$konst, name: $name, block_len: $len, block_bytes: $bytes, quantized: $quantized,
            },)*
        ];
    };
}

tensor_types! {
    F32 = 0, "f32", 1, 4, false;
    F16 = 1, "f16", 1, 2, false;
    Q4_0 = 2, "q4_0", 32, 18, true;
    Q4_1 = 3, "q4_1", 32, 20, true;
    Q5_0 = 6, "q5_0", 32, 22, true;
    Q5_1 = 7, "q5_1", 32, 24, true;
    Q8_0 = 8, "q8_0", 32, 34, true;
    Q8_1 = 9, "q8_1", 32, 36, true;
    Q2_K = 10, "q2_K", 256, 84, true;
    Q3_K = 11, "q3_K", 256, 110, true;
    Q4_K = 12, "q4_K", 256, 144, true;
    Q5_K = 13, "q5_K", 256, 176, true;
    Q6_K = 14, "q6_K", 256, 210, true;
    Q8_K = 15, "q8_K", 256, 292, true;
    IQ2_XXS = 16, "iq2_xxs", 256, 66, true;
    IQ2_XS = 17, "iq2_xs", 256, 74, true;
    IQ3_XXS = 18, "iq3_xxs", 256, 98, true;
    IQ1_S = 19, "iq1_s", 256, 50, true;
    IQ4_NL = 20, "iq4_nl", 32, 18, true;
    IQ3_S = 21, "iq3_s", 256, 110, true;
    IQ2_S = 22, "iq2_s", 256, 82, true;
    IQ4_XS = 23, "iq4_xs", 256, 136, true;
    I8 = 24, "i8", 1, 1, false;
    I16 = 25, "i16", 1, 2, false;
    I32 = 26, "i32", 1, 4, false;
    I64 = 27, "i64", 1, 8, false;
    F64 = 28, "f64", 1, 8, false;
    IQ1_M = 29, "iq1_m", 256, 56, true;
    BF16 = 30, "bf16", 1, 2, false;
    TQ1_0 = 34, "tq1_0", 256, 54, true;
    TQ2_0 = 35, "tq2_0", 256, 66, true;
    MXFP4 = 39, "mxfp4", 32, 17, true;
    NVFP4 = 40, "nvfp4", 64, 36, true;
    Q1_0 = 41, "q1_0", 128, 18, true;
    Q2_0 = 42, "q2_0", 64, 18, true;
}

impl TensorType {
    /// The row of facts, or `None` for an id this program does not know (removed or future types).
    pub fn info(self) -> Option<&'static TypeInfo> {
        TENSOR_TYPES.iter().find(|row| row.ty == self)
    }

    /// Finds a type by ggml's name, any letter case (`Q4_K`, `q4_k`, `bf16`).
    pub fn from_name(name: &str) -> Option<TensorType> {
        TENSOR_TYPES.iter().find(|row| row.name.eq_ignore_ascii_case(name)).map(|row| row.ty)
    }

    /// [`TypeInfo::bits_per_weight`], 0 for an id this program does not know.
    pub fn bits_per_weight(self) -> f64 {
        self.info().map_or(0.0, TypeInfo::bits_per_weight)
    }

    /// True for block formats; false for plain numbers and for unknown ids.
    pub fn is_quantized(self) -> bool {
        self.info().is_some_and(|row| row.quantized)
    }
}

impl TypeInfo {
    /// Bytes of a row of `row_len` weights (`ggml_row_size`), or `None` when `row_len` is not a multiple of
    /// the block or the product overflows.
    #[doc(alias = "ggml_row_size")]
    pub fn row_bytes(&self, row_len: u64) -> Option<u64> {
        if !row_len.is_multiple_of(self.block_len as u64) {
            return None;
        }
        (row_len / self.block_len as u64).checked_mul(self.block_bytes as u64)
    }

    /// Bits per weight of the block format, without padding or metadata.
    #[doc(alias = "bpw")]
    pub fn bits_per_weight(&self) -> f64 {
        bits_per_weight(self.block_bytes as u64, self.block_len as u64)
    }
}

/// Bits per weight of `weights` weights that take `bytes` bytes: of a block, a tensor or a whole model. Without any
/// weights, all bits count for one.
pub fn bits_per_weight(bytes: u64, weights: u64) -> f64 {
    8.0 * bytes as f64 / weights.max(1) as f64
}

/// ggml's name, or `type#ID` for an unknown id.
impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.info() {
            Some(row) => f.pad(row.name),
            None => f.pad(&format!("type#{}", self.0)),
        }
    }
}

impl fmt::Debug for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_found_by_id_and_by_name() {
        for row in TENSOR_TYPES {
            assert_eq!(row.ty.info().unwrap().name, row.name);
            assert_eq!(TensorType::from_name(&row.name.to_uppercase()), Some(row.ty));
        }
    }

    #[test]
    fn removed_and_future_ids_keep_their_number() {
        for id in [4, 5, 31, 36, 43, u32::MAX] {
            assert!(TensorType(id).info().is_none());
            assert_eq!(TensorType(id).to_string(), format!("type#{id}"));
        }
    }

    #[test]
    fn bits_per_weight_are_those_of_blocks_and_of_whole_models() {
        assert_eq!(TensorType::Q4_K.bits_per_weight(), 4.5);
        assert_eq!(TensorType::F32.bits_per_weight(), 32.0);
        assert_eq!(TensorType(u32::MAX).bits_per_weight(), 0.0);
        assert_eq!(bits_per_weight(3, 8), 3.0);
        assert_eq!(bits_per_weight(0, 0), 0.0);
    }

    #[test]
    fn row_bytes_refuses_partial_blocks_and_overflow() {
        let q4_k = TensorType::Q4_K.info().unwrap();
        assert_eq!(q4_k.row_bytes(512), Some(288));
        assert_eq!(q4_k.row_bytes(500), None);
        assert_eq!(TensorType::F64.info().unwrap().row_bytes(u64::MAX / 4), None);
    }
}
