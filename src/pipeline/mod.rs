//! The run: tensors of a mapped GGUF through the codecs into the output files.
//!
//! All tensors, and all matrices of stacked expert tensors, are cut into pieces of whole rows that stand in one
//! queue. Worker threads take a piece, decode it, check it, encode it; one thread writes. Reading ahead is left to
//! the system, which is told what comes next. A piece's bytes depend on nothing but its rows, so the output is the
//! same for any number of threads.

use std::borrow::Cow;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};

use thiserror::Error;

use crate::atomic_file::AtomicFile;
use crate::gguf::{Gguf, GgufError, TensorInfo, TensorType};
use crate::quant::{self, QuantError};
use crate::rounding::round_by_search;

/// Weights per piece: large enough that a piece's overhead vanishes, small enough that a few pieces per thread
/// stay in the cache hierarchy and the memory peak is a few megabytes per thread.
const PIECE_WEIGHTS: u64 = 1 << 18;

/// Finished pieces that may wait for the writer, per thread.
const WAITING_PIECES_PER_THREAD: usize = 4;

/// Pieces whose source is read ahead of the one that is handed out, per thread.
const PREFETCHED_PIECES_PER_THREAD: usize = 8;

/// How a row becomes codes without knowing more than it and its importance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// As ggml does, the same bytes.
    Ggml,
    /// [`round_by_search`].
    Search,
}

/// What to do with one tensor.
#[derive(Debug, Clone, Copy)]
pub struct TensorWork<'a> {
    /// The source tensor.
    pub source: &'a TensorInfo,
    /// The type to write; equal to the source's type for a plain copy.
    pub target: TensorType,
    /// How it is rounded: as ggml does, or by search.
    pub rounding: Rounding,
    /// Importance of each column, `[matrices, row_len]` row-major; `None` for unweighted rounding.
    pub importance: Option<&'a [f32]>,
    /// Index of the output file.
    pub file: usize,
    /// Where the tensor's data begin in that file, in bytes.
    pub offset: u64,
}

/// Why a run stopped.
#[derive(Debug, Error)]
pub enum PipelineError {
    /// The source file could not be read.
    #[error(transparent)]
    Read(#[from] GgufError),
    /// A source weight is NaN or infinite.
    #[error(
        "{file}: tensor {tensor}: weight {index} is {value}; such a model cannot be quantized, make the source file again"
    )]
    NonFinite {
        /// The source file.
        file: String,
        /// The tensor's name.
        tensor: String,
        /// Index of the weight in the tensor, row-major.
        index: u64,
        /// The weight.
        value: f32,
    },
    /// The codec refused.
    #[error("{file}: tensor {tensor}: {source}")]
    Codec {
        /// The source file.
        file: String,
        /// The tensor's name.
        tensor: String,
        /// The codec's answer.
        source: QuantError,
    },
    /// Encoding gave block scales that are not finite: the weights are too large for the type.
    #[error(
        "{file}: tensor {tensor}: rows from {row} on are too large for {target} ({source}); give it another type with \
         --tensor-type"
    )]
    Overflow {
        /// The source file.
        file: String,
        /// The tensor's name.
        tensor: String,
        /// First row of the piece.
        row: u64,
        /// The wanted type.
        target: TensorType,
        /// Which block is wrong.
        source: QuantError,
    },
    /// The output could not be written.
    #[error("{}: cannot write: {source}", .file.display())]
    Write {
        /// The output file.
        file: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A worker thread panicked; a bug of this program.
    #[error("a worker thread failed; this is a bug, please report it")]
    Panicked,
}

/// Rows of one matrix of one tensor.
#[derive(Debug, Clone, Copy)]
struct Piece {
    work: usize,
    /// First row, counted over all matrices of the tensor.
    first_row: u64,
    rows: u64,
    matrix: u64,
}

/// A piece that is ready to be written.
struct Finished {
    work: usize,
    offset: u64,
    source_bytes: u64,
    data: Vec<u8>,
}

/// Called after every written piece with the tensor's index in the work list and the source bytes it stood for.
pub type OnWritten<'a> = &'a mut (dyn FnMut(usize, u64) + Send);

/// Converts all tensors of `work` into `files`, with `threads` workers.
///
/// # Errors
/// The error of the first piece, in the order of the work list, that failed.
pub fn run(
    gguf: &Gguf,
    work: &[TensorWork<'_>],
    files: &[AtomicFile],
    threads: usize,
    on_written: OnWritten<'_>,
) -> Result<(), PipelineError> {
    let threads = threads.max(1);
    let pieces = cut(work);
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let failure: Mutex<Option<(usize, PipelineError)>> = Mutex::new(None);
    let fail = |index: usize, error: PipelineError| {
        stop.store(true, Ordering::SeqCst);
        let mut slot = failure.lock().unwrap_or_else(PoisonError::into_inner);
        // Pieces are handed out in order, so the smallest failing index is the same in every run.
        if slot.as_ref().is_none_or(|(earlier, _)| index < *earlier) {
            *slot = Some((index, error));
        }
    };

    let (sender, receiver) = sync_channel(threads * WAITING_PIECES_PER_THREAD);
    let panicked = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                let sender: SyncSender<Finished> = sender.clone();
                let (pieces, next, stop, fail) = (&pieces, &next, &stop, &fail);
                scope.spawn(move || {
                    let mut floats = Vec::new();
                    while !stop.load(Ordering::Relaxed) {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        let Some(piece) = pieces.get(index) else { break };
                        if let Some(later) = pieces.get(index + threads * PREFETCHED_PIECES_PER_THREAD) {
                            gguf.prefetch_rows(work[later.work].source, later.first_row, later.rows);
                        }
                        match convert(gguf, &work[piece.work], piece, &mut floats) {
                            Ok(finished) => {
                                if sender.send(finished).is_err() {
                                    break;
                                }
                            }
                            Err(error) => fail(index, error),
                        }
                    }
                })
            })
            .collect();
        drop(sender);
        if let Err(error) = write_all(receiver, work, files, on_written) {
            fail(usize::MAX, error);
        }
        workers.into_iter().map(|worker| worker.join()).filter(Result::is_err).count() > 0
    });
    match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some((_, error)) => Err(error),
        None if panicked => Err(PipelineError::Panicked),
        None => Ok(()),
    }
}

