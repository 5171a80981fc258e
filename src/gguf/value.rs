//! Metadata values: exact types and bytes, arrays kept as raw bytes so that a vocabulary costs no memory.

use std::fmt;
use std::io::{self, Write};
use std::sync::Arc;

use byteorder::{ByteOrder, LittleEndian, WriteBytesExt};

use super::bytes::Bytes;
use super::cursor::Cursor;
use super::error::{GgufError, shown};

/// The type of a metadata value, with GGUF's ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum ValueType {
    /// Unsigned byte.
    U8 = 0,
    /// Signed byte.
    I8 = 1,
    /// Unsigned 16 bits.
    U16 = 2,
    /// Signed 16 bits.
    I16 = 3,
    /// Unsigned 32 bits.
    U32 = 4,
    /// Signed 32 bits.
    I32 = 5,
    /// IEEE single.
    F32 = 6,
    /// One byte, non-zero means true.
    Bool = 7,
    /// Length and bytes.
    String = 8,
    /// Element type, count, elements.
    Array = 9,
    /// Unsigned 64 bits.
    U64 = 10,
    /// Signed 64 bits.
    I64 = 11,
    /// IEEE double.
    F64 = 12,
}

impl ValueType {
    /// All types, in the order of their ids.
    pub const ALL: [ValueType; 13] = [
        ValueType::U8,
        ValueType::I8,
        ValueType::U16,
        ValueType::I16,
        ValueType::U32,
        ValueType::I32,
        ValueType::F32,
        ValueType::Bool,
        ValueType::String,
        ValueType::Array,
        ValueType::U64,
        ValueType::I64,
        ValueType::F64,
    ];

    /// The type with this id, if GGUF has one.
    pub(crate) fn from_id(id: u32) -> Option<ValueType> {
        ValueType::ALL.get(id as usize).copied()
    }

    /// GGUF's id.
    pub(crate) fn id(self) -> u32 {
        self as u32
    }

