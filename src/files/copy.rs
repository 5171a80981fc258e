//! Tensors from one GGUF to others, byte for byte.

use std::path::{Path, PathBuf};

use super::FilesError;
use crate::atomic_file::{AtomicFile, Replace, check_target, commit_all};
use crate::display::printable;
use crate::gguf::{Gguf, GgufError, GgufLayout, Metadata, NewTensor, TensorInfo};
use crate::os;
use crate::progress::{Interrupted, Unit, Watch};
use crate::workers;

/// Bytes that are read at a time.
const PIECE_BYTES: u64 = 4 << 20;

/// A file to be written: its layout, and the tensors of the source that it holds, in its order.
pub(super) struct Output<'a> {
    pub(super) path: PathBuf,
    layout: GgufLayout,
    tensors: Vec<&'a TensorInfo>,
}

impl<'a> Output<'a> {
    /// Lays out a file of these tensors.
    ///
    /// # Errors
    /// If the metadata or the tensors cannot be stored.
    pub(super) fn new(path: PathBuf, metadata: &Metadata, tensors: Vec<&'a TensorInfo>) -> Result<Self, FilesError> {
        let sized = tensors.iter().map(|tensor| (NewTensor::from(*tensor), tensor.bytes));
        let layout = GgufLayout::carried(&path.display().to_string(), metadata, sized)?;
        Ok(Output { path, layout, tensors })
    }

    pub(super) fn file_bytes(&self) -> u64 {
        self.layout.file_bytes()
    }
}

/// Copies the tensors of `gguf` into `outputs`, which get their names when all are complete. `stage` is what
/// `watch` calls it.
///
/// # Errors
/// If an output exists and may not be replaced, is a file of the source (unless `over_source`), or cannot be written; if the
/// source cannot be read, or `watch` stops the run.
pub(super) fn write_outputs(
    gguf: &Gguf,
    outputs: &[Output<'_>],
    over_source: bool,
    stage: &'static str,
    replace: Replace,
    watch: &dyn Watch,
) -> Result<(), FilesError> {
    for output in outputs {
        if !over_source {
            refuse_source(gguf, &output.path)?;
        }
        check_target(&output.path, replace.is_allowed())?;
    }
    let mut files = Vec::with_capacity(outputs.len());
    for output in outputs {
        let file = AtomicFile::create(&output.path, replace.is_allowed())?;
        file.reserve(output.file_bytes())?;
        files.push(file);
    }
    watch.begin(stage, outputs.iter().map(|output| output.layout.data_bytes()).sum(), Unit::Bytes);
    let stop = watch.abandon();
    let mut buffer = Vec::new();
    for (output, file) in outputs.iter().zip(&files) {
        output.layout.write_header_at(file.file())?;
        for (index, tensor) in output.tensors.iter().enumerate() {
            for_each_piece(gguf, tensor, &mut buffer, |at, piece| {
                stop.check()?;
                output.layout.write_data_at(file.file(), index, at, piece)?;
                watch.advance(piece.len() as u64, &tensor.name);
                Ok(())
            })?;
        }
        os::start_writeback(file.file());
    }
    if stop.end() {
        return Err(Interrupted.into());
    }
    watch.end();
    Ok(commit_all(files)?)
}

/// Refuses an output that is one of the files that are read.
pub(super) fn refuse_source(gguf: &Gguf, output: &Path) -> Result<(), FilesError> {
    match gguf.shards().iter().filter_map(|shard| shard.path()).any(|input| os::same_file(input, output)) {
        true => {
            let output = output.display().to_string();
            Err(FilesError::refused(&output, "is a file of the model that is read; choose another output"))
        }
        false => Ok(()),
    }
}

/// Gives the bytes of a tensor to `take`, little-endian, a few megabytes at a time, each with its distance from the
/// tensor's start.
///
/// # Errors
/// If they cannot be read, or `take` fails.
pub(super) fn for_each_piece(
    gguf: &Gguf,
    tensor: &TensorInfo,
    buffer: &mut Vec<u8>,
    mut take: impl FnMut(u64, &[u8]) -> Result<(), FilesError>,
) -> Result<(), FilesError> {
    match tensor.row_bytes().filter(|row_bytes| gguf.is_big_endian() && *row_bytes > 0) {
        // Numbers are swapped, which takes whole blocks.
        Some(row_bytes) => {
            for rows in workers::cut(tensor.rows(), (PIECE_BYTES / row_bytes).max(1)) {
                take(rows.start * row_bytes, gguf.load_rows(tensor, rows.start, rows.end - rows.start, buffer)?)?;
            }
        }
        None => {
            let bytes = tensor.bytes.ok_or_else(|| without_size(gguf, tensor))?;
            for piece in workers::cut(bytes, PIECE_BYTES) {
                take(piece.start, gguf.load_bytes(tensor, piece.start, piece.end - piece.start, buffer)?)?;
            }
        }
    }
    Ok(())
}

fn without_size(gguf: &Gguf, tensor: &TensorInfo) -> FilesError {
    FilesError::Gguf(GgufError::Tensor {
        file: printable(gguf.label()),
        tensor: tensor.shown_name(),
        problem: format!("is of type {}, whose size is not known", tensor.ty),
        advice: "a newer lwq may know the type",
    })
}
