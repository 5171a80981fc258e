//! The tensors of a model, found and checked against the hyperparameters when it is opened.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use super::arch::{FeedForward, OutputMatrix, QkNorm, SharedExpert};
use super::error::ModelError;
use super::hparams::{Experts, Hparams};
use crate::gguf::{Gguf, TensorInfo, TensorType};
use crate::quant;
use crate::recipe::roles::{OUTPUT_WEIGHT, TOKEN_EMBD_WEIGHT};

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

/// Query, key and value projections.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)] // one per layer, made once
pub(super) enum Projections<'g> {
    Separate {
        q: Linear<'g>,
        k: Linear<'g>,
        v: Linear<'g>,
    },
    /// One matrix with the rows of q, k and v in this order.
    Fused(Linear<'g>),
}

/// Gate and up projections.
#[derive(Clone, Debug)]
pub(super) enum GateUp<'g> {
    Separate {
        gate: Linear<'g>,
        up: Linear<'g>,
    },
    /// One matrix with the rows of gate and up in this order.
    Fused(Linear<'g>),
}

impl<'g> GateUp<'g> {
    /// Names of the matrices.
    pub(super) fn names(&self) -> Vec<&'g str> {
        match self {
            GateUp::Separate { gate, up } => vec![gate.weight.name, up.weight.name],
            GateUp::Fused(both) => vec![both.weight.name],
        }
    }
}

/// A feed-forward network, or a stack of them.
#[derive(Clone, Debug)]
pub(super) struct Network<'g> {
    pub gate_up: GateUp<'g>,
    pub down: Linear<'g>,
    pub n_ff: usize,
}

/// The feed-forward part of a layer.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)] // one per layer, made once
pub(super) enum FeedForwardWeights<'g> {
    Dense(Network<'g>),
    Experts {
        router: Linear<'g>,
        /// Added to the scores for the choice of experts, not for their weights.
        selection_bias: Option<Weight<'g>>,
        experts: Network<'g>,
        /// A shared expert, with its gate where it has one.
        shared: Option<(Option<Linear<'g>>, Network<'g>)>,
    },
}

/// All tensors of one layer.
#[derive(Clone, Debug)]
pub(super) struct Layer<'g> {
    pub attn_norm: Weight<'g>,
    pub projections: Projections<'g>,
    pub q_norm: Option<Weight<'g>>,
    pub k_norm: Option<Weight<'g>>,
    pub sinks: Option<Weight<'g>>,
    pub attn_output: Linear<'g>,
    pub post_attn_norm: Option<Weight<'g>>,
    pub ffn_norm: Weight<'g>,
    pub feed_forward: FeedForwardWeights<'g>,
    pub post_ffn_norm: Option<Weight<'g>>,
}

/// All tensors of a model.
#[derive(Clone, Debug)]
pub(super) struct Weights<'g> {
    pub token_embd: Weight<'g>,
    pub output_norm: Weight<'g>,
    pub output: Linear<'g>,
    pub layers: Vec<Layer<'g>>,
    pub rope_freqs: Option<Weight<'g>>,
    pub rope_long: Option<Weight<'g>>,
    pub rope_short: Option<Weight<'g>>,
}

struct Loader<'g, 'h> {
    gguf: &'g Gguf,
    hparams: &'h Hparams,
    used: HashSet<&'g str>,
}

fn shown_shape(shape: &[u64]) -> String {
    let parts: Vec<String> = shape.iter().map(u64::to_string).collect();
    format!("[{}]", parts.join(", "))
}

