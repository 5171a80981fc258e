//! Input rows of a product, packed once for every matrix that reads them.

use super::Precision;
use super::aligned::AlignedBuf;
use super::micro::{Kernel, ROW_STRIDE};
use rayon::prelude::*;

/// Rows of f32 activations in the layout of the kernel that will multiply them.
///
/// Packing costs one pass over the rows; the memory is `tokens x n_in` elements of 4 bytes (2 when bfloat16),
/// rounded up to whole blocks of columns. The buffer is reused by [`PackedActivations::pack`].
pub struct PackedActivations {
    kernel: &'static Kernel,
    tokens: usize,
    cols: usize,
    // Block of columns, then panel of `mr` tokens, then token of the panel, then `ROW_STRIDE` elements.
    elements: AlignedBuf,
}

impl PackedActivations {
    /// An empty set of rows for the kernel that this machine and `precision` select.
    pub fn new(precision: Precision) -> Self {
        Self::for_kernel(Kernel::best(precision))
    }

    /// An empty set of rows for one kernel, for tests and measurements.
    ///
    /// # Panics
    /// When the CPU lacks the kernel's level or `LWQ_ISA` forbids it.
    pub fn for_kernel(kernel: &'static Kernel) -> Self {
        assert!(kernel.level.is_available(), "{} is not available", kernel.name);
        PackedActivations { kernel, tokens: 0, cols: 0, elements: AlignedBuf::default() }
    }

    /// Packs `tokens` rows of `cols` floats, `stride` floats apart. Uses rayon's current pool.
    ///
    /// # Panics
    /// When `x` is shorter than the rows say or `stride < cols`.
    pub fn pack(&mut self, x: &[f32], tokens: usize, cols: usize, stride: usize) {
        check_rows("x", x.len(), tokens, cols, stride);
        let kernel = self.kernel;
        (self.tokens, self.cols) = (tokens, cols);
        let panel_elements = kernel.mr * ROW_STRIDE;
        let panels = self.panels();
        let used = panels * self.blocks() * panel_elements;
        self.elements.reserve(used);
        if used == 0 {
            return;
        }
        let block_columns = kernel.block_columns();
        let pack_panel = |index: usize, panel: &mut [u32]| {
            let (block, first) = (index / panels, index % panels * kernel.mr);
            let columns = block * block_columns..cols.min((block + 1) * block_columns);
            for (token, target) in (first..tokens).zip(panel.chunks_exact_mut(ROW_STRIDE)) {
                // SAFETY: a block has at most DEPTH elements, which `target` holds; the level was checked when
                // `self` was made.
                unsafe { (kernel.pack_row)(&x[token * stride..][columns.clone()], target) };
            }
        };
        let elements = &mut self.elements.as_mut_slice()[..used];
        // Below a few thousand floats waking another thread costs more than the copy.
        if tokens * cols < 1 << 14 || rayon::current_num_threads() == 1 {
            elements.chunks_exact_mut(panel_elements).enumerate().for_each(|(index, panel)| pack_panel(index, panel));
        } else {
            elements
                .par_chunks_exact_mut(panel_elements)
                .enumerate()
                .with_min_len(4)
                .for_each(|(index, panel)| pack_panel(index, panel));
        }
    }

    /// Rows that are packed.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Floats per row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The kernel that multiplies these rows.
    pub fn kernel(&self) -> &'static Kernel {
        self.kernel
    }

    pub(super) fn panels(&self) -> usize {
        self.tokens.div_ceil(self.kernel.mr)
    }

    pub(super) fn blocks(&self) -> usize {
        self.cols.div_ceil(self.kernel.block_columns())
    }

    /// Start of one panel of one block, valid for `mr * ROW_STRIDE` elements.
    pub(super) fn panel(&self, block: usize, panel: usize) -> *const u32 {
        let offset = (block * self.panels() + panel) * self.kernel.mr * ROW_STRIDE;
        assert!(offset + self.kernel.mr * ROW_STRIDE <= self.elements.len());
        // SAFETY: within the buffer, as just checked.
        unsafe { self.elements.as_ptr().add(offset) }
    }
}

/// Panics unless `rows` rows of `cols` floats, `stride` apart, fit into `len` floats.
pub(super) fn check_rows(name: &str, len: usize, rows: usize, cols: usize, stride: usize) {
    let needed = rows.checked_sub(1).map_or(Some(0), |last| last.checked_mul(stride)?.checked_add(cols));
    assert!(
        stride >= cols && needed.is_some_and(|needed| needed <= len),
        "{name}: {rows} rows of {cols}, stride {stride}, in {len} floats"
    );
}
