//! F16 and BF16, 64 weights at a time. Those with a NaN among them, whose bits are a matter of convention, go to the
//! scalar functions.

use super::{Floats, Isa, LANES, Mask};
use crate::quant::types::float as scalar;

/// Weights of one step: the search for NaN has one branch for them.
const STEP: usize = 4 * LANES;

macro_rules! encoder {
    ($name:ident: $scalar:ident, $convert:ident) => {
        #[doc = concat!("[`", stringify!($scalar), "`](scalar::", stringify!($scalar), ").")]
        #[inline(always)]
        pub(crate) fn $name<I: Isa>(isa: I, src: &[f32], row_len: usize, importance: Option<&[f32]>, dst: &mut [u8]) {
            let (steps, rest) = src.as_chunks::<STEP>();
            let (steps_out, rest_out) = dst.as_chunks_mut::<{ 2 * STEP }>();
            for (x, out) in steps.iter().zip(&mut *steps_out) {
                let mut vectors = [isa.splat(0.0); STEP / LANES];
                for (vector, x) in vectors.iter_mut().zip(x.as_chunks().0) {
                    *vector = isa.load(x);
                }
                let [a, b, c, d] = vectors;
                if (a.equals(a) & b.equals(b) & c.equals(c) & d.equals(d)).all() {
                    for (vector, out) in vectors.iter().zip(out.as_chunks_mut::<{ 2 * LANES }>().0) {
                        let halves = vector.$convert();
                        for (half, out) in halves.iter().zip(out.as_chunks_mut().0) {
                            *out = half.to_le_bytes();
                        }
                    }
                } else {
                    scalar::$scalar(x, row_len, importance, out);
                }
            }
            scalar::$scalar(rest, row_len, importance, rest_out);
        }
    };
}

encoder!(f16: quantize_f16, to_f16);
encoder!(bf16: quantize_bf16, to_bf16);
