//! The run: steps one after the other, each of which takes over what an earlier run has left.

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::choose::{Measured, choose, next_size};
use super::draft::{Draft, Kind};
use super::journal::{Progress, StepState, Work};
use super::progress::Overall;
use super::report::Report;
use super::score::{Folder, Scored};
use super::stages::{Base, Candidate, Prepared};
use super::{PublishError, finish};
use crate::atomic_file::Replace;
use crate::display::decimal_size;
use crate::os;
use crate::progress::{Interrupted, Watch};
use crate::unfinished::GOES_ON;

/// A finished repository.
#[derive(Clone, Debug)]
pub struct Published {
    /// All that is known about it.
    pub report: Report,
    /// Its folder.
    pub output: PathBuf,
    /// True if an earlier run had made all of it.
    pub was_there: bool,
}

/// A run at work.
pub(super) struct Run<'a> {
    pub draft: &'a Draft,
    pub work: Work,
    pub watch: Overall<'a>,
}

/// The files of a target or size, the figures of its standard file, and which of them is kept.
pub(super) struct Choice {
    /// Planned files, the first for all the bytes that there are.
    pub planned: Vec<(Candidate, Scored)>,
    /// The usual file.
    pub standard: Option<(Candidate, Scored)>,
    /// The planned file that is kept; none for the standard one.
    pub kept: Option<usize>,
}

impl Choice {
    /// Size and divergence of all planned files.
    fn measured(&self) -> Vec<Measured> {
        self.planned.iter().map(|(_, scored)| scored.measured()).collect()
    }

    /// The file that is kept.
    pub(super) fn kept(&self) -> &(Candidate, Scored) {
        let standard = self.standard.as_ref().filter(|_| self.kept.is_none());
        standard.unwrap_or(&self.planned[self.kept.unwrap_or(0)])
    }
}

impl<'a> Run<'a> {
    pub(super) fn start(draft: &'a Draft, watch: &'a dyn Watch) -> Result<Published, PublishError> {
        let request = &draft.request;
        std::fs::create_dir_all(&request.output)
            .map_err(PublishError::io(&request.output, "cannot make the folder"))?;
        let source = super::source::file_name(&request.source);
        let fresh = request.replace == Replace::Yes;
        let mut work = Work::open(&request.output, &source, &draft.opened.sha256, fresh)?;
        let key = draft.run_key();
        if let Some(report) = work.get::<Report>(&key).filter(|_| work.journal.finished && finish::is_whole(&work)) {
            return Ok(Published { report, output: request.output.clone(), was_there: true });
        }
        finish::refuse_edited(&work, fresh)?;
        check_space(draft, &work)?;
        work.journal.finished = false;
        let earlier = std::mem::take(&mut work.journal.steps);
        let steps = &draft.forecast().steps;
        work.journal.steps = steps
            .iter()
            .map(|step| StepState {
                step: step.step.clone(),
                what: step.what.clone(),
                state: Progress::Todo,
                seconds: earlier.iter().find(|other| other.step == step.step).map_or(0.0, |other| other.seconds),
            })
            .collect();
        work.save()?;
        let stages = steps.iter().map(|step| (step.step.clone(), step.stages.clone())).collect();
        let mut run = Run { draft, work, watch: Overall::new(watch, stages) };
        let done = run.all(&key);
        if matches!(&done, Err(error) if is_interrupted(error)) {
            watch.warn(GOES_ON);
        }
        done
    }

    fn all(&mut self, key: &str) -> Result<Published, PublishError> {
        let draft = self.draft;
        let base = self.base()?;
        let prepared = self.prepare(&base)?;
        let (mut choices, folders) = self.first_files(&base, &prepared)?;
        if draft.request.smallest {
            self.shrink(&base, &prepared, &mut choices)?;
        }
        let report = self.finish(&base, &prepared, &choices, &folders)?;
        self.work.journal.finished = true;
        let report = self.work.put(key, &report)?;
        self.work.keep_used();
        self.work.save()?;
        self.work.remove_temporary()?;
        Ok(Published { report, output: draft.request.output.clone(), was_there: false })
    }

