//! Q4_0 to Q5_1 with importance, sixteen blocks at a time. Without importance there is no search, see [`rounding`].

use super::rounding;
use super::search::{fit_affine, fit_symmetric};
use super::{Batch, Floats, Isa, LANES, Wide, error_weights, side_by_side};
use crate::quant::levels::ToLevels;
use crate::quant::search::{AffineSearch, Rounding};
use crate::quant::types::legacy as scalar;

const LEN: usize = 32;

/// Mean square of the row of each block from `first` on. `rows` caches the means of all rows.
#[inline(always)]
fn variances<I: Isa>(isa: I, rows: &[f32], blocks_per_row: usize, first: usize) -> I::Floats {
    let mut variances = [0.0; LANES];
    for (lane, variance) in variances.iter_mut().enumerate() {
        *variance = rows[((first + lane) / blocks_per_row).min(rows.len() - 1)];
    }
    isa.load(&variances)
}

/// [`mean_square`](scalar::mean_square) of every row, four rows at a time: each sum waits for its last addition.
#[inline(always)]
fn mean_squares(src: &[f32], row_len: usize) -> Vec<f32> {
    let mut means = Vec::with_capacity(src.len() / row_len);
    let four = src.chunks_exact(4 * row_len);
    let rest = four.remainder();
    for rows in four {
        let (ab, cd) = rows.split_at(2 * row_len);
        let ((a, b), (c, d)) = (ab.split_at(row_len), cd.split_at(row_len));
        let mut sums = [0f32; 4];
        for (((a, b), c), d) in a.iter().zip(b).zip(c).zip(d) {
            sums[0] += a * a;
            sums[1] += b * b;
            sums[2] += c * c;
            sums[3] += d * d;
        }
        means.extend(sums.map(|sum| sum / row_len as f32));
    }
    means.extend(rest.chunks_exact(row_len).map(scalar::mean_square));
    means
}

/// Sixteen blocks and the weights of their errors.
#[inline(always)]
fn load<I: Isa>(isa: I, batch: &Batch<'_, LEN>, sigma2: I::Floats) -> ([I::Floats; LEN], [I::Floats; LEN]) {
    let (mut x, mut weights) = ([isa.splat(0.0); LEN], [isa.splat(0.0); LEN]);
    side_by_side(isa, &batch.blocks, &mut x);
    if let Some(importance) = &batch.importance {
        side_by_side(isa, importance, &mut weights);
        error_weights(&x, &mut weights, sigma2);
    }
    (x, weights)
}

macro_rules! symmetric {
    ($name:ident: $bytes:literal, $scalar:ident, $half:expr, $put:ident) => {
        #[doc = concat!("[`", stringify!($scalar), "`](scalar::", stringify!($scalar), ").")]
        #[inline(always)]
        pub fn $name<I: Isa>(isa: I, src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]) {
            if importance.is_none() {
                return rounding::$name(isa, src, dst);
            }
            let rows = mean_squares(src, row_len);
            for (n, out) in dst.as_chunks_mut::<$bytes>().0.chunks_mut(LANES).enumerate() {
                let batch = Batch::new(src, row_len, importance, n * LANES);
                let (x, weights) = load(isa, &batch, variances(isa, &rows, row_len / LEN, n * LANES));
                let fits = fit_symmetric(isa, &x, &weights, $half);
                let (scales, inverses) = (fits.scale.to_array(), fits.inverse.to_array());
                for (lane, block) in out.iter_mut().enumerate() {
                    let levels = Wide(isa).of_products(batch.blocks[lane], inverses[lane], $half);
                    scalar::$put(scales[lane], &levels, block);
                }
            }
        }
    };
}

macro_rules! affine {
    ($name:ident: $bytes:literal, $scalar:ident, $search:expr, $put:ident) => {
        #[doc = concat!("[`", stringify!($scalar), "`](scalar::", stringify!($scalar), ").")]
        #[inline(always)]
        pub fn $name<I: Isa>(isa: I, src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]) {
            const SEARCH: AffineSearch = $search;
            if importance.is_none() {
                return rounding::$name(isa, src, dst);
            }
            let rows = mean_squares(src, row_len);
            let mut levels = [[isa.splat(0.0); LEN]];
            for (n, out) in dst.as_chunks_mut::<$bytes>().0.chunks_mut(LANES).enumerate() {
                let batch = Batch::new(src, row_len, importance, n * LANES);
                let (x, weights) = load(isa, &batch, variances(isa, &rows, row_len / LEN, n * LANES));
                let [fits] = fit_affine(isa, &[x], &[weights], &SEARCH, &mut levels);
                let (scales, mins) = (fits.scale.to_array(), fits.min.to_array());
                let (inverses, bases) = (fits.inverse.to_array(), fits.base.to_array());
                for (lane, block) in out.iter_mut().enumerate() {
                    let rounding = Rounding { inverse: inverses[lane], min: bases[lane] };
                    let levels = Wide(isa).of_search(batch.blocks[lane], rounding, SEARCH.max_level);
                    scalar::$put(scales[lane], -mins[lane], &levels, block);
                }
            }
        }
    };
}

symmetric!(q4_0: 18, quantize_q4_0, scalar::Q4_HALF, put_q4_0);
symmetric!(q5_0: 22, quantize_q5_0, scalar::Q5_HALF, put_q5_0);
affine!(q4_1: 20, quantize_q4_1, scalar::Q4_1_SEARCH, put_q4_1);
affine!(q5_1: 24, quantize_q5_1, scalar::Q5_1_SEARCH, put_q5_1);
