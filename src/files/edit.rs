//! Metadata changed by hand; tensors stay as they are.

use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::FilesError;
use super::copy::{Output, write_outputs};
use crate::atomic_file::Replace;
use crate::gguf::{Gguf, GgufLayout, Metadata, NewTensor, TensorInfo, Value, ValueType, is_layout_key, shown};
use crate::os;
use crate::progress::Watch;
use crate::quantize::{reader_type, set_values};

/// The key of the chat template that readers take where none is asked for by name.
pub const CHAT_TEMPLATE: &str = "tokenizer.chat_template";

/// Bytes of the header that name the version of the format, of which 2 and 3 have the same layout.
const VERSION_BYTES: std::ops::Range<usize> = 4..8;

/// Changes of metadata: removals first, then renamings, then values, each in the order in which it was asked for.
#[derive(Clone, Debug, Default)]
pub struct Edit {
    remove: Vec<String>,
    rename: Vec<(String, String)>,
    set: Vec<(String, NewValue)>,
}

/// A value given by hand.
#[derive(Clone, Debug)]
enum NewValue {
    /// Brought to the type that it has to have.
    Fitted(Value),
    /// Of exactly this type.
    Exact(Value),
}

/// What became of a key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Change {
    /// The key; of a renamed one its old name.
    pub key: String,
    /// The new name of a renamed key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub renamed: Option<String>,
    /// Type and value before, long ones cut; none for a new key.
    pub before: Option<String>,
    /// Type and value after it; none for a removed key.
    pub after: Option<String>,
}

/// A model with its changes decided, ready to be written.
pub struct Edited {
    gguf: Gguf,
    metadata: Metadata,
    changes: Vec<Change>,
    notes: Vec<String>,
}

impl Edit {
    /// Changes nothing.
    pub fn new() -> Edit {
        Edit::default()
    }

    /// Removes a key.
    #[must_use]
    pub fn remove(mut self, key: &str) -> Edit {
        self.remove.push(key.to_owned());
        self
    }

    /// Gives a key another name; it keeps place, type and value.
    #[must_use]
    pub fn rename(mut self, from: &str, to: &str) -> Edit {
        self.rename.push((from.to_owned(), to.to_owned()));
        self
    }

    /// Sets a key. The value is brought to the type that readers of the key expect, or that the key has in the file; whole
    /// numbers of new keys have 32 bits, if they fit.
    #[must_use]
    pub fn set(mut self, key: &str, value: impl Into<Value>) -> Edit {
        self.set.push((key.to_owned(), NewValue::Fitted(value.into())));
        self
    }

    /// Sets a key to a value of exactly this type, which must be the one that the key has in the file and that its readers
    /// expect.
    #[must_use]
    pub fn set_exact(mut self, key: &str, value: impl Into<Value>) -> Edit {
        self.set.push((key.to_owned(), NewValue::Exact(value.into())));
        self
    }

    /// Decides what the metadata become. Nothing is written yet.
    ///
    /// # Errors
    /// If a key is about the layout of the file, a key to be removed or renamed is not there, a new name is taken, or a value
    /// cannot be what readers of its key expect.
    pub fn apply(self, gguf: Gguf) -> Result<Edited, FilesError> {
        let mut metadata = gguf.metadata().clone();
        let (mut changes, mut notes) = (Vec::new(), Vec::new());
        let refused = |problem: String| FilesError::refused(gguf.label(), problem);
        let named = self.rename.iter().flat_map(|(from, to)| [from, to]);
        for key in self.remove.iter().chain(named).chain(self.set.iter().map(|(key, _)| key)) {
            if is_layout_key(key) {
                let problem = format!("key {} says how the file is laid out", shown(key.as_bytes()));
                return Err(refused(format!("{problem}; lwq split, merge and quantize change that")));
            }
        }
        for key in &self.remove {
            let value = metadata.remove(key).ok_or_else(|| refused(no_key(key)))?;
            changes.push(Change { before: Some(value.describe()), ..Change::of(key) });
        }
        for (from, to) in &self.rename {
            let value = metadata.get(from).map(Value::describe);
            let value = value.ok_or_else(|| refused(no_key(from)))?;
            if metadata.contains(to) {
                let to = shown(to.as_bytes());
                return Err(refused(format!("has a key {to} already; remove it in the same command to replace it")));
            }
            metadata = renamed(&metadata, from, to);
            let renamed = Some(to.clone());
            changes.push(Change { renamed, before: Some(value.clone()), after: Some(value), ..Change::of(from) });
        }
        for (key, value) in self.set {
            let old = metadata.get(&key).cloned();
            match value {
                NewValue::Exact(value) => {
                    refuse_other_type(gguf.label(), &key, &value, old.as_ref())?;
                    metadata.set(&key, value);
                }
                NewValue::Fitted(value) => {
                    let set = set_values(&mut metadata, &[(key.clone(), value)], "--set");
                    let failed = |source| FilesError::Value { file: gguf.label().to_owned(), source: Box::new(source) };
                    notes.extend(set.map_err(failed)?);
                }
            }
            let new = metadata.get(&key);
            notes.extend(type_note(&key, old.as_ref(), new));
            let (before, after) = (old.map(|old| old.describe()), new.map(Value::describe));
            changes.push(Change { before, after, ..Change::of(&key) });
        }
        Ok(Edited { gguf, metadata, changes, notes })
    }
}

