//! The run: from drafts to files.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::time::Instant;

use super::feedback::{Outcome, PartialFolder, RoundingError, Run, RunOutput};
use super::report::Times;
use super::whole_gate::{Candidate, Steps, WholeGate, WholeVerdict};
use super::write::{self, PipelineError};
use super::{Draft, QuantizeError, Report};
use crate::atomic_file::{AtomicFile, Replace, commit_all};
use crate::display::{count, printable};
use crate::gguf::{Gguf, TensorType};
use crate::moments::Calibration;
use crate::os;
use crate::progress::{Interrupted, Stop, Unit, Watch};
use crate::unfinished::{Conditions, GOES_ON, going_on};

/// Makes the files of several drafts of one model. Those that round with feedback share its pass over the model, which is
/// most of the work; a tensor that has the same type in several is rounded once.
///
/// # Errors
/// As [`Draft::write`]. Outputs before the one that failed are complete.
pub fn write_all(
    outputs: &[(&Draft<'_>, PathBuf)],
    replace: Replace,
    watch: &dyn Watch,
) -> Result<Vec<Report>, QuantizeError> {
    let started = Instant::now();
    let paths: Vec<Vec<PathBuf>> = outputs.iter().map(|(draft, output)| draft.paths(output)).collect();
    let mut seen = HashSet::new();
    if let Some(path) = paths.iter().flatten().find(|path| !seen.insert(*path)) {
        return Err(QuantizeError::SameName(path.clone()));
    }
    let needed: u64 = outputs.iter().map(|(draft, _)| draft.needed_bytes()).sum();
    for ((draft, _), paths) in outputs.iter().zip(&paths) {
        draft.refuse_what_cannot_be_done(paths, needed - draft.needed_bytes(), replace)?;
    }
    let mut rounded = round_with_feedback(outputs, &paths, replace, watch)?.into_iter();
    let mut gate = None;
    let mut reports = Vec::with_capacity(outputs.len());
    for ((draft, output), paths) in outputs.iter().zip(&paths) {
        let mut rounded = draft.calibration.and_then(|_| rounded.next());
        let files = draft.create_files(paths, replace)?;
        let done = rounded.as_ref().map(Rounded::names).unwrap_or_default();
        let work = draft.work(&done);
        watch.begin("quantizing", work.iter().filter_map(|work| work.source.bytes).sum(), Unit::Bytes);
        let threads = rayon::current_num_threads();
        let stages = write::run(&work, &files, threads, watch)?;
        watch.end();
        let mut verdict = None;
        if let (Some(rounded), Some(calibration)) = (&mut rounded, draft.calibration) {
            rounded.write(draft, &files)?;
            if calibration.has_final_gate() {
                verdict = Some(rounded.judge_whole(draft, &files, &mut gate, calibration, watch)?);
            }
        }
        let written = Instant::now();
        commit_all(files).map_err(QuantizeError::Incomplete)?;
        let times = Times { threads, stages, syncing: written.elapsed().as_secs_f64() };
        let outcomes = rounded.as_ref().map(Rounded::outcomes).unwrap_or_default();
        reports.push(Report::new(draft, output, outcomes, verdict, Some((started.elapsed(), times))));
        if let Some(rounded) = rounded {
            rounded.folder.remove().map_err(QuantizeError::Unfinished)?;
        }
    }
    Ok(reports)
}

/// The tensors of one output that were rounded with feedback, lying in the folder of unfinished work until the output is
/// complete.
struct Rounded {
    folder: PartialFolder,
    /// Of every step.
    outcomes: Vec<Vec<Outcome>>,
}

/// Rounds what has an input in the model, for all drafts in one pass, going on with what an interrupted run left. The
/// result has an entry for each draft that is rounded so, in their order.
fn round_with_feedback(
    outputs: &[(&Draft<'_>, PathBuf)],
    paths: &[Vec<PathBuf>],
    replace: Replace,
    watch: &dyn Watch,
) -> Result<Vec<Rounded>, QuantizeError> {
    let Some(calibration) = outputs.iter().find_map(|(draft, _)| draft.calibration) else { return Ok(Vec::new()) };
    let rounded = outputs.iter().filter(|(draft, _)| draft.calibration.is_some()).count();
    if calibration.is_corrected() && rounded > 1 {
        return Err(QuantizeError::CorrectedTogether);
    }
    let folders = open_folders(outputs, paths, calibration, replace)?;
    let outputs: Vec<RunOutput<'_>> = folders.iter().map(|(types, folder)| RunOutput { types, folder }).collect();
    let stop = watch.stop();
    let run = Run { calibration, outputs: &outputs, stop: stop.clone() };
    let (steps, done) = (run.steps(), run.steps_done());
    if done < steps {
        watch.note(&format!(
            "{} tokens of {}, judged on {} tokens of {}",
            count(calibration.text().len() as u64),
            calibration.text().name(),
            count(calibration.gate().len() as u64),
            calibration.gate().name()
        ));
    }
    if done > 0 && done < steps {
        watch.note(&going_on(done, steps, "steps"));
    }
    let result = run.work().and_then(|work| {
        watch.begin("rounding", work, Unit::Megaflop);
        run.round(watch)?;
        watch.end();
        Ok(())
    });
    let stopped = stop.end();
    match result {
        Err(RoundingError::Interrupted(_)) => {}
        _ if stopped => {}
        Ok(()) => return folders.into_iter().map(|(_, folder)| Rounded::load(folder, steps)).collect(),
        Err(source) => {
            let file = printable(calibration.model().gguf().label());
            return Err(QuantizeError::Rounding { file, source: Box::new(source) });
        }
    }
    watch.warn(&format!("{GOES_ON}, {} of {steps} steps", run.steps_done()));
    Err(Interrupted.into())
}

/// Types that feedback gives, and where its finished layers lie.
type Unfinished = (HashMap<String, TensorType>, PartialFolder);

/// Of each draft that is rounded so.
fn open_folders(
    outputs: &[(&Draft<'_>, PathBuf)],
    paths: &[Vec<PathBuf>],
    calibration: &Calibration<'_>,
    replace: Replace,
) -> Result<Vec<Unfinished>, QuantizeError> {
    let rounded = outputs.iter().zip(paths).filter_map(|((draft, _), paths)| Some((*draft, draft.calibration?, paths)));
    let open = |(draft, of_draft, paths): (&Draft<'_>, &Calibration<'_>, &Vec<PathBuf>)| {
        if !std::ptr::addr_eq(of_draft, calibration) {
            return Err(QuantizeError::Calibrations);
        }
        let types = draft.types_for_feedback(calibration.model().output_tensor());
        let conditions = conditions(draft, calibration, &types);
        let folder = PartialFolder::open(&paths[0], conditions, replace.is_allowed());
        Ok((types, folder.map_err(QuantizeError::Unfinished)?))
    };
    rounded.map(open).collect()
}

/// Unfinished work of drafts whose tensors are rounded in the pass of another verb; after it, [`Draft::write`] finds
/// everything done.
pub(crate) struct Guests {
    folders: Vec<Unfinished>,
}

impl Guests {
    /// Takes over what is there, or makes it. All drafts must round with `calibration`.
    ///
    /// # Errors
    /// What [`Draft::write`] refuses before it begins.
    pub(crate) fn open(
        outputs: &[(&Draft<'_>, PathBuf)],
        calibration: &Calibration<'_>,
        replace: Replace,
    ) -> Result<Guests, QuantizeError> {
        let paths: Vec<Vec<PathBuf>> = outputs.iter().map(|(draft, output)| draft.paths(output)).collect();
        let needed: u64 = outputs.iter().map(|(draft, _)| draft.needed_bytes()).sum();
        for ((draft, _), paths) in outputs.iter().zip(&paths) {
            draft.refuse_what_cannot_be_done(paths, needed - draft.needed_bytes(), replace)?;
        }
        Ok(Guests { folders: open_folders(outputs, &paths, calibration, replace)? })
    }

    /// What a run of them makes.
    pub(crate) fn outputs(&self) -> Vec<RunOutput<'_>> {
        self.folders.iter().map(|(types, folder)| RunOutput { types, folder }).collect()
    }
}

fn conditions(draft: &Draft<'_>, calibration: &Calibration<'_>, types: &HashMap<String, TensorType>) -> Conditions {
    let texts = [("text", calibration.text().sha256()), ("gate text", calibration.gate().sha256())];
    Conditions::new(draft.gguf, &texts, format!("{}, types {}", calibration.words(), digest(types)))
}

/// Tells choices of types apart.
fn digest(types: &HashMap<String, TensorType>) -> String {
    use sha2::{Digest, Sha256};
    let mut lines: Vec<String> = types.iter().map(|(name, ty)| format!("{}:{name} {ty}\n", name.len())).collect();
    lines.sort();
    format!("{:x}", Sha256::digest(lines.concat()))
}

impl Rounded {
    /// A finished folder.
    fn load(folder: PartialFolder, steps: usize) -> Result<Rounded, QuantizeError> {
        let outcomes = (0..steps).map(|step| folder.load(step).map(|(_, outcomes)| outcomes));
        let outcomes = outcomes.collect::<Result<_, _>>().map_err(QuantizeError::Unfinished)?;
        Ok(Rounded { folder, outcomes })
    }

    fn outcomes(&self) -> Vec<Outcome> {
        self.outcomes.concat()
    }

    /// Names of the tensors that were rounded here.
    fn names(&self) -> HashSet<&str> {
        self.outcomes.iter().flatten().map(|outcome| outcome.tensor.as_str()).collect()
    }

    /// Writes the tensors to their places in the output.
    fn write(&self, draft: &Draft<'_>, files: &[AtomicFile]) -> Result<(), QuantizeError> {
        for step in 0..self.outcomes.len() {
            let (gguf, _) = self.folder.load(step).map_err(QuantizeError::Unfinished)?;
            write_step(&gguf, draft, files)?;
        }
        Ok(())
    }

    /// Judges the written files as a whole, and puts what search gives in the place of layers in which feedback does harm.
    /// Whoever comes first runs the original for `gate`.
    fn judge_whole<'c>(
        &mut self,
        draft: &Draft<'_>,
        files: &[AtomicFile],
        gate: &mut Option<WholeGate<'c, 'c>>,
        calibration: &'c Calibration<'c>,
        watch: &dyn Watch,
    ) -> Result<WholeVerdict, QuantizeError> {
        let stop = watch.stop();
        let judged = self.verdict(draft, files, gate, calibration, &stop, watch);
        let stopped = stop.end();
        match judged {
            Ok(verdict) if !stopped => Ok(verdict),
            Ok(_) | Err(QuantizeError::Interrupted(_)) => {
                watch.warn(&format!("{GOES_ON}, all steps and what was judged"));
                Err(Interrupted.into())
            }
            other => other,
        }
    }

    fn verdict<'c>(
        &mut self,
        draft: &Draft<'_>,
        files: &[AtomicFile],
        gate: &mut Option<WholeGate<'c, 'c>>,
        calibration: &'c Calibration<'c>,
        stop: &Stop,
        watch: &dyn Watch,
    ) -> Result<WholeVerdict, QuantizeError> {
        let gate = match gate {
            Some(gate) => gate,
            none => none.insert(WholeGate::new(calibration, stop.clone(), watch)?),
        };
        let steps = Steps::load(&self.folder, self.outcomes.len())?;
        let candidate = Candidate::new(draft, files, &steps, calibration.model().n_layer())?;
        let verdict = gate.judge(&candidate, &self.folder, stop, watch)?;
        for &step in &verdict.searched_layers {
            steps.searched(step).map_or(Ok(()), |gguf| write_step(gguf, draft, files))?;
            self.outcomes[step].iter_mut().for_each(|outcome| steps.settle(step, outcome));
        }
        draft.record_verdict(&files[0], &verdict)?;
        Ok(verdict)
    }
}

/// Writes the tensors of a step to their places in the output.
fn write_step(gguf: &Gguf, draft: &Draft<'_>, files: &[AtomicFile]) -> Result<(), QuantizeError> {
    for tensor in gguf.tensors() {
        let Some(drafted) = draft.tensors.iter().find(|drafted| drafted.source.name == tensor.name) else { continue };
        let (file, offset) = drafted.place();
        let file = &files[file];
        os::write_all_at(file.file(), gguf.data(tensor)?, offset)
            .map_err(|source| PipelineError::Write { file: file.target().to_path_buf(), source })?;
    }
    Ok(())
}
