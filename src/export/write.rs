//! The run: matrices in pieces of rows through the rounding into their places, everything else copied.
//!
//! All items are cut into pieces of whole rows that stand in one queue. Bytes of a piece depend on its rows alone (and, for
//! NVFP4, on the largest weight of all that loaders put into one, which a pass before finds), so the files are the same
//! for any number of threads, and for a run that goes on where another stopped.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use safetensors::tensor::Dtype;
use sha2::{Digest, Sha256};

use super::ExportError;
use super::draft::{Content, Draft, Item, Module};
use super::files::{self, failed};
use super::folder::{self, NewFolder, Origin};
use super::names;
use super::pack::{self, ROWS_TOGETHER};
use super::request::Rounding;
use crate::atomic_file::{Replace, folder_of};
use crate::convert::source::ReadBuffers;
use crate::display::decimal_size;
use crate::os;
use crate::progress::{Interrupted, Stop, Unit, Watch};
use crate::quant::float16::{f32_to_bf16, f32_to_f16};
use crate::rounding::grid::{self, Grid, Rounded};
use crate::unfinished::{GOES_ON, going_on};
use crate::workers;

/// Weights of a piece, if 128 rows have no more: 16 MB of floats.
const PIECE_WEIGHTS: u64 = 1 << 22;

/// Bytes that are copied or read back at a time.
const COPY_BYTES: u64 = 8 << 20;

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Bytes of the safetensors files.
    pub bytes: u64,
    /// Items that an earlier run had finished.
    pub taken_over: usize,
}

/// Rows of an item, or bytes of a copied one.
struct Piece {
    item: usize,
    first: u64,
    count: u64,
}

impl Draft {
    /// Writes the folder. A run that is stopped leaves `OUT.partial`, with which the same call goes on.
    ///
    /// # Errors
    /// If the output may not be made, the disk is too small, the source cannot be read or holds NaN or infinity, or `watch`
    /// stops the run.
    pub fn write(&self, output: &Path, replace: Replace, watch: &dyn Watch) -> Result<Written, ExportError> {
        folder::check_output(output, self.folder(), replace)?;
        let origin = Origin::new(self.source.fingerprint()?, self.settings.clone());
        let folder = NewFolder::open(output, replace, &origin)?;
        self.check_space(output, &folder)?;
        let files = self.open_files(&folder)?;
        let stop = watch.stop();
        let result = self.run(&folder, &files, watch, &stop);
        let stopped = stop.end();
        watch.end();
        let taken_over = match result {
            Err(ExportError::Interrupted(_)) => {
                watch.warn(GOES_ON);
                return Err(Interrupted.into());
            }
            result => result?,
        };
        if stopped {
            watch.warn(GOES_ON);
            return Err(Interrupted.into());
        }
        for (file, shard) in files.iter().zip(&self.shards.files) {
            file.sync_all()
                .map_err(|source| failed(&folder.path(&shard.name), "cannot write it to the disk", source))?;
        }
        if let Some(index) = &self.shards.index {
            files::write_json(&folder.path("model.safetensors.index.json"), index)?;
        }
        files::copy(&self.extra, self.folder(), &folder.path(""))?;
        files::write_json(&folder.path("config.json"), &self.config)?;
        folder.commit()?;
        Ok(Written { bytes: self.file_bytes(), taken_over })
    }

    /// Compares what is still to be written with the space on the disk.
    fn check_space(&self, output: &Path, folder: &NewFolder) -> Result<(), ExportError> {
        let there = |name: &str| std::fs::metadata(folder.path(name)).map_or(0, |found| found.len());
        let wanted: u64 = self.shards.files.iter().map(|shard| shard.bytes.saturating_sub(there(&shard.name))).sum();
        match os::free_space(folder_of(output)) {
            Some(free) if free < wanted => {
                let (wanted, free) = (decimal_size(wanted), decimal_size(free));
                let problem = format!("needs {wanted}, but its disk has {free} free; make room or choose another disk");
                Err(ExportError::Folder { path: output.to_path_buf(), problem })
            }
            _ => Ok(()),
        }
    }

    /// The safetensors files, with their headers and full lengths.
    fn open_files(&self, folder: &NewFolder) -> Result<Vec<File>, ExportError> {
        let open = |shard: &super::shards::Shard| {
            let path = folder.path(&shard.name);
            let wrong = |action| move |source| failed(&path, action, source);
            let made = wrong.clone()("cannot make it");
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            let file = options.open(folder.path(&shard.name)).map_err(made)?;
            if file.metadata().map_or(0, |found| found.len()) != shard.bytes {
                os::reserve(&file, shard.bytes).map_err(wrong("cannot reserve space on the disk"))?;
            }
            os::write_all_at(&file, &shard.header, 0)
                .map_err(|source| failed(&folder.path(&shard.name), "cannot write it", source))?;
            Ok(file)
        };
        self.shards.files.iter().map(open).collect()
    }

