//! How weights are rounded: flags that `quantize` and `plan` share, and the text that feedback needs.

use std::path::PathBuf;

use anyhow::{Result, anyhow};
use clap::{Args, ValueEnum};

use super::eval::loaded::{bos, calibration_context, file_names, open_tokenizer, read_text};
use super::{Common, Usage, printable};
use lwq::text;
use lwq::compute::Precision;
use lwq::gguf::Gguf;
use lwq::model::{ForwardOptions, Model};
use lwq::os;
use lwq::rounding::{
    CalibrationRecord, DEFAULT_MOMENT_MEMORY, Damping, Method, RoundingRecord, StreamSettings, Text,
};

/// What files rounded with the built-in text name as their text.
const BUILT_IN_TEXT: &str = "lwq built-in calibration mix";

/// What messages call the built-in text of the gate.
const BUILT_IN_GATE: &str = "lwq built-in tuning text";

/// Tokens of the calibration text that are used unless another number is asked for: about eight for each column of the
/// widest common matrices.
const DEFAULT_TOKENS: u32 = 65_536;

/// Tokens that judge the result.
const GATE_TOKENS: usize = 4096;

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

impl From<RoundingArg> for Method {
    fn from(rounding: RoundingArg) -> Method {
        match rounding {
            RoundingArg::Ggml => Method::Ggml,
            RoundingArg::Search => Method::Search,
            RoundingArg::Feedback => Method::Feedback,
        }
    }
}

/// Flags of rounding, without the calibration text.
#[derive(Args, Debug, Clone, Default)]
pub struct RoundingFlags {
    /// How weights are rounded [default: as the plan says; feedback with a calibration text; else ggml]
    #[arg(long, value_enum)]
    rounding: Option<RoundingArg>,
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
    /// Memory for the second moments of a layer, such as 1G; a layer that needs more is run several times [default: 1.7G]
    #[arg(long, value_name = "SIZE", value_parser = lwq::gguf::split::parse_size)]
    moment_memory: Option<u64>,
}

fn parse_damping(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(damping) if (0.0..=1.0).contains(&damping) => Ok(damping),
        _ => Err("give a number from 0 to 1, such as 0.02".to_owned()),
    }
}

/// All that feedback needs beside the model.
pub(super) struct Calibration {
    pub text: Text,
    pub gate: Text,
    settings: StreamSettings,
    /// Values of a hidden state.
    n_embd: usize,
    fast: bool,
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
    pub fn method(&self, has_text: bool, planned: Option<Method>) -> Result<Method> {
        let implied = if has_text { Some(Method::Feedback) } else { planned };
        let method = self.rounding.map(Method::from).or(implied).unwrap_or_default();
        let of_feedback = [
            (has_text, "a calibration text"),
            (self.damping.is_some(), "--damping"),
            (self.calibration_tokens.is_some(), "--calibration-tokens"),
            (self.calibration_ctx.is_some(), "--calibration-ctx"),
            (!self.gate_file.is_empty(), "--gate-file"),
            (self.fast, "--fast"),
            (self.moment_memory.is_some(), "--moment-memory"),
        ];
        match of_feedback.iter().find(|(given, _)| *given && method != Method::Feedback) {
            Some((_, flag)) => {
                Err(Usage(format!("{flag} is used by --rounding feedback alone; the rounding is {method}")).into())
            }
            None => Ok(method),
        }
    }

    /// Cuts the texts into tokens; `files` are the calibration text, the built-in one if there are none.
    ///
    /// # Errors
    /// When a text cannot be read or is too short.
    pub fn calibration(
        &self,
        files: &[PathBuf],
        gguf: &Gguf,
        model: &Model<'_>,
        common: &Common,
    ) -> Result<Calibration> {
        let tokenizer = open_tokenizer(gguf, model, None, common)?;
        let n_ctx = calibration_context(self.calibration_ctx, model, "sequences", common);
        let text = |files: &[PathBuf], built_in: (&str, &str), most: usize| -> Result<Text> {
            let (name, bytes) = match files {
                [] => (built_in.0.to_owned(), built_in.1.as_bytes().to_vec()),
                files => (file_names(files), read_text(files)?),
            };
            let tokens = tokenizer.encode(&bytes, true, false);
            Ok(Text::new(&printable(&name), &tokens, most, n_ctx, bos(&tokenizer))?)
        };
        let tokens = self.calibration_tokens.unwrap_or(DEFAULT_TOKENS) as usize;
        let calibration = text(files, (BUILT_IN_TEXT, calibration::DEFAULT_MIX), tokens)?;
        let gate = text(&self.gate_file, (BUILT_IN_GATE, calibration::TUNE_MIX), GATE_TOKENS)?;
        if calibration.sha256() == gate.sha256() {
            common.warn(format!(
                "{}: judges the rounding that was made with it; give --gate-file another text",
                gate.name()
            ));
        }
        let precision = if self.fast { Precision::Fast } else { Precision::Accurate };
        let forward = ForwardOptions { precision, ..ForwardOptions::default() };
        let settings = StreamSettings {
            damping: self.damping.map_or(Damping::Chosen, Damping::Given),
            moment_memory: self.moment_memory.unwrap_or(DEFAULT_MOMENT_MEMORY),
            forward,
        };
        Ok(Calibration { text: calibration, gate, settings, n_embd: model.hparams().n_embd, fast: self.fast })
    }
}

impl Calibration {
    /// The settings of a run that begins now and that an interrupt ends.
    pub fn interruptible(&self) -> StreamSettings {
        let mut settings = self.settings.clone();
        settings.forward.cancel = Some(os::cancel_on_interrupt());
        settings
    }

    /// Bytes of the hidden states of all tokens.
    pub fn states_bytes(&self) -> u64 {
        4 * (self.text.len() + self.gate.len()) as u64 * self.n_embd as u64
    }

    /// What a file made with it records.
    pub fn record(&self) -> RoundingRecord {
        RoundingRecord {
            method: Method::Feedback,
            calibration: Some(CalibrationRecord {
                text: self.text.name().to_owned(),
                text_sha256: self.text.sha256(),
                tokens: self.text.len() as u64,
                damping: match self.settings.damping {
                    Damping::Given(damping) => Some(damping as f32),
                    Damping::Chosen => None,
                },
            }),
        }
    }

    /// Everything beside model and texts that the result depends on.
    pub fn words(&self) -> String {
        let damping = match self.settings.damping {
            Damping::Given(damping) => damping.to_string(),
            Damping::Chosen => "chosen".to_owned(),
        };
        let mut words = format!("damping {damping}, moment memory {}", self.settings.moment_memory);
        if self.fast {
            words.push_str(&format!(", fast on {}", lwq::cpu::level().name()));
        }
        words
    }
}

/// Opens a model that feedback is to run.
///
/// # Errors
/// When the forward pass cannot run it; the message names the way without.
pub(super) fn open_model(gguf: &Gguf) -> Result<Model<'_>> {
    Model::open(gguf).map_err(|error| {
        let label = printable(gguf.label());
        anyhow!("{label}: {error}; --rounding feedback runs the model, use --rounding search")
    })
}
