//! Attention over the sequences of a tile, causal or both ways.

use std::ops::Range;

use rayon::prelude::*;

use crate::compute::{GemmOperand, gemm_f32};
use crate::model::group::{Span, Tile};
use crate::model::hparams::Window;
use crate::model::math;

/// Queries handled by one task: enough to amortize packing keys, few enough to waste little above the diagonal.
pub(in crate::model) const QUERY_BLOCK: usize = 96;

/// Shapes and rules of one layer's attention.
pub(in crate::model) struct AttentionParams<'a> {
    pub n_head: usize,
    pub n_head_kv: usize,
    /// Values of a query's or key's head.
    pub head_k: usize,
    /// Values of a value's head.
    pub head_v: usize,
    pub scale: f32,
    pub cap: Option<f32>,
    pub window: Option<Window>,
    /// False where every position sees all of its sequence. A window then limits only what lies before a position, as
    /// `LLAMA_SWA_TYPE_STANDARD` does without a causal mask.
    pub causal: bool,
    /// One logit per head that takes part in the softmax and attends to nothing.
    pub sinks: Option<&'a [f32]>,
}

impl AttentionParams<'_> {
    /// The head of keys and values that a head of queries uses.
    pub(in crate::model) fn kv_head(&self, head: usize) -> usize {
        head / (self.n_head / self.n_head_kv)
    }

    /// Values per row of queries, and in the same way of keys and of values.
    pub(in crate::model) fn q_stride(&self) -> usize {
        self.n_head * self.head_k
    }

    pub(in crate::model) fn k_stride(&self) -> usize {
        self.n_head_kv * self.head_k
    }

    pub(in crate::model) fn v_stride(&self) -> usize {
        self.n_head_kv * self.head_v
    }

    /// The first position that a query at `position` sees.
    fn visible_from(&self, position: usize) -> usize {
        self.window.map_or(0, |window| window.start(position))
    }
}

struct Task<'a> {
    head: usize,
    span: usize,
    /// Queries of the span.
    first: usize,
    out: &'a mut [f32],
}

/// Attends with queries `[n, n_head * head_k]`, keys `[n, n_head_kv * head_k]` and values `[n, n_head_kv * head_v]` of the
/// tile's rows. Gives the mixed values, `[n, n_head * head_v]`.
pub(in crate::model) fn attend(tile: &Tile, params: &AttentionParams<'_>, q: &[f32], k: &[f32], v: &[f32]) -> Vec<f32> {
    let n = tile.rows.len();
    let head = params.head_v;
    let mut mixed = vec![0.0; n * params.n_head * head];
    let mut tasks = Vec::new();
    let mut rest = mixed.as_mut_slice();
    for h in 0..params.n_head {
        for (index, span) in tile.spans.iter().enumerate() {
            for first in (0..span.rows.len()).step_by(QUERY_BLOCK) {
                let queries = QUERY_BLOCK.min(span.rows.len() - first);
                let (out, tail) = rest.split_at_mut(queries * head);
                rest = tail;
                tasks.push(Task { head: h, span: index, first, out });
            }
        }
    }
    tasks.into_par_iter().for_each_init(Vec::new, |scores, task| {
        attend_block(tile, params, q, k, v, scores, task);
    });
    rows_of_heads(&mixed, params.n_head, head)
}

/// From `[n_head, n, head]` to one row per token, `[n, n_head * head]`. Spans cover the rows of a tile in order, without gaps.
pub(super) fn rows_of_heads(by_head: &[f32], n_head: usize, head: usize) -> Vec<f32> {
    let n = by_head.len() / (n_head * head);
    let mut rows = vec![0.0; by_head.len()];
    rows.par_chunks_mut(n_head * head).enumerate().for_each(|(row, out)| {
        for (h, values) in out.chunks_exact_mut(head).enumerate() {
            values.copy_from_slice(&by_head[(h * n + row) * head..][..head]);
        }
    });
    rows
}

