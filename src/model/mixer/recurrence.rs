//! The gated delta rule of one head, in blocks.
//!
//! A head keeps a state `S`, `[head, head]` (keys by values). Token `t` with query `q`, key `k`, value `v`, decay `g` and step
//! `beta` does, in this order (llama.cpp b10605, `src/models/delta-net-base.cpp`; Yang et al., Gated Delta Networks, 2024):
//!
//! ```text
//! S <- exp(g) S;   u = beta (v - S^T k);   S <- S + k u^T;   o = S^T q
//! ```
//!
//! Over a block of tokens with decays summed up, `G_t`, this is a triangular system for all `u` at once:
//!
//! ```text
//! u_t = beta_t (v_t - exp(G_t) S^T k_t - sum over s < t of exp(G_t - G_s) (k_t . k_s) u_s)
//! o_t = exp(G_t) S^T q_t + sum over s <= t of exp(G_t - G_s) (q_t . k_s) u_s
//! S'  = exp(G) S + sum over s of exp(G - G_s) k_s u_s^T
//! ```
//!
//! so that nearly all of the work is in matrix products.

use crate::compute::{GemmOperand, gemm_f32};
use crate::model::math;

/// Tokens of a block.
pub(in crate::model) const BLOCK: usize = 64;

/// Inputs of one head over a run of tokens: `[n, head]` each, whose rows are `stride` apart, and one decay and step per token.
pub(in crate::model) struct HeadRun<'a> {
    pub head: usize,
    pub stride: usize,
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
    pub decay: &'a [f32],
    pub step: &'a [f32],
}

/// Memory of one thread's blocks.
#[derive(Default)]
pub(in crate::model) struct Scratch {
    /// Updates, `[block, head]`.
    pub u: Vec<f32>,
    /// What is left at a token (row) of each token before and of itself, `[block, block]`.
    pub left: Vec<f32>,
    /// Products of keys, or of queries with keys, `[block, block]`.
    pub products: Vec<f32>,
    /// Keys as columns, `[head, block]`.
    columns: Vec<f32>,
}

impl<'a> HeadRun<'a> {
    /// Runs all tokens from `state`, which becomes that after the last one; `out` is `[n, head]`.
    pub(in crate::model) fn run(&self, state: &mut [f32], out: &mut [f32], scratch: &mut Scratch) {
        for (index, out) in out.chunks_mut(BLOCK * self.head).enumerate() {
            self.block(index).run(state, out, scratch);
        }
    }

    /// Block `index` of the run's tokens.
    pub(in crate::model) fn block(&self, index: usize) -> Block<'a> {
        let (d, first) = (self.head, index * BLOCK);
        let n = BLOCK.min(self.decay.len() - first);
        let rows = |all: &'a [f32]| &all[first * self.stride..][..(n - 1) * self.stride + d];
        let (q, k, v) = (rows(self.q), rows(self.k), rows(self.v));
        Block { d, n, stride: self.stride, q, k, v, decay: &self.decay[first..][..n], step: &self.step[first..][..n] }
    }
}

/// The tokens of a run that are taken together: `n` of them, at most [`BLOCK`].
pub(in crate::model) struct Block<'a> {
    pub d: usize,
    pub n: usize,
    pub stride: usize,
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
    decay: &'a [f32],
    pub step: &'a [f32],
}

