//! The verb: measure a model once, so that any number of plans can be made from the result.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::curvature::{calibrate, calibrating};
use super::feedback::{FeedbackMeter, FeedbackSubject};
use super::inventory::{Inventory, SourceFile, with_planning};
use super::probes::measure_errors;
use super::{
    FeedbackErrors, FeedbackProvenance, JointProbe, MeasureError, MeasuredTensor, Measurement, ProbeText, Prober,
    Provenance, SENSITIVITY_VERSION, Sampling, Sensitivity, fits_row,
};
use crate::atomic_file::{Replace, check_target};
use crate::display::{count, printable};
use crate::gguf::{Gguf, TensorInfo, TensorType, fingerprint};
use crate::imatrix::Named;
use crate::model::{ForwardOptions, Model};
use crate::moments::{Calibration, GradientMoments, has_input};
use crate::os;
use crate::progress::{Interrupted, Stop, Unit, Watch};
use crate::recipe::candidates::{Rules, tried_types};
use crate::rounding::RoundingMethod;
use crate::text::{Set, Text, leading_bos, open_tokenizer};
use crate::tokenizer::Tokenizer;
use crate::unfinished::{GOES_ON, going_on, partial_path, states_folder, tokens_sha256};

/// Tokens of a sequence, or the model's context if that is shorter: long enough for the layers to see structure, short
/// enough for many documents.
const SEQUENCE: usize = 256;

/// Weights times tokens that a probe is worth by default: some 1,300 tokens at 1.5B.
const PROBE_WORK: u64 = 2_000_000_000_000;

/// Most tokens of a probe by default, for models of up to [`SMALL_MODEL`] weights and for larger ones: two cores measure
/// a model of 135M in a quarter of an hour, one of 1.5B in an hour.
const MOST_PROBE_TOKENS: [u64; 2] = [4096, 3072];

/// Weights of a model that is measured in no time.
const SMALL_MODEL: u64 = 100_000_000;

/// Levels at which all tensors are rounded at once: for rows that 256 divides, and for others.
const LEVELS: [[TensorType; 2]; 3] =
    [[TensorType::Q3_K, TensorType::Q4_0], [TensorType::Q4_K, TensorType::Q5_0], [TensorType::Q6_K, TensorType::Q8_0]];

/// What probes run on.
#[derive(Debug, Clone, Default)]
pub struct ProbeOptions {
    /// The text; `None` is [`Set::Probe`].
    pub text: Option<Text>,
    /// Tokens that every probe runs: more take longer and are more certain. `None` is 4096, from 0.1B weights on 3072, less
    /// above 0.7B.
    pub tokens: Option<usize>,
    /// Moments of gradients of this model: divergences are told from them, and a few probes say how far off that is.
    pub gradients: Option<Arc<GradientMoments>>,
}

/// A request to measure what rounding each tensor does to a model.
///
/// ```
/// use lwq::atomic_file::Replace;
/// use lwq::gguf::Gguf;
/// use lwq::measure::{ProbeOptions, Request};
///
/// let model = Gguf::open("tests/data/doclet-4m-f16.gguf")?;
/// let folder = tempfile::tempdir()?;
/// let probes = ProbeOptions { tokens: Some(64), ..ProbeOptions::default() };
/// let measured = Request::new(&model).probes(probes).run(&folder.path().join("m.sens.json"), Replace::No, &())?;
/// let down = measured.tensor("blk.0.ffn_down.weight").ok_or("not measured")?;
/// assert!(down.errors["Q3_K"] > down.errors["Q6_K"]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Request<'a> {
    pub(super) model: &'a Gguf,
    pub(super) imatrix: Option<Named<'a>>,
    pub(super) probes: ProbeOptions,
}

