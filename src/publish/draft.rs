//! What is decided before anything is written: names, sizes, steps, time and disk.

use std::collections::BTreeSet;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::card::Card;
use super::cost::Costs;
use super::fit::ContextMemory;
use super::forecast::{Amounts, Disk, Forecast, WantedFile, steps};
use super::identity::FrontMatter;
use super::journal;
use super::request::DEFAULT_TARGETS;
use super::run::Run;
use super::source::Opened;
use super::{PublishError, Published, Request, checks};
use crate::display::printable;
use crate::eval::{self, windows_of};
use crate::gguf::{Gguf, fingerprint};
use crate::model::Model;
use crate::moments::Calibration;
use crate::os;
use crate::plan::Size;
use crate::progress::Watch;
use crate::quantize;
use crate::recipe::Target;
use crate::report::TaskFolder;
use crate::rounding::RoundingMethod;
use crate::text::{Text, open_tokenizer};

/// Tokens of the context that memory is counted for, unless the model's is shorter.
const USUAL_CONTEXT: u64 = 8192;

/// What a file is made for.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Kind {
    /// At most the bytes of a target's standard file.
    Target(Target),
    /// A size.
    Size(Size),
    /// What a device leaves beside the context.
    Fit(Size),
}

/// A file that is wanted.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Goal {
    /// What its name ends in.
    pub label: String,
    pub kind: Kind,
    /// Bytes that it may have; of a target about so many, until the importance matrix is there.
    pub bytes: u64,
}

/// A request with all decisions.
pub struct Draft {
    pub(super) request: Request,
    pub(super) opened: Opened,
    pub(super) front: FrontMatter,
    pub(super) goals: Vec<Goal>,
    pub(super) memory: ContextMemory,
    pub(super) card: Card,
    forecast: Forecast,
    /// Fingerprints of files of others, and a digest of the tasks.
    others: Vec<String>,
    pub(super) tasks_digest: String,
    /// Bytes of the largest standard files that may lie there at once.
    pub(super) standard_files_at_once: usize,
}

impl Draft {
    pub(super) fn decide(request: &Request, watch: &dyn Watch) -> Result<Draft, PublishError> {
        let opened = Opened::open(&request.source, request.name.as_deref())?;
        let gguf = &opened.gguf;
        let cannot_run = |source| PublishError::CannotRun { file: printable(gguf.label()), source: Box::new(source) };
        let model = Model::open(gguf).and_then(|model| model.check_predicts().map(|()| model)).map_err(cannot_run)?;
        checks::choices(request, &opened)?;
        let card = Card::open(request.template.as_deref())?;
        let ctx = request.ctx.unwrap_or(USUAL_CONTEXT.min(model.hparams().n_ctx_train as u64));
        let memory = ContextMemory::new(gguf, ctx, request.cache)?;
        let (front, guessed) = front_matter(request, &opened);
        let mut notes = Vec::new();
        if guessed {
            let id = &front.base_model[0];
            notes.push(format!(
                "nothing names the source's repository: the card says {id}; --base-model ORG/NAME tells"
            ));
        }
        if front.license.is_none() {
            notes.push("neither a card nor general.license names the source's licence: the card has none".to_owned());
        }
        if ctx > model.hparams().n_ctx_train as u64 {
            let trained = model.hparams().n_ctx_train;
            notes.push(format!("a context of {ctx} tokens is longer than the model's of {trained}"));
        }
        let goals = goals(request, &opened, &memory)?;
        checks::files(request, &opened, &goals)?;

        let tokenizer = open_tokenizer(&model, request.evaluation.options.pre.as_deref(), &())?;
        let base = eval::Opened { gguf, model };
        let n_ctx = base.context(request.evaluation.options.n_ctx)?;
        let windows = windows_of(&request.evaluation.text, &tokenizer, n_ctx, &request.evaluation.options)?;
        let mut others = Vec::new();
        for file in &request.against {
            let other = Gguf::open(&file.path)?;
            base.check_same_vocabulary(&eval::Opened::open(&other, &())?)?;
            others.push(fingerprint(&other));
        }
        let tasks_digest = request.evaluation.tasks.as_ref().map(tasks_digest).transpose()?.unwrap_or_default();
        // Without feedback it only says which types an importance matrix will allow.
        let calibration = Calibration::new(gguf, &request.calibration, &())?;
        checks::sizes(request, gguf, &goals, &calibration)?;
        let feedback = request.rounding == RoundingMethod::Feedback && !goals.is_empty();
        let calibration = Some(calibration).filter(|_| feedback || !request.schemes.is_empty());

        let n_calibration = if goals.is_empty() || request.importance.file.is_some() {
            0
        } else {
            let n_ctx = request.importance.ctx.unwrap_or(n_ctx);
            let most = request.importance.chunks.map_or(usize::MAX, |chunks| chunks.saturating_mul(n_ctx));
            tokenizer.encode(request.calibration.text.joined(), true, false).len().min(most)
        };
        let costs = Costs::new(gguf);
        let work = Amounts { calibration: n_calibration, evaluation: windows.len() * windows.n_ctx() };
        let steps = steps(request, &opened, &goals, &costs, calibration.as_ref(), work)?;
        let disk = Disk::new(request, &opened, &goals, calibration.as_ref());
        let at_once = disk.standard_files_at_once(request)?;
        let forecast = Forecast {
            source: request.source.display().to_string(),
            output: request.output.display().to_string(),
            files: goals
                .iter()
                .map(|goal| WantedFile { file: file_of(&opened.name, &goal.label), bytes: goal.bytes })
                .chain(request.schemes.iter().map(|scheme| WantedFile {
                    file: format!("{}-{}/", opened.name, scheme.name()),
                    bytes: disk.of_scheme(scheme.name()),
                }))
                .collect(),
            seconds: steps.iter().map(|step| step.seconds).sum(),
            steps,
            peak_disk_bytes: disk.peak(at_once),
            disk_bytes: disk.kept(),
            free_disk_bytes: os::free_space(existing(&request.output)),
            memory: memory.clone(),
            notes,
        };
        drop(base);
        drop(calibration);
        forecast.notes.iter().for_each(|note| watch.note(note));
        Ok(Draft {
            request: request.clone(),
            opened,
            front,
            goals,
            memory,
            card,
            forecast,
            others,
            tasks_digest,
            standard_files_at_once: at_once,
        })
    }

