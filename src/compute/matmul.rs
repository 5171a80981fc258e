//! Cache blocking and threads around the register tiles.

use super::activations::{PackedActivations, check_rows};
use super::aligned::AlignedBuf;
use super::matrix::Matrix;
use super::micro::{DEPTH, Kernel, MAX_NR, MAX_TILE, ROW_STRIDE};
use rayon::prelude::*;
use std::cell::RefCell;
use std::ops::Range;

/// Weight rows that are packed at a time: with DEPTH elements of 4 bytes each, a quarter of a common
/// second-level cache.
const TILE_ROWS: usize = 256;

/// Bytes that one prefetch brings.
const CACHE_LINE: usize = 64;

/// Tiles per thread, so that threads of unequal speed end together.
const TILES_PER_THREAD: usize = 6;

/// Fewest token panels of a tile: below that, decoding the weights again for each tile costs too much.
const MIN_TILE_PANELS: usize = 4;

/// `Y[t, o] = sum over i of X[t, i] * W[o, i]`, with X of `x.tokens()` rows and Y row-major with rows
/// `ldy` floats apart, of which the first `w.rows()` are written.
///
/// Runs on rayon's current pool; results do not depend on its size. Scratch memory is a few hundred
/// kilobytes per thread and is kept.
///
/// # Panics
/// When `x.cols() != w.cols()`, `ldy < w.rows()` or `y` is too short.
pub fn matmul(x: &PackedActivations, w: &Matrix, y: &mut [f32], ldy: usize) {
    assert_eq!(x.cols(), w.cols(), "columns of the activations and of the weights");
    check_rows("y", y.len(), x.tokens(), w.rows(), ldy);
    if x.tokens() == 0 || w.rows() == 0 {
        return;
    }
    if x.cols() == 0 {
        y.chunks_mut(ldy).take(x.tokens()).for_each(|row| row[..w.rows()].fill(0.0));
        return;
    }
    let threads = rayon::current_num_threads();
    let nr = x.kernel().nr;
    let plan = Plan::new(w.rows().div_ceil(nr), x.panels(), TILE_ROWS / nr, threads);
    let output = Output { start: y.as_mut_ptr(), stride: ldy };
    let run = |index: usize| {
        SCRATCH.with_borrow_mut(|scratch| {
            let (rows, panels) = plan.tile(index);
            // SAFETY: tiles of a plan do not overlap, and `check_rows` found all of them within `y`, which is
            // borrowed mutably until every tile is done.
            unsafe { multiply_tile(x, w, rows, panels, output, scratch) }
        });
    };
    if threads == 1 || plan.count() == 1 {
        (0..plan.count()).for_each(run);
    } else {
        (0..plan.count()).into_par_iter().with_max_len(1).for_each(run);
    }
}

/// How the output is divided: tiles of some weight panels by some token panels.
pub(super) struct Plan {
    row_panels: usize,
    token_panels: usize,
    tile_row_panels: usize,
    tile_token_panels: usize,
}

impl Plan {
    /// Tiles of at most `largest` weight panels.
    pub(super) fn new(row_panels: usize, token_panels: usize, largest: usize, threads: usize) -> Plan {
        let (mut tile_row_panels, mut tile_token_panels) = (largest.min(row_panels), token_panels);
        if threads > 1 {
            let wanted = threads * TILES_PER_THREAD;
            tile_row_panels = row_panels.div_ceil(wanted).clamp(1, largest);
            let by_rows = row_panels.div_ceil(tile_row_panels);
            if by_rows < threads {
                let parts = (2 * threads).div_ceil(by_rows);
                tile_token_panels = token_panels.div_ceil(parts).max(MIN_TILE_PANELS);
            }
        }
        Plan { row_panels, token_panels, tile_row_panels, tile_token_panels }
    }

    pub(super) fn count(&self) -> usize {
        self.row_panels.div_ceil(self.tile_row_panels) * self.token_panels.div_ceil(self.tile_token_panels)
    }

