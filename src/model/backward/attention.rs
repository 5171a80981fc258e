//! The way back through attention's gates, rotary embedding, norms and projections.

use rayon::prelude::*;

use super::attend::{Attended, attend};
use super::{Back, Earlier, LayerTile, add_rows, derivatives};
use crate::model::arch::{AttentionGate, QkNorm};
use crate::model::error::ModelError;
use crate::model::math;
use crate::model::mixer::attend as forward;
use crate::model::mixer::attention::{Heads, Projected};
use crate::model::pass::ROWS_PER_TASK;
use crate::model::rope::RopeTable;
use crate::model::taps::NoTaps;
use crate::model::weights::{Linear, Projections};

/// What attention over a tile keeps of its forward pass.
pub(super) struct AttentionRun<'a, 'm, 'g, 'o> {
    heads: Heads<'a, 'm, 'g, 'o>,
    rope: Option<&'a RopeTable>,
    positions: &'a [usize],
    /// As the projections gave them.
    raw: Projected,
    /// Normed, turned, scaled; keys and values are empty where an earlier layer's are used.
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// Before the gate; empty without one.
    ungated: Vec<f32>,
    mixed: Vec<f32>,
    q_norm: Option<Vec<f32>>,
    k_norm: Option<Vec<f32>>,
    sinks: Option<Vec<f32>>,
}

impl<'a, 'm, 'g, 'o> AttentionRun<'a, 'm, 'g, 'o> {
    /// Runs attention over `input`, with the keys and values of an earlier layer if it uses those.
    pub(super) fn new(
        heads: Heads<'a, 'm, 'g, 'o>,
        input: &[f32],
        layer_tile: &'a LayerTile<'_, 'g>,
        earlier: Option<(&[f32], &[f32])>,
    ) -> Result<Self, ModelError> {
        let (pass, weights) = (heads.pass, heads.weights);
        let (rope, positions) = (layer_tile.rope, layer_tile.positions.as_slice());
        let raw = heads.project(input, &mut NoTaps)?;
        let mut finished = Projected { gate: Vec::new(), ..raw.clone() };
        heads.finish_queries(&mut finished.q, rope, positions)?;
        if earlier.is_none() {
            heads.finish_keys(&mut finished, rope, positions)?;
        }
        let Projected { q, k, v, .. } = finished;
        let sinks = pass.decode_optional(weights.sinks.as_ref())?;
        let (keys, values) = earlier.unwrap_or((&k, &v));
        let mut mixed = forward::attend(heads.tile, &heads.params(sinks.as_deref()), &q, keys, values);
        let ungated = if raw.gate.is_empty() { Vec::new() } else { mixed.clone() };
        heads.gate(&mut mixed, &raw.gate);
        let q_norm = pass.decode_optional(weights.q_norm.as_ref())?;
        let k_norm = pass.decode_optional(weights.k_norm.as_ref())?;
        Ok(AttentionRun { heads, rope, positions, raw, q, k, v, ungated, mixed, q_norm, k_norm, sinks })
    }

    pub(super) fn output(&self) -> &'a Linear<'g> {
        &self.heads.weights.output
    }

    /// Input of the output matrix.
    pub(super) fn mixed(&self) -> &[f32] {
        &self.mixed
    }

