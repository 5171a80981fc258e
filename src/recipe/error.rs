//! Errors of recipes and notes about choices, each one line.

use std::fmt;

use super::target::Target;
use crate::gguf::TensorType;

/// Why no recipe can be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say what the fields hold
pub enum RecipeError {
    #[error("unknown target {found:?}{}; known targets: {}", whose(.found), Target::list())]
    UnknownTarget { found: String },
    #[error("{place}: unknown tensor type {found:?}; known types: {}", super::overrides::storable_types())]
    UnknownType { place: String, found: String },
    #[error("{place}: {found:?} is {whose}; known types: {}", super::overrides::storable_types())]
    ForeignType { place: String, found: String, whose: &'static str },
    #[error("{place}: {text:?} is not of the form REGEX=TYPE ({problem}), for example attn_v=q6_K")]
    MalformedOverride { place: String, text: String, problem: &'static str },
    #[error("{place}: pattern {pattern:?} is not a valid regular expression: {problem}")]
    BadPattern { place: String, pattern: String, problem: String },
    #[error(
        "{place}: pattern {pattern:?} tries too many ways to match {tensor:?}; write it without nested repetitions"
    )]
    PatternTooSlow { place: String, pattern: String, tensor: String },
    #[error("{key} is missing, the mix for this target needs it; add --override-kv {key}={form}")]
    MissingKey { key: String, form: &'static str },
    #[error("{key} is {found}, expected {expected}; correct it with --override-kv {key}={form}")]
    BadValue { key: String, found: String, expected: String, form: &'static str },
    #[error(
        "{count} tensor(s) need a fallback type, first {tensor}: rows of {row_len} cannot be {intended}, {fallback} \
         would take {extra_bytes} bytes more in all; drop --no-fallback or choose a type with a shorter block"
    )]
    FallbackRefused {
        count: usize,
        tensor: String,
        row_len: u64,
        intended: TensorType,
        fallback: TensorType,
        extra_bytes: u64,
    },
    #[error("all {blocks} layers would be removed, keep at least one")]
    NothingLeft { blocks: usize },
    #[error(
        "tensor {tensor} holds rows for all layers at once, so none can be removed from this model; leave the flag away"
    )]
    TensorOfAllLayers { tensor: String },
    #[error("tensor {tensor}: none of the types allowed fits rows of {row_len} weights; {advice}")]
    NoType { tensor: String, row_len: u64, advice: &'static str },
    #[error(
        "tensor {tensor}: {ty} needs importance data, which {}; choose another type or another imatrix",
        if *.has_imatrix { "the imatrix does not have for it" } else { "only --imatrix gives" }
    )]
    PinNeedsImportance { tensor: String, ty: TensorType, has_imatrix: bool },
}

/// Whose a name is that is unknown here.
fn whose(name: &str) -> String {
    TensorType::foreign_name(name).map_or_else(String::new, |whose| format!(", {whose}"))
}

