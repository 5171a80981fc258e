//! The ordered key-value pairs of a GGUF file.

use std::fmt;

use super::error::{DAMAGED, GgufError, shown};
use super::split::is_shard_key;
use super::value::{Array, Value, ValueType};

/// Alignment of tensor data where `general.alignment` does not say otherwise, in bytes.
const DEFAULT_ALIGNMENT: u32 = 32;

const ALIGNMENT_KEY: &str = "general.alignment";

/// True for the keys that say how a file is laid out and nothing about the model.
pub(crate) fn is_layout_key(key: &str) -> bool {
    key == ALIGNMENT_KEY || is_shard_key(key)
}

/// Key-value pairs in file order, with exact types and bytes. Getters return `Ok(None)` for an absent key and an
/// error that names file, key, found and expected type for a value that does not fit.
#[derive(Clone, Default)]
pub struct Metadata {
    file: String,
    entries: Vec<(String, Value)>,
    /// Positions in `entries`, sorted by key: look-up without a second copy of the keys.
    sorted: Vec<u32>,
}

impl Metadata {
    /// No pairs; `file` is the name that error messages show.
    pub fn new(file: impl Into<String>) -> Metadata {
        Metadata { file: file.into(), entries: Vec::new(), sorted: Vec::new() }
    }

    /// Takes parsed pairs; a key that occurs twice is an error. n log n in the number of keys.
    pub(crate) fn from_entries(file: &str, entries: Vec<(String, Value)>) -> Result<Metadata, GgufError> {
        let mut sorted: Vec<u32> = (0..entries.len() as u32).collect();
        sorted.sort_unstable_by(|a, b| entries[*a as usize].0.cmp(&entries[*b as usize].0).then(a.cmp(b)));
        for pair in sorted.windows(2) {
            let (first, second) = (pair[0] as usize, pair[1] as usize);
            if entries[first].0 == entries[second].0 {
                return Err(GgufError::Key {
                    file: file.to_owned(),
                    key: shown(entries[first].0.as_bytes()),
                    problem: format!("occurs twice, as pairs {first} and {second}"),
                    advice: DAMAGED,
                });
            }
        }
        Ok(Metadata { file: file.to_owned(), entries, sorted })
    }

    /// The file that error messages name.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// Number of pairs.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True if there are no pairs.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The pairs in file order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    fn find(&self, key: &str) -> Result<usize, usize> {
        self.sorted.binary_search_by(|position| self.entries[*position as usize].0.as_str().cmp(key))
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.find(key).ok().map(|slot| &self.entries[self.sorted[slot] as usize].1)
    }

    /// True if the key is there.
    pub fn contains(&self, key: &str) -> bool {
        self.find(key).is_ok()
    }

    /// Sets a value: in the key's old place, or at the end if it is new.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        let mut value = value.into();
        if let Value::Array(array) = &mut value {
            array.set_origin(&self.file, key);
        }
        match self.find(key) {
            Ok(slot) => self.entries[self.sorted[slot] as usize].1 = value,
            Err(slot) => {
                self.sorted.insert(slot, self.entries.len() as u32);
                self.entries.push((key.to_owned(), value));
            }
        }
    }

    /// Sets a value at the end, whether or not the key was there before (`gguf_set_val_*`).
    pub fn set_last(&mut self, key: &str, value: impl Into<Value>) {
        self.remove(key);
        self.set(key, value);
    }

    /// Removes a key and returns its value; the order of the others stays.
    pub fn remove(&mut self, key: &str) -> Option<Value> {
        let slot = self.find(key).ok()?;
        let position = self.sorted.remove(slot);
        for other in &mut self.sorted {
            if *other > position {
                *other -= 1;
            }
        }
        Some(self.entries.remove(position as usize).1)
    }

    fn wrong_type(&self, key: &str, value: &Value, expected: &'static str) -> GgufError {
        GgufError::ValueType { file: self.file.clone(), key: shown(key.as_bytes()), found: value.describe(), expected }
    }

    /// A string that must be UTF-8.
    pub fn str(&self, key: &str) -> Result<Option<&str>, GgufError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let Value::String(text) = value else { return Err(self.wrong_type(key, value, "str")) };
        std::str::from_utf8(text).map(Some).map_err(|_| self.wrong_type(key, value, "str of valid UTF-8"))
    }

    /// A string as bytes, UTF-8 or not.
    pub fn bytes(&self, key: &str) -> Result<Option<&[u8]>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(value) => Err(self.wrong_type(key, value, "str")),
        }
    }

    /// An integer of any type that is not negative.
    pub fn u64(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.integer(key, "a non-negative integer")
    }

    /// An integer of any type that fits.
    pub fn u32(&self, key: &str) -> Result<Option<u32>, GgufError> {
        self.integer(key, "an integer from 0 to 4294967295")
    }

    /// An integer of any type that fits.
    pub fn i64(&self, key: &str) -> Result<Option<i64>, GgufError> {
        self.integer(key, "an integer below 2^63")
    }

    fn integer<T: TryFrom<i128>>(&self, key: &str, expected: &'static str) -> Result<Option<T>, GgufError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value
            .as_integer()
            .and_then(|wide| T::try_from(wide).ok())
            .map(Some)
            .ok_or_else(|| self.wrong_type(key, value, expected))
    }

    /// An f32, or an f64 rounded to single precision.
    pub fn f32(&self, key: &str) -> Result<Option<f32>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::F32(number)) => Ok(Some(*number)),
            Some(Value::F64(number)) => Ok(Some(*number as f32)),
            Some(value) => Err(self.wrong_type(key, value, "f32")),
        }
    }

    /// A bool.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(value) => Err(self.wrong_type(key, value, "bool")),
        }
    }

    /// An array of any element type.
    pub fn array(&self, key: &str) -> Result<Option<&Array>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(array)) => Ok(Some(array)),
            Some(value) => Err(self.wrong_type(key, value, "arr")),
        }
    }

    /// The error for a key that the caller cannot do without.
    pub fn missing(&self, key: &str) -> GgufError {
        GgufError::MissingKey { file: self.file.clone(), key: key.to_owned() }
    }

    /// Alignment of tensor data in bytes: `general.alignment`, 32 where absent.
    ///
    /// # Errors
    /// If the key is not a u32 or not a power of two.
    pub fn alignment(&self) -> Result<u32, GgufError> {
        let bad = |problem: String| GgufError::Key {
            file: self.file.clone(),
            key: shown(ALIGNMENT_KEY.as_bytes()),
            problem,
            advice: DAMAGED,
        };
        match self.get(ALIGNMENT_KEY) {
            None => Ok(DEFAULT_ALIGNMENT),
            Some(Value::U32(alignment)) if alignment.is_power_of_two() => Ok(*alignment),
            Some(Value::U32(alignment)) => Err(bad(format!("is {alignment}, expected a power of two"))),
            Some(value) => Err(bad(format!("is of type {}, expected {}", value.describe(), ValueType::U32))),
        }
    }
}

/// Equality of pairs and their order; the file's name does not matter.
impl PartialEq for Metadata {
    fn eq(&self, other: &Metadata) -> bool {
        self.entries == other.entries
    }
}

impl fmt::Debug for Metadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}
