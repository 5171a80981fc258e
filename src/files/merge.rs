//! The parts of a split model into one file.

use std::path::{Path, PathBuf};

use super::copy::{Output, write_outputs};
use super::{FilesError, Part};
use crate::atomic_file::Replace;
use crate::gguf::{Gguf, shown, split};
use crate::progress::Watch;

/// Missing parts that a message names.
const SHOWN_PARTS: usize = 4;

/// All parts of a split model, found and checked.
///
/// The whole file has the metadata of the first part without the keys of a part, and all tensors with names, types and bytes
/// as they were.
pub struct Merge {
    gguf: Gguf,
    prefix: PathBuf,
}

impl Merge {
    /// Finds all parts by the name of any of them.
    ///
    /// # Errors
    /// If the file is not a part by its name and its keys, parts are missing or do not fit together, or a further part has
    /// metadata of its own, which a whole file has no place for.
    pub fn open(part: &Path) -> Result<Merge, FilesError> {
        let refused = |problem: String| FilesError::refused(&part.display().to_string(), problem);
        let Some((prefix, _, count)) = split::parse_shard_path(part) else {
            // A part under another name is told so.
            Gguf::open(part)?;
            return Err(refused(
                "is not a part of a split model; give one that is named like PREFIX-00001-of-00003.gguf".to_owned(),
            ));
        };
        let parts: Vec<PathBuf> = (0..count).map(|number| split::shard_path(&prefix, number, count)).collect();
        // Failures other than absence are reported by the attempt to open it.
        let missing: Vec<&PathBuf> = parts.iter().filter(|path| matches!(path.try_exists(), Ok(false))).collect();
        if !missing.is_empty() {
            let more = missing.len().saturating_sub(SHOWN_PARTS);
            let names = missing.iter().take(SHOWN_PARTS).filter_map(|path| path.file_name());
            let mut names: Vec<String> = names.map(|name| name.to_string_lossy().into_owned()).collect();
            if more > 0 {
                names.push(format!("{more} more"));
            }
            let (is, them) = if missing.len() == 1 { ("part is", "it") } else { ("parts are", "them") };
            let names = names.join(", ");
            let problem = format!("{} of {count} {is} missing; put {them} beside it: {names}", missing.len());
            return Err(refused(problem));
        }
        let gguf = Gguf::open(&parts[0])?;
        if gguf.shards().len() != usize::from(count) {
            let problem =
                format!("is one of {count} parts by its name, but its keys say that it stands alone; rename it");
            return Err(refused(problem));
        }
        if let Some((shard, key)) = gguf.shards().iter().find_map(|shard| Some((shard, shard.own_keys().first()?))) {
            let key = shown(key.as_bytes());
            let problem =
                format!("metadata key {key} is not in the first part, or another value; make both say the same");
            return Err(FilesError::refused(shard.label(), problem));
        }
        Ok(Merge { gguf, prefix })
    }

    /// The model.
    pub fn gguf(&self) -> &Gguf {
        &self.gguf
    }

    /// The name that the parts have in common, with `.gguf`.
    pub fn default_output(&self) -> PathBuf {
        let mut name = self.prefix.clone().into_os_string();
        name.push(".gguf");
        PathBuf::from(name)
    }

    /// What [`Self::write`] would make.
    ///
    /// # Errors
    /// If the file cannot be laid out.
    pub fn report(&self, output: &Path) -> Result<Part, FilesError> {
        let laid_out = self.lay_out(output)?;
        Ok(Part { path: laid_out.path.clone(), tensors: self.gguf.tensors().len(), size_bytes: laid_out.file_bytes() })
    }

    fn lay_out(&self, output: &Path) -> Result<Output<'_>, FilesError> {
        let count = self.gguf.tensors().len() as u64;
        let metadata = split::shard_metadata(self.gguf.metadata(), 0, 1, count);
        Output::new(output.to_owned(), &metadata, self.gguf.tensors().iter().collect())
    }

    /// Writes the whole file.
    ///
    /// # Errors
    /// If the output exists and may not be replaced, or is one of the parts; if a part cannot be read or the output not
    /// written, or `watch` stops the run.
    pub fn write(&self, output: &Path, replace: Replace, watch: &dyn Watch) -> Result<Part, FilesError> {
        write_outputs(&self.gguf, &[self.lay_out(output)?], false, "merging", replace, watch)?;
        self.report(output)
    }
}
