//! Attention of a layer: projections, norms, rotary embedding, gates around the core.

use rayon::prelude::*;

use super::attend::{AttentionParams, attend};
use crate::model::activation_rounding::ActivationRounding;
use crate::model::arch::{AttentionGate, QkNorm, RopePairs};
use crate::model::error::ModelError;
use crate::model::group::{Kept, Tile, TokenGroup};
use crate::model::hparams::AttentionShape;
use crate::model::math;
use crate::model::pass::{Activations, Pass, Place, ProductInput, ROWS_PER_TASK};
use crate::model::rope::RopeTable;
use crate::model::taps::Taps;
use crate::model::weights::{AttentionWeights, Linear, Projections};

/// Attention of one layer over one tile.
pub(in crate::model) struct Heads<'a, 'm, 'g, 'o> {
    pub pass: &'a Pass<'m, 'g, 'o>,
    pub shape: &'a AttentionShape,
    pub weights: &'a AttentionWeights<'g>,
    pub tile: &'a Tile,
    pub place: Place<'a>,
}

/// What the projections give, before anything else happens to it.
#[derive(Clone, Default)]
pub(in crate::model) struct Projected {
    /// `[n, n_head * head_k]`.
    pub q: Vec<f32>,
    /// `[n, n_head_kv * head_k]`, empty where an earlier layer's are used.
    pub k: Vec<f32>,
    /// `[n, n_head_kv * head_v]`, empty where keys are the values.
    pub v: Vec<f32>,
    /// One value per head, or per value; empty without a gate.
    pub gate: Vec<f32>,
}

