//! Byte order of tensor data: which fields of a block are wider than a byte.
//!
//! A big-endian file stores every multi-byte number of a block in big-endian order (`gguf_convert_endian.py` does it
//! for eight types); the rest follows from the block layouts of `ggml-common.h` and from how `ggml-quants.c` loads
//! them where a field declared as bytes is copied into a wider integer. For the types that the script leaves out no
//! file is known to exist. Where ggml's quantizer and dequantizer would disagree on a big-endian machine (the grid
//! indices of IQ2_XXS), the dequantizer is followed.

use byteorder::{BigEndian, ByteOrder, LittleEndian};

use super::tensor_type::TensorType;

/// `count` numbers of `width` bytes side by side, starting at byte `at` of a block.
struct Field {
    at: usize,
    width: usize,
    count: usize,
}

const fn field(at: usize, width: usize) -> Field {
    Field { at, width, count: 1 }
}

const fn run(at: usize, width: usize, count: usize) -> Field {
    Field { at, width, count }
}

/// The multi-byte fields of one block; `None` for an unknown type.
fn fields(ty: TensorType) -> Option<&'static [Field]> {
    const WHOLE_2: &[Field] = &[field(0, 2)];
    const WHOLE_4: &[Field] = &[field(0, 4)];
    const WHOLE_8: &[Field] = &[field(0, 8)];
    const SCALE_AND_MIN: &[Field] = &[run(0, 2, 2)];
    Some(match ty {
        TensorType::I8 | TensorType::MXFP4 | TensorType::NVFP4 => const { &[] },
        TensorType::F16 | TensorType::BF16 | TensorType::I16 => WHOLE_2,
        TensorType::F32 | TensorType::I32 => WHOLE_4,
        TensorType::F64 | TensorType::I64 => WHOLE_8,
        TensorType::Q4_0 | TensorType::Q8_0 | TensorType::Q1_0 | TensorType::Q2_0 | TensorType::IQ4_NL => WHOLE_2,
        TensorType::IQ2_S | TensorType::IQ3_S => WHOLE_2,
        TensorType::Q4_1 | TensorType::Q8_1 | TensorType::Q4_K | TensorType::Q5_K => SCALE_AND_MIN,
        // The fifth bits are loaded as one u32.
        TensorType::Q5_0 => const { &[field(0, 2), field(2, 4)] },
        TensorType::Q5_1 => const { &[run(0, 2, 2), field(4, 4)] },
        TensorType::Q2_K => const { &[run(80, 2, 2)] },
        TensorType::Q3_K => const { &[field(108, 2)] },
        TensorType::Q6_K => const { &[field(208, 2)] },
        TensorType::Q8_K => const { &[field(0, 4), run(260, 2, 16)] },
        TensorType::TQ1_0 => const { &[field(52, 2)] },
        TensorType::TQ2_0 => const { &[field(64, 2)] },
        // Each group of 32: four grid indices read byte by byte, then signs and scale as one u32.
        TensorType::IQ2_XXS => {
            const {
                &[
                    field(0, 2),
                    field(6, 4),
                    field(14, 4),
                    field(22, 4),
                    field(30, 4),
                    field(38, 4),
                    field(46, 4),
                    field(54, 4),
                    field(62, 4),
                ]
            }
        }
        TensorType::IQ2_XS => const { &[field(0, 2), run(2, 2, 32)] },
        TensorType::IQ3_XXS => const { &[field(0, 2), run(66, 4, 8)] },
        TensorType::IQ1_S => const { &[field(0, 2), run(34, 2, 8)] },
        // No scale of its own: its bits are spread over the four u16 of the block scales.
        TensorType::IQ1_M => const { &[run(48, 2, 4)] },
        TensorType::IQ4_XS => const { &[run(0, 2, 2)] },
        _ => return None,
    })
}

/// True if the bytes of this type are the same in either byte order.
pub(crate) fn is_order_free(ty: TensorType) -> bool {
    fields(ty).is_some_and(<[Field]>::is_empty)
}

/// Puts every multi-byte number in `data`, whole big-endian blocks of type `ty`, into little-endian order. False if the
/// type is unknown, nothing done.
pub(crate) fn to_little_endian(ty: TensorType, data: &mut [u8]) -> bool {
    let (Some(fields), Some(info)) = (fields(ty), ty.info()) else { return false };
    match fields {
        [] => {}
        [whole] if whole.width == info.block_bytes => numbers_to_little_endian(whole.width, data),
        fields => {
            for block in data.chunks_exact_mut(info.block_bytes) {
                for field in fields {
                    numbers_to_little_endian(field.width, &mut block[field.at..][..field.width * field.count]);
                }
            }
        }
    }
    true
}

/// Puts big-endian numbers of `width` bytes, which fill `data`, into little-endian order.
pub(crate) fn numbers_to_little_endian(width: usize, data: &mut [u8]) {
    let numbers = data.chunks_exact_mut(width);
    match width {
        2 => numbers.for_each(|number| LittleEndian::write_u16(number, BigEndian::read_u16(number))),
        4 => numbers.for_each(|number| LittleEndian::write_u32(number, BigEndian::read_u32(number))),
        8 => numbers.for_each(|number| LittleEndian::write_u64(number, BigEndian::read_u64(number))),
        _ => debug_assert_eq!(width, 1, "no number of GGUF has this width"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::TENSOR_TYPES;

    #[test]
    fn every_known_type_has_its_fields_inside_the_block_and_disjoint() {
        for info in TENSOR_TYPES {
            let fields = fields(info.ty).unwrap_or_else(|| panic!("{} has no byte order", info.name));
            let mut owner = vec![false; info.block_bytes];
            for field in fields {
                for number in 0..field.count {
                    for byte in &mut owner[field.at + number * field.width..][..field.width] {
                        assert!(!std::mem::replace(byte, true), "{}: overlap", info.name);
                    }
                }
            }
        }
    }

    #[test]
    fn swapping_twice_restores_and_unknown_types_are_left_alone() {
        for info in TENSOR_TYPES {
            let original: Vec<u8> = (0..info.block_bytes * 3).map(|byte| byte as u8).collect();
            let mut data = original.clone();
            assert!(to_little_endian(info.ty, &mut data));
            assert_eq!(data == original, is_order_free(info.ty), "{}", info.name);
            assert!(to_little_endian(info.ty, &mut data));
            assert_eq!(data, original, "{}", info.name);
        }
        let mut data = [1, 2, 3, 4];
        assert!(!to_little_endian(TensorType(36), &mut data));
        assert_eq!(data, [1, 2, 3, 4]);
    }

    #[test]
    fn q4_k_swaps_its_two_halves_only() {
        let mut data: Vec<u8> = (0..144).collect();
        to_little_endian(TensorType::Q4_K, &mut data);
        assert_eq!(data[..6], [1, 0, 3, 2, 4, 5]);
    }
}
