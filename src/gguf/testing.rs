//! Builds GGUF files byte by byte, sound or broken, for tests. No part of the library's promise.

use super::split;
use super::tensor_type::TensorType;
use super::value::ValueType;

/// A file in the making: every count, length and offset can be made a lie.
#[derive(Clone)]
pub struct RawGguf {
    /// First four bytes.
    pub magic: [u8; 4],
    /// Version.
    pub version: u32,
    /// All numbers big-endian, if true.
    pub big_endian: bool,
    /// Claimed number of tensors, the true one if `None`.
    pub n_tensors: Option<i64>,
    /// Claimed number of pairs, the true one if `None`.
    pub n_kv: Option<i64>,
    /// Alignment that offsets and padding follow; add the key yourself.
    pub alignment: usize,
    /// Bytes of the pairs.
    pub pairs: Vec<u8>,
    /// Pairs added.
    pub pair_count: i64,
    /// Bytes of the tensor descriptions.
    pub infos: Vec<u8>,
    /// Tensor descriptions added.
    pub info_count: i64,
    /// The data section.
    pub data: Vec<u8>,
}

impl Default for RawGguf {
    fn default() -> RawGguf {
        RawGguf::new()
    }
}

impl RawGguf {
    /// An empty little-endian file of version 3.
    pub fn new() -> RawGguf {
        RawGguf {
            magic: *b"GGUF",
            version: 3,
            big_endian: false,
            n_tensors: None,
            n_kv: None,
            alignment: 32,
            pairs: Vec::new(),
            pair_count: 0,
            infos: Vec::new(),
            info_count: 0,
            data: Vec::new(),
        }
    }

    /// The same in big-endian order; call it before adding anything.
    pub fn big_endian() -> RawGguf {
        RawGguf { big_endian: true, ..RawGguf::new() }
    }

    /// A number of `N` bytes given little-endian, in the file's order.
    pub fn ordered<const N: usize>(&self, mut little: [u8; N]) -> [u8; N] {
        if self.big_endian {
            little.reverse();
        }
        little
    }

    /// Length and bytes of a string.
    pub fn string(&self, text: &[u8]) -> Vec<u8> {
        let mut out = self.ordered((text.len() as u64).to_le_bytes()).to_vec();
        out.extend_from_slice(text);
        out
    }

    /// Bytes as they are, among the pairs; not counted as a pair.
    #[must_use]
    pub fn raw_pairs(mut self, bytes: &[u8]) -> RawGguf {
        self.pairs.extend_from_slice(bytes);
        self
    }

    /// A pair whose value is `payload` as it is.
    #[must_use]
    pub fn pair(mut self, key: impl AsRef<[u8]>, type_id: u32, payload: &[u8]) -> RawGguf {
        let key = self.string(key.as_ref());
        self.pairs.extend(key);
        self.pairs.extend(self.ordered(type_id.to_le_bytes()));
        self.pairs.extend_from_slice(payload);
        self.pair_count += 1;
        self
    }

    /// A u32.
    #[must_use]
    pub fn u32(self, key: &str, value: u32) -> RawGguf {
        let payload = self.ordered(value.to_le_bytes());
        self.pair(key, ValueType::U32.id(), &payload)
    }

    /// An i32.
    #[must_use]
    pub fn i32(self, key: &str, value: i32) -> RawGguf {
        let payload = self.ordered(value.to_le_bytes());
        self.pair(key, ValueType::I32.id(), &payload)
    }

    /// A u16.
    #[must_use]
    pub fn u16(self, key: &str, value: u16) -> RawGguf {
        let payload = self.ordered(value.to_le_bytes());
        self.pair(key, ValueType::U16.id(), &payload)
    }

    /// A u64.
    #[must_use]
    pub fn u64(self, key: &str, value: u64) -> RawGguf {
        let payload = self.ordered(value.to_le_bytes());
        self.pair(key, ValueType::U64.id(), &payload)
    }

    /// An f32.
    #[must_use]
    pub fn f32(self, key: &str, value: f32) -> RawGguf {
        let payload = self.ordered(value.to_le_bytes());
        self.pair(key, ValueType::F32.id(), &payload)
    }

    /// A bool.
    #[must_use]
    pub fn bool(self, key: &str, value: bool) -> RawGguf {
        self.pair(key, ValueType::Bool.id(), &[u8::from(value)])
    }

    /// A string, valid UTF-8 or not.
    #[must_use]
    pub fn str(self, key: &str, value: impl AsRef<[u8]>) -> RawGguf {
        let payload = self.string(value.as_ref());
        self.pair(key, ValueType::String.id(), &payload)
    }

