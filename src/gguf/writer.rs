//! Writes GGUF version 3, little-endian. The layout is computed before the first byte, so data can be streamed.

use std::fs::File;
use std::io::{self, Write};

use byteorder::{LittleEndian, WriteBytesExt};

use super::error::{GgufError, shown};
use super::metadata::Metadata;
use super::tensor_info::{Limits, TensorInfo, align_up, checked_bytes, name_problem};
use super::tensor_type::TensorType;
use super::value::{in_memory, write_string};

const VERSION: u32 = 3;

/// A tensor about to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewTensor {
    /// Name, unique in the file; llama.cpp reads up to 63 bytes.
    pub name: String,
    /// Dimensions, fastest first; llama.cpp reads up to four.
    pub shape: Vec<u64>,
    /// Storage type, one whose layout is known.
    pub ty: TensorType,
}

impl From<&TensorInfo> for NewTensor {
    fn from(tensor: &TensorInfo) -> NewTensor {
        NewTensor { name: tensor.name.clone(), shape: tensor.shape.clone(), ty: tensor.ty }
    }
}

/// A tensor with its place in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacedTensor {
    /// What is stored.
    pub tensor: NewTensor,
    /// First byte, from the start of the file.
    pub offset: u64,
    /// Bytes of data.
    pub bytes: u64,
    /// Bytes of data and the zeros after it, up to the next multiple of the alignment.
    pub padded_bytes: u64,
}

/// The whole layout of a file, fixed before any data: header bytes, the place of every tensor, the file's size.
#[derive(Debug, Clone)]
pub struct GgufLayout {
    file: String,
    header: Vec<u8>,
    tensors: Vec<PlacedTensor>,
    alignment: u32,
    data_start: u64,
    file_bytes: u64,
}

impl GgufLayout {
    /// Lays out a file of these pairs and tensors, in this order. Data are aligned as `general.alignment` in
    /// `metadata` says. `file` is the name of the output for messages.
    ///
    /// # Errors
    /// If a key or tensor name cannot be stored or occurs twice, the alignment is not a power of two, a shape does
    /// not fit its type, a type's layout is unknown, or the file would exceed 2^64 bytes.
    pub fn new(
        file: &str,
        metadata: &Metadata,
        tensors: impl IntoIterator<Item = NewTensor>,
    ) -> Result<GgufLayout, GgufError> {
        let sized = tensors.into_iter().map(|tensor| (tensor, None));
        GgufLayout::within(Limits::GGML, file, metadata, sized)
    }

    /// As [`GgufLayout::new`], for tensors that come from another file: with the longer names and more dimensions that
    /// programs other than llama.cpp take, and types whose layout is unknown, which have the bytes that are given.
    ///
    /// # Errors
    /// As [`GgufLayout::new`], with wider limits.
    pub(crate) fn carried(
        file: &str,
        metadata: &Metadata,
        tensors: impl IntoIterator<Item = (NewTensor, Option<u64>)>,
    ) -> Result<GgufLayout, GgufError> {
        GgufLayout::within(Limits::CARRIED, file, metadata, tensors)
    }

    fn within(
        limits: Limits,
        file: &str,
        metadata: &Metadata,
        tensors: impl IntoIterator<Item = (NewTensor, Option<u64>)>,
    ) -> Result<GgufLayout, GgufError> {
        let alignment = metadata.alignment()?;
        let mut placed = place_tensors(file, tensors, alignment, limits)?;
        check_names(file, &placed)?;
        check_keys(file, metadata)?;

        let header = in_memory(|out| write_header(out, metadata, &placed));
        let data_start = align_up(header.len() as u64, alignment.into()).ok_or_else(|| too_large(file))?;
        let mut file_bytes = data_start;
        for tensor in &mut placed {
            // The data section starts at an aligned byte, so relative and absolute offsets are aligned alike.
            tensor.offset = file_bytes;
            file_bytes = file_bytes.checked_add(tensor.padded_bytes).ok_or_else(|| too_large(file))?;
        }
        Ok(GgufLayout { file: file.to_owned(), header, tensors: placed, alignment, data_start, file_bytes })
    }

    /// Everything before the tensor data, without the padding up to [`GgufLayout::data_start`].
    pub fn header(&self) -> &[u8] {
        &self.header
    }

    /// First byte of the tensor data, a multiple of the alignment. Zeros lie between the header and it.
    pub fn data_start(&self) -> u64 {
        self.data_start
    }

    /// The tensors with their places, in file order.
    pub fn tensors(&self) -> &[PlacedTensor] {
        &self.tensors
    }

    /// Alignment of the tensor data in bytes.
    pub fn alignment(&self) -> u32 {
        self.alignment
    }

