//! How long steps will take: work that is known before it is done, over speeds that this machine is thought to have.
//!
//! Speeds are shares of the machine's own peak of 32-bit multiply-adds, found on an AVX-512 machine with two cores; a run
//! corrects them with what it sees.

use super::progress::{Kind, Stage};
use crate::compute::peak::Peak;
use crate::cpu;
use crate::gguf::Gguf;
use crate::moments::{Calibration, Input, MomentsError, Visitor};
use crate::progress::Stop;
use crate::recipe::roles;

/// Seconds that the peak is measured for.
const TRIAL: f64 = 0.02;

/// Flop of a multiplication and an addition.
const FLOP: f64 = 2.0;

/// Share of the peak that a forward pass reaches, with its attention, norms and logits: for the importance matrix, in bfloat16
/// where the processor has it.
const IMPORTANCE: f64 = 0.45;
/// Of probes, whose groups are small.
const PROBES: f64 = 0.35;
/// Of several models side by side, whose weights are decoded.
const EVALUATION: f64 = 0.35;
/// Of rounding with feedback, whose work is counted as flop.
const FEEDBACK: f64 = 0.5;

/// Flop in the time that encoding a weight takes, with an imatrix: from 500 for K types to 20,000 for IQ types.
const ENCODING: f64 = 4000.0;

/// The same for a weight that is rounded to one of the types of a measurement.
const SAMPLING: f64 = 6000.0;

/// Weights of a tensor that a measurement rounds, and types that it tries.
const SAMPLED: u64 = 1 << 19;
const TYPES: f64 = 14.0;

/// Probes of a tensor, of half a pass and the logits each.
const PROBES_A_TENSOR: f64 = 2.0;
const PASSES_A_PROBE: f64 = 0.65;

/// Bytes a second that are read, converted or hashed by a thread.
const COPYING: f64 = 4e8;

/// Types that a tensor gets among planned files of different sizes, at most.
const DISTINCT: usize = 6;

/// What the estimates need to know of a model and a machine.
pub(super) struct Costs {
    /// Flop a second of all threads.
    peak: f64,
    threads: f64,
    /// Weights that a token meets.
    weights: f64,
    /// All weights of matrices.
    all_weights: f64,
    /// Matrices.
    matrices: Vec<u64>,
}

impl Costs {
    /// Looks at a model, and for a moment at the machine.
    pub(super) fn new(gguf: &Gguf) -> Costs {
        let threads = rayon::current_num_threads() as f64;
        let level = cpu::level();
        let mut fits = Peak::all().iter().filter(|peak| !peak.bf16 && peak.level <= level && peak.level.is_available());
        let per_thread = fits.next_back().map_or(1e9, |peak| {
            let rounds = peak.rounds_for(TRIAL);
            let started = std::time::Instant::now();
            peak.run(rounds) as f64 / started.elapsed().as_secs_f64().max(1e-9)
        });
        let architecture = gguf.metadata().str("general.architecture").ok().flatten().unwrap_or_default();
        let count = |suffix: &str| gguf.metadata().u64(&format!("{architecture}.{suffix}")).ok().flatten();
        let share = match (count("expert_count"), count("expert_used_count")) {
            (Some(all), Some(used)) if all > 0 => used.min(all) as f64 / all as f64,
            _ => 1.0,
        };
        let matrices = || gguf.tensors().iter().filter(|tensor| tensor.rows() > 1);
        let tied = gguf.tensor(roles::OUTPUT_WEIGHT).is_none();
        let met = |name: &str, matrices: u64, weights: u64| match () {
            () if roles::split_block(name).is_some() && matrices > 1 => share * weights as f64,
            () if roles::split_block(name).is_some() || name == roles::OUTPUT_WEIGHT => weights as f64,
            () if tied && name == roles::TOKEN_EMBD_WEIGHT => weights as f64,
            () => 0.0,
        };
        Costs {
            peak: per_thread * threads,
            threads,
            weights: matrices().map(|tensor| met(&tensor.name, tensor.matrices(), tensor.elements())).sum(),
            all_weights: matrices().map(|tensor| tensor.elements() as f64).sum(),
            matrices: matrices().map(|tensor| tensor.elements()).collect(),
        }
    }

