//! Hidden states of all tokens between two layers, in a file.
//!
//! 65,000 tokens of a model 4,096 wide take 1 GB. They are read and written once a layer, batch after batch, which costs
//! nothing beside the layer itself; and a run that was stopped finds the states that its next layer needs.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::MomentsError;
use crate::atomic_file::AtomicFile;
use crate::model::{HiddenStates, KeptWidths, TokenGroup};

/// Values that are converted at once.
const PIECE: usize = 1 << 16;

/// The states that enter layer `layer`, lying in `folder`.
pub(crate) fn path_of(folder: &Path, layer: usize) -> PathBuf {
    folder.join(format!("states-{layer:04}"))
}

/// Where the states of a model that is rounded on the way lie.
pub(super) fn rounded_folder(folder: &Path) -> PathBuf {
    folder.join("rounded")
}

/// True if the states that enter `layer` lie in `folder`; with them those of the rounded model, if `corrected`.
pub(crate) fn are_there(folder: &Path, layer: usize, corrected: bool) -> bool {
    path_of(folder, layer).exists() && (!corrected || path_of(&rounded_folder(folder), layer).exists())
}

/// Removes the states that enter `layer`, if they are there.
pub(super) fn remove(folder: &Path, layer: usize) {
    // A file that stays costs space and nothing else; the whole folder goes at the end.
    let _ = std::fs::remove_file(path_of(folder, layer));
}

/// Writes states, batch after batch: 32-bit floats, little-endian, row-major.
pub(super) struct StatesWriter {
    path: PathBuf,
    file: AtomicFile,
    bytes: Vec<u8>,
}

impl StatesWriter {
    pub(super) fn create(folder: &Path, layer: usize) -> Result<StatesWriter, MomentsError> {
        let path = path_of(folder, layer);
        Ok(StatesWriter { file: AtomicFile::create(&path, true)?, path, bytes: Vec::new() })
    }

    pub(super) fn write(&mut self, states: &HiddenStates) -> Result<(), MomentsError> {
        let StatesWriter { path, file, bytes } = self;
        let mut flush = |bytes: &mut Vec<u8>| {
            let failed = |source| MomentsError::Io { path: path.clone(), action: "cannot write hidden states", source };
            let written = file.write_all(bytes).map_err(failed);
            bytes.clear();
            written
        };
        bytes.clear();
        states.parts(|part| {
            part.chunks(PIECE).try_for_each(|piece| {
                bytes.extend(piece.iter().flat_map(|value| value.to_le_bytes()));
                if bytes.len() < 4 * PIECE { Ok(()) } else { flush(bytes) }
            })
        })?;
        flush(bytes)
    }

    pub(super) fn commit(self) -> Result<(), MomentsError> {
        Ok(self.file.commit()?)
    }
}

/// Reads what a [`StatesWriter`] wrote.
pub(super) struct StatesReader {
    path: PathBuf,
    file: File,
    n_embd: usize,
    /// What stands behind the stream of each token.
    kept: Vec<KeptWidths>,
}

impl StatesReader {
    /// Opens the states that enter `layer`.
    ///
    /// # Errors
    /// When the file is not there or does not hold `tokens` rows.
    pub(super) fn open(
        folder: &Path,
        layer: usize,
        tokens: usize,
        n_embd: usize,
        kept: Vec<KeptWidths>,
    ) -> Result<StatesReader, MomentsError> {
        let path = path_of(folder, layer);
        let failed = |source| MomentsError::Io { path: path.clone(), action: "cannot read hidden states", source };
        let file = File::open(&path).map_err(failed)?;
        let found = file.metadata().map_err(failed)?.len();
        let row_len = n_embd + kept.iter().map(|widths| widths.keys + widths.values).sum::<usize>();
        let expected = 4 * tokens as u64 * row_len as u64;
        if found != expected {
            let problem =
                format!("has {found} bytes, expected {expected}; delete its folder or add --force to start over");
            return Err(MomentsError::States { path, problem });
        }
        Ok(StatesReader { path, file, n_embd, kept })
    }

    /// States of the tokens of `group`, the first of which is token `first` of the file, for layer `layer`.
    pub(super) fn read(
        &mut self,
        first: usize,
        group: Arc<TokenGroup>,
        layer: usize,
    ) -> Result<HiddenStates, MomentsError> {
        let failed = |source| MomentsError::Io { path: self.path.clone(), action: "cannot read hidden states", source };
        let row_len = self.n_embd + self.kept.iter().map(|widths| widths.keys + widths.values).sum::<usize>();
        self.file.seek(SeekFrom::Start(4 * first as u64 * row_len as u64)).map_err(failed)?;
        let mut data = vec![0.0f32; group.len() * row_len];
        let mut bytes = vec![0u8; 4 * PIECE.min(data.len())];
        for piece in data.chunks_mut(PIECE) {
            let bytes = &mut bytes[..4 * piece.len()];
            self.file.read_exact(bytes).map_err(failed)?;
            let words = bytes.as_chunks::<4>().0;
            piece.iter_mut().zip(words).for_each(|(value, word)| *value = f32::from_le_bytes(*word));
        }
        Ok(HiddenStates::from_parts(group, layer, self.n_embd, &self.kept, data)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_come_back_batch_by_batch() {
        let folder = tempfile::tempdir().unwrap();
        let group = |n: u32| Arc::new(TokenGroup::from_sequences([(0..n).collect::<Vec<u32>>()]));
        let states = |n: u32, seed: f32| {
            let data = (0..n * 3).map(|at| at as f32 * 0.25 - seed).collect();
            HiddenStates::from_parts(group(n), 2, 3, &[], data).unwrap()
        };
        let (a, b) = (states(4, 1.0), states(2, -7.5));
        let mut writer = StatesWriter::create(folder.path(), 2).unwrap();
        writer.write(&a).unwrap();
        writer.write(&b).unwrap();
        assert!(StatesReader::open(folder.path(), 2, 6, 3, Vec::new()).is_err(), "not there before the end");
        writer.commit().unwrap();
        let mut reader = StatesReader::open(folder.path(), 2, 6, 3, Vec::new()).unwrap();
        assert_eq!(reader.read(4, group(2), 2).unwrap().data(), b.data());
        assert_eq!(reader.read(0, group(4), 2).unwrap().data(), a.data());
        let error = StatesReader::open(folder.path(), 2, 7, 3, Vec::new()).err().unwrap().to_string();
        assert!(error.contains("has 72 bytes, expected 84"), "{error}");
        remove(folder.path(), 2);
        assert!(!path_of(folder.path(), 2).exists());
    }
}
