//! The model that is published: a GGUF, or a folder that becomes one.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::PublishError;
use crate::convert::source::ModelFolder;
use crate::convert::{Conversion, Options};
use crate::gguf::{Gguf, fingerprint, split};
use crate::hub;
use crate::quantize::open_source;

/// Endings of the names of 16-bit files.
const TYPES: [&str; 5] = ["f16", "bf16", "fp16", "f32", "fp32"];

/// A source that was opened.
#[derive(Debug)]
pub(super) enum Source {
    /// A GGUF file.
    File(PathBuf),
    /// A Hugging Face folder.
    Folder(PathBuf),
}

/// A source with what decisions need of it.
pub(super) struct Opened {
    pub source: Source,
    /// Of a folder the header of what it becomes, over empty data.
    pub gguf: Gguf,
    /// Tells sources apart.
    pub sha256: String,
    /// What files are called.
    pub name: String,
    /// The 16-bit GGUF's own name.
    pub base_file: String,
}

impl Source {
    /// The path that the user gave.
    pub(super) fn path(&self) -> &Path {
        match self {
            Source::File(path) | Source::Folder(path) => path,
        }
    }

    pub(super) fn is_folder(&self) -> bool {
        matches!(self, Source::Folder(_))
    }
}

impl Opened {
    /// Reads headers.
    ///
    /// # Errors
    /// When the source is no model that is known.
    pub(super) fn open(path: &Path, name: Option<&str>) -> Result<Opened, PublishError> {
        if !path.is_dir() {
            let gguf = open_source(path)?;
            let sha256 = fingerprint(&gguf);
            let stem = match split::parse_shard_path(path) {
                Some((prefix, _, _)) => prefix,
                None => path.with_extension(""),
            };
            let stem = file_name(&stem);
            let base_file = file_name(path);
            let gguf = gguf.labelled(&base_file);
            let name = named(name, &without_type(&stem))?;
            return Ok(Opened { source: Source::File(path.to_owned()), gguf, sha256, name, base_file });
        }
        let conversion = Conversion::open(path, &Options::default())?;
        let sha256 = ModelFolder::open(path)?.fingerprint()?;
        let folder = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let name = named(name, &without_type(&folder_name(&folder)))?;
        let base_file = format!("{name}-{}.gguf", conversion.main_type());
        let gguf = empty(&conversion, &base_file)?;
        Ok(Opened { source: Source::Folder(path.to_owned()), gguf, sha256, name, base_file })
    }
}

/// A GGUF with the header that a conversion will have and nothing but zeros behind it: enough to decide, and no byte on disk.
fn empty(conversion: &Conversion, name: &str) -> Result<Gguf, PublishError> {
    let path = std::env::temp_dir().join(format!(".lwq-{}-{name}", std::process::id()));
    let layout = conversion.layout(name)?;
    let failed = PublishError::io(&path, "cannot make it");
    let written = File::create(&path).map_err(&failed).and_then(|file| {
        layout.write_header_at(&file)?;
        file.set_len(layout.file_bytes()).map_err(&failed)?;
        Ok(Gguf::open(&path)?.labelled(name))
    });
    // The map keeps what it needs.
    let _ = std::fs::remove_file(&path);
    written
}

fn named(given: Option<&str>, usual: &str) -> Result<String, PublishError> {
    let name = given.unwrap_or(usual);
    let sound = !name.is_empty()
        && !name.starts_with(['.', '-'])
        && name.len() <= 200
        && !name.chars().any(|c| c.is_control() || matches!(c, '/' | '\\' | '|' | '`' | '"' | '<' | '>'));
    match sound {
        true => Ok(name.to_owned()),
        false => {
            Err(PublishError::Choice(format!("{name:?} cannot begin the names of files; give another with --name")))
        }
    }
}

/// The last part of a path.
pub(super) fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}

/// The name of a folder; of a snapshot in the cache of the Hugging Face hub that of its repository.
fn folder_name(folder: &Path) -> String {
    match hub::repository_of(folder) {
        Some(repository) => file_name(Path::new(&repository)),
        None => file_name(folder),
    }
}

/// A name without the type at its end: `model-f16` is a file of `model`.
fn without_type(stem: &str) -> String {
    let cut =
        stem.rsplit_once(['-', '.', '_']).filter(|(_, ty)| TYPES.iter().any(|known| ty.eq_ignore_ascii_case(known)));
    cut.map_or(stem, |(name, _)| name).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lose_their_type() {
        for (stem, name) in [("m-f16", "m"), ("m.BF16", "m"), ("m-Q8_0", "m-Q8_0"), ("f16", "f16"), ("a-b", "a-b")] {
            assert_eq!(without_type(stem), name);
        }
        assert_eq!(folder_name(Path::new("/x/models--org--name/snapshots/12ab")), "name");
        assert!(named(Some("../x"), "y").is_err() && named(None, "y").is_ok_and(|name| name == "y"));
    }
}
