//! How weights are rounded: flags that `quantize` and `plan` share.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use clap::{Args, ValueEnum};

use crate::cli::Usage;
use lwq::gguf::Gguf;
use lwq::moments::{Calibration, CalibrationOptions, Damping, GradientMoments};
use lwq::progress::Watch;
use lwq::quantize::Rounding;
use lwq::rounding::RoundingMethod;
use lwq::text::{Set, Text};

/// Methods as flags name them.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum RoundingArg {
    /// As ggml does, the same bytes as llama-quantize
    Ggml,
    /// Searches for the best scales of each block
    Search,
    /// Lets each column make up for the errors of those before it; runs the model over a calibration text
    Feedback,
}

impl From<RoundingArg> for RoundingMethod {
    fn from(rounding: RoundingArg) -> RoundingMethod {
        match rounding {
            RoundingArg::Ggml => RoundingMethod::Ggml,
            RoundingArg::Search => RoundingMethod::Search,
            RoundingArg::Feedback => RoundingMethod::Feedback,
        }
    }
}

/// Flags of rounding, without the calibration text.
#[derive(Args, Debug, Clone, Default)]
pub struct RoundingFlags {
    /// How weights are rounded [default: as the plan says; feedback with a calibration text; else ggml]
    #[arg(long, value_enum)]
    rounding: Option<RoundingArg>,
    /// Do not hold the finished file, as a whole, against one that is rounded by search, and keep search in the layers in
    /// which feedback does harm
    #[arg(long)]
    no_final_gate: bool,
    #[command(flatten)]
    calibration: CalibrationFlags,
}

/// Flags of a pass over a calibration text, without the text.
#[derive(Args, Debug, Clone, Default)]
pub struct CalibrationFlags {
    /// Part of the correlation between inputs that feedback does not rely on, from 0 to 1 [default: for each input what
    /// is best on a sixteenth of the text]
    #[arg(long, value_name = "PART", value_parser = parse_damping)]
    damping: Option<f64>,
    /// Use at most this many tokens of the calibration text, spread over it [default: 65536]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(64..=1 << 26))]
    calibration_tokens: Option<u32>,
    /// Tokens of a sequence of the calibration text [default: 512, or the model's context if that is shorter]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(8..=1 << 20))]
    calibration_ctx: Option<u32>,
    /// Text that judges whether feedback is kept, other than the calibration text; repeatable [default: a built-in text]
    #[arg(long, value_name = "TEXT")]
    gate_file: Vec<PathBuf>,
    /// Run the model and add up its second moments with bfloat16 products where the processor has them: faster, but the
    /// bytes depend on the processor
    #[arg(long)]
    fast: bool,
    /// Mixtures of experts: send every token of the calibration text through all experts, those that it did not choose
    /// without weight in the output, so that each has data
    #[arg(long)]
    all_experts: bool,
    /// Memory for the second moments of a layer, such as 1G; a layer that needs more is run several times [default: 1.7G]
    #[arg(long, value_name = "SIZE", value_parser = lwq::gguf::split::parse_size)]
    moment_memory: Option<u64>,
}

/// What feedback rounds to.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum TargetsArg {
    /// The model's own weights, by its own inputs
    Model,
    /// Weights that make up for the errors of the matrices before, by the inputs that these give: better, and several
    /// times the time
    Corrected,
}

/// The flag that chooses the targets of feedback.
#[derive(Args, Debug, Clone, Default)]
pub struct TargetsFlag {
    /// What feedback rounds to [default: model]
    #[arg(long, value_enum)]
    targets: Option<TargetsArg>,
}

/// Flags that say what feedback aims at.
#[derive(Args, Debug, Clone, Default)]
pub struct AimFlags {
    #[command(flatten)]
    targets: TargetsFlag,
    /// Second moments of the loss's gradients, from `lwq measure --gradients`: rows of the matrices in it make up for each
    /// other's errors, too
    #[arg(long, value_name = "FILE")]
    gradients: Option<PathBuf>,
}

impl TargetsFlag {
    /// True if it is on the command line.
    pub fn is_given(&self) -> bool {
        self.targets.is_some()
    }

    /// True if targets make up for errors.
    pub fn corrected(&self) -> bool {
        self.targets == Some(TargetsArg::Corrected)
    }

    /// Refuses the flag unless weights are rounded with feedback.
    ///
    /// # Errors
    /// When it is given in vain.
    pub fn check(&self, has_feedback: bool) -> Result<()> {
        goes_with_feedback(self.is_given(), "--targets", has_feedback)
    }
}

impl AimFlags {
    /// Refuses the flags unless weights are rounded with feedback.
    ///
    /// # Errors
    /// When one is given in vain.
    pub fn check(&self, has_feedback: bool) -> Result<()> {
        self.targets.check(has_feedback)?;
        goes_with_feedback(self.gradients.is_some(), "--gradients", has_feedback)
    }

