//! `lwq measure`, and the measurement that `lwq plan` makes when there is none.

mod feedback;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::eval::loaded::{bos, file_names, open_tokenizer, read_text};
use super::{Common, Interrupted, Progress, Unit, count, decimal_size, printable};
use lwq::atomic_file::check_target;
use lwq::text;
use lwq::gguf::{Gguf, TensorInfo, TensorType, fingerprint};
use lwq::model::{ForwardOptions, Model, ModelError};
use lwq::os;
use lwq::plan::SourceFile;
use lwq::recipe::candidates::tried_types;
use lwq::quant;
use lwq::measure::{
    JointProbe, MeasureError, Measurement, ProbeText, Prober, Provenance, SENSITIVITY_VERSION, Sampling, Sensitivity,
    Subject, fits_row, measure_errors,
};
use lwq::tokenizer::Tokenizer;

/// What files made with the built-in text name as their text.
const BUILT_IN_TEXT: &str = "lwq built-in probe text";

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

/// Types that probes round to, where they fit: the first is used unless a plan asks for another.
const PROBE_TYPES: [TensorType; 3] = [TensorType::Q3_K, TensorType::Q4_0, TensorType::Q8_0];

/// Levels at which all tensors are rounded at once: for rows that 256 divides, and for others.
const LEVELS: [[TensorType; 2]; 3] =
    [[TensorType::Q3_K, TensorType::Q4_0], [TensorType::Q4_K, TensorType::Q5_0], [TensorType::Q6_K, TensorType::Q8_0]];

/// How to measure: flags that `measure` and `plan` share.
#[derive(Args, Debug, Clone, Default)]
pub struct MeasureFlags {
    /// Probe text; repeatable [default: a built-in text, other documents than the calibration mix]
    #[arg(long, short, value_name = "TEXT")]
    pub file: Vec<PathBuf>,
    /// Tokens that every probe runs: more take longer and are more certain [default: 4096, from 0.1B weights on 3072, less above 0.7B]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(64..=1 << 20))]
    pub probe_tokens: Option<u32>,
}

/// Measure what rounding each tensor does to a model, once for all plans
#[derive(Args, Debug)]
pub struct MeasureArgs {
    /// Model to measure: a GGUF file, or the first file of a split one
    model: PathBuf,
    /// Importance matrix, GGUF or .dat
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    /// File to write [default: the model's name with .sens.json]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    flags: MeasureFlags,
}

/// A tensor to be measured.
pub(super) struct Target<'a> {
    pub tensor: &'a TensorInfo,
    pub importance: Option<&'a [f32]>,
    /// Factors of its rows.
    pub rows: Option<Vec<f64>>,
}

impl Target<'_> {
    /// Types whose error is measured.
    fn types(&self) -> Vec<TensorType> {
        let encodable = |ty: TensorType| {
            quant::codec(ty).is_some_and(|codec| {
                codec.quantize.is_some() && (self.importance.is_some() || !codec.needs_importance())
            })
        };
        let fits = |ty: &TensorType| fits_row(*ty, self.tensor.row_len()) && encodable(*ty);
        let mut types: Vec<TensorType> = tried_types().filter(fits).collect();
        if !types.contains(&self.tensor.ty) && encodable(self.tensor.ty) {
            types.push(self.tensor.ty);
        }
        types
    }
}

/// The file that holds a model's measurement by default.
pub(super) fn default_path(model: &Path) -> PathBuf {
    model.with_extension("sens.json")
}

/// The model, its probe text and what the measurement depends on.
pub(super) struct Job<'a> {
    pub gguf: &'a Gguf,
    pub imatrix: Option<SourceFile>,
    pub targets: Vec<Target<'a>>,
    pub flags: &'a MeasureFlags,
    /// File that holds the measurement, or will.
    pub path: &'a Path,
}

/// What `lwq measure --json` prints.
#[derive(Serialize)]
struct Report {
    output: String,
    tensors: usize,
    probe_tokens: u64,
    scored: u64,
    seconds: f64,
    peak_memory_bytes: Option<u64>,
}

