//! The run: rows of source tensors through widening, changes and encoding into their places in the output.
//!
//! All outputs are cut into pieces of whole rows that stand in one queue. Worker threads read, convert and write
//! a piece each; where source and output have one type, bytes are copied without a detour through floats. A piece's
//! bytes depend on nothing but its rows, so the file is the same for any number of threads.
//! Memory is a few buffers of [`PIECE_WEIGHTS`] per thread.

use std::fs::File;

use super::ConvertError;
use super::checkpoint::{Checkpoint, Dense};
use super::fp8::e4m3_to_f32;
use super::plan::{Content, Output, Part, Plan};
use crate::gguf::{GgufLayout, TensorType, shown};
use crate::progress::{Interrupted, Unit, Watch};
use crate::quant::float16::{bf16_to_f32, f16_to_f32, f32_to_f16};
use crate::quant::{self, QuantError};
use crate::workers;

/// Weights per piece: 4 MB of F32, large enough for whole reads of the disk.
const PIECE_WEIGHTS: u64 = 1 << 20;

/// Rows of one part of one output.
struct Piece {
    output: usize,
    part: usize,
    /// First row, counted inside the part.
    first: u64,
    rows: u64,
    /// First row, counted over the output.
    at: u64,
}

/// Buffers of a worker.
#[derive(Default)]
struct Buffers {
    raw: Vec<u8>,
    /// Rows of a head before they are permuted.
    head: Vec<u8>,
    floats: Vec<f32>,
    encoded: Vec<u8>,
}

/// Writes the data of all outputs with `threads` workers.
pub(super) fn run(
    plan: &Plan,
    checkpoint: &Checkpoint,
    layout: &GgufLayout,
    file: &File,
    threads: usize,
    watch: &dyn Watch,
) -> Result<(), ConvertError> {
    let pieces = cut(plan);
    watch.begin("converting", layout.data_bytes(), Unit::Bytes);
    let stop = watch.abandon();
    let done = workers::work_off(&pieces, threads, Buffers::default, |buffers, _, piece| {
        stop.check()?;
        let bytes = convert(plan, checkpoint, layout, file, piece, buffers)?;
        watch.advance(bytes, &layout.tensors()[piece.output].tensor.name);
        Ok::<_, ConvertError>(())
    });
    let stopped = stop.end();
    done?;
    watch.end();
    if stopped { Err(Interrupted.into()) } else { Ok(()) }
}

fn cut(plan: &Plan) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for (output, Output { content, .. }) in plan.outputs.iter().enumerate() {
        match content {
            Content::Values(_) => pieces.push(Piece { output, part: 0, first: 0, rows: 1, at: 0 }),
            Content::Rows { parts, row_len, .. } => {
                let limit = (PIECE_WEIGHTS / row_len).max(1);
                let mut at = 0;
                for (part, Part { rows, .. }) in parts.iter().enumerate() {
                    let count = rows.end - rows.start;
                    pieces.extend(workers::cut(count, limit).map(|rows| Piece {
                        output,
                        part,
                        first: rows.start,
                        rows: rows.end - rows.start,
                        at: at + rows.start,
                    }));
                    at += count;
                }
            }
        }
    }
    pieces
}

