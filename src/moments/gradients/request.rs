//! The request: a model and a text in, a file of moments out.

use std::collections::BTreeMap;
use std::path::Path;

use super::checkpoint::Checkpoint;
use super::{DEFAULT_GRADIENT_TOKENS, DEFAULT_STATES_MEMORY, GradientSettings, gradient_moments};
use crate::atomic_file::{Replace, check_target};
use crate::display::printable;
use crate::gguf::{Gguf, fingerprint};
use crate::model::Model;
use crate::moments::{GradientProvenance, GradientsWriter, MomentsError};
use crate::progress::Watch;
use crate::text::{Sequences, Set, Text, calibration_context, leading_bos, open_tokenizer};

/// A request to measure the second moments of a model's gradients.
///
/// ```
/// use lwq::atomic_file::Replace;
/// use lwq::gguf::Gguf;
/// use lwq::moments::{GradientMoments, GradientRequest};
///
/// let model = Gguf::open("tests/data/doclet-4m-f16.gguf")?;
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("doclet.gradients.gguf");
/// let report = GradientRequest::new(&model).tokens(1024).ctx(64).run(&path, Replace::No, &())?;
/// assert_eq!(GradientMoments::open(&path)?.outputs().len(), report.matrices);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct GradientRequest<'a> {
    model: &'a Gguf,
    text: Text,
    tokens: usize,
    ctx: Option<usize>,
    seed: u64,
}

/// What a [`GradientRequest`] has done.
#[derive(Clone, Copy, Debug)]
pub struct GradientReport {
    /// Matrices that have a moment.
    pub matrices: usize,
    /// Tokens, one gradient of each matrix for each.
    pub tokens: usize,
    /// Mean cross entropy with the drawn labels, nats per token: about the entropy of what the model says.
    pub loss: f64,
}

impl<'a> GradientRequest<'a> {
    /// Measures `model` on the built-in calibration text.
    pub fn new(model: &'a Gguf) -> GradientRequest<'a> {
        let text = Text::built_in(Set::Calibration);
        GradientRequest { model, text, tokens: DEFAULT_GRADIENT_TOKENS, ctx: None, seed: 0 }
    }

    /// Measures on another text.
    pub fn text(mut self, text: Text) -> GradientRequest<'a> {
        self.text = text;
        self
    }

    /// Uses at most so many tokens of the text, spread over it.
    pub fn tokens(mut self, tokens: usize) -> GradientRequest<'a> {
        self.tokens = tokens;
        self
    }

    /// Cuts the text into sequences of so many tokens; otherwise 512, or the model's context if that is shorter.
    pub fn ctx(mut self, ctx: usize) -> GradientRequest<'a> {
        self.ctx = Some(ctx);
        self
    }

    /// Draws labels from another seed than 0.
    pub fn seed(mut self, seed: u64) -> GradientRequest<'a> {
        self.seed = seed;
        self
    }

    /// Measures and writes `output`. Hidden states that do not fit into memory lie beside it meanwhile. A run that is stopped
    /// leaves its finished layers, and the next one goes on behind them.
    ///
    /// # Errors
    /// When the model cannot be run or does not predict the next token, the text is too short, `output` cannot be written, or
    /// `watch` stops the run.
    pub fn run(self, output: &Path, replace: Replace, watch: &dyn Watch) -> Result<GradientReport, MomentsError> {
        check_target(output, replace.is_allowed())?;
        let model = Model::open(self.model)?;
        model.warn(watch);
        let tokenizer = open_tokenizer(&model, None, watch)?;
        let n_ctx = calibration_context(self.ctx, &model, "sequences", watch);
        let tokens = tokenizer.encode(self.text.joined(), true, false);
        let name = printable(&self.text.name());
        let text = Sequences::new(&name, &tokens, self.tokens, n_ctx, leading_bos(&tokenizer))?;
        let names = |found: Vec<&str>| found.into_iter().map(str::to_owned).collect();
        let settings = GradientSettings {
            seed: self.seed,
            tensors: names(model.gradient_matrices()),
            squares: names(model.further_gradient_matrices()),
            states_memory: DEFAULT_STATES_MEMORY,
        };
        let provenance = GradientProvenance {
            model: printable(self.model.label()),
            model_sha256: fingerprint(self.model),
            text: text.name().to_owned(),
            text_sha256: text.sha256(),
            tokens: text.len() as u64,
            seed: self.seed,
        };
        let rows = |name: &String| self.model.tensor(name).map_or(0, |tensor| tensor.rows_per_matrix() as usize);
        let outputs = |names: &[String]| -> BTreeMap<String, usize> {
            names.iter().map(|name| (name.clone(), rows(name))).collect()
        };
        let (outputs, squares) = (outputs(&settings.tensors), outputs(&settings.squares));
        let mut checkpoint = Checkpoint::open(output, &model, &provenance, replace.is_allowed())?;
        let folder = checkpoint.path().to_path_buf();
        let loss = gradient_moments(&model, &text, &settings, &folder, watch, &mut checkpoint)?;
        checkpoint.write(GradientsWriter::create(output, replace.is_allowed(), &provenance, &outputs, &squares)?)?;
        checkpoint.remove()?;
        Ok(GradientReport { matrices: outputs.len(), tokens: text.len(), loss })
    }
}
