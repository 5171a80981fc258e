//! Files beside the weights: `config.json`, which says what was done, and those that go along as they are.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use super::ExportError;
use crate::convert::source::ModelFolder;

/// Extensions of files with weights.
const WEIGHTS: [&str; 10] = ["safetensors", "bin", "pt", "pth", "ckpt", "gguf", "h5", "msgpack", "onnx", "ot"];

/// Files that would say something else than what is in the output, or that only a repository needs.
const LEFT: [&str; 4] = ["config.json", "hf_quant_config.json", "recipe.yaml", "quantize_config.json"];

/// A folder that transformers writes templates to.
const TEMPLATES: &str = "additional_chat_templates";

/// Puts the quantization into a configuration, in place of the source's own.
pub(crate) fn set_quantization(config: &mut Map<String, Value>, quantization: Value) {
    const OLD: [&str; 2] = ["quantization_config", "compression_config"];
    OLD.iter().for_each(|key| {
        config.shift_remove(*key);
    });
    if let Some(Value::Object(text)) = config.get_mut("text_config") {
        OLD.iter().for_each(|key| {
            text.shift_remove(*key);
        });
    }
    config.insert("quantization_config".to_owned(), quantization);
}

/// Names of the files that go along.
///
/// # Errors
/// If the folder cannot be read.
pub(crate) fn beside(source: &ModelFolder) -> Result<Vec<String>, ExportError> {
    let goes = |name: &String| {
        let extension = Path::new(name).extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        let is_index = name.ends_with(".index.json");
        let is_weights = WEIGHTS.contains(&extension.to_ascii_lowercase().as_str());
        !name.starts_with('.') && !is_index && !is_weights && !LEFT.contains(&name.as_str())
    };
    let mut names: Vec<String> = source.file_names()?.into_iter().filter(goes).collect();
    let is_plain = |name: &String| source.path().join(name).is_file() || name == TEMPLATES;
    names.retain(is_plain);
    Ok(names)
}

/// Copies them, following links.
///
/// # Errors
/// If one cannot be read or written.
pub(crate) fn copy(names: &[String], from: &Path, to: &Path) -> Result<(), ExportError> {
    for name in names {
        let (from, to) = (from.join(name), to.join(name));
        if from.is_dir() {
            let inner = list(&from)?;
            fs::create_dir_all(&to).map_err(|source| failed(&to, "cannot make the folder", source))?;
            copy(&inner, &from, &to)?;
            continue;
        }
        fs::copy(&from, &to).map_err(|source| failed(&from, "cannot copy it", source))?;
        // Sources in caches are read-only, which the copy need not be.
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let _ = fs::set_permissions(&to, fs::Permissions::from_mode(0o644));
        }
    }
    Ok(())
}

/// Plain files of a folder, sorted.
fn list(folder: &Path) -> Result<Vec<String>, ExportError> {
    let entries = fs::read_dir(folder).map_err(|source| failed(folder, "cannot read the folder", source))?;
    let mut names: Vec<String> = entries
        .flatten()
        .filter(|entry| entry.path().is_file())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    Ok(names)
}

pub(crate) fn failed(path: &Path, action: &'static str, source: std::io::Error) -> ExportError {
    ExportError::Io { path: path.to_path_buf(), action, source }
}

/// Writes JSON as transformers does, with two spaces.
///
/// # Errors
/// If the file cannot be written.
pub(crate) fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<(), ExportError> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|error| failed(path, "cannot write it", error.into()))?;
    text.push(b'\n');
    fs::write(path, text).map_err(|source| failed(path, "cannot write it", source))
}
