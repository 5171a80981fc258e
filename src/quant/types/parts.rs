//! Blocks put together from, and taken apart into, their numbers: scales and levels, without any choice of them.
//!
//! For encoders that choose scales and levels by rules of their own. Only types whose weights are rounded one by one
//! are here: `weight = d * scale * level - dmin * min` and what is left of that in the simpler ones.

use super::{affine_k, iq4, legacy, put_f16, q2_k, q3_k, q4_k, q5_k, q6_k};
use crate::gguf::TensorType;

/// Groups of the type with most of them.
pub(crate) const MAX_GROUPS: usize = 16;

/// Weights of the longest block.
pub(crate) const MAX_LEN: usize = 256;

/// What a block stores.
#[derive(Debug, Clone)]
pub(crate) struct Parts {
    /// Scale of the block, on the grid of binary16 already.
    pub d: f32,
    /// Scale of the minima (K types), or the value of level 0 (Q4_1, Q5_1); on the grid of binary16.
    pub dmin: f32,
    /// Signed scale of each group, offsets removed.
    pub scales: [i16; MAX_GROUPS],
    /// Minimum of each group, in units of `dmin`.
    pub mins: [u8; MAX_GROUPS],
    /// Level of each weight counted from the lowest, as stored.
    pub levels: [u8; MAX_LEN],
}

impl Parts {
    /// A block of zeros.
    pub(crate) const ZERO: Parts =
        Parts { d: 0.0, dmin: 0.0, scales: [0; MAX_GROUPS], mins: [0; MAX_GROUPS], levels: [0; MAX_LEN] };

    /// Writes a block of `ty`.
    ///
    /// # Panics
    /// When `ty` is not one of these types or `block` has another length than its blocks.
    pub(crate) fn write(&self, ty: TensorType, block: &mut [u8]) {
        match ty {
            TensorType::Q4_0 => legacy::put_q4_0(self.d, self.levels32(), sized(block)),
            TensorType::Q4_1 => legacy::put_q4_1(self.d, self.dmin, self.levels32(), sized(block)),
            TensorType::Q5_0 => legacy::put_q5_0(self.d, self.levels32(), sized(block)),
            TensorType::Q5_1 => legacy::put_q5_1(self.d, self.dmin, self.levels32(), sized(block)),
            // Stored signed; counted from -127.
            TensorType::Q8_0 => legacy::put_q8_0(self.d, &self.levels32().map(|l| l.wrapping_sub(127)), sized(block)),
            TensorType::IQ4_NL => iq4::put_nl(self.d, self.levels32(), sized(block)),
            TensorType::IQ4_XS => {
                let scales = std::array::from_fn(|j| (self.scales[j] + 32) as u8);
                iq4::put_xs(self.d, &scales, &self.levels, sized(block));
            }
            TensorType::Q2_K => {
                let scales = std::array::from_fn(|j| self.scales[j] as u8 | (self.mins[j] << 4));
                q2_k::put(self.d, self.dmin, &scales, &self.levels, sized(block));
            }
            TensorType::Q3_K => {
                q3_k::put(self.d, self.scales.map(|s| (s + 32) as u8), &self.levels, sized(block));
            }
            TensorType::Q4_K => q4_k::finish(sized(block), |header| self.affine_header(header)),
            TensorType::Q5_K => q5_k::finish(sized(block), |header| self.affine_header(header)),
            TensorType::Q6_K => q6_k::put(self.d, &self.scales.map(|s| s as i8), &self.levels, sized(block)),
            ty => unreachable!("{ty} has no such parts"),
        }
    }

    fn affine_header(&self, header: &mut [u8; affine_k::HEADER]) -> [u8; MAX_LEN] {
        put_f16(header, 0, self.d);
        put_f16(header, 2, self.dmin);
        let scales = std::array::from_fn(|j| self.scales[j] as u8);
        let mins = std::array::from_fn(|j| self.mins[j]);
        affine_k::pack_scales(&scales, &mins, header);
        self.levels
    }

    fn levels32(&self) -> &[u8; 32] {
        &self.levels.as_chunks().0[0]
    }
}

fn sized<const N: usize>(block: &mut [u8]) -> &mut [u8; N] {
    let len = block.len();
    block.try_into().unwrap_or_else(|_| unreachable!("a block of {len} bytes instead of {N}"))
}