impl MeasureArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// When a file is wrong, or the run was interrupted; what was measured is then kept for the next run.
    pub fn run(&self, common: &Common) -> Result<()> {
        let started = Instant::now();
        let gguf = super::quantize::open_source(&self.model)?;
        let output = self.output.clone().unwrap_or_else(|| default_path(&self.model));
        check_target(&output, common.force)?;
        if common.force {
            // A fresh start: neither a result nor a part of one may be taken over.
            for path in [output.clone(), partial_path(&output)] {
                match std::fs::remove_file(&path) {
                    Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                        return Err(error).with_context(|| path.display().to_string());
                    }
                    _ => {}
                }
            }
        }
        let measured = super::plan::with_targets(&gguf, self.imatrix.as_deref(), common, |targets, imatrix| {
            let job = Job { gguf: &gguf, imatrix, targets, flags: &self.flags, path: &output };
            job.measure(common)
        })?;
        let report = Report {
            output: output.display().to_string(),
            tensors: measured.tensors.len(),
            probe_tokens: measured.provenance.tokens,
            scored: measured.provenance.scored,
            seconds: started.elapsed().as_secs_f64(),
            peak_memory_bytes: os::peak_memory(),
        };
        if common.json {
            return common.result_json(&report);
        }
        if common.quiet {
            return Ok(());
        }
        let memory =
            report.peak_memory_bytes.map_or_else(String::new, |m| format!(", peak memory {}", decimal_size(m)));
        common.result(format!(
            "{}: {} tensors measured on {} tokens, {:.0} s{memory}\n",
            printable(&report.output),
            report.tensors,
            count(report.probe_tokens),
            report.seconds
        ))
    }
}

/// Where an unfinished measurement is kept.
fn partial_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".partial");
    PathBuf::from(name)
}

/// Everything that is there once the model is loaded.
struct Ready<'a, 'm, 'g> {
    measurement: Measurement<'a, 'm, 'g>,
    common: &'a Common,
}