    fn pass(&self, tokens: f64, share: f64) -> f64 {
        FLOP * self.weights * tokens / (share * self.peak)
    }

    /// Bytes that are read or written once.
    pub(super) fn copying(&self, name: &'static str, bytes: u64) -> Stage {
        Stage { name, kind: Kind::Copy, seconds: bytes as f64 / (COPYING * self.threads) }
    }

    /// The importance matrix.
    pub(super) fn importance(&self, tokens: usize) -> Stage {
        Stage { name: "collecting", kind: Kind::Importance, seconds: self.pass(tokens as f64, IMPORTANCE) }
    }

    /// A measurement whose probes run so many tokens each; `probes` where not all tensors are probed.
    pub(super) fn measurement(&self, tokens: usize, probes: Option<usize>) -> [Stage; 2] {
        let sampled: f64 = self.matrices.iter().map(|weights| (*weights).min(SAMPLED) as f64).sum();
        let passes = match probes {
            Some(probes) => 1.0 + PASSES_A_PROBE * probes as f64,
            None => 5.0 + PROBES_A_TENSOR * PASSES_A_PROBE * self.matrices.len() as f64,
        };
        [
            Stage { name: "rounding samples", kind: Kind::Encode, seconds: sampled * TYPES * SAMPLING / self.peak },
            Stage { name: "probing", kind: Kind::Probe, seconds: passes * self.pass(tokens as f64, PROBES) },
        ]
    }

    /// What feedback leaves, measured on samples.
    pub(super) fn feedback_measurement(&self, calibration: &Calibration<'_>) -> Stage {
        let seconds = self.flop_of(calibration, Roundings::OfSamples) / (FEEDBACK * self.peak);
        Stage { name: "rounding samples with feedback", kind: Kind::Feedback, seconds }
    }

    /// Planned files rounded with feedback in one pass.
    pub(super) fn rounding(&self, calibration: &Calibration<'_>, files: usize) -> Stage {
        let seconds = self.flop_of(calibration, Roundings::Whole(files.min(DISTINCT))) / (FEEDBACK * self.peak);
        Stage { name: "rounding", kind: Kind::Feedback, seconds }
    }

    /// A file that is rounded without a pass.
    pub(super) fn encoding(&self) -> Stage {
        Stage { name: "quantizing", kind: Kind::Encode, seconds: self.all_weights * ENCODING / self.peak }
    }

    /// So many models, the base among them, over a text.
    pub(super) fn evaluation(&self, name: &'static str, models: usize, tokens: usize) -> Stage {
        Stage { name, kind: Kind::Evaluate, seconds: self.pass((models * tokens) as f64, EVALUATION) }
    }

    /// Flop that a pass counts.
    fn flop_of(&self, calibration: &Calibration<'_>, roundings: Roundings) -> f64 {
        let stream = calibration.stream(std::path::Path::new(""), Stop::never());
        stream.map_or(0.0, |stream| 1e6 * stream.total_work(0, &Counted(roundings, calibration)) as f64)
    }
}

/// How often a matrix is rounded.
#[derive(Clone, Copy)]
enum Roundings {
    /// As a whole, so many times.
    Whole(usize),
    /// Samples of its rows, to every type.
    OfSamples,
}

/// Rows that are rounded to every type, and how many types these are with feedback.
const SAMPLED_ROWS: f64 = 64.0;
const FEEDBACK_TYPES: f64 = 16.0;

/// Stands for roundings of every matrix that has an input.
struct Counted<'a, 'g>(Roundings, &'a Calibration<'g>);

impl Visitor for Counted<'_, '_> {
    type Error = MomentsError;

    fn roundings(&self, tensor: &str, _step: usize) -> usize {
        let model = self.1.model();
        let rows = model.gguf().tensor(tensor).map_or(0, |tensor| tensor.rows());
        match self.0 {
            _ if !crate::moments::has_input(tensor, model.output_tensor()) => 0,
            Roundings::Whole(times) => times,
            Roundings::OfSamples => (SAMPLED_ROWS * FEEDBACK_TYPES / rows.max(1) as f64).ceil() as usize,
        }
    }

    fn input(&mut self, _input: Input) -> Result<(), MomentsError> {
        Ok(())
    }

    fn done(&mut self, _step: usize) -> Result<(), MomentsError> {
        Ok(())
    }
}
