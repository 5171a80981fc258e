//! The tensors of a model, found and checked against the hyperparameters when it is opened.

mod feed_forward;
mod loader;
mod mixer;

use std::borrow::Cow;
use std::collections::HashMap;

use super::arch::{OutputMatrix, RopeFactors};
use super::error::ModelError;
use super::hparams::Hparams;
use crate::gguf::{Gguf, TensorInfo, TensorType};
use crate::quant;
use crate::recipe::roles::{OUTPUT_WEIGHT, TOKEN_EMBD_WEIGHT};
pub(super) use feed_forward::{Beside, FeedForwardWeights, GateUp, MixtureWeights, Network};
use loader::Loader;
pub(super) use mixer::{AttentionWeights, DeltaGates, DeltaInputs, DeltaWeights, MixerWeights, Projections};

/// A matrix `[n_out, n_in]` (row-major) or a stack of `n_mats` of them, or a vector (`n_out` = `n_mats` = 1).
#[derive(Clone, Debug)]
pub(super) struct Weight<'g> {
    pub name: &'g str,
    pub n_in: usize,
    pub n_out: usize,
    pub n_mats: usize,
    pub ty: TensorType,
    pub data: &'g [u8],
}

/// Encoded rows, ready to be multiplied with.
#[derive(Clone, Copy, Debug)]
pub(super) struct EncodedRows<'a> {
    pub ty: TensorType,
    pub data: &'a [u8],
    pub n_in: usize,
    pub n_out: usize,
}

/// Tensors whose data are replaced for a run.
#[derive(Clone, Debug, Default)]
pub struct Overrides<'a> {
    tensors: HashMap<String, (TensorType, Cow<'a, [u8]>)>,
}

impl<'a> Overrides<'a> {
    /// Nothing replaced.
    pub fn new() -> Self {
        Self::default()
    }

    /// Replaces the data of tensor `name`; its shape stays. Checked against the model when the pass is made.
    pub fn insert(&mut self, name: impl Into<String>, ty: TensorType, data: impl Into<Cow<'a, [u8]>>) {
        self.tensors.insert(name.into(), (ty, data.into()));
    }

    pub(super) fn check(&self, gguf: &Gguf) -> Result<(), ModelError> {
        for (name, (ty, data)) in &self.tensors {
            let bad = |reason: String| ModelError::BadOverride { name: name.clone(), reason };
            let tensor = gguf.tensor(name).ok_or_else(|| bad("the model has no such tensor".into()))?;
            let expected = ty
                .info()
                .filter(|_| quant::codec(*ty).is_some())
                .and_then(|info| info.row_bytes(tensor.row_len()))
                .and_then(|bytes| bytes.checked_mul(tensor.rows()))
                .ok_or_else(|| bad(format!("type {ty} cannot hold rows of {}", tensor.row_len())))?;
            if data.len() as u64 != expected {
                return Err(bad(format!("{} bytes, expected {expected} of type {ty}", data.len())));
            }
        }
        Ok(())
    }
}

impl<'g> Weight<'g> {
    /// Rows of matrix `mat`, replaced or the model's own.
    pub(super) fn rows<'a>(&self, overrides: &'a Overrides<'_>, mat: usize) -> EncodedRows<'a>
    where
        'g: 'a,
    {
        let (ty, data) = match overrides.tensors.get(self.name) {
            Some((ty, data)) => (*ty, data.as_ref()),
            None => (self.ty, self.data),
        };
        let bytes = data.len() / self.n_mats;
        EncodedRows { ty, data: &data[mat * bytes..(mat + 1) * bytes], n_in: self.n_in, n_out: self.n_out }
    }

    /// Decoded values of matrix `mat`.
    pub(super) fn decode(&self, overrides: &Overrides<'_>, mat: usize) -> Result<Vec<f32>, ModelError> {
        let rows = self.rows(overrides, mat);
        let mut values = vec![0.0; rows.n_in * rows.n_out];
        rows.decode(0..rows.n_out, &mut values).map_err(|_| self.undecodable(rows.ty))?;
        Ok(values)
    }

    pub(super) fn undecodable(&self, ty: TensorType) -> ModelError {
        ModelError::UndecodableType { name: self.name.to_owned(), ty: ty.to_string() }
    }
}

impl EncodedRows<'_> {
    /// Decodes rows `range` into `out`.
    pub(super) fn decode(&self, range: std::ops::Range<usize>, out: &mut [f32]) -> Result<(), quant::QuantError> {
        let row_bytes = self.data.len() / self.n_out;
        quant::dequantize(self.ty, &self.data[range.start * row_bytes..range.end * row_bytes], out)
    }
}

/// A weight matrix with what follows its product.
#[derive(Clone, Debug)]
pub(super) struct Linear<'g> {
    pub weight: Weight<'g>,
    /// Added to the product, one value per output (per expert and output).
    pub bias: Option<Weight<'g>>,
    /// Multiplies the product, one value (per expert): second-level scale of NVFP4 files.
    pub scale: Option<Weight<'g>>,
}

/// What each layer adds to the residual stream from an input of its own.
#[derive(Clone, Debug)]
pub(super) struct LayerInput<'g> {
    pub gate: Linear<'g>,
    pub proj: Linear<'g>,
    pub norm: Weight<'g>,
}

/// Where the layers' own inputs come from.
#[derive(Clone, Debug)]
pub(super) struct LayerInputs<'g> {
    /// A row per token with the inputs of all layers.
    pub embedding: Weight<'g>,
    /// From the model's embedding to the inputs of all layers.
    pub projection: Weight<'g>,
    pub norm: Weight<'g>,
}

