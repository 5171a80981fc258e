//! The model that shows inputs: the folder in GGUF's form.

use std::path::Path;

use super::norms;
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
pub(crate) struct Converted<'a> {
    pub(super) folder: &'a ModelFolder,
    conversion: Conversion,
    pub(crate) gguf: Gguf,
}

impl<'a> Converted<'a> {
    /// Opens the GGUF in `work`, after making it if it is not there; with `drop_mtp` without blocks that predict further
    /// tokens, which do not run.
    pub(crate) fn open(
        folder: &'a ModelFolder,
        work: &Path,
        drop_mtp: bool,
        watch: &dyn Watch,
    ) -> Result<Converted<'a>, ExportError> {
        let options = Options { drop_mtp, ..Options::default() };
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

    /// The rows of a matrix of the GGUF that those of the folder become.
    pub(super) fn matrix_of(&self, tensor: &str, matrices: &[(&Matrix, &[f32])]) -> Option<Vec<f32>> {
        let named = matrices.iter().map(|(matrix, values)| (self.folder.name_of(matrix), (*matrix, *values)));
        self.conversion.matrix_of(tensor, &named.collect())
    }

    /// The folder's weight that a vector of the GGUF holds as it is.
    pub(super) fn vector(&self, tensor: &str) -> Option<usize> {
        let name = self.conversion.vector_of(tensor)?;
        (0..self.folder.len()).find(|weight| self.folder.name(*weight) == name)
    }

    /// A vector of the folder after division by powers of two, see [`norms::divided`].
    pub(super) fn divided(&self, weight: usize, exponents: &[i8]) -> Result<(Vec<u8>, Vec<f32>), ExportError> {
        let Some(dtype) = self.folder.stored_type(weight) else { return Ok((Vec::new(), vec![1.0; exponents.len()])) };
        let mut bytes = vec![0; self.folder.stored_bytes(weight) as usize];
        self.folder.read_stored(weight, 0, &mut bytes)?;
        Ok(norms::divided(&bytes, dtype, exponents))
    }

    /// All places of rows of a matrix of the folder.
    pub(crate) fn places_of(&self, matrix: &Matrix) -> Vec<Place> {
        self.conversion.places_of(self.folder.name_of(matrix), matrix)
    }
}
