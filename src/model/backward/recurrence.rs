//! The way back through the gated delta rule of one head, in blocks.
//!
//! In the notation of `mixer::recurrence`, with `D_t = exp(G_t)`, `L_ts = exp(G_t - G_s)` for
//! s ≤ t, `A = L ∘ K Kᵀ` below the diagonal and `M = L ∘ Q Kᵀ` on and below it, a block does
//!
//! ```text
//! Z = V - D K S - A U;   U = beta Z;   O = D Q S + M U;   S' = D_n S + (E K)ᵀ U,   E_s = L_ns
//! ```
//!
//! so that, given `dO` and `dS'`, and solving for `dZ` from the last token to the first,
//!
//! ```text
//! dU = Mᵀ dO + E K dS' - Aᵀ dZ;   dZ = beta dU;   dbeta = dU . Z;   dV = dZ
//! P = L ∘ dO Uᵀ on and below the diagonal;   R = -L ∘ dZ Uᵀ below it
//! dQ = P K + D dO Sᵀ;   dK = Pᵀ Q + (R + Rᵀ) K - D dZ Sᵀ + E U dS'ᵀ
//! dS = D_n dS' + Qᵀ D dO - Kᵀ D dZ
//! ```
//!
//! Each factor `exp(G_t - G_s)` adds what it multiplies to `dG_t` and takes it from `dG_s`; a decay is part of all later sums.

use super::derivatives::dot;
use crate::compute::{GemmOperand, gemm_f32};
use crate::model::math;
use crate::model::mixer::recurrence::{BLOCK, Block, HeadRun, Scratch};

/// Gradients at the inputs of one head over a run of tokens, `[n, head]` or one value per token.
pub(super) struct RunGradients {
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    pub decay: Vec<f32>,
    pub step: Vec<f32>,
}

/// The gradients of a run that begins with an empty state, given `d` at what it gave, `[n, head]`.
pub(super) fn back(run: &HeadRun<'_>, d: &[f32], scratch: &mut Scratch) -> RunGradients {
    let (head, n) = (run.head, run.decay.len());
    let blocks = n.div_ceil(BLOCK);
    // The state before each block.
    let mut states = vec![0.0; blocks.max(1) * head * head];
    let mut out = vec![0.0; BLOCK * head];
    for index in 1..blocks {
        let (before, rest) = states.split_at_mut(index * head * head);
        let state = &mut rest[..head * head];
        state.copy_from_slice(&before[(index - 1) * head * head..]);
        run.block(index - 1).run(state, &mut out, scratch);
    }
    let zeros = |width: usize| vec![0.0; n * width];
    let mut found = RunGradients { q: zeros(head), k: zeros(head), v: zeros(head), decay: zeros(1), step: zeros(1) };
    let mut d_state = vec![0.0; head * head];
    for index in (0..blocks).rev() {
        let block = run.block(index);
        let (first, end) = (index * BLOCK, index * BLOCK + block.n);
        let rows = first * head..end * head;
        let of_block = BlockBack::new(&block, &states[index * head * head..][..head * head], scratch);
        of_block.run(
            &d[rows.clone()],
            &mut d_state,
            [&mut found.q[rows.clone()], &mut found.k[rows.clone()], &mut found.v[rows]],
            [&mut found.decay[first..end], &mut found.step[first..end]],
        );
    }
    found
}

/// A block, its state, and what its forward pass has to be known of.
struct BlockBack<'a> {
    block: &'a Block<'a>,
    state: &'a [f32],
    /// What is left of the state at each token.
    of_state: [f32; BLOCK],
    /// `L`, `[n, n]`.
    left: Vec<f32>,
    /// `A`, `[n, n]`.
    a: Vec<f32>,
    /// Updates before and after their step, `[n, d]` each.
    z: Vec<f32>,
    u: Vec<f32>,
}

