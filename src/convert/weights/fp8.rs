//! 8-bit floats: E4M3 (OCP, `float8_e4m3fn`: no infinities, bias 7) for weights and scales, E8M0 (powers of two) for
//! scales.

/// Values of all 256 bytes.
static VALUES: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = decode(byte as u8);
        byte += 1;
    }
    table
};

const fn decode(byte: u8) -> f32 {
    let (exponent, mantissa) = ((byte >> 3) & 15, (byte & 7) as u32);
    let magnitude = match (exponent, mantissa) {
        (15, 7) => f32::NAN,
        // Subnormal: units of 2^-9.
        (0, _) => mantissa as f32 / 512.0,
        _ => f32::from_bits(((exponent as u32 + 120) << 23) | (mantissa << 20)),
    };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The value of a byte.
pub(in crate::convert) fn e4m3_to_f32(byte: u8) -> f32 {
    VALUES[byte as usize]
}

/// The byte of a number that is one of E4M3's, without a sign.
pub(super) fn e4m3_byte(value: f32) -> u8 {
    let bits = value.to_bits();
    match bits >> 23 {
        // Below 2^-6: units of 2^-9.
        exponent if exponent < 121 => (value * 512.0) as u8,
        exponent => ((exponent - 120) << 3) as u8 | ((bits >> 20) & 7) as u8,
    }
}

/// `2^(byte - 127)`; 255 is NaN. The smallest, 2^-127, is a subnormal float.
pub(super) fn e8m0_to_f32(byte: u8) -> f32 {
    match byte {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        exponent => f32::from_bits(u32::from(exponent) << 23),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_of_the_format() {
        let cases = [(0x00, 0.0), (0x01, 2f32.powi(-9)), (0x08, 2f32.powi(-6)), (0x38, 1.0), (0x39, 1.125)];
        for (byte, value) in cases.into_iter().chain([(0x7E, 448.0), (0xFE, -448.0), (0xB8, -1.0)]) {
            assert_eq!(e4m3_to_f32(byte), value, "{byte:#x}");
        }
        assert!(e4m3_to_f32(0x80).is_sign_negative() && e4m3_to_f32(0x80) == 0.0);
        assert!(e4m3_to_f32(0x7F).is_nan() && e4m3_to_f32(0xFF).is_nan());
    }

    #[test]
    fn exponents_are_powers_of_two() {
        for (byte, value) in [(0, 2f32.powi(-127)), (1, 2f32.powi(-126)), (127, 1.0), (130, 8.0), (254, 2f32.powi(127))]
        {
            assert_eq!(e8m0_to_f32(byte), value, "{byte}");
        }
        assert!(e8m0_to_f32(255).is_nan());
    }

    #[test]
    fn positive_values_ascend() {
        for byte in 1..0x7F {
            assert_eq!(e4m3_byte(e4m3_to_f32(byte)), byte);
            assert!(e4m3_to_f32(byte) > e4m3_to_f32(byte - 1));
        }
    }
}