/// A block of queries of one head and what these see.
pub(in crate::model) struct QueryBlock {
    pub head: usize,
    /// Row of the tile that the first query is.
    pub first_row: usize,
    pub queries: usize,
    first_position: usize,
    /// First position that is seen.
    start: usize,
    /// Positions from there that a query of the block may see.
    pub width: usize,
    /// Rows of the tile that hold them, in order, each run with the first of its columns.
    pub pieces: Vec<(usize, Range<usize>)>,
}

impl QueryBlock {
    /// Queries `first..first + queries` of a span.
    pub(in crate::model) fn new(
        params: &AttentionParams<'_>,
        head: usize,
        span: &Span,
        first: usize,
        queries: usize,
    ) -> QueryBlock {
        let first_position = span.first_position + first;
        // What a block of queries sees ends with its last one, or with the sequence.
        let own_rows = if params.causal { first + queries } else { span.rows.len() };
        let end_position = span.first_position + own_rows;
        let start = params.visible_from(first_position);
        let mut pieces = Vec::with_capacity(span.past.len() + 1);
        let mut position = 0;
        let own = span.rows.start..span.rows.start + own_rows;
        for rows in span.past.iter().chain([&own]) {
            let skipped = start.saturating_sub(position).min(rows.len());
            if skipped < rows.len() {
                pieces.push((position + skipped - start, rows.start + skipped..rows.end));
            }
            position += rows.len();
        }
        let first_row = span.rows.start + first;
        QueryBlock { head, first_row, queries, first_position, start, width: end_position - start, pieces }
    }

    /// Shares of what each query sees, `[queries, width]`. `capped` is shown the scores of each query as they enter the
    /// softmax, with the first of their columns.
    pub(in crate::model) fn shares(
        &self,
        params: &AttentionParams<'_>,
        q: &[f32],
        k: &[f32],
        scores: &mut Vec<f32>,
        mut capped: impl FnMut(usize, usize, &[f32]),
    ) {
        let QueryBlock { head, queries, width, .. } = *self;
        let (head_k, q_stride, k_stride) = (params.head_k, params.q_stride(), params.k_stride());
        scores.clear();
        scores.resize(queries * width, 0.0);
        let q_block = &q[self.first_row * q_stride + head * head_k..];
        let kv_head = params.kv_head(head);
        for (column, rows) in &self.pieces {
            let data = &k[rows.start * k_stride + kv_head * head_k..];
            let keys = GemmOperand::Transposed { data, stride: k_stride };
            gemm_f32(queries, rows.len(), head_k, q_block, q_stride, keys, &mut scores[*column..], width, false);
        }
        for (i, row) in scores.chunks_exact_mut(width).enumerate() {
            let position = self.first_position + i;
            let to = if params.causal { position + 1 - self.start } else { width };
            let from = params.visible_from(position) - self.start;
            row[..from].fill(0.0);
            row[to..].fill(0.0);
            let visible = &mut row[from..to];
            math::scale(visible, params.scale);
            if let Some(cap) = params.cap {
                math::soft_cap(visible, cap);
            }
            capped(i, from, visible);
            math::soft_max(visible, params.sinks.map(|sinks| sinks[head]));
        }
    }
}

fn attend_block(
    tile: &Tile,
    params: &AttentionParams<'_>,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    scores: &mut Vec<f32>,
    task: Task<'_>,
) {
    let head_v = params.head_v;
    let queries = task.out.len() / head_v;
    let block = QueryBlock::new(params, task.head, &tile.spans[task.span], task.first, queries);
    block.shares(params, q, k, scores, |_, _, _| {});
    let (kv_head, v_stride) = (params.kv_head(task.head), params.v_stride());
    for (index, (column, rows)) in block.pieces.iter().enumerate() {
        let values = GemmOperand::Plain { data: &v[rows.start * v_stride + kv_head * head_v..], stride: v_stride };
        let (shares, width) = (&scores[*column..], block.width);
        gemm_f32(queries, head_v, rows.len(), shares, width, values, task.out, head_v, index > 0);
    }
}

