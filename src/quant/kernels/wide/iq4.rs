//! IQ4_NL and IQ4_XS, sixteen blocks at a time: lane `k` is block `k`.

use super::{Batch, Floats, Isa, LANES, error_weights, side_by_side, sum_of_squares};
use crate::quant::types::iq4::{self, BORDERS, TRIES, VALUES};

const GROUP: usize = 32;

/// The scale of each lane's group that loses least, see `best_scale` of the scalar code.
#[inline(always)]
fn best_scale<I: Isa>(isa: I, x: &[I::Floats; GROUP], weights: &[I::Floats; GROUP]) -> I::Floats {
    let select = <I::Floats as Floats>::select;
    let zero = isa.splat(0.0);
    let (mut magnitude, mut max) = (zero, zero);
    for &v in x {
        let higher = v.abs().above(magnitude);
        magnitude = select(higher, v.abs(), magnitude);
        max = select(higher, v, max);
    }
    let lowest = isa.splat(VALUES[0].into());
    let (sum_qx, sum_q2) = sums(isa, x, weights, isa.splat(1.0) / (max.negated() / lowest));
    let mut scale = select(sum_q2.above(zero), sum_qx / sum_q2, zero);
    let mut best = scale * sum_qx;
    for n in -TRIES..=TRIES {
        let (sum_qx, sum_q2) = sums(isa, x, weights, isa.splat(n as f32 + f32::from(VALUES[0])) / max);
        let better = sum_q2.above(zero) & (sum_qx * sum_qx).above(best * sum_q2);
        scale = select(better, sum_qx / sum_q2, scale);
        best = select(better, scale * sum_qx, best);
    }
    select(magnitude.below(isa.splat(1e-15)), zero, scale)
}

/// `(sum w q x, sum w q^2)` in order, for the values nearest to `x * inverse_scale`.
#[inline(always)]
fn sums<I: Isa>(
    isa: I,
    x: &[I::Floats; GROUP],
    weights: &[I::Floats; GROUP],
    inverse_scale: I::Floats,
) -> (I::Floats, I::Floats) {
    let (mut sum_qx, mut sum_q2) = (isa.splat(0.0), isa.splat(0.0));
    for i in 0..GROUP {
        let scaled = inverse_scale * x[i];
        let mut nearest = isa.splat(VALUES[0].into());
        for (border, &value) in BORDERS.iter().zip(&VALUES[1..]) {
            // Not `scaled >= border`: NaN has to pass.
            nearest = <I::Floats as Floats>::select(scaled.below(isa.splat(*border)), nearest, isa.splat(value.into()));
        }
        let weighted = weights[i] * nearest;
        sum_qx = sum_qx + weighted * x[i];
        sum_q2 = sum_q2 + weighted * nearest;
    }
    (sum_qx, sum_q2)
}

/// Weights of errors in the place of importance, or squares where there is none.
#[inline(always)]
fn weigh<I: Isa, const LEN: usize>(isa: I, batch: &Batch<'_, LEN>, x: &[I::Floats; LEN], out: &mut [I::Floats; LEN]) {
    if let Some(importance) = &batch.importance {
        side_by_side(isa, importance, out);
        let variance = sum_of_squares(isa, x) * isa.splat(2.0 / LEN as f32);
        error_weights(x, out, variance);
    } else {
        for (w, &v) in out.iter_mut().zip(x) {
            *w = v * v;
        }
    }
}

/// [`iq4::quantize_iq4_nl`].
#[inline(always)]
pub(crate) fn iq4_nl<I: Isa>(isa: I, src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]) {
    for (n, out) in dst.as_chunks_mut::<18>().0.chunks_mut(LANES).enumerate() {
        let batch = Batch::<GROUP>::new(src, row_len, importance, n * LANES);
        let (mut x, mut weights) = ([isa.splat(0.0); GROUP], [isa.splat(0.0); GROUP]);
        side_by_side(isa, &batch.blocks, &mut x);
        weigh(isa, &batch, &x, &mut weights);
        let scales = best_scale(isa, &x, &weights).to_array();
        for (lane, block) in out.iter_mut().enumerate() {
            iq4::finish_nl(batch.blocks[lane], scales[lane], block);
        }
    }
}

/// [`iq4::quantize_iq4_xs`].
#[inline(always)]
pub(crate) fn iq4_xs<I: Isa>(isa: I, src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]) {
    const LEN: usize = 256;
    let (mut x, mut weights) = ([isa.splat(0.0); LEN], [isa.splat(0.0); LEN]);
    for (n, out) in dst.as_chunks_mut::<136>().0.chunks_mut(LANES).enumerate() {
        let batch = Batch::<LEN>::new(src, row_len, importance, n * LANES);
        side_by_side(isa, &batch.blocks, &mut x);
        weigh(isa, &batch, &x, &mut weights);
        let mut scales = [[0.0; LEN / GROUP]; LANES];
        for (j, (x, weights)) in x.as_chunks().0.iter().zip(weights.as_chunks().0).enumerate() {
            for (scales, scale) in scales.iter_mut().zip(best_scale(isa, x, weights).to_array()) {
                scales[j] = scale;
            }
        }
        for (lane, block) in out.iter_mut().enumerate() {
            iq4::finish_xs(batch.blocks[lane], &scales[lane], block);
        }
    }
}
