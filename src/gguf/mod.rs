//! The GGUF container: bytes, metadata and tensor tables. Knows nothing of models.

mod tensor_type;

pub use tensor_type::{TENSOR_TYPES, TensorType, TypeInfo};
