//! What an unfinished run leaves, so that the same command goes on behind its last finished layer.
//!
//! A folder `OUTPUT.partial` beside the output holds a GGUF file for each finished step, with the rounded tensors of that
//! layer, one with what search gives for them where the whole file is to be judged, and the hidden states that the next
//! layer needs. Every file carries the fingerprints of all that its content
//! depends on and appears when it is complete.

use std::io::Write;
use std::path::{Path, PathBuf};

use super::RoundingError;
use super::outcome::Outcome;
use crate::atomic_file::AtomicFile;
use crate::gguf::{Gguf, GgufLayout, GgufWriter, Metadata, NewTensor};
use crate::unfinished::{Conditions, key, partial_path};

const KIND: &str = "lwq rounding checkpoint";
const OUTCOMES: &str = "outcomes";
const JUDGED: &str = "judged.json";

/// The folder of an unfinished run.
#[derive(Debug)]
pub struct PartialFolder {
    path: PathBuf,
    conditions: Conditions,
}

impl PartialFolder {
    /// The folder of `output`, made if it is not there. With `fresh`, what belongs to another run is removed.
    ///
    /// # Errors
    /// When the folder cannot be made, or holds the work of another run: the message says what differs.
    pub fn open(output: &Path, conditions: Conditions, fresh: bool) -> Result<PartialFolder, RoundingError> {
        let folder = PartialFolder { path: partial_path(output), conditions };
        let failed = |action, source| RoundingError::Io { path: folder.path.clone(), action, source };
        if folder.path.exists() {
            match folder.check() {
                Err(_) if fresh => folder.remove()?,
                other => other?,
            }
        }
        std::fs::create_dir_all(&folder.path).map_err(|e| failed("cannot make the folder for unfinished work", e))?;
        Ok(folder)
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn step_path(&self, step: usize) -> PathBuf {
        self.path.join(format!("step-{step:04}.gguf"))
    }

    fn searched_path(&self, step: usize) -> PathBuf {
        self.path.join(format!("searched-{step:04}.gguf"))
    }

    /// Number of steps that are done.
    pub fn steps_done(&self) -> usize {
        (0..).take_while(|step| self.step_path(*step).exists()).count()
    }

    /// Checks that all that is there belongs to this run.
    fn check(&self) -> Result<(), RoundingError> {
        if !self.path.is_dir() {
            return Err(self.damaged(&self.path, "is no folder"));
        }
        (0..self.steps_done()).try_for_each(|step| self.load(step).map(|_| ()))
    }

    fn damaged(&self, path: &Path, problem: &str) -> RoundingError {
        let problem = format!("{problem}; delete {} or add --force to start over", self.path.display());
        RoundingError::Checkpoint { path: path.to_owned(), problem }
    }

    /// Keeps the tensors of a finished step.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(
        &self,
        step: usize,
        tensors: &[(NewTensor, Vec<u8>)],
        outcomes: &[Outcome],
    ) -> Result<(), RoundingError> {
        self.save_at(&self.step_path(step), tensors, |metadata| {
            metadata.set(&key(OUTCOMES), serde_json::to_string(outcomes).unwrap_or_default());
        })
    }