impl<'g> Heads<'_, '_, 'g, '_> {
    /// Mixed values of all heads, `[rows of the tile, n_head * head_v]`. Keys and values come from `earlier` where the layer
    /// has none of its own, and are added to `kept` where later layers need them.
    pub(super) fn mix(
        &self,
        group: &TokenGroup,
        input: &[f32],
        rope: Option<&RopeTable>,
        earlier: Option<&Kept>,
        kept: &mut Kept,
        taps: &mut dyn Taps,
    ) -> Result<Vec<f32>, ModelError> {
        let shape = self.shape;
        let mut projected = self.project(input, taps)?;
        let positions = group.positions(self.tile.rows.clone());
        self.finish_queries(&mut projected.q, rope, &positions)?;
        if earlier.is_none() {
            self.finish_keys(&mut projected, rope, &positions)?;
            if shape.keys_are_kept {
                kept.k.extend_from_slice(&projected.k);
                kept.v.extend_from_slice(&projected.v);
            }
        }
        let Projected { q, k, v, gate } = projected;
        let (k, v) = match earlier {
            Some(earlier) => earlier.rows(self.tile.rows.clone(), group.len()),
            None => (k.as_slice(), v.as_slice()),
        };
        let sinks = self.pass.decode_optional(self.weights.sinks.as_ref())?;
        let mut mixed = attend(self.tile, &self.params(sinks.as_deref()), &q, k, v);
        self.gate(&mut mixed, &gate);
        Ok(mixed)
    }

    /// Shapes and rules of the attention itself.
    pub(in crate::model) fn params<'s>(&self, sinks: Option<&'s [f32]>) -> AttentionParams<'s> {
        let (h, shape) = (&self.pass.model.hparams, self.shape);
        AttentionParams {
            n_head: shape.n_head,
            n_head_kv: shape.n_head_kv,
            head_k: shape.head_k,
            head_v: shape.head_v,
            scale: shape.score_scale,
            cap: h.score_cap,
            window: shape.window,
            causal: h.causal,
            sinks,
        }
    }

    /// From what the projection gives to queries.
    pub(in crate::model) fn finish_queries(
        &self,
        q: &mut [f32],
        rope: Option<&RopeTable>,
        positions: &[usize],
    ) -> Result<(), ModelError> {
        let width = self.shape.n_embd_q();
        let norm = self.pass.decode_optional(self.weights.q_norm.as_ref())?;
        self.finish(q, width, norm.as_deref(), rope, positions);
        if let Some(temperature) = self.shape.temperature {
            q.par_chunks_mut(width)
                .zip(positions)
                .with_min_len(ROWS_PER_TASK)
                .for_each(|(row, &position)| math::scale(row, temperature.at(position)));
        }
        Ok(())
    }

    /// From what the projections give to keys and values of the layer's own.
    pub(in crate::model) fn finish_keys(
        &self,
        projected: &mut Projected,
        rope: Option<&RopeTable>,
        positions: &[usize],
    ) -> Result<(), ModelError> {
        let (h, shape) = (&self.pass.model.hparams, self.shape);
        let Projected { k, v, .. } = projected;
        if v.is_empty() {
            v.clone_from(k);
        }
        if h.arch.attention.values_normed {
            v.par_chunks_mut(shape.head_v).with_min_len(ROWS_PER_TASK).for_each(|x| math::rms_unit(x, h.norm_epsilon));
        }
        let norm = self.pass.decode_optional(self.weights.k_norm.as_ref())?;
        self.finish(k, shape.n_embd_k(), norm.as_deref(), rope, positions);
        if self.pass.options.activations == Activations::Ggml {
            for values in [k, v] {
                values.par_chunks_mut(4096).for_each(|part| ActivationRounding::F16.apply(part));
            }
        }
        Ok(())
    }

    /// Norm and rotary embedding of queries or keys, in the architecture's order.
    fn finish(
        &self,
        values: &mut [f32],
        width: usize,
        norm: Option<&[f32]>,
        rope: Option<&RopeTable>,
        positions: &[usize],
    ) {
        let h = &self.pass.model.hparams;
        let (head, pairs) = (self.shape.head_k, self.rope_pairs());
        let late = h.arch.attention.qk_norm == QkNorm::HeadAfterRope;
        let apply_norm = |row: &mut [f32]| {
            if let Some(norm) = norm {
                // One head, or all of them.
                row.chunks_exact_mut(norm.len()).for_each(|x| math::rms_norm_in_place(x, norm, h.norm_epsilon));
            }
        };
        values.par_chunks_mut(width).zip(positions).with_min_len(ROWS_PER_TASK).for_each(|(row, &position)| {
            if !late {
                apply_norm(row);
            }
            if let Some(rope) = rope {
                rope.apply(pairs, position, row, head);
            }
            if late {
                apply_norm(row);
            }
            if self.shape.unweighted_norm {
                row.chunks_exact_mut(head).for_each(|x| math::rms_unit(x, h.norm_epsilon));
            }
        });
    }

    /// Which values of a head turn together.
    pub(in crate::model) fn rope_pairs(&self) -> RopePairs {
        let h = &self.pass.model.hparams;
        if h.rope.in_halves { RopePairs::Halves } else { h.arch.rope.pairs }
    }

    pub(in crate::model) fn project(&self, input: &[f32], taps: &mut dyn Taps) -> Result<Projected, ModelError> {
        let (pass, shape) = (self.pass, self.shape);
        let n_embd = pass.model.hparams.n_embd;
        let rows = self.tile.rows.len();
        let mut product = ProductInput::new(input, n_embd, pass.options.precision);
        let mut names: Vec<&str> = Vec::new();
        match &self.weights.projections {
            Projections::Separate { q, k, v } => {
                names.extend([Some(q), k.as_ref(), v.as_ref()].into_iter().flatten().map(|linear| linear.weight.name));
            }
            Projections::Fused(qkv) => names.push(qkv.weight.name),
        }
        names.extend(self.weights.gate.as_ref().map(|gate| gate.weight.name));
        pass.tap(&names, self.place.layer, None, input, n_embd, taps)?;
        let mut multiplied = |linear: &Linear<'g>| -> Result<Vec<f32>, ModelError> {
            let mut out = vec![0.0; rows * linear.weight.n_out];
            pass.linear(linear, 0, &mut product, &mut out, self.place)?;
            Ok(out)
        };
        let mut projected = Projected::default();
        match &self.weights.projections {
            Projections::Separate { q, k, v } => {
                projected.q = multiplied(q)?;
                if let Some(k) = k {
                    projected.k = multiplied(k)?;
                }
                if let Some(v) = v {
                    projected.v = multiplied(v)?;
                }
            }
            Projections::Fused(qkv) => {
                let all = multiplied(qkv)?;
                let (n_k, n_v) = (shape.n_embd_k(), shape.n_embd_v());
                let n_q = qkv.weight.n_out - n_k - n_v;
                [projected.q, projected.k, projected.v] = columns(&all, [n_q, n_k, n_v]);
            }
        }
        if let Some(gate) = &self.weights.gate {
            projected.gate = multiplied(gate)?;
        }
        if pass.model.hparams.arch.attention.gate == AttentionGate::WithinQueries {
            let head = shape.head_k;
            [projected.q, projected.gate, _] = columns(&projected.q, [head, head, 0]);
        }
        Ok(projected)
    }

    /// Multiplies what attention gives by the sigmoid of the gate, one per head or per value.
    pub(in crate::model) fn gate(&self, mixed: &mut [f32], gate: &[f32]) {
        if gate.is_empty() {
            return;
        }
        let per_gate = mixed.len() / gate.len();
        let rows = mixed.par_chunks_mut(per_gate * 64).zip(gate.par_chunks(64)).with_min_len(ROWS_PER_TASK);
        rows.for_each(|(values, gates)| match per_gate {
            1 => math::sigmoid_mul(gates, values),
            _ => {
                for (values, &gate) in values.chunks_exact_mut(per_gate).zip(gates) {
                    math::scale(values, math::sigmoid(gate));
                }
            }
        });
    }
}

/// Cuts rows into three parts of these widths.
fn columns(rows: &[f32], widths: [usize; 3]) -> [Vec<f32>; 3] {
    let all: usize = widths.iter().sum();
    let n = rows.len() / all;
    let mut first = 0;
    widths.map(|width| {
        let mut part = Vec::with_capacity(n * width);
        for row in rows.chunks_exact(all) {
            part.extend_from_slice(&row[first..first + width]);
        }
        first += width;
        part
    })
}
