//! Q2_K to Q6_K, sixteen super-blocks at a time: lane `k` is block `k`, and the groups of a block follow each other.
//! Scales of groups are then one block per lane as the fits of super-blocks want them. The last steps, which cost
//! little, run block by block with the scalar functions.

use super::descent::Descents;
use super::search::{AffineFits, PositiveFits, fit_affine, fit_positive, fit_symmetric};
use super::{Batch, Floats, Isa, LANES, Wide, error_weights, side_by_side, sum, sum_of_squares};
use crate::quant::search::{
    AffineFit, AffineSearch, LevelMap, PositiveFit, SymmetricFit, fit_symmetric_by_descent as scalar_descent,
};
use crate::quant::types::affine_k::{self, Format};
use crate::quant::types::{q2_k, q3_k, q4_k, q5_k, q6_k};

const LEN: usize = 256;

/// Affine fits of `GROUPS` groups of sixteen blocks.
struct BlockFits<const GROUPS: usize> {
    scales: [[f32; LANES]; GROUPS],
    mins: [[f32; LANES]; GROUPS],
    inverses: [[f32; LANES]; GROUPS],
    bases: [[f32; LANES]; GROUPS],
}

impl<const GROUPS: usize> BlockFits<GROUPS> {
    const EMPTY: Self = {
        let none = [[0.0; LANES]; GROUPS];
        Self { scales: none, mins: none, inverses: none, bases: none }
    };

    #[inline(always)]
    fn set<F: Floats>(&mut self, group: usize, fits: &AffineFits<F>) {
        self.scales[group] = fits.scale.to_array();
        self.mins[group] = fits.min.to_array();
        self.inverses[group] = fits.inverse.to_array();
        self.bases[group] = fits.base.to_array();
    }

    #[inline(always)]
    fn level_map(&self, group: usize, lane: usize) -> LevelMap {
        LevelMap { inverse: self.inverses[group][lane], min: self.bases[group][lane] }
    }

    /// The fits of one block.
    #[inline(always)]
    fn of_block(&self, lane: usize) -> [AffineFit; GROUPS] {
        let nothing = AffineFit { scale: 0.0, min: 0.0, level_map: LevelMap { inverse: 0.0, min: 0.0 } };
        let mut fits = [nothing; GROUPS];
        for (group, fit) in fits.iter_mut().enumerate() {
            let (scale, min) = (self.scales[group][lane], self.mins[group][lane]);
            *fit = AffineFit { scale, min, level_map: self.level_map(group, lane) };
        }
        fits
    }
}

/// Fits of scales or minima of sixteen blocks, by block.
struct PositiveBlocks<const GROUPS: usize> {
    scales: [f32; LANES],
    levels: [[f32; LANES]; GROUPS],
}

impl<const GROUPS: usize> PositiveBlocks<GROUPS> {
    #[inline(always)]
    fn new<F: Floats>(fits: &PositiveFits<F, GROUPS>) -> Self {
        PositiveBlocks { scales: fits.scale.to_array(), levels: arrays(&fits.levels) }
    }

    #[inline(always)]
    fn of_block(&self, lane: usize) -> PositiveFit<GROUPS> {
        let mut levels = [0; GROUPS];
        for (group, level) in levels.iter_mut().enumerate() {
            // A byte by construction.
            *level = self.levels[group][lane] as u8;
        }
        PositiveFit { scale: self.scales[lane], levels }
    }
}

#[inline(always)]
fn arrays<F: Floats, const N: usize>(vectors: &[F; N]) -> [[f32; LANES]; N] {
    let mut arrays = [[0.0; LANES]; N];
    for (array, vector) in arrays.iter_mut().zip(vectors) {
        *array = vector.to_array();
    }
    arrays
}

