//! What is asked for.

use std::path::{Path, PathBuf};

use super::fit::{CacheType, Fit};
use super::identity::Said;
use super::{Draft, PublishError};
use crate::atomic_file::Replace;
use crate::eval::TextOptions;
use crate::export::Scheme;
use crate::measure::ProbeOptions;
use crate::moments::CalibrationOptions;
use crate::plan::Size;
use crate::progress::Watch;
use crate::recipe::Target;
use crate::report::TaskFolder;
use crate::rounding::RoundingMethod;
use crate::text::{Set, Text};

/// The targets of a repository where nothing else is asked for: from what still answers to what nobody tells from the
/// original, each about a fifth larger than the one before.
pub const DEFAULT_TARGETS: [Target; 8] = [
    Target::IQ2_M,
    Target::IQ3_XXS,
    Target::Q3_K_M,
    Target::IQ4_XS,
    Target::Q4_K_M,
    Target::Q5_K_M,
    Target::Q6_K,
    Target::Q8_0,
];

/// Trials of each target on the way to the smallest file, unless another number is asked for.
pub const DEFAULT_TRIALS: usize = 4;

/// A file of others to stand beside those that are made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Against {
    /// What its column is called.
    pub name: String,
    /// The file, a GGUF.
    pub path: PathBuf,
}

/// What the importance matrix is collected on.
#[derive(Clone, Debug, Default)]
pub struct ImportanceOptions {
    /// A finished one, instead of collecting.
    pub file: Option<PathBuf>,
    /// Most chunks of the text; all when `None`.
    pub chunks: Option<usize>,
    /// Tokens of a chunk; 512 when `None`, or the model's context if that is shorter.
    pub ctx: Option<usize>,
    /// Computes in 32-bit floats: slower, and the same on every processor.
    pub accurate: bool,
}

/// How files are evaluated.
#[derive(Clone, Debug)]
pub struct EvaluationOptions {
    /// The text.
    pub text: Text,
    /// How it is cut and scored; [`TextOptions::state`] and [`TextOptions::memory`] are set by the run.
    pub options: TextOptions,
    /// Tasks to score, too.
    pub tasks: Option<TaskFolder>,
}

impl Default for EvaluationOptions {
    fn default() -> EvaluationOptions {
        EvaluationOptions { text: Text::built_in(Set::Evaluation), options: TextOptions::default(), tasks: None }
    }
}

/// A request to make a repository of a model.
///
/// ```
/// use lwq::eval::TextOptions;
/// use lwq::measure::ProbeOptions;
/// use lwq::moments::CalibrationOptions;
/// use lwq::publish::{EvaluationOptions, ImportanceOptions, Request};
/// use lwq::recipe::Target;
///
/// let folder = tempfile::tempdir()?;
/// let draft = Request::new("tests/data/doclet-4m-f16.gguf".as_ref(), folder.path())
///     .targets(&[Target::Q4_K_M])
///     .importance(ImportanceOptions { chunks: Some(4), ..Default::default() })
///     .probes(ProbeOptions { tokens: Some(512), ..Default::default() })
///     .calibration(CalibrationOptions { tokens: 1024, ..Default::default() })
///     .evaluation(EvaluationOptions {
///         options: TextOptions { n_ctx: Some(64), chunks: Some(2), ..Default::default() },
///         ..Default::default()
///     })
///     .decide(&())?; // steps, time, disk: all that a dry run shows
/// let published = draft.run(&())?;
/// let file = &published.report.files[0];
/// assert!(file.size_bytes <= file.standard.as_ref().ok_or("no standard")?.size_bytes);
/// assert!(folder.path().join("README.md").is_file() && folder.path().join(&file.file).is_file());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Request {
    pub(super) source: PathBuf,
    pub(super) output: PathBuf,
    pub(super) name: Option<String>,
    pub(super) targets: Vec<Target>,
    pub(super) sizes: Vec<Size>,
    pub(super) fit: Option<Fit>,
    pub(super) schemes: Vec<Scheme>,
    pub(super) ctx: Option<u64>,
    pub(super) cache: CacheType,
    pub(super) smallest: bool,
    pub(super) trials: usize,
    pub(super) against: Vec<Against>,
    pub(super) importance: ImportanceOptions,
    pub(super) probes: ProbeOptions,
    pub(super) calibration: CalibrationOptions,
    pub(super) rounding: RoundingMethod,
    pub(super) evaluation: EvaluationOptions,
    pub(super) measured_on: Option<PathBuf>,
    pub(super) template: Option<PathBuf>,
    pub(super) llama_bench: Option<PathBuf>,
    pub(super) said: Said,
    pub(super) text_license: Option<String>,
    pub(super) memory: Option<u64>,
    pub(super) disk: Option<u64>,
    pub(super) replace: Replace,
}

