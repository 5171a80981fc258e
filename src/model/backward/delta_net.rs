//! The way back through a gated delta net: gated norm, recurrence, short convolution, projections.

use rayon::prelude::*;

use super::recurrence::{self, RunGradients};
use super::{Back, derivatives};
use crate::model::error::ModelError;
use crate::model::group::Tile;
use crate::model::hparams::DeltaShape;
use crate::model::math;
use crate::model::mixer::delta_net::{Projected, convolve, recur};
use crate::model::mixer::recurrence::{HeadRun, Scratch};
use crate::model::pass::{Pass, Place, ROWS_PER_TASK};
use crate::model::taps::NoTaps;
use crate::model::weights::{DeltaGates, DeltaInputs, DeltaWeights, Linear};

/// What a delta net over a tile keeps of its forward pass.
pub(super) struct DeltaRun<'a, 'g> {
    shape: DeltaShape,
    weights: &'a DeltaWeights<'g>,
    tile: &'a Tile,
    /// Gate of the output, `[n, inner]`, before its silu.
    gate: Vec<f32>,
    /// What the projection gave for the decays, `[n, n_value]`.
    raw_decay: Vec<f32>,
    decay: Vec<f32>,
    step: Vec<f32>,
    /// Sums of the convolution, `[n, channels]`, before their silu.
    convolved: Vec<f32>,
    /// What enters the recurrence.
    qkv: Vec<f32>,
    /// What the recurrence gave, `[n, inner]`.
    recurred: Vec<f32>,
    mixed: Vec<f32>,
}

impl<'g> DeltaRun<'_, 'g> {
    /// Input of the output matrix.
    pub(super) fn mixed(&self) -> &[f32] {
        &self.mixed
    }
}

impl<'a, 'g> DeltaRun<'a, 'g> {
    pub(super) fn output(&self) -> &'a Linear<'g> {
        &self.weights.output
    }
}