impl<'a> BlockBack<'a> {
    fn new(block: &'a Block<'a>, state: &'a [f32], scratch: &mut Scratch) -> BlockBack<'a> {
        let n = block.n;
        let mut z = Vec::with_capacity(n * block.d);
        let of_state = block.updates(state, scratch, |_, row| z.extend_from_slice(row));
        let (left, u) = (scratch.left.clone(), scratch.u.clone());
        let mut a: Vec<f32> = left.iter().zip(&scratch.products).map(|(left, product)| left * product).collect();
        a.chunks_exact_mut(n).enumerate().for_each(|(t, row)| row[t..].fill(0.0));
        BlockBack { block, state, of_state, left, a, z, u }
    }

    /// Turns `d_state`, the gradient at the state behind the block, into that at the state before it.
    fn run(
        &self,
        d: &[f32],
        d_state: &mut [f32],
        [d_q, d_k, d_v]: [&mut [f32]; 3],
        [d_decay, d_step]: [&mut [f32]; 2],
    ) {
        let Block { d: head, n, stride, q, k, .. } = *self.block;
        let m = self.masked(self.product(q, stride, k, stride), 1);
        let last = &self.left[(n - 1) * n..];
        let weighed_keys = scaled_rows(k, stride, head, last);
        // dU without what comes through later updates, then dZ in its place.
        let d_z = d_v;
        self.multiply(&transposed(&m, n, n), n, plain(d, head), d_z, false);
        self.multiply(&weighed_keys, head, plain(d_state, head), d_z, true);
        self.solve(d_z, d_step);

        let d_m = self.masked(self.product(d, head, &self.u, head), 1);
        let mut d_a = self.masked(self.product(d_z, head, &self.u, head), 0);
        d_a.iter_mut().for_each(|x| *x = -*x);

        // `d_m` and `d_a` are masked and multiplied by what is left: P and R. With their products they tell of the decays.
        let mut d_sums = [0.0f64; BLOCK];
        let products = [self.product(q, stride, k, stride), self.product(k, stride, k, stride)];
        for (parts, products) in [(&d_m, &products[0]), (&d_a, &products[1])] {
            for t in 0..n {
                for s in 0..=t {
                    let share = f64::from(parts[t * n + s]) * f64::from(products[t * n + s]);
                    d_sums[t] += share;
                    d_sums[s] -= share;
                }
            }
        }
        let d_seen = scaled_rows(d, head, head, &self.of_state);
        let mut d_unseen = scaled_rows(d_z, head, head, &self.of_state);
        d_unseen.iter_mut().for_each(|x| *x = -*x);
        self.multiply(&d_m, n, plain(k, stride), d_q, false);
        self.multiply(&d_seen, head, turned(self.state, head), d_q, true);
        self.multiply(&transposed(&d_m, n, n), n, plain(q, stride), d_k, false);
        self.multiply(&d_a, n, plain(k, stride), d_k, true);
        self.multiply(&transposed(&d_a, n, n), n, plain(k, stride), d_k, true);
        self.multiply(&d_unseen, head, turned(self.state, head), d_k, true);
        let mut through_state = vec![0.0; n * head];
        self.multiply(&scaled_rows(&self.u, head, head, last), head, turned(d_state, head), &mut through_state, false);
        math::add(d_k, &through_state);

        // What the state at each token, and each token's share of the last state, say of the decays.
        let mut of_state = vec![0.0; n * head];
        for (rows, d_rows) in [(q, &d_seen), (k, &d_unseen)] {
            gemm_f32(n, head, head, rows, stride, plain(self.state, head), &mut of_state, head, false);
            for (t, (row, d_row)) in of_state.chunks_exact(head).zip(d_rows.chunks_exact(head)).enumerate() {
                d_sums[t] += dot(row, d_row);
            }
        }
        for (s, row) in through_state.chunks_exact(head).enumerate() {
            let share = dot(&k[s * stride..][..head], row);
            d_sums[n - 1] += share;
            d_sums[s] -= share;
        }
        let fading = self.of_state[n - 1];
        d_sums[n - 1] += f64::from(fading) * dot(d_state, self.state);
        let mut sum = 0.0;
        for (d_decay, of_sum) in d_decay.iter_mut().zip(&d_sums).rev() {
            sum += of_sum;
            *d_decay = sum as f32;
        }

        math::scale(d_state, fading);
        for (rows, d_rows) in [(q, &d_seen), (k, &d_unseen)] {
            let columns = transposed_rows(rows, stride, n, head);
            gemm_f32(head, head, n, &columns, n, plain(d_rows, head), d_state, head, true);
        }
    }

    /// From dU of the block's outputs and its last state to dZ, and the gradients at the steps.
    fn solve(&self, d_z: &mut [f32], d_step: &mut [f32]) {
        let Block { d: head, n, step, .. } = *self.block;
        for t in (0..n).rev() {
            let (before, rest) = d_z.split_at_mut(t * head);
            let row = &mut rest[..head];
            d_step[t] = dot(row, &self.z[t * head..][..head]) as f32;
            math::scale(row, step[t]);
            for (s, earlier) in before.chunks_exact_mut(head).enumerate() {
                math::add_scaled(earlier, row, -self.a[t * n + s]);
            }
        }
    }

    /// Products of all pairs of rows, `[n, n]`.
    fn product(&self, x: &[f32], x_stride: usize, y: &[f32], y_stride: usize) -> Vec<f32> {
        let Block { d: head, n, .. } = *self.block;
        let mut products = vec![0.0; n * n];
        let y = GemmOperand::Transposed { data: y, stride: y_stride };
        gemm_f32(n, n, head, x, x_stride, y, &mut products, n, false);
        products
    }

    /// Multiplied by what is left, for tokens up to each one, with (`own` 1) or without (0) itself.
    fn masked(&self, mut products: Vec<f32>, own: usize) -> Vec<f32> {
        let n = self.block.n;
        for (t, (row, left)) in products.chunks_exact_mut(n).zip(self.left.chunks_exact(n)).enumerate() {
            let (seen, unseen) = row.split_at_mut(t + own);
            seen.iter_mut().zip(left).for_each(|(product, left)| *product *= left);
            unseen.fill(0.0);
        }
        products
    }

    /// `out = x y`, or `+=`, with `x` of one row per token, `[n, depth]`.
    fn multiply(&self, x: &[f32], depth: usize, y: GemmOperand<'_>, out: &mut [f32], accumulate: bool) {
        let Block { d: head, n, .. } = *self.block;
        gemm_f32(n, head, depth, x, depth, y, out, head, accumulate);
    }
}

fn plain(data: &[f32], stride: usize) -> GemmOperand<'_> {
    GemmOperand::Plain { data, stride }
}