impl<'a> Request<'a> {
    /// Measures `model` without importance, on the built-in text.
    pub fn new(model: &'a Gguf) -> Request<'a> {
        Request { model, imatrix: None, probes: ProbeOptions::default() }
    }

    /// Weighs errors and rounds probes with an importance matrix.
    pub fn imatrix(mut self, imatrix: Named<'a>) -> Request<'a> {
        self.imatrix = Some(imatrix);
        self
    }

    /// Chooses what probes run on.
    pub fn probes(mut self, probes: ProbeOptions) -> Request<'a> {
        self.probes = probes;
        self
    }

    /// Measures and writes `output`. What an interrupted run left beside it is taken over; with [`Replace::Yes`] it is
    /// removed first, and so is an earlier result.
    ///
    /// # Errors
    /// When the model cannot be run, a file is wrong or cannot be written, or `watch` stops the run. What was measured is
    /// then kept for the next one.
    pub fn run(self, output: &Path, replace: Replace, watch: &dyn Watch) -> Result<Sensitivity, MeasureError> {
        check_target(output, replace.is_allowed())?;
        if replace.is_allowed() {
            for path in [output.to_owned(), partial_path(output)] {
                match std::fs::remove_file(&path) {
                    Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                        return Err(MeasureError::Io { path, source });
                    }
                    _ => {}
                }
            }
        }
        let (imatrix, source) = self.imatrix.map(with_planning).unzip();
        let mut notes = Vec::new();
        let inventory =
            Inventory::new(self.model, &Rules::default(), imatrix.as_ref(), RoundingMethod::Ggml, &mut notes)?;
        notes.iter().for_each(|line| watch.warn(line));
        let tensors = inventory.measured();
        let job = Job { gguf: self.model, imatrix: source, tensors: &tensors, probes: &self.probes, path: output };
        job.measure(watch)
    }
}

/// The file that holds a model's measurement by default.
pub fn default_path(model: &Path) -> PathBuf {
    model.with_extension("sens.json")
}

/// Where the measurement of `model` lies or is to be made: beside the model, or beside `output` where there is none yet and
/// nothing can or should be written beside the model (a read-only folder, the cache of the Hugging Face hub). True with the
/// path if it is the latter.
pub fn path_for(model: &Path, output: Option<&Path>) -> (PathBuf, bool) {
    let beside = default_path(model);
    if beside.exists() || os::is_writable(crate::atomic_file::folder_of(model)) {
        return (beside, false);
    }
    let folder = match output {
        Some(output) if output.is_dir() => output,
        Some(output) => crate::atomic_file::folder_of(output),
        None => Path::new("."),
    };
    (beside.file_name().map_or(beside.clone(), |name| folder.join(name)), true)
}

/// A model, its probe text and what the measurement depends on.
pub(crate) struct Job<'a> {
    pub gguf: &'a Gguf,
    pub imatrix: Option<SourceFile>,
    pub tensors: &'a [MeasuredTensor<'a>],
    pub probes: &'a ProbeOptions,
    /// File that holds the measurement, or will.
    pub path: &'a Path,
}

/// Everything that is there once the model is loaded.
pub(super) struct Ready<'a, 'm, 'g> {
    pub(super) measurement: Measurement<'a, 'm, 'g>,
    gradients: Option<&'a GradientMoments>,
    pub(super) watch: &'a dyn Watch,
    pub(super) stop: &'a Stop,
}

