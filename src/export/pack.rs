//! The tensors of a rounded matrix, to bytes and back.
//!
//! - Integers of 4 and 8 bits get an offset of half their range; word `k` of a row holds columns `k * n` to `k * n + n - 1`
//!   with `n = 32 / bits`, the first in the lowest bits. Zero points are packed the same way, but down the rows of a group.
//! - FP4: a byte holds two columns, the first in its lower half.
//! - Plain formats hold a byte a weight.
//!
//! Everything is little-endian. Rows that do not fill a word of zero points, or a block, are padded at the end of a matrix
//! only, so pieces of [`ROWS_TOGETHER`] rows can be packed each for itself.

use byteorder::{ByteOrder, LittleEndian};
use safetensors::tensor::Dtype;

use super::scheme::Format;
use crate::quant::float16::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use crate::rounding::grid::{Grid, Groups, Layout, Rounded, ScaleType, e4m3_bits, e4m3_value, e8m0_bits, e8m0_value};

/// Rows of a matrix that are packed together: pieces begin at multiples of it.
pub(crate) const ROWS_TOGETHER: u64 = 128;

/// Which rows of a matrix a tensor has something for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Per {
    /// A row of the tensor for so many rows.
    Rows(u64),
    /// One value or two for the whole matrix.
    Matrix,
}

/// What a tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Codes,
    Scale,
    ZeroPoint,
    Shape,
    GlobalScale,
}

/// A tensor of a rounded matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PartInfo {
    pub(crate) part: Part,
    /// What follows the module's name.
    pub(crate) suffix: &'static str,
    pub(crate) dtype: Dtype,
    /// Slowest first.
    pub(crate) shape: Vec<u64>,
    pub(crate) per: Per,
}

impl PartInfo {
    /// Stored bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.shape.iter().product::<u64>() * dtype_bytes(self.dtype)
    }

    /// Bytes of one row of the tensor.
    fn row_bytes(&self) -> u64 {
        self.shape.iter().skip(1).product::<u64>() * dtype_bytes(self.dtype)
    }

    /// First byte and number of bytes that belong to these rows of the matrix.
    pub(crate) fn range(&self, first: u64, rows: u64) -> (u64, u64) {
        match self.per {
            Per::Rows(step) => (first / step * self.row_bytes(), rows.div_ceil(step) * self.row_bytes()),
            Per::Matrix => (0, self.bytes()),
        }
    }
}

/// Bytes of an element of a type that is written here.
pub(crate) fn dtype_bytes(dtype: Dtype) -> u64 {
    dtype.bitsize() as u64 / 8
}

/// The type of a scale in the file.
pub(crate) fn scale_dtype(ty: ScaleType) -> Dtype {
    match ty {
        ScaleType::F32 => Dtype::F32,
        ScaleType::F16 => Dtype::F16,
        ScaleType::Bf16 => Dtype::BF16,
        ScaleType::F8E4M3 => Dtype::F8_E4M3,
        ScaleType::E8M0 => Dtype::U8,
    }
}

fn bits_of(grid: Grid) -> u64 {
    match grid {
        Grid::Int { bits, .. } => u64::from(bits),
        Grid::Fp8 => 8,
        Grid::Nvfp4 | Grid::Mxfp4 => 4,
    }
}

/// The tensors of a matrix of `rows` and `columns`.
pub(crate) fn parts(format: Format, layout: &Layout, rows: u64, columns: u64) -> Vec<PartInfo> {
    let bits = bits_of(layout.grid);
    let (suffix, dtype, width) = match format {
        Format::PackQuantized => (".weight_packed", Dtype::I32, (columns * bits).div_ceil(32)),
        Format::IntQuantized => (".weight", Dtype::I8, columns),
        Format::FloatQuantized => (".weight", Dtype::F8_E4M3, columns),
        Format::Nvfp4Pack | Format::Mxfp4Pack => (".weight_packed", Dtype::U8, columns.div_ceil(2)),
    };
    let [down, across] = layout.scale_shape(rows as usize, columns as usize).map(|count| count as u64);
    let scale_step = match layout.groups {
        Groups::Blocks { rows, .. } => rows as u64,
        _ => 1,
    };
    let mut parts = vec![
        PartInfo { part: Part::Codes, suffix, dtype, shape: vec![rows, width], per: Per::Rows(1) },
        PartInfo {
            part: Part::Scale,
            suffix: ".weight_scale",
            dtype: scale_dtype(layout.scale_type),
            shape: vec![down, across],
            per: Per::Rows(scale_step),
        },
    ];
    if layout.has_zero_points() {
        let share = 32 / bits;
        parts.push(PartInfo {
            part: Part::ZeroPoint,
            suffix: ".weight_zero_point",
            dtype: Dtype::I32,
            shape: vec![rows.div_ceil(share), across],
            per: Per::Rows(share),
        });
    }
    let whole = |part, suffix, dtype, count| PartInfo { part, suffix, dtype, shape: vec![count], per: Per::Matrix };
    match format {
        Format::PackQuantized => parts.push(whole(Part::Shape, ".weight_shape", Dtype::I64, 2)),
        Format::Nvfp4Pack => parts.push(whole(Part::GlobalScale, ".weight_global_scale", Dtype::F32, 1)),
        Format::IntQuantized | Format::FloatQuantized | Format::Mxfp4Pack => {}
    }
    parts
}