/// Column `lane`.
#[inline(always)]
fn of_block<const N: usize>(values: &[[f32; LANES]; N], lane: usize) -> [f32; N] {
    let mut column = [0.0; N];
    for (value, row) in column.iter_mut().zip(values) {
        *value = row[lane];
    }
    column
}

/// Groups whose affine fits are searched together.
const TOGETHER: usize = 2;

/// Sixteen blocks with weights of errors in the place of their importance.
///
/// `levels`, which a search writes for each candidate, begins a little more than a multiple of 4096 bytes after the
/// weights it is made from: a load waits for a store before it whose address has the same low bits. Measured with
/// AVX-512 on Zen 4: Q4_K is 30% slower at an unlucky distance, Q2_K 15%.
#[repr(C)]
struct Blocks<F> {
    x: [F; LEN],
    weights: [F; LEN],
    apart: [F; 4],
    levels: [F; TOGETHER * 32],
}

impl<F: Floats> Blocks<F> {
    #[inline(always)]
    fn new<I: Isa<Floats = F>>(isa: I) -> Self {
        let zero = isa.splat(0.0);
        Self { x: [zero; LEN], weights: [zero; LEN], apart: [zero; 4], levels: [zero; TOGETHER * 32] }
    }

    /// Keeps the compiler from taking the fields apart, which would leave their distances to chance.
    #[inline(always)]
    fn stay_together(&mut self) {
        std::hint::black_box(self);
    }

    /// Loads the batch. With importance, the weights of errors are set for a variance of `factor` times the mean
    /// square, and true is returned.
    #[inline(always)]
    fn load<I: Isa<Floats = F>>(&mut self, isa: I, batch: &Batch<'_, LEN>, factor: f32) -> bool {
        side_by_side(isa, &batch.blocks, &mut self.x);
        let Some(importance) = &batch.importance else { return false };
        side_by_side(isa, importance, &mut self.weights);
        let sigma2 = isa.splat(factor) * sum_of_squares(isa, &self.x) / isa.splat(LEN as f32);
        error_weights(&self.x, &mut self.weights, sigma2);
        true
    }
}

/// Fits all groups of sixteen blocks, and, for `TOP` above 0, their scales and minima too.
#[inline(always)]
fn fit_groups<I: Isa, const GROUP: usize, const GROUPS: usize>(
    isa: I,
    blocks: &mut Blocks<I::Floats>,
    search: &AffineSearch,
    fits: &mut BlockFits<GROUPS>,
    top: Option<u8>,
) -> Option<[PositiveBlocks<GROUPS>; 2]> {
    let zero = isa.splat(0.0);
    let (mut scales, mut mins, mut sums) = ([zero; GROUPS], [zero; GROUPS], [zero; GROUPS]);
    let x = blocks.x.as_chunks::<GROUP>().0.as_chunks::<TOGETHER>().0;
    let weights = blocks.weights.as_chunks::<GROUP>().0.as_chunks::<TOGETHER>().0;
    let levels = blocks.levels.as_chunks_mut::<GROUP>().0.first_chunk_mut::<TOGETHER>()?;
    for (n, (x, weights)) in x.iter().zip(weights).enumerate() {
        let found = fit_affine(isa, x, weights, search, levels);
        for g in 0..TOGETHER {
            let j = n * TOGETHER + g;
            (scales[j], mins[j]) = (found[g].scale, found[g].min);
            fits.set(j, &found[g]);
            sums[j] = sum(isa, &weights[g]);
        }
    }
    let top = top?;
    Some([
        PositiveBlocks::new(&fit_positive(isa, &scales, &sums, top)),
        PositiveBlocks::new(&fit_positive(isa, &mins, &sums, top)),
    ])
}

