//! The files of a model folder, read with a limit on their size.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::ConvertError;
use crate::gguf::shown;
use crate::text::{NotText, UTF8_MARK, utf8};

/// Largest JSON, template or SentencePiece file, in bytes. The largest published vocabularies have about 40 MB.
const MAX_FILE_BYTES: u64 = 512 << 20;

/// A folder as a publisher has it.
#[derive(Debug, Clone)]
pub(super) struct Folder {
    path: PathBuf,
}

impl Folder {
    pub(super) fn open(path: &Path) -> Result<Folder, ConvertError> {
        let wrong = |problem: &str| ConvertError::Folder { path: path.to_path_buf(), problem: problem.to_owned() };
        match std::fs::metadata(path) {
            Ok(found) if found.is_dir() => Ok(Folder { path: path.to_path_buf() }),
            Ok(_) => Err(wrong("is not a folder; give the folder that holds config.json and the safetensors files")),
            Err(e) if e.kind() == ErrorKind::NotFound => Err(wrong("does not exist; give a model folder")),
            Err(source) => Err(ConvertError::Read { file: path.to_path_buf(), source }),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.file(name).is_file()
    }

    /// Names of the plain files, sorted.
    pub(super) fn names(&self) -> Result<Vec<String>, ConvertError> {
        let failed = |source| ConvertError::Read { file: self.path.clone(), source };
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.path).map_err(failed)? {
            if let Ok(name) = entry.map_err(failed)?.file_name().into_string() {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// The bytes of a file, `None` if there is no such file.
    pub(super) fn bytes(&self, name: &str) -> Result<Option<Vec<u8>>, ConvertError> {
        let path = self.file(name);
        if !path.is_file() {
            return Ok(None);
        }
        let failed = |source| ConvertError::Read { file: path.clone(), source };
        let mut bytes = Vec::new();
        let file = File::open(&path).map_err(failed)?;
        file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
        if bytes.len() as u64 > MAX_FILE_BYTES {
            let problem = format!("has more than {} MB; such a file is damaged", MAX_FILE_BYTES >> 20);
            return Err(ConvertError::Json { file: path, problem });
        }
        Ok(Some(bytes))
    }

    pub(super) fn text(&self, name: &str) -> Result<Option<String>, ConvertError> {
        let Some(bytes) = self.bytes(name)? else { return Ok(None) };
        let text = String::from_utf8(bytes).map_err(|e| ConvertError::Json {
            file: self.file(name),
            problem: format!("is not UTF-8 at byte {}; download it again", e.utf8_error().valid_up_to()),
        })?;
        Ok(Some(text))
    }

    /// A JSON file, `None` if there is no such file.
    pub(super) fn json<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, ConvertError> {
        let Some(bytes) = self.bytes(name)? else { return Ok(None) };
        if let Err(error @ NotText::Utf16 { .. }) = utf8(&bytes) {
            return Err(ConvertError::Json { file: self.file(name), problem: error.to_string() });
        }
        serde_json::from_slice(bytes.strip_prefix(UTF8_MARK).unwrap_or(&bytes)).map(Some).map_err(|e| {
            // serde quotes what it found, which may be anything.
            let problem: String = e.to_string().chars().filter(|c| !c.is_control()).take(200).collect();
            let problem = if e.is_data() {
                format!("is not what this file should be: {problem}; download it again")
            } else {
                format!("is not JSON: {problem}; download it again")
            };
            ConvertError::Json { file: self.file(name), problem }
        })
    }

    /// A JSON file that must be an object.
    pub(super) fn object(&self, name: &str) -> Result<Option<serde_json::Map<String, Value>>, ConvertError> {
        match self.json::<Value>(name)? {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(ConvertError::Json {
                file: self.file(name),
                problem: format!("is {}, expected an object", kind(&other)),
            }),
        }
    }
}

/// What a JSON value is, for messages.
pub(super) fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Number(value) => value.to_string(),
        Value::String(text) => shown(text.as_bytes()),
        Value::Array(items) => format!("a list of {}", items.len()),
        Value::Object(_) => "an object".to_owned(),
    }
}