    /// GGUF's short name (`gguf_type_name`).
    pub fn name(self) -> &'static str {
        match self {
            ValueType::U8 => "u8",
            ValueType::I8 => "i8",
            ValueType::U16 => "u16",
            ValueType::I16 => "i16",
            ValueType::U32 => "u32",
            ValueType::I32 => "i32",
            ValueType::F32 => "f32",
            ValueType::Bool => "bool",
            ValueType::String => "str",
            ValueType::Array => "arr",
            ValueType::U64 => "u64",
            ValueType::I64 => "i64",
            ValueType::F64 => "f64",
        }
    }

    /// Bytes of one value, or `None` for strings and arrays.
    pub(crate) fn fixed_bytes(self) -> Option<u64> {
        match self {
            ValueType::U8 | ValueType::I8 | ValueType::Bool => Some(1),
            ValueType::U16 | ValueType::I16 => Some(2),
            ValueType::U32 | ValueType::I32 | ValueType::F32 => Some(4),
            ValueType::U64 | ValueType::I64 | ValueType::F64 => Some(8),
            ValueType::String | ValueType::Array => None,
        }
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// One metadata value. Equality is equality of type and bytes, so a NaN equals itself.
#[derive(Clone)]
#[allow(missing_docs)] // the variants are those of `ValueType`
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(Bytes),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

impl Value {
    /// The value's type.
    pub fn value_type(&self) -> ValueType {
        match self {
            Value::U8(_) => ValueType::U8,
            Value::I8(_) => ValueType::I8,
            Value::U16(_) => ValueType::U16,
            Value::I16(_) => ValueType::I16,
            Value::U32(_) => ValueType::U32,
            Value::I32(_) => ValueType::I32,
            Value::F32(_) => ValueType::F32,
            Value::Bool(_) => ValueType::Bool,
            Value::String(_) => ValueType::String,
            Value::Array(_) => ValueType::Array,
            Value::U64(_) => ValueType::U64,
            Value::I64(_) => ValueType::I64,
            Value::F64(_) => ValueType::F64,
        }
    }

    /// Any integer type as a wide integer; `None` for everything else.
    pub fn as_integer(&self) -> Option<i128> {
        Some(match *self {
            Value::U8(v) => v.into(),
            Value::I8(v) => v.into(),
            Value::U16(v) => v.into(),
            Value::I16(v) => v.into(),
            Value::U32(v) => v.into(),
            Value::I32(v) => v.into(),
            Value::U64(v) => v.into(),
            Value::I64(v) => v.into(),
            _ => return None,
        })
    }

    /// A number of this integer type, `None` for another type or a number that it cannot hold.
    pub(crate) fn integer(value_type: ValueType, number: i128) -> Option<Value> {
        Some(match value_type {
            ValueType::U8 => Value::U8(number.try_into().ok()?),
            ValueType::I8 => Value::I8(number.try_into().ok()?),
            ValueType::U16 => Value::U16(number.try_into().ok()?),
            ValueType::I16 => Value::I16(number.try_into().ok()?),
            ValueType::U32 => Value::U32(number.try_into().ok()?),
            ValueType::I32 => Value::I32(number.try_into().ok()?),
            ValueType::U64 => Value::U64(number.try_into().ok()?),
            ValueType::I64 => Value::I64(number.try_into().ok()?),
            _ => return None,
        })
    }

    /// The type for messages, with the value where it is short: `i32 (-1)`, `arr of str (32000 elements)`.
    pub(crate) fn describe(&self) -> String {
        match self {
            Value::String(text) => format!("str ({})", shown(text)),
            Value::Array(array) => format!("arr of {} ({} elements)", array.elem_type(), array.len()),
            Value::F32(v) => format!("f32 ({v})"),
            Value::F64(v) => format!("f64 ({v})"),
            Value::Bool(v) => format!("bool ({v})"),
            integer => format!("{} ({})", self.value_type(), integer.as_integer().unwrap_or_default()),
        }
    }

    /// Writes the value's little-endian bytes, without its type id.
    pub(crate) fn write_to(&self, out: &mut impl Write) -> io::Result<()> {
        match self {
            Value::U8(v) => out.write_u8(*v),
            Value::I8(v) => out.write_i8(*v),
            Value::U16(v) => out.write_u16::<LittleEndian>(*v),
            Value::I16(v) => out.write_i16::<LittleEndian>(*v),
            Value::U32(v) => out.write_u32::<LittleEndian>(*v),
            Value::I32(v) => out.write_i32::<LittleEndian>(*v),
            Value::F32(v) => out.write_f32::<LittleEndian>(*v),
            Value::Bool(v) => out.write_u8(u8::from(*v)),
            Value::String(text) => write_string(out, text),
            Value::Array(array) => array.write_to(out),
            Value::U64(v) => out.write_u64::<LittleEndian>(*v),
            Value::I64(v) => out.write_i64::<LittleEndian>(*v),
            Value::F64(v) => out.write_f64::<LittleEndian>(*v),
        }
    }

    /// The bytes that [`Value::write_to`] writes.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        in_memory(|out| self.write_to(out))
    }
}

impl PartialEq for Value {
    fn eq(&self, other: &Value) -> bool {
        if self.value_type() != other.value_type() {
            return false;
        }
        match (self, other) {
            (Value::String(a), Value::String(b)) => a == b,
            (Value::Array(a), Value::Array(b)) => a == b,
            _ => self.to_bytes() == other.to_bytes(),
        }
    }
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.describe())
    }
}

/// Writes a string as GGUF stores it: length and bytes.
pub(crate) fn write_string(out: &mut impl Write, text: &[u8]) -> io::Result<()> {
    out.write_u64::<LittleEndian>(text.len() as u64)?;
    out.write_all(text)
}

/// What `write` writes.
pub(crate) fn in_memory(write: impl FnOnce(&mut Vec<u8>) -> io::Result<()>) -> Vec<u8> {
    let mut out = Vec::new();
    write(&mut out).expect("a Vec takes all that is written to it");
    out
}

macro_rules! value_from {
    ($($native:ty => $variant:ident;)*) => {
        $(impl From<$native> for Value {
            fn from(native: $native) -> Value {
                Value::$variant(native.into())
            }
        })*
    };
}

value_from! {
    u8 => U8;
    i8 => I8;
    u16 => U16;
    i16 => I16;
    u32 => U32;
    i32 => I32;
    f32 => F32;
    bool => Bool;
    u64 => U64;
    i64 => I64;
    f64 => F64;
    &str => String;
    String => String;
    Array => Array;
}

/// Which file and key an array came from, for messages.
#[derive(Debug, Default)]
pub(crate) struct Origin {
    pub file: String,
    pub key: String,
}

/// A metadata array: its elements stay raw little-endian bytes (often a slice of the mapped file) that were
/// validated when read, so a vocabulary of a million strings costs nothing until it is walked.
#[derive(Clone)]
pub struct Array {
    elem: ValueType,
    count: u64,
    raw: Bytes,
    origin: Arc<Origin>,
}