    /// Tiles of one unit of outputs each, so large that decoding it again for other tokens costs little, and of so many token
    /// panels that all threads have several tiles.
    pub(super) fn of_units(units: usize, token_panels: usize, threads: usize) -> Plan {
        let parts = if threads > 1 { (threads * TILES_PER_THREAD).div_ceil(units.max(1)) } else { 1 };
        let tile_token_panels = token_panels.div_ceil(parts).max(MIN_TILE_PANELS);
        Plan { row_panels: units, token_panels, tile_row_panels: 1, tile_token_panels }
    }

    /// Weight panels and token panels of one tile.
    pub(super) fn tile(&self, index: usize) -> (Range<usize>, Range<usize>) {
        let across = self.token_panels.div_ceil(self.tile_token_panels);
        let (row, token) = (index / across * self.tile_row_panels, index % across * self.tile_token_panels);
        let rows = row..(row + self.tile_row_panels).min(self.row_panels);
        (rows, token..(token + self.tile_token_panels).min(self.token_panels))
    }
}

/// Y as seen by the threads, each of which writes its own tiles.
#[derive(Clone, Copy)]
pub(super) struct Output {
    pub start: *mut f32,
    pub stride: usize,
}

// SAFETY: only a pointer; `matmul` hands each thread disjoint tiles of what it points to.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

/// Per-thread memory, reused by every product.
#[derive(Default)]
pub(super) struct Scratch {
    /// Packed weights of a tile and block.
    pub panels: AlignedBuf,
    /// Decoded rows of one panel, before they are transposed.
    pub decoded: AlignedBuf,
    /// A register tile that sticks out of Y.
    pub tile: AlignedBuf,
}