fn no_key(key: &str) -> String {
    format!("has no key {}; lwq inspect lists those it has", shown(key.as_bytes()))
}

impl Change {
    /// With nothing but the key.
    fn of(key: &str) -> Change {
        Change { key: key.to_owned(), renamed: None, before: None, after: None }
    }
}

/// The same pairs in the same order, one under another key.
fn renamed(metadata: &Metadata, from: &str, to: &str) -> Metadata {
    let mut result = Metadata::new(metadata.file());
    for (key, value) in metadata.iter() {
        result.set(if key == from { to } else { key }, value.clone());
    }
    result
}

/// A type that was named must be that of the file and of readers, who look for a key with one type.
fn refuse_other_type(file: &str, key: &str, value: &Value, old: Option<&Value>) -> Result<(), FilesError> {
    let (given, shown_key) = (value.value_type(), shown(key.as_bytes()));
    if let Some(old) = old.map(Value::value_type).filter(|old| *old != given) {
        let advice = "give that type, or remove the key in the same command to change it";
        return Err(FilesError::refused(file, format!("key {shown_key} is of type {old}, not {given}; {advice}")));
    }
    match reader_type(key).filter(|expected| *expected != given) {
        Some(expected) => {
            let problem = format!("readers of key {shown_key} expect type {expected}, not {given}; give that type");
            Err(FilesError::refused(file, problem))
        }
        None => Ok(()),
    }
}

/// A line where a value has another type than before, because readers of the key expect it.
fn type_note(key: &str, old: Option<&Value>, new: Option<&Value>) -> Option<String> {
    let (old, new) = (old?.value_type(), new?.value_type());
    // A list that became a single value has its own line.
    (old != new && old != ValueType::Array).then(|| {
        format!("--set {}: was {old} in the file, is stored as {new}, which readers expect", shown(key.as_bytes()))
    })
}

/// What stands before the data of a file, padded up to them.
struct Headers {
    path: PathBuf,
    old: Vec<u8>,
    /// With the changes, and as long.
    new: Vec<u8>,
}

impl Edited {
    /// What becomes of the keys.
    pub fn changes(&self) -> &[Change] {
        &self.changes
    }

    /// What a user should know, one line each.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The metadata with the changes.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Writes a new file with the changes, which may replace the one that is read.
    ///
    /// # Errors
    /// If the model is split, the output exists and may not be replaced or cannot be written, the source cannot be read, or
    /// `watch` stops the run.
    pub fn write(&self, output: &Path, replace: Replace, watch: &dyn Watch) -> Result<(), FilesError> {
        let parts = self.gguf.shards().len();
        if parts > 1 {
            let problem = format!("is the first of {parts} parts; merge them first, or edit it in place");
            return Err(FilesError::refused(self.gguf.label(), problem));
        }
        let tensors: Vec<&TensorInfo> = self.gguf.tensors().iter().collect();
        let output = Output::new(output.to_owned(), &self.metadata, tensors)?;
        write_outputs(&self.gguf, &[output], true, "writing", replace, watch)
    }

    /// Writes the changes into the file itself, whose tensor data stay where they are. Only the bytes from the first that changes
    /// to the last are written, at once; a power cut in that moment can damage the file, which [`Self::write`] never does.
    ///
    /// # Errors
    /// If the header with the changes does not end at the same place, the file's header is not in the form that this
    /// program writes (big-endian, other offsets or paddings), or the file cannot be written.
    pub fn write_in_place(self) -> Result<(), FilesError> {
        let Some(Headers { path, old, new }) = self.headers()? else { return Ok(()) };
        // The map must not show bytes that were never checked.
        drop(self);
        let Some(first) = old.iter().zip(&new).position(|(a, b)| a != b) else { return Ok(()) };
        let end = old.iter().zip(&new).rposition(|(a, b)| a != b).map_or(first, |last| last + 1);
        let write = || {
            let file = OpenOptions::new().write(true).open(&path)?;
            os::write_all_at(&file, &new[first..end], first as u64)?;
            file.sync_all()
        };
        write().map_err(|source: io::Error| FilesError::Write { file: path.clone(), source })
    }

    /// Checks that [`Self::write_in_place`] can be done.
    ///
    /// # Errors
    /// As there, but for the writing.
    pub fn check_in_place(&self) -> Result<(), FilesError> {
        self.headers().map(drop)
    }