fn turned(data: &[f32], stride: usize) -> GemmOperand<'_> {
    GemmOperand::Transposed { data, stride }
}

/// Rows `[factors.len(), width]`, each times its factor; as many as there are.
fn scaled_rows(rows: &[f32], stride: usize, width: usize, factors: &[f32]) -> Vec<f32> {
    let rows = rows.chunks(stride).zip(factors);
    rows.flat_map(|(row, factor)| row[..width].iter().map(move |x| x * factor)).collect()
}

/// From `[rows, columns]` to `[columns, rows]`.
fn transposed(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    transposed_rows(values, columns, rows, columns)
}

fn transposed_rows(values: &[f32], stride: usize, rows: usize, columns: usize) -> Vec<f32> {
    let mut out = vec![0.0; rows * columns];
    for (row, values) in values.chunks(stride).take(rows).enumerate() {
        values[..columns].iter().enumerate().for_each(|(column, &x)| out[column * rows + row] = x);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    /// Inputs of a run of one head, in f64.
    #[derive(Clone)]
    struct Inputs {
        /// q, k, v (`[n, d]` each), decays, steps.
        parts: [Vec<f64>; 5],
        d: usize,
    }

    impl Inputs {
        /// `sum(c * o)` by the recurrence as it is defined.
        fn loss(&self, c: &[f32]) -> f64 {
            let (d, [q, k, v, decay, step]) = (self.d, &self.parts);
            let mut state = vec![0.0f64; d * d];
            let mut loss = 0.0;
            for t in 0..decay.len() {
                let row = |values: &[f64]| values[t * d..][..d].to_vec();
                let (q, k, v) = (row(q), row(k), row(v));
                state.iter_mut().for_each(|s| *s *= decay[t].exp());
                let by = |state: &[f64], x: &[f64], j: usize| (0..d).map(|i| state[i * d + j] * x[i]).sum::<f64>();
                let u: Vec<f64> = (0..d).map(|j| step[t] * (v[j] - by(&state, &k, j))).collect();
                for i in 0..d {
                    (0..d).for_each(|j| state[i * d + j] += k[i] * u[j]);
                }
                loss += (0..d).map(|j| by(&state, &q, j) * f64::from(c[t * d + j])).sum::<f64>();
            }
            loss
        }
    }

    #[test]
    fn gradients_are_the_slopes_of_the_recurrence() {
        let d = 16;
        let mut random = Random::new(11);
        for n in [1, 5, BLOCK, BLOCK + 1, 2 * BLOCK + 17] {
            let mut values = |n: usize| -> Vec<f32> { (0..n).map(|_| random.signed()).collect() };
            let (q, mut k, v) = (values(n * d), values(n * d), values(n * d));
            k.chunks_exact_mut(d).for_each(|row| math::l2_unit(row, 1e-6));
            let decay: Vec<f32> = values(n).iter().map(|x| -(4.0 * x - 2.0).exp()).collect();
            let step: Vec<f32> = values(n).iter().map(|x| 0.5 + 0.5 * x).collect();
            let c = values(n * d);
            let run = HeadRun { head: d, stride: d, q: &q, k: &k, v: &v, decay: &decay, step: &step };
            let found = back(&run, &c, &mut Scratch::default());
            let wide = |values: &[f32]| values.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
            let inputs = Inputs { parts: [wide(&q), wide(&k), wide(&v), wide(&decay), wide(&step)], d };
            let found = [found.q, found.k, found.v, found.decay, found.step];
            for (part, found) in found.iter().enumerate() {
                let largest = found.iter().fold(0.0f32, |most, x| most.max(x.abs()));
                for at in [0, found.len() / 3, found.len() / 2, found.len() - 1] {
                    let moved = |by: f64| {
                        let mut moved = inputs.clone();
                        moved.parts[part][at] += by;
                        moved.loss(&c)
                    };
                    let expected = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                    let error = (f64::from(found[at]) - expected).abs();
                    assert!(
                        error < 2e-5 * f64::from(largest.max(1.0)),
                        "{n} tokens, part {part}, {at}: {} for {expected}",
                        found[at]
                    );
                }
            }
        }
    }
}
