//! The run that rounds with feedback, before the rest of the file is written.

use std::collections::{HashMap, HashSet};

use anyhow::{Context, Result};

use super::plan::Plan;
use lwq::atomic_file::AtomicFile;
use crate::cli::rounding::Calibration;
use crate::cli::{Common, Interrupted, Progress, Unit, count, printable};
use lwq::gguf::TensorType;
use lwq::model::Model;
use lwq::os;
use lwq::quantize::write::PipelineError;
use lwq::rounding::{Conditions, Outcome, PartialFolder, RoundingError, Run, RunOutput};

/// Flop of a unit of progress.
const FLOP_PER_UNIT: f64 = 1e6;

/// The tensors that were rounded, lying in the folder of unfinished work until the output is complete.
pub(super) struct Rounded {
    folder: PartialFolder,
    steps: usize,
    outcomes: Vec<Outcome>,
}

impl Rounded {
    /// Rounds what has an input in the model, for all plans in one pass, going on with what an interrupted run left.
    ///
    /// # Errors
    /// When a tensor cannot be rounded, a folder belongs to another run, or this one is interrupted.
    pub fn make(
        plans: &[Plan<'_>],
        model: &Model<'_>,
        calibration: &Calibration,
        common: &Common,
    ) -> Result<Vec<Rounded>> {
        let mut folders = Vec::with_capacity(plans.len());
        for plan in plans {
            let types = plan.types_for_feedback(model.output_tensor());
            let settings = format!("{}, types {}", calibration.words(), digest(&types));
            let conditions = Conditions::new(plan.gguf, &calibration.text, &calibration.gate, settings);
            folders.push((types, PartialFolder::open(&plan.files[0].path, conditions, common.force)?));
        }
        let outputs: Vec<RunOutput<'_>> = folders.iter().map(|(types, folder)| RunOutput { types, folder }).collect();
        let run = Run {
            model,
            calibration: &calibration.text,
            gate: &calibration.gate,
            outputs: &outputs,
            settings: calibration.interruptible(),
        };
        common.note(format!(
            "{} tokens of {}, judged on {} tokens of {}",
            count(calibration.text.len() as u64),
            calibration.text.name(),
            count(calibration.gate.len() as u64),
            calibration.gate.name()
        ));
        let steps = run.steps();
        let done = run.steps_done();
        if done > 0 {
            common.note(format!("going on after {done} of {steps} steps of an earlier run"));
        }
        let result = round(&run, common).with_context(|| printable(model.gguf().label()));
        let stopped = os::end_on_interrupt();
        if let Err(error) = result {
            let interrupted = error.downcast_ref::<RoundingError>().is_some_and(RoundingError::is_interrupt);
            if !(interrupted || stopped) {
                return Err(error);
            }
            let done = run.steps_done();
            common.warn(format!("interrupted after {done} of {steps} steps: the same command goes on there"));
            return Err(Interrupted.into());
        }
        if stopped {
            common.warn("interrupted: the same command goes on there");
            return Err(Interrupted.into());
        }
        let mut all = Vec::with_capacity(folders.len());
        for (_, folder) in folders {
            let mut outcomes = Vec::new();
            for step in 0..steps {
                outcomes.extend(folder.load(step)?.1);
            }
            all.push(Rounded { folder, steps, outcomes });
        }
        Ok(all)
    }

    /// What became of each tensor.
    pub fn outcomes(&self) -> &[Outcome] {
        &self.outcomes
    }

    /// Names of the tensors that were rounded here.
    pub fn names(&self) -> HashSet<&str> {
        self.outcomes.iter().map(|outcome| outcome.tensor.as_str()).collect()
    }

    /// Writes the tensors to their places in the output.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn write(&self, plan: &Plan<'_>, files: &[AtomicFile]) -> Result<()> {
        let places: HashMap<&str, _> =
            plan.tensors.iter().map(|tensor| (tensor.source.name.as_str(), tensor.place())).collect();
        for step in 0..self.steps {
            let (gguf, _) = self.folder.load(step)?;
            for tensor in gguf.tensors() {
                let Some(&(file, offset)) = places.get(tensor.name.as_str()) else { continue };
                let file = &files[file];
                os::write_all_at(file.file(), gguf.data(tensor)?, offset)
                    .map_err(|source| PipelineError::Write { file: file.target().to_path_buf(), source })?;
            }
        }
        Ok(())
    }

    /// Removes the unfinished work; the output is complete.
    ///
    /// # Errors
    /// When the folder cannot be removed.
    pub fn finish(self) -> Result<()> {
        Ok(self.folder.remove()?)
    }
}

fn round(run: &Run<'_, '_, '_>, common: &Common) -> Result<(), RoundingError> {
    let units = |flop: f64| (flop / FLOP_PER_UNIT) as u64;
    let progress = Progress::new(common, "rounding", units(run.work()?), Unit::Megaflop);
    run.round(&mut |flop, what| progress.advance(units(flop), what))?;
    progress.finish();
    Ok(())
}

/// Tells choices of types apart.
fn digest(types: &HashMap<String, TensorType>) -> String {
    use sha2::{Digest, Sha256};
    let mut lines: Vec<String> = types.iter().map(|(name, ty)| format!("{}:{name} {ty}\n", name.len())).collect();
    lines.sort();
    format!("{:x}", Sha256::digest(lines.concat()))
}