fn convert(
    plan: &Plan,
    checkpoint: &Checkpoint,
    layout: &GgufLayout,
    file: &File,
    piece: &Piece,
    buffers: &mut Buffers,
) -> Result<u64, ConvertError> {
    let Output { tensor, content } = &plan.outputs[piece.output];
    let (parts, row_len, permuted_heads, add_one) = match content {
        Content::Values(values) => {
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            layout.write_data_at(file, piece.output, 0, &bytes)?;
            return Ok(bytes.len() as u64);
        }
        Content::Rows { parts, row_len, permuted_heads, add_one } => (parts, *row_len, *permuted_heads, *add_one),
    };
    let Part { tensor: source, rows: part_rows } = &parts[piece.part];
    let reader = Reader { checkpoint, source: *source, row_len };
    let first = part_rows.start + piece.first;
    let permutation = permuted_heads.map(|heads| Permutation { head_rows: part_rows.end / heads });
    match &permutation {
        None => reader.read(first, piece.rows, &mut buffers.raw)?,
        Some(permutation) => {
            let Buffers { raw, head, .. } = buffers;
            reader.read_permuted(permutation, first, piece.rows, raw, head)?;
        }
    }
    let dense = reader.dense()?;
    let scales = plan.scales.get(source);
    if dense.tensor_type() == Some(tensor.ty) && !add_one && scales.is_none() {
        if let Some(at) = dense.first_non_finite(&buffers.raw) {
            return Err(reader.non_finite(first * row_len + at));
        }
        layout.write_data_at(file, piece.output, piece.at * row_len * dense.bytes(), &buffers.raw)?;
        return Ok(buffers.raw.len() as u64);
    }
    buffers.floats.resize((piece.rows * row_len) as usize, 0.0);
    dense.widen(&buffers.raw, &mut buffers.floats);
    if let Some(scales) = scales {
        for (row, values) in (first..).zip(buffers.floats.chunks_mut(row_len as usize)) {
            scales.apply(permutation.as_ref().map_or(row, |permutation| permutation.source_row(row)), values);
        }
    }
    if let Some(at) = quant::first_non_finite(&buffers.floats) {
        return Err(reader.non_finite(first * row_len + at as u64));
    }
    if add_one {
        let half = dense == Dense::F16;
        for value in &mut buffers.floats {
            *value += 1.0;
            // The reference adds in the source's own precision.
            if half {
                *value = f16_to_f32(f32_to_f16(*value));
            }
        }
    }
    let codec = |source| ConvertError::Codec {
        file: checkpoint.file_of(reader.source).to_path_buf(),
        tensor: shown(checkpoint.tensors()[reader.source].name.as_bytes()),
        source,
    };
    let no_codec = || codec(QuantError::NoCodec { ty: tensor.ty });
    let row_bytes = tensor.ty.info().and_then(|info| info.row_bytes(row_len)).ok_or_else(no_codec)?;
    buffers.encoded.resize((row_bytes * piece.rows) as usize, 0);
    quant::quantize_rows(tensor.ty, &buffers.floats, row_len as usize, None, &mut buffers.encoded).map_err(codec)?;
    if tensor.ty != TensorType::F32 && quant::validate(tensor.ty, &buffers.encoded).is_err() {
        let largest = buffers.floats.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        let problem = format!("holds {largest}, too large for {}; use --type bf16 or f32", tensor.ty);
        return Err(reader.wrong(problem));
    }
    layout.write_data_at(file, piece.output, piece.at * row_bytes, &buffers.encoded)?;
    Ok(buffers.encoded.len() as u64)
}

/// Rows of one source tensor as floats.
struct Reader<'a> {
    checkpoint: &'a Checkpoint,
    source: usize,
    row_len: u64,
}