    fn run(&self, folder: &NewFolder, files: &[File], watch: &dyn Watch, stop: &Stop) -> Result<usize, ExportError> {
        let sink = Sink { draft: self, files };
        let mut todo = Vec::new();
        for item in 0..self.items.len() {
            let is_done = match folder.done.get(&item) {
                None => false,
                // A disk that lost what the journal names is not believed.
                Some(digest) => sink.digest(item)? == *digest,
            };
            if !is_done {
                todo.push(item);
            }
            stop.check()?;
        }
        let taken_over = self.items.len() - todo.len();
        if taken_over > 0 {
            watch.note(&going_on(taken_over, self.items.len(), "tensors"));
        }
        let globals = self.global_scales(&todo, watch, stop)?;
        let pieces = self.cut(&todo);
        let mut left: HashMap<usize, AtomicU64> = HashMap::new();
        for piece in &pieces {
            left.entry(piece.item).or_default().fetch_add(1, Ordering::Relaxed);
        }
        let bytes = |piece: &Piece| -> u64 {
            let of_item: u64 = self.tensors[piece.item].iter().map(|tensor| tensor.bytes).sum();
            let whole = self.length(piece.item).max(1);
            (u128::from(of_item) * u128::from(piece.count) / u128::from(whole)) as u64
        };
        watch.begin("exporting", pieces.iter().map(bytes).sum(), Unit::Bytes);
        workers::work_off(&pieces, rayon::current_num_threads(), ReadBuffers::default, |buffers, _, piece| {
            stop.check()?;
            self.piece(&sink, piece, &globals, buffers)?;
            watch.advance(bytes(piece), &self.items[piece.item].name);
            if left[&piece.item].fetch_sub(1, Ordering::AcqRel) == 1 {
                folder.note(piece.item, &sink.digest(piece.item)?)?;
            }
            Ok::<_, ExportError>(())
        })?;
        Ok(taken_over)
    }

    /// Rows of an item that is computed, bytes of one that is copied.
    fn length(&self, item: usize) -> u64 {
        match &self.items[item].content {
            Content::Module(module) => module.matrix.rows,
            Content::Decoded { matrix, .. } => matrix.rows,
            Content::Stored { bytes, .. } => *bytes,
        }
    }

    fn cut(&self, todo: &[usize]) -> Vec<Piece> {
        let mut pieces = Vec::new();
        for &item in todo {
            let rows_together = |columns: u64| (PIECE_WEIGHTS / columns.max(1) / ROWS_TOGETHER).max(1) * ROWS_TOGETHER;
            let most = match &self.items[item].content {
                Content::Module(Module { matrix, .. }) | Content::Decoded { matrix, .. } => {
                    rows_together(matrix.columns)
                }
                Content::Stored { .. } => COPY_BYTES,
            };
            let length = self.length(item);
            if length == 0 {
                pieces.push(Piece { item, first: 0, count: 0 });
            }
            let cut = workers::cut(length, most);
            pieces.extend(cut.map(|range| Piece { item, first: range.start, count: range.end - range.start }));
        }
        pieces
    }

    /// NVFP4's global scales, one for all that loaders put into one.
    fn global_scales(
        &self,
        todo: &[usize],
        watch: &dyn Watch,
        stop: &Stop,
    ) -> Result<HashMap<String, f32>, ExportError> {
        let is_wanted = |item: &Item| item.module().is_some_and(|m| self.layouts[m.group].grid == Grid::Nvfp4);
        let keys: Vec<&str> = todo.iter().filter_map(|item| self.items[*item].module()).map(|m| &*m.name).collect();
        let keys: std::collections::HashSet<String> = keys.into_iter().map(global_key).collect();
        let all: Vec<usize> = (0..self.items.len())
            .filter(|item| is_wanted(&self.items[*item]) && keys.contains(&global_key(&self.items[*item].name)))
            .collect();
        let pieces = self.cut(&all);
        let peaks: Mutex<HashMap<String, f32>> = Mutex::default();
        if !pieces.is_empty() {
            let weights = |piece: &Piece| match &self.items[piece.item].content {
                Content::Module(module) => piece.count * module.matrix.columns,
                _ => 0,
            };
            watch.begin("looking for the largest weights", pieces.iter().map(weights).sum(), Unit::Bytes);
            let start = || (ReadBuffers::default(), Vec::new());
            workers::work_off(&pieces, rayon::current_num_threads(), start, |(buffers, values), _, piece| {
                stop.check()?;
                let Content::Module(module) = &self.items[piece.item].content else { return Ok(()) };
                values.clear();
                self.source.read_rows(&module.matrix, piece.first, piece.count, buffers, values)?;
                let peak = values.iter().fold(0f32, |peak, value| peak.max(value.abs()));
                let mut peaks = peaks.lock().unwrap_or_else(PoisonError::into_inner);
                let known = peaks.entry(global_key(&module.name)).or_default();
                *known = known.max(peak);
                watch.advance(weights(piece), &module.name);
                Ok::<_, ExportError>(())
            })?;
            watch.end();
        }
        let peaks = peaks.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(peaks.into_iter().map(|(key, peak)| (key, grid::common_global_scale([&[peak][..]]))).collect())
    }