impl<'g> Pass<'_, 'g, '_> {
    /// Runs a delta net over `input`.
    pub(super) fn delta_run<'a>(
        &self,
        shape: DeltaShape,
        weights: &'a DeltaWeights<'g>,
        tile: &'a Tile,
        input: &[f32],
        place: Place<'_>,
    ) -> Result<DeltaRun<'a, 'g>, ModelError> {
        let Projected { qkv, gate, mut step, decay: raw_decay } =
            self.delta_inputs(shape, weights, tile, input, place, &mut NoTaps)?;
        let mut decay = raw_decay.clone();
        self.finish_gates(weights, &mut step, &mut decay)?;
        let kernel = weights.conv.decode(&self.overrides, 0)?;
        let convolved = convolve(shape, tile, &qkv, &kernel, |_| {});
        let mut qkv = activated(&convolved, shape.channels());
        self.norm_keys(shape, &mut qkv);
        let recurred = recur(shape, tile, &qkv, &decay, &step);
        let mut mixed = recurred.clone();
        self.norm_and_gate(shape, weights, &gate, &mut mixed)?;
        Ok(DeltaRun { shape, weights, tile, gate, raw_decay, decay, step, convolved, qkv, recurred, mixed })
    }

    /// Adds to `d_input` the gradient at the input of the projections, given `d` at the input of the output matrix.
    pub(super) fn delta_back(
        &self,
        mut run: DeltaRun<'_, 'g>,
        mut d: Vec<f32>,
        d_input: &mut [f32],
        back: &mut Back<'_, '_>,
    ) -> Result<(), ModelError> {
        let shape = run.shape;
        let mut d_gate = std::mem::take(&mut run.gate);
        self.norm_and_gate_back(&run, &mut d_gate, &mut d)?;
        let mut found = recur_back(&run, &d);
        drop(d);
        self.norm_keys_back(&run, &mut found.qkv);
        found
            .qkv
            .par_chunks_mut(shape.channels())
            .zip(run.convolved.par_chunks(shape.channels()))
            .for_each(|(d, x)| derivatives::silu(x, d));
        let kernel = run.weights.conv.decode(&self.overrides, 0)?;
        let d_qkv = convolve_back(shape, run.tile, &found.qkv, &kernel);
        self.gates_back(&run, &mut found)?;
        match &run.weights.inputs {
            DeltaInputs::Separate { qkv, gate } => {
                self.add_product_back(qkv, 0, None, d_qkv, d_input, back)?;
                self.add_product_back(gate, 0, None, d_gate, d_input, back)?;
            }
            DeltaInputs::Fused(all) => {
                self.add_product_back(all, 0, None, join_inputs(shape, &d_qkv, &d_gate), d_input, back)?;
            }
        }
        let RecurrenceGradients { step, decay, .. } = found;
        match &run.weights.gates {
            DeltaGates::Separate { beta, alpha } => {
                self.add_product_back(beta, 0, None, step, d_input, back)?;
                self.add_product_back(alpha, 0, None, decay, d_input, back)
            }
            DeltaGates::Fused(both) => {
                self.add_product_back(both, 0, None, join_gates(shape, &step, &decay), d_input, back)
            }
        }
    }

    /// Back through the gated norm: `gate` becomes its gradient, and `d` that at what the recurrence gave.
    fn norm_and_gate_back(&self, run: &DeltaRun<'_, 'g>, gate: &mut [f32], d: &mut [f32]) -> Result<(), ModelError> {
        let (head, inner) = (run.shape.head, run.shape.inner());
        let epsilon = self.model.hparams.norm_epsilon;
        let norm = run.weights.norm.decode(&self.overrides, 0)?;
        let rows = d.par_chunks_mut(inner).zip(gate.par_chunks_mut(inner)).zip(run.recurred.par_chunks(inner));
        rows.with_min_len(ROWS_PER_TASK).for_each_init(Vec::new, |normed: &mut Vec<f32>, ((d, gate), x)| {
            normed.clear();
            normed.extend_from_slice(x);
            normed.chunks_exact_mut(head).for_each(|x| math::rms_norm_in_place(x, &norm, epsilon));
            derivatives::silu_mul(gate, normed, d);
            d.copy_from_slice(normed);
            d.chunks_exact_mut(head)
                .zip(x.chunks_exact(head))
                .for_each(|(d, x)| derivatives::rms_norm(x, &norm, epsilon, d));
        });
        Ok(())
    }

    /// Back through the lengths of queries and keys.
    fn norm_keys_back(&self, run: &DeltaRun<'_, 'g>, d: &mut [f32]) {
        let (shape, epsilon) = (run.shape, self.model.hparams.norm_epsilon);
        let (channels, keys) = (shape.channels(), 2 * shape.n_key * shape.head);
        let activated = activated(&run.convolved, channels);
        d.par_chunks_mut(channels).zip(activated.par_chunks(channels)).with_min_len(ROWS_PER_TASK).for_each(
            |(d, x)| {
                math::scale(&mut d[..keys / 2], shape.query_scale());
                let heads = d[..keys].chunks_exact_mut(shape.head).zip(x.chunks_exact(shape.head));
                heads.for_each(|(d, x)| derivatives::l2_unit(x, epsilon, d));
            },
        );
    }

    /// From steps and decays to what the projections gave.
    fn gates_back(&self, run: &DeltaRun<'_, 'g>, found: &mut RecurrenceGradients) -> Result<(), ModelError> {
        let dt_bias = run.weights.dt_bias.decode(&self.overrides, 0)?;
        let a = run.weights.a.decode(&self.overrides, 0)?;
        found.step.iter_mut().zip(&run.step).for_each(|(d, s)| *d *= s * (1.0 - s));
        let rows = found.decay.chunks_exact_mut(a.len()).zip(run.raw_decay.chunks_exact(a.len()));
        for (d, x) in rows {
            for (((d, x), bias), a) in d.iter_mut().zip(x).zip(&dt_bias).zip(&a) {
                *d *= a * math::sigmoid(x + bias);
            }
        }
        Ok(())
    }
}

/// Gradients at what enters the recurrence: `[n, channels]`, `[n, n_value]` twice.
struct RecurrenceGradients {
    qkv: Vec<f32>,
    step: Vec<f32>,
    decay: Vec<f32>,
}

/// Back through the recurrence of all value heads over all sequences. Value heads that share a key head add up, in their order.
fn recur_back(run: &DeltaRun<'_, '_>, d: &[f32]) -> RecurrenceGradients {
    let (shape, tile) = (run.shape, run.tile);
    let (head, channels, n_value, inner) = (shape.head, shape.channels(), shape.n_value, shape.inner());
    let tasks: Vec<(usize, usize)> =
        (0..tile.spans.len()).flat_map(|span| (0..n_value).map(move |of| (span, of))).collect();
    let found: Vec<RunGradients> = tasks
        .par_iter()
        .map_init(Scratch::default, |scratch, &(span, of)| {
            let rows = tile.spans[span].rows.clone();
            let of_head = |values: &[f32]| -> Vec<f32> { rows.clone().map(|row| values[row * n_value + of]).collect() };
            let (decay, step) = (of_head(&run.decay), of_head(&run.step));
            let d: Vec<f32> = rows.clone().flat_map(|row| &d[row * inner + of * head..][..head]).copied().collect();
            let [q, k, v] = shape.first_channels(of).map(|first| &run.qkv[rows.start * channels + first..]);
            let head_run = HeadRun { head, stride: channels, q, k, v, decay: &decay, step: &step };
            recurrence::back(&head_run, &d, scratch)
        })
        .collect();
    let n = tile.rows.len();
    let mut all = RecurrenceGradients {
        qkv: vec![0.0; n * channels],
        step: vec![0.0; n * n_value],
        decay: vec![0.0; n * n_value],
    };
    for ((span, of), found) in tasks.into_iter().zip(&found) {
        let firsts = shape.first_channels(of);
        for (at, row) in tile.spans[span].rows.clone().enumerate() {
            for (first, values) in firsts.iter().zip([&found.q, &found.k, &found.v]) {
                math::add(&mut all.qkv[row * channels + first..][..head], &values[at * head..][..head]);
            }
            all.step[row * n_value + of] = found.step[at];
            all.decay[row * n_value + of] = found.decay[at];
        }
    }
    all
}

