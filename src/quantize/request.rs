//! What is asked for.

use std::path::Path;

use super::{Draft, QuantizeError};
use crate::gguf::{Gguf, Metadata, TensorType, Value};
use crate::imatrix::{EntryFilter, Named};
use crate::moments::Calibration;
use crate::recipe::{Choice, Options, Target, TypeOverride};
use crate::rounding::{RoundingMethod, RoundingRecord};

/// How weights are rounded, with what that takes.
#[derive(Clone, Copy, Default)]
pub enum Rounding<'a> {
    /// As ggml does: the bytes of llama-quantize.
    #[default]
    Ggml,
    /// The best scales of each block.
    Search,
    /// Each column makes up for the errors of those before it.
    #[doc(alias = "GPTQ")]
    Feedback(&'a Calibration<'a>),
}

impl<'a> Rounding<'a> {
    /// The method alone.
    pub fn method(self) -> RoundingMethod {
        match self {
            Rounding::Ggml => RoundingMethod::Ggml,
            Rounding::Search => RoundingMethod::Search,
            Rounding::Feedback(_) => RoundingMethod::Feedback,
        }
    }

    /// What a file that is rounded so records.
    pub fn record(self) -> RoundingRecord {
        match self {
            Rounding::Feedback(calibration) => calibration.record(),
            other => RoundingRecord { method: other.method(), ..RoundingRecord::default() },
        }
    }

    pub(super) fn calibration(self) -> Option<&'a Calibration<'a>> {
        match self {
            Rounding::Feedback(calibration) => Some(calibration),
            _ => None,
        }
    }
}

/// Types for all tensors of one model, made elsewhere: by a plan.
#[derive(Clone, Debug)]
pub struct Choices {
    /// What messages call them.
    pub name: String,
    /// What they were made for, as reports show it.
    pub label: String,
    /// What the output's default name ends in.
    pub suffix: String,
    /// Choice by tensor name.
    pub by_tensor: std::collections::HashMap<String, Choice>,
    /// `general.file_type` of the output.
    pub file_type: u32,
    /// Keys that tell about the choices.
    pub metadata: Metadata,
    /// The imatrix's name as the output is to have it: a planned file has a fixed size.
    pub imatrix_name: Option<String>,
    /// Notes about how the run differs from what the choices were made for, by what the run records.
    pub rounding: Option<RoundingRecord>,
    /// Most bytes that the output was to have.
    pub target_bytes: Option<u64>,
}

/// Where types come from.
#[derive(Clone, Debug)]
pub(super) enum Goal {
    Target(Target),
    Choices(Box<Choices>),
}

/// How the output is dealt out to files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Split {
    /// One file.
    #[default]
    Whole,
    /// One file per input file.
    AsInput,
    /// A new file before this many bytes of tensors.
    MaxBytes(u64),
}

/// What becomes of matrices that are quantized and have no importance data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MissingImportance {
    /// They are rounded without; a type that needs data is refused.
    #[default]
    ByType,
    /// None may lack data, not even single experts of a stack. Token embeddings and the output matrix, for which
    /// llama-imatrix collects none, are not asked.
    Refuse,
    /// They are rounded without, whatever their type: where it needs data, all columns count the same.
    Plain,
    /// They get this type.
    Type(TensorType),
}

/// What becomes of blocks for multi-token prediction (MTP, NextN), the last ones of a model.
#[derive(Clone, Copy, Default)]
pub enum Mtp<'a> {
    /// They are quantized as the other blocks.
    #[default]
    Keep,
    /// They are left out.
    Drop,
    /// Those of another file of the model are added as they are; the model has none.
    From(&'a Gguf),
}

/// A request to quantize a model.
///
/// ```
/// use lwq::atomic_file::Replace;
/// use lwq::gguf::Gguf;
/// use lwq::imatrix::{Imatrix, Named};
/// use lwq::quantize::Request;
/// use lwq::recipe::Target;
///
/// let model = Gguf::open("tests/data/doclet-4m-f16.gguf")?;
/// let imatrix = Imatrix::open("tests/data/golden/doclet.imatrix.gguf".as_ref())?;
/// let request = Request::target(Target::Q4_K_M).imatrix(Named { name: "doclet.imatrix.gguf", imatrix: &imatrix });
/// let draft = request.decide(&model)?; // all that a dry run shows
/// assert!(draft.problems().is_empty() && draft.file_bytes() < 5_000_000);
/// let folder = tempfile::tempdir()?;
/// let output = folder.path().join("doclet-Q4_K_M.gguf");
/// let report = draft.write(&output, Replace::No, &())?;
/// assert_eq!(output.metadata()?.len(), report.size_bytes);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Request<'a> {
    pub(super) goal: Goal,
    pub(super) imatrix: Option<Named<'a>>,
    pub(super) rounding: Rounding<'a>,
    pub(super) filter: EntryFilter,
    pub(super) missing_importance: MissingImportance,
    pub(super) output_tensor_type: Option<TensorType>,
    pub(super) token_embedding_type: Option<TensorType>,
    pub(super) tensor_types: Vec<TypeOverride>,
    pub(super) pure: bool,
    pub(super) leave_output_tensor: bool,
    pub(super) allow_requantize: bool,
    pub(super) allow_fallback: bool,
    pub(super) prune_layers: Vec<u32>,
    pub(super) mtp: Mtp<'a>,
    pub(super) metadata: Vec<(String, Value)>,
    pub(super) split: Split,
}