    /// Does a step; the flag in its result says whether it had work to do.
    pub(super) fn step<T>(
        &mut self,
        name: &str,
        work: impl FnOnce(&mut Self) -> Result<(T, bool), PublishError>,
    ) -> Result<T, PublishError> {
        let Some(index) = self.work.journal.steps.iter().position(|step| step.step == name) else {
            return work(self).map(|(result, _)| result);
        };
        self.work.journal.steps[index].state = Progress::Begun;
        self.work.save()?;
        self.watch.begin_step(index);
        let outcome = work(self);
        let seconds = self.watch.end_step(matches!(outcome, Ok((_, true))));
        let step = &mut self.work.journal.steps[index];
        if !matches!(outcome, Ok((_, false))) {
            step.seconds += seconds;
        }
        if outcome.is_ok() {
            step.state = Progress::Done;
        }
        let saved = self.work.save();
        let (result, _) = outcome?;
        saved.map(|()| result)
    }

    /// The standard files and the first planned one of each goal, rounded and evaluated.
    fn first_files(
        &mut self,
        base: &Base,
        prepared: &Prepared<'_>,
    ) -> Result<(Vec<Choice>, Vec<Folder>), PublishError> {
        let draft = self.draft;
        let (planned, standard) = self.plan_all(base, prepared)?;
        let at_once = draft.standard_files_at_once;
        let usual = standard.clone();
        let standard_files: Vec<&Candidate> = usual.iter().flatten().collect();
        let missing = |run: &mut Run<'_>, file: &Candidate| run.scored(&file.key).is_none();
        if !standard_files.is_empty() {
            self.step("standard", |run| {
                let first: Vec<&Candidate> = standard_files.iter().take(at_once).copied().collect();
                let first: Vec<&Candidate> = first.into_iter().filter(|file| missing(run, file)).collect();
                run.make(base, prepared, &first)
            })?;
        }
        if !planned.is_empty() {
            self.step("round", |run| {
                let files: Vec<&Candidate> = planned.iter().filter(|file| missing(run, file)).collect();
                run.make(base, prepared, &files)
            })?;
        }
        let folders = self.export_all(base)?;
        let choices = self.step("evaluate", |run| {
            let mut worked = false;
            let mut others: Vec<&Candidate> = planned.iter().collect();
            for files in standard_files.chunks(at_once.max(1)) {
                let unscored: Vec<&Candidate> = files.iter().copied().filter(|file| missing(run, file)).collect();
                run.make(base, prepared, &unscored)?;
                others.extend(files);
                worked |= run.evaluate(base, &others, &folders)?;
                others.clear();
                // The last ones may be kept, and are removed when that is known.
                if standard_files.len() > at_once {
                    files.iter().try_for_each(|file| run.work.remove(&file.key, "gguf"))?;
                }
            }
            if !others.is_empty() || standard_files.is_empty() {
                worked |= run.evaluate(base, &others, &folders)?;
            }
            let mut choices = Vec::new();
            for (planned, standard) in planned.into_iter().zip(standard) {
                let scored = run.scored_again(&planned)?;
                let standard = match standard {
                    Some(file) => Some((file.clone(), run.scored_again(&file)?)),
                    None => None,
                };
                let mut choice = Choice { planned: vec![(planned, scored)], standard, kept: Some(0) };
                choose_again(&mut choice, false);
                choices.push(choice);
            }
            run.remove_standard_files(&choices)?;
            if draft.request.evaluation.tasks.is_none() {
                folders.iter().try_for_each(|folder| run.work.remove(&folder.decoded_key(), "gguf"))?;
            }
            Ok((choices, worked))
        })?;
        Ok((choices, folders))
    }

    /// Standard files that are not kept serve nothing any more.
    fn remove_standard_files(&self, choices: &[Choice]) -> Result<(), PublishError> {
        let replaced =
            choices.iter().filter(|choice| choice.kept.is_some()).filter_map(|choice| choice.standard.as_ref());
        replaced.into_iter().try_for_each(|(file, _)| self.work.remove(&file.key, "gguf"))
    }