/// Heads that differ in everything that attention knows.
#[cfg(test)]
pub(in crate::model) fn test_params(causal: bool) -> [AttentionParams<'static>; 3] {
    let window = |chunked| Some(Window { size: 33, chunked });
    let sinks = Some(&[0.5, -1.0, 2.0, 0.0][..]);
    let cases = [(None, None, None, 10), (window(false), Some(2.0), sinks, 10), (window(causal), None, sinks, 6)];
    cases.map(|(window, cap, sinks, head_v)| AttentionParams {
        n_head: 4,
        n_head_kv: 2,
        head_k: 10,
        head_v,
        scale: 0.7,
        cap,
        window,
        causal,
        sinks,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::group::TokenGroup;
    use crate::testing::Random;

    /// Textbook attention in f64, one query at a time.
    fn naive(group: &TokenGroup, params: &AttentionParams<'_>, q: &[f32], k: &[f32], v: &[f32]) -> Vec<f64> {
        let (head_k, head_v) = (params.head_k, params.head_v);
        let mut out = vec![0.0f64; group.len() * params.n_head * head_v];
        let tile = &group.tiles(usize::MAX)[0];
        for span in &tile.spans {
            for (i, row) in span.rows.clone().enumerate() {
                let position = span.first_position + i;
                let mut seen: Vec<usize> = span.past.iter().flat_map(|r| r.clone()).collect();
                seen.extend(span.rows.start..if params.causal { row + 1 } else { span.rows.end });
                let seen = &seen[params.window.map_or(0, |w| w.start(position))..];
                for h in 0..params.n_head {
                    let at = |row: usize, heads: usize, h: usize, head: usize| (row * heads + h) * head;
                    let kv = h / (params.n_head / params.n_head_kv);
                    let scores: Vec<f64> = seen
                        .iter()
                        .map(|&s| {
                            let a = &q[at(row, params.n_head, h, head_k)..][..head_k];
                            let b = &k[at(s, params.n_head_kv, kv, head_k)..][..head_k];
                            let dot: f64 = a.iter().zip(b).map(|(x, y)| f64::from(x * y)).sum();
                            let score = dot * f64::from(params.scale);
                            params.cap.map_or(score, |c| f64::from(c) * (score / f64::from(c)).tanh())
                        })
                        .collect();
                    let sink = params.sinks.map_or(0.0, |s| f64::from(s[h]).exp());
                    let total: f64 = scores.iter().map(|s| s.exp()).sum::<f64>() + sink;
                    for (&s, score) in seen.iter().zip(&scores) {
                        for d in 0..head_v {
                            out[at(row, params.n_head, h, head_v) + d] +=
                                score.exp() / total * f64::from(v[at(s, params.n_head_kv, kv, head_v) + d]);
                        }
                    }
                }
            }
        }
        out
    }

    /// Compares a group of sequences with the textbook, without and with window, cap, sinks and values of another size.
    fn compare(group: &TokenGroup, causal: bool) {
        let mut random = Random::new(1);
        let mut random = |n: usize| -> Vec<f32> { (0..n).map(|_| random.signed()).collect() };
        let n = group.len();
        for params in test_params(causal) {
            let (q, k, v) = (random(n * 40), random(n * 20), random(n * 2 * params.head_v));
            let want = naive(group, &params, &q, &k, &v);
            let got = attend(&group.tiles(usize::MAX)[0], &params, &q, &k, &v);
            assert_eq!(got.len(), want.len());
            for (g, w) in got.iter().zip(&want) {
                assert!((f64::from(*g) - w).abs() < 1e-5, "{g} {w}");
            }
        }
    }

    #[test]
    fn agrees_with_the_textbook_for_trees_windows_caps_and_sinks() {
        let mut group = TokenGroup::new();
        let root = group.push(&[0; 150]);
        let a = group.push_continuation(root, &[0; 20]).unwrap();
        group.push_continuation(root, &[0; 7]).unwrap();
        group.push_continuation(a, &[0; 101]).unwrap();
        group.push(&[0; 30]);
        compare(&group, true);
    }

    #[test]
    fn both_ways_every_position_sees_all_of_its_own_sequence() {
        // Sequences of several blocks of queries, of one, and of a single token.
        compare(&TokenGroup::from_sequences([vec![0; 2 * QUERY_BLOCK + 50], vec![0; 30], vec![0; 1]]), false);
    }
}