impl Job<'_> {
    fn label(&self) -> String {
        printable(self.gguf.label())
    }

    fn subjects(&self) -> Vec<Subject<'_>> {
        let subject = |target: &'_ Target<'_>| {
            let types = target.types();
            let probe = PROBE_TYPES.into_iter().find(|ty| types.contains(ty)).or(types.first().copied());
            (types, probe)
        };
        self.targets
            .iter()
            .map(|target| {
                let (types, probe) = subject(target);
                Subject {
                    tensor: target.tensor,
                    types,
                    probe_types: probe.into_iter().collect(),
                    importance: target.importance,
                    row_factors: target.rows.as_deref(),
                }
            })
            .collect()
    }

    /// Tokens of the probe text in the model's vocabulary, and its name.
    fn text(&self, model: &Model<'_>, tokenizer: &Tokenizer) -> Result<(ProbeText, String)> {
        let (name, bytes) = match self.flags.file.as_slice() {
            [] => (BUILT_IN_TEXT.to_owned(), calibration::PROBE_MIX.as_bytes().to_vec()),
            files => (file_names(files), read_text(files)?),
        };
        let tokens = tokenizer.encode(&bytes, true, false);
        let n_ctx = SEQUENCE.min(model.hparams().n_ctx_train.max(2));
        let text = ProbeText::new(&tokens, self.probe_tokens(), n_ctx, bos(tokenizer));
        Ok((text.with_context(|| printable(&name))?, name))
    }

    fn probe_tokens(&self) -> usize {
        let weights: u64 = self.gguf.tensors().iter().map(TensorInfo::elements).sum();
        let most = MOST_PROBE_TOKENS[usize::from(weights > SMALL_MODEL)];
        let default = || (PROBE_WORK / weights.max(1)).clamp(512, most).next_multiple_of(SEQUENCE as u64) as usize;
        self.flags.probe_tokens.map_or_else(default, |n| n as usize)
    }

    fn provenance(&self, text: &ProbeText, text_name: String) -> Provenance {
        let mut hash = Sha256::new();
        text.tokens().iter().for_each(|token| hash.update(token.to_le_bytes()));
        Provenance {
            model: self.gguf.label().to_owned(),
            model_sha256: fingerprint(self.gguf),
            imatrix: self.imatrix.as_ref().map(|source| source.name.clone()),
            imatrix_sha256: self.imatrix.as_ref().map(|source| source.sha256.clone()),
            text: text_name,
            text_sha256: format!("{:x}", hash.finalize()),
            tokens: text.tokens().len() as u64,
            scored: text.n_scored() as u64,
            sequences: text.n_sequences() as u64,
            seed: Sampling::default().seed,
        }
    }

    /// The finished measurement if there is one of this model and imatrix; plans take it whatever its text was.
    ///
    /// # Errors
    /// When the file is damaged or belongs to another model or imatrix.
    pub fn finished(&self) -> Result<Option<Sensitivity>> {
        if !self.path.exists() {
            return Ok(None);
        }
        let found = Sensitivity::open(self.path)?;
        let path = printable(&self.path.display().to_string());
        let advice = "delete it, or name another file with --sensitivity";
        if found.provenance.model_sha256 != fingerprint(self.gguf) {
            bail!("{path}: was measured on another model ({}); {advice}", printable(&found.provenance.model));
        }
        let wanted = self.imatrix.as_ref().map(|source| &source.sha256);
        if found.provenance.imatrix_sha256.as_ref() != wanted {
            let other = found.provenance.imatrix.as_deref().unwrap_or("no importance matrix");
            bail!("{path}: was measured with {}; {advice}", printable(other));
        }
        Ok(Some(found))
    }

    /// Runs `work` with the model loaded and the original's distributions computed.
    fn with_model<T>(
        &self,
        common: &Common,
        work: impl FnOnce(&Ready<'_, '_, '_>, Provenance, f64) -> Result<T>,
    ) -> Result<T> {
        let label = self.label();
        let model = Model::open(self.gguf).with_context(|| label.clone())?;
        let tokenizer = open_tokenizer(self.gguf, &model, None, common)?;
        let (text, name) = self.text(&model, &tokenizer)?;
        let provenance = self.provenance(&text, name);
        let options = ForwardOptions { cancel: Some(os::cancel_on_interrupt()), ..ForwardOptions::default() };
        let started = Instant::now();
        let prober = Prober::new(&model, options, text).map_err(interrupted).with_context(|| label);
        let done = prober.and_then(|prober| {
            let seconds_per_pass = started.elapsed().as_secs_f64();
            let subjects = self.subjects();
            let measurement = Measurement { gguf: self.gguf, prober: &prober, subjects: &subjects };
            work(&Ready { measurement, common }, provenance, seconds_per_pass)
        });
        // What follows, such as quantizing after the plan, ends at once when it is interrupted.
        let stopped = os::end_on_interrupt();
        if stopped || done.as_ref().is_err_and(|error| error.is::<Interrupted>()) {
            common.warn("interrupted: the same command goes on with what was measured");
            return Err(Interrupted.into());
        }
        done
    }

    /// Measures, going on from a part that an earlier run left, and writes the file.
    ///
    /// # Errors
    /// When a tensor or the text is not usable, the part belongs to another run, or the run is interrupted.
    pub fn measure(&self, common: &Common) -> Result<Sensitivity> {
        self.with_model(common, |ready, provenance, seconds_per_pass| {
            let partial = partial_path(self.path);
            let mut state = match partial.exists().then(|| Sensitivity::open(&partial)).transpose()? {
                Some(state) if state.provenance == provenance => {
                    common.note(format!("going on with {}", printable(&partial.display().to_string())));
                    state
                }
                Some(_) => bail!(
                    "{}: is an unfinished measurement of another model, imatrix or text; delete it or add --force",
                    printable(&partial.display().to_string())
                ),
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
    pub fn measure_around(
        &self,
        state: &mut Sensitivity,
        types: &HashMap<String, TensorType>,
        common: &Common,
    ) -> Result<()> {
        self.with_model(common, |ready, provenance, seconds_per_pass| {
            if state.provenance != provenance {
                bail!(
                    "{}: was measured on another text; give that text with -f, or delete the file",
                    printable(&self.path.display().to_string())
                );
            }
            let joint = ready.around(types, seconds_per_pass)?;
            state.joint.push(joint);
            Ok(state.save(self.path, true)?)
        })
    }
}

/// An interrupt ends the program in its own way.
fn interrupted(error: ModelError) -> anyhow::Error {
    match error {
        ModelError::Interrupted => Interrupted.into(),
        other => other.into(),
    }
}

fn measured(error: MeasureError) -> anyhow::Error {
    match error {
        MeasureError::Model(error) => interrupted(error),
        other => anyhow!(other),
    }
}

fn minutes(seconds: f64) -> String {
    if seconds < 90.0 { format!("{seconds:.0} seconds") } else { format!("{:.0} minutes", (seconds / 60.0).ceil()) }
}

impl Ready<'_, '_, '_> {
    /// Tokens that stand for `cost` forward passes in the progress.
    fn tokens(&self, cost: f64) -> u64 {
        (cost * self.measurement.prober.text().tokens().len() as f64) as u64
    }

    fn run(&self, state: &mut Sensitivity, partial: &Path, seconds_per_pass: f64) -> Result<()> {
        let m = &self.measurement;
        let subjects = m.subjects;
        let weights: u64 = subjects.iter().map(|subject| subject.tensor.bytes.unwrap_or(0)).sum();
        let progress = Progress::new(self.common, "rounding samples", weights, Unit::Bytes);
        let save = |state: &Sensitivity| state.save(partial, true);
        measure_errors(m.gguf, subjects, Sampling::default(), state, &mut |state, tensor, _| {
            let subject = subjects.iter().find(|subject| subject.tensor.name == tensor);
            progress.advance(subject.and_then(|s| s.tensor.bytes).unwrap_or(0), tensor);
            if os::cancel_on_interrupt().load(std::sync::atomic::Ordering::SeqCst) {
                save(state)?;
                return Err(ModelError::Interrupted.into());
            }
            Ok(())
        })
        .map_err(measured)?;
        progress.finish();
        save(state)?;

        let levels = LEVELS.len().saturating_sub(state.joint.len());
        let cost = m.cost_of_probes(state) + levels as f64 * m.cost_of_joint(false);
        self.common.note(format!(
            "{} tensors to probe on {} tokens each, about {}",
            subjects.len(),
            count(m.prober.text().tokens().len() as u64),
            minutes(cost * seconds_per_pass)
        ));
        let progress = Progress::new(self.common, "probing", self.tokens(cost), Unit::Tokens);
        m.probe_all(state, &mut |state, tensor, cost| {
            progress.advance(self.tokens(cost), tensor);
            state.save(partial, true)
        })
        .map_err(measured)?;
        for level in LEVELS.iter().skip(state.joint.len()) {
            let types = subjects.iter().filter_map(|subject| {
                let ty = level.iter().find(|ty| subject.types.contains(ty))?;
                Some((subject.tensor.name.clone(), *ty))
            });
            let step = &mut |what: &str, cost| {
                progress.advance(self.tokens(cost), what);
                Ok(())
            };
            let joint = m.joint(&types.collect(), false, step).map_err(measured)?;
            state.joint.push(joint);
            save(state)?;
        }
        progress.finish();
        Ok(())
    }

    fn around(&self, types: &HashMap<String, TensorType>, seconds_per_pass: f64) -> Result<JointProbe> {
        let cost = self.measurement.cost_of_joint(true);
        self.common
            .note(format!("a second round around the first solution, about {}", minutes(cost * seconds_per_pass)));
        let progress = Progress::new(self.common, "second round", self.tokens(cost), Unit::Tokens);
        let step = &mut |what: &str, cost| {
            progress.advance(self.tokens(cost), what);
            Ok(())
        };
        let joint = self.measurement.joint(types, true, step).map_err(measured)?;
        progress.finish();
        Ok(joint)
    }
}
