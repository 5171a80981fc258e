//! Buffers aligned to cache lines, for packed panels.

/// One cache line of 4-byte elements.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u32; Line::ELEMENTS]);

impl Line {
    const ELEMENTS: usize = 16;
}

/// Elements of 4 bytes (f32 bits or a pair of bfloat16), starting on a cache line. Grows, never shrinks.
#[derive(Default)]
pub(super) struct AlignedBuf {
    lines: Vec<Line>,
}

impl AlignedBuf {
    /// Makes room for `elements`; the contents are unspecified but initialized.
    pub(super) fn reserve(&mut self, elements: usize) {
        let lines = elements.div_ceil(Line::ELEMENTS);
        if self.lines.len() < lines {
            // A fresh vector: growing in place would copy contents that nobody reads.
            self.lines = vec![Line([0; Line::ELEMENTS]); lines];
        }
    }

    /// Number of elements.
    pub(super) fn len(&self) -> usize {
        self.lines.len() * Line::ELEMENTS
    }

    pub(super) fn as_ptr(&self) -> *const u32 {
        self.lines.as_ptr().cast()
    }

    pub(super) fn as_mut_ptr(&mut self) -> *mut u32 {
        self.lines.as_mut_ptr().cast()
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [u32] {
        // SAFETY: `lines` owns `len` initialized elements and `Line` has no padding.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr(), self.len()) }
    }

    /// The same memory as floats.
    pub(super) fn as_mut_f32(&mut self) -> &mut [f32] {
        // SAFETY: as in `as_mut_slice`; every bit pattern is a valid f32 and the alignment is greater.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr().cast(), self.len()) }
    }
}
