//! The model and the texts of a pass, opened once for all that share it.

use std::sync::Arc;

use super::{DEFAULT_MOMENT_MEMORY, Damping, GradientMoments, MomentsError, Stream, StreamSettings};
use crate::compute::{Kernel, Precision};
use crate::display::printable;
use crate::gguf::Gguf;
use crate::model::Model;
use crate::progress::{Stop, Watch};
use crate::rounding::{CalibrationRecord, RoundingMethod, RoundingRecord};
use crate::text::{Sequences, Set, Text, calibration_context, leading_bos, open_tokenizer};

/// Tokens of the calibration text that are used unless another number is asked for: about eight for each column of the
/// widest common matrices.
pub const DEFAULT_TOKENS: usize = 65_536;

/// Tokens that judge the result.
const GATE_TOKENS: usize = 4096;

/// The order of the inputs in a factor, in which columns answer for those before them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FactorOrder {
    /// Their own.
    #[default]
    Stored,
    /// By descending mean square, see [`Factor::descending`](crate::rounding::gptq::Factor): for grids whose scales are fixed
    /// beforehand.
    Descending,
    /// Both, as two factors.
    Both,
}

/// What feedback goes by.
#[derive(Clone, Debug)]
pub struct CalibrationOptions {
    /// The text that rounding goes by.
    pub text: Text,
    /// The text that judges it, of other documents.
    pub gate: Text,
    /// Most tokens of the calibration text that are used, spread over it.
    pub tokens: usize,
    /// Tokens of a sequence; `None` is 512, or the model's context if that is shorter.
    pub ctx: Option<usize>,
    /// How much of the correlations is not relied on.
    pub damping: Damping,
    /// Runs the model and adds up its second moments with bfloat16 products where the processor has them: faster, but the
    /// bytes depend on the processor.
    pub fast: bool,
    /// Sends every token of the calibration text through all experts of a layer, those that it did not choose without weight
    /// in the output, so that each has data.
    pub all_experts: bool,
    /// Most bytes for the moments of one text; layers that need more are run more than once.
    pub moment_memory: u64,
    /// Shows second moments of all tokens as they are instead of factors: what GPTQ is given elsewhere, for comparison.
    pub raw: bool,
    /// The order of inputs in factors.
    pub order: FactorOrder,
    /// So many inputs at most are shown as they are, beside their moments; see [`InputMatrix`](super::InputMatrix).
    pub sampled: usize,
    /// Inputs are those of the model with all rounded that comes before, and shown with a correction of the weights for
    /// that: see [`CorrectedMoment`](crate::rounding::gptq::CorrectedMoment). One rounding a pass.
    pub corrected: bool,
    /// Second moments of the loss's gradients at matrices' outputs: the rows of those matrices answer for each other.
    pub gradients: Option<Arc<GradientMoments>>,
    /// Holds the finished file, as a whole, against the same types rounded by search on the text of the gate.
    pub final_gate: bool,
}

impl Default for CalibrationOptions {
    fn default() -> CalibrationOptions {
        CalibrationOptions {
            text: Text::built_in(Set::Calibration),
            gate: Text::built_in(Set::Gate),
            tokens: DEFAULT_TOKENS,
            ctx: None,
            damping: Damping::Chosen,
            fast: false,
            all_experts: false,
            moment_memory: DEFAULT_MOMENT_MEMORY,
            raw: false,
            order: FactorOrder::Stored,
            sampled: 0,
            corrected: false,
            gradients: None,
            final_gate: true,
        }
    }
}

/// All that rounding with feedback needs beside the weights: the model ready to run, its texts cut into sequences, and
/// settings. Any number of files can share one.
pub struct Calibration<'g> {
    model: Model<'g>,
    text: Sequences,
    gate: Sequences,
    settings: StreamSettings,
    gradients: Option<Arc<GradientMoments>>,
    final_gate: bool,
}

