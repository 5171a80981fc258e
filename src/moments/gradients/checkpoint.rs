//! What an interrupted measurement of gradients leaves: the moments of each finished layer, and the gradients that the next one
//! needs.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::super::states::{self, StatesReader, StatesWriter};
use super::super::{GradientMoments, GradientProvenance, GradientsWriter, MomentsError, save_gradients};
use super::{GradientSink, OutputGradients, Reached};
use crate::atomic_file::AtomicFile;
use crate::model::{HiddenStates, Model, TokenGroup};
use crate::unfinished::partial_path;

/// A folder beside the output, with a file of moments for every finished layer. Step `n_layer` is the head.
pub(super) struct Checkpoint<'a> {
    folder: PathBuf,
    model: &'a Model<'a>,
    provenance: &'a GradientProvenance,
}

impl<'a> Checkpoint<'a> {
    /// The folder of `output`, made if it is not there. What other runs left in it is removed if `fresh`.
    ///
    /// # Errors
    /// When the folder cannot be made, or holds the work of another run.
    pub(super) fn open(
        output: &Path,
        model: &'a Model<'a>,
        provenance: &'a GradientProvenance,
        fresh: bool,
    ) -> Result<Checkpoint<'a>, MomentsError> {
        let checkpoint = Checkpoint { folder: partial_path(output), model, provenance };
        if checkpoint.folder.exists() && (0..=model.n_layer()).any(|step| checkpoint.is_of_another(step)) {
            if !fresh {
                let problem = "holds unfinished gradients of another model, text or seed; delete it or add --force";
                return Err(MomentsError::States { path: checkpoint.folder, problem: problem.to_owned() });
            }
            checkpoint.remove()?;
        }
        let failed = |source| checkpoint.failed("cannot make the folder for unfinished work", source);
        std::fs::create_dir_all(&checkpoint.folder).map_err(failed)?;
        Ok(checkpoint)
    }

    /// Where hidden states may lie.
    pub(super) fn path(&self) -> &Path {
        &self.folder
    }

    fn step_path(&self, step: usize) -> PathBuf {
        self.folder.join(format!("step-{step:04}.gguf"))
    }

    fn loss_path(&self) -> PathBuf {
        self.folder.join("loss")
    }

    fn failed(&self, action: &'static str, source: std::io::Error) -> MomentsError {
        MomentsError::Io { path: self.folder.clone(), action, source }
    }

    fn is_of_another(&self, step: usize) -> bool {
        let path = self.step_path(step);
        path.exists() && GradientMoments::open(&path).map_or(true, |found| found.provenance() != self.provenance)
    }

    /// The lowest step down to which all are done, and its gradients and the loss are there.
    fn reached(&self) -> Option<usize> {
        let layers = self.model.n_layer();
        let done = (0..=layers).rev().take_while(|step| self.step_path(*step).exists()).last()?;
        (states::path_of(&self.folder, done).exists() && self.loss_path().exists()).then_some(done)
    }

    /// Copies the moments of all steps to the output.
    ///
    /// # Errors
    /// When a file is damaged or the output cannot be written.
    pub(super) fn write(&self, mut writer: GradientsWriter) -> Result<(), MomentsError> {
        for step in 0..=self.model.n_layer() {
            let path = self.step_path(step);
            if !path.exists() {
                continue;
            }
            let found = GradientMoments::open(&path)?;
            for name in found.outputs().keys() {
                found.moment(name)?.map_or(Ok(()), |moment| writer.write(name, &moment))?;
            }
            for (name, squares) in found.only_squares()? {
                writer.write_squares(&name, &squares)?;
            }
        }
        Ok(writer.finish()?)
    }

    /// Removes it with all that is in it.
    ///
    /// # Errors
    /// When the system refuses.
    pub(super) fn remove(&self) -> Result<(), MomentsError> {
        std::fs::remove_dir_all(&self.folder).map_err(|source| self.failed("cannot remove unfinished work", source))
    }
}

impl GradientSink for Checkpoint<'_> {
    fn go_on(&mut self, groups: &[Arc<TokenGroup>]) -> Result<Option<Reached>, MomentsError> {
        let Some(layer) = self.reached() else { return Ok(None) };
        let loss = std::fs::read(self.loss_path()).map_err(|source| self.failed("cannot read the loss", source))?;
        // A loss that is damaged changes no moment, but it would be a lie.
        let Ok(loss) = loss.try_into().map(f64::from_le_bytes) else { return Ok(None) };
        let tokens = groups.iter().map(|group| group.len()).sum();
        let n_embd = self.model.hparams().n_embd;
        let mut reader = StatesReader::open(&self.folder, layer, tokens, n_embd, self.model.kept_widths(layer))?;
        let mut first = 0;
        let mut gradients = Vec::with_capacity(groups.len());
        for group in groups {
            gradients.push(reader.read(first, group.clone(), layer)?);
            first += group.len();
        }
        Ok(Some(Reached { layer, gradients, loss }))
    }

    fn take(
        &mut self,
        step: usize,
        found: Vec<(String, OutputGradients)>,
        gradients: &[HiddenStates],
        loss: f64,
    ) -> Result<(), MomentsError> {
        if step == self.model.n_layer() {
            let mut file = AtomicFile::create(&self.loss_path(), true)?;
            std::io::Write::write_all(&mut file, &loss.to_le_bytes())
                .map_err(|source| self.failed("cannot write the loss", source))?;
            file.commit()?;
        }
        let mut writer = StatesWriter::create(&self.folder, step)?;
        gradients.iter().try_for_each(|gradient| writer.write(gradient))?;
        writer.commit()?;
        let (mut moments, mut squares) = (std::collections::BTreeMap::new(), std::collections::BTreeMap::new());
        for (name, found) in found {
            match found {
                OutputGradients::Moment(moment) => drop(moments.insert(name, moment)),
                OutputGradients::Squares(found) => drop(squares.insert(name, found)),
            }
        }
        // The file that makes the step count comes last.
        save_gradients(&self.step_path(step), true, self.provenance, &moments, &squares)?;
        states::remove(&self.folder, step + 1);
        Ok(())
    }
}
