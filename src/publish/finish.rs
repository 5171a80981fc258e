//! The end of a run: tasks, speeds, the report, and everything to its place.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::bench::{self, Speed};
use super::choose::Reason;
use super::commands::Commands;
use super::draft::{Kind, file_sha256};
use super::journal::{self, Work};
use super::report::{
    AgainstEntry, BaseFacts, EvaluationFacts, Figures, FileEntry, FolderEntry, Hashed, Provenance, REPORT_VERSION,
    Report, Shrinkage, StandardEntry, TextEntry, TriedEntry,
};
use super::repository::{self, CARD};
use super::run::{Choice, Run};
use super::score::{Folder, Scored};
use super::stages::{Base, Candidate, Made, Prepared};
use super::{PublishError, source};
use crate::gguf::Gguf;
use crate::progress::Interrupted;
use crate::recipe::{TARGETS, Target};
use crate::report::{ComparisonRequest, TaskFigures};
use crate::rounding::RoundingMethod;
use crate::text::{Set, Text};

/// Licences of the built-in texts, as `calibration/LICENSES.md` lists them.
const BUILT_IN: &str = "public domain, MIT, PSF-2.0, BSD-1-Clause, BSD-2-Clause, BSD-3-Clause, ISC, zlib, Apache-2.0, part by part \
                        as calibration/LICENSES.md of lwq lists them";

/// Tasks of the base, and of files and folders in their order.
type AllTasks = (Vec<TaskFigures>, Vec<Vec<TaskFigures>>);

/// True if all files of the repository are there; the card may have been changed by hand.
pub(super) fn is_whole(work: &Work) -> bool {
    let whole = |(name, file): (&String, &journal::PublishedFile)| {
        let found = std::fs::metadata(work.output().join(name));
        found.is_ok_and(|found| found.is_file() && (found.len() == file.bytes || name == CARD))
    };
    !work.journal.published.is_empty() && work.journal.published.iter().all(whole)
}

/// Refuses to write over a card that somebody has changed.
pub(super) fn refuse_edited(work: &Work, allowed: bool) -> Result<(), PublishError> {
    let path = work.output().join(CARD);
    match work.journal.published.get(CARD) {
        // A run that was killed may have left the pages of another one.
        Some(known) if !allowed && work.journal.finished && path.is_file() && file_sha256(&path)? != known.sha256 => {
            Err(PublishError::file(&path, "was changed since lwq publish wrote it; add --force to replace it"))
        }
        _ => Ok(()),
    }
}

/// Bytes of all files below a folder.
pub(super) fn bytes_below(folder: &Path) -> u64 {
    let names = repository::files_below(folder).unwrap_or_default();
    names.iter().filter_map(|name| folder.join(name).metadata().ok()).map(|found| found.len()).sum()
}

/// A file that stays, with all that is known of it.
pub(super) struct Kept<'c> {
    choice: &'c Choice,
    pub candidate: &'c Candidate,
    pub scored: &'c Scored,
    pub name: String,
    pub path: PathBuf,
}