    /// Adds to `d_input` the gradient at the input of the projections, given `d` at the input of the output matrix. `own` is
    /// the gradient at the layer's keys and values from later layers; gradients at those of an earlier layer are added to
    /// `earlier`.
    pub(super) fn back(
        mut self,
        mut d: Vec<f32>,
        earlier: Option<&mut Earlier<'_>>,
        own: Option<(&[f32], &[f32])>,
        d_input: &mut [f32],
        back: &mut Back<'_, '_>,
    ) -> Result<(), ModelError> {
        let gate = std::mem::take(&mut self.raw.gate);
        let d_gate = gate_back(gate, &self.ungated, &mut d);
        let params = self.heads.params(self.sinks.as_deref());
        let (k, v) = match &earlier {
            Some(earlier) => (earlier.k, earlier.v),
            None => (self.k.as_slice(), self.v.as_slice()),
        };
        let mut found = attend(self.heads.tile, &params, [&self.q, k, v], &d);
        drop(d);
        self.queries_back(&mut found.q);
        let own_keys = match earlier {
            Some(earlier) => {
                add_rows(earlier.d_k, &found.k);
                add_rows(earlier.d_v, &found.v);
                None
            }
            None => Some(()),
        };
        if let Some((d_k, d_v)) = own {
            add_rows(&mut found.k, d_k);
            add_rows(&mut found.v, d_v);
        }
        if own_keys.is_some() {
            self.keys_back(&mut found);
        } else {
            (found.k, found.v) = (Vec::new(), Vec::new());
        }
        self.projections_back(found, d_gate, d_input, back)
    }

    fn queries_back(&self, d: &mut [f32]) {
        let shape = self.heads.shape;
        let width = shape.n_embd_q();
        if let Some(temperature) = shape.temperature {
            d.par_chunks_mut(width)
                .zip(self.positions)
                .with_min_len(ROWS_PER_TASK)
                .for_each(|(row, &position)| math::scale(row, temperature.at(position)));
        }
        self.finish_back(&self.raw.q, width, self.q_norm.as_deref(), d);
    }

    /// From finished keys and values to what the projections gave; the gradient at values ends up in the keys' where keys are
    /// the values.
    fn keys_back(&self, found: &mut Attended) {
        let (h, shape) = (&self.heads.pass.model().hparams, self.heads.shape);
        let raw = if self.raw.v.is_empty() { &self.raw.k } else { &self.raw.v };
        if h.arch.attention.values_normed {
            found
                .v
                .par_chunks_mut(shape.head_v)
                .zip(raw.par_chunks(shape.head_v))
                .with_min_len(ROWS_PER_TASK)
                .for_each(|(d, x)| derivatives::rms_unit(x, h.norm_epsilon, d));
        }
        self.finish_back(&self.raw.k, shape.n_embd_k(), self.k_norm.as_deref(), &mut found.k);
        if self.raw.v.is_empty() {
            add_rows(&mut found.k, &found.v);
            found.v.clear();
        }
    }

    /// Back through norm and rotary embedding of queries or keys, which `raw` went into.
    fn finish_back(&self, raw: &[f32], width: usize, norm: Option<&[f32]>, d: &mut [f32]) {
        let h = &self.heads.pass.model().hparams;
        let (head, pairs, epsilon) = (self.heads.shape.head_k, self.heads.rope_pairs(), h.norm_epsilon);
        let late = h.arch.attention.qk_norm == QkNorm::HeadAfterRope;
        let unweighted = self.heads.shape.unweighted_norm;
        let norm_back = |x: &[f32], d: &mut [f32]| {
            if let Some(norm) = norm {
                // One head, or all of them.
                let heads = d.chunks_exact_mut(norm.len()).zip(x.chunks_exact(norm.len()));
                heads.for_each(|(d, x)| derivatives::rms_norm(x, norm, epsilon, d));
            }
        };
        d.par_chunks_mut(width)
            .zip(raw.par_chunks(width))
            .zip(self.positions)
            .with_min_len(ROWS_PER_TASK)
            .for_each_init(Vec::new, |turned: &mut Vec<f32>, ((d, x), &position)| {
                turned.clear();
                turned.extend_from_slice(x);
                if let Some(rope) = self.rope.filter(|_| late || unweighted) {
                    rope.apply(pairs, position, turned, head);
                }
                if unweighted {
                    let heads = d.chunks_exact_mut(head).zip(turned.chunks_exact(head));
                    heads.for_each(|(d, x)| derivatives::rms_unit(x, epsilon, d));
                }
                if late {
                    norm_back(turned, d);
                }
                if let Some(rope) = self.rope {
                    rope.apply_transposed(pairs, position, d, head);
                }
                if !late {
                    norm_back(x, d);
                }
            });
    }