    fn piece(
        &self,
        sink: &Sink<'_>,
        piece: &Piece,
        globals: &HashMap<String, f32>,
        buffers: &mut ReadBuffers,
    ) -> Result<(), ExportError> {
        let Piece { item, first, count } = *piece;
        match &self.items[item].content {
            Content::Module(module) => {
                let mut values = Vec::new();
                self.source.read_rows(&module.matrix, first, count, buffers, &mut values)?;
                let layout = self.layouts[module.group];
                let (rows, columns) = (count as usize, module.matrix.columns as usize);
                let global = globals.get(&global_key(&module.name)).copied();
                let rounded = match self.rounding {
                    Rounding::Rtn => grid::plain(layout, &values, rows, columns, global),
                };
                sink.put(item, first, count, &rounded)
            }
            Content::Decoded { matrix, dtype, .. } => {
                let mut values = Vec::new();
                self.source.read_rows(matrix, first, count, buffers, &mut values)?;
                let bytes = encode(*dtype, &values);
                let at = first * matrix.columns * pack::dtype_bytes(*dtype);
                sink.write(item, 0, at, &bytes)
            }
            Content::Stored { weight, .. } => {
                let mut bytes = vec![0; count as usize];
                self.source.read_stored(*weight, first, &mut bytes)?;
                sink.write(item, 0, first, &bytes)
            }
        }
    }
}

/// The key under which modules share a global scale.
fn global_key(module: &str) -> String {
    names::fused_of(module).map_or_else(|| module.to_owned(), |(key, ..)| key)
}

fn encode(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::F16 => values.iter().flat_map(|value| f32_to_f16(*value).to_le_bytes()).collect(),
        Dtype::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        _ => values.iter().flat_map(|value| f32_to_bf16(*value).to_le_bytes()).collect(),
    }
}

/// The files of the output.
struct Sink<'a> {
    draft: &'a Draft,
    files: &'a [File],
}

impl Sink<'_> {
    /// Writes rows of a rounded matrix: `count` from row `first`.
    fn put(&self, item: usize, first: u64, count: u64, rounded: &Rounded) -> Result<(), ExportError> {
        let Content::Module(module) = &self.draft.items[item].content else { return Ok(()) };
        let (rows, columns) = (module.matrix.rows, module.matrix.columns);
        let layout = &self.draft.layouts[module.group];
        let format = self.draft.scheme.row().format;
        for (at, info) in pack::parts(format, layout, rows, columns).iter().enumerate() {
            let bytes = pack::pack(info, layout, rounded, rows, columns);
            let (start, length) = info.range(first, count);
            debug_assert_eq!(bytes.len() as u64, length, "{}", info.suffix);
            self.write(item, at, start, &bytes)?;
        }
        Ok(())
    }

    /// Writes bytes of tensor `tensor` of an item.
    fn write(&self, item: usize, tensor: usize, at: u64, bytes: &[u8]) -> Result<(), ExportError> {
        let place = self.place(item, tensor);
        os::write_all_at(&self.files[place.file], bytes, place.offset + at)
            .map_err(|source| self.failed(place.file, "cannot write it", source))
    }

    fn place(&self, item: usize, tensor: usize) -> super::shards::Place {
        self.draft.shards.places[self.draft.starts[item] + tensor]
    }

    fn failed(&self, file: usize, action: &'static str, source: std::io::Error) -> ExportError {
        failed(Path::new(&self.draft.shards.files[file].name), action, source)
    }

    /// SHA-256, in hexadecimal, of what stands in the files for an item.
    fn digest(&self, item: usize) -> Result<String, ExportError> {
        let mut hash = Sha256::new();
        let mut buffer = Vec::new();
        for (at, tensor) in self.draft.tensors[item].iter().enumerate() {
            let place = self.place(item, at);
            for range in workers::cut(tensor.bytes, COPY_BYTES) {
                buffer.resize((range.end - range.start) as usize, 0);
                os::read_exact_at(&self.files[place.file], &mut buffer, place.offset + range.start)
                    .map_err(|source| self.failed(place.file, "cannot read it back", source))?;
                hash.update(&buffer);
            }
        }
        Ok(format!("{:x}", hash.finalize()))
    }
}