impl<'g> Calibration<'g> {
    /// Opens the model and cuts the texts.
    ///
    /// # Errors
    /// When the forward pass cannot run the model, a text is too short, or gradients are those of another model.
    pub fn new(
        model: &'g Gguf,
        options: &CalibrationOptions,
        watch: &dyn Watch,
    ) -> Result<Calibration<'g>, MomentsError> {
        if let Some(gradients) = &options.gradients {
            gradients.check_model(model)?;
        }
        let model = Model::open(model)
            .map_err(|source| MomentsError::CannotRun { file: printable(model.label()), source: Box::new(source) })?;
        model.warn(watch);
        let tokenizer = open_tokenizer(&model, None, watch)?;
        let n_ctx = calibration_context(options.ctx, &model, "sequences", watch);
        let cut = |text: &Text, most: usize| {
            let tokens = tokenizer.encode(text.joined(), true, false);
            Sequences::new(&printable(&text.name()), &tokens, most, n_ctx, leading_bos(&tokenizer))
        };
        let text = cut(&options.text, options.tokens)?;
        let gate = cut(&options.gate, GATE_TOKENS)?;
        if text.sha256() == gate.sha256() {
            watch.warn(&format!(
                "{}: judges the rounding that was made with it; give --gate-file another text",
                gate.name()
            ));
        }
        let settings = StreamSettings {
            damping: options.damping,
            moment_memory: options.moment_memory,
            precision: if options.fast { Precision::Fast } else { Precision::Accurate },
            all_experts: options.all_experts,
            raw: options.raw,
            order: options.order,
            sampled: options.sampled,
            corrected: options.corrected,
        };
        // Only what predicts can be judged by its predictions.
        let final_gate = options.final_gate && model.is_causal();
        Ok(Calibration { model, text, gate, settings, gradients: options.gradients.clone(), final_gate })
    }

    /// The unquantized model.
    pub fn model(&self) -> &Model<'g> {
        &self.model
    }

    /// The text that rounding goes by.
    pub fn text(&self) -> &Sequences {
        &self.text
    }

    /// True if inputs come from the model with all rounded that comes before.
    pub fn is_corrected(&self) -> bool {
        self.settings.corrected
    }

    /// True if finished files are judged as a whole.
    pub fn has_final_gate(&self) -> bool {
        self.final_gate
    }

    /// Moments of gradients that tie rows together, if there are any.
    pub fn gradients(&self) -> Option<&GradientMoments> {
        self.gradients.as_deref()
    }

    /// The text that judges it.
    pub fn gate(&self) -> &Sequences {
        &self.gate
    }

    /// A pass over both texts that keeps hidden states in `folder`, which must be there, and ends when `stop` asks for it.
    ///
    /// # Errors
    /// Never in practice: nothing of the model is replaced.
    pub fn stream<'a>(&'a self, folder: &'a std::path::Path, stop: Stop) -> Result<Stream<'a, 'a, 'g>, MomentsError> {
        Stream::new(&self.model, &self.text, &self.gate, folder, self.settings.clone(), stop)
    }

    /// Bytes of the hidden states of all tokens.
    pub(crate) fn states_bytes(&self) -> u64 {
        let kept = self.model.kept_widths(self.model.n_layer());
        let row_len = self.model.hparams().n_embd + kept.iter().map(|kept| kept.keys + kept.values).sum::<usize>();
        4 * (self.text.len() + self.gate.len()) as u64 * row_len as u64
    }

    /// What a file made with it records.
    pub fn record(&self) -> RoundingRecord {
        RoundingRecord {
            method: RoundingMethod::Feedback,
            calibration: Some(CalibrationRecord {
                text: self.text.name().to_owned(),
                text_sha256: self.text.sha256(),
                tokens: self.text.len() as u64,
                damping: match self.settings.damping {
                    Damping::Given(damping) => Some(damping as f32),
                    Damping::Chosen => None,
                },
                gradients_sha256: self.gradients().map(GradientMoments::digest),
            }),
            final_gate: self.final_gate,
        }
    }

    /// Everything beside model and texts that the result depends on.
    pub(crate) fn words(&self) -> String {
        let damping = match self.settings.damping {
            Damping::Given(damping) => damping.to_string(),
            Damping::Chosen => "chosen".to_owned(),
        };
        let mut words = format!("damping {damping}, moment memory {}", self.settings.moment_memory);
        if self.settings.all_experts {
            words.push_str(", all experts");
        }
        if self.settings.raw {
            words.push_str(", raw moments");
        }
        if self.settings.order != FactorOrder::Stored {
            words.push_str(", descending");
        }
        if self.settings.corrected {
            words.push_str(", corrected");
        }
        if let Some(gradients) = self.gradients() {
            words.push_str(&format!(", gradients {}", gradients.digest()));
        }
        if self.final_gate {
            words.push_str(", gate of the whole file");
        }
        if self.settings.precision == Precision::Fast {
            words.push_str(&format!(", fast on {}", Kernel::best(Precision::Fast).name));
        }
        words
    }
}