    /// Size of the finished file in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Bytes of tensor data without padding.
    pub fn data_bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.bytes).sum()
    }

    /// Writes the header at its place in `output`.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn write_header_at(&self, output: &File) -> Result<(), GgufError> {
        let end = self.header.len() as u64;
        write_all_at(output, &self.header, 0)
            .and_then(|()| write_zeros_at(output, end, self.data_start - end))
            .map_err(|source| self.io(source))
    }

    /// Writes a part of tensor number `index`, `at` bytes from its start, at its place in `output`; behind the last
    /// part the padding too. Parts may come in any order and from several threads.
    ///
    /// # Errors
    /// If the part is not inside the tensor, or the system refuses.
    pub fn write_data_at(&self, output: &File, index: usize, at: u64, part: &[u8]) -> Result<(), GgufError> {
        let Some(placed) = self.tensors.get(index) else {
            return Err(self.wrong(format!("tensor {index} of {}", self.tensors.len())));
        };
        let end = at.checked_add(part.len() as u64).filter(|end| *end <= placed.bytes);
        let Some(end) = end else {
            return Err(self.wrong(format!(
                "{} bytes at {at} of tensor {}, which has {}",
                part.len(),
                shown(placed.tensor.name.as_bytes()),
                placed.bytes
            )));
        };
        write_all_at(output, part, placed.offset + at).map_err(|source| self.io(source))?;
        if end == placed.bytes {
            write_zeros_at(output, placed.offset + end, placed.padded_bytes - placed.bytes)
                .map_err(|source| self.io(source))?;
        }
        Ok(())
    }

    fn io(&self, source: io::Error) -> GgufError {
        GgufError::Io {
            file: self.file.clone(),
            action: "write the file",
            source,
            advice: "check the free space of the disk",
        }
    }

    fn wrong(&self, problem: String) -> GgufError {
        GgufError::Write { file: self.file.clone(), problem }
    }
}

/// Computes sizes and offsets relative to the data section.
fn place_tensors(
    file: &str,
    tensors: impl IntoIterator<Item = (NewTensor, Option<u64>)>,
    alignment: u32,
    limits: Limits,
) -> Result<Vec<PlacedTensor>, GgufError> {
    let mut placed = Vec::new();
    let mut offset = 0u64;
    for (tensor, unknown_bytes) in tensors {
        let wrong = |problem: String| GgufError::Write {
            file: file.to_owned(),
            problem: format!("tensor {} {problem}", shown(tensor.name.as_bytes())),
        };
        if let Some(problem) = name_problem(tensor.name.as_bytes(), limits) {
            return Err(wrong(problem));
        }
        let bytes = checked_bytes(file, &tensor.name, &tensor.shape, tensor.ty, limits)?
            .or(unknown_bytes)
            .ok_or_else(|| wrong(format!("is of type {}, whose layout is unknown", tensor.ty)))?;
        let padded_bytes = align_up(bytes, alignment.into()).ok_or_else(|| too_large(file))?;
        let next = offset.checked_add(padded_bytes).ok_or_else(|| too_large(file))?;
        placed.push(PlacedTensor { tensor, offset, bytes, padded_bytes });
        offset = next;
    }
    Ok(placed)
}

fn check_names(file: &str, placed: &[PlacedTensor]) -> Result<(), GgufError> {
    let mut names: Vec<&str> = placed.iter().map(|placed| placed.tensor.name.as_str()).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        None => Ok(()),
        Some(pair) => Err(GgufError::Write {
            file: file.to_owned(),
            problem: format!("two tensors are named {}", shown(pair[0].as_bytes())),
        }),
    }
}

fn check_keys(file: &str, metadata: &Metadata) -> Result<(), GgufError> {
    let valid = |key: &str| !key.is_empty() && key.len() <= usize::from(u16::MAX) && !key.contains('\0');
    match metadata.iter().find(|(key, _)| !valid(key)) {
        None => Ok(()),
        Some((key, _)) => Err(GgufError::Write {
            file: file.to_owned(),
            problem: format!("{} is no valid key: 1 to 65535 bytes without NUL are", shown(key.as_bytes())),
        }),
    }
}

/// Everything before the padding of the data section. The offsets of `placed` count from the data section.
fn write_header(out: &mut impl Write, metadata: &Metadata, placed: &[PlacedTensor]) -> io::Result<()> {
    out.write_all(b"GGUF")?;
    out.write_u32::<LittleEndian>(VERSION)?;
    out.write_u64::<LittleEndian>(placed.len() as u64)?;
    out.write_u64::<LittleEndian>(metadata.len() as u64)?;
    for (key, value) in metadata.iter() {
        write_string(out, key.as_bytes())?;
        out.write_u32::<LittleEndian>(value.value_type().id())?;
        value.write_to(out)?;
    }
    for PlacedTensor { tensor, offset, .. } in placed {
        write_string(out, tensor.name.as_bytes())?;
        out.write_u32::<LittleEndian>(tensor.shape.len() as u32)?;
        for len in &tensor.shape {
            out.write_u64::<LittleEndian>(*len)?;
        }
        out.write_u32::<LittleEndian>(tensor.ty.0)?;
        out.write_u64::<LittleEndian>(*offset)?;
    }
    Ok(())
}

