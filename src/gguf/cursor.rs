//! One bounded cursor for binary formats: nothing is read, and nothing is allocated, beyond the bytes at hand.

use byteorder::{BigEndian, ByteOrder, LittleEndian};

/// A read that wanted more bytes than are left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CutShort {
    /// Where the read began, in bytes from the start.
    pub offset: u64,
    /// Bytes wanted.
    pub needed: u64,
    /// Bytes left.
    pub available: u64,
}

/// Reads numbers and byte strings of either byte order from a slice, in sequence.
#[derive(Clone)]
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    position: usize,
    big_endian: bool,
}

macro_rules! read_number {
    ($($name:ident, $read:ident -> $number:ty;)*) => {
        $(pub(crate) fn $name(&mut self) -> Result<$number, CutShort> {
            let raw = self.take(size_of::<$number>() as u64)?;
            Ok(if self.big_endian { BigEndian::$read(raw) } else { LittleEndian::$read(raw) })
        })*
    };
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8], big_endian: bool) -> Cursor<'a> {
        Cursor { bytes, position: 0, big_endian }
    }

    pub(crate) fn set_big_endian(&mut self, big_endian: bool) {
        self.big_endian = big_endian;
    }

    pub(crate) fn big_endian(&self) -> bool {
        self.big_endian
    }

    pub(crate) fn position(&self) -> usize {
        self.position
    }

    pub(crate) fn remaining(&self) -> u64 {
        (self.bytes.len() - self.position) as u64
    }

    /// The next `len` bytes.
    pub(crate) fn take(&mut self, len: u64) -> Result<&'a [u8], CutShort> {
        let available = self.remaining();
        if len > available {
            return Err(CutShort { offset: self.position as u64, needed: len, available });
        }
        let start = self.position;
        self.position += len as usize;
        Ok(&self.bytes[start..self.position])
    }

    pub(crate) fn u8(&mut self) -> Result<u8, CutShort> {
        Ok(self.take(1)?[0])
    }

    pub(crate) fn i8(&mut self) -> Result<i8, CutShort> {
        Ok(self.u8()?.cast_signed())
    }

    read_number! {
        u16, read_u16 -> u16;
        i16, read_i16 -> i16;
        u32, read_u32 -> u32;
        i32, read_i32 -> i32;
        u64, read_u64 -> u64;
        i64, read_i64 -> i64;
        f32, read_f32 -> f32;
        f64, read_f64 -> f64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_past_the_end_says_where_and_moves_nothing() {
        let mut cursor = Cursor::new(&[1, 2, 3, 4, 5], false);
        assert_eq!(cursor.u16(), Ok(0x0201));
        assert_eq!(cursor.u32(), Err(CutShort { offset: 2, needed: 4, available: 3 }));
        assert_eq!(cursor.take(u64::MAX), Err(CutShort { offset: 2, needed: u64::MAX, available: 3 }));
        cursor.set_big_endian(true);
        assert_eq!(cursor.u16(), Ok(0x0304));
        assert_eq!((cursor.position(), cursor.remaining()), (4, 1));
    }
}
