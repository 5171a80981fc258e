//! Second moments of a tensor's inputs: `X^T X` over all tokens.

use super::Precision;
use super::activations::check_rows;
use super::aligned::AlignedBuf;
use super::matmul::SCRATCH;
use super::micro::{DEPTH, Kernel, MAX_TILE, ROW_STRIDE};
use rayon::prelude::*;

/// `S[i, j] += sum over t of X[t, i] * X[t, j]` for `j >= i`; X is f32, row-major `[tokens, n]` with rows `stride`
/// floats apart, S row-major `[n, n]`. The part below the diagonal is left alone.
///
/// With [`Precision::Accurate`], tokens are taken in blocks of 256: the products of a block are one chain of f32 fused
/// multiply-adds, and blocks are added to S in order. The same calls give the same bytes on every instruction set.
/// [`Precision::Fast`] multiplies X rounded to bfloat16 where the CPU can, in blocks of 512 tokens. Neither depends on
/// the number of threads of rayon's current pool.
///
/// # Panics
/// When `x` or `sums` is shorter than the shapes say.
pub fn accumulate_second_moment(
    precision: Precision,
    x: &[f32],
    tokens: usize,
    n: usize,
    stride: usize,
    sums: &mut [f32],
) {
    accumulate_with(Kernel::best(precision), x, tokens, n, stride, sums);
}

pub(super) fn accumulate_with(kernel: &Kernel, x: &[f32], tokens: usize, n: usize, stride: usize, sums: &mut [f32]) {
    assert!(kernel.level.is_available(), "{} cannot multiply here", kernel.name);
    check_rows("x", x.len(), tokens, n, stride);
    assert_eq!(Some(sums.len()), n.checked_mul(n), "second moments of {n} columns");
    if tokens == 0 || n == 0 {
        return;
    }
    let (mr, nr, per_element) = (kernel.mr, kernel.nr, kernel.columns_per_element);
    let mut packed = AlignedBuf::default();
    packed.reserve(n.div_ceil(nr) * nr * DEPTH);
    for first in (0..tokens).step_by(DEPTH * per_element) {
        let count = tokens.min(first + DEPTH * per_element) - first;
        let depth = count.div_ceil(per_element);
        let block = &x[first * stride..];
        packed.as_mut_slice().par_chunks_exact_mut(DEPTH * nr).take(n.div_ceil(nr)).enumerate().for_each(
            |(panel, packed)| {
                let columns = panel * nr..n.min((panel + 1) * nr);
                let row = |t: usize| (t < count).then(|| &block[t * stride..][columns.clone()]);
                for (k, target) in packed.chunks_exact_mut(nr).take(depth).enumerate() {
                    let (valid, rest) = target.split_at_mut(columns.len());
                    // Element `k` of a column: the value of token `k`, or those of the tokens `2 k` and `2 k + 1`.
                    match (per_element, row(k * per_element).unwrap_or_default(), row(k * per_element + 1)) {
                        (1, values, _) => valid.iter_mut().zip(values).for_each(|(to, value)| *to = value.to_bits()),
                        (_, low, Some(high)) => pack_pairs(low, high.iter().copied(), valid),
                        (_, low, None) => pack_pairs(low, std::iter::repeat(0.0), valid),
                    }
                    rest.fill(0);
                }
            },
        );
        let packed: &[u32] = packed.as_mut_slice();
        sums.par_chunks_mut(mr * n).enumerate().for_each(|(index, sums)| {
            let rows = index * mr..n.min((index + 1) * mr);
            SCRATCH.with_borrow_mut(|scratch| {
                scratch.decoded.reserve(mr * ROW_STRIDE);
                scratch.tile.reserve(MAX_TILE);
                let transposed = scratch.decoded.as_mut_slice();
                for (row, column) in rows.clone().enumerate() {
                    // The same column of X as in its panel, its elements in a row.
                    let lane = &packed[column / nr * nr * DEPTH + column % nr..];
                    let target = &mut transposed[row * ROW_STRIDE..][..depth];
                    target.iter_mut().zip(lane.iter().step_by(nr)).for_each(|(to, element)| *to = *element);
                }
                for panel in rows.start / nr..n.div_ceil(nr) {
                    // SAFETY: both panels hold `depth` columns, `scratch.tile` any register tile; the level was
                    // checked above.
                    unsafe {
                        let a = scratch.decoded.as_ptr();
                        let b = packed.as_ptr().add(panel * nr * DEPTH);
                        (kernel.tile)(rows.len(), depth, a, b, scratch.tile.as_mut_ptr().cast(), nr, false);
                    }
                    let tile = scratch.tile.as_mut_f32();
                    for (row, values) in tile.chunks_exact(nr).take(rows.len()).enumerate() {
                        let start = (panel * nr).max(rows.start + row);
                        let end = n.min((panel + 1) * nr);
                        for column in start..end {
                            let sum = &mut sums[row * n + column];
                            *sum += values[column - panel * nr];
                        }
                    }
                }
            });
        });
    }
}

/// Pairs of bfloat16 numbers, the first in the lower half.
fn pack_pairs(low: &[f32], high: impl Iterator<Item = f32>, pairs: &mut [u32]) {
    let bits = |value: f32| u32::from(half::bf16::from_f32(value).to_bits());
    for ((pair, low), high) in pairs.iter_mut().zip(low).zip(high) {
        *pair = bits(*low) | bits(high) << 16;
    }
}