impl Array {
    /// `raw` must hold exactly `count` valid little-endian elements.
    pub(crate) fn from_raw(elem: ValueType, count: u64, raw: Bytes, origin: Arc<Origin>) -> Array {
        Array { elem, count, raw, origin }
    }

    /// An array of strings.
    pub fn of_strings<S: AsRef<[u8]>>(strings: impl IntoIterator<Item = S>) -> Array {
        let mut count = 0;
        let raw = in_memory(|raw| {
            strings.into_iter().try_for_each(|string| {
                count += 1;
                write_string(raw, string.as_ref())
            })
        });
        Array { elem: ValueType::String, count, raw: raw.into(), origin: Arc::default() }
    }

    /// An array of scalars or arrays, all of the type `elem`.
    ///
    /// # Panics
    /// If a value is of another type: the caller builds these values itself.
    pub fn of_values(elem: ValueType, values: &[Value]) -> Array {
        let raw = in_memory(|raw| {
            values.iter().try_for_each(|value| {
                assert_eq!(value.value_type(), elem, "an array holds elements of one type");
                value.write_to(raw)
            })
        });
        Array { elem, count: values.len() as u64, raw: raw.into(), origin: Arc::default() }
    }

    /// Type of the elements.
    pub fn elem_type(&self) -> ValueType {
        self.elem
    }

    /// Number of elements.
    pub fn len(&self) -> u64 {
        self.count
    }

    /// True if there are no elements.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The elements as they stand in a little-endian file.
    pub fn raw(&self) -> &[u8] {
        &self.raw
    }

    /// Walks the strings of a string array, in order. They may be invalid UTF-8.
    ///
    /// # Errors
    /// If the elements are of another type.
    pub fn iter_str(&self) -> Result<Strings<'_>, GgufError> {
        if self.elem != ValueType::String {
            return Err(self.wrong_type("an array of str"));
        }
        Ok(Strings { cursor: Cursor::new(&self.raw, false), left: self.count })
    }

    /// The elements of an array of f32 or f64, in order. Integer arrays are refused: their bytes mean something else.
    ///
    /// # Errors
    /// If the elements are of another type.
    pub fn to_f32_vec(&self) -> Result<Vec<f32>, GgufError> {
        match self.elem {
            ValueType::F32 => Ok(self.raw.chunks_exact(4).map(LittleEndian::read_f32).collect()),
            ValueType::F64 => Ok(self.raw.chunks_exact(8).map(|raw| LittleEndian::read_f64(raw) as f32).collect()),
            _ => Err(self.wrong_type("an array of f32")),
        }
    }

    /// The elements of an array of integers of any width, in order.
    ///
    /// # Errors
    /// If the elements are of another type, or a u64 exceeds the range of i64.
    pub fn to_i64_vec(&self) -> Result<Vec<i64>, GgufError> {
        let raw = &self.raw;
        Ok(match self.elem {
            ValueType::U8 => raw.iter().map(|byte| i64::from(*byte)).collect(),
            ValueType::I8 => raw.iter().map(|byte| i64::from(byte.cast_signed())).collect(),
            ValueType::U16 => raw.chunks_exact(2).map(|raw| LittleEndian::read_u16(raw).into()).collect(),
            ValueType::I16 => raw.chunks_exact(2).map(|raw| LittleEndian::read_i16(raw).into()).collect(),
            ValueType::U32 => raw.chunks_exact(4).map(|raw| LittleEndian::read_u32(raw).into()).collect(),
            ValueType::I32 => raw.chunks_exact(4).map(|raw| LittleEndian::read_i32(raw).into()).collect(),
            ValueType::I64 => raw.chunks_exact(8).map(LittleEndian::read_i64).collect(),
            ValueType::U64 => raw
                .chunks_exact(8)
                .map(|raw| i64::try_from(LittleEndian::read_u64(raw)))
                .collect::<Result<_, _>>()
                .map_err(|_| self.wrong_type("an array of integers below 2^63"))?,
            _ => return Err(self.wrong_type("an array of integers")),
        })
    }

    /// The elements of an array of bools, in order.
    ///
    /// # Errors
    /// If the elements are of another type.
    pub fn to_bool_vec(&self) -> Result<Vec<bool>, GgufError> {
        match self.elem {
            ValueType::Bool => Ok(self.raw.iter().map(|byte| *byte != 0).collect()),
            _ => Err(self.wrong_type("an array of bool")),
        }
    }

    /// The elements one by one, of any type. For small arrays and for display: each element becomes a [`Value`].
    pub fn iter(&self) -> Values<'_> {
        Values { array: self, cursor: Cursor::new(&self.raw, false), left: self.count }
    }

    pub(crate) fn set_origin(&mut self, file: &str, key: &str) {
        self.origin = Arc::new(Origin { file: file.to_owned(), key: key.to_owned() });
    }

    fn wrong_type(&self, expected: &'static str) -> GgufError {
        GgufError::ValueType {
            file: self.origin.file.clone(),
            key: shown(self.origin.key.as_bytes()),
            found: format!("arr of {} ({} elements)", self.elem, self.count),
            expected,
        }
    }

    fn write_to(&self, out: &mut impl Write) -> io::Result<()> {
        out.write_u32::<LittleEndian>(self.elem.id())?;
        out.write_u64::<LittleEndian>(self.count)?;
        out.write_all(&self.raw)
    }
}

