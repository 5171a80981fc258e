//! Tensors of what mixes tokens: attention, or a delta net.

use super::loader::Loader;
use super::{Linear, Weight};
use crate::model::arch::{AttentionGate, QkNorm, Sinks};
use crate::model::error::ModelError;
use crate::model::hparams::{AttentionShape, DeltaShape};

/// What mixes tokens in a layer.
#[derive(Clone, Debug)]
pub(in crate::model) enum MixerWeights<'g> {
    Attention(Box<AttentionWeights<'g>>),
    DeltaNet(Box<DeltaWeights<'g>>),
}

/// Query, key and value projections.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)] // one per layer, made once
pub(in crate::model) enum Projections<'g> {
    Separate {
        q: Linear<'g>,
        /// `None` where an earlier layer's keys and values are used.
        k: Option<Linear<'g>>,
        /// `None` where keys are the values.
        v: Option<Linear<'g>>,
    },
    /// One matrix with the rows of q, k and v in this order.
    Fused(Linear<'g>),
}

/// Tensors of attention.
#[derive(Clone, Debug)]
pub(in crate::model) struct AttentionWeights<'g> {
    pub projections: Projections<'g>,
    pub q_norm: Option<Weight<'g>>,
    pub k_norm: Option<Weight<'g>>,
    pub sinks: Option<Weight<'g>>,
    /// A gate on its output, a matrix of its own.
    pub gate: Option<Linear<'g>>,
    pub output: Linear<'g>,
}

/// What goes into the convolution, and the gate of the output.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)] // one per layer, made once
pub(in crate::model) enum DeltaInputs<'g> {
    Separate {
        /// Queries, keys and values, all heads of each.
        qkv: Linear<'g>,
        gate: Linear<'g>,
    },
    /// Key head by key head: query, key, its value heads, their gates.
    Fused(Linear<'g>),
}

/// Step and decay of the recurrence, one of each per value head.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)] // one per layer, made once
pub(in crate::model) enum DeltaGates<'g> {
    Separate {
        beta: Linear<'g>,
        alpha: Linear<'g>,
    },
    /// Key head by key head: the steps of its value heads, their decays.
    Fused(Linear<'g>),
}

/// Tensors of a delta net.
#[derive(Clone, Debug)]
pub(in crate::model) struct DeltaWeights<'g> {
    pub inputs: DeltaInputs<'g>,
    pub gates: DeltaGates<'g>,
    /// `[channels, kernel]`.
    pub conv: Weight<'g>,
    /// Added to the decay before softplus, one value per value head.
    pub dt_bias: Weight<'g>,
    /// Multiplies the softplus: minus the exponential of what was trained.
    pub a: Weight<'g>,
    /// Of a head.
    pub norm: Weight<'g>,
    pub output: Linear<'g>,
}