    fn projections_back(
        self,
        found: Attended,
        d_gate: Vec<f32>,
        d_input: &mut [f32],
        back: &mut Back<'_, '_>,
    ) -> Result<(), ModelError> {
        let (pass, weights, head) = (self.heads.pass, self.heads.weights, self.heads.shape.head_k);
        let Attended { mut q, k, v } = found;
        let within = pass.model().hparams.arch.attention.gate == AttentionGate::WithinQueries;
        let mut d_gate = Some(d_gate);
        if within {
            q = join(&[(&q, head), (&d_gate.take().unwrap_or_default(), head)]);
        }
        match &weights.projections {
            Projections::Separate { q: w_q, k: w_k, v: w_v } => {
                pass.add_product_back(w_q, 0, None, q, d_input, back)?;
                for (linear, d) in [(w_k, k), (w_v, v)] {
                    if let Some(linear) = linear {
                        pass.add_product_back(linear, 0, None, d, d_input, back)?;
                    }
                }
            }
            Projections::Fused(qkv) => {
                let n = self.positions.len().max(1);
                let all = join(&[(&q, q.len() / n), (&k, k.len() / n), (&v, v.len() / n)]);
                pass.add_product_back(qkv, 0, None, all, d_input, back)?;
            }
        }
        if let (Some(linear), Some(d)) = (&weights.gate, d_gate) {
            pass.add_product_back(linear, 0, None, d, d_input, back)?;
        }
        Ok(())
    }
}

/// Back through the sigmoid of a gate, one per head or per value: turns `d` into the gradient at `ungated` and gives that at
/// the gate.
fn gate_back(mut gate: Vec<f32>, ungated: &[f32], d: &mut [f32]) -> Vec<f32> {
    if gate.is_empty() {
        return gate;
    }
    let per_gate = d.len() / gate.len();
    let rows = d.par_chunks_mut(per_gate * 64).zip(ungated.par_chunks(per_gate * 64)).zip(gate.par_chunks_mut(64));
    rows.with_min_len(ROWS_PER_TASK).for_each(|((d, x), gates)| match per_gate {
        1 => derivatives::sigmoid_mul(gates, x, d),
        _ => {
            for ((d, x), gate) in d.chunks_exact_mut(per_gate).zip(x.chunks_exact(per_gate)).zip(gates) {
                let share = math::sigmoid(*gate);
                *gate = derivatives::dot(x, d) as f32 * share * (1.0 - share);
                math::scale(d, share);
            }
        }
    });
    gate
}

/// Puts rows of several parts, each with its width, behind each other.
pub(super) fn join(parts: &[(&Vec<f32>, usize)]) -> Vec<f32> {
    let n = parts.iter().map(|(values, width)| values.len() / width.max(&1)).max().unwrap_or(0);
    let mut joined = Vec::with_capacity(parts.iter().map(|(values, _)| values.len()).sum());
    for row in 0..n {
        parts.iter().for_each(|(values, width)| joined.extend_from_slice(&values[row * width..][..*width]));
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_joined_row_by_row() {
        let (a, b) = (vec![1.0, 2.0, 3.0, 4.0], vec![5.0, 6.0]);
        assert_eq!(join(&[(&a, 2), (&b, 1)]), [1.0, 2.0, 5.0, 3.0, 4.0, 6.0]);
    }

    #[test]
    fn a_gate_of_a_head_gathers_what_all_its_values_say() {
        let (x, mut d) = (vec![2.0, -1.0, 0.5, 3.0], vec![1.0, 1.0, 2.0, 0.0]);
        let gate = gate_back(vec![0.0, 0.0], &x, &mut d);
        assert_eq!(gate, [0.25, 0.25]);
        assert_eq!(d, [0.5, 0.5, 1.0, 0.0]);
    }
}
