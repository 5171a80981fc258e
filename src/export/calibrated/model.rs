//! The model that shows inputs: the folder in GGUF's form.

use std::path::Path;

use crate::atomic_file::AtomicFile;
use crate::convert::places::Place;
use crate::convert::source::{Matrix, ModelFolder};
use crate::convert::{Conversion, Options};
use crate::export::ExportError;
use crate::gguf::Gguf;
use crate::progress::Watch;

/// Its name in the folder of unfinished work.
const FILE: &str = "model.gguf";

/// A folder and the GGUF that was made of it.
pub(super) struct Converted<'a> {
    folder: &'a ModelFolder,
    conversion: Conversion,
    pub(super) gguf: Gguf,
}

impl<'a> Converted<'a> {
    /// Opens the GGUF in `work`, after making it if it is not there.
    pub(super) fn open(folder: &'a ModelFolder, work: &Path, watch: &dyn Watch) -> Result<Converted<'a>, ExportError> {
        let options = Options { drop_mtp: true, ..Options::default() };
        let conversion = Conversion::open(folder.path(), &options)?;
        let path = work.join(FILE);
        if !path.exists() {
            let layout = conversion.layout(&path.display().to_string())?;
            let file = AtomicFile::create(&path, true)?;
            file.reserve(layout.file_bytes())?;
            conversion.write(&layout, file.file(), watch)?;
            file.commit()?;
        }
        let gguf = Gguf::open(&path)?;
        Ok(Converted { folder, conversion, gguf })
    }

    /// Where a matrix of the folder stands in the GGUF.
    pub(super) fn place_of(&self, matrix: &Matrix) -> Option<Place> {
        self.conversion.place_of(self.folder.name_of(matrix), matrix)
    }
}