impl Run<'_> {
    /// The report, and the repository with it.
    pub(super) fn finish(
        &mut self,
        base: &Base,
        prepared: &Prepared<'_>,
        choices: &[Choice],
        folders: &[Folder],
    ) -> Result<Report, PublishError> {
        // Files that a run was killed over, or that serve as the standard file after all.
        let kept: Vec<&Candidate> = choices.iter().map(|choice| &choice.kept().0).collect();
        self.make(base, prepared, &kept)?;
        let mut files = Vec::new();
        for choice in choices {
            let (candidate, scored) = choice.kept();
            let lost = || PublishError::file(&self.draft.request.output, "a finished file was removed; run it again");
            let path = self.work.find(&candidate.key, "gguf").ok_or_else(lost)?;
            files.push(Kept { choice, candidate, scored, name: self.published_name(candidate), path });
        }
        files.sort_by_key(|file| (file.scored.size_bytes, file.candidate.goal));
        let tasks = self.tasks(base, &files, folders)?;
        let speeds = self.speeds(&files)?;
        self.step("card", |run| {
            let report = run.report(base, prepared, choices, &files, folders, (tasks, speeds))?;
            let contents = run.contents(base, prepared, &report, choices, &files, folders)?;
            repository::place(&mut run.work, contents)?;
            Ok((report, true))
        })
    }

    fn tasks(&mut self, base: &Base, files: &[Kept<'_>], folders: &[Folder]) -> Result<AllTasks, PublishError> {
        let none = || (Vec::new(), vec![Vec::new(); files.len() + folders.len()]);
        let Some(tasks) = self.draft.request.evaluation.tasks.clone() else { return Ok(none()) };
        self.step("tasks", |run| {
            let words = run.draft.evaluation_words();
            let mut parts: Vec<&str> = vec![&base.sha256, &words, &run.draft.tasks_digest];
            parts.extend(files.iter().map(|file| file.candidate.key.as_str()));
            parts.extend(folders.iter().map(|folder| folder.key.as_str()));
            let key = journal::key("tasks", &parts);
            if let Some(known) = run.work.get::<AllTasks>(&key) {
                return Ok((known, false));
            }
            let paths = files.iter().map(|file| Some(&file.path)).chain(folders.iter().map(|f| f.decoded.as_ref()));
            let paths: Vec<Option<&PathBuf>> = paths.collect();
            let models = paths.iter().flatten().map(Gguf::open).collect::<Result<Vec<_>, _>>()?;
            let request = ComparisonRequest::new(&base.gguf, &run.draft.request.evaluation.text);
            let request = request.options(run.text_options()).tasks(tasks);
            let found = request.run(&models.iter().collect::<Vec<_>>(), &run.watch)?;
            let Some(table) = found.runs.first().filter(|_| found.complete) else { return Err(Interrupted.into()) };
            let mut scored = table.files.iter().map(|file| file.tasks.clone());
            let all = paths.iter().map(|path| path.and_then(|_| scored.next()).unwrap_or_default()).collect();
            Ok((run.work.put(&key, &(table.base_tasks.clone(), all))?, true))
        })
    }

    fn speeds(&mut self, files: &[Kept<'_>]) -> Result<Vec<Option<Speed>>, PublishError> {
        let Some(program) = self.draft.request.llama_bench.clone() else { return Ok(vec![None; files.len()]) };
        self.step("speed", |run| {
            let digest = file_sha256(&program)?;
            let threads = rayon::current_num_threads();
            let mut speeds = Vec::new();
            let mut worked = false;
            for file in files {
                let key = journal::key("speed", &[&digest, &threads.to_string(), &file.candidate.key]);
                let speed = match run.work.get::<Speed>(&key) {
                    Some(known) => known,
                    None => {
                        worked = true;
                        let speed = bench::run(&program, &file.path, threads)?;
                        run.work.put(&key, &speed)?
                    }
                };
                speeds.push(Some(speed));
            }
            Ok((speeds, worked))
        })
    }

    fn report(
        &mut self,
        base: &Base,
        prepared: &Prepared<'_>,
        choices: &[Choice],
        files: &[Kept<'_>],
        folders: &[Folder],
        (tasks, speeds): (AllTasks, Vec<Option<Speed>>),
    ) -> Result<Report, PublishError> {
        let draft = self.draft;
        let commands = Commands::new(&draft.request, &draft.opened);
        let (base_tasks, mut all_tasks) = tasks;
        let folder_tasks = all_tasks.split_off(files.len());
        let against = self.against()?;
        let mut entries = Vec::new();
        for ((file, tasks), speed) in files.iter().zip(all_tasks).zip(speeds) {
            let goal = &draft.goals[file.candidate.goal];
            let shrinkage = |bytes: u64| 1.0 - file.scored.size_bytes as f64 / bytes.max(1) as f64;
            let of_target = against.iter().filter(|other| other.target.as_deref() == Some(&goal.label));
            let plan = match &file.candidate.made {
                Made::Planned(plan) => Some(plan),
                Made::Standard(_) => None,
            };
            entries.push(FileEntry {
                figures: figures(&file.name, file.scored),
                made_for: goal.label.clone(),
                sha256: self.digest(&file.candidate.key, &file.path)?,
                reason: self.reason(file.choice, file.choice.kept, &goal.kind),
                rounding: if plan.is_some() { draft.request.rounding } else { RoundingMethod::Ggml }.to_string(),
                plan: plan.map(|_| self.plan_name(file.candidate)),
                predicted_kld: plan.map(|plan| plan.predicted_kld),
                standard: file.choice.standard.as_ref().map(|(_, standard)| StandardEntry {
                    size_bytes: standard.size_bytes,
                    mean_kld: standard.divergence.mean_kld,
                    shrinkage: shrinkage(standard.size_bytes),
                    kld_ratio: file.scored.divergence.mean_kld / standard.divergence.mean_kld,
                }),
                against: of_target
                    .map(|other| {
                        let bytes = other.figures.size_bytes;
                        (other.name.clone(), Shrinkage { size_bytes: bytes, shrinkage: shrinkage(bytes) })
                    })
                    .collect::<BTreeMap<_, _>>(),
                memory_bytes: file.scored.size_bytes.saturating_add(draft.memory.total_bytes),
                tasks,
                speed,
                commands: match plan {
                    Some(plan) => commands.planned(goal, plan.target_bytes.unwrap_or(plan.file_bytes)),
                    None => commands.standard(goal),
                },
            });
        }
        let folder_entries = folders.iter().zip(folder_tasks).map(|(folder, tasks)| FolderEntry {
            folder: folder_name(&draft.opened.name, folder),
            scheme: folder.scheme.name().to_owned(),
            size_bytes: folder.facts.size_bytes,
            bits_per_weight: folder.facts.bits_per_weight,
            rounding: folder.facts.rounding.clone(),
            divergence: self.scored(&folder.decoded_key()).map(|scored| scored.divergence),
            tasks,
            commands: commands.export(folder.scheme.name()),
        });
        let folder_entries: Vec<FolderEntry> = folder_entries.collect();
        let any = self.any_scored(base, files, folders)?;
        let totals = base.gguf.totals();
        let provenance = self.provenance(prepared, &commands)?;
        let architecture = base.gguf.metadata().str("general.architecture").ok().flatten().unwrap_or_default();
        Ok(Report {
            lwq_report: REPORT_VERSION,
            lwq_version: env!("CARGO_PKG_VERSION").to_owned(),
            name: draft.opened.name.clone(),
            front_matter: draft.front.clone(),
            base: BaseFacts {
                file: draft.opened.base_file.clone(),
                size_bytes: base.gguf.file_bytes(),
                sha256: self.base_digest(base)?,
                architecture: architecture.to_owned(),
                parameters: totals.parameters,
                bits_per_weight: totals.bits_per_weight(),
                ppl: any.divergence.ppl_base,
                ppl_error: any.divergence.ppl_base_error,
                tasks: base_tasks,
            },
            evaluation: EvaluationFacts { text: any.text.clone(), activations: any.activations.clone() },
            recommended: Report::recommend(&entries),
            speed_of: entries.iter().find_map(|entry| entry.speed.as_ref()).map(|speed| speed.on.clone()),
            files: entries,
            folders: folder_entries,
            standard: standard_figures(draft.goals.len(), choices, |goal| draft.goals[goal].label.clone()),
            against,
            tried: self.tried(choices),
            memory: draft.memory.clone(),
            rule: draft.rule(),
            provenance,
            measured_on: prepared.check.clone(),
        })
    }

    /// Figures of anything that was evaluated: those of the base stand in all of them.
    fn any_scored(&mut self, base: &Base, files: &[Kept<'_>], folders: &[Folder]) -> Result<Scored, PublishError> {
        if let Some(file) = files.first() {
            return Ok(file.scored.clone());
        }
        let own = journal::key("self", &[&base.sha256]);
        let mut keys = folders.iter().map(Folder::decoded_key).chain([own]);
        let found = keys.find_map(|key| self.scored(&key));
        found.ok_or_else(|| PublishError::file(&self.draft.request.output, "nothing was evaluated; run it again"))
    }

    fn reason(&self, choice: &Choice, index: Option<usize>, kind: &Kind) -> Reason {
        let kept = choice.kept == index;
        match (index, kind) {
            (None, _) if kept => Reason::Standard,
            (None, _) => Reason::Compared,
            (Some(_), Kind::Size(_) | Kind::Fit(_)) => Reason::Size,
            (Some(_), Kind::Target(_)) if kept && self.draft.request.smallest => Reason::Smallest,
            (Some(_), Kind::Target(_)) if kept => Reason::Planned,
            (Some(at), Kind::Target(_)) => {
                let standard = choice.standard.as_ref().map(|(_, scored)| scored.divergence.mean_kld);
                let worse = standard.is_some_and(|standard| choice.planned[at].1.divergence.mean_kld > standard);
                if worse { Reason::Worse } else { Reason::Larger }
            }
        }
    }

    fn tried(&self, choices: &[Choice]) -> Vec<TriedEntry> {
        let mut tried = Vec::new();
        for choice in choices {
            let goal = &self.draft.goals[choice.planned[0].0.goal];
            let mut add = |kind: &str, scored: &Scored, reason: Reason| {
                tried.push(TriedEntry {
                    made_for: goal.label.clone(),
                    kind: kind.to_owned(),
                    size_bytes: scored.size_bytes,
                    mean_kld: scored.divergence.mean_kld,
                    reason,
                });
            };
            if let Some((_, scored)) = choice.standard.as_ref().filter(|_| choice.kept.is_some()) {
                add("standard", scored, Reason::Compared);
            }
            for (at, (_, scored)) in choice.planned.iter().enumerate().filter(|(at, _)| choice.kept != Some(*at)) {
                add("planned", scored, self.reason(choice, Some(at), &goal.kind));
            }
        }
        tried
    }

    fn against(&mut self) -> Result<Vec<AgainstEntry>, PublishError> {
        let mut entries = Vec::new();
        for ((key, gguf), asked) in self.others()?.into_iter().zip(&self.draft.request.against) {
            let Some(scored) = self.scored(&key) else { continue };
            let file = source::file_name(&asked.path);
            let target = target_of(&file, &gguf).map(|target| target.to_string());
            entries.push(AgainstEntry { name: asked.name.clone(), target, figures: figures(&file, &scored) });
        }
        Ok(entries)
    }

    fn provenance(&mut self, prepared: &Prepared<'_>, commands: &Commands<'_>) -> Result<Provenance, PublishError> {
        let request = &self.draft.request;
        let plans = !self.draft.goals.is_empty();
        let mut texts = Vec::new();
        let mut add = |role: &str, text: &Text, license: Option<String>| {
            let license = if text.is_built_in() { Some(BUILT_IN.to_owned()) } else { license };
            texts.extend(text.digests().map(|(name, sha256)| TextEntry {
                role: role.to_owned(),
                name: name.to_owned(),
                sha256,
                license: license.clone(),
            }));
        };
        let feedback = request.rounding == RoundingMethod::Feedback || !request.schemes.is_empty();
        if (plans && request.importance.file.is_none()) || feedback {
            add("calibration", &request.calibration.text, request.text_license.clone());
        }
        if plans {
            let usual = Text::built_in(Set::Probe);
            add("probes", request.probes.text.as_ref().unwrap_or(&usual), None);
        }
        if feedback {
            add("gate", &request.calibration.gate, None);
        }
        add("evaluation", &request.evaluation.text, None);
        let imatrix = match &prepared.importance {
            Some(found) => {
                let path = self.work.find(&found.key, "gguf").unwrap_or_default();
                Some(Hashed { file: found.name.clone(), sha256: file_sha256(&path)? })
            }
            None => None,
        };
        let measurement = match plans {
            true => Some(Hashed {
                file: format!("{}.sens.json", self.draft.opened.name),
                sha256: file_sha256(&prepared.sensitivity)?,
            }),
            false => None,
        };
        Ok(Provenance { texts, imatrix, measurement, commands: commands.before(plans) })
    }

    pub(super) fn plan_name(&self, file: &Candidate) -> String {
        format!("{}-{}.plan.json", self.draft.opened.name, self.draft.goals[file.goal].label)
    }

    /// SHA-256 of a finished file, found once.
    fn digest(&mut self, key: &str, path: &Path) -> Result<String, PublishError> {
        let name = journal::key("sha256", &[key]);
        match self.work.get::<String>(&name) {
            Some(known) => Ok(known),
            None => {
                let digest = file_sha256(path)?;
                self.work.put(&name, &digest)
            }
        }
    }

    /// SHA-256 of all parts of the base, one after the other.
    fn base_digest(&mut self, base: &Base) -> Result<String, PublishError> {
        use sha2::{Digest, Sha256};
        let name = journal::key("sha256", &[&base.sha256, &base.gguf.file_bytes().to_string()]);
        if let Some(known) = self.work.get::<String>(&name) {
            return Ok(known);
        }
        let mut hash = Sha256::new();
        for path in base.gguf.shards().iter().filter_map(|shard| shard.path()) {
            let failed = PublishError::io(path, "cannot read it");
            let mut file = std::fs::File::open(path).map_err(&failed)?;
            std::io::copy(&mut file, &mut hash).map_err(failed)?;
        }
        self.work.put(&name, &format!("{:x}", hash.finalize()))
    }
}

fn figures(file: &str, scored: &Scored) -> Figures {
    Figures {
        file: file.to_owned(),
        size_bytes: scored.size_bytes,
        bits_per_weight: scored.bits_per_weight,
        divergence: scored.divergence,
    }
}

fn standard_figures(goals: usize, choices: &[Choice], name: impl Fn(usize) -> String) -> Vec<Figures> {
    let mut found: Vec<Figures> = (0..goals)
        .filter_map(|goal| choices.get(goal)?.standard.as_ref())
        .map(|(file, scored)| figures(&name(file.goal), scored))
        .collect();
    found.sort_by_key(|figures| figures.size_bytes);
    found
}

pub(super) fn folder_name(name: &str, folder: &Folder) -> String {
    format!("{name}-{}", folder.scheme.name())
}

/// The target that a file of others is of: as its name says, or else its metadata.
fn target_of(file: &str, gguf: &Gguf) -> Option<Target> {
    let stem = file.strip_suffix(".gguf").unwrap_or(file).to_ascii_uppercase();
    let ends = |name: &str| {
        let before = stem.strip_suffix(name);
        before.is_some_and(|before| before.is_empty() || before.ends_with(['-', '.', '_']))
    };
    let mut named: Vec<_> = TARGETS.iter().filter(|info| ends(info.name)).collect();
    // Of Q4_K_S and S-like tails the longest is meant.
    named.sort_by_key(|info| std::cmp::Reverse(info.name.len()));
    let by_number = || {
        let number = gguf.metadata().u64("general.file_type").ok().flatten()?;
        TARGETS.iter().find(|info| info.file_type.map(u64::from) == Some(number))
    };
    named.first().copied().or_else(by_number).map(|info| info.target)
}
