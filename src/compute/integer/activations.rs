//! Activations as integers: what ggml's Q8_0 and Q8_K make of them.

use half::f16;
use rayon::prelude::*;

use super::{BLOCK, HALF_GROUP};
use crate::compute::activations::check_rows;
use crate::compute::aligned::AlignedBuf;
use crate::vectorized::vectorized;

/// How many values share a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Steps {
    /// Blocks of 32 with a binary16 step (Q8_0).
    Of32,
    /// Blocks of 256 with an f32 step (Q8_K).
    Of256,
}

/// Elements of the record of one token and block: 256 levels as bytes plus 128, four to an element; the steps of each
/// 32 values; the sums of levels of each 16 values and of each 32, as floats. Steps of 256 fill all eight places.
pub(super) const RECORD: usize = 96;
pub(super) const STEPS: usize = BLOCK / 4;
pub(super) const SUMS_16: usize = STEPS + BLOCK / 32;
pub(super) const SUMS_32: usize = SUMS_16 + BLOCK / HALF_GROUP;
const _: () = assert!(SUMS_32 + BLOCK / 32 == RECORD);

/// Rounded activations, in the order that products read.
pub struct IntegerActivations {
    steps: Steps,
    tokens: usize,
    cols: usize,
    // Block of columns, then token, then `RECORD` elements.
    records: AlignedBuf,
}

impl IntegerActivations {
    /// Rounds rows of `cols` floats that lie side by side. Uses rayon's current pool.
    ///
    /// # Panics
    /// When `x` is no whole number of rows, or `cols` no whole number of steps.
    pub fn round(x: &[f32], cols: usize, steps: Steps) -> IntegerActivations {
        let unit = match steps {
            Steps::Of32 => 32,
            Steps::Of256 => BLOCK,
        };
        assert!(cols > 0 && cols.is_multiple_of(unit), "rows of {cols} values");
        let tokens = x.len() / cols;
        check_rows("x", x.len(), tokens, cols, cols);
        let blocks = cols.div_ceil(BLOCK);
        let mut records = AlignedBuf::default();
        let used = blocks * tokens * RECORD;
        records.reserve(used);
        records.as_mut_slice()[..used].par_chunks_exact_mut(RECORD).with_min_len(64).enumerate().for_each(
            |(index, record)| {
                let (block, token) = (index / tokens, index % tokens);
                let columns = block * BLOCK..cols.min((block + 1) * BLOCK);
                fill_record(&x[token * cols..][columns], steps == Steps::Of32, record);
            },
        );
        IntegerActivations { steps, tokens, cols, records }
    }

    /// How many values share a step.
    pub fn steps(&self) -> Steps {
        self.steps
    }

    /// Rows.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Values per row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    pub(super) fn blocks(&self) -> usize {
        self.cols.div_ceil(BLOCK)
    }

    /// The records of `count` tokens from `token` on.
    pub(super) fn records(&self, block: usize, token: usize, count: usize) -> *const u32 {
        assert!(block < self.blocks() && token + count <= self.tokens);
        // SAFETY: within the buffer, as just checked.
        unsafe { self.records.as_ptr().add((block * self.tokens + token) * RECORD) }
    }
}

/// Rounds a row in place to what products of its integers see.
///
/// # Panics
/// When the row is no whole number of steps.
pub fn round_to_steps(row: &mut [f32], steps: Steps) {
    match steps {
        Steps::Of32 => round_of_32(row),
        Steps::Of256 => round_of_256(row),
    }
}

vectorized! {
    fn round_of_32(row: &mut [f32]) {
        for block in row.as_chunks_mut::<32>().0 {
            let Step { step, inverse } = step_of_32(block);
            block.iter_mut().for_each(|v| *v = (*v * inverse).round_ties_even() * step);
        }
    }
}

vectorized! {
    fn round_of_256(row: &mut [f32]) {
        for block in row.as_chunks_mut::<BLOCK>().0 {
            let Step { step, inverse } = step_of_256(block);
            block.iter_mut().for_each(|v| *v = level(*v, inverse) * step);
        }
    }
}

/// What a level is worth, and what values are multiplied with before they are rounded.
struct Step {
    step: f32,
    inverse: f32,
}

/// Q8_0 as the vector code of ggml's x86 backend has it: levels from the unrounded scale, half to even.
#[inline(always)]
fn step_of_32(block: &[f32; 32]) -> Step {
    let largest = largest_magnitude(block);
    let inverse = if largest == 0.0 { 0.0 } else { 127.0 / largest };
    Step { step: f16::from_f32(largest / 127.0).to_f32(), inverse }
}

/// Q8_K: the value of largest magnitude, the first of several, its sign included, becomes -127.
#[inline(always)]
fn step_of_256(block: &[f32; BLOCK]) -> Step {
    let largest = largest_magnitude(block);
    if largest == 0.0 {
        return Step { step: 0.0, inverse: 0.0 };
    }
    let extreme = block.iter().copied().find(|v| v.abs() == largest).unwrap_or(largest);
    let inverse = -127.0 / extreme;
    Step { step: 1.0 / inverse, inverse }
}

#[inline(always)]
fn level(value: f32, inverse: f32) -> f32 {
    let rounded = (value * inverse).round_ties_even();
    if rounded < 127.0 { rounded } else { 127.0 }
}

#[inline(always)]
fn largest_magnitude(block: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    for chunk in block.as_chunks::<16>().0 {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            let v = v.abs();
            *lane = if v > *lane { v } else { *lane };
        }
    }
    lanes.iter().fold(0.0, |a, v| if *v > a { *v } else { a })
}

/// Added to a small number, leaves it rounded to the nearest integer (half to even) in the low bits of the float.
pub(super) const TO_INTEGER: f32 = 12_582_912.0;

/// The low byte of a whole number between -128 and 127.
#[inline(always)]
pub(super) fn low_byte(value: f32) -> u8 {
    (value + TO_INTEGER).to_bits() as u8
}

vectorized! {
    fn fill_record(values: &[f32], of_32: bool, record: &mut [u32]) {
        let mut levels = [0.0f32; BLOCK];
        let mut steps = [0.0f32; BLOCK / 32];
        if of_32 {
            for ((values, levels), place) in
                values.as_chunks::<32>().0.iter().zip(levels.as_chunks_mut::<32>().0).zip(&mut steps)
            {
                let Step { step, inverse } = step_of_32(values);
                *levels = values.map(|v| (v * inverse).round_ties_even());
                *place = step;
            }
        } else if let Some(values) = values.first_chunk() {
            let Step { step, inverse } = step_of_256(values);
            levels = values.map(|v| level(v, inverse));
            steps = [step; BLOCK / 32];
        }
        for (element, quad) in record.iter_mut().zip(levels.as_chunks::<4>().0) {
            *element = u32::from_le_bytes(quad.map(|v| low_byte(v) ^ 0x80));
        }
        for (element, step) in record[STEPS..].iter_mut().zip(steps) {
            *element = step.to_bits();
        }
        let mut sums = [0.0f32; BLOCK / HALF_GROUP];
        for (sum, levels) in sums.iter_mut().zip(levels.as_chunks::<HALF_GROUP>().0) {
            *sum = levels.iter().sum();
        }
        for (element, sum) in record[SUMS_16..].iter_mut().zip(sums) {
            *element = sum.to_bits();
        }
        for (element, pair) in record[SUMS_32..].iter_mut().zip(sums.as_chunks::<2>().0) {
            *element = (pair[0] + pair[1]).to_bits();
        }
    }
}
