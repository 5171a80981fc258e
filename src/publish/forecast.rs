//! What a run will do, how long it will take, and what it needs of the disk.

use std::path::Path;

use serde::Serialize;

use super::cost::Costs;
use super::draft::{Goal, Kind};
use super::fit::ContextMemory;
use super::progress::{self, Stage};
use super::source::Opened;
use super::{PublishError, Request};
use crate::display::decimal_size;
use crate::gguf::TensorInfo;
use crate::measure::CHECKED_PROBES;
use crate::moments::Calibration;
use crate::rounding::RoundingMethod;

/// Probe tokens that are assumed where none are asked for.
const PROBE_TOKENS: usize = 4096;

/// A step and what it takes.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    /// Its name.
    pub step: String,
    /// What it does.
    pub what: String,
    /// How long it is thought to take.
    pub seconds: f64,
    #[serde(skip)]
    pub(super) stages: Vec<Stage>,
}

/// A file that will be made.
#[derive(Clone, Debug, Serialize)]
pub struct WantedFile {
    /// Its name.
    pub file: String,
    /// Its bytes at most, or about so many.
    pub bytes: u64,
}

/// All that a dry run shows.
#[derive(Clone, Debug, Serialize)]
pub struct Forecast {
    /// The source.
    pub source: String,
    /// The output folder.
    pub output: String,
    /// Files of models.
    pub files: Vec<WantedFile>,
    /// Steps in their order.
    pub steps: Vec<Step>,
    /// How long all are thought to take on this machine.
    pub seconds: f64,
    /// Most bytes that the output folder takes while the run is at work.
    pub peak_disk_bytes: u64,
    /// Bytes that stay.
    pub disk_bytes: u64,
    /// Bytes that are free there, where the system tells.
    pub free_disk_bytes: Option<u64>,
    /// What a context takes beside a file.
    pub memory: ContextMemory,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// Tokens that steps run.
#[derive(Clone, Copy)]
pub(super) struct Amounts {
    pub calibration: usize,
    pub evaluation: usize,
}

/// The steps of a run with their stages.
pub(super) fn steps(
    request: &Request,
    opened: &Opened,
    goals: &[Goal],
    costs: &Costs,
    calibration: Option<&Calibration<'_>>,
    work: Amounts,
) -> Result<Vec<Step>, PublishError> {
    let mut steps: Vec<Step> = Vec::new();
    let mut add = |step: String, what: String, stages: Vec<Stage>| {
        let seconds = stages.iter().map(|stage| stage.seconds).sum();
        steps.push(Step { step, what, seconds, stages });
    };
    let base_bytes = opened.gguf.file_bytes();
    let n_targets = goals.iter().filter(|goal| matches!(goal.kind, Kind::Target(_))).count();
    let feedback = calibration.filter(|_| request.rounding == RoundingMethod::Feedback);
    let round = |files: usize| {
        let mut stages: Vec<Stage> =
            feedback.map(|calibration| costs.rounding(calibration, files)).into_iter().collect();
        stages.extend((0..files).map(|_| match feedback {
            // What the pass does not show is left: the embedding.
            Some(_) => costs.copying("quantizing", base_bytes / 8),
            None => costs.encoding(),
        }));
        if let Some(calibration) = feedback.filter(|calibration| calibration.has_final_gate()) {
            let tokens = calibration.gate().len();
            stages.push(costs.evaluation("running the original", 1, tokens));
            // With feedback, and with search.
            stages.extend((0..2 * files).map(|_| costs.evaluation("judging the whole", 1, tokens)));
        }
        stages
    };
    if opened.source.is_folder() {
        add("convert".into(), "the folder to a 16-bit GGUF".into(), vec![costs.copying("converting", base_bytes)]);
    }
    if !goals.is_empty() {
        let what = match request.importance.file {
            Some(_) => "taken from a file",
            None => "collected on the calibration text",
        };
        add(
            "imatrix".into(),
            format!("importance of weight columns, {what}"),
            vec![costs.importance(work.calibration)],
        );
        let tokens = request.probes.tokens.unwrap_or(PROBE_TOKENS);
        let probes = request.measured_on.as_ref().map(|_| CHECKED_PROBES);
        let mut stages = costs.measurement(tokens, probes).to_vec();
        stages.extend(feedback.map(|calibration| costs.feedback_measurement(calibration)));
        let what = match probes {
            Some(_) => "a check of another model's measurement",
            None => "what rounding each tensor does",
        };
        add("measure".into(), what.into(), stages);
        add("plan".into(), format!("types for {} files", goals.len()), vec![costs.copying("", base_bytes / 64)]);
        if n_targets > 0 {
            let stages = (0..n_targets).map(|_| costs.encoding()).collect();
            add("standard".into(), format!("{n_targets} standard files, to compare with"), stages);
        }
        add("round".into(), format!("{} planned files in one pass", goals.len()), round(goals.len()));
    }
    for scheme in &request.schemes {
        let mut stages: Vec<Stage> =
            calibration.map(|calibration| costs.rounding(calibration, 1)).into_iter().collect();
        stages.push(costs.copying("exporting", base_bytes / 8));
        stages.push(costs.copying("converting", base_bytes));
        add(format!("export {}", scheme.name()), "a folder of compressed-tensors, and its values".into(), stages);
    }
    let models = 1 + goals.len() + n_targets + request.schemes.len() + request.against.len();
    add(
        "evaluate".into(),
        format!("{} files against the base in one pass", models - 1),
        vec![costs.evaluation("evaluating", models, work.evaluation)],
    );
    if request.smallest && n_targets > 0 {
        for trial in 1..=request.trials {
            let mut stages = round(n_targets);
            stages.push(costs.evaluation("evaluating", 1 + n_targets, work.evaluation));
            add(format!("shrink {trial}"), "smaller files of each target, rounded and evaluated".into(), stages);
        }
    }
    let kept = goals.len() + request.schemes.len();
    if let Some(tasks) = &request.evaluation.tasks {
        let bytes = task_bytes(&tasks.folder);
        let n_files = tasks.count()?;
        let tokens = (bytes / 3) as usize / n_files.max(1);
        let stages = (0..n_files * (kept + 1)).map(|_| costs.evaluation("answering", 1, tokens)).collect();
        add("tasks".into(), format!("{n_files} files of tasks"), stages);
    }
    if request.llama_bench.is_some() {
        let stage = costs.evaluation("", goals.len(), 40 * 640);
        add("speed".into(), "llama-bench".into(), vec![Stage { kind: progress::Kind::Program, ..stage }]);
    }
    let bytes: u64 = goals.iter().map(|goal| goal.bytes).sum();
    let compared = costs.copying("comparing tensors", base_bytes * kept as u64);
    let hashed = costs.copying("", base_bytes + bytes);
    add("card".into(), "pages, checksums, and files to their places".into(), vec![compared, hashed]);
    Ok(steps)
}

fn task_bytes(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).filter(std::fs::Metadata::is_file).map(|found| found.len()).sum()
}

