//! Parses one GGUF file: header, key-value pairs, tensor descriptions. Reads nothing of the tensor data.
//!
//! Every count is compared with the bytes that are left before anything is allocated, and what is allocated grows
//! with what was read, never with what was claimed.

use std::sync::Arc;

use byteorder::{BigEndian, ByteOrder, LittleEndian};

use super::byte_order::numbers_to_little_endian;
use super::bytes::{Bytes, Source};
use super::cursor::{Cursor, CutShort};
use super::error::{DAMAGED, During, GgufError, shown};
use super::metadata::Metadata;
use super::tensor_info::{Limits, TensorInfo, align_up, checked_bytes, name_problem};
use super::tensor_type::TensorType;
use super::value::{Array, Origin, Value, ValueType};

/// Most key-value pairs followed; models have tens.
const MAX_PAIRS: u64 = 1 << 20;
/// Most tensors followed, over all shards; the largest unstacked mixtures have some 100,000.
pub(crate) const MAX_TENSORS: u64 = 1 << 20;
/// Longest key in bytes, the limit of the GGUF specification.
const MAX_KEY_BYTES: u64 = 65_535;
/// Most bytes of all keys together: unlike values they are copied out of the file.
const MAX_ALL_KEYS_BYTES: u64 = 1 << 26;
/// Most bytes of arrays that have to be copied to be put in order: those of big-endian files.
const MAX_COPIED_BYTES: u64 = 1 << 28;
/// Longest string value in bytes, b10605's limit.
const MAX_STRING_BYTES: u64 = 1 << 30;
/// Most elements of fixed size in an array, b10605's limit.
const MAX_ARRAY_ELEMENTS: u64 = 1 << 30;
/// Most strings and arrays inside one array, since each has to be visited; the largest vocabularies have 300,000.
const MAX_VISITED_ELEMENTS: u64 = 1 << 24;
/// Deepest nesting of arrays; 1 is an array of plain values.
const MAX_ARRAY_DEPTH: usize = 8;

/// Least bytes of a key-value pair: key length, one byte of key, type, one byte of value.
const MIN_PAIR_BYTES: u64 = 8 + 1 + 4 + 1;
/// Least bytes of a tensor description: name length, one byte of name, dimension count, type, offset.
const MIN_TENSOR_BYTES: u64 = 8 + 1 + 4 + 4 + 8;

/// One parsed file.
pub(crate) struct ParsedFile {
    pub version: u32,
    pub big_endian: bool,
    pub metadata: Metadata,
    pub tensors: Vec<TensorInfo>,
    /// First byte of the data section.
    pub data_start: u64,
}

/// Parses the file in `source`; `file` is its name for messages, `shard` its number in the split.
pub(crate) fn parse(source: &Arc<Source>, file: &str, shard: usize) -> Result<ParsedFile, GgufError> {
    let bytes = source.as_slice();
    let mut parser = Parser { cursor: Cursor::new(bytes, false), source, file, copied_bytes: 0, key_bytes: 0 };
    let (version, big_endian) = parser.magic_and_version()?;
    let n_tensors = parser.count("n_tensors", MAX_TENSORS)?;
    let n_pairs = parser.count("n_kv", MAX_PAIRS)?;
    parser.check_counts_fit(n_tensors, n_pairs)?;
    let metadata = parser.metadata(n_pairs)?;
    let alignment = u64::from(metadata.alignment()?);
    let mut tensors = Vec::new();
    for index in 0..n_tensors {
        tensors.push(parser.tensor(index, shard)?);
    }
    let data_start = parser.data_start(n_tensors, alignment)?;
    check_places(file, &tensors, data_start, alignment, bytes.len() as u64)?;
    size_by_offsets(&mut tensors, (bytes.len() as u64).saturating_sub(data_start));
    Ok(ParsedFile { version, big_endian, metadata, tensors, data_start })
}

struct Parser<'a> {
    cursor: Cursor<'a>,
    source: &'a Arc<Source>,
    file: &'a str,
    /// Bytes of array elements copied so far.
    copied_bytes: u64,
    /// Bytes of keys copied so far.
    key_bytes: u64,
}