/// Something about the choices that a user may not expect. [`fmt::Display`] gives one line.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the messages say what the fields hold
pub enum Note {
    /// No tensor has a name that the pattern occurs in.
    PatternMatchesNothing { pattern: String },
    /// Every tensor that the pattern matches is taken by an earlier pattern or option.
    PatternWithoutEffect { pattern: String },
    /// Every tensor that the pattern matches is of a kind that is never quantized.
    PatternOnlyExempt { pattern: String, tensor: String },
    /// An option names a tensor that the model lacks or that keeps its type.
    OptionWithoutTensor { option: &'static str, problem: String },
    /// A type given by hand for a layered role: llama-quantize would shift the mix of the later layers.
    MixNotShifted { tensors: usize },
    /// Overrides for a plain target, which llama-quantize ignores.
    OverridesOnPlainTarget { target: Target, tensors: usize },
    /// Options that convert tensors, given together with the target COPY.
    IgnoredByCopy { option: &'static str },
    /// A type given by option that does not fit the row; llama-quantize aborts there.
    OptionTypeDoesNotFit { option: &'static str, tensor: String, row_len: u64, from: TensorType, to: TensorType },
    /// A fallback that llama-quantize does not know: it refuses the model.
    FallbackBeyondReference { tensors: usize, tensor: String, row_len: u64, from: TensorType, to: TensorType },
    /// An expert model with a block number outside the stated count; llama-quantize refuses the model.
    BlockOutOfRange { tensors: usize, tensor: String, blocks: u32 },
    /// A tensor of a type that holds no weights.
    SourceTypeKept { tensor: String, ty: TensorType },
    /// A layer to prune that the model lacks.
    LayerNotFound { layer: u32 },
    /// A period of layers that the pruned model does not keep.
    PeriodBroken { key: String, period: u64 },
    /// A per-layer list that is too short for the layers.
    NotPerLayer { key: String, values: u64, layers: u64 },
    /// A list that may be per layer, of an unknown key.
    UnknownList { key: String, values: u64 },
    /// Inputs of the first layers, some of which are removed.
    InputsOfRemovedLayers { key: String, layers: u64 },
    /// A single layer that a key names and that is removed.
    LayerOfKeyRemoved { key: String, layer: u64 },
    /// A list of layers that is empty now.
    NoLayerLeft { key: String },
    /// Two layers whose inputs are taken become the same.
    InputsFallTogether { key: String },
    /// A layer whose keys and values later layers use is removed.
    SharedSourceRemoved { key: String, layer: u64 },
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Note::PatternMatchesNothing { pattern } => {
                write!(f, "--tensor-type {pattern}: matches no tensor (lwq inspect --tensors lists the names)")
            }
            Note::PatternWithoutEffect { pattern } => {
                write!(f, "--tensor-type {pattern}: earlier patterns or options take every tensor that it matches")
            }
            Note::PatternOnlyExempt { pattern, tensor } => {
                write!(f, "--tensor-type {pattern}: matches only tensors that are never quantized, such as {tensor}")
            }
            Note::OptionWithoutTensor { option, problem } => write!(f, "{option} has no effect: {problem}"),
            Note::MixNotShifted { tensors } => write!(
                f,
                "{tensors} layered tensor(s) have a type given by hand; the other layers keep their place in the mix \
                 (llama-quantize would shift them)"
            ),
            Note::OverridesOnPlainTarget { target, tensors } => write!(
                f,
                "--tensor-type applies to {tensors} tensor(s) of the plain target {target} (llama-quantize ignores it there)"
            ),
            Note::IgnoredByCopy { option } => write!(f, "{option} has no effect: the target COPY converts nothing"),
            Note::OptionTypeDoesNotFit { option, tensor, row_len, from, to } => write!(
                f,
                "{option}: {tensor} has rows of {row_len}, which {from} cannot hold; it gets {to} \
                 (llama-quantize aborts here)"
            ),
            Note::FallbackBeyondReference { tensors, tensor, row_len, from, to } => write!(
                f,
                "{tensors} tensor(s) such as {tensor} have rows of {row_len}, which {from} cannot hold; they get {to} \
                 (llama-quantize refuses this model)"
            ),
            Note::BlockOutOfRange { tensors, tensor, blocks } => write!(
                f,
                "{tensors} expert-model tensor(s) such as {tensor} have no block number below the block count of {blocks}; \
                 they are treated as the nearest block (llama-quantize refuses this model)"
            ),
            Note::SourceTypeKept { tensor, ty } => {
                write!(f, "{tensor} is {ty}, which holds no weights that could be quantized; it is copied")
            }
            Note::LayerNotFound { layer } => write!(f, "the model has no layer {layer}"),
            Note::PeriodBroken { key, period } => write!(
                f,
                "{key} is {period}, a period of layers that the pruned model no longer keeps: some layers run \
                 as another kind than they were trained as; remove whole periods"
            ),
            Note::NotPerLayer { key, values, layers } => write!(
                f,
                "{key} has {values} values for {layers} layers and is left as it is; correct it in the source"
            ),
            Note::UnknownList { key, values } => write!(
                f,
                "{key} has {values} values, as many as there were layers, but is not known to be a list of \
                 layers; it is left as it is"
            ),
            Note::InputsOfRemovedLayers { key, layers } => write!(
                f,
                "{key} is {layers}, and some of these first layers are removed; their inputs now go to the \
                 layers that follow"
            ),
            Note::LayerOfKeyRemoved { key, layer } => {
                write!(f, "{key} names layer {layer}, which is removed; the layer that follows takes its place")
            }
            Note::NoLayerLeft { key } => {
                write!(f, "all layers that {key} names are removed; the list is empty now")
            }
            Note::InputsFallTogether { key } => write!(
                f,
                "{key} names layers that become the same one, so the projector gets fewer inputs than it expects"
            ),
            Note::SharedSourceRemoved { key, layer } => write!(
                f,
                "layer {layer}, whose keys and values the layers of {key} use, is removed; they use those of \
                 the layer before"
            ),
        }
    }
}