impl Job<'_> {
    /// Tokens of the probe text in the model's vocabulary, and its name.
    fn text(&self, model: &Model<'_>, tokenizer: &Tokenizer) -> Result<(ProbeText, String), MeasureError> {
        let text = self.probes.text.clone().unwrap_or_else(|| Text::built_in(Set::Probe));
        let tokens = tokenizer.encode(text.joined(), true, false);
        let n_ctx = SEQUENCE.min(model.hparams().n_ctx_train.max(2));
        let cut = ProbeText::new(&tokens, self.probe_tokens(), n_ctx, leading_bos(tokenizer));
        let name = text.name();
        Ok((cut.map_err(|source| MeasureError::Text { name: printable(&name), source })?, name))
    }

    fn probe_tokens(&self) -> usize {
        let weights: u64 = self.gguf.tensors().iter().map(TensorInfo::elements).sum();
        let most = MOST_PROBE_TOKENS[usize::from(weights > SMALL_MODEL)];
        let default = || (PROBE_WORK / weights.max(1)).clamp(512, most).next_multiple_of(SEQUENCE as u64) as usize;
        self.probes.tokens.unwrap_or_else(default)
    }

    fn provenance(&self, text: &ProbeText, text_name: String) -> Provenance {
        Provenance {
            model: self.gguf.label().to_owned(),
            model_sha256: fingerprint(self.gguf),
            imatrix: self.imatrix.as_ref().map(|source| source.name.clone()),
            imatrix_sha256: self.imatrix.as_ref().map(|source| source.sha256.clone()),
            text: text_name,
            text_sha256: tokens_sha256(text.tokens()),
            tokens: text.tokens().len() as u64,
            scored: text.n_scored() as u64,
            sequences: text.n_sequences() as u64,
            seed: Sampling::default().seed,
            gradients_sha256: self.gradients().map(GradientMoments::digest),
        }
    }

    fn gradients(&self) -> Option<&GradientMoments> {
        self.probes.gradients.as_deref()
    }

    fn bad_file(&self, path: &Path, reason: String) -> MeasureError {
        MeasureError::BadFile { path: path.to_owned(), reason }
    }

    /// The finished measurement if there is one of this model and imatrix; plans take it whatever its text was.
    ///
    /// # Errors
    /// When the file is damaged or belongs to another model or imatrix.
    pub(crate) fn finished(&self) -> Result<Option<Sensitivity>, MeasureError> {
        if !self.path.exists() {
            return Ok(None);
        }
        let found = Sensitivity::open(self.path)?;
        let advice = "delete it, or name another file with --sensitivity";
        if found.provenance.model_sha256 != fingerprint(self.gguf) {
            let model = printable(&found.provenance.model);
            return Err(self.bad_file(self.path, format!("was measured on another model ({model}); {advice}")));
        }
        let wanted = self.imatrix.as_ref().map(|source| &source.sha256);
        if found.provenance.imatrix_sha256.as_ref() != wanted {
            let other = found.provenance.imatrix.as_deref().unwrap_or("no importance matrix");
            return Err(self.bad_file(self.path, format!("was measured with {}; {advice}", printable(other))));
        }
        Ok(Some(found))
    }

    /// Runs `work` with the model loaded and the original's distributions computed.
    pub(super) fn with_model<T>(
        &self,
        watch: &dyn Watch,
        work: impl FnOnce(&Ready<'_, '_, '_>, Provenance, f64) -> Result<T, MeasureError>,
    ) -> Result<T, MeasureError> {
        let file = || printable(self.gguf.label());
        let named = |source| MeasureError::OfModel { file: file(), source };
        let model = Model::open(self.gguf).map_err(named)?;
        model.check_predicts().map_err(|source| MeasureError::NoPredictions { file: file(), source })?;
        model.warn(watch);
        let tokenizer = open_tokenizer(&model, None, watch)?;
        let (text, name) = self.text(&model, &tokenizer)?;
        let provenance = self.provenance(&text, name);
        let stop = watch.stop();
        let options = ForwardOptions { cancel: Some(stop.flag().clone()), ..ForwardOptions::default() };
        let started = Instant::now();
        let done = Prober::new(&model, options, text)
            .map_err(|error| match MeasureError::from(error) {
                MeasureError::Model(source) => named(source),
                other => other,
            })
            .and_then(|prober| {
                let seconds_per_pass = started.elapsed().as_secs_f64();
                let measurement = Measurement { gguf: self.gguf, prober: &prober, tensors: self.tensors };
                let gradients = self.gradients();
                work(&Ready { measurement, gradients, watch, stop: &stop }, provenance, seconds_per_pass)
            });
        stopped(&stop, done, watch)
    }

    /// Measures, going on from a part that an earlier run left, and writes the file.
    ///
    /// # Errors
    /// When a tensor or the text is not usable, the part belongs to another run, or the run is interrupted.
    pub(crate) fn measure(&self, watch: &dyn Watch) -> Result<Sensitivity, MeasureError> {
        self.with_model(watch, |ready, provenance, seconds_per_pass| {
            let partial = partial_path(self.path);
            let mut state = match partial.exists().then(|| Sensitivity::open(&partial)).transpose()? {
                Some(state) if state.provenance == provenance => {
                    watch.note(&format!("going on with {}", printable(&partial.display().to_string())));
                    state
                }
                Some(_) => {
                    let reason =
                        "is an unfinished measurement of another model, imatrix or text; delete it or add --force";
                    return Err(self.bad_file(&partial, reason.to_owned()));
                }
                None => Sensitivity { lwq_sensitivity: SENSITIVITY_VERSION, provenance, ..Sensitivity::default() },
            };
            ready.run(&mut state, &partial, seconds_per_pass)?;
            state.save(self.path, true)?;
            let _ = std::fs::remove_file(&partial);
            Ok(state)
        })
    }

    /// Adds a second round around a solution to `state` and writes the file.
    ///
    /// # Errors
    /// Those of [`Self::measure`].
    pub(crate) fn measure_around(
        &self,
        state: &mut Sensitivity,
        types: &HashMap<String, TensorType>,
        watch: &dyn Watch,
    ) -> Result<(), MeasureError> {
        self.with_model(watch, |ready, provenance, seconds_per_pass| {
            if state.provenance != provenance {
                let reason = "was measured on another text; give that text with -f, or delete the file";
                return Err(self.bad_file(self.path, reason.to_owned()));
            }
            let joint = ready.around(types, state.flip_cost(), seconds_per_pass)?;
            state.joint.push(joint);
            state.save(self.path, true)
        })
    }

    /// Adds to `state` what rounding with feedback leaves, unless it is there for these texts and settings, and writes the
    /// file after each layer.
    ///
    /// # Errors
    /// When a tensor cannot be rounded or a file written, or the run is interrupted.
    pub(crate) fn measure_feedback(
        &self,
        state: &mut Sensitivity,
        calibration: &Calibration<'_>,
        watch: &dyn Watch,
    ) -> Result<(), MeasureError> {
        let (text, gate) = (calibration.text(), calibration.gate());
        let provenance = FeedbackProvenance {
            text: text.name().to_owned(),
            text_sha256: text.sha256(),
            gate_sha256: gate.sha256(),
            tokens: text.len() as u64,
            settings: calibration.words(),
        };
        let known = state.feedback.take().filter(|known| known.provenance == provenance);
        if let Some(known) = known.as_ref().filter(|known| known.is_complete()) {
            state.feedback = Some(known.clone());
            return Ok(());
        }
        let folder = states_folder(self.path);
        let failed = |source| MeasureError::Io { path: folder.clone(), source };
        let states_are_there = folder.is_dir();
        std::fs::create_dir_all(&folder).map_err(failed)?;
        let stop = watch.stop();
        let stream = calibration.stream(&folder, stop.clone())?;
        let mut errors = known.filter(|_| states_are_there).unwrap_or_default();
        (errors.provenance, errors.steps) = (provenance, stream.steps());
        if errors.steps_done > 0 {
            watch.note(&going_on(errors.steps_done, errors.steps, "steps"));
        }
        let output = calibration.model().output_tensor();
        let reached = self.tensors.iter().filter(|measured| has_input(&measured.tensor.name, output));
        let subjects: HashMap<String, FeedbackSubject<'_>> = reached
            .map(|measured| {
                let types = tried_types().filter(|ty| fits_row(*ty, measured.tensor.row_len())).collect();
                (measured.tensor.name.clone(), FeedbackSubject { types, importance: measured.importance })
            })
            .collect();
        watch.note(&format!(
            "measuring what feedback leaves, on {} tokens of {}",
            count(text.len() as u64),
            text.name()
        ));
        let first = errors.steps_done;
        let path = self.path;
        let saved = &mut *state;
        let mut on_step = |errors: &FeedbackErrors| {
            saved.feedback = Some(errors.clone());
            saved.save(path, true)
        };
        let mut meter =
            FeedbackMeter { gguf: self.gguf, subjects: &subjects, errors: &mut errors, on_step: &mut on_step };
        watch.begin("rounding samples with feedback", stream.total_work(first, &meter), Unit::Megaflop);
        let result = stream.run(first, &mut meter, watch);
        stopped(&stop, result, watch)?;
        watch.end();
        std::fs::remove_dir_all(&folder).map_err(failed)
    }
}

