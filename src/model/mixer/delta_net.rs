//! A gated delta net: short convolution, recurrence, gated norm.

use rayon::prelude::*;

use super::attend::rows_of_heads;
use super::recurrence::{HeadRun, Scratch};
use crate::model::error::ModelError;
use crate::model::group::{Span, Tile};
use crate::model::hparams::DeltaShape;
use crate::model::math;
use crate::model::pass::{Pass, Place, ProductInput, ROWS_PER_TASK};
use crate::model::taps::Taps;
use crate::model::weights::{DeltaGates, DeltaInputs, DeltaWeights, Linear};

/// Channels that are convolved at once: they stay in the first level of cache from tap to tap.
const CONVOLVED: usize = 1024;

/// What the projections give for a tile of `n` tokens.
pub(in crate::model) struct Projected {
    /// What goes into the convolution: query heads, key heads, value heads, `[n, channels]`.
    pub qkv: Vec<f32>,
    /// Gate of the output, `[n, inner]`.
    pub gate: Vec<f32>,
    /// Before the sigmoid, `[n, n_value]`.
    pub step: Vec<f32>,
    /// Before the softplus, `[n, n_value]`.
    pub decay: Vec<f32>,
}

impl<'g> Pass<'_, 'g, '_> {
    /// Gated values of all heads, `[rows of the tile, inner]`.
    pub(super) fn delta_net(
        &self,
        shape: DeltaShape,
        weights: &DeltaWeights<'g>,
        tile: &Tile,
        input: &[f32],
        place: Place<'_>,
        taps: &mut dyn Taps,
    ) -> Result<Vec<f32>, ModelError> {
        let Projected { qkv, gate, mut step, mut decay } =
            self.delta_inputs(shape, weights, tile, input, place, taps)?;
        self.finish_gates(weights, &mut step, &mut decay)?;
        let kernel = weights.conv.decode(&self.overrides, 0)?;
        let mut mixed = convolve(shape, tile, &qkv, &kernel, math::silu);
        drop(qkv);
        self.norm_keys(shape, &mut mixed);
        let mut out = recur(shape, tile, &mixed, &decay, &step);
        self.norm_and_gate(shape, weights, &gate, &mut out)?;
        Ok(out)
    }

    /// From what the projections give to the steps and decays of the recurrence.
    pub(in crate::model) fn finish_gates(
        &self,
        weights: &DeltaWeights<'g>,
        step: &mut [f32],
        decay: &mut [f32],
    ) -> Result<(), ModelError> {
        let dt_bias = weights.dt_bias.decode(&self.overrides, 0)?;
        let a = weights.a.decode(&self.overrides, 0)?;
        step.iter_mut().for_each(|x| *x = math::sigmoid(*x));
        for row in decay.chunks_exact_mut(a.len()) {
            row.iter_mut().zip(&dt_bias).zip(&a).for_each(|((x, bias), a)| *x = math::softplus(*x + bias) * a);
        }
        Ok(())
    }

    /// Makes queries and keys among rows of all channels as long as the recurrence wants them.
    pub(in crate::model) fn norm_keys(&self, shape: DeltaShape, mixed: &mut [f32]) {
        let epsilon = self.model.hparams.norm_epsilon;
        let keys = 2 * shape.n_key * shape.head;
        mixed.par_chunks_mut(shape.channels()).with_min_len(ROWS_PER_TASK).for_each(|row| {
            row[..keys].chunks_exact_mut(shape.head).for_each(|x| math::l2_unit(x, epsilon));
            math::scale(&mut row[..keys / 2], shape.query_scale());
        });
    }

    /// Norms what the recurrence gave and multiplies it by the silu of the gate.
    pub(in crate::model) fn norm_and_gate(
        &self,
        shape: DeltaShape,
        weights: &DeltaWeights<'g>,
        gate: &[f32],
        out: &mut [f32],
    ) -> Result<(), ModelError> {
        let epsilon = self.model.hparams.norm_epsilon;
        let norm = weights.norm.decode(&self.overrides, 0)?;
        out.par_chunks_mut(shape.inner()).zip(gate.par_chunks(shape.inner())).with_min_len(ROWS_PER_TASK).for_each(
            |(row, gate)| {
                row.chunks_exact_mut(shape.head).for_each(|x| math::rms_norm_in_place(x, &norm, epsilon));
                math::silu_mul(gate, row);
            },
        );
        Ok(())
    }