macro_rules! affine_k {
    ($(#[$doc:meta])* $name:ident: $bytes:literal) => {
        $(#[$doc])*
        #[inline(always)]
        pub(crate) fn $name<I: Isa>(isa: I, src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]) {
            const FORMAT: Format = $name::FORMAT;
            let mut blocks = Blocks::new(isa);
            blocks.stay_together();
            let mut fits = BlockFits::<{ affine_k::GROUPS }>::EMPTY;
            for (n, out) in dst.as_chunks_mut::<$bytes>().0.chunks_mut(LANES).enumerate() {
                let batch = Batch::new(src, row_len, importance, n * LANES);
                if blocks.load(isa, &batch, 2.0) {
                    let top = Some(affine_k::TOP);
                    let positive =
                        fit_groups::<I, { affine_k::GROUP }, _>(isa, &mut blocks, &FORMAT.weighted, &mut fits, top);
                    let Some([scales, mins]) = positive else { continue };
                    for (lane, block) in out.iter_mut().enumerate() {
                        let (scales, mins) = (scales.of_block(lane), mins.of_block(lane));
                        $name::finish(block, |header| {
                            let searched = |j: usize| fits.level_map(j, lane);
                            FORMAT.finish_weighted(Wide(isa), batch.blocks[lane], scales, mins, searched, header)
                        });
                    }
                } else {
                    spread_weights(isa, &mut blocks);
                    fit_groups::<I, { affine_k::GROUP }, _>(isa, &mut blocks, &FORMAT.plain, &mut fits, None);
                    for (lane, block) in out.iter_mut().enumerate() {
                        let fits = fits.of_block(lane);
                        $name::finish(block, |header| FORMAT.finish_plain(Wide(isa), batch.blocks[lane], &fits, header));
                    }
                }
            }
        }
    };
}

/// The weights of Q4_K and Q5_K without importance: root mean square of the group plus magnitude.
#[inline(always)]
fn spread_weights<I: Isa>(isa: I, blocks: &mut Blocks<I::Floats>) {
    let (x, weights) = (blocks.x.as_chunks::<{ affine_k::GROUP }>().0, blocks.weights.as_chunks_mut().0);
    for (x, weights) in x.iter().zip(weights) {
        let weights: &mut [_; affine_k::GROUP] = weights;
        let spread = (sum_of_squares(isa, x) / isa.splat(affine_k::GROUP as f32)).sqrt();
        for i in 0..affine_k::GROUP {
            weights[i] = spread + x[i].abs();
        }
    }
}

affine_k!(/// [`q4_k::quantize`].
    q4_k: 144);
affine_k!(/// [`q5_k::quantize`].
    q5_k: 176);

/// [`q2_k::quantize`].
#[inline(always)]
pub(crate) fn q2_k<I: Isa>(isa: I, src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]) {
    let mut blocks = Blocks::new(isa);
    blocks.stay_together();
    let mut fits = BlockFits::<{ q2_k::GROUPS }>::EMPTY;
    for (n, out) in dst.as_chunks_mut::<{ q2_k::BYTES }>().0.chunks_mut(LANES).enumerate() {
        let batch = Batch::new(src, row_len, importance, n * LANES);
        if blocks.load(isa, &batch, 1.0) {
            let top = Some(q2_k::TOP as u8);
            let positive = fit_groups::<I, { q2_k::GROUP }, _>(isa, &mut blocks, &q2_k::WEIGHTED, &mut fits, top);
            let Some([scales, mins]) = positive else { continue };
            for (lane, block) in out.iter_mut().enumerate() {
                let (scales, mins) = (scales.of_block(lane), mins.of_block(lane));
                q2_k::finish_weighted(
                    Wide(isa),
                    batch.blocks[lane],
                    &scales,
                    &mins,
                    |j| fits.level_map(j, lane),
                    block,
                );
            }
        } else {
            for i in 0..LEN {
                blocks.weights[i] = blocks.x[i].abs();
            }
            fit_groups::<I, { q2_k::GROUP }, _>(isa, &mut blocks, &q2_k::PLAIN, &mut fits, None);
            for (lane, block) in out.iter_mut().enumerate() {
                q2_k::finish_plain(Wide(isa), batch.blocks[lane], &fits.of_block(lane), block);
            }
        }
    }
}

