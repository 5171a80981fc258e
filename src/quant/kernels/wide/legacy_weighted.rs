//! Q4_0 to Q5_1 with importance, sixteen blocks at a time. Without importance there is no search, see [`legacy_plain`].

use std::array::from_ref;

use super::legacy_plain::{self, Pair, put_levels};
use super::search::{fit_affine, fit_symmetric};
use super::{Batch, Floats, Isa, LANES, Mask, error_weights, side_by_side};
use crate::quant::float16::f32_to_f16;
use crate::quant::search::AffineSearch;
use crate::quant::types::legacy as scalar;

const LEN: usize = 32;

/// Mean square of the row of each block from `first` on. `rows` caches the means of all rows.
#[inline(always)]
fn variances<I: Isa>(isa: I, rows: &[f32], blocks_per_row: usize, first: usize) -> I::Floats {
    let mut variances = [0.0; LANES];
    // Counted along, not divided, see `Batch::new`.
    let (mut row, mut column) = (first / blocks_per_row, first % blocks_per_row);
    for variance in &mut variances {
        *variance = rows[row.min(rows.len() - 1)];
        column += 1;
        if column == blocks_per_row {
            (row, column) = (row + 1, 0);
        }
    }
    isa.load(&variances)
}

/// [`mean_square`](scalar::mean_square) of every row, sixteen rows side by side: each sum waits for its last addition.
/// Even for few rows, with lanes that repeat the last one, this is as fast as one row after the other.
#[inline(always)]
fn mean_squares<I: Isa>(isa: I, src: &[f32], row_len: usize) -> Vec<f32> {
    let count = src.len() / row_len;
    let mut means = Vec::with_capacity(count.next_multiple_of(LANES));
    for rows in src.chunks(LANES * row_len) {
        // A row is whole blocks, so no column is left over.
        let chunks = rows.as_chunks::<LANES>().0;
        let chunks_per_row = row_len / LANES;
        let last = rows.len() / row_len - 1;
        let mut sum = isa.splat(0.0);
        for column in 0..chunks_per_row {
            let mut parts = [&chunks[0]; LANES];
            for lane in 0..LANES {
                parts[lane] = &chunks[lane.min(last) * chunks_per_row + column];
            }
            for v in isa.transpose(parts) {
                sum = sum + v * v;
            }
        }
        means.extend((sum / isa.splat(row_len as f32)).to_array());
    }
    means.truncate(count);
    means
}

/// Sixteen blocks and the weights of their errors.
struct Blocks<F> {
    x: [F; LEN],
    weights: [F; LEN],
}

impl<F: Floats> Blocks<F> {
    #[inline(always)]
    fn new<I: Isa<Floats = F>>(isa: I) -> Self {
        Self { x: [isa.splat(0.0); LEN], weights: [isa.splat(0.0); LEN] }
    }

    #[inline(always)]
    fn load<I: Isa<Floats = F>>(&mut self, isa: I, batch: &Batch<'_, LEN>, sigma2: F) {
        side_by_side(isa, &batch.blocks, &mut self.x);
        if let Some(importance) = &batch.importance {
            side_by_side(isa, importance, &mut self.weights);
            error_weights(&self.x, &mut self.weights, sigma2);
        }
    }
}

/// Scales as stored. Importance can make them infinite or not a number.
#[inline(always)]
fn stored<F: Floats>(scales: F) -> [u16; LANES] {
    if scales.equals(scales).all() {
        return scales.to_f16();
    }
    let (floats, mut halves) = (scales.to_array(), [0; LANES]);
    for k in 0..LANES {
        halves[k] = f32_to_f16(floats[k]);
    }
    halves
}

macro_rules! symmetric {
    ($name:ident: $bytes:literal, $scalar:ident, $half:expr, $top:tt) => {
        #[doc = concat!("[`", stringify!($scalar), "`](scalar::", stringify!($scalar), ").")]
        #[inline(always)]
        pub(crate) fn $name<I: Isa>(isa: I, src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]) {
            if importance.is_none() {
                return legacy_plain::$name(isa, src, dst);
            }
            let rows = mean_squares(isa, src, row_len);
            let mut blocks = Blocks::new(isa);
            for (n, out) in dst.as_chunks_mut::<$bytes>().0.chunks_mut(LANES).enumerate() {
                let batch = Batch::new(src, row_len, importance, n * LANES);
                blocks.load(isa, &batch, variances(isa, &rows, row_len / LEN, n * LANES));
                let fits = fit_symmetric(isa, &blocks.x, &blocks.weights, $half);
                let (d, inverses) = (stored(fits.scale), fits.inverse.to_array());
                for (lane, block) in out.iter_mut().enumerate() {
                    let levels = Pair::load(isa, batch.blocks[lane]).of_products(isa, inverses[lane], $half as f32);
                    block[..2].copy_from_slice(&d[lane].to_le_bytes());
                    put_levels!(isa, levels, block[2..], $top);
                }
            }
        }
    };
}

macro_rules! affine {
    ($name:ident: $bytes:literal, $scalar:ident, $search:expr, $top:tt) => {
        #[doc = concat!("[`", stringify!($scalar), "`](scalar::", stringify!($scalar), ").")]
        #[inline(always)]
        pub(crate) fn $name<I: Isa>(isa: I, src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]) {
            const SEARCH: AffineSearch = $search;
            if importance.is_none() {
                return legacy_plain::$name(isa, src, dst);
            }
            let rows = mean_squares(isa, src, row_len);
            let mut blocks = Blocks::new(isa);
            let mut levels = [[isa.splat(0.0); LEN]];
            for (n, out) in dst.as_chunks_mut::<$bytes>().0.chunks_mut(LANES).enumerate() {
                let batch = Batch::new(src, row_len, importance, n * LANES);
                blocks.load(isa, &batch, variances(isa, &rows, row_len / LEN, n * LANES));
                let (x, weights) = (from_ref(&blocks.x), from_ref(&blocks.weights));
                let [fits] = fit_affine(isa, x, weights, &SEARCH, &mut levels);
                let (d, m) = (stored(fits.scale), stored(fits.min.negated()));
                let (inverses, bases) = (fits.inverse.to_array(), fits.base.to_array());
                for (lane, block) in out.iter_mut().enumerate() {
                    let x = Pair::load(isa, batch.blocks[lane]);
                    let levels = x.of_search(isa, inverses[lane], bases[lane], SEARCH.max_level);
                    block[..2].copy_from_slice(&d[lane].to_le_bytes());
                    block[2..4].copy_from_slice(&m[lane].to_le_bytes());
                    put_levels!(isa, levels, block[4..], $top);
                }
            }
        }
    };
}

symmetric!(q4_0: 18, quantize_q4_0, scalar::Q4_HALF, 15);
symmetric!(q5_0: 22, quantize_q5_0, scalar::Q5_HALF, 31);
affine!(q4_1: 20, quantize_q4_1, scalar::Q4_1_SEARCH, 15);
affine!(q5_1: 24, quantize_q5_1, scalar::Q5_1_SEARCH, 31);
