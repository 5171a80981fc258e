//! 16-bit floats by integer arithmetic, so that NaN bits do not depend on the processor.

/// IEEE binary16 to binary32, exact (`ggml_compute_fp16_to_fp32`). A signalling NaN becomes quiet.
#[inline(always)]
pub(crate) fn f16_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let magnitude = u32::from(bits & 0x7fff);
    let wide = if magnitude >= 0x0400 {
        // Normal: shift into place and rebias by 112; 31 becomes 255 by another 112.
        let rebias = if magnitude >= 0x7c00 { 224 << 23 } else { 112 << 23 };
        let quiet = if magnitude > 0x7c00 { 0x0040_0000 } else { 0 };
        ((magnitude << 13) + rebias) | quiet
    } else {
        // Subnormal: magnitude is a count of 2^-24, and that product is exact.
        (magnitude as f32 * f32::from_bits(0x3380_0000)).to_bits()
    };
    f32::from_bits(sign | wide)
}

/// binary32 to IEEE binary16, to nearest, ties to even (`ggml_compute_fp32_to_fp16`). Overflow gives infinity;
/// every NaN becomes `0x7e00` with its sign.
#[inline(always)]
pub(crate) fn f32_to_f16(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = ((bits >> 16) & 0x8000) as u16;
    let magnitude = bits & 0x7fff_ffff;
    let narrow = if magnitude > 0x7f80_0000 {
        0x7e00
    } else if magnitude >= 0x4780_0000 {
        // 2^16 and more
        0x7c00
    } else if magnitude >= 0x3880_0000 {
        // Normal in binary16. A carry out of the mantissa lands in the exponent, up to infinity, as it should.
        let odd = (magnitude >> 13) & 1;
        ((magnitude - (112 << 23) + 0x0fff + odd) >> 13) as u16
    } else {
        // Adding 1/2 puts the unit 2^-24 at the lowest mantissa bit, and the adder rounds to even.
        let shifted = f32::from_bits(magnitude) + 0.5;
        (shifted.to_bits() - 0x3f00_0000) as u16
    };
    sign | narrow
}

/// bfloat16 to binary32, exact, NaN bits kept.
#[inline(always)]
pub(crate) fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// binary32 to bfloat16, to nearest, ties to even (`ggml_compute_fp32_to_bf16`). NaN keeps its top bits and is
/// made quiet.
#[inline(always)]
pub(crate) fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    if bits & 0x7fff_ffff > 0x7f80_0000 {
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_survives_the_round_trip() {
        for bits in 0..=u16::MAX {
            let value = f16_to_f32(bits);
            assert_eq!(value.to_bits(), half::f16::from_bits(bits).to_f32_const().to_bits(), "{bits:#06x}");
            let expected = if value.is_nan() { 0x7e00 | (bits & 0x8000) } else { bits };
            assert_eq!(f32_to_f16(value), expected, "{bits:#06x}");
        }
    }

    #[test]
    fn f16_rounds_to_nearest_even_between_all_neighbours() {
        for bits in 0..0x7bffu16 {
            let (low, high) = (f16_to_f32(bits), f16_to_f32(bits + 1));
            let middle = (low + high) / 2.0;
            let even = if bits % 2 == 0 { bits } else { bits + 1 };
            assert_eq!(f32_to_f16(middle), even);
            assert_eq!(f32_to_f16(middle.next_down()), bits);
            assert_eq!(f32_to_f16(middle.next_up()), bits + 1);
            assert_eq!(f32_to_f16(-middle), even | 0x8000);
        }
        assert_eq!(f32_to_f16(65520.0f32.next_down()), 0x7bff);
        assert_eq!(f32_to_f16(65520.0), 0x7c00);
        assert_eq!(f32_to_f16(f32::MAX), 0x7c00);
        assert_eq!(f32_to_f16(f32::from_bits(1)), 0);
    }

    #[test]
    fn bf16_rounds_to_nearest_even_and_keeps_nan() {
        for (value, expected) in [
            (1.0, 0x3f80),
            (f32::from_bits(0x3f80_8000), 0x3f80),
            (f32::from_bits(0x3f81_8000), 0x3f82),
            (f32::from_bits(0x3f80_8001), 0x3f81),
            (f32::MAX, 0x7f80),
            (f32::NEG_INFINITY, 0xff80),
            (f32::from_bits(0x7f80_0001), 0x7fc0),
            (f32::from_bits(0xffa1_2345), 0xffe1),
        ] {
            assert_eq!(f32_to_bf16(value), expected, "{value:?}");
        }
    }
}