/// All tensors of one layer.
#[derive(Clone, Debug)]
pub(super) struct Layer<'g> {
    pub mixer_norm: Option<Weight<'g>>,
    pub mixer: MixerWeights<'g>,
    pub post_mixer_norm: Option<Weight<'g>>,
    pub ffn_norm: Option<Weight<'g>>,
    pub feed_forward: FeedForwardWeights<'g>,
    pub post_ffn_norm: Option<Weight<'g>>,
    pub input: Option<LayerInput<'g>>,
    /// Multiplies the layer's output, one value.
    pub output_scale: Option<Weight<'g>>,
}

/// All tensors of a model.
#[derive(Clone, Debug)]
pub(super) struct Weights<'g> {
    pub token_embd: Weight<'g>,
    pub output_norm: Weight<'g>,
    pub output: Linear<'g>,
    pub layers: Vec<Layer<'g>>,
    pub layer_inputs: Option<LayerInputs<'g>>,
    pub rope_freqs: Option<Weight<'g>>,
    pub rope_long: Option<Weight<'g>>,
    pub rope_short: Option<Weight<'g>>,
}

impl<'g> Weights<'g> {
    /// Finds every tensor of the model and checks shapes and types.
    pub(super) fn load(gguf: &'g Gguf, hparams: &Hparams) -> Result<Self, ModelError> {
        let mut loader = Loader::new(gguf, hparams);
        let arch = hparams.arch;
        let n_vocab = vocabulary_size(gguf, hparams)?;
        let token_embd = loader.required(TOKEN_EMBD_WEIGHT, &[hparams.n_embd, n_vocab])?;
        let own_output = match arch.output {
            OutputMatrix::Tied => false,
            OutputMatrix::Own => true,
            OutputMatrix::OwnOrTied => gguf.tensor(OUTPUT_WEIGHT).is_some(),
        };
        let output = if own_output {
            loader.linear("output", hparams.n_embd, n_vocab)?
        } else {
            let bias = loader.optional("output.bias", &[n_vocab])?;
            Linear { weight: token_embd.clone(), bias, scale: None }
        };
        let output_norm = loader.required("output_norm.weight", &[hparams.n_embd])?;
        let layers = (0..hparams.n_layer()).map(|il| loader.layer(il)).collect::<Result<Vec<_>, _>>()?;
        let layer_inputs = match hparams.layer_input {
            Some(width) => Some(LayerInputs {
                embedding: loader.required(LAYER_EMBD_WEIGHT, &[width * layers.len(), n_vocab])?,
                projection: loader.required(LAYER_PROJ_WEIGHT, &[hparams.n_embd, width * layers.len()])?,
                norm: loader.required("per_layer_proj_norm.weight", &[width])?,
            }),
            None => None,
        };
        // The widest rotated part, or head; layers that rotate less use the first of the factors.
        let values = hparams.widest_attention(|shape| match shape.rope {
            Some(rope) if arch.rope.half_where_seeing_all => rope.n_rot,
            Some(rope) if rope.factors && arch.attention.own_windowed_size => shape.head_k,
            Some(rope) if rope.factors => rope.n_rot,
            _ => 0,
        });
        let pairs = values / 2;
        let mut factors = |name: &str| match arch.rope.factors {
            RopeFactors::None => Ok(None),
            _ if pairs == 0 => Ok(None),
            _ => loader.optional(name, &[pairs]),
        };
        let rope_freqs = factors("rope_freqs.weight")?;
        let rope_long = factors("rope_factors_long.weight")?;
        let rope_short = factors("rope_factors_short.weight")?;
        if let Some(tensor) = gguf.tensors().iter().find(|t| !loader.knows(t) && !ignorable(t)) {
            return Err(ModelError::UnexpectedTensor { name: tensor.shown_name(), arch: arch.name });
        }
        Ok(Weights { token_embd, output_norm, output, layers, layer_inputs, rope_freqs, rope_long, rope_short })
    }
}

/// Inputs of all layers, a row per token.
const LAYER_EMBD_WEIGHT: &str = "per_layer_token_embd.weight";
/// From the embedding to the inputs of all layers.
const LAYER_PROJ_WEIGHT: &str = "per_layer_model_proj.weight";

/// Tensors that files carry without any part in the logits of text.
fn ignorable(tensor: &TensorInfo) -> bool {
    let name = tensor.name.as_str();
    name.ends_with(".input_scale")
        || name.ends_with("rope_freqs.weight")
        || name.ends_with("attn_rot_embd.weight")
        || name.starts_with("cls.")
        || name.starts_with("dense_")
        || name.starts_with("rope_factors_")
}

/// Rows of the embedding; must agree with the tokenizer's list where the file has one.
fn vocabulary_size(gguf: &Gguf, hparams: &Hparams) -> Result<usize, ModelError> {
    let key = "tokenizer.ggml.tokens";
    let listed = gguf.metadata().array(key)?.map(|tokens| tokens.len());
    let embedding = gguf.tensor(TOKEN_EMBD_WEIGHT).map(|t| t.shape.get(1).copied().unwrap_or(1));
    let rows = match (listed, embedding) {
        (_, Some(rows)) => usize::try_from(rows).unwrap_or(usize::MAX),
        (Some(listed), None) => usize::try_from(listed).unwrap_or(usize::MAX),
        (None, None) => 0,
    };
    if let Some(listed) = listed
        && listed != rows as u64
    {
        return Err(ModelError::BadShape {
            name: TOKEN_EMBD_WEIGHT.into(),
            found: format!("{rows} rows"),
            expected: format!("[{}, {listed}], one row per entry of {key}", hparams.n_embd),
        });
    }
    if rows == 0 || rows > u32::MAX as usize {
        let expected = format!("1 to {} tokens", u32::MAX);
        return Err(ModelError::BadValue { key: key.into(), found: format!("a list of {rows}"), expected });
    }
    Ok(rows)
}
