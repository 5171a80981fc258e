//! One thread's way with a piece: read, decode, check, encode, check, write.

use std::time::Instant;

use super::pieces::{CHUNK_WEIGHTS, Piece, rows_within};
use super::{Overflow, PipelineError, RowRounding, Stages, TensorWork, Written};
use crate::atomic_file::AtomicFile;
use crate::gguf::{Gguf, TensorInfo};
use crate::os;
use crate::quant::{self, QuantError};
use crate::rounding::round_by_search;
use crate::rows;

/// A thread's buffers, which grow to the largest piece once, and its clock.
pub(super) struct Worker<'a> {
    files: &'a [AtomicFile],
    source: Vec<u8>,
    floats: Vec<f32>,
    encoded: Vec<u8>,
    clock: Clock,
}

/// Where the time went. Each moment belongs to a stage: one ends where the next begins.
struct Clock {
    stages: Stages,
    last: Instant,
}

impl Clock {
    /// Books the time since the last call on a stage.
    fn book(&mut self, stage: impl FnOnce(&mut Stages) -> &mut f64) {
        let now = Instant::now();
        *stage(&mut self.stages) += (now - self.last).as_secs_f64();
        self.last = now;
    }
}

impl<'a> Worker<'a> {
    pub(super) fn new(files: &'a [AtomicFile]) -> Self {
        let clock = Clock { stages: Stages::default(), last: Instant::now() };
        Self { files, source: Vec::new(), floats: Vec::new(), encoded: Vec::new(), clock }
    }

    /// What the time went into, and the moment that ended the last stage.
    pub(super) fn finish(self) -> (Stages, Instant) {
        (self.clock.stages, self.clock.last)
    }

    /// Makes the rows of the piece and writes them to their place in the output.
    pub(super) fn convert(&mut self, work: &TensorWork<'_>, piece: &Piece) -> Result<Written, PipelineError> {
        let Self { source, floats, encoded, clock, .. } = self;
        let (gguf, tensor) = (work.gguf, work.source);
        let source = match tensor.ty.info() {
            Some(_) => gguf.load_rows(tensor, piece.first_row, piece.rows, source)?,
            None => gguf.load_bytes(tensor, piece.first_row, piece.rows, source)?,
        };
        clock.book(|stages| &mut stages.reading);
        let out = if work.target == tensor.ty {
            check_copied(gguf, tensor, piece, source)?;
            clock.book(|stages| &mut stages.checking);
            source
        } else {
            encode(work, piece, source, floats, encoded, clock)?;
            encoded
        };
        // Rows of one tensor have one size, so the piece's place follows from its own length.
        let offset = work.offset + piece.first_row * (out.len() as u64 / piece.rows);
        let file = &self.files[work.file];
        os::write_all_at(file.file(), out, offset)
            .map_err(|source| PipelineError::Write { file: file.target().to_path_buf(), source })?;
        clock.book(|stages| &mut stages.writing);
        Ok(Written { work: piece.work, source_bytes: source.len() as u64, bytes: out.len() as u64 })
    }
}

/// A copied tensor is checked as far as its type allows: scales of block types, values of floats.
fn check_copied(gguf: &Gguf, tensor: &TensorInfo, piece: &Piece, source: &[u8]) -> Result<(), PipelineError> {
    if quant::codec(tensor.ty).is_none() {
        return Ok(());
    }
    quant::validate(tensor.ty, source).map_err(|mut source| {
        if let (QuantError::NonFinite { block, .. }, Some(info)) = (&mut source, tensor.ty.info()) {
            *block += (piece.first_row * (tensor.row_len() / info.block_len as u64)) as usize;
        }
        PipelineError::Codec { file: label(gguf, tensor), tensor: tensor.shown_name(), source }
    })
}

fn label(gguf: &Gguf, tensor: &TensorInfo) -> String {
    gguf.shards().get(tensor.shard).map_or_else(|| gguf.label(), |shard| shard.label()).to_owned()
}

/// Encodes the rows of `source` into `encoded`, a few at a time.
fn encode(
    work: &TensorWork<'_>,
    piece: &Piece,
    source: &[u8],
    floats: &mut Vec<f32>,
    encoded: &mut Vec<u8>,
    clock: &mut Clock,
) -> Result<(), PipelineError> {
    let tensor = work.source;
    let file = || label(work.gguf, tensor);
    let codec_error = |source| PipelineError::Codec { file: file(), tensor: tensor.shown_name(), source };
    let row_len = tensor.row_len() as usize;
    let row_bytes = work.target.info().and_then(|info| info.row_bytes(row_len as u64));
    let row_bytes = row_bytes.ok_or(QuantError::NoCodec { ty: work.target }).map_err(codec_error)? as usize;
    let source_row_bytes = source.len() / piece.rows as usize;
    let importance = work.importance.map(|all| {
        let first = piece.matrix as usize * row_len;
        &all[first..first + row_len]
    });
    let round = match work.rounding {
        RowRounding::Ggml => quant::quantize_rows,
        RowRounding::Search => round_by_search,
    };
    let rows_per_chunk = rows_within(CHUNK_WEIGHTS, row_len as u64);
    encoded.resize(row_bytes * piece.rows as usize, 0);
    let mut row = piece.first_row;
    let sources = source.chunks(source_row_bytes * rows_per_chunk as usize);
    for (source, out) in sources.zip(encoded.chunks_mut(row_bytes * rows_per_chunk as usize)) {
        let count = source.len() / source_row_bytes;
        floats.resize(count * row_len, 0.0);
        rows::decode(tensor, row, source, floats)
            .map_err(|source| PipelineError::Rows { file: file(), source: Box::new(source) })?;
        clock.book(|stages| &mut stages.decoding);
        round(work.target, floats, row_len, importance, out).map_err(codec_error)?;
        clock.book(|stages| &mut stages.encoding);
        if let Err(error) = quant::validate(work.target, out) {
            let overflow = Overflow::new(tensor, row, floats, work.target, &error);
            return Err(PipelineError::Overflow { file: file(), overflow });
        }
        clock.book(|stages| &mut stages.checking);
        row += count as u64;
    }
    Ok(())
}