    pub(in crate::model) fn delta_inputs(
        &self,
        shape: DeltaShape,
        weights: &DeltaWeights<'g>,
        tile: &Tile,
        input: &[f32],
        place: Place<'_>,
        taps: &mut dyn Taps,
    ) -> Result<Projected, ModelError> {
        let n_embd = self.model.hparams.n_embd;
        let (inputs, gates) = (&weights.inputs, &weights.gates);
        let mut linears: Vec<&Linear<'g>> = match inputs {
            DeltaInputs::Separate { qkv, gate } => vec![qkv, gate],
            DeltaInputs::Fused(all) => vec![all],
        };
        match gates {
            DeltaGates::Separate { beta, alpha } => linears.extend([beta, alpha]),
            DeltaGates::Fused(both) => linears.push(both),
        }
        let names: Vec<&str> = linears.iter().map(|linear| linear.weight.name).collect();
        self.tap(&names, place.layer, None, input, n_embd, taps)?;
        let mut product = ProductInput::new(input, n_embd, self.options.precision);
        let mut multiplied = |linear: &Linear<'g>| -> Result<Vec<f32>, ModelError> {
            let mut out = vec![0.0; tile.rows.len() * linear.weight.n_out];
            self.linear(linear, 0, &mut product, &mut out, place)?;
            Ok(out)
        };
        let (qkv, gate) = match inputs {
            DeltaInputs::Separate { qkv, gate } => (multiplied(qkv)?, multiplied(gate)?),
            DeltaInputs::Fused(all) => split_inputs(shape, &multiplied(all)?),
        };
        let (step, decay) = match gates {
            DeltaGates::Separate { beta, alpha } => (multiplied(beta)?, multiplied(alpha)?),
            DeltaGates::Fused(both) => split_gates(shape, &multiplied(both)?),
        };
        Ok(Projected { qkv, gate, step, decay })
    }
}

/// From rows that go key head by key head (query, key, its value heads, their gates) to queries, keys and values of all
/// heads, and gates.
pub(in crate::model) fn split_inputs(shape: DeltaShape, rows: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (d, values) = (shape.head, shape.n_value / shape.n_key * shape.head);
    let n = rows.len() / (shape.channels() + shape.inner());
    let (mut qkv, mut gates) = (Vec::with_capacity(n * shape.channels()), Vec::with_capacity(n * shape.inner()));
    for row in rows.chunks_exact(shape.channels() + shape.inner()) {
        let heads = || row.chunks_exact(2 * d + 2 * values);
        heads().for_each(|head| qkv.extend_from_slice(&head[..d]));
        heads().for_each(|head| qkv.extend_from_slice(&head[d..2 * d]));
        heads().for_each(|head| qkv.extend_from_slice(&head[2 * d..2 * d + values]));
        heads().for_each(|head| gates.extend_from_slice(&head[2 * d + values..]));
    }
    (qkv, gates)
}

/// From rows that go key head by key head (steps of its value heads, their decays) to steps and decays of all.
pub(in crate::model) fn split_gates(shape: DeltaShape, rows: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let values = shape.n_value / shape.n_key;
    let heads = || rows.chunks_exact(2 * values);
    let steps = heads().flat_map(|head| &head[..values]).copied().collect();
    let decays = heads().flat_map(|head| &head[values..]).copied().collect();
    (steps, decays)
}

/// A causal convolution of every channel with its own `kernel` (`[channels, taps]`), then `activate`. Before a sequence lie
/// zeros.
pub(in crate::model) fn convolve(
    shape: DeltaShape,
    tile: &Tile,
    x: &[f32],
    kernel: &[f32],
    activate: fn(&mut [f32]),
) -> Vec<f32> {
    let (channels, taps) = (shape.channels(), shape.kernel);
    // One row of factors per tap.
    let mut factors = vec![0.0; kernel.len()];
    for (channel, row) in kernel.chunks_exact(taps).enumerate() {
        row.iter().enumerate().for_each(|(tap, &factor)| factors[tap * channels + channel] = factor);
    }
    let mut out = vec![0.0; x.len()];
    let mut rest = out.as_mut_slice();
    for span in &tile.spans {
        let (rows, tail) = rest.split_at_mut(span.rows.len() * channels);
        rest = tail;
        let before = rows_before(span, taps - 1);
        rows.par_chunks_mut(channels).with_min_len(ROWS_PER_TASK).enumerate().for_each(|(i, row)| {
            // Counted from the first of the rows before the span.
            let source = |tap: usize| match (i + tap).checked_sub(taps - 1) {
                Some(own) => Some(span.rows.start + own),
                None => before.get((i + tap + before.len()).wrapping_sub(taps - 1)).copied(),
            };
            for (part, row) in row.chunks_mut(CONVOLVED).enumerate() {
                let first = part * CONVOLVED;
                for (tap, factors) in factors.chunks_exact(channels).enumerate() {
                    if let Some(source) = source(tap) {
                        let own = &x[source * channels + first..][..row.len()];
                        math::add_product(row, own, &factors[first..][..row.len()]);
                    }
                }
                activate(row);
            }
        });
    }
    out
}

/// Up to `count` rows of the tile that hold the positions right before a span, in order.
fn rows_before(span: &Span, count: usize) -> Vec<usize> {
    let mut rows: Vec<usize> = span.past.iter().rev().flat_map(|rows| rows.clone().rev()).take(count).collect();
    rows.reverse();
    rows
}

