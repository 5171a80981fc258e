//! What comes before files can be scored: the base, importance, the measurement, plans, and the files themselves.

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use super::PublishError;
use super::draft::{Kind, file_of};
use super::journal;
use super::run::{Choice, Run};
use super::source::Source;
use crate::atomic_file::{AtomicFile, Replace};
use crate::compute::Precision;
use crate::convert::{Conversion, Options};
use crate::gguf::{Gguf, fingerprint};
use crate::imatrix::{Collection, DEFAULT_CHUNK_SIZE, Form, Imatrix, Named};
use crate::measure::{self, Sensitivity, TransferCheck};
use crate::moments::Calibration;
use crate::plan::{self, Budget, PlanError, PlanFile, Size};
use crate::progress::Watch;
use crate::quantize::{self, QuantizeError, Rounding, write_all};
use crate::recipe::Target;
use crate::rounding::RoundingMethod;

/// The unquantized model.
pub(super) struct Base {
    pub gguf: Gguf,
    pub path: PathBuf,
    /// Fingerprint: what results depend on.
    pub sha256: String,
}

/// What plans and files need beside the base.
pub(super) struct Prepared<'g> {
    pub importance: Option<Importance>,
    pub sensitivity: PathBuf,
    pub sensitivity_key: String,
    pub check: Option<TransferCheck>,
    pub calibration: Option<Calibration<'g>>,
    method: RoundingMethod,
}

/// An importance matrix that was read.
pub(super) struct Importance {
    pub name: String,
    pub key: String,
    pub imatrix: Imatrix,
    fingerprint: String,
}

/// A file that may be published.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    /// Name of the result.
    pub key: String,
    /// What it is for.
    pub goal: usize,
    pub made: Made,
}

/// How a file comes about.
#[derive(Clone, Debug)]
pub(super) enum Made {
    /// By the rules of a target.
    Standard(Target),
    /// By a plan, whose text this is.
    Planned(Box<PlanFile>),
}

impl Prepared<'_> {
    fn rounding(&self) -> Rounding<'_> {
        match (self.method, &self.calibration) {
            (RoundingMethod::Feedback, Some(calibration)) => Rounding::Feedback(calibration),
            (RoundingMethod::Search, _) => Rounding::Search,
            _ => Rounding::Ggml,
        }
    }

    pub(super) fn named(&self) -> Option<Named<'_>> {
        self.importance.as_ref().map(|found| Named { name: &found.name, imatrix: &found.imatrix })
    }

    fn fingerprint(&self) -> &str {
        self.importance.as_ref().map_or("", |found| &found.fingerprint)
    }

    fn request(&self, budget: Budget) -> plan::Request<'_> {
        let request = plan::Request::new(budget).sensitivity(&self.sensitivity).rounding(self.rounding());
        match self.named() {
            Some(named) => request.imatrix(named),
            None => request,
        }
    }

    /// Bytes of the smallest file that a plan can make.
    pub(super) fn smallest_file(&self, base: &Base) -> Result<u64, PublishError> {
        Ok(self.request(Budget::BitsPerWeight(1.0)).size_range(&base.gguf)?.0)
    }
}

