//! 8-bit floats with 4 exponent and 3 mantissa bits (OCP E4M3, `float8_e4m3fn`): no infinities, bias 7.

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
pub(super) fn e4m3_to_f32(byte: u8) -> f32 {
    VALUES[byte as usize]
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
    fn positive_values_ascend() {
        for byte in 1..0x7F {
            assert!(e4m3_to_f32(byte) > e4m3_to_f32(byte - 1));
        }
    }
}