impl Parser<'_> {
    fn magic_and_version(&mut self) -> Result<(u32, bool), GgufError> {
        let not_gguf =
            |found: String, advice: &'static str| Err(GgufError::NotGguf { file: self.file.to_owned(), found, advice });
        if self.cursor.remaining() == 0 {
            return not_gguf("it is empty".to_owned(), "download or copy the file again");
        }
        let magic = self.cursor.take(4.min(self.cursor.remaining())).unwrap_or_default();
        let found = format!("it begins with {}, expected \"GGUF\"", shown(magic));
        match magic {
            b"GGUF" => {}
            b"GGML" | b"lmgg" | b"ggml" | b"fmgg" | b"tjgg" => {
                return not_gguf(found, "this older format has to be converted to GGUF first");
            }
            b"FUGG" => return not_gguf(found, "its bytes are in swapped order, copy the original file again"),
            short if b"GGUF".starts_with(short) => {
                return not_gguf(format!("{found}, and ends there"), "download or copy the file again");
            }
            _ => return not_gguf(found, "give a GGUF file"),
        }
        let raw = self.cursor.take(4).during(self.file, || "the version".to_owned())?;
        let found = LittleEndian::read_u32(raw);
        let big_endian = found & 0xffff == 0 && found != 0;
        let version = if big_endian { BigEndian::read_u32(raw) } else { found };
        self.cursor.set_big_endian(big_endian);
        match version {
            2 | 3 => Ok((version, big_endian)),
            _ => {
                let advice = match version {
                    1 => "convert the model again with a newer llama.cpp",
                    0 => DAMAGED,
                    4..=99 => "a newer lwq may read it",
                    _ => DAMAGED,
                };
                Err(GgufError::Version { file: self.file.to_owned(), found, advice })
            }
        }
    }

    fn count(&mut self, field: &'static str, limit: u64) -> Result<u64, GgufError> {
        let found = self.cursor.i64().during(self.file, || format!("header field {field}"))?;
        match u64::try_from(found) {
            Ok(count) if count <= limit => Ok(count),
            Ok(_) => Err(self.bad_count(field, found, format!("more than the {limit} that lwq follows"))),
            Err(_) => Err(self.bad_count(field, found, "which is negative".to_owned())),
        }
    }

    fn bad_count(&self, field: &'static str, found: i64, problem: String) -> GgufError {
        GgufError::Header { file: self.file.to_owned(), field, found, problem }
    }

    fn check_counts_fit(&self, n_tensors: u64, n_pairs: u64) -> Result<(), GgufError> {
        let left = self.cursor.remaining();
        let problem = |least: u64| format!("which needs {least} bytes or more, {left} are left in the file");
        // Both counts are at most 2^20, so the products are small.
        if n_pairs * MIN_PAIR_BYTES > left {
            return Err(self.bad_count("n_kv", n_pairs as i64, problem(n_pairs * MIN_PAIR_BYTES)));
        }
        let least = n_pairs * MIN_PAIR_BYTES + n_tensors * MIN_TENSOR_BYTES;
        if least > left {
            return Err(self.bad_count("n_tensors", n_tensors as i64, problem(least)));
        }
        Ok(())
    }

    fn metadata(&mut self, n_pairs: u64) -> Result<Metadata, GgufError> {
        let mut entries: Vec<(String, Value)> = Vec::new();
        for index in 0..n_pairs {
            let key = self.key(index, entries.last().map(|(key, _)| key.as_str()))?;
            let value = self.value(&key)?;
            entries.push((key, value));
        }
        Metadata::from_entries(self.file, entries)
    }

    fn key(&mut self, index: u64, previous: Option<&str>) -> Result<String, GgufError> {
        let place = || match previous {
            Some(previous) => format!("number {index} (after {})", shown(previous.as_bytes())),
            None => format!("number {index}"),
        };
        let bad =
            |problem: String| GgufError::Key { file: self.file.to_owned(), key: place(), problem, advice: DAMAGED };
        let len = self.cursor.u64().during(self.file, || format!("the length of metadata key {}", place()))?;
        if len == 0 {
            return Err(bad("is empty".to_owned()));
        }
        if len > MAX_KEY_BYTES {
            return Err(bad(format!("has length {len}, at most {MAX_KEY_BYTES} is allowed")));
        }
        self.key_bytes += len;
        if self.key_bytes > MAX_ALL_KEYS_BYTES {
            let total = self.key_bytes;
            return Err(bad(format!("takes the keys to {total} bytes, at most {MAX_ALL_KEYS_BYTES} are followed")));
        }
        let raw = self.cursor.take(len).during(self.file, || format!("metadata key {}", place()))?;
        if raw.contains(&0) {
            return Err(bad(format!("{} holds a NUL byte", shown(raw))));
        }
        match std::str::from_utf8(raw) {
            Ok(key) => Ok(key.to_owned()),
            Err(_) => Err(bad(format!("{} is not valid UTF-8", shown(raw)))),
        }
    }

    fn value_type(&mut self, key: &str, what: &str) -> Result<ValueType, GgufError> {
        let id = self.cursor.u32().during(self.file, || format!("the {what} of key {}", shown(key.as_bytes())))?;
        ValueType::from_id(id)
            .ok_or_else(|| self.bad_key(key, format!("{what} is {}, GGUF has 0 to 12", id.cast_signed()), DAMAGED))
    }

    fn bad_key(&self, key: &str, problem: String, advice: &'static str) -> GgufError {
        GgufError::Key { file: self.file.to_owned(), key: shown(key.as_bytes()), problem, advice }
    }

    fn value(&mut self, key: &str) -> Result<Value, GgufError> {
        let value_type = self.value_type(key, "value type")?;
        let file = self.file;
        let item = || format!("the value of key {}", shown(key.as_bytes()));
        let cursor = &mut self.cursor;
        Ok(match value_type {
            ValueType::U8 => Value::U8(cursor.u8().during(file, item)?),
            ValueType::I8 => Value::I8(cursor.i8().during(file, item)?),
            ValueType::U16 => Value::U16(cursor.u16().during(file, item)?),
            ValueType::I16 => Value::I16(cursor.i16().during(file, item)?),
            ValueType::U32 => Value::U32(cursor.u32().during(file, item)?),
            ValueType::I32 => Value::I32(cursor.i32().during(file, item)?),
            ValueType::F32 => Value::F32(cursor.f32().during(file, item)?),
            // b10605 takes any non-zero byte for true; it is written back as 1.
            ValueType::Bool => Value::Bool(cursor.u8().during(file, item)? != 0),
            ValueType::U64 => Value::U64(cursor.u64().during(file, item)?),
            ValueType::I64 => Value::I64(cursor.i64().during(file, item)?),
            ValueType::F64 => Value::F64(cursor.f64().during(file, item)?),
            ValueType::String => {
                let len = self.string(key)?;
                let end = self.cursor.position();
                Value::String(Bytes::shared(self.source, end - len..end))
            }
            ValueType::Array => Value::Array(self.array(key)?),
        })
    }

    /// Moves past a string and returns its length.
    fn string(&mut self, key: &str) -> Result<usize, GgufError> {
        let item = || format!("a string in the value of key {}", shown(key.as_bytes()));
        let len = self.cursor.u64().during(self.file, item)?;
        if len > MAX_STRING_BYTES && len <= self.cursor.remaining() {
            return Err(self.bad_key(
                key,
                format!("holds a string of {len} bytes, at most {MAX_STRING_BYTES} are allowed"),
                DAMAGED,
            ));
        }
        Ok(self.cursor.take(len).during(self.file, item)?.len())
    }

    fn array(&mut self, key: &str) -> Result<Array, GgufError> {
        let (elem, count) = self.array_head(key)?;
        let start = self.cursor.position();
        let mut walk = Walk { visited: 0, odd_bool: false };
        self.skip_elements(key, elem, count, 1, &mut walk)?;
        let range = start..self.cursor.position();
        let raw = if self.cursor.big_endian() || walk.odd_bool {
            self.copied_bytes += range.len() as u64;
            if self.copied_bytes > MAX_COPIED_BYTES {
                let problem = format!(
                    "takes the arrays to be reordered to {} bytes, at most {MAX_COPIED_BYTES} are followed",
                    self.copied_bytes
                );
                return Err(self.bad_key(key, problem, DAMAGED));
            }
            let mut canonical = Vec::with_capacity(range.len());
            let mut cursor = Cursor::new(&self.source.as_slice()[range], self.cursor.big_endian());
            append_canonical(&mut cursor, elem, count, &mut canonical)
                .during(self.file, || format!("the array in key {}", shown(key.as_bytes())))?;
            Bytes::from(canonical)
        } else {
            Bytes::shared(self.source, range)
        };
        let origin = Origin { file: self.file.to_owned(), key: key.to_owned() };
        Ok(Array::from_raw(elem, count, raw, Arc::new(origin)))
    }

    fn array_head(&mut self, key: &str) -> Result<(ValueType, u64), GgufError> {
        let elem = self.value_type(key, "array element type")?;
        let count =
            self.cursor.u64().during(self.file, || format!("the array length of key {}", shown(key.as_bytes())))?;
        Ok((elem, count))
    }

    /// Moves past the elements of an array, checking all of them.
    fn skip_elements(
        &mut self,
        key: &str,
        elem: ValueType,
        count: u64,
        depth: usize,
        walk: &mut Walk,
    ) -> Result<(), GgufError> {
        if let Some(size) = elem.fixed_bytes() {
            if count > MAX_ARRAY_ELEMENTS {
                return Err(self.bad_key(
                    key,
                    format!("claims an array of {count} elements, at most {MAX_ARRAY_ELEMENTS} are allowed"),
                    DAMAGED,
                ));
            }
            // At most 2^30 elements of 8 bytes: no overflow.
            let raw = self.cursor.take(count * size).during(self.file, || {
                format!("an array of {count} elements of {elem} in key {}", shown(key.as_bytes()))
            })?;
            walk.odd_bool |= elem == ValueType::Bool && raw.iter().any(|byte| *byte > 1);
            return Ok(());
        }
        let least_bytes = if elem == ValueType::String { 8 } else { 12 };
        let left = self.cursor.remaining();
        if count > left / least_bytes {
            return Err(self.bad_key(
                key,
                format!(
                    "claims an array of {count} elements of {elem}, the {left} bytes left in the file cannot hold them"
                ),
                DAMAGED,
            ));
        }
        walk.visited += count;
        if walk.visited > MAX_VISITED_ELEMENTS {
            return Err(self.bad_key(
                key,
                format!(
                    "claims an array of {} strings or arrays, at most {MAX_VISITED_ELEMENTS} are allowed",
                    walk.visited
                ),
                DAMAGED,
            ));
        }
        if elem == ValueType::Array && depth >= MAX_ARRAY_DEPTH {
            return Err(self.bad_key(key, format!("nests arrays more than {MAX_ARRAY_DEPTH} deep"), DAMAGED));
        }
        for _ in 0..count {
            if elem == ValueType::String {
                self.string(key)?;
            } else {
                let (inner, count) = self.array_head(key)?;
                self.skip_elements(key, inner, count, depth + 1, walk)?;
            }
        }
        Ok(())
    }

    fn tensor(&mut self, index: u64, shard: usize) -> Result<TensorInfo, GgufError> {
        let file = self.file;
        let bad = |tensor: String, problem: String| GgufError::Tensor {
            file: file.to_owned(),
            tensor,
            problem,
            advice: DAMAGED,
        };
        let number = || format!("number {index}");
        let len = self.cursor.u64().during(file, || format!("the name length of tensor number {index}"))?;
        if let Some(problem) = Limits::CARRIED.name_problem(len) {
            return Err(bad(number(), problem));
        }
        let raw = self.cursor.take(len).during(file, || format!("the name of tensor number {index}"))?;
        if let Some(problem) = name_problem(raw, Limits::CARRIED) {
            return Err(bad(format!("number {index} ({})", shown(raw)), problem));
        }
        let name = String::from_utf8_lossy(raw).into_owned();
        let item = || format!("the description of tensor {}", shown(raw));

        let n_dims = self.cursor.u32().during(file, item)?;
        if let Some(problem) = Limits::CARRIED.dims_problem(n_dims as usize) {
            return Err(bad(shown(raw), problem));
        }
        let mut shape = Vec::with_capacity(n_dims as usize);
        for _ in 0..n_dims {
            shape.push(self.cursor.u64().during(file, item)?);
        }
        let ty = TensorType(self.cursor.u32().during(file, item)?);
        let offset = self.cursor.u64().during(file, item)?;
        let bytes = checked_bytes(file, &name, &shape, ty, Limits::CARRIED)?;
        Ok(TensorInfo { name, shape, ty, offset, bytes, shard })
    }

    fn data_start(&self, n_tensors: u64, alignment: u64) -> Result<u64, GgufError> {
        let end = self.cursor.position() as u64;
        if n_tensors == 0 {
            return Ok(end);
        }
        let len = end + self.cursor.remaining();
        match align_up(end, alignment) {
            Some(start) if start <= len => Ok(start),
            start => Err(GgufError::CutShort {
                file: self.file.to_owned(),
                item: format!("the padding before the tensor data (general.alignment is {alignment})"),
                offset: end,
                needed: start.unwrap_or(u64::MAX) - end,
                available: len - end,
            }),
        }
    }
}