/// Equality of element type and bytes; where the array came from does not matter.
impl PartialEq for Array {
    fn eq(&self, other: &Array) -> bool {
        self.elem == other.elem && self.count == other.count && self.raw == other.raw
    }
}

impl fmt::Debug for Array {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}; {}]", self.elem, self.count)
    }
}

/// The strings of an array, as bytes.
#[derive(Clone)]
pub struct Strings<'a> {
    cursor: Cursor<'a>,
    left: u64,
}

impl<'a> Iterator for Strings<'a> {
    type Item = &'a [u8];

    // The bytes were validated when read; a mapped file that changes underneath ends the walk early.
    fn next(&mut self) -> Option<&'a [u8]> {
        self.left = self.left.checked_sub(1)?;
        let len = self.cursor.u64().ok()?;
        self.cursor.take(len).ok()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let upper = usize::try_from(self.left.min(self.cursor.remaining() / 8)).unwrap_or(usize::MAX);
        (0, Some(upper))
    }
}

/// The elements of an array, as values.
pub struct Values<'a> {
    array: &'a Array,
    cursor: Cursor<'a>,
    left: u64,
}

impl Iterator for Values<'_> {
    type Item = Value;

    fn next(&mut self) -> Option<Value> {
        self.left = self.left.checked_sub(1)?;
        let cursor = &mut self.cursor;
        Some(match self.array.elem {
            ValueType::U8 => Value::U8(cursor.u8().ok()?),
            ValueType::I8 => Value::I8(cursor.i8().ok()?),
            ValueType::U16 => Value::U16(cursor.u16().ok()?),
            ValueType::I16 => Value::I16(cursor.i16().ok()?),
            ValueType::U32 => Value::U32(cursor.u32().ok()?),
            ValueType::I32 => Value::I32(cursor.i32().ok()?),
            ValueType::F32 => Value::F32(cursor.f32().ok()?),
            ValueType::Bool => Value::Bool(cursor.u8().ok()? != 0),
            ValueType::U64 => Value::U64(cursor.u64().ok()?),
            ValueType::I64 => Value::I64(cursor.i64().ok()?),
            ValueType::F64 => Value::F64(cursor.f64().ok()?),
            ValueType::String => {
                let len = cursor.u64().ok()?;
                let start = cursor.position();
                cursor.take(len).ok()?;
                Value::String(self.array.raw.slice(start..cursor.position()))
            }
            ValueType::Array => {
                let elem = ValueType::from_id(cursor.u32().ok()?)?;
                let count = cursor.u64().ok()?;
                let start = cursor.position();
                skip_elements(cursor, elem, count)?;
                let raw = self.array.raw.slice(start..cursor.position());
                Value::Array(Array { elem, count, raw, origin: Arc::clone(&self.array.origin) })
            }
        })
    }
}

/// Moves past the elements of a nested array that was validated before.
fn skip_elements(cursor: &mut Cursor<'_>, elem: ValueType, count: u64) -> Option<()> {
    if let Some(size) = elem.fixed_bytes() {
        cursor.take(count.checked_mul(size)?).ok()?;
        return Some(());
    }
    for _ in 0..count {
        if elem == ValueType::String {
            let len = cursor.u64().ok()?;
            cursor.take(len).ok()?;
        } else {
            let inner = ValueType::from_id(cursor.u32().ok()?)?;
            let count = cursor.u64().ok()?;
            skip_elements(cursor, inner, count)?;
        }
    }
    Some(())
}