impl Block<'_> {
    /// Leaves in the scratch the updates, what is left of each token at each, and the products of the keys. Gives what is left
    /// at each token of `state`. Each update is shown before it is multiplied by its step.
    pub(in crate::model) fn updates(
        &self,
        state: &[f32],
        scratch: &mut Scratch,
        mut before_step: impl FnMut(usize, &[f32]),
    ) -> [f32; BLOCK] {
        let (d, n, stride) = (self.d, self.n, self.stride);
        // Sums in f64: their differences are what counts.
        let mut sums = [0.0f64; BLOCK];
        let mut sum = 0.0;
        for (total, &decay) in sums.iter_mut().zip(self.decay) {
            sum += f64::from(decay);
            *total = sum;
        }
        let of_state = sums.map(|sum| math::exp(sum as f32));
        let Scratch { u, left, products, .. } = scratch;
        left.clear();
        left.resize(n * n, 0.0);
        for (t, row) in left.chunks_exact_mut(n).enumerate() {
            math::decays(&sums[..=t], sums[t], &mut row[..=t]);
        }
        u.clear();
        u.resize(n * d, 0.0);
        products.clear();
        products.resize(n * n, 0.0);

        gemm_f32(n, d, d, self.k, stride, GemmOperand::Plain { data: state, stride: d }, u, d, false);
        let keys = GemmOperand::Transposed { data: self.k, stride };
        gemm_f32(n, n, d, self.k, stride, keys, products, n, false);
        for t in 0..n {
            let (before, rest) = u.split_at_mut(t * d);
            let row = &mut rest[..d];
            for (u, &v) in row.iter_mut().zip(&self.v[t * stride..]) {
                *u = v - of_state[t] * *u;
            }
            for (s, earlier) in before.chunks_exact(d).enumerate() {
                math::add_scaled(row, earlier, -left[t * n + s] * products[t * n + s]);
            }
            before_step(t, row);
            math::scale(row, self.step[t]);
        }
        of_state
    }

    pub(in crate::model) fn run(&self, state: &mut [f32], out: &mut [f32], scratch: &mut Scratch) {
        let (d, n, stride) = (self.d, self.n, self.stride);
        let of_state = self.updates(state, scratch, |_, _| {});
        let Scratch { u, left, products, columns } = scratch;
        gemm_f32(n, d, d, self.q, stride, GemmOperand::Plain { data: state, stride: d }, out, d, false);
        let keys = GemmOperand::Transposed { data: self.k, stride };
        gemm_f32(n, n, d, self.q, stride, keys, products, n, false);
        for (t, (row, left)) in products.chunks_exact_mut(n).zip(left.chunks_exact(n)).enumerate() {
            let (seen, unseen) = row.split_at_mut(t + 1);
            seen.iter_mut().zip(left).for_each(|(product, left)| *product *= left);
            unseen.fill(0.0);
            math::scale(&mut out[t * d..][..d], of_state[t]);
        }
        let updates = GemmOperand::Plain { data: u, stride: d };
        gemm_f32(n, d, n, products, n, updates, out, d, true);

        columns.clear();
        columns.resize(d * n, 0.0);
        for (s, (key, left)) in self.k.chunks(stride).zip(&left[(n - 1) * n..]).enumerate() {
            key[..d].iter().enumerate().for_each(|(i, &k)| columns[i * n + s] = left * k);
        }
        math::scale(state, of_state[n - 1]);
        let updates = GemmOperand::Plain { data: u, stride: d };
        gemm_f32(d, d, n, columns, n, updates, state, d, true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    /// The recurrence as it is written above, in f64.
    fn truth(run: &HeadRun<'_>, state: &mut [f64]) -> Vec<f64> {
        let d = run.head;
        let mut out = Vec::new();
        for (t, (&decay, &step)) in run.decay.iter().zip(run.step).enumerate() {
            let row = |values: &[f32]| -> Vec<f64> { values[t * d..][..d].iter().map(|&x| f64::from(x)).collect() };
            let (q, k, v) = (row(run.q), row(run.k), row(run.v));
            let by = |state: &[f64], x: &[f64], j: usize| (0..d).map(|i| state[i * d + j] * x[i]).sum::<f64>();
            state.iter_mut().for_each(|s| *s *= f64::from(decay).exp());
            let u: Vec<f64> = (0..d).map(|j| f64::from(step) * (v[j] - by(state, &k, j))).collect();
            for i in 0..d {
                (0..d).for_each(|j| state[i * d + j] += k[i] * u[j]);
            }
            out.extend((0..d).map(|j| by(state, &q, j)));
        }
        out
    }

    #[test]
    fn blocks_give_what_the_recurrence_gives() {
        let d = 32;
        let mut random = Random::new(7);
        for n in [1, 5, BLOCK, BLOCK + 1, 3 * BLOCK + 17] {
            let mut values = |n: usize| -> Vec<f32> { (0..n).map(|_| random.signed()).collect() };
            let (q, mut k, v) = (values(n * d), values(n * d), values(n * d));
            k.chunks_exact_mut(d).for_each(|row| math::l2_unit(row, 1e-6));
            // From a state that hardly fades to one that is forgotten at once.
            let decay: Vec<f32> = values(n).iter().map(|x| -(4.0 * x).exp()).collect();
            let step: Vec<f32> = values(n).iter().map(|x| 0.5 + 0.5 * x).collect();
            let run = HeadRun { head: d, stride: d, q: &q, k: &k, v: &v, decay: &decay, step: &step };
            let mut state = values(d * d);
            let mut exact: Vec<f64> = state.iter().map(|&x| f64::from(x)).collect();
            let want = truth(&run, &mut exact);
            let mut out = vec![0.0; n * d];
            run.run(&mut state, &mut out, &mut Scratch::default());
            let close = |a: &[f32], b: &[f64]| a.iter().zip(b).all(|(&a, &b)| (f64::from(a) - b).abs() < 2e-5);
            assert!(close(&out, &want), "{n} tokens");
            assert!(close(&state, &exact), "state after {n} tokens");
        }
    }
}