    /// Trials of smaller files, for all targets at once.
    fn shrink(&mut self, base: &Base, prepared: &Prepared<'_>, choices: &mut [Choice]) -> Result<(), PublishError> {
        let least = prepared.smallest_file(base)?;
        let mut ended = vec![false; choices.len()];
        for trial in 1..=self.draft.request.trials {
            self.step(&format!("shrink {trial}"), |run| {
                let mut files: Vec<(usize, Candidate)> = Vec::new();
                for (at, choice) in choices.iter().enumerate().filter(|(at, _)| !ended[*at]) {
                    let Some((_, standard)) = &choice.standard else { continue };
                    let measured = choice.measured();
                    let first = match choice.planned.len() {
                        1 => run.predicted_size(base, prepared, choice)?,
                        _ => None,
                    };
                    let Some(bytes) = next_size(&measured, standard.measured(), first, least) else { continue };
                    let file = run.planned(base, prepared, at, bytes)?;
                    // Types come in steps: the same file again, or none that is smaller.
                    if choice.planned.iter().all(|(known, _)| known.key != file.key) {
                        files.push((at, file));
                    }
                }
                for (at, ended) in ended.iter_mut().enumerate() {
                    *ended |= !files.iter().any(|(other, _)| *other == at);
                }
                let unscored: Vec<&Candidate> =
                    files.iter().map(|(_, file)| file).filter(|file| run.scored(&file.key).is_none()).collect();
                let worked = !unscored.is_empty();
                run.make(base, prepared, &unscored)?;
                run.evaluate(base, &unscored, &[])?;
                for (at, file) in files {
                    let scored = run.scored_again(&file)?;
                    let choice = &mut choices[at];
                    choice.planned.push((file, scored));
                    choose_again(choice, true);
                }
                // Goals may share a file.
                let kept: BTreeSet<&str> = choices.iter().map(|choice| choice.kept().0.key.as_str()).collect();
                for (file, _) in choices.iter().flat_map(|choice| &choice.planned) {
                    if !kept.contains(file.key.as_str()) {
                        run.work.remove(&file.key, "gguf")?;
                    }
                }
                Ok(((), worked))
            })?;
        }
        Ok(())
    }
}

/// Applies the rule to the files so far.
fn choose_again(choice: &mut Choice, smallest: bool) {
    if let Some((_, standard)) = &choice.standard {
        choice.kept = choose(&choice.measured(), standard.measured(), smallest);
    }
}

/// True for the end of a run that was asked to stop.
pub(super) fn is_interrupted(error: &PublishError) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if error.is::<Interrupted>() {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Compares what the run takes with what is free.
fn check_space(draft: &Draft, work: &Work) -> Result<(), PublishError> {
    let forecast = draft.forecast();
    let there = finish::bytes_below(work.output());
    let needed = forecast.peak_disk_bytes.saturating_sub(there);
    match os::free_space(work.output()) {
        Some(free) if free < needed => Err(PublishError::file(
            work.output(),
            format!(
                "the run takes {} more on its disk, which has {} free; make room, give --disk, or ask for fewer files",
                decimal_size(needed),
                decimal_size(free)
            ),
        )),
        _ => Ok(()),
    }
}

impl Draft {
    /// The rule by which files are kept, in words.
    pub(super) fn rule(&self) -> String {
        let has = |wanted: fn(&Kind) -> bool| self.goals.iter().any(|goal| wanted(&goal.kind));
        let mut parts: Vec<String> = Vec::new();
        if has(|kind| matches!(kind, Kind::Target(_))) {
            let words = match self.request.smallest {
                true => format!(
                    "Of each target the smallest planned file is kept that has at most the bytes of the standard file and at most \
                     its mean KLD, after up to {} trials of smaller sizes; where none does, the standard file.",
                    self.request.trials
                ),
                false => "Of each target the planned file is kept if it has at most the bytes of the standard file and at most its \
                          mean KLD, else the standard file."
                    .to_owned(),
            };
            parts.push(words);
            parts.push("The text that decides is the one whose figures stand here.".to_owned());
        }
        if has(|kind| !matches!(kind, Kind::Target(_))) {
            parts.push("Files of a size or for a device are planned for that many bytes.".to_owned());
        }
        parts.join(" ")
    }
}
