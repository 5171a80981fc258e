//! The run: tensors of a mapped GGUF through the codecs into the output files.
//!
//! All tensors, and all matrices of stacked expert tensors, are cut into pieces of whole rows that stand in one
//! queue. Worker threads take a piece, read it, decode it, check it, encode it and write it, in buffers that they keep.
//! Nobody else is woken for that: on a busy machine each wake-up would cost the worker its place. A piece's bytes depend
//! on nothing but its rows, so the output is the same for any number of threads.

mod error;
mod overflow;
mod pieces;
#[cfg(test)]
mod tests;
mod worker;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use serde::Serialize;

use crate::atomic_file::AtomicFile;
use crate::gguf::{Gguf, TensorInfo, TensorType};
use crate::progress::{Interrupted, Watch};
use crate::workers::work_off;

pub use error::PipelineError;
pub use overflow::Overflow;
use pieces::cut;
use worker::Worker;

/// Pieces whose source is read ahead of the one that is handed out, per thread.
const PREFETCHED_PIECES_PER_THREAD: usize = 8;

/// Written bytes after which the system is asked to bring them to the disk, so that little is left for the end.
const WRITEBACK_BYTES: u64 = 32 << 20;

/// How a row becomes codes without knowing more than it and its importance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowRounding {
    /// As ggml does, the same bytes.
    Ggml,
    /// [`round_by_search`](crate::rounding::round_by_search).
    Search,
}

/// What to do with one tensor.
#[derive(Clone, Copy)]
pub struct TensorWork<'a> {
    /// The file that it comes from.
    pub gguf: &'a Gguf,
    /// The source tensor.
    pub source: &'a TensorInfo,
    /// The type to write; equal to the source's type for a plain copy.
    pub target: TensorType,
    /// How it is rounded: as ggml does, or by search.
    pub rounding: RowRounding,
    /// Importance of each column, `[matrices, row_len]` row-major; `None` for unweighted rounding.
    pub importance: Option<&'a [f32]>,
    /// Index of the output file.
    pub file: usize,
    /// Where the tensor's data begin in that file, in bytes.
    pub offset: u64,
}

/// What the worker threads did with their time, in seconds, summed over all of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Stages {
    /// Waiting for the source's bytes and copying them.
    pub reading: f64,
    /// Widening them to floats and looking for NaN and infinity.
    pub decoding: f64,
    /// In the encoders.
    pub encoding: f64,
    /// Looking for scales that are not finite in what was encoded or is copied.
    pub checking: f64,
    /// Handing the result to the system.
    pub writing: f64,
    /// Waiting for the threads that still have work, at the end.
    pub idle: f64,
}

impl Stages {
    fn add(&mut self, other: &Stages) {
        self.reading += other.reading;
        self.decoding += other.decoding;
        self.encoding += other.encoding;
        self.checking += other.checking;
        self.writing += other.writing;
        self.idle += other.idle;
    }
}

/// A piece that a worker has written.
struct Written {
    work: usize,
    source_bytes: u64,
    bytes: u64,
}

/// What the workers share.
struct Run<'a> {
    work: &'a [TensorWork<'a>],
    files: &'a [AtomicFile],
    watch: &'a dyn Watch,
    /// Bytes written to each file since the system was last asked to bring them to the disk.
    waiting: Vec<AtomicU64>,
}

/// Converts all tensors of `work` into `files`, with `threads` workers. `watch` gets the source bytes of every written piece.
///
/// # Errors
/// The error of the first piece, in the order of the work list, that failed; or `watch` stops the run.
pub fn run(
    work: &[TensorWork<'_>],
    files: &[AtomicFile],
    threads: usize,
    watch: &dyn Watch,
) -> Result<Stages, PipelineError> {
    let run = Run { work, files, watch, waiting: files.iter().map(|_| AtomicU64::new(0)).collect() };
    let pieces = cut(work.iter().map(|work| work.source));
    let ahead = threads.max(1) * PREFETCHED_PIECES_PER_THREAD;
    let start = || Worker::new(files);
    let stop = watch.abandon();
    let workers = work_off(&pieces, threads, start, |worker, index, piece| {
        stop.check()?;
        if let Some(later) = pieces.get(index + ahead) {
            let work = &work[later.work];
            work.gguf.prefetch_rows(work.source, later.first_row, later.rows);
        }
        let written = worker.convert(&work[piece.work], piece)?;
        run.report(&written);
        Ok::<_, PipelineError>(())
    });
    // Also after a failure: whoever asks for a stop from here on is not heard by this work.
    let stopped = stop.end();
    let workers = workers?;
    if stopped {
        return Err(Interrupted.into());
    }
    let finished: Vec<(Stages, Instant)> = workers.into_iter().map(Worker::finish).collect();
    let mut stages = Stages::default();
    let last = finished.iter().map(|(_, end)| *end).max();
    for (times, end) in &finished {
        stages.add(times);
        stages.idle += last.map_or(0.0, |last| (last - *end).as_secs_f64());
    }
    Ok(stages)
}

impl Run<'_> {
    /// Reports a written piece, and lets the disk write while the threads compute.
    fn report(&self, written: &Written) {
        let file = self.work[written.work].file;
        let waiting = self.waiting[file].fetch_add(written.bytes, Ordering::Relaxed) + written.bytes;
        if waiting >= WRITEBACK_BYTES {
            self.waiting[file].store(0, Ordering::Relaxed);
            crate::os::start_writeback(self.files[file].file());
        }
        self.watch.advance(written.source_bytes, &self.work[written.work].source.name);
    }
}