fn cut(work: &[TensorWork<'_>]) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for (index, item) in work.iter().enumerate() {
        let row_len = item.source.row_len();
        let rows_per_matrix = item.source.rows_per_matrix();
        if row_len == 0 || rows_per_matrix == 0 {
            continue;
        }
        let rows_per_piece = (PIECE_WEIGHTS / row_len).max(1);
        for matrix in 0..item.source.matrices() {
            let mut row = 0;
            while row < rows_per_matrix {
                let rows = rows_per_piece.min(rows_per_matrix - row);
                pieces.push(Piece { work: index, first_row: matrix * rows_per_matrix + row, rows, matrix });
                row += rows;
            }
        }
    }
    pieces
}

fn convert(
    gguf: &Gguf,
    work: &TensorWork<'_>,
    piece: &Piece,
    floats: &mut Vec<f32>,
) -> Result<Finished, PipelineError> {
    let tensor = work.source;
    let source = gguf.read_rows(tensor, piece.first_row, piece.rows)?;
    let source_bytes = source.len() as u64;
    let data = if work.target == tensor.ty {
        check_copied(gguf, tensor, piece, &source)?;
        source.to_vec()
    } else {
        encode(gguf, work, piece, &source, floats)?
    };
    if matches!(source, Cow::Borrowed(_)) {
        gguf.release_rows(tensor, piece.first_row, piece.rows);
    }
    // Rows of one tensor have one size, so the piece's place follows from its own length.
    let offset = work.offset + piece.first_row * (data.len() as u64 / piece.rows);
    Ok(Finished { work: piece.work, offset, source_bytes, data })
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
        PipelineError::Codec { file: label(gguf, tensor), tensor: shown(tensor), source }
    })
}

fn label(gguf: &Gguf, tensor: &TensorInfo) -> String {
    gguf.shards().get(tensor.shard).map_or_else(|| gguf.label(), |shard| shard.label()).to_owned()
}

fn shown(tensor: &TensorInfo) -> String {
    tensor.shown_name()
}

fn encode(
    gguf: &Gguf,
    work: &TensorWork<'_>,
    piece: &Piece,
    source: &[u8],
    floats: &mut Vec<f32>,
) -> Result<Vec<u8>, PipelineError> {
    let tensor = work.source;
    let file = || label(gguf, tensor);
    let codec_error = |source| PipelineError::Codec { file: file(), tensor: shown(tensor), source };
    let row_len = tensor.row_len() as usize;
    floats.resize(piece.rows as usize * row_len, 0.0);
    quant::dequantize(tensor.ty, source, floats).map_err(codec_error)?;
    if let Some(index) = quant::first_non_finite(floats) {
        return Err(PipelineError::NonFinite {
            file: file(),
            tensor: shown(tensor),
            index: piece.first_row * tensor.row_len() + index as u64,
            value: floats[index],
        });
    }
    let importance = work.importance.map(|all| {
        let first = piece.matrix as usize * row_len;
        &all[first..first + row_len]
    });
    let row_bytes = work.target.info().and_then(|info| info.row_bytes(row_len as u64));
    let row_bytes = row_bytes.ok_or(QuantError::NoCodec { ty: work.target }).map_err(codec_error)?;
    let mut data = vec![0; row_bytes as usize * piece.rows as usize];
    let round = match work.rounding {
        Rounding::Ggml => quant::quantize_rows,
        Rounding::Search => round_by_search,
    };
    round(work.target, floats, row_len, importance, &mut data).map_err(codec_error)?;
    quant::validate(work.target, &data).map_err(|source| PipelineError::Overflow {
        file: file(),
        tensor: shown(tensor),
        row: piece.first_row,
        target: work.target,
        source,
    })?;
    Ok(data)
}

fn write_all(
    receiver: Receiver<Finished>,
    work: &[TensorWork<'_>],
    files: &[AtomicFile],
    on_written: OnWritten<'_>,
) -> Result<(), PipelineError> {
    for finished in receiver {
        let file = &files[work[finished.work].file];
        crate::os::write_all_at(file.file(), &finished.data, finished.offset)
            .map_err(|source| PipelineError::Write { file: file.target().to_path_buf(), source })?;
        on_written(finished.work, finished.source_bytes);
    }
    Ok(())
}
