//! The way back through attention over the sequences of a tile.
//!
//! With shares `P = softmax(S)` of scores `S = cap(scale q kᵀ)` and outputs `o = P v`, given the gradient `do`:
//!
//! ```text
//! dv = Pᵀ do;   dP = do vᵀ;   dS = P (dP - sum over j of P dP);   dq = dR k;   dk = dRᵀ q,   dR = scale cap'(S) dS
//! ```
//!
//! Shares are computed again, a block of queries at a time.

use std::ops::Range;

use rayon::prelude::*;

use super::derivatives;
use crate::compute::{GemmOperand, gemm_f32};
use crate::model::group::{Span, Tile};
use crate::model::math;
use crate::model::mixer::attend::{AttentionParams, QUERY_BLOCK, QueryBlock};

/// Queries, keys and values of a tile, or gradients at them: `[n, heads * size]` each.
pub(super) struct Attended {
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
}

/// What queries, keys and values of a tile are made of, and the gradient `d` at what attention gave, `[n, n_head * head_v]`.
struct Problem<'a> {
    params: &'a AttentionParams<'a>,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    d: &'a [f32],
}

/// Gradients of one sequence at one head of keys and values and the heads of queries that use it, without gaps:
/// `[heads, n, head_k]`, `[n, head_k]`, `[n, head_v]`.
struct HeadGradients {
    span: usize,
    kv_head: usize,
    own: Attended,
}

/// Memory of one thread.
#[derive(Default)]
struct Scratch {
    /// `[queries, width]` each.
    shares: Vec<f32>,
    d_shares: Vec<f32>,
    capped: Vec<f32>,
    /// `[width, queries]`.
    transposed: Vec<f32>,
}

/// The gradients at queries, keys and values, given that at what [`attend`](crate::model::mixer::attend::attend) made of them.
/// Spans of the tile are whole sequences.
pub(super) fn attend(tile: &Tile, params: &AttentionParams<'_>, [q, k, v]: [&[f32]; 3], d: &[f32]) -> Attended {
    let problem = Problem { params, q, k, v, d };
    let tasks: Vec<(usize, usize)> =
        (0..tile.spans.len()).flat_map(|span| (0..params.n_head_kv).map(move |kv_head| (span, kv_head))).collect();
    let parts: Vec<HeadGradients> = tasks
        .into_par_iter()
        .map_init(Scratch::default, |scratch, (span, kv_head)| HeadGradients {
            span,
            kv_head,
            own: problem.of_head(&tile.spans[span], kv_head, scratch),
        })
        .collect();
    let n = tile.rows.len();
    let zeros = |stride: usize| vec![0.0; n * stride];
    let mut all = Attended { q: zeros(params.q_stride()), k: zeros(params.k_stride()), v: zeros(params.v_stride()) };
    let heads = params.n_head / params.n_head_kv;
    for HeadGradients { span, kv_head, own } in &parts {
        let rows = tile.spans[*span].rows.clone();
        let by_head = own.q.chunks_exact((rows.len() * params.head_k).max(1));
        for (head, part) in (kv_head * heads..).zip(by_head) {
            put(part, rows.start, head, params.head_k, params.q_stride(), &mut all.q);
        }
        put(&own.k, rows.start, *kv_head, params.head_k, params.k_stride(), &mut all.k);
        put(&own.v, rows.start, *kv_head, params.head_v, params.v_stride(), &mut all.v);
    }
    all
}

/// Puts rows of one head where they belong among rows of all heads.
fn put(part: &[f32], first_row: usize, head: usize, size: usize, stride: usize, all: &mut [f32]) {
    for (row, values) in part.chunks_exact(size).enumerate() {
        all[(first_row + row) * stride + head * size..][..size].copy_from_slice(values);
    }
}

impl Problem<'_> {
    fn of_head(&self, span: &Span, kv_head: usize, scratch: &mut Scratch) -> Attended {
        let params = self.params;
        let (n, heads) = (span.rows.len(), params.n_head / params.n_head_kv);
        let mut own = Attended {
            q: vec![0.0; heads * n * params.head_k],
            k: vec![0.0; n * params.head_k],
            v: vec![0.0; n * params.head_v],
        };
        for index in 0..heads {
            let head = kv_head * heads + index;
            for first in (0..n).step_by(QUERY_BLOCK) {
                let queries = QUERY_BLOCK.min(n - first);
                let block = QueryBlock::new(params, head, span, first, queries);
                let start = (index * n + first) * params.head_k;
                let d_q = start..start + queries * params.head_k;
                self.of_block(&block, span, d_q, &mut own, scratch);
            }
        }
        own
    }

    /// Adds what one block of queries of a span contributes. Its own gradients are `own.q[d_q]`.
    fn of_block(&self, block: &QueryBlock, span: &Span, d_q: Range<usize>, own: &mut Attended, scratch: &mut Scratch) {
        let params = self.params;
        let (head_k, head_v) = (params.head_k, params.head_v);
        let QueryBlock { head, first_row, queries, width, .. } = *block;
        let Scratch { shares, d_shares, capped, transposed } = scratch;
        capped.clear();
        if params.cap.is_some() {
            capped.resize(queries * width, 0.0);
        }
        block.shares(params, self.q, self.k, shares, |query, from, scores| {
            if let Some(row) = capped.chunks_exact_mut(width).nth(query) {
                row[from..from + scores.len()].copy_from_slice(scores);
            }
        });
        let o_stride = params.n_head * head_v;
        let kv_head = params.kv_head(head);
        let d = &self.d[first_row * o_stride + head * head_v..];
        // Without earlier segments the block sees one run of rows of its own span.
        for (_, rows) in &block.pieces {
            let seen = rows.len();
            let first_key = rows.start - span.rows.start;
            d_shares.clear();
            d_shares.resize(queries * width, 0.0);
            let data = &self.v[rows.start * params.v_stride() + kv_head * head_v..];
            let values = GemmOperand::Transposed { data, stride: params.v_stride() };
            gemm_f32(queries, seen, head_v, d, o_stride, values, d_shares, width, false);

            transpose(shares, queries, width, transposed);
            let outputs = GemmOperand::Plain { data: d, stride: o_stride };
            let d_v = &mut own.v[first_key * head_v..];
            gemm_f32(seen, head_v, queries, transposed, queries, outputs, d_v, head_v, true);

            for (p, d) in shares.chunks_exact(width).zip(d_shares.chunks_exact_mut(width)) {
                derivatives::soft_max(p, d);
                math::scale(d, params.scale);
            }
            if let Some(cap) = params.cap {
                derivatives::soft_cap(capped, d_shares, cap);
            }
            let data = &self.k[rows.start * params.k_stride() + kv_head * head_k..];
            let keys = GemmOperand::Plain { data, stride: params.k_stride() };
            gemm_f32(queries, head_k, seen, d_shares, width, keys, &mut own.q[d_q.clone()], head_k, false);

            transpose(d_shares, queries, width, transposed);
            let data = &self.q[first_row * params.q_stride() + head * head_k..];
            let q_rows = GemmOperand::Plain { data, stride: params.q_stride() };
            let d_k = &mut own.k[first_key * head_k..];
            gemm_f32(seen, head_k, queries, transposed, queries, q_rows, d_k, head_k, true);
        }
    }
}