/// What a walk over an array has seen so far.
struct Walk {
    visited: u64,
    odd_bool: bool,
}

/// Appends array elements as little-endian bytes with bools of 0 and 1.
fn append_canonical(cursor: &mut Cursor<'_>, elem: ValueType, count: u64, out: &mut Vec<u8>) -> Result<(), CutShort> {
    if elem == ValueType::Bool {
        out.extend(cursor.take(count)?.iter().map(|byte| u8::from(*byte != 0)));
        return Ok(());
    }
    if let Some(width) = elem.fixed_bytes() {
        return append_numbers(cursor, width, count, out);
    }
    for _ in 0..count {
        let mut head = cursor.clone();
        if elem == ValueType::String {
            append_numbers(cursor, 8, 1, out)?;
            out.extend_from_slice(cursor.take(head.u64()?)?);
        } else {
            append_numbers(cursor, 4, 1, out)?;
            append_numbers(cursor, 8, 1, out)?;
            // The ids were checked by the walk before.
            if let Some(inner) = ValueType::from_id(head.u32()?) {
                append_canonical(cursor, inner, head.u64()?, out)?;
            }
        }
    }
    Ok(())
}

/// Appends `count` numbers of `width` bytes, which the walk before found to lie in the file, in little-endian order.
fn append_numbers(cursor: &mut Cursor<'_>, width: u64, count: u64, out: &mut Vec<u8>) -> Result<(), CutShort> {
    let start = out.len();
    out.extend_from_slice(cursor.take(count * width)?);
    if cursor.big_endian() {
        numbers_to_little_endian(width as usize, &mut out[start..]);
    }
    Ok(())
}