/// [`q3_k::quantize`].
#[inline(always)]
pub(crate) fn q3_k<I: Isa>(isa: I, src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]) {
    let zero = isa.splat(0.0);
    let mut blocks = Blocks::new(isa);
    let mut descents = Descents::new();
    for (n, out) in dst.as_chunks_mut::<{ q3_k::BYTES }>().0.chunks_mut(LANES).enumerate() {
        let batch = Batch::new(src, row_len, importance, n * LANES);
        if blocks.load(isa, &batch, 2.0) {
            let (x, weights) = (blocks.x.as_chunks::<{ q3_k::GROUP }>().0, blocks.weights.as_chunks().0);
            let (mut scales, mut sums) = ([zero; q3_k::GROUPS], [zero; q3_k::GROUPS]);
            let mut inverses = [zero; q3_k::GROUPS];
            for j in 0..q3_k::GROUPS {
                let fits = fit_symmetric(isa, &x[j], &weights[j], q3_k::HALF);
                (scales[j], inverses[j]) = (fits.scale, fits.inverse);
                sums[j] = sum(isa, &weights[j]);
            }
            let fits = fit_symmetric(isa, &scales, &sums, q3_k::SCALE_HALF);
            let (scales, inverses) = (arrays(&scales), arrays(&inverses));
            let (of_scales, of_inverses) = (fits.scale.to_array(), fits.inverse.to_array());
            for (lane, block) in out.iter_mut().enumerate() {
                let fit = SymmetricFit { scale: of_scales[lane], inverse: of_inverses[lane] };
                let (scales, inverses) = (of_block(&scales, lane), of_block(&inverses, lane));
                q3_k::finish_weighted(Wide(isa), batch.blocks[lane], &scales, &inverses, &fit, block);
            }
        } else {
            descents.run(isa, &batch, &blocks.x);
            for (lane, block) in out.iter_mut().enumerate() {
                // Wanted for groups whose stored scale is zero, which are few.
                let searched = |j: usize| scalar_descent(&q3_k::groups(batch.blocks[lane])[j], q3_k::HALF).1;
                q3_k::finish_plain(Wide(isa), batch.blocks[lane], &of_block(&descents.scales, lane), searched, block);
            }
        }
    }
}

/// [`q6_k::quantize`].
#[inline(always)]
pub(crate) fn q6_k<I: Isa>(isa: I, src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]) {
    let zero = isa.splat(0.0);
    let mut blocks = Blocks::new(isa);
    for (n, out) in dst.as_chunks_mut::<{ q6_k::BYTES }>().0.chunks_mut(LANES).enumerate() {
        let batch = Batch::new(src, row_len, importance, n * LANES);
        side_by_side(isa, &batch.blocks, &mut blocks.x);
        if let Some(importance) = &batch.importance {
            side_by_side(isa, importance, &mut blocks.weights);
        } else {
            for i in 0..LEN {
                blocks.weights[i] = blocks.x[i] * blocks.x[i];
            }
        }
        let (x, weights) = (blocks.x.as_chunks::<{ q6_k::GROUP }>().0, blocks.weights.as_chunks().0);
        let (mut scales, mut inverses) = ([zero; q6_k::GROUPS], [zero; q6_k::GROUPS]);
        for j in 0..q6_k::GROUPS {
            let fits = fit_symmetric(isa, &x[j], &weights[j], q6_k::HALF);
            (scales[j], inverses[j]) = (fits.scale, fits.inverse);
        }
        let (scales, inverses) = (arrays(&scales), arrays(&inverses));
        for (lane, block) in out.iter_mut().enumerate() {
            q6_k::finish(Wide(isa), batch.blocks[lane], &of_block(&scales, lane), &of_block(&inverses, lane), block);
        }
    }
}
