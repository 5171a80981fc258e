//! Finding tensors and checking their shapes.

use std::collections::HashSet;

use super::mixer::MixerWeights;
use super::{Layer, LayerInput, Linear, Weight};
use crate::gguf::{Gguf, TensorInfo};
use crate::model::error::ModelError;
use crate::model::hparams::{Hparams, Mixer};
use crate::quant;
use crate::recipe::roles::split_block;

/// Looks tensors up and remembers which were used.
pub(super) struct Loader<'g, 'h> {
    pub gguf: &'g Gguf,
    pub hparams: &'h Hparams,
    used: HashSet<&'g str>,
}

fn shown_shape(shape: &[u64]) -> String {
    let parts: Vec<String> = shape.iter().map(u64::to_string).collect();
    format!("[{}]", parts.join(", "))
}

impl<'g, 'h> Loader<'g, 'h> {
    pub(super) fn new(gguf: &'g Gguf, hparams: &'h Hparams) -> Self {
        Loader { gguf, hparams, used: HashSet::new() }
    }

    /// True if the tensor is part of the model, or of a block behind its layers.
    pub(super) fn knows(&self, tensor: &TensorInfo) -> bool {
        let is_behind = |il: u64| (self.hparams.n_layer() as u64..self.hparams.n_block as u64).contains(&il);
        self.used.contains(tensor.name.as_str()) || split_block(&tensor.name).is_some_and(|(il, _)| is_behind(il))
    }

    /// Marks a tensor that the model may have and a pass does not need.
    pub(super) fn pass_over(&mut self, name: &str) {
        if let Some(tensor) = self.gguf.tensor(name) {
            self.used.insert(tensor.name.as_str());
        }
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.gguf.tensor(name).is_some()
    }

    /// A tensor of `shape` (ggml order), if present.
    pub(super) fn optional(&mut self, name: &str, shape: &[usize]) -> Result<Option<Weight<'g>>, ModelError> {
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

    pub(super) fn required(&mut self, name: &str, shape: &[usize]) -> Result<Weight<'g>, ModelError> {
        let expected: Vec<u64> = shape.iter().map(|&n| n as u64).collect();
        self.optional(name, shape)?.ok_or_else(|| ModelError::MissingTensor {
            name: name.to_owned(),
            arch: self.hparams.arch.name,
            expected: shown_shape(&expected),
        })
    }

    pub(super) fn linear(&mut self, stem: &str, n_in: usize, n_out: usize) -> Result<Linear<'g>, ModelError> {
        Ok(Linear {
            weight: self.required(&format!("{stem}.weight"), &[n_in, n_out])?,
            bias: self.optional(&format!("{stem}.bias"), &[n_out])?,
            scale: self.optional(&format!("{stem}.scale"), &[1])?,
        })
    }

    pub(super) fn stacked(
        &mut self,
        stem: &str,
        n_in: usize,
        n_out: usize,
        count: usize,
    ) -> Result<Linear<'g>, ModelError> {
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

    /// A norm of `len` values, where it is `wanted`.
    pub(super) fn norm(&mut self, wanted: bool, name: &str, len: usize) -> Result<Option<Weight<'g>>, ModelError> {
        wanted.then(|| self.required(name, &[len])).transpose()
    }

    /// All tensors of layer `il`.
    pub(super) fn layer(&mut self, il: usize) -> Result<Layer<'g>, ModelError> {
        let h = self.hparams;
        let norms = h.arch.norms;
        let name = |part: &str| format!("blk.{il}.{part}.weight");
        let input = match h.layer_input {
            Some(width) => Some(LayerInput {
                gate: self.linear(&format!("blk.{il}.inp_gate"), h.n_embd, width)?,
                proj: self.linear(&format!("blk.{il}.proj"), width, h.n_embd)?,
                norm: self.required(&name("post_norm"), &[h.n_embd])?,
            }),
            None => None,
        };
        Ok(Layer {
            mixer_norm: self.norm(norms.before, &name("attn_norm"), h.n_embd)?,
            mixer: match &h.layers[il].mixer {
                Mixer::Attention(shape) => MixerWeights::Attention(Box::new(self.attention(il, shape)?)),
                Mixer::DeltaNet(shape) => MixerWeights::DeltaNet(Box::new(self.delta_net(il, *shape)?)),
            },
            post_mixer_norm: self.norm(norms.after, &name("post_attention_norm"), h.n_embd)?,
            ffn_norm: self.norm(norms.before, &name(norms.feed_forward), h.n_embd)?,
            feed_forward: self.feed_forward(il)?,
            post_ffn_norm: self.norm(norms.after, &name("post_ffw_norm"), h.n_embd)?,
            input,
            output_scale: match h.arch.layer_inputs {
                true => self.optional(&name("layer_output_scale"), &[1])?,
                false => None,
            },
        })
    }
}