/// From `[rows, columns]` to `[columns, rows]`.
fn transpose(values: &[f32], rows: usize, columns: usize, out: &mut Vec<f32>) {
    /// Values of a side of the squares that are turned at once.
    const SIDE: usize = 16;
    out.clear();
    out.resize(values.len(), 0.0);
    for first_row in (0..rows).step_by(SIDE) {
        for first_column in (0..columns).step_by(SIDE) {
            for column in first_column..columns.min(first_column + SIDE) {
                for row in first_row..rows.min(first_row + SIDE) {
                    out[column * rows + row] = values[row * columns + column];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::group::TokenGroup;
    use crate::model::mixer::attend;
    use crate::testing::Random;

    /// The change of `sum(c * attention)` along a direction, by central differences, and by the gradients.
    fn compare(group: &TokenGroup, causal: bool) {
        let tile = &group.tiles(usize::MAX)[0];
        let n = group.len();
        let mut random = Random::new(1);
        let mut random = |n: usize| -> Vec<f32> { (0..n).map(|_| random.signed()).collect() };
        for params in attend::test_params(causal) {
            let inputs = [random(n * 40), random(n * 20), random(n * 2 * params.head_v)];
            let c = random(n * 4 * params.head_v);
            let loss = |[q, k, v]: &[Vec<f32>; 3]| -> f64 {
                let out = attend::attend(tile, &params, q, k, v);
                out.iter().zip(&c).map(|(o, c)| f64::from(*o) * f64::from(*c)).sum()
            };
            let [q, k, v] = &inputs;
            let found = attend(tile, &params, [q, k, v], &c);
            for (which, gradient) in [found.q, found.k, found.v].iter().enumerate() {
                assert_eq!(gradient.len(), inputs[which].len());
                // Along the gradient itself the change is its squared length, and no sum of parts of either sign.
                let length = gradient.iter().map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>();
                let step = 0.02 / length.sqrt();
                let moved = |sign: f64| {
                    let mut inputs = inputs.clone();
                    inputs[which]
                        .iter_mut()
                        .zip(gradient)
                        .for_each(|(x, g)| *x += (sign * step * f64::from(*g)) as f32);
                    loss(&inputs)
                };
                let change = (moved(1.0) - moved(-1.0)) / (2.0 * step);
                assert!((change / length - 1.0).abs() < 1e-3, "input {which}: {change} for {length}");
                // Every single row, too: of those far from each other none can stand in for another.
                let row = gradient.len() / n;
                for at in [0, n / 3, n - 1] {
                    let part = &gradient[at * row..][..row];
                    let length = part.iter().map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>();
                    let step = 0.02 / length.sqrt().max(1e-3);
                    let moved = |sign: f64| {
                        let mut inputs = inputs.clone();
                        let target = &mut inputs[which][at * row..][..row];
                        target.iter_mut().zip(part).for_each(|(x, g)| *x += (sign * step * f64::from(*g)) as f32);
                        loss(&inputs)
                    };
                    let change = (moved(1.0) - moved(-1.0)) / (2.0 * step);
                    assert!(
                        (change - length).abs() < 3e-3 * length.max(1e-2),
                        "input {which}, row {at}: {change} for {length}"
                    );
                }
            }
        }
    }

    #[test]
    fn gradients_are_the_slopes_with_windows_caps_sinks_and_values_of_another_size() {
        compare(&TokenGroup::from_sequences([vec![0; 2 * QUERY_BLOCK + 20], vec![0; 30], vec![0; 1]]), true);
    }

    #[test]
    fn gradients_both_ways_are_the_slopes() {
        compare(&TokenGroup::from_sequences([vec![0; QUERY_BLOCK + 20], vec![0; 30]]), false);
    }

    #[test]
    fn transposing_twice_changes_nothing() {
        let values: Vec<f32> = (0..17 * 35).map(|i| i as f32).collect();
        let (mut once, mut twice) = (Vec::new(), Vec::new());
        transpose(&values, 17, 35, &mut once);
        assert_eq!(once[17], 1.0);
        transpose(&once, 35, 17, &mut twice);
        assert_eq!(values, twice);
    }
}