thread_local! {
    pub(super) static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Computes the outputs of some weight panels for some token panels, over all columns.
///
/// # Safety
/// The rows and tokens of the panels lie within `output`, and nobody else uses that part of it.
unsafe fn multiply_tile(
    x: &PackedActivations,
    w: &Matrix,
    row_panels: Range<usize>,
    token_panels: Range<usize>,
    output: Output,
    scratch: &mut Scratch,
) {
    let kernel = x.kernel();
    let panel_elements = DEPTH * kernel.nr;
    scratch.panels.reserve(row_panels.len() * panel_elements);
    scratch.tile.reserve(MAX_TILE);
    for block in 0..x.blocks() {
        let first_column = block * kernel.block_columns();
        let columns = (x.cols() - first_column).min(kernel.block_columns());
        let depth = columns.div_ceil(kernel.columns_per_element);
        for (panel, packed) in row_panels.clone().zip(scratch.panels.as_mut_slice().chunks_exact_mut(panel_elements)) {
            pack_weights(kernel, w, panel, first_column, columns, &mut scratch.decoded, packed);
        }
        let tile = PackedTile { block, depth, token_panels: token_panels.clone(), output_panels: row_panels.clone() };
        // SAFETY: as promised for this function; the panels were packed above, all of them within `w.rows()` outputs.
        unsafe { multiply_packed(x, &tile, w.rows(), output, scratch, block > 0) };
    }
}

/// Some token panels of a block of activations and the panels of outputs that they are multiplied by.
pub(super) struct PackedTile {
    pub block: usize,
    /// Elements per lane.
    pub depth: usize,
    pub token_panels: Range<usize>,
    /// Panels of outputs, which lie packed in the scratch from its start.
    pub output_panels: Range<usize>,
}

/// Multiplies a tile of one block and stores the products, or adds them.
///
/// # Safety
/// Rows of `output` have `outputs` floats, every panel begins within them, and nobody else uses the tile's part of them;
/// `scratch.panels` holds the panels, packed for `x`'s kernel, and `scratch.tile` any register tile.
pub(super) unsafe fn multiply_packed(
    x: &PackedActivations,
    tile: &PackedTile,
    outputs: usize,
    output: Output,
    scratch: &mut Scratch,
    add: bool,
) {
    let kernel = x.kernel();
    let (mr, nr) = (kernel.mr, kernel.nr);
    for token_panel in tile.token_panels.clone() {
        let token = token_panel * mr;
        let tokens = mr.min(x.tokens() - token);
        let a = x.panel(tile.block, token_panel);
        for (index, panel) in tile.output_panels.clone().enumerate() {
            prefetch_following(kernel, a, index, tile.output_panels.len());
            let first = panel * nr;
            let width = nr.min(outputs - first);
            // SAFETY: the panel is packed by contract; the level was checked when `x` was made; a whole panel of
            // outputs lies within `output` by contract, and a part of one goes through `scratch.tile`.
            unsafe {
                let b = scratch.panels.as_ptr().add(index * DEPTH * nr);
                let c = output.start.add(token * output.stride + first);
                if width == nr {
                    (kernel.tile)(tokens, tile.depth, a, b, c, output.stride, add);
                    continue;
                }
                let sums = scratch.tile.as_mut_f32();
                (kernel.tile)(tokens, tile.depth, a, b, sums.as_mut_ptr(), nr, false);
                for (index, sums) in sums.chunks_exact(nr).take(tokens).enumerate() {
                    let target = std::slice::from_raw_parts_mut(c.add(index * output.stride), width);
                    add_or_store(target, sums, add);
                }
            }
        }
    }
}

/// Asks for one of `shares` shares of the token panel that follows the one at `a` in memory. The panels of a block lie
/// side by side and come from the third-level cache; without this each tile waits for some of their lines (3 to 6
/// per cent of the whole product).
fn prefetch_following(kernel: &Kernel, a: *const u32, share: usize, shares: usize) {
    let lines = (kernel.mr * ROW_STRIDE * size_of::<u32>()).div_ceil(CACHE_LINE);
    let per_share = lines.div_ceil(shares);
    for line in lines + share * per_share..lines + lines.min((share + 1) * per_share) {
        prefetch_line(a.wrapping_byte_add(line * CACHE_LINE).cast());
    }
}

/// Asks for one cache line, where stable Rust has an instruction for it; any address is allowed.
fn prefetch_line(line: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: prefetching has no effect but on caches, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

/// Writes the valid part of a register tile's row as the kernel itself would.
pub(super) fn add_or_store(target: &mut [f32], sums: &[f32], accumulate: bool) {
    for (value, &sum) in target.iter_mut().zip(sums) {
        *value = if accumulate { *value + sum } else { sum };
    }
}

/// Decodes `columns` columns of one panel's weight rows and transposes them into `packed`.
fn pack_weights(
    kernel: &Kernel,
    w: &Matrix,
    panel: usize,
    first_column: usize,
    columns: usize,
    decoded: &mut AlignedBuf,
    packed: &mut [u32],
) {
    let stride = kernel.block_columns();
    decoded.reserve(MAX_NR * stride);
    let rows = decoded.as_mut_f32();
    let padded = columns.next_multiple_of(32);
    for (lane, target) in rows.chunks_exact_mut(stride).take(kernel.nr).enumerate() {
        let row = panel * kernel.nr + lane;
        if row < w.rows() {
            w.decode_columns(row, first_column, &mut target[..columns]);
            // Rows lie far apart, so that the CPU's own prefetchers see each one late: ask for those of the panel
            // that follows.
            if row + kernel.nr < w.rows() {
                let following = w.columns_bytes(row + kernel.nr, first_column, columns);
                following.chunks(CACHE_LINE).for_each(|line| prefetch_line(line.as_ptr()));
            }
            target[columns..padded].fill(0.0);
        } else {
            target[..padded].fill(0.0);
        }
    }
    assert!(packed.len() >= DEPTH * kernel.nr);
    // SAFETY: every row has `stride` floats, a multiple of 32, and the panel DEPTH elements per lane; whoever made
    // the activations checked the kernel's level.
    unsafe {
        (kernel.pack_panel)(rows.as_ptr(), stride, columns.div_ceil(kernel.columns_per_element), packed.as_mut_ptr());
    }
}
