//! Products of quantized weights with activations that are rounded to eight-bit integers, as ggml's CPU backend
//! computes them.
//!
//! Both sides are integers times scales, so that sums within a group of weights are exact and fast: `vpdpbusd`
//! multiplies four pairs in the lane where a fused multiply-add has one.
//!
//! # Arithmetic
//! Weights of a group of 16 or 32 are `scale * code + offset`. Activations are `step * level`, with one step for 32
//! values (ggml's Q8_0) or for 256 (Q8_K). With D the exact sum of `code * level` over a group and L that of `level`:
//! - steps of 256: `a = fma(D, scale, a)`, then `a = fma(L, offset, a)` where the type has offsets, group after group
//!   from zero; the block of 256 columns is worth `a * step`;
//! - steps of 32: `t = D * scale`, `t = fma(L, offset, t)`, `a = fma(t, step, a)`; the block is worth `a`.
//!
//! Blocks are added up in ascending order. All of that belongs to the definition: every instruction set and number of
//! threads gives the same bytes.

mod activations;
mod panel;
mod portable;
#[cfg(target_arch = "x86_64")]
mod vnni;

#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

pub use activations::{IntegerActivations, Steps, round_to_steps};

use super::aligned::AlignedBuf;
use super::matmul::{Output, Plan};
use super::matrix::Matrix;
use crate::gguf::TensorType;
use crate::quant::types::lines::{LineShape, line_shape};
use panel::Panel;

/// Columns of a block.
const BLOCK: usize = 256;

/// Weights that have one sum of levels in a record of activations.
const HALF_GROUP: usize = 16;

/// True if weights of `ty` can be multiplied as integers.
pub fn multiplies_as_integers(ty: TensorType) -> bool {
    line_shape(ty).is_some()
}

/// One panel of weights with some tokens: `rows` of activations from `x` on, records [`activations::RECORD`] elements
/// apart. The buffer is the engine's own.
///
/// # Safety
/// `1 <= rows <= mr` of the engine; records hold a block; the panel holds `columns` columns; the target is writable at
/// `rows` rows of `nr` floats; the CPU has the engine's instructions.
type TileFn = unsafe fn(TileShape, rows: usize, x: *const u32, &Panel, Target, &mut AlignedBuf);

/// Where a tile goes: rows `stride` floats apart from `start` on.
#[derive(Clone, Copy)]
struct Target {
    start: *mut f32,
    stride: usize,
    /// Adds to what is there instead of replacing it.
    accumulate: bool,
}

/// What a tile does besides its sizes.
#[derive(Clone, Copy, Debug)]
struct TileShape {
    lines: LineShape,
    steps: Steps,
    /// Columns of this block.
    columns: usize,
}

/// The instructions that multiply.
#[derive(Clone, Copy)]
struct Engine {
    name: &'static str,
    /// Tokens of a tile.
    mr: usize,
    /// Outputs of a tile.
    nr: usize,
    tile: TileFn,
    /// Brings the codes of a panel from `[lane][BLOCK]` floats into the engine's order.
    pack: fn(panel: &mut Panel),
}

impl Engine {
    fn best() -> Engine {
        #[cfg(target_arch = "x86_64")]
        if let Some(isa) = crate::cpu::Avx512Vnni::new() {
            return vnni::engine(isa);
        }
        portable::engine()
    }
}

/// Name of the instructions that [`matmul_integer`] uses here, for reports.
pub fn integer_engine() -> &'static str {
    Engine::best().name
}

/// `Y[t, o] = sum over i of X[t, i] * W[o, i]` in integers, with X of `x.tokens()` rows and Y row-major with rows `ldy`
/// floats apart, of which the first `w.rows()` are written. Runs on rayon's current pool.
///
/// # Panics
/// When the weights cannot be multiplied so, `x.cols() != w.cols()`, `ldy < w.rows()` or `y` is too short.
pub fn matmul_integer(x: &IntegerActivations, w: &Matrix, y: &mut [f32], ldy: usize) {
    matmul_with(Engine::best(), x, w, y, ldy);
}

