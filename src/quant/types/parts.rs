//! Blocks put together from, and taken apart into, their numbers: scales and levels, without any choice of them.
//!
//! For encoders that choose scales and levels by rules of their own. Only types whose weights are rounded one by one
//! are here: `weight = d * scale * level - dmin * min` and what is left of that in the simpler ones.

use super::{affine_k, get_f16, iq4, legacy, put_f16, q2_k, q3_k, q4_k, q5_k, q6_k};
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

/// Groups of eight weights in a block of a lattice type.
pub(crate) const OCTETS: usize = MAX_LEN / 8;

/// What a block of IQ2 or IQ3 stores.
#[derive(Debug, Clone)]
pub(crate) struct LatticeParts {
    /// Scale of the block, on the grid of binary16 already.
    pub d: f32,
    /// 4-bit scale codes; IQ2_XXS and IQ3 use eight of them, one for 32 weights.
    pub scales: [u8; MAX_GROUPS],
    /// Points of each eight weights; the second is for the four-dimensional lattices of IQ3.
    pub points: [[u16; 2]; OCTETS],
    /// Signs of each eight weights, bit `i` for weight `i`. An even number of them in all types but the `_S` ones.
    pub signs: [u8; OCTETS],
}

impl LatticeParts {
    /// A block of zeros.
    pub(crate) const ZERO: LatticeParts =
        LatticeParts { d: 0.0, scales: [0; MAX_GROUPS], points: [[0; 2]; OCTETS], signs: [0; OCTETS] };

    /// Writes a block of `ty`.
    ///
    /// # Panics
    /// When `ty` is none of IQ2 and IQ3 or `block` has another length than its blocks.
    pub(crate) fn write(&self, ty: TensorType, block: &mut [u8]) {
        block.fill(0);
        put_f16(block, 0, self.d);
        let sign_word = |ib: usize| {
            let signs = (0..4).fold(0u32, |word, k| word | u32::from(self.signs[4 * ib + k] & 127) << (7 * k));
            (signs | u32::from(self.scales[ib]) << 28).to_le_bytes()
        };
        let scale_pair = |i: usize| self.scales[2 * i] | self.scales[2 * i + 1] << 4;
        match ty {
            TensorType::IQ2_XXS => {
                for (ib, bytes) in block[2..].as_chunks_mut::<8>().0.iter_mut().enumerate() {
                    for (byte, points) in bytes.iter_mut().zip(&self.points[4 * ib..][..4]) {
                        *byte = points[0] as u8;
                    }
                    bytes[4..].copy_from_slice(&sign_word(ib));
                }
            }
            TensorType::IQ2_XS => {
                for (n, bytes) in block[2..66].as_chunks_mut::<2>().0.iter_mut().enumerate() {
                    *bytes = (self.points[n][0] | u16::from(self.signs[n] & 127) << 9).to_le_bytes();
                }
                (0..8).for_each(|i| block[66 + i] = scale_pair(i));
            }
            TensorType::IQ2_S => {
                for n in 0..OCTETS {
                    block[2 + n] = self.points[n][0] as u8;
                    block[34 + n] = self.signs[n];
                    block[66 + n / 4] |= ((self.points[n][0] >> 8) as u8) << (2 * (n % 4));
                }
                (0..8).for_each(|i| block[74 + i] = scale_pair(i));
            }
            TensorType::IQ3_XXS => {
                for (n, points) in self.points.iter().enumerate() {
                    block[2 + 2 * n..][..2].copy_from_slice(&points.map(|point| point as u8));
                }
                (0..8).for_each(|ib| block[66 + 4 * ib..][..4].copy_from_slice(&sign_word(ib)));
            }
            TensorType::IQ3_S => {
                for (n, points) in self.points.iter().enumerate() {
                    block[2 + 2 * n..][..2].copy_from_slice(&points.map(|point| point as u8));
                    for (k, point) in points.iter().enumerate() {
                        block[66 + n / 4] |= ((point >> 8) as u8) << (n % 4 * 2 + k);
                    }
                    block[74 + n] = self.signs[n];
                }
                (0..4).for_each(|i| block[106 + i] = scale_pair(i));
            }
            ty => unreachable!("{ty} has no lattice"),
        }
    }

    /// Reads `d` and the scale codes of a block of `ty`, and leaves the rest.
    pub(crate) fn read_scales(&mut self, ty: TensorType, block: &[u8]) {
        self.d = get_f16(block, 0);
        let nibble = |at: usize, ib: usize| block[at + ib / 2] >> (4 * (ib % 2)) & 15;
        for (ib, scale) in self.scales.iter_mut().enumerate() {
            *scale = match ty {
                TensorType::IQ2_XS => nibble(66, ib),
                TensorType::IQ2_S => nibble(74, ib),
                _ if ib >= 8 => 0,
                TensorType::IQ2_XXS => block[2 + 8 * ib + 7] >> 4,
                TensorType::IQ3_XXS => block[66 + 4 * ib + 3] >> 4,
                _ => nibble(106, ib),
            };
        }
    }
}