    /// `None` for a file in memory.
    fn headers(&self) -> Result<Option<Headers>, FilesError> {
        let shard = &self.gguf.shards()[0];
        let refused = |problem: String| FilesError::refused(shard.label(), problem);
        let Some(path) = shard.path() else { return Ok(None) };
        let old = shard.header().to_vec();
        let version = old.get(VERSION_BYTES).unwrap_or_default();
        let laid_out = |metadata: &Metadata| {
            let tensors = self.gguf.tensors().iter().filter(|tensor| tensor.shard == 0);
            let sized = tensors.map(|tensor| (NewTensor::from(tensor), tensor.bytes));
            let layout = GgufLayout::carried(shard.label(), metadata, sized)?;
            let mut header = layout.header().to_vec();
            if header.len() >= VERSION_BYTES.end && version.len() == VERSION_BYTES.len() {
                header[VERSION_BYTES].copy_from_slice(version);
            }
            header.resize(layout.data_start() as usize, 0);
            Ok::<_, FilesError>(header)
        };
        if laid_out(self.gguf.metadata())? != old {
            let problem = "its header is not in the form that lwq writes, so it cannot be changed in place";
            return Err(refused(format!("{problem}; write a new file with -o")));
        }
        let new = laid_out(&self.metadata)?;
        if new.len() == old.len() {
            return Ok(Some(Headers { path: path.to_owned(), old, new }));
        }
        let problem = match new.len().checked_sub(old.len()) {
            Some(more) => format!("{more} bytes more"),
            None => format!("{} bytes less", old.len() - new.len()),
        };
        let advice = "its tensors would have to move; write a new file with -o";
        Err(refused(format!("the header with these changes takes {problem} than the file has for it, so {advice}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::testing::RawGguf;

    fn model() -> Gguf {
        let file = RawGguf::new().str("general.architecture", "llama").str("general.name", "name");
        let file = file.u32("llama.block_count", 2).i32("custom.i32", 5).strings("custom.list", &["a"]);
        Gguf::from_bytes(file.f32_tensor("w", &[2], &[1.0, 2.0]).build()).unwrap()
    }

    fn keys(edit: Edit) -> Vec<(String, String)> {
        let edited = edit.apply(model()).unwrap_or_else(|error| panic!("{error}"));
        edited.metadata().iter().skip(1).map(|(key, value)| (key.to_owned(), value.describe())).collect()
    }

    #[test]
    fn keys_are_removed_renamed_and_set_in_this_order() {
        let edit = Edit::new().set("custom.i32", Value::I64(-1)).set("new", Value::I64(7)).remove("general.name");
        let edit = edit.rename("llama.block_count", "general.name").set("general.name", "x");
        let found = keys(edit);
        let found: Vec<(&str, &str)> = found.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        assert_eq!(
            found,
            [
                ("general.name", "str (\"x\")"),
                ("custom.i32", "i32 (-1)"),
                ("custom.list", "arr of str (1 elements)"),
                ("new", "u32 (7)")
            ]
        );
    }

    #[test]
    fn a_type_changes_only_where_the_key_is_removed_or_readers_expect_it() {
        let refused = |edit: Edit| edit.apply(model()).map(drop).unwrap_err().to_string();
        let message = refused(Edit::new().set_exact("custom.i32", 1u8));
        assert!(message.contains("\"custom.i32\" is of type i32, not u8"), "{message}");
        let message = refused(Edit::new().set_exact("llama.context_length", 1u64));
        assert!(message.contains("\"llama.context_length\" expect type u32, not u64"), "{message}");
        assert!(refused(Edit::new().set("custom.list", "x")).contains("\"custom.list\""));
        for (value, shown) in [(Value::U8(1), "u8 (1)"), (Value::I64(2), "i64 (2)")] {
            let found = keys(Edit::new().remove("custom.i32").set_exact("custom.i32", value));
            assert_eq!(found.last().unwrap(), &("custom.i32".to_owned(), shown.to_owned()));
        }
        let file = RawGguf::new().str("general.architecture", "llama").i32("llama.block_count", 2);
        let gguf = Gguf::from_bytes(file.build()).unwrap();
        let edited =
            Edit::new().set("llama.block_count", Value::I64(3)).apply(gguf).map_err(|e| e.to_string()).unwrap();
        assert_eq!(edited.metadata().get("llama.block_count"), Some(&Value::U32(3)));
        assert!(edited.notes()[0].contains("was i32 in the file, is stored as u32"), "{:?}", edited.notes());
    }

    #[test]
    fn what_would_break_the_file_or_lose_a_key_is_refused() {
        for (edit, part) in [
            (Edit::new().set("general.alignment", Value::I64(64)), "laid out"),
            (Edit::new().remove("split.count"), "laid out"),
            (Edit::new().rename("general.name", "split.no"), "laid out"),
            (Edit::new().remove("lost"), "has no key \"lost\""),
            (Edit::new().rename("lost", "found"), "has no key \"lost\""),
            (Edit::new().rename("general.name", "custom.i32"), "has a key \"custom.i32\" already"),
            (Edit::new().set("llama.block_count", Value::F64(0.5)), "\"llama.block_count\""),
        ] {
            let message = edit.apply(model()).map(drop).unwrap_err().to_string();
            assert!(message.contains(part) && !message.contains('\n'), "{message}");
        }
    }
}
