//! Models opened for evaluation, and the windows of a text in their vocabulary.

use super::{EvalError, Windows, texts_in_turn};
use crate::display::printable;
use crate::gguf::{Gguf, Metadata};
use crate::model::{Activations, ForwardOptions, Model, Overrides, Pass};
use crate::progress::{Stop, Watch};
use crate::text::{DEFAULT_CONTEXT, Text, leading_bos, open_tokenizer};
use crate::tokenizer::Tokenizer;

/// How a text is cut into windows, which predictions are scored, and how models run over it.
#[derive(Clone, Debug, Default)]
pub struct TextOptions {
    /// Tokens of a window; 512 when `None`, or the model's context if that is shorter.
    pub n_ctx: Option<usize>,
    /// Most windows to score; several texts take turns.
    pub chunks: Option<usize>,
    /// Position of a window from which on its predictions are scored; half the window when `None`.
    pub score_from: Option<usize>,
    /// Rounding of the inputs of products.
    pub activations: Activations,
    /// Pre-tokenizer to use instead of the one that the file names.
    pub pre: Option<String>,
    /// Memory for activations in bytes; half of what is free when `None`.
    pub memory: Option<u64>,
    /// File in which scored windows are kept: a run that finds it goes on where another stopped.
    pub state: Option<std::path::PathBuf>,
}

/// A file and the model in it.
pub(crate) struct Opened<'g> {
    pub(crate) gguf: &'g Gguf,
    pub(crate) model: Model<'g>,
}

impl<'g> Opened<'g> {
    /// Opens a model; `watch` gets its warnings.
    ///
    /// # Errors
    /// When the forward pass cannot run the model, or it predicts no next token.
    pub(crate) fn open(gguf: &'g Gguf, watch: &dyn Watch) -> Result<Opened<'g>, EvalError> {
        let model = Model::open(gguf).and_then(|model| model.check_predicts().map(|()| model));
        let file = || printable(gguf.label());
        let model = model.map_err(|source| EvalError::OpenModel { file: file(), source: source.into() })?;
        model.warn(watch);
        Ok(Opened { gguf, model })
    }

    /// The name for messages.
    pub(crate) fn label(&self) -> String {
        printable(self.gguf.label())
    }

    /// The tokenizer in the file; see [`open_tokenizer`].
    pub(crate) fn tokenizer(&self, pre: Option<&str>, watch: &dyn Watch) -> Result<Tokenizer, EvalError> {
        Ok(open_tokenizer(&self.model, pre, watch)?)
    }

    /// A pass that ends when `stop` is requested.
    pub(crate) fn pass(&self, activations: Activations, stop: &Stop) -> Result<Pass<'_, 'g, 'static>, EvalError> {
        let cancel = Some(stop.flag().clone());
        Ok(self.model.pass(ForwardOptions { activations, cancel, ..ForwardOptions::default() }, Overrides::new())?)
    }

    /// Checks that `other` has the same tokens and as many rows of the embedding, so that predictions of both can be
    /// compared.
    pub(crate) fn check_same_vocabulary(&self, other: &Opened<'_>) -> Result<(), EvalError> {
        let (found, expected) = (vocabulary(other.gguf.metadata())?, vocabulary(self.gguf.metadata())?);
        let difference = match (expected.len(), found.len()) {
            (a, b) if a != b => Some(format!("has {b} tokens, not {a}")),
            _ => expected.iter().zip(&found).position(|(a, b)| a != b).map(|id| format!("differs at token {id}")),
        };
        let (file, base) = (other.label(), self.label());
        if let Some(difference) = difference {
            return Err(EvalError::OtherTokens { file, difference, base });
        }
        let (found, expected) = (other.model.n_vocab(), self.model.n_vocab());
        if found != expected {
            return Err(EvalError::OtherEmbedding { file, found, base, expected });
        }
        Ok(())
    }

    /// Refuses windows that are longer than the model's context.
    pub(crate) fn check_context(&self, n_ctx: usize) -> Result<(), EvalError> {
        let trained = self.model.hparams().n_ctx_train;
        match n_ctx > trained {
            true => Err(EvalError::LongWindows { file: self.label(), n_ctx, trained }),
            false => Ok(()),
        }
    }

    /// Tokens of a window: what is asked for, or a default that the model was trained for.
    pub(crate) fn context(&self, asked: Option<usize>) -> Result<usize, EvalError> {
        match asked {
            Some(n_ctx) => self.check_context(n_ctx).map(|()| n_ctx),
            None => Ok(DEFAULT_CONTEXT.min(self.model.hparams().n_ctx_train.max(4))),
        }
    }
}

/// The tokens of a vocabulary; none where a file has none.
fn vocabulary(metadata: &Metadata) -> Result<Vec<&[u8]>, EvalError> {
    Ok(match metadata.array("tokenizer.ggml.tokens")? {
        Some(tokens) => tokens.iter_str()?.collect(),
        None => Vec::new(),
    })
}

/// The windows of a text of `n_ctx` tokens, its documents in turn where there are several.
///
/// # Errors
/// When there is too little text; the message names it.
pub(crate) fn windows_of(
    text: &Text,
    tokenizer: &Tokenizer,
    n_ctx: usize,
    options: &TextOptions,
) -> Result<Windows, EvalError> {
    let texts = text.documents().map(|(_, document)| tokenizer.encode(document, true, false)).collect();
    let windows = Windows::chunks(texts_in_turn(texts, n_ctx), n_ctx, options.chunks, leading_bos(tokenizer));
    let windows = windows.and_then(|windows| match options.score_from {
        Some(position) => windows.score_from(position),
        None => Ok(windows),
    });
    windows.map_err(|error| error.in_file(printable(&text.name())))
}