/// Gives tensors of unknown type the bytes up to the next one, or up to the end of the file.
fn size_by_offsets(tensors: &mut [TensorInfo], data_len: u64) {
    let mut end = data_len;
    for tensor in tensors.iter_mut().rev() {
        if tensor.bytes.is_none() {
            // The places were checked: they ascend and end inside the file.
            tensor.bytes = end.checked_sub(tensor.offset);
        }
        end = tensor.offset;
    }
}

/// Checks that the tensors lie in the data section one after the other, each at the next aligned offset, and that
/// the file holds them all. After a tensor of unknown type any aligned offset will do.
fn check_places(
    file: &str,
    tensors: &[TensorInfo],
    data_start: u64,
    alignment: u64,
    file_len: u64,
) -> Result<(), GgufError> {
    let data_len = file_len - data_start.min(file_len);
    let mut expected = 0u64;
    let mut after_unknown = false;
    for tensor in tensors {
        let bad = |problem: String| GgufError::Tensor {
            file: file.to_owned(),
            tensor: tensor.shown_name(),
            problem,
            advice: DAMAGED,
        };
        let offset = tensor.offset;
        if !offset.is_multiple_of(alignment) {
            return Err(bad(format!("offset {offset} is not a multiple of the alignment {alignment}")));
        }
        if after_unknown && offset < expected {
            return Err(bad(format!("offset {offset} overlaps the tensor before it, expected {expected} or more")));
        }
        if !after_unknown && offset != expected {
            return Err(bad(format!("offset is {offset}, expected {expected}, the end of the tensor before it")));
        }
        let size = tensor.bytes.unwrap_or(0);
        let end = offset.checked_add(size);
        let Some(padded_end) = end.and_then(|end| align_up(end, alignment)) else {
            return Err(bad(format!("{size} bytes at offset {offset} end beyond 2^64")));
        };
        if offset + size > data_len {
            return Err(GgufError::CutShort {
                file: file.to_owned(),
                item: format!("tensor {}", tensor.shown_name()),
                offset: data_start.saturating_add(offset),
                needed: size,
                available: data_len.saturating_sub(offset),
            });
        }
        expected = padded_end;
        after_unknown = tensor.bytes.is_none();
    }
    Ok(())
}