/// The bytes of one tensor for some rows of a matrix of `rows` rows in all; `rounded` holds these rows alone.
pub(crate) fn pack(info: &PartInfo, layout: &Layout, rounded: &Rounded, rows: u64, columns: u64) -> Vec<u8> {
    let columns = columns as usize;
    match info.part {
        Part::Codes => pack_codes(info, layout.grid, &rounded.codes, columns),
        Part::Scale => rounded.scales.iter().flat_map(|&scale| scale_bytes(layout.scale_type, scale)).collect(),
        Part::ZeroPoint => {
            let across = layout.scale_shape(1, columns)[1];
            let offset = 1i16 << (bits_of(layout.grid) - 1);
            let unsigned: Vec<u8> = rounded.zero_points.iter().map(|&zero| (i16::from(zero) + offset) as u8).collect();
            pack_down(&unsigned, across, bits_of(layout.grid) as u32)
        }
        Part::Shape => [rows, columns as u64].iter().flat_map(|&count| count.to_le_bytes()).collect(),
        Part::GlobalScale => rounded.global_scale.to_le_bytes().to_vec(),
    }
}

fn pack_codes(info: &PartInfo, grid: Grid, codes: &[u8], columns: usize) -> Vec<u8> {
    match (info.dtype, grid) {
        (Dtype::I32, Grid::Int { bits, .. }) => {
            let (offset, share) = (1u8 << (bits - 1), 32 / bits as usize);
            let mask = ((1u32 << bits) - 1) as u8;
            let word = |codes: &[u8]| {
                let at = |word, (index, &code): (usize, &u8)| {
                    word | u32::from(code.wrapping_add(offset) & mask) << (bits as usize * index)
                };
                codes.iter().enumerate().fold(0, at).to_le_bytes()
            };
            codes.chunks(columns.max(1)).flat_map(|row| row.chunks(share).flat_map(word)).collect()
        }
        (Dtype::U8, _) => {
            let byte = |pair: &[u8]| (pair[0] & 15) | (pair.get(1).copied().unwrap_or(0) & 15) << 4;
            codes.chunks(columns.max(1)).flat_map(|row| row.chunks(2).map(byte)).collect()
        }
        _ => codes.to_vec(),
    }
}

/// Words of `32 / bits` rows of a column each; `values` is `[rows, columns]`.
fn pack_down(values: &[u8], columns: usize, bits: u32) -> Vec<u8> {
    let share = 32 / bits as usize;
    let mut bytes = Vec::new();
    for rows in values.chunks(columns.max(1) * share) {
        for column in 0..columns {
            let word = rows.iter().skip(column).step_by(columns).enumerate();
            let word = word.fold(0u32, |word, (index, &value)| word | u32::from(value) << (bits as usize * index));
            bytes.extend(word.to_le_bytes());
        }
    }
    bytes
}

fn scale_bytes(ty: ScaleType, scale: f32) -> Vec<u8> {
    match ty {
        ScaleType::F32 => scale.to_le_bytes().to_vec(),
        ScaleType::F16 => f32_to_f16(scale).to_le_bytes().to_vec(),
        ScaleType::Bf16 => f32_to_bf16(scale).to_le_bytes().to_vec(),
        ScaleType::F8E4M3 => vec![e4m3_bits(scale)],
        ScaleType::E8M0 => vec![e8m0_bits(scale)],
    }
}

