//! The header of NumPy's .npy files, version 1.0 (`numpy.lib.format`).

use safetensors::tensor::Dtype;

/// Data begin at a multiple of this, so that a mapped file can be used in place.
const ALIGNMENT: usize = 64;

/// The header of a little-endian array in C order; `shape` slowest first. `None` for a type that NumPy does not have.
pub(super) fn header(dtype: Dtype, shape: &[u64]) -> Option<Vec<u8>> {
    let descr = match dtype {
        Dtype::F64 => "<f8",
        Dtype::F32 => "<f4",
        Dtype::F16 => "<f2",
        Dtype::I64 => "<i8",
        Dtype::I32 => "<i4",
        Dtype::I16 => "<i2",
        Dtype::I8 => "|i1",
        _ => return None,
    };
    // A tuple of one has a comma.
    let dims: String = shape.iter().map(|dim| format!("{dim},")).collect();
    let dims = if shape.len() > 1 { dims.trim_end_matches(',') } else { &dims };
    let mut text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({dims}), }}");
    let before = b"\x93NUMPY\x01\x00".len() + 2;
    let padded = (before + text.len() + 1).next_multiple_of(ALIGNMENT);
    text.extend(std::iter::repeat_n(' ', padded - before - text.len() - 1));
    text.push('\n');
    let mut header = b"\x93NUMPY\x01\x00".to_vec();
    // Eight dimensions of 20 digits are far below 65536 bytes.
    header.extend((text.len() as u16).to_le_bytes());
    header.extend(text.into_bytes());
    Some(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_those_that_numpy_writes() {
        let text = |shape: &[u64]| {
            let header = header(Dtype::F32, shape).unwrap();
            assert_eq!(header.len() % 64, 0);
            assert_eq!(u16::from_le_bytes([header[8], header[9]]) as usize, header.len() - 10);
            String::from_utf8(header[10..].to_vec()).unwrap().trim_end().to_owned()
        };
        assert_eq!(text(&[2, 3]), "{'descr': '<f4', 'fortran_order': False, 'shape': (2,3), }");
        assert_eq!(text(&[7]), "{'descr': '<f4', 'fortran_order': False, 'shape': (7,), }");
        assert_eq!(text(&[]), "{'descr': '<f4', 'fortran_order': False, 'shape': (), }");
        assert!(header(Dtype::BF16, &[1]).is_none());
    }
}