impl Request {
    /// A repository in the folder `output`, which is made, of the model in `source`: a GGUF, or a Hugging Face folder.
    pub fn new(source: &Path, output: &Path) -> Request {
        Request {
            source: source.to_owned(),
            output: output.to_owned(),
            name: None,
            targets: Vec::new(),
            sizes: Vec::new(),
            fit: None,
            schemes: Vec::new(),
            ctx: None,
            cache: CacheType::default(),
            smallest: false,
            trials: DEFAULT_TRIALS,
            against: Vec::new(),
            importance: ImportanceOptions::default(),
            probes: ProbeOptions::default(),
            calibration: CalibrationOptions::default(),
            rounding: RoundingMethod::Feedback,
            evaluation: EvaluationOptions::default(),
            measured_on: None,
            template: None,
            llama_bench: None,
            said: Said::default(),
            text_license: None,
            memory: None,
            disk: None,
            replace: Replace::No,
        }
    }

    /// What files are called, before their target; the source's name without its type unless told otherwise.
    pub fn name(self, name: impl Into<Option<String>>) -> Self {
        Request { name: name.into(), ..self }
    }

    /// A planned file in at most the bytes of each target's standard file; [`DEFAULT_TARGETS`] where neither targets nor
    /// sizes, devices or schemes are given.
    pub fn targets(self, targets: &[Target]) -> Self {
        Request { targets: targets.to_vec(), ..self }
    }

    /// A planned file of each size.
    pub fn sizes(self, sizes: &[Size]) -> Self {
        Request { sizes: sizes.to_vec(), ..self }
    }

    /// The best file for a device.
    pub fn fit(self, fit: impl Into<Option<Fit>>) -> Self {
        Request { fit: fit.into(), ..self }
    }

    /// A folder in each of these schemes of compressed-tensors; the source must be a folder.
    pub fn schemes(self, schemes: &[Scheme]) -> Self {
        Request { schemes: schemes.to_vec(), ..self }
    }

    /// The context whose memory the card counts and [`Self::fit`] leaves free: 8192 tokens, or the model's if that is
    /// shorter, unless told otherwise.
    pub fn context(self, ctx: impl Into<Option<u64>>, cache: CacheType) -> Self {
        Request { ctx: ctx.into(), cache, ..self }
    }

    /// Looks for the smallest planned file of each target whose divergence is not above the standard file's, with so many
    /// trials at most.
    pub fn smallest(self, smallest: bool, trials: usize) -> Self {
        Request { smallest, trials, ..self }
    }

    /// Files of others to compare with.
    pub fn against(self, files: Vec<Against>) -> Self {
        Request { against: files, ..self }
    }

    /// How the importance matrix is made; its text is that of [`Self::calibration`].
    pub fn importance(self, importance: ImportanceOptions) -> Self {
        Request { importance, ..self }
    }

    /// What probes run on.
    pub fn probes(self, probes: ProbeOptions) -> Self {
        Request { probes, ..self }
    }

    /// Texts and settings of feedback; the importance matrix is collected on the same text.
    pub fn calibration(self, calibration: CalibrationOptions) -> Self {
        Request { calibration, ..self }
    }

    /// How planned files are rounded; with feedback unless told otherwise.
    pub fn rounding(self, rounding: RoundingMethod) -> Self {
        Request { rounding, ..self }
    }

    /// How files are evaluated.
    pub fn evaluation(self, evaluation: EvaluationOptions) -> Self {
        Request { evaluation, ..self }
    }

    /// The measurement of the model that this one was made from, which serves it if a check of some probes allows.
    pub fn measured_on(self, file: impl Into<Option<PathBuf>>) -> Self {
        Request { measured_on: file.into(), ..self }
    }

    /// The template of the card.
    pub fn template(self, file: impl Into<Option<PathBuf>>) -> Self {
        Request { template: file.into(), ..self }
    }

    /// The llama-bench that measures the files' speed.
    pub fn llama_bench(self, program: impl Into<Option<PathBuf>>) -> Self {
        Request { llama_bench: program.into(), ..self }
    }

    /// What the card says of its model and its maker.
    pub fn said(self, said: Said) -> Self {
        Request { said, ..self }
    }

    /// The licence of a calibration text that is not built in.
    pub fn text_license(self, license: impl Into<Option<String>>) -> Self {
        Request { text_license: license.into(), ..self }
    }

    /// Bytes of memory for activations, and bytes of disk that the run may take.
    pub fn limits(self, memory: impl Into<Option<u64>>, disk: impl Into<Option<u64>>) -> Self {
        Request { memory: memory.into(), disk: disk.into(), ..self }
    }

    /// Whether files in the output folder that the journal does not know, or that another model left, are replaced.
    pub fn replace(self, replace: Replace) -> Self {
        Request { replace, ..self }
    }

    /// Reads headers and decides on names, sizes, steps, time and disk. Nothing is written.
    ///
    /// # Errors
    /// When the source cannot be read or run, a choice cannot be met, or the output folder holds what may not be replaced.
    pub fn decide(&self, watch: &dyn Watch) -> Result<Draft, PublishError> {
        Draft::decide(self, watch)
    }
}
