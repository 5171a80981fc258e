//! Runs of encoded weights: what decoding a block comes to once its bits are taken apart.
//!
//! Each type's file says how its blocks split into runs; the scalar decoder below and the vector ones in
//! [`kernels`](crate::quant::kernels) say how a run becomes floats. All of them round the same products in the
//! same order.

/// Sixteen weights as magnitudes and signs: weight `i` is `scale * magnitude[i]`, negated where bit `i` of `signs`
/// is set.
#[derive(Clone, Copy)]
pub(crate) struct SignedRun {
    /// Scale of all magnitudes.
    pub scale: f32,
    /// Eight magnitudes each, a byte per weight, first weight lowest.
    pub magnitudes: [u64; 2],
    /// One bit per weight.
    pub signs: u16,
}

impl SignedRun {
    /// The weights, by the definition.
    #[inline(always)]
    pub(crate) fn store(self, out: &mut [f32; 16]) {
        for (k, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let magnitudes = self.magnitudes[k].to_le_bytes();
            let signs = (self.signs >> (8 * k)) as u8;
            *out = std::array::from_fn(|i| {
                let value = self.scale * f32::from(magnitudes[i]);
                if signs >> i & 1 == 1 { -value } else { value }
            });
        }
    }
}

/// Sixteen weights as small integers with a shift: `scale * (value[i] + shifts[i / 8])`.
#[derive(Clone, Copy)]
pub(crate) struct ShiftedRun {
    /// Scale of all values.
    pub scale: f32,
    /// Eight signed bytes each, first weight lowest.
    pub values: [u64; 2],
    /// What is added to each eight.
    pub shifts: [f32; 2],
}

impl ShiftedRun {
    /// The weights, by the definition.
    #[inline(always)]
    pub(crate) fn store(self, out: &mut [f32; 16]) {
        for (k, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let values = self.values[k].to_le_bytes();
            *out = std::array::from_fn(|i| self.scale * (f32::from(values[i] as i8) + self.shifts[k]));
        }
    }
}