    /// Element type, count and elements of an array, as they are.
    pub fn array_payload(&self, elem_id: u32, count: u64, elements: &[u8]) -> Vec<u8> {
        let mut out = self.ordered(elem_id.to_le_bytes()).to_vec();
        out.extend(self.ordered(count.to_le_bytes()));
        out.extend_from_slice(elements);
        out
    }

    /// An array whose elements are `elements` as they are.
    #[must_use]
    pub fn array(self, key: &str, elem_id: u32, count: u64, elements: &[u8]) -> RawGguf {
        let payload = self.array_payload(elem_id, count, elements);
        self.pair(key, ValueType::Array.id(), &payload)
    }

    /// An array of strings.
    #[must_use]
    pub fn strings<S: AsRef<[u8]>>(self, key: &str, values: &[S]) -> RawGguf {
        let elements: Vec<u8> = values.iter().flat_map(|value| self.string(value.as_ref())).collect();
        self.array(key, ValueType::String.id(), values.len() as u64, &elements)
    }

    /// An array of f32.
    #[must_use]
    pub fn f32s(self, key: &str, values: &[f32]) -> RawGguf {
        let elements: Vec<u8> = values.iter().flat_map(|value| self.ordered(value.to_le_bytes())).collect();
        self.array(key, ValueType::F32.id(), values.len() as u64, &elements)
    }

    /// An array of i32.
    #[must_use]
    pub fn i32s(self, key: &str, values: &[i32]) -> RawGguf {
        let elements: Vec<u8> = values.iter().flat_map(|value| self.ordered(value.to_le_bytes())).collect();
        self.array(key, ValueType::I32.id(), values.len() as u64, &elements)
    }

    /// The three keys of a shard.
    #[must_use]
    pub fn split(self, number: u16, count: u16, n_tensors: i32) -> RawGguf {
        self.u16(split::NUMBER_KEY, number).u16(split::COUNT_KEY, count).i32(split::TENSOR_COUNT_KEY, n_tensors)
    }

    /// A tensor description as it is; no data.
    #[must_use]
    pub fn info(mut self, name: impl AsRef<[u8]>, n_dims: u32, dims: &[i64], type_id: u32, offset: u64) -> RawGguf {
        let mut info = self.string(name.as_ref());
        info.extend(self.ordered(n_dims.to_le_bytes()));
        for dim in dims {
            info.extend(self.ordered(dim.to_le_bytes()));
        }
        info.extend(self.ordered(type_id.to_le_bytes()));
        info.extend(self.ordered(offset.to_le_bytes()));
        self.infos.extend(info);
        self.info_count += 1;
        self
    }

    /// Bytes as they are, among the tensor descriptions; not counted.
    #[must_use]
    pub fn raw_infos(mut self, bytes: &[u8]) -> RawGguf {
        self.infos.extend_from_slice(bytes);
        self
    }

    /// A sound tensor with its data, as they stand in the file, at the next aligned offset.
    #[must_use]
    pub fn tensor(self, name: &str, shape: &[u64], ty: TensorType, data: &[u8]) -> RawGguf {
        let dims: Vec<i64> = shape.iter().map(|dim| dim.cast_signed()).collect();
        let offset = self.data.len() as u64;
        self.info(name, dims.len() as u32, &dims, ty.0, offset).data(data)
    }

    /// A sound F32 tensor.
    #[must_use]
    pub fn f32_tensor(self, name: &str, shape: &[u64], values: &[f32]) -> RawGguf {
        let data: Vec<u8> = values.iter().flat_map(|value| self.ordered(value.to_le_bytes())).collect();
        self.tensor(name, shape, TensorType::F32, &data)
    }

    /// Data, padded to the alignment.
    #[must_use]
    pub fn data(mut self, data: &[u8]) -> RawGguf {
        self.data.extend_from_slice(data);
        self.data.resize(self.data.len().next_multiple_of(self.alignment), 0);
        self
    }

    /// Everything before the padding of the data section.
    pub fn header(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.ordered(self.version.to_le_bytes()));
        out.extend(self.ordered(self.n_tensors.unwrap_or(self.info_count).to_le_bytes()));
        out.extend(self.ordered(self.n_kv.unwrap_or(self.pair_count).to_le_bytes()));
        out.extend_from_slice(&self.pairs);
        out.extend_from_slice(&self.infos);
        out
    }

    /// The whole file.
    pub fn build(&self) -> Vec<u8> {
        let mut out = self.header();
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend_from_slice(&self.data);
        out
    }
}