fn matmul_with(engine: Engine, x: &IntegerActivations, w: &Matrix, y: &mut [f32], ldy: usize) {
    assert_eq!(x.cols(), w.cols(), "columns of the activations and of the weights");
    super::activations::check_rows("y", y.len(), x.tokens(), w.rows(), ldy);
    let Some(lines) = line_shape(w.ty()) else { panic!("{} is not multiplied as integers", w.ty()) };
    if x.tokens() == 0 || w.rows() == 0 {
        return;
    }
    let token_panels = x.tokens().div_ceil(engine.mr);
    let threads = rayon::current_num_threads();
    let plan = Plan::new(w.rows().div_ceil(engine.nr), token_panels, MOST_PANELS, threads);
    let output = Output { start: y.as_mut_ptr(), stride: ldy };
    let run = |index: usize| {
        SCRATCH.with_borrow_mut(|scratch| {
            let (rows, panels) = plan.tile(index);
            // SAFETY: tiles of a plan do not overlap, and `check_rows` found all of them within `y`, which is
            // borrowed mutably until every tile is done.
            unsafe { multiply_tile(engine, lines, x, w, rows, panels, output, scratch) }
        });
    };
    if threads == 1 || plan.count() == 1 {
        (0..plan.count()).for_each(run);
    } else {
        (0..plan.count()).into_par_iter().with_max_len(1).for_each(run);
    }
}

/// Weight panels of a tile at most: fewer tiles decode activations' records fewer times, more tiles share the work
/// better.
const MOST_PANELS: usize = 8;

#[derive(Default)]
struct Scratch {
    panel: Panel,
    tile: AlignedBuf,
    engine: AlignedBuf,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Computes the outputs of some weight panels for some token panels, over all columns. A panel of weights stays in the
/// first-level cache while all tokens pass.
///
/// # Safety
/// The rows and tokens of the panels lie within `output`, and nobody else uses that part of it.
#[allow(clippy::too_many_arguments)]
unsafe fn multiply_tile(
    engine: Engine,
    lines: LineShape,
    x: &IntegerActivations,
    w: &Matrix,
    row_panels: Range<usize>,
    token_panels: Range<usize>,
    output: Output,
    scratch: &mut Scratch,
) {
    let (mr, nr) = (engine.mr, engine.nr);
    scratch.tile.reserve(mr * nr);
    for row in row_panels.map(|panel| panel * nr) {
        let rows = nr.min(w.rows() - row);
        for block in 0..x.blocks() {
            let first = block * BLOCK;
            let columns = (x.cols() - first).min(BLOCK);
            scratch.panel.fill(w, row, rows, nr, first, columns, lines);
            (engine.pack)(&mut scratch.panel);
            let shape = TileShape { lines, steps: x.steps(), columns };
            for token in token_panels.clone().map(|panel| panel * mr) {
                let tokens = mr.min(x.tokens() - token);
                let records = x.records(block, token, tokens);
                // SAFETY: the records hold `tokens` tokens, the panel was packed above; a whole panel of outputs lies
                // within `output` by contract, and a part of one goes through `scratch.tile`, which holds any tile.
                unsafe {
                    let (start, stride) = (output.start.add(token * output.stride + row), output.stride);
                    let Scratch { panel, tile, engine: own } = scratch;
                    if rows == nr {
                        let target = Target { start, stride, accumulate: block > 0 };
                        (engine.tile)(shape, tokens, records, panel, target, own);
                        continue;
                    }
                    let tile = tile.as_mut_f32();
                    let whole = Target { start: tile.as_mut_ptr(), stride: nr, accumulate: false };
                    (engine.tile)(shape, tokens, records, panel, whole, own);
                    for (index, sums) in tile.chunks_exact(nr).take(tokens).enumerate() {
                        let target = std::slice::from_raw_parts_mut(start.add(index * stride), rows);
                        super::matmul::add_or_store(target, sums, block > 0);
                    }
                }
            }
        }
    }
}