    /// Adds what they say, with the file opened.
    ///
    /// # Errors
    /// When it is no file of gradients.
    pub fn apply(&self, options: CalibrationOptions) -> Result<CalibrationOptions> {
        let gradients = self.gradients.as_deref().map(GradientMoments::open).transpose()?.map(Arc::new);
        Ok(CalibrationOptions { corrected: self.targets.corrected(), gradients, ..options })
    }
}

fn goes_with_feedback(is_given: bool, flag: &str, has_feedback: bool) -> Result<()> {
    if is_given && !has_feedback {
        let problem = format!("{flag} goes with --rounding feedback; add that, or leave {flag} out");
        return Err(Usage(problem).into());
    }
    Ok(())
}

fn parse_damping(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(damping) if (0.0..=1.0).contains(&damping) => Ok(damping),
        _ => Err("give a number from 0 to 1, such as 0.02".to_owned()),
    }
}

impl RoundingFlags {
    /// True if --rounding is on the command line.
    pub fn is_given(&self) -> bool {
        self.rounding.is_some()
    }

    /// The method: as asked for, as the plan has it, or by whether there is a calibration text.
    ///
    /// # Errors
    /// When flags are given that the method does not use.
    pub fn method(&self, has_text: bool, planned: Option<RoundingMethod>) -> Result<RoundingMethod> {
        let implied = if has_text { Some(RoundingMethod::Feedback) } else { planned };
        let method = self.rounding.map(RoundingMethod::from).or(implied).unwrap_or_default();
        let gate = self.no_final_gate.then_some("--no-final-gate");
        match self.calibration.given(has_text).or(gate).filter(|_| method != RoundingMethod::Feedback) {
            Some(flag) => {
                Err(Usage(format!("{flag} is used by --rounding feedback alone; the rounding is {method}")).into())
            }
            None => Ok(method),
        }
    }

    /// The texts and settings of feedback, if that is the method; `files` are the calibration text, the built-in one if there
    /// are none, `aim` says what is rounded to.
    ///
    /// # Errors
    /// When the model cannot be run, or a text cannot be read or is too short.
    pub fn calibration<'g>(
        &self,
        method: RoundingMethod,
        files: &[PathBuf],
        aim: &AimFlags,
        gguf: &'g Gguf,
        watch: &dyn Watch,
    ) -> Result<Option<Calibration<'g>>> {
        if method != RoundingMethod::Feedback {
            return Ok(None);
        }
        let final_gate = !self.no_final_gate;
        let options = CalibrationOptions { final_gate, ..aim.apply(self.calibration.options(files, watch)?)? };
        Ok(Some(Calibration::new(gguf, &options, watch)?))
    }
}

impl CalibrationFlags {
    /// The first flag of a pass that is given, if any; `has_text` says that a text is.
    pub fn given(&self, has_text: bool) -> Option<&'static str> {
        let flags = [
            (has_text, "a calibration text"),
            (self.damping.is_some(), "--damping"),
            (self.calibration_tokens.is_some(), "--calibration-tokens"),
            (self.calibration_ctx.is_some(), "--calibration-ctx"),
            (!self.gate_file.is_empty(), "--gate-file"),
            (self.fast, "--fast"),
            (self.all_experts, "--all-experts"),
            (self.moment_memory.is_some(), "--moment-memory"),
        ];
        flags.iter().find(|(given, _)| *given).map(|(_, flag)| *flag)
    }

    /// Texts and settings; `files` are the calibration text, the built-in one if there are none.
    ///
    /// # Errors
    /// When a text cannot be read.
    pub fn options(&self, files: &[PathBuf], watch: &dyn Watch) -> Result<CalibrationOptions> {
        let defaults = CalibrationOptions::default();
        Ok(CalibrationOptions {
            text: Text::read_or(files, Set::Calibration, watch)?,
            gate: Text::read_or(&self.gate_file, Set::Gate, watch)?,
            tokens: self.calibration_tokens.map_or(defaults.tokens, |n| n as usize),
            ctx: self.calibration_ctx.map(|n| n as usize),
            damping: self.damping.map_or(Damping::Chosen, Damping::Given),
            fast: self.fast,
            all_experts: self.all_experts,
            moment_memory: self.moment_memory.unwrap_or(defaults.moment_memory),
            ..defaults
        })
    }
}

/// The method with what it needs.
pub fn rounding<'a>(method: RoundingMethod, calibration: Option<&'a Calibration<'a>>) -> Rounding<'a> {
    match (method, calibration) {
        (RoundingMethod::Feedback, Some(calibration)) => Rounding::Feedback(calibration),
        (RoundingMethod::Search, _) => Rounding::Search,
        _ => Rounding::Ggml,
    }
}