    /// All that a dry run shows.
    pub fn forecast(&self) -> &Forecast {
        &self.forecast
    }

    /// Makes the repository. A run that is stopped or killed leaves its work in the output folder, and the same request goes
    /// on with it.
    ///
    /// # Errors
    /// When a step fails, the disk is too small, another run is at work in the folder, or `watch` stops the run.
    pub fn run(&self, watch: &dyn Watch) -> Result<Published, PublishError> {
        Run::start(self, watch)
    }

    /// Everything that the repository depends on, as the name of a result.
    pub(super) fn run_key(&self) -> String {
        let request = &self.request;
        let mut parts = vec![self.opened.name.clone(), env!("CARGO_PKG_VERSION").to_owned()];
        parts.extend(self.goals.iter().map(|goal| format!("{} {:?}", goal.label, goal.kind)));
        parts.push(format!("{:?} {} {}", request.schemes, request.smallest, request.trials));
        parts.push(format!("{:?} {:?} {:?}", request.against, self.others, self.memory));
        parts.push(self.probe_words());
        parts.push(self.importance_words());
        parts.push(self.rounding_words());
        parts.push(self.evaluation_words());
        parts.push(format!("{:?} {:?} {:?}", request.said, request.text_license, request.measured_on));
        parts.push(format!("{:?} {}", request.evaluation.tasks, self.tasks_digest));
        let program = request.llama_bench.as_deref().map(|program| file_sha256(program).unwrap_or_default());
        parts.push(format!("{program:?} {}", self.card.sha256()));
        parts.push(format!("{:?}", self.front));
        journal::key("run", &parts.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// What the importance matrix depends on beside the model.
    pub(super) fn importance_words(&self) -> String {
        let options = &self.request.importance;
        match &options.file {
            Some(file) => format!("file {}", file_sha256(file).unwrap_or_default()),
            None => format!(
                "{} {:?} {:?} {} {}",
                text_sha256(&self.request.calibration.text),
                options.chunks,
                options.ctx,
                options.accurate,
                self.request.calibration.all_experts
            ),
        }
    }

    /// What measurements depend on beside the model and the importance matrix.
    pub(super) fn probe_words(&self) -> String {
        let probes = &self.request.probes;
        let text = probes.text.as_ref().map(text_sha256);
        let other = self.request.measured_on.as_deref().map(|file| file_sha256(file).unwrap_or_default());
        format!("{text:?} {:?} {other:?}", probes.tokens)
    }

    /// What rounding depends on beside model and types.
    pub(super) fn rounding_words(&self) -> String {
        let options = &self.request.calibration;
        format!(
            "{} {} {} {} {:?} {:?} {} {} {}",
            self.request.rounding,
            text_sha256(&options.text),
            text_sha256(&options.gate),
            options.tokens,
            options.ctx,
            options.damping,
            options.fast,
            options.all_experts,
            options.moment_memory
        )
    }

    /// What figures depend on beside base and file.
    pub(super) fn evaluation_words(&self) -> String {
        let options = &self.request.evaluation.options;
        format!(
            "{} {:?} {:?} {:?} {} {:?}",
            text_sha256(&self.request.evaluation.text),
            options.n_ctx,
            options.chunks,
            options.score_from,
            options.activations.name(),
            options.pre
        )
    }
}

/// Names and digests of a text's documents: tells texts apart.
pub(super) fn text_sha256(text: &Text) -> String {
    let documents: Vec<String> = text.digests().map(|(name, digest)| format!("{name} {digest}")).collect();
    documents.join(" ")
}

/// SHA-256 of a file, in hexadecimal.
pub(super) fn file_sha256(path: &Path) -> Result<String, PublishError> {
    let failed = PublishError::io(path, "cannot read it");
    let mut file = std::fs::File::open(path).map_err(&failed)?;
    let mut hash = Sha256::new();
    std::io::copy(&mut file, &mut hash).map_err(failed)?;
    Ok(format!("{:x}", hash.finalize()))
}

/// Tells folders of tasks apart: names, contents, and what is drawn.
fn tasks_digest(tasks: &TaskFolder) -> Result<String, PublishError> {
    let mut words = format!("{:?} {} {}", tasks.most_tasks, tasks.seed, tasks.llama_compat);
    for name in super::repository::files_below(&tasks.folder)? {
        words.push_str(&format!(" {name} {}", file_sha256(&tasks.folder.join(&name))?));
    }
    Ok(format!("{:x}", Sha256::digest(words)))
}

/// The name of a file of a model.
pub(super) fn file_of(name: &str, label: &str) -> String {
    format!("{name}-{label}.gguf")
}

/// The nearest folder that is there.
fn existing(output: &Path) -> &Path {
    let found = output.ancestors().find(|folder| !folder.as_os_str().is_empty() && folder.exists());
    found.unwrap_or(Path::new("."))
}

fn front_matter(request: &Request, opened: &Opened) -> (FrontMatter, bool) {
    let mut tags = vec!["quantized", "lwq"];
    if !request.schemes.is_empty() {
        tags.insert(0, "compressed-tensors");
    }
    if request.schemes.is_empty() || !(request.targets.is_empty() && request.sizes.is_empty() && request.fit.is_none())
    {
        tags.insert(0, "gguf");
    }
    let metadata = opened.gguf.metadata();
    let name = metadata.str("general.name").ok().flatten().unwrap_or(&opened.name);
    FrontMatter::new(&request.source, metadata, name, &request.said, &tags)
}

fn goals(request: &Request, opened: &Opened, memory: &ContextMemory) -> Result<Vec<Goal>, PublishError> {
    let nothing = request.targets.is_empty() && request.sizes.is_empty() && request.fit.is_none();
    let defaults = nothing && request.schemes.is_empty();
    let targets: &[Target] = if defaults { &DEFAULT_TARGETS } else { &request.targets };
    let mut goals: Vec<Goal> = Vec::new();
    for &target in targets {
        let draft = quantize::Request::target(target).decide(&opened.gguf)?;
        goals.push(Goal { label: target.to_string(), kind: Kind::Target(target), bytes: draft.file_bytes() });
    }
    for size in &request.sizes {
        let label = size.text.split_whitespace().collect::<String>();
        goals.push(Goal { label, kind: Kind::Size(size.clone()), bytes: size.bytes });
    }
    if let Some(fit) = &request.fit {
        // No plan makes a file that is larger than the source.
        let bytes = memory.left_of(&fit.memory)?.min(opened.gguf.file_bytes());
        let size = fit.memory.text.split_whitespace().collect::<String>();
        let label = format!("fit-{size}-ctx{}", memory.ctx);
        goals.push(Goal { label, kind: Kind::Fit(fit.memory.clone()), bytes });
    }
    let mut seen = BTreeSet::new();
    goals.retain(|goal| seen.insert(goal.label.clone()));
    if !goals.is_empty() {
        // What is quantized already, or has nothing to quantize, shows with any type.
        let probe = quantize::Request::target(Target::Q8_0).decide(&opened.gguf)?;
        if let Some(problem) = probe.problems().first() {
            return Err(PublishError::Choice(format!("{}: {problem}", printable(opened.gguf.label()))));
        }
    }
    Ok(goals)
}