impl<'g> Loader<'g, '_> {
    /// A tensor of `shape` (ggml order), if present.
    fn optional(&mut self, name: &str, shape: &[usize]) -> Result<Option<Weight<'g>>, ModelError> {
        let Some(tensor) = self.gguf.tensor(name) else { return Ok(None) };
        let expected: Vec<u64> = shape.iter().map(|&n| n as u64).collect();
        let mut found = tensor.shape.as_slice();
        while found.len() > expected.len() && found.last() == Some(&1) {
            found = &found[..found.len() - 1];
        }
        if found != expected {
            return Err(ModelError::BadShape {
                name: name.to_owned(),
                found: shown_shape(&tensor.shape),
                expected: shown_shape(&expected),
            });
        }
        if quant::codec(tensor.ty).is_none() {
            return Err(ModelError::UndecodableType { name: name.to_owned(), ty: tensor.ty.to_string() });
        }
        let data = self.gguf.data(tensor)?;
        let name = tensor.name.as_str();
        self.used.insert(name);
        let dim = |i: usize| shape.get(i).copied().unwrap_or(1);
        Ok(Some(Weight { name, n_in: dim(0), n_out: dim(1), n_mats: dim(2), ty: tensor.ty, data }))
    }

    fn required(&mut self, name: &str, shape: &[usize]) -> Result<Weight<'g>, ModelError> {
        let expected: Vec<u64> = shape.iter().map(|&n| n as u64).collect();
        self.optional(name, shape)?.ok_or_else(|| ModelError::MissingTensor {
            name: name.to_owned(),
            arch: self.hparams.arch.name,
            expected: shown_shape(&expected),
        })
    }

    fn linear(&mut self, stem: &str, n_in: usize, n_out: usize) -> Result<Linear<'g>, ModelError> {
        Ok(Linear {
            weight: self.required(&format!("{stem}.weight"), &[n_in, n_out])?,
            bias: self.optional(&format!("{stem}.bias"), &[n_out])?,
            scale: self.optional(&format!("{stem}.scale"), &[1])?,
        })
    }

    fn stacked(&mut self, stem: &str, n_in: usize, n_out: usize, count: usize) -> Result<Linear<'g>, ModelError> {
        let mut bias = self.optional(&format!("{stem}.bias"), &[n_out, count])?;
        if let Some(bias) = &mut bias {
            (bias.n_out, bias.n_mats) = (1, count);
        }
        Ok(Linear {
            weight: self.required(&format!("{stem}.weight"), &[n_in, n_out, count])?,
            bias,
            scale: self.optional(&format!("{stem}.scale"), &[count])?,
        })
    }

    fn layer(&mut self, il: usize) -> Result<Layer<'g>, ModelError> {
        let h = self.hparams;
        let arch = h.arch;
        let stem = |part: &str| format!("blk.{il}.{part}");
        let norm = |part: &str| format!("blk.{il}.{part}.weight");
        let (n_q, n_kv) = (h.n_embd_q(il), h.n_embd_kv(il));
        let projections = match self.gguf.tensor(&norm("attn_qkv")) {
            Some(_) => Projections::Fused(self.linear(&stem("attn_qkv"), h.n_embd, n_q + 2 * n_kv)?),
            None => Projections::Separate {
                q: self.linear(&stem("attn_q"), h.n_embd, n_q)?,
                k: self.linear(&stem("attn_k"), h.n_embd, n_kv)?,
                v: self.linear(&stem("attn_v"), h.n_embd, n_kv)?,
            },
        };
        let feed_forward = match h.experts {
            Some(experts) if h.expert_layers[il] => self.experts(il, experts)?,
            _ => FeedForwardWeights::Dense(self.network(il, h.n_ff[il], arch.fused_gate_up, "")?),
        };
        let qk_len = |whole: usize| if arch.qk_norm == QkNorm::Whole { whole } else { h.head_k };
        let mut optional_norm =
            |wanted: bool, part: &str, len: usize| wanted.then(|| self.required(&norm(part), &[len])).transpose();
        Ok(Layer {
            q_norm: optional_norm(arch.qk_norm != QkNorm::None, "attn_q_norm", qk_len(n_q))?,
            k_norm: optional_norm(arch.qk_norm != QkNorm::None, "attn_k_norm", qk_len(n_kv))?,
            sinks: optional_norm(arch.sinks, "attn_sinks", h.n_head[il])?,
            post_attn_norm: optional_norm(arch.post_norms, "post_attention_norm", h.n_embd)?,
            post_ffn_norm: optional_norm(arch.post_norms, "post_ffw_norm", h.n_embd)?,
            attn_norm: self.required(&norm("attn_norm"), &[h.n_embd])?,
            ffn_norm: self.required(&norm(arch.ffn_norm), &[h.n_embd])?,
            attn_output: self.linear(&stem("attn_output"), n_q, h.n_embd)?,
            projections,
            feed_forward,
        })
    }

    fn network(&mut self, il: usize, n_ff: usize, fused: bool, suffix: &str) -> Result<Network<'g>, ModelError> {
        let n_embd = self.hparams.n_embd;
        let stem = |part: &str| format!("blk.{il}.ffn_{part}{suffix}");
        self.check_width(n_ff)?;
        let gate_up = if fused {
            GateUp::Fused(self.linear(&stem("up"), n_embd, 2 * n_ff)?)
        } else {
            GateUp::Separate {
                gate: self.linear(&stem("gate"), n_embd, n_ff)?,
                up: self.linear(&stem("up"), n_embd, n_ff)?,
            }
        };
        Ok(Network { gate_up, down: self.linear(&stem("down"), n_ff, n_embd)?, n_ff })
    }

    fn check_width(&self, n_ff: usize) -> Result<(), ModelError> {
        if n_ff > 0 {
            return Ok(());
        }
        Err(ModelError::BadValue {
            key: format!("{}.feed_forward_length", self.hparams.arch.name),
            found: "0 for a layer or its experts".into(),
            expected: "at least 1".into(),
        })
    }

    fn experts(&mut self, il: usize, experts: Experts) -> Result<FeedForwardWeights<'g>, ModelError> {
        let h = self.hparams;
        let count = experts.count;
        let n_ff = match experts.n_ff {
            Some(n_ff) => n_ff,
            None if matches!(h.arch.feed_forward, FeedForward::DenseOrExperts(_)) => h.n_ff[il],
            None => h.n_ff[il] / experts.used,
        };
        self.check_width(n_ff)?;
        let stem = |part: &str| format!("blk.{il}.ffn_{part}_exps");
        if self.gguf.tensor(&format!("{}.weight", stem("down"))).is_none()
            && self.gguf.tensor(&format!("blk.{il}.ffn_down.0.weight")).is_some()
        {
            return Err(ModelError::UnexpectedTensor {
                name: format!("blk.{il}.ffn_down.0.weight (one tensor per expert, a form older than ffn_down_exps)"),
                arch: h.arch.name,
            });
        }
        let routed = Network {
            gate_up: GateUp::Separate {
                gate: self.stacked(&stem("gate"), h.n_embd, n_ff, count)?,
                up: self.stacked(&stem("up"), h.n_embd, n_ff, count)?,
            },
            down: self.stacked(&stem("down"), n_ff, h.n_embd, count)?,
            n_ff,
        };
        let shared = match experts.shared_n_ff {
            None => None,
            Some(width) => {
                let gate = match h.arch.shared_expert {
                    SharedExpert::Gated => Some(Linear {
                        weight: self.required(&format!("blk.{il}.ffn_gate_inp_shexp.weight"), &[h.n_embd])?,
                        bias: None,
                        scale: None,
                    }),
                    _ => None,
                };
                Some((gate, self.network(il, width.unwrap_or(h.n_ff[il]), false, "_shexp")?))
            }
        };
        Ok(FeedForwardWeights::Experts {
            router: self.linear(&format!("blk.{il}.ffn_gate_inp"), h.n_embd, count)?,
            selection_bias: match h.arch.selection_bias {
                true => self.optional(&format!("blk.{il}.exp_probs_b.bias"), &[count])?,
                false => None,
            },
            experts: routed,
            shared,
        })
    }
}

impl<'g> Weights<'g> {
    /// Finds every tensor of the model and checks shapes and types.
    pub(super) fn load(gguf: &'g Gguf, hparams: &Hparams) -> Result<Self, ModelError> {
        let mut loader = Loader { gguf, hparams, used: HashSet::new() };
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
        let layers = (0..hparams.n_layer).map(|il| loader.layer(il)).collect::<Result<Vec<_>, _>>()?;
        let mut factors = |name: &str| match arch.rope_factors {
            true => loader.optional(name, &[hparams.n_rot / 2]),
            false => Ok(None),
        };
        let rope_freqs = factors("rope_freqs.weight")?;
        let rope_long = factors("rope_factors_long.weight")?;
        let rope_short = factors("rope_factors_short.weight")?;
        if let Some(tensor) = gguf.tensors().iter().find(|t| !loader.used.contains(t.name.as_str()) && !ignorable(t)) {
            return Err(ModelError::UnexpectedTensor { name: tensor.shown_name(), arch: arch.name });
        }
        Ok(Weights { token_embd, output_norm, output, layers, rope_freqs, rope_long, rope_short })
    }
}

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