/// Values of scales, or of other floats in a file.
pub(crate) fn floats(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    let halves =
        |value: fn(u16) -> f32| bytes.as_chunks().0.iter().map(|pair| value(u16::from_le_bytes(*pair))).collect();
    match dtype {
        Dtype::F32 => Some(bytes.as_chunks().0.iter().map(|word| f32::from_le_bytes(*word)).collect()),
        Dtype::F16 => Some(halves(f16_to_f32)),
        Dtype::BF16 => Some(halves(bf16_to_f32)),
        Dtype::F8_E4M3 => Some(bytes.iter().map(|&byte| e4m3_value(byte)).collect()),
        Dtype::U8 => Some(bytes.iter().map(|&byte| if byte == 255 { f32::NAN } else { e8m0_value(byte) }).collect()),
        _ => None,
    }
}

/// A byte a weight, as [`Rounded::codes`] has them, of rows of stored codes.
pub(crate) fn unpack_codes(info: &PartInfo, grid: Grid, bytes: &[u8], columns: usize) -> Vec<u8> {
    match (info.dtype, grid) {
        (Dtype::I32, Grid::Int { bits, .. }) => {
            let (offset, share) = (1u8 << (bits - 1), 32 / bits as usize);
            let mask = ((1u64 << bits) - 1) as u8;
            let row_bytes = columns.div_ceil(share) * 4;
            let of_row = |row: &[u8]| -> Vec<u8> {
                let words = row.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word));
                let codes = words.flat_map(|word| {
                    (0..share).map(move |index| ((word >> (bits as usize * index)) as u8 & mask).wrapping_sub(offset))
                });
                codes.take(columns).collect()
            };
            bytes.chunks(row_bytes.max(1)).flat_map(of_row).collect()
        }
        (Dtype::U8, _) => {
            let of_row =
                |row: &[u8]| -> Vec<u8> { row.iter().flat_map(|byte| [byte & 15, byte >> 4]).take(columns).collect() };
            bytes.chunks(columns.div_ceil(2).max(1)).flat_map(of_row).collect()
        }
        _ => bytes.to_vec(),
    }
}