impl<'a> Request<'a> {
    fn new(goal: Goal) -> Request<'a> {
        Request {
            goal,
            imatrix: None,
            rounding: Rounding::Ggml,
            filter: EntryFilter::All,
            missing_importance: MissingImportance::ByType,
            output_tensor_type: None,
            token_embedding_type: None,
            tensor_types: Vec::new(),
            pure: false,
            leave_output_tensor: false,
            allow_requantize: false,
            allow_fallback: true,
            prune_layers: Vec::new(),
            mtp: Mtp::Keep,
            metadata: Vec::new(),
            split: Split::Whole,
        }
    }

    /// A type for each tensor by the rules of a target, as llama-quantize chooses them.
    pub fn target(target: Target) -> Request<'a> {
        Request::new(Goal::Target(target))
    }

    /// The types of a plan, see [`PlanFile::choices_for`](crate::plan::PlanFile::choices_for).
    pub fn choices(choices: Choices) -> Request<'a> {
        Request::new(Goal::Choices(Box::new(choices)))
    }

    /// Weighs rounding errors by an importance matrix.
    pub fn imatrix(mut self, imatrix: Named<'a>) -> Self {
        self.imatrix = Some(imatrix);
        self
    }

    /// How weights are rounded.
    pub fn rounding(mut self, rounding: Rounding<'a>) -> Self {
        self.rounding = rounding;
        self
    }

    /// Uses only some entries of the importance matrix.
    pub fn importance_of(mut self, filter: EntryFilter) -> Self {
        self.filter = filter;
        self
    }

    /// What becomes of matrices without importance data.
    pub fn missing_importance(mut self, missing: MissingImportance) -> Self {
        self.missing_importance = missing;
        self
    }

    /// Type of `output.weight`, and of the token embedding where the model has none.
    pub fn output_tensor_type(mut self, ty: Option<TensorType>) -> Self {
        self.output_tensor_type = ty;
        self
    }

    /// Type of the token embeddings.
    pub fn token_embedding_type(mut self, ty: Option<TensorType>) -> Self {
        self.token_embedding_type = ty;
        self
    }

    /// Types by pattern; the first that matches a name wins.
    pub fn tensor_types(mut self, patterns: Vec<TypeOverride>) -> Self {
        self.tensor_types = patterns;
        self
    }

    /// Gives every tensor the target's base type, without the mix.
    pub fn pure(mut self, pure: bool) -> Self {
        self.pure = pure;
        self
    }

    /// Leaves `output.weight` as it is.
    pub fn leave_output_tensor(mut self, leave: bool) -> Self {
        self.leave_output_tensor = leave;
        self
    }

    /// Accepts a source that is quantized already.
    pub fn allow_requantize(mut self, allow: bool) -> Self {
        self.allow_requantize = allow;
        self
    }

    /// Takes a larger type for tensors whose rows do not fit theirs, instead of refusing them; true unless said otherwise.
    pub fn allow_fallback(mut self, allow: bool) -> Self {
        self.allow_fallback = allow;
        self
    }

    /// Removes these blocks and renumbers the rest.
    pub fn prune_layers(mut self, layers: &[u32]) -> Self {
        self.prune_layers = layers.to_vec();
        self
    }

    /// What becomes of blocks for multi-token prediction.
    pub fn mtp(mut self, mtp: Mtp<'a>) -> Self {
        self.mtp = mtp;
        self
    }

    /// Sets metadata values.
    pub fn metadata(mut self, values: Vec<(String, Value)>) -> Self {
        self.metadata = values;
        self
    }

    /// Deals the output out to several files.
    pub fn split(mut self, split: Split) -> Self {
        self.split = split;
        self
    }

    /// Decides everything about the output: types, importance, sizes, notes, problems. No tensor is touched but those that
    /// become float16 because no block fits their rows, to know whether it holds their weights.
    ///
    /// # Errors
    /// When the request or the files are wrong in a way that leaves nothing to decide.
    pub fn decide(&self, model: &'a Gguf) -> Result<Draft<'a>, QuantizeError> {
        Draft::decide(self, model, Some(self.rounding.record()))
    }

    /// What the recipe is asked for; `weighted` if importance is there or will be found on the way.
    pub(super) fn recipe_options(&self, target: Target, weighted: bool) -> Options {
        Options {
            has_imatrix: weighted,
            pure: self.pure,
            leave_output_tensor: self.leave_output_tensor,
            output_tensor_type: self.output_tensor_type,
            token_embedding_type: self.token_embedding_type,
            tensor_types: self.tensor_types.clone(),
            allow_fallback: self.allow_fallback,
            ..Options::new(target)
        }
    }
}

/// Opens a model that is to be quantized; an importance matrix and an empty file are told apart from it.
///
/// # Errors
/// When it is no readable GGUF model.
pub fn open_source(path: &Path) -> Result<Gguf, QuantizeError> {
    let gguf = Gguf::open(path)?;
    let refused = |problem| Err(QuantizeError::Source { file: crate::display::printable(gguf.label()), problem });
    if gguf.tensors().is_empty() {
        return refused("holds no tensors; give a model");
    }
    if gguf.metadata().str("general.type")? == Some("imatrix") {
        return refused("is an importance matrix, not a model; pass it with --imatrix");
    }
    Ok(gguf)
}