/// The recurrence of all value heads over all spans, `[n, inner]`. A span that continues another begins with its state.
pub(in crate::model) fn recur(shape: DeltaShape, tile: &Tile, qkv: &[f32], decay: &[f32], step: &[f32]) -> Vec<f32> {
    let (d, n) = (shape.head, tile.rows.len());
    let channels = shape.channels();
    let mut by_head = vec![0.0; n * shape.inner()];
    let continued: Vec<bool> =
        (0..tile.spans.len()).map(|index| tile.spans.iter().any(|span| span.parent == Some(index))).collect();
    by_head.par_chunks_mut(n * d).enumerate().for_each_init(Scratch::default, |scratch, (head, out)| {
        let firsts = shape.first_channels(head);
        let mut states: Vec<Option<Vec<f32>>> = vec![None; tile.spans.len()];
        let mut rest = out;
        for (index, span) in tile.spans.iter().enumerate() {
            let (out, tail) = rest.split_at_mut(span.rows.len() * d);
            rest = tail;
            let of_head = |values: &[f32]| span.rows.clone().map(|row| values[row * shape.n_value + head]).collect();
            let (decay, step): (Vec<f32>, Vec<f32>) = (of_head(decay), of_head(step));
            let mut state = span.parent.and_then(|parent| states[parent].clone()).unwrap_or_else(|| vec![0.0; d * d]);
            let [q, k, v] = firsts.map(|first| &qkv[span.rows.start * channels + first..]);
            let run = HeadRun { head: d, stride: channels, q, k, v, decay: &decay, step: &step };
            run.run(&mut state, out, scratch);
            if continued[index] {
                states[index] = Some(state);
            }
        }
    });
    rows_of_heads(&by_head, shape.n_value, d)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::arch::{DeltaNet, ValueHeads};
    use crate::model::group::TokenGroup;
    use crate::testing::Random;

    fn shape(heads: ValueHeads) -> DeltaShape {
        let row = DeltaNet { heads, fused_gates: false };
        DeltaShape { row, n_key: 2, n_value: 4, head: 8, kernel: 4 }
    }

    /// Everything behind the projections, for the tokens of a group that has one tile.
    fn mix(shape: DeltaShape, group: &TokenGroup, x: &[f32], decay: &[f32], step: &[f32]) -> Vec<f32> {
        let tile = &group.tiles(usize::MAX)[0];
        let kernel: Vec<f32> = (0..shape.channels() * shape.kernel).map(|i| (i % 7) as f32 * 0.1 - 0.2).collect();
        recur(shape, tile, &convolve(shape, tile, x, &kernel, math::silu), decay, step)
    }

    #[test]
    fn a_continuation_gives_what_the_whole_sequence_gives() {
        let shape = shape(ValueHeads::Tiled);
        let mut random = Random::new(3);
        let n = 150;
        let x: Vec<f32> = (0..n * shape.channels()).map(|_| random.signed()).collect();
        let decay: Vec<f32> = (0..n * shape.n_value).map(|_| -random.signed().abs()).collect();
        let step: Vec<f32> = (0..n * shape.n_value).map(|_| random.signed().abs()).collect();
        let whole = mix(shape, &TokenGroup::from_sequences([vec![0; n]]), &x, &decay, &step);
        for cuts in [vec![100], vec![1, 2], vec![64, 66]] {
            let mut group = TokenGroup::new();
            let mut last = group.push(&vec![0; cuts[0]]);
            for ends in cuts.windows(2) {
                last = group.push_continuation(last, &vec![0; ends[1] - ends[0]]).unwrap();
            }
            group.push_continuation(last, &vec![0; n - cuts[cuts.len() - 1]]).unwrap();
            let got = mix(shape, &group, &x, &decay, &step);
            let worst = got.iter().zip(&whole).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-5, "{cuts:?}: {worst}");
        }
    }

    #[test]
    fn sequences_of_a_tile_do_not_see_each_other() {
        let shape = shape(ValueHeads::Grouped);
        let mut random = Random::new(4);
        let mut values = |n: usize| -> Vec<f32> { (0..n).map(|_| random.signed()).collect() };
        let (x, decay, step) =
            (values(9 * shape.channels()), vec![-0.1; 9 * shape.n_value], vec![0.5; 9 * shape.n_value]);
        let both = mix(shape, &TokenGroup::from_sequences([vec![0; 4], vec![0; 5]]), &x, &decay, &step);
        let second = TokenGroup::from_sequences([vec![0; 5]]);
        let alone =
            mix(shape, &second, &x[4 * shape.channels()..], &decay[4 * shape.n_value..], &step[4 * shape.n_value..]);
        assert_eq!(both[4 * shape.inner()..], alone);
    }

    #[test]
    fn rows_of_older_files_are_sorted_by_kind() {
        let shape = DeltaShape { n_key: 2, n_value: 4, head: 1, ..shape(ValueHeads::Grouped) };
        // Key head by key head: q, k, two values, two gates.
        let row: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let (qkv, gates) = split_inputs(shape, &row);
        assert_eq!(qkv, [0.0, 6.0, 1.0, 7.0, 2.0, 3.0, 8.0, 9.0]);
        assert_eq!(gates, [4.0, 5.0, 10.0, 11.0]);
        let (steps, decays) = split_gates(shape, &row[..8]);
        assert_eq!(steps, [0.0, 1.0, 4.0, 5.0]);
        assert_eq!(decays, [2.0, 3.0, 6.0, 7.0]);
    }
}