/// Zero points of `rows` rows with `across` groups.
pub(crate) fn unpack_zero_points(bytes: &[u8], rows: usize, across: usize, bits: u32) -> Vec<i8> {
    let (share, offset) = (32 / bits as usize, 1i16 << (bits - 1));
    let mask = (1u32 << bits) - 1;
    let mut zeros = Vec::with_capacity(rows * across);
    for row in 0..rows {
        for group in 0..across {
            let word = LittleEndian::read_u32(&bytes[(row / share * across + group) * 4..]);
            let value = (word >> ((row % share) as u32 * bits)) & mask;
            zeros.push((value as i16 - offset) as i8);
        }
    }
    zeros
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(grid: Grid, groups: Groups, scale_type: ScaleType) -> Layout {
        Layout { grid, groups, scale_type }
    }

    fn bytes_of(format: Format, layout: &Layout, rounded: &Rounded, rows: u64, columns: u64, part: Part) -> Vec<u8> {
        let parts = parts(format, layout, rows, columns);
        let info = parts.iter().find(|info| info.part == part).expect("the layout has this part");
        let bytes = pack(info, layout, rounded, rows, columns);
        assert_eq!(bytes.len() as u64, info.bytes(), "{part:?}");
        bytes
    }

    /// Codes -8, -7, ... 7 in a row of 16: nibbles 0, 1, ... 15, the first column in the lowest bits.
    #[test]
    fn four_bit_words_hold_eight_columns() {
        let layout = layout(Grid::Int { bits: 4, symmetric: true }, Groups::Columns(8), ScaleType::Bf16);
        let codes: Vec<u8> = (-8i8..8).map(|code| code as u8).collect();
        let rounded = Rounded { codes: codes.clone(), scales: vec![1.0, -2.5], zero_points: vec![], global_scale: 1.0 };
        let format = Format::PackQuantized;
        let packed = bytes_of(format, &layout, &rounded, 1, 16, Part::Codes);
        assert_eq!(packed, [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]);
        assert_eq!(bytes_of(format, &layout, &rounded, 1, 16, Part::Scale), [0x80, 0x3F, 0x20, 0xC0]);
        let shape = bytes_of(format, &layout, &rounded, 1, 16, Part::Shape);
        assert_eq!(shape, [1, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0]);
        let infos = parts(format, &layout, 1, 16);
        assert_eq!(unpack_codes(&infos[0], layout.grid, &packed, 16), codes);
    }

    /// -128, -1, 0, 127 become 0, 127, 128, 255; a sixth column is padded with zeros.
    #[test]
    fn eight_bit_words_hold_four_columns() {
        let layout = layout(Grid::Int { bits: 8, symmetric: true }, Groups::Channel, ScaleType::F16);
        let codes: Vec<u8> = [-128i8, -1, 0, 127, 1, -2].map(|code| code as u8).to_vec();
        let rounded = Rounded { codes: codes.clone(), scales: vec![0.5], zero_points: vec![], global_scale: 1.0 };
        let packed = bytes_of(Format::PackQuantized, &layout, &rounded, 1, 6, Part::Codes);
        assert_eq!(packed, [0, 127, 128, 255, 129, 126, 0, 0]);
        assert_eq!(bytes_of(Format::PackQuantized, &layout, &rounded, 1, 6, Part::Scale), [0x00, 0x38]);
        let infos = parts(Format::PackQuantized, &layout, 1, 6);
        assert_eq!(unpack_codes(&infos[0], layout.grid, &packed, 6), codes);
        assert_eq!(bytes_of(Format::IntQuantized, &layout, &rounded, 1, 6, Part::Codes), codes);
    }

    /// Nine rows, two groups: rows 0 to 7 of a group share a word, row 8 begins the next.
    #[test]
    fn zero_points_are_packed_down_the_rows() {
        let layout = layout(Grid::Int { bits: 4, symmetric: false }, Groups::Columns(4), ScaleType::F32);
        let zero_points: Vec<i8> = (0..9).flat_map(|row| [row as i8 - 8, 7 - row as i8]).collect();
        let rounded =
            Rounded { codes: vec![0; 72], scales: vec![1.0; 18], zero_points: zero_points.clone(), global_scale: 1.0 };
        let packed = bytes_of(Format::PackQuantized, &layout, &rounded, 9, 8, Part::ZeroPoint);
        let words = [0x7654_3210u32, 0x89AB_CDEF, 0x0000_0008, 0x0000_0007];
        assert_eq!(packed, words.map(u32::to_le_bytes).concat());
        assert_eq!(unpack_zero_points(&packed, 9, 2, 4), zero_points);
    }

    /// -0 keeps its sign bit.
    #[test]
    fn small_floats_lie_two_in_a_byte() {
        let layout = layout(Grid::Nvfp4, Groups::Columns(16), ScaleType::F8E4M3);
        let codes: Vec<u8> = (0..16).collect();
        let rounded = Rounded { codes: codes.clone(), scales: vec![448.0], zero_points: vec![], global_scale: 2.0 };
        let format = Format::Nvfp4Pack;
        let packed = bytes_of(format, &layout, &rounded, 1, 16, Part::Codes);
        assert_eq!(packed, [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]);
        assert_eq!(bytes_of(format, &layout, &rounded, 1, 16, Part::Scale), [0x7E]);
        assert_eq!(bytes_of(format, &layout, &rounded, 1, 16, Part::GlobalScale), [0, 0, 0, 0x40]);
        assert_eq!(unpack_codes(&parts(format, &layout, 1, 16)[0], layout.grid, &packed, 16), codes);

        let layout = Layout { grid: Grid::Mxfp4, groups: Groups::Columns(32), scale_type: ScaleType::E8M0 };
        let rounded = Rounded { codes: vec![9; 32], scales: vec![0.25], zero_points: vec![], global_scale: 1.0 };
        assert_eq!(bytes_of(Format::Mxfp4Pack, &layout, &rounded, 1, 32, Part::Codes), [0x99; 16]);
        assert_eq!(bytes_of(Format::Mxfp4Pack, &layout, &rounded, 1, 32, Part::Scale), [125]);
    }

    #[test]
    fn blocks_have_a_scale_for_128_rows() {
        let layout = layout(Grid::Fp8, Groups::Blocks { rows: 128, columns: 128 }, ScaleType::Bf16);
        let infos = parts(Format::FloatQuantized, &layout, 300, 130);
        assert_eq!(infos[1].shape, [3, 2]);
        assert_eq!(infos[1].range(256, 44), (8, 4));
        assert_eq!(infos[0].range(256, 44), (256 * 130, 44 * 130));
    }
}