impl Run<'_> {
    /// The 16-bit GGUF.
    pub(super) fn base(&mut self) -> Result<Base, PublishError> {
        let opened = &self.draft.opened;
        let path = match &opened.source {
            Source::File(path) => path.clone(),
            Source::Folder(folder) => self.step("convert", |run| {
                let key = journal::key("base", &[&opened.sha256, &opened.name]);
                let path = run.work.file(&key, "gguf");
                if path.is_file() {
                    return Ok((path, false));
                }
                let conversion = Conversion::open(folder, &Options::default())?;
                conversion.warnings().iter().for_each(|line| run.watch.warn(line));
                let layout = conversion.layout(&opened.base_file)?;
                let file = AtomicFile::create(&path, true)?;
                file.reserve(layout.file_bytes())?;
                conversion.write(&layout, file.file(), &run.watch)?;
                run.watch.end();
                file.commit()?;
                Ok((path, true))
            })?,
        };
        let gguf = Gguf::open(&path)?.labelled(&opened.base_file);
        let sha256 = fingerprint(&gguf);
        Ok(Base { gguf, path, sha256 })
    }

    /// Importance and measurement.
    pub(super) fn prepare<'g>(&mut self, base: &'g Base) -> Result<Prepared<'g>, PublishError> {
        let (request, draft) = (&self.draft.request, self.draft);
        let mut prepared = Prepared {
            importance: None,
            sensitivity: PathBuf::new(),
            sensitivity_key: String::new(),
            check: None,
            calibration: None,
            method: request.rounding,
        };
        if draft.goals.is_empty() {
            return Ok(prepared);
        }
        if request.rounding == RoundingMethod::Feedback {
            prepared.calibration = Some(Calibration::new(&base.gguf, &request.calibration, &())?);
        }
        prepared.importance = Some(self.step("imatrix", |run| run.importance(base))?);
        let words = [draft.probe_words(), draft.rounding_words()];
        let key = journal::key("sens", &[&base.sha256, prepared.fingerprint(), &words[0], &words[1]]);
        prepared.sensitivity = self.work.find(&key, "json").unwrap_or_else(|| self.work.file(&key, "json"));
        prepared.sensitivity_key = key.clone();
        prepared.check = self.step("measure", |run| {
            if let Some(check) = run.work.get::<Option<TransferCheck>>(&key).filter(|_| prepared.sensitivity.is_file())
            {
                return Ok((check, false));
            }
            run.measure(base, &prepared)?;
            if prepared.calibration.is_some() {
                // A plan measures what feedback leaves before it chooses.
                prepared.request(Budget::File(Size::from(draft.goals[0].bytes))).make(&base.gguf, &run.watch)?;
            }
            let check = Sensitivity::open(&prepared.sensitivity)?.transferred;
            Ok((run.work.put(&key, &check)?, true))
        })?;
        Ok(prepared)
    }

    fn importance(&mut self, base: &Base) -> Result<(Importance, bool), PublishError> {
        let (draft, options) = (self.draft, &self.draft.request.importance);
        let key = journal::key("imatrix", &[&base.sha256, &draft.importance_words()]);
        let (path, worked) = match self.work.find(&key, "gguf") {
            Some(path) => (path, false),
            None => {
                let path = self.work.file(&key, "gguf");
                match &options.file {
                    Some(file) => {
                        let found = Imatrix::open(file)?;
                        match found.form {
                            Form::Gguf => {
                                let bytes = fs::read(file).map_err(PublishError::io(file, "cannot read it"))?;
                                let mut copy = AtomicFile::create(&path, true)?;
                                copy.write_all(&bytes).map_err(PublishError::io(&path, "cannot write it"))?;
                                copy.commit()?;
                            }
                            Form::Dat => {
                                found.counted(DEFAULT_CHUNK_SIZE).save(&path, Form::Gguf, true)?;
                            }
                        }
                    }
                    None => {
                        Collection::new(&base.gguf, &draft.request.calibration.text)
                            .n_ctx(options.ctx)
                            .chunks(options.chunks)
                            .precision(if options.accurate { Precision::Accurate } else { Precision::Fast })
                            .all_experts(draft.request.calibration.all_experts)
                            .memory(draft.request.memory)
                            .write(&path, Form::Gguf, Replace::Yes, &self.watch)?;
                    }
                }
                (path, true)
            }
        };
        let imatrix = Imatrix::open(&path)?;
        let fingerprint = imatrix.clone().with_planning().fingerprint();
        let name = format!("{}.imatrix.gguf", draft.opened.name);
        Ok((Importance { name, key, imatrix, fingerprint }, worked))
    }

    fn measure(&self, base: &Base, prepared: &Prepared<'_>) -> Result<(), PublishError> {
        let request = &self.draft.request;
        if prepared.sensitivity.is_file() {
            return Ok(());
        }
        let mut measure = measure::Request::new(&base.gguf).probes(request.probes.clone());
        if let Some(named) = prepared.named() {
            measure = measure.imatrix(named);
        }
        match &request.measured_on {
            None => measure.run(&prepared.sensitivity, Replace::No, &self.watch).map(|_| ())?,
            Some(file) => {
                let name = super::source::file_name(file);
                let other = Sensitivity::open(file)?;
                measure.run_with(&other, &name, &prepared.sensitivity, Replace::No, &self.watch).map(|_| ())?;
            }
        }
        Ok(())
    }

    /// The planned file of each goal, and the standard file of those that are targets.
    pub(super) fn plan_all(
        &mut self,
        base: &Base,
        prepared: &Prepared<'_>,
    ) -> Result<(Vec<Candidate>, Vec<Option<Candidate>>), PublishError> {
        let goals = &self.draft.goals;
        if goals.is_empty() {
            return Ok((Vec::new(), Vec::new()));
        }
        self.step("plan", |run| {
            let (mut planned, mut standard) = (Vec::new(), Vec::new());
            for (at, goal) in goals.iter().enumerate() {
                let (bytes, usual) = match goal.kind {
                    Kind::Target(target) => {
                        let draft = standard_request(prepared, target).decide(&base.gguf)?;
                        if let Some(problem) = draft.problems().first() {
                            let problem = format!("the standard {target} file cannot be made: {problem}");
                            return Err(QuantizeError::Problem { file: base.gguf.label().to_owned(), problem }.into());
                        }
                        let key = journal::key("standard", &[&base.sha256, prepared.fingerprint(), target.info().name]);
                        (draft.file_bytes(), Some(Candidate { key, goal: at, made: Made::Standard(target) }))
                    }
                    Kind::Size(_) | Kind::Fit(_) => (goal.bytes, None),
                };
                planned.push(run.planned(base, prepared, at, bytes)?);
                standard.push(usual);
            }
            Ok(((planned, standard), true))
        })
    }

    /// A planned file of at most so many bytes.
    pub(super) fn planned(
        &mut self,
        base: &Base,
        prepared: &Prepared<'_>,
        goal: usize,
        bytes: u64,
    ) -> Result<Candidate, PublishError> {
        let plan = self.plan(base, prepared, Budget::File(Size::from(bytes)))?;
        let digest = PlanFile::digest(&plan.to_text());
        let words = self.draft.rounding_words();
        let key = journal::key("planned", &[&base.sha256, prepared.fingerprint(), &digest, &words]);
        Ok(Candidate { key, goal, made: Made::Planned(Box::new(plan)) })
    }

    fn plan(&mut self, base: &Base, prepared: &Prepared<'_>, budget: Budget) -> Result<PlanFile, PublishError> {
        let words = budget.words();
        let key = journal::key("plan", &[&prepared.sensitivity_key, &words, env!("CARGO_PKG_VERSION")]);
        let text = match self.work.get::<String>(&key) {
            Some(text) => text,
            None => {
                let plan = prepared.request(budget).make(&base.gguf, &self.watch)?;
                self.work.put(&key, &plan.to_text())?
            }
        };
        Ok(PlanFile::parse(&text, "the plan")?)
    }

    /// The size of the file that is predicted to be as far from the base as the standard file; `None` if there is none.
    pub(super) fn predicted_size(
        &mut self,
        base: &Base,
        prepared: &Prepared<'_>,
        choice: &Choice,
    ) -> Result<Option<u64>, PublishError> {
        let Some((_, standard)) = &choice.standard else { return Ok(None) };
        let (file, scored) = &choice.planned[0];
        let Made::Planned(plan) = &file.made else { return Ok(None) };
        // Predictions are taken to be wrong by the same factor for all sizes.
        let limit = plan.predicted_kld * standard.divergence.mean_kld / scored.divergence.mean_kld;
        if !(limit.is_finite() && limit > 0.0) {
            return Ok(None);
        }
        match self.plan(base, prepared, Budget::Divergence(limit)) {
            Ok(plan) => Ok(Some(plan.file_bytes)),
            Err(PublishError::Plan(PlanError::Limit { .. })) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes the files that are not there, in one pass of the model where that is needed. The flag says whether there were
    /// any.
    pub(super) fn make(
        &mut self,
        base: &Base,
        prepared: &Prepared<'_>,
        files: &[&Candidate],
    ) -> Result<((), bool), PublishError> {
        let missing: Vec<&Candidate> =
            files.iter().copied().filter(|file| self.work.find(&file.key, "gguf").is_none()).collect();
        let mut seen = std::collections::HashSet::new();
        let missing: Vec<&Candidate> = missing.into_iter().filter(|file| seen.insert(&file.key)).collect();
        let mut drafts = Vec::with_capacity(missing.len());
        for file in &missing {
            let request = match &file.made {
                Made::Standard(target) => standard_request(prepared, *target),
                Made::Planned(plan) => {
                    let imatrix = prepared.named().map(|named| named.imatrix);
                    let choices = plan.choices_for(&base.gguf, imatrix)?;
                    let request = quantize::Request::choices(choices).rounding(prepared.rounding());
                    match prepared.named() {
                        Some(named) => request.imatrix(named),
                        None => request,
                    }
                }
            };
            drafts.push((request.decide(&base.gguf)?, self.work.file(&file.key, "gguf")));
        }
        let outputs: Vec<_> = drafts.iter().map(|(draft, path)| (draft, path.clone())).collect();
        if !outputs.is_empty() {
            write_all(&outputs, Replace::Yes, &self.watch)?;
        }
        Ok(((), !outputs.is_empty()))
    }

    /// The name of a file in the repository.
    pub(super) fn published_name(&self, file: &Candidate) -> String {
        file_of(&self.draft.opened.name, &self.draft.goals[file.goal].label)
    }
}

fn standard_request<'a>(prepared: &'a Prepared<'_>, target: Target) -> quantize::Request<'a> {
    let request = quantize::Request::target(target);
    match prepared.named() {
        Some(named) => request.imatrix(named),
        None => request,
    }
}