fn too_large(file: &str) -> GgufError {
    GgufError::Write { file: file.to_owned(), problem: "the tensors have 2^64 bytes or more".to_owned() }
}

/// Zeros for padding are written in pieces, since an alignment may be as large as 2^31.
const ZEROS: [u8; 4096] = [0; 4096];

fn write_zeros_at(file: &File, mut offset: u64, mut len: u64) -> io::Result<()> {
    while len > 0 {
        let piece = len.min(ZEROS.len() as u64);
        write_all_at(file, &ZEROS[..piece as usize], offset)?;
        offset += piece;
        len -= piece;
    }
    Ok(())
}

fn write_zeros(out: &mut impl Write, mut len: u64) -> io::Result<()> {
    while len > 0 {
        let piece = len.min(ZEROS.len() as u64);
        out.write_all(&ZEROS[..piece as usize])?;
        len -= piece;
    }
    Ok(())
}

#[cfg(unix)]
fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(windows)]
fn write_all_at(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let written = std::os::windows::fs::FileExt::seek_write(file, bytes, offset)?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        bytes = &bytes[written..];
        offset += written as u64;
    }
    Ok(())
}

/// Streams a file in order: the header at once, then each tensor's data, in parts of any size.
pub struct GgufWriter<W: Write> {
    out: W,
    layout: GgufLayout,
    /// The tensor being written; all before it are complete.
    current: usize,
    /// Bytes of it written.
    written: u64,
}

impl<W: Write> GgufWriter<W> {
    /// Writes the header.
    ///
    /// # Errors
    /// If the output refuses.
    pub fn new(mut out: W, layout: GgufLayout) -> Result<GgufWriter<W>, GgufError> {
        let padding = layout.data_start - layout.header.len() as u64;
        out.write_all(&layout.header)
            .and_then(|()| write_zeros(&mut out, padding))
            .map_err(|source| layout.io(source))?;
        let mut writer = GgufWriter { out, layout, current: 0, written: 0 };
        writer.complete_tensors()?;
        Ok(writer)
    }

    /// Writes the next part of tensor number `index`; tensors come in order, padding is added behind each.
    ///
    /// # Errors
    /// If another tensor is due or the part is larger than what it lacks, or the output refuses.
    pub fn write(&mut self, index: usize, part: &[u8]) -> Result<(), GgufError> {
        if part.is_empty() {
            return Ok(());
        }
        let Some(placed) = self.layout.tensors.get(self.current).filter(|_| index == self.current) else {
            let due = self.layout.tensors.get(self.current);
            let due = due.map_or_else(|| "none".to_owned(), |due| shown(due.tensor.name.as_bytes()));
            return Err(self.layout.wrong(format!("data of tensor {index} came, the one due is {due}")));
        };
        let lacking = placed.bytes - self.written;
        if part.len() as u64 > lacking {
            let name = shown(placed.tensor.name.as_bytes());
            let problem = format!("{} bytes came for tensor {name}, which lacks {lacking}", part.len());
            return Err(self.layout.wrong(problem));
        }
        self.out.write_all(part).map_err(|source| self.layout.io(source))?;
        self.written += part.len() as u64;
        self.complete_tensors()
    }

    /// Pads and passes the current tensor if it is complete, and empty ones behind it.
    fn complete_tensors(&mut self) -> Result<(), GgufError> {
        while let Some(placed) = self.layout.tensors.get(self.current).filter(|placed| placed.bytes == self.written) {
            let padding = placed.padded_bytes - placed.bytes;
            write_zeros(&mut self.out, padding).map_err(|source| self.layout.io(source))?;
            self.current += 1;
            self.written = 0;
        }
        Ok(())
    }

    /// Checks that all data were written, flushes and returns the output.
    ///
    /// # Errors
    /// If a tensor is incomplete, or the output refuses.
    pub fn finish(mut self) -> Result<W, GgufError> {
        if let Some(placed) = self.layout.tensors.get(self.current) {
            let name = shown(placed.tensor.name.as_bytes());
            let problem = format!("tensor {name} has {} bytes, {} came", placed.bytes, self.written);
            return Err(self.layout.wrong(problem));
        }
        self.out.flush().map_err(|source| self.layout.io(source))?;
        Ok(self.out)
    }
}