/// Silu of rows of all channels.
fn activated(convolved: &[f32], channels: usize) -> Vec<f32> {
    let mut out = convolved.to_vec();
    out.par_chunks_mut(channels).for_each(math::silu);
    out
}

/// Back through the convolution of every channel with its own `kernel`: each row has had a part in those after it, to the end
/// of its sequence.
fn convolve_back(shape: DeltaShape, tile: &Tile, d: &[f32], kernel: &[f32]) -> Vec<f32> {
    let (channels, taps) = (shape.channels(), shape.kernel);
    // One row of factors per tap.
    let mut factors = vec![0.0; kernel.len()];
    for (channel, row) in kernel.chunks_exact(taps).enumerate() {
        row.iter().enumerate().for_each(|(tap, &factor)| factors[tap * channels + channel] = factor);
    }
    let mut out = vec![0.0; d.len()];
    for span in &tile.spans {
        let rows = &mut out[span.rows.start * channels..span.rows.end * channels];
        rows.par_chunks_mut(channels).with_min_len(ROWS_PER_TASK).enumerate().for_each(|(i, row)| {
            for (tap, factors) in factors.chunks_exact(channels).enumerate() {
                let target = span.rows.start + i + taps - 1 - tap;
                if target < span.rows.end {
                    math::add_product(row, &d[target * channels..][..channels], factors);
                }
            }
        });
    }
    out
}

/// To rows that go key head by key head: query, key, its value heads, their gates.
fn join_inputs(shape: DeltaShape, qkv: &[f32], gates: &[f32]) -> Vec<f32> {
    let (d, values) = (shape.head, shape.n_value / shape.n_key * shape.head);
    let mut joined = Vec::with_capacity(qkv.len() + gates.len());
    for (qkv, gates) in qkv.chunks_exact(shape.channels()).zip(gates.chunks_exact(shape.inner())) {
        for head in 0..shape.n_key {
            joined.extend_from_slice(&qkv[head * d..][..d]);
            joined.extend_from_slice(&qkv[(shape.n_key + head) * d..][..d]);
            joined.extend_from_slice(&qkv[2 * shape.n_key * d + head * values..][..values]);
            joined.extend_from_slice(&gates[head * values..][..values]);
        }
    }
    joined
}

/// To rows that go key head by key head: steps of its value heads, their decays.
fn join_gates(shape: DeltaShape, steps: &[f32], decays: &[f32]) -> Vec<f32> {
    let values = shape.n_value / shape.n_key;
    let heads = steps.chunks_exact(values).zip(decays.chunks_exact(values));
    heads.flat_map(|(steps, decays)| steps.iter().chain(decays)).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::arch::{DeltaNet, ValueHeads};
    use crate::model::group::TokenGroup;
    use crate::model::mixer::delta_net::{split_gates, split_inputs};
    use crate::testing::Random;

    fn shape() -> DeltaShape {
        let row = DeltaNet { heads: ValueHeads::Grouped, fused_gates: false };
        DeltaShape { row, n_key: 2, n_value: 4, head: 3, kernel: 4 }
    }

    #[test]
    fn joining_undoes_splitting() {
        let shape = shape();
        let rows: Vec<f32> = (0..2 * (shape.channels() + shape.inner())).map(|i| i as f32).collect();
        let (qkv, gates) = split_inputs(shape, &rows);
        assert_eq!(join_inputs(shape, &qkv, &gates), rows);
        let (steps, decays) = split_gates(shape, &rows[..24]);
        assert_eq!(join_gates(shape, &steps, &decays), rows[..24]);
    }

    #[test]
    fn the_convolution_and_its_way_back_are_each_others_transpose() {
        let shape = shape();
        let group = TokenGroup::from_sequences([vec![0; 9], vec![0; 2]]);
        let tile = &group.tiles(usize::MAX)[0];
        let mut random = Random::new(2);
        let mut values = |n: usize| -> Vec<f32> { (0..n).map(|_| random.signed()).collect() };
        let n = 11 * shape.channels();
        let (x, d, kernel) = (values(n), values(n), values(shape.channels() * shape.kernel));
        let forward = convolve(shape, tile, &x, &kernel, |_| {});
        let back = convolve_back(shape, tile, &d, &kernel);
        let (one, other) = (derivatives::dot(&forward, &d), derivatives::dot(&x, &back));
        assert!((one - other).abs() < 1e-4, "{one} {other}");
    }
}