impl Reader<'_> {
    fn wrong(&self, problem: String) -> ConvertError {
        ConvertError::Tensor {
            file: self.checkpoint.file_of(self.source).to_path_buf(),
            tensor: shown(self.checkpoint.tensors()[self.source].name.as_bytes()),
            problem,
        }
    }

    fn dense(&self) -> Result<Dense, ConvertError> {
        let tensor = &self.checkpoint.tensors()[self.source];
        tensor.dense().ok_or_else(|| self.wrong(format!("has dtype {:?}, which holds no weights", tensor.dtype)))
    }

    fn non_finite(&self, index: u64) -> ConvertError {
        self.wrong(format!("weight {index} is NaN or infinite; the model is damaged, download it again"))
    }

    /// Bytes of consecutive rows.
    fn read(&self, first: u64, rows: u64, raw: &mut Vec<u8>) -> Result<(), ConvertError> {
        let row_bytes = self.row_len * self.dense()?.bytes();
        raw.resize((rows * row_bytes) as usize, 0);
        self.checkpoint.read_at(self.source, first * row_bytes, raw)
    }

    /// Bytes of rows of the permuted matrix. All rows of a head are read at once: those of a piece lie scattered in it.
    fn read_permuted(
        &self,
        permutation: &Permutation,
        first: u64,
        rows: u64,
        raw: &mut Vec<u8>,
        head: &mut Vec<u8>,
    ) -> Result<(), ConvertError> {
        let row_bytes = (self.row_len * self.dense()?.bytes()) as usize;
        raw.clear();
        let mut row = first;
        while row < first + rows {
            let head_first = row - row % permutation.head_rows;
            let end = (head_first + permutation.head_rows).min(first + rows);
            self.read(head_first, permutation.head_rows, head)?;
            for row in row..end {
                let from = (permutation.source_row(row) - head_first) as usize * row_bytes;
                raw.extend_from_slice(&head[from..from + row_bytes]);
            }
            row = end;
        }
        Ok(())
    }
}

/// The order of rows that GGUF's llama wants: inside a head of `n` rows, row `2i + s` is source row `s * n / 2 + i`.
struct Permutation {
    head_rows: u64,
}

impl Permutation {
    fn source_row(&self, row: u64) -> u64 {
        let inside = row % self.head_rows;
        row - inside + (inside % 2) * (self.head_rows / 2) + inside / 2
    }
}

impl Dense {
    /// The GGUF type with the same bytes.
    fn tensor_type(self) -> Option<TensorType> {
        match self {
            Dense::F32 => Some(TensorType::F32),
            Dense::F16 => Some(TensorType::F16),
            Dense::BF16 => Some(TensorType::BF16),
            Dense::F8E4M3 => None,
        }
    }

    /// Index of the first value whose exponent is all ones.
    fn first_non_finite(self, raw: &[u8]) -> Option<u64> {
        let of_16_bits = |mask: u16| {
            // Whole chunks at a time: the inner test has no branch and becomes vector code.
            let wrong = |bytes: &[u8; 2]| u16::from_le_bytes(*bytes) & mask == mask;
            let mut chunks = raw.as_chunks::<2>().0.chunks(4096).enumerate();
            let found = chunks.find(|(_, chunk)| chunk.iter().fold(false, |any, bytes| any | wrong(bytes)));
            found.and_then(|(index, chunk)| chunk.iter().position(wrong).map(|at| (index * 4096 + at) as u64))
        };
        match self {
            Dense::F16 => of_16_bits(0x7C00),
            Dense::BF16 => of_16_bits(0x7F80),
            Dense::F32 => {
                raw.as_chunks().0.iter().position(|bytes| !f32::from_le_bytes(*bytes).is_finite()).map(|at| at as u64)
            }
            Dense::F8E4M3 => raw.iter().position(|byte| byte & 0x7F == 0x7F).map(|at| at as u64),
        }
    }

    fn widen(self, raw: &[u8], floats: &mut [f32]) {
        match self {
            Dense::F32 => widen(raw, floats, f32::from_le_bytes),
            Dense::F16 => widen(raw, floats, |bytes| f16_to_f32(u16::from_le_bytes(bytes))),
            Dense::BF16 => widen(raw, floats, |bytes| bf16_to_f32(u16::from_le_bytes(bytes))),
            Dense::F8E4M3 => widen(raw, floats, |[byte]| e4m3_to_f32(byte)),
        }
    }
}

fn widen<const N: usize>(raw: &[u8], floats: &mut [f32], value: impl Fn([u8; N]) -> f32) {
    for (float, bytes) in floats.iter_mut().zip(raw.as_chunks::<N>().0) {
        *float = value(*bytes);
    }
}