/// Bytes on the disk of the output folder.
pub(super) struct Disk {
    base: u64,
    standard: Vec<u64>,
    planned: Vec<u64>,
    targets: u64,
    exports: Vec<(&'static str, u64)>,
    decoded: u64,
    states: u64,
    /// What a planned file leaves beside it while it is made: what feedback gives, and search where the whole is judged.
    roundings: u64,
    shrinks: bool,
}

impl Disk {
    pub(super) fn new(
        request: &Request,
        opened: &Opened,
        goals: &[Goal],
        calibration: Option<&Calibration<'_>>,
    ) -> Disk {
        let of_targets = || goals.iter().filter(|goal| matches!(goal.kind, Kind::Target(_))).map(|goal| goal.bytes);
        let weights: u64 = opened.gguf.tensors().iter().map(TensorInfo::elements).sum();
        let exports = request.schemes.iter().map(|scheme| {
            let bits = if scheme.name().contains('4') && !scheme.name().starts_with("W8") { 5 } else { 9 };
            (scheme.name(), weights * bits / 8)
        });
        let base_bytes = opened.gguf.file_bytes();
        Disk {
            base: if opened.source.is_folder() { base_bytes } else { 0 },
            standard: of_targets().collect(),
            planned: goals.iter().map(|goal| goal.bytes.min(base_bytes)).collect(),
            targets: of_targets().sum(),
            decoded: base_bytes * request.schemes.len() as u64,
            exports: exports.collect(),
            states: calibration.map_or(0, |calibration| 2 * calibration.states_bytes()),
            roundings: match calibration.filter(|_| request.rounding == RoundingMethod::Feedback) {
                Some(calibration) if !goals.is_empty() => 1 + u64::from(calibration.has_final_gate()),
                _ => 0,
            },
            shrinks: request.smallest,
        }
    }

    pub(super) fn of_scheme(&self, name: &str) -> u64 {
        self.exports.iter().find(|(scheme, _)| *scheme == name).map_or(0, |(_, bytes)| *bytes)
    }

    /// What stays.
    pub(super) fn kept(&self) -> u64 {
        self.planned.iter().chain(self.exports.iter().map(|(_, bytes)| bytes)).sum()
    }

    /// The most that lies there at once, with so many standard files.
    pub(super) fn peak(&self, standard_files: usize) -> u64 {
        let mut standard = self.standard.clone();
        standard.sort_unstable_by(|a, b| b.cmp(a));
        let standard: u64 = standard.iter().take(standard_files).sum();
        let states = if self.roundings > 0 { self.states } else { 0 };
        let rounding = |bytes: u64| (1 + self.roundings) * bytes + states;
        let planned: u64 = self.planned.iter().sum();
        let exports = self.kept() - planned;
        let round = self.base + standard + rounding(planned);
        let evaluate = self.base + standard + planned + exports + self.decoded;
        let shrink = if self.shrinks { self.base + planned + exports + rounding(self.targets) } else { 0 };
        round.max(evaluate).max(shrink)
    }

    /// Standard files that lie there at once within the limit.
    pub(super) fn standard_files_at_once(&self, request: &Request) -> Result<usize, PublishError> {
        let all = self.standard.len();
        let Some(limit) = request.disk else { return Ok(all.max(1)) };
        let most = (1..=all.max(1)).rev().find(|files| self.peak(*files) <= limit);
        most.ok_or_else(|| {
            PublishError::Choice(format!(
                "--disk {}: the run takes {} at least; allow more, or ask for fewer files",
                decimal_size(limit),
                decimal_size(self.peak(1))
            ))
        })
    }
}