impl<'g> Loader<'g, '_> {
    /// Tensors of attention in layer `il`.
    pub(super) fn attention(&mut self, il: usize, shape: &AttentionShape) -> Result<AttentionWeights<'g>, ModelError> {
        let n_embd = self.hparams.n_embd;
        let row = self.hparams.arch.attention;
        let stem = |part: &str| format!("blk.{il}.{part}");
        let name = |part: &str| format!("blk.{il}.{part}.weight");
        let gate_rows = if row.gate == AttentionGate::WithinQueries { 2 } else { 1 };
        let n_q = gate_rows * shape.n_embd_q();
        let projections = if shape.keys_of.is_some() {
            // Files may carry what such a layer was trained with.
            for part in ["attn_k", "attn_v", "attn_k_norm"] {
                self.pass_over(&name(part));
            }
            Projections::Separate { q: self.linear(&stem("attn_q"), n_embd, n_q)?, k: None, v: None }
        } else if self.has(&name("attn_qkv")) {
            let rows = n_q + shape.n_embd_k() + shape.n_embd_v();
            Projections::Fused(self.linear(&stem("attn_qkv"), n_embd, rows)?)
        } else {
            let own_values = !row.values_may_be_keys || self.has(&name("attn_v"));
            Projections::Separate {
                q: self.linear(&stem("attn_q"), n_embd, n_q)?,
                k: Some(self.linear(&stem("attn_k"), n_embd, shape.n_embd_k())?),
                v: own_values.then(|| self.linear(&stem("attn_v"), n_embd, shape.n_embd_v())).transpose()?,
            }
        };
        let (q_len, k_len) = match row.qk_norm {
            QkNorm::Whole => (shape.n_embd_q(), shape.n_embd_k()),
            _ => (shape.head_k, shape.head_k),
        };
        let normed = |present: bool| match row.qk_norm {
            QkNorm::None | QkNorm::Unweighted => false,
            QkNorm::HeadIfThere => present,
            QkNorm::Head | QkNorm::HeadAfterRope | QkNorm::Whole => true,
        };
        let (q_normed, k_normed) = (normed(self.has(&name("attn_q_norm"))), normed(self.has(&name("attn_k_norm"))));
        let has_sinks = match row.sinks {
            Sinks::None => false,
            Sinks::All => true,
            Sinks::IfThere => self.has(&name("attn_sinks")),
        };
        let gate = match row.gate {
            AttentionGate::None | AttentionGate::WithinQueries => None,
            AttentionGate::Values => Some(self.linear(&stem("attn_gate"), n_embd, shape.n_embd_out())?),
            AttentionGate::Heads if self.has(&name("attn_gate")) => {
                Some(self.linear(&stem("attn_gate"), n_embd, shape.n_head)?)
            }
            AttentionGate::Heads => None,
        };
        Ok(AttentionWeights {
            projections,
            q_norm: self.norm(q_normed, &name("attn_q_norm"), q_len)?,
            k_norm: self.norm(k_normed && shape.keys_of.is_none(), &name("attn_k_norm"), k_len)?,
            sinks: self.norm(has_sinks, &name("attn_sinks"), shape.n_head)?,
            gate,
            output: self.linear(&stem("attn_output"), shape.n_embd_out(), n_embd)?,
        })
    }

    /// Tensors of a delta net in layer `il`.
    pub(super) fn delta_net(&mut self, il: usize, shape: DeltaShape) -> Result<DeltaWeights<'g>, ModelError> {
        let n_embd = self.hparams.n_embd;
        let stem = |part: &str| format!("blk.{il}.{part}");
        let name = |part: &str| format!("blk.{il}.{part}.weight");
        // Older files of Qwen3-Next have one matrix.
        let inputs = if shape.row.fused_gates && self.has(&name("ssm_in")) {
            DeltaInputs::Fused(self.linear(&stem("ssm_in"), n_embd, shape.channels() + shape.inner())?)
        } else {
            DeltaInputs::Separate {
                qkv: self.linear(&stem("attn_qkv"), n_embd, shape.channels())?,
                gate: self.linear(&stem("attn_gate"), n_embd, shape.inner())?,
            }
        };
        let gates = if shape.row.fused_gates {
            DeltaGates::Fused(self.linear(&stem("ssm_ba"), n_embd, 2 * shape.n_value)?)
        } else {
            DeltaGates::Separate {
                beta: self.linear(&stem("ssm_beta"), n_embd, shape.n_value)?,
                alpha: self.linear(&stem("ssm_alpha"), n_embd, shape.n_value)?,
            }
        };
        Ok(DeltaWeights {
            inputs,
            gates,
            conv: self.required(&name("ssm_conv1d"), &[shape.kernel, shape.channels()])?,
            dt_bias: self.required(&format!("blk.{il}.ssm_dt.bias"), &[shape.n_value])?,
            a: self.required(&format!("blk.{il}.ssm_a"), &[shape.n_value])?,
            norm: self.required(&name("ssm_norm"), &[shape.head])?,
            output: self.linear(&stem("ssm_out"), shape.inner(), n_embd)?,
        })
    }
}
