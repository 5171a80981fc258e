//! Tensors of the feed-forward network: one network, or a router and many.

use super::loader::Loader;
use super::{Linear, Weight};
use crate::model::arch::{DenseLayers, Mixture, SharedExpert};
use crate::model::error::ModelError;
use crate::model::hparams::Experts;

/// Gate and up projections.
#[derive(Clone, Debug)]
pub(in crate::model) enum GateUp<'g> {
    Separate {
        gate: Linear<'g>,
        up: Linear<'g>,
    },
    /// One matrix with the rows of gate and up in this order.
    Fused(Linear<'g>),
}

impl<'g> GateUp<'g> {
    /// Names of the matrices.
    pub(in crate::model) fn names(&self) -> Vec<&'g str> {
        match self {
            GateUp::Separate { gate, up } => vec![gate.weight.name, up.weight.name],
            GateUp::Fused(both) => vec![both.weight.name],
        }
    }
}

/// A feed-forward network, or a stack of them.
#[derive(Clone, Debug)]
pub(in crate::model) struct Network<'g> {
    pub gate_up: GateUp<'g>,
    pub down: Linear<'g>,
    pub n_ff: usize,
    /// Limit of gate and up.
    pub clamp: Option<f32>,
}

/// A router and its experts.
#[derive(Clone, Debug)]
pub(in crate::model) struct MixtureWeights<'g> {
    pub router: Linear<'g>,
    /// Added to the scores for the choice of experts, not for their weights.
    pub selection_bias: Option<Weight<'g>>,
    pub experts: Network<'g>,
    /// A shared expert, with its gate where it has one.
    pub shared: Option<(Option<Linear<'g>>, Network<'g>)>,
}

/// What experts beside a dense network need: norms of their own, and a router that sees the residual stream.
#[derive(Clone, Debug)]
pub(in crate::model) struct Beside<'g> {
    pub post_dense_norm: Weight<'g>,
    pub experts_norm: Weight<'g>,
    pub post_experts_norm: Weight<'g>,
    /// Multiplies the router's input.
    pub router_scale: Weight<'g>,
}

/// The feed-forward part of a layer.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)] // one per layer, made once
pub(in crate::model) enum FeedForwardWeights<'g> {
    Dense(Network<'g>),
    Experts(MixtureWeights<'g>),
    Both { dense: Network<'g>, mixture: MixtureWeights<'g>, beside: Beside<'g> },
}

impl<'g> Loader<'g, '_> {
    /// Tensors of the feed-forward part of layer `il`.
    pub(super) fn feed_forward(&mut self, il: usize) -> Result<FeedForwardWeights<'g>, ModelError> {
        let h = self.hparams;
        let layer = &h.layers[il];
        let row = h.arch.feed_forward;
        let name = |part: &str| format!("blk.{il}.{part}");
        let by_router = row.dense_layers == DenseLayers::WithoutRouter;
        let routed = layer.has_experts && (!by_router || self.has(&name("ffn_gate_inp.weight")));
        let fused = row.fused_gate_up;
        let Some(experts) = h.experts.filter(|_| routed) else {
            return Ok(FeedForwardWeights::Dense(self.network(il, layer.n_ff, fused, "")?));
        };
        let mixture = self.mixture(il, experts)?;
        if !row.beside_dense {
            return Ok(FeedForwardWeights::Experts(mixture));
        }
        let norm = |loader: &mut Self, part: &str| loader.required(&name(part), &[h.n_embd]);
        Ok(FeedForwardWeights::Both {
            dense: self.network(il, layer.n_ff, fused, "")?,
            mixture,
            beside: Beside {
                post_dense_norm: norm(self, "post_ffw_norm_1.weight")?,
                experts_norm: norm(self, "pre_ffw_norm_2.weight")?,
                post_experts_norm: norm(self, "post_ffw_norm_2.weight")?,
                router_scale: norm(self, "ffn_gate_inp.scale")?,
            },
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
        let clamp = self.hparams.layers[il].clamps[1];
        Ok(Network { gate_up, down: self.linear(&stem("down"), n_ff, n_embd)?, n_ff, clamp })
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

    fn mixture(&mut self, il: usize, experts: Experts) -> Result<MixtureWeights<'g>, ModelError> {
        let h = self.hparams;
        let row = h.arch.feed_forward;
        let shared = match experts.shared_n_ff {
            None => None,
            Some(width) => {
                let gate = match row.shared {
                    SharedExpert::Gated => Some(Linear {
                        weight: self.required(&format!("blk.{il}.ffn_gate_inp_shexp.weight"), &[h.n_embd])?,
                        bias: None,
                        scale: None,
                    }),
                    _ => None,
                };
                Some((gate, self.network(il, width.unwrap_or(h.layers[il].n_ff), false, "_shexp")?))
            }
        };
        // The scale behind the router's name is one of its input.
        let router_stem = format!("blk.{il}.ffn_gate_inp");
        let router = match row.beside_dense {
            true => Linear {
                weight: self.required(&format!("{router_stem}.weight"), &[h.n_embd, experts.count])?,
                bias: None,
                scale: None,
            },
            false => self.linear(&router_stem, h.n_embd, experts.count)?,
        };
        Ok(MixtureWeights {
            router,
            selection_bias: match row.selection_bias {
                true => self.optional(&format!("blk.{il}.exp_probs_b.bias"), &[experts.count])?,
                false => None,
            },
            experts: self.experts(il, experts)?,
            shared,
        })
    }

    /// The stack of routed experts.
    fn experts(&mut self, il: usize, experts: Experts) -> Result<Network<'g>, ModelError> {
        let h = self.hparams;
        let row = h.arch.feed_forward;
        let count = experts.count;
        let n_ff = match experts.n_ff {
            Some(n_ff) => n_ff,
            None if !row.own_expert_width || matches!(row.mixture, Mixture::Optional(_)) => h.layers[il].n_ff,
            None => h.layers[il].n_ff / experts.used,
        };
        self.check_width(n_ff)?;
        let stem = |part: &str| format!("blk.{il}.ffn_{part}_exps");
        if !self.has(&format!("{}.weight", stem("down"))) && self.has(&format!("blk.{il}.ffn_down.0.weight")) {
            return Err(ModelError::UnexpectedTensor {
                name: format!("blk.{il}.ffn_down.0.weight (one tensor per expert, a form older than ffn_down_exps)"),
                arch: h.arch.name,
            });
        }
        let fused = row.fused_experts && self.has(&format!("{}.weight", stem("gate_up")));
        let gate_up = if fused {
            GateUp::Fused(self.stacked(&stem("gate_up"), h.n_embd, 2 * n_ff, count)?)
        } else {
            GateUp::Separate {
                gate: self.stacked(&stem("gate"), h.n_embd, n_ff, count)?,
                up: self.stacked(&stem("up"), h.n_embd, n_ff, count)?,
            }
        };
        let clamp = h.layers[il].clamps[0];
        Ok(Network { gate_up, down: self.stacked(&stem("down"), n_ff, h.n_embd, count)?, n_ff, clamp })
    }
}