    /// Keeps what search gives for tensors of a step; before the step itself, which is what makes it count.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save_searched(&self, step: usize, tensors: &[(NewTensor, Vec<u8>)]) -> Result<(), RoundingError> {
        let path = self.searched_path(step);
        match tensors.is_empty() {
            false => self.save_at(&path, tensors, |_| {}),
            // A run that was killed may have left one with fewer layers rounded.
            true if path.exists() => std::fs::remove_file(&path).map_err(|source| RoundingError::Io {
                path,
                action: "cannot remove unfinished work",
                source,
            }),
            true => Ok(()),
        }
    }

    fn save_at(
        &self,
        path: &Path,
        tensors: &[(NewTensor, Vec<u8>)],
        more: impl FnOnce(&mut Metadata),
    ) -> Result<(), RoundingError> {
        let label = path.display().to_string();
        let mut metadata = Metadata::new(label.clone());
        metadata.set("general.type", KIND);
        self.conditions.write(&mut metadata);
        more(&mut metadata);
        let layout = GgufLayout::carried(&label, &metadata, tensors.iter().map(|(tensor, _)| (tensor.clone(), None)))?;
        let mut writer = GgufWriter::new(AtomicFile::create(path, true)?, layout)?;
        for (index, (_, data)) in tensors.iter().enumerate() {
            writer.write(index, data)?;
        }
        Ok(writer.finish()?.commit()?)
    }

    /// The tensors of a finished step.
    ///
    /// # Errors
    /// When the file is damaged or was made under other conditions.
    pub fn load(&self, step: usize) -> Result<(Gguf, Vec<Outcome>), RoundingError> {
        let path = self.step_path(step);
        let gguf = self.load_at(&path)?;
        let outcomes = gguf.metadata().str(&key(OUTCOMES))?.and_then(|text| serde_json::from_str(text).ok());
        let outcomes = outcomes.ok_or_else(|| self.damaged(&path, "lacks what was done"))?;
        Ok((gguf, outcomes))
    }

    /// What search gives for tensors of a finished step, where any differ.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_searched(&self, step: usize) -> Result<Option<Gguf>, RoundingError> {
        let path = self.searched_path(step);
        path.exists().then(|| self.load_at(&path)).transpose()
    }

    fn load_at(&self, path: &Path) -> Result<Gguf, RoundingError> {
        let gguf = Gguf::open(path).map_err(|error| self.damaged(path, &format!("is damaged ({error})")))?;
        let metadata = gguf.metadata();
        if metadata.str("general.type")? != Some(KIND) {
            return Err(self.damaged(path, "is no unfinished work of lwq"));
        }
        match self.conditions.difference(metadata) {
            Some(difference) => Err(self.damaged(path, &format!("was made with {difference}"))),
            None => Ok(gguf),
        }
    }

    /// Divergences of the whole with some steps rounded by search, as far as they were found; none from a damaged file,
    /// which costs running the model again.
    pub(crate) fn load_judged(&self) -> Vec<(Vec<bool>, f64)> {
        let text = std::fs::read(self.path.join(JUDGED)).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    /// Keeps such divergences.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn save_judged(&self, found: &[(Vec<bool>, f64)]) -> Result<(), RoundingError> {
        let path = self.path.join(JUDGED);
        let mut file = AtomicFile::create(&path, true)?;
        let text = serde_json::to_vec(found).unwrap_or_default();
        file.write_all(&text).map_err(|source| RoundingError::Io { path, action: "cannot write", source })?;
        Ok(file.commit()?)
    }

    /// Removes it with all that is in it.
    ///
    /// # Errors
    /// When it is there and cannot be removed.
    pub fn remove(&self) -> Result<(), RoundingError> {
        let removed =
            if self.path.is_dir() { std::fs::remove_dir_all(&self.path) } else { std::fs::remove_file(&self.path) };
        removed.map_err(|source| RoundingError::Io {
            path: self.path.clone(),
            action: "cannot remove unfinished work",
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::TensorType;
    use crate::gguf::testing::RawGguf;

    fn conditions(seed: u32, settings: &str) -> Conditions {
        let model = Gguf::from_bytes(RawGguf::new().f32_tensor("w", &[32], &[0.5; 32]).build()).unwrap();
        Conditions::new(&model, &[("text", seed.to_string()), ("gate text", "9".to_owned())], settings.to_owned())
    }

    #[test]
    fn steps_come_back_and_other_runs_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("o.gguf");
        let folder = PartialFolder::open(&output, conditions(1, "a"), false).unwrap();
        assert_eq!(folder.steps_done(), 0);
        let tensor = NewTensor { name: "w.weight".into(), shape: vec![32, 2], ty: TensorType::Q8_0 };
        let data: Vec<u8> = (0..68).collect();
        folder.save(0, &[(tensor, data.clone())], &[]).unwrap();
        folder.save(1, &[], &[]).unwrap();
        let again = PartialFolder::open(&output, conditions(1, "a"), false).unwrap();
        assert_eq!(again.steps_done(), 2);
        let (gguf, outcomes) = again.load(0).unwrap();
        assert_eq!((gguf.data(&gguf.tensors()[0]).unwrap(), outcomes.len()), (data.as_slice(), 0));

        let refused = |conditions| PartialFolder::open(&output, conditions, false).unwrap_err().to_string();
        assert!(refused(conditions(2, "a")).contains("another text; delete"));
        assert!(refused(conditions(1, "b")).contains("other settings (a, now b); delete"));
        std::fs::write(folder.step_path(1), b"GGUF").unwrap();
        assert!(refused(conditions(1, "a")).contains("is damaged"));
        let fresh = PartialFolder::open(&output, conditions(1, "b"), true).unwrap();
        assert_eq!(fresh.steps_done(), 0);
        fresh.remove().unwrap();
        assert!(!fresh.path().exists());
    }
}