/// The end of work that can be stopped. What follows, such as quantizing after the plan, must not begin when a stop was
/// asked for at the last moment.
fn stopped<T>(stop: &Stop, done: Result<T, MeasureError>, watch: &dyn Watch) -> Result<T, MeasureError> {
    if stop.end() || matches!(done, Err(MeasureError::Interrupted(_))) {
        watch.warn(GOES_ON);
        return Err(Interrupted.into());
    }
    done
}

pub(super) fn minutes(seconds: f64) -> String {
    if seconds < 90.0 { format!("{seconds:.0} seconds") } else { format!("{:.0} minutes", (seconds / 60.0).ceil()) }
}

impl Ready<'_, '_, '_> {
    /// Tokens that stand for `cost` forward passes in the progress.
    pub(super) fn tokens(&self, cost: f64) -> u64 {
        (cost * self.measurement.prober.text().tokens().len() as f64) as u64
    }

    fn run(&self, state: &mut Sensitivity, partial: &Path, seconds_per_pass: f64) -> Result<(), MeasureError> {
        let (m, watch) = (&self.measurement, self.watch);
        let tensors = m.tensors;
        let bytes = |tensor: &TensorInfo| tensor.bytes.unwrap_or(0);
        watch.begin("rounding samples", tensors.iter().map(|measured| bytes(measured.tensor)).sum(), Unit::Bytes);
        let save = |state: &Sensitivity| state.save(partial, true);
        measure_errors(m.gguf, tensors, Sampling::default(), self.gradients, state, &mut |state, tensor| {
            watch.advance(bytes(tensor), &tensor.name);
            if self.stop.is_requested() {
                save(state)?;
                return Err(Interrupted.into());
            }
            Ok(())
        })?;
        watch.end();
        save(state)?;

        let levels = LEVELS.len().saturating_sub(state.joint.len());
        let calibrating = if state.curvature.is_none() { calibrating(&state.tensors) } else { Vec::new() };
        let probes = m.cost_of_probes(state) + m.cost_of_some(state, &calibrating);
        let cost = probes + levels as f64 * m.cost_of_joint(false);
        watch.note(&format!(
            "{} tensors to probe on {} tokens each, about {}",
            m.count_missing(state) + calibrating.len(),
            count(m.prober.text().tokens().len() as u64),
            minutes(cost * seconds_per_pass)
        ));
        watch.begin("probing", self.tokens(cost), Unit::Tokens);
        let mut on_probe = |state: &Sensitivity, tensor: &str, cost: f64| {
            watch.advance(self.tokens(cost), tensor);
            state.save(partial, true)
        };
        m.probe_some(state, &calibrating, &mut on_probe)?;
        m.probe_all(state, &mut on_probe)?;
        if state.curvature.is_none() {
            let flip_cost = state.flip_cost();
            state.curvature = calibrate(&mut state.tensors, flip_cost);
            save(state)?;
        }
        for level in LEVELS.iter().skip(state.joint.len()) {
            let types = tensors.iter().filter_map(|measured| {
                let ty = level.iter().find(|ty| measured.types.contains(ty))?;
                Some((measured.tensor.name.clone(), *ty))
            });
            let advance = |what: &str, cost| watch.advance(self.tokens(cost), what);
            let joint = m.joint(&types.collect(), false, state.flip_cost(), &advance)?;
            state.joint.push(joint);
            save(state)?;
        }
        watch.end();
        Ok(())
    }

    fn around(
        &self,
        types: &HashMap<String, TensorType>,
        flip_cost: Option<f64>,
        seconds_per_pass: f64,
    ) -> Result<JointProbe, MeasureError> {
        let (m, watch) = (&self.measurement, self.watch);
        let cost = m.cost_of_joint(true);
        watch.note(&format!("a second round around the first solution, about {}", minutes(cost * seconds_per_pass)));
        watch.begin("second round", self.tokens(cost), Unit::Tokens);
        let joint = m.joint(types, true, flip_cost, &|what, cost| watch.advance(self.tokens(cost), what))?;
        watch.end();
        Ok(joint)
    }
}
