//! The GGUF container: bytes, metadata and tensor tables. Knows nothing of models.
//!
//! Reading: [`Gguf::open`] maps a file, or all shards of a split model, and checks every count, length and offset
//! before it is used. Writing: [`GgufLayout`] fixes the whole file from metadata and a tensor list before the first byte
//! of data, [`GgufWriter`] streams it.

mod byte_order;
mod bytes;
mod cursor;
mod error;
mod fingerprint;
mod foreign;
mod metadata;
mod parse;
mod reader;
pub mod split;
mod tensor_info;
mod tensor_type;
#[doc(hidden)]
pub mod testing;
mod type_rows;
mod value;
mod writer;

pub use bytes::Bytes;
pub use error::{GgufError, shown};
pub use fingerprint::fingerprint;
pub use metadata::Metadata;
pub(crate) use metadata::is_layout_key;
pub use reader::{Gguf, Shard};
pub(crate) use tensor_info::{MAX_TENSOR_NAME, align_up};
pub use tensor_info::{TensorInfo, TensorTotals};
pub use tensor_type::{TENSOR_TYPES, TensorType, TypeInfo, bits_per_weight};
pub use type_rows::{TypeRow, rows_by_type};
pub use value::{Array, Strings, Value, ValueType, Values};
pub use writer::{GgufLayout, GgufWriter, NewTensor, PlacedTensor};
