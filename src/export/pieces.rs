//! Rows of matrices, rounded one by one, and bytes that are copied: work that any thread may take.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, PoisonError};

use safetensors::tensor::Dtype;

use super::ExportError;
use super::draft::{Content, Draft, Item, Module};
use super::names;
use super::pack::{self, ROWS_TOGETHER};
use super::request::Rounding;
use super::sink::{COPY_BYTES, Sink};
use crate::convert::source::ReadBuffers;
use crate::progress::{Stop, Unit, Watch};
use crate::quant::float16::{f32_to_bf16, f32_to_f16};
use crate::rounding::grid::{self, Grid};
use crate::workers;

/// Weights of a piece, if 128 rows have no more: 16 MB of floats.
const PIECE_WEIGHTS: u64 = 1 << 22;

/// Rows of an item, or bytes of a copied one.
pub(crate) struct Piece {
    pub(crate) item: usize,
    pub(crate) first: u64,
    pub(crate) count: u64,
}

impl Draft {
    /// Rows of an item that is computed, bytes of one that is copied.
    pub(crate) fn length(&self, item: usize) -> u64 {
        match &self.items[item].content {
            Content::Module(module) => module.matrix.rows,
            Content::Decoded { matrix, .. } => matrix.rows,
            Content::Stored { bytes, .. } => *bytes,
        }
    }

    pub(crate) fn cut(&self, todo: &[usize]) -> Vec<Piece> {
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
    pub(crate) fn global_scales(
        &self,
        todo: &[usize],
        watch: &dyn Watch,
        stop: &Stop,
    ) -> Result<HashMap<String, f32>, ExportError> {
        let is_wanted = |item: &Item| item.module().is_some_and(|m| self.layouts[m.group].grid == Grid::Nvfp4);
        let keys: Vec<&str> = todo.iter().filter_map(|item| self.items[*item].module()).map(|m| &*m.name).collect();
        let keys: HashSet<String> = keys.into_iter().map(global_key).collect();
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

    pub(crate) fn piece(
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
                // Without inputs, GPTQ is plain rounding and feedback is search.
                let rounded = match self.rounding {
                    Rounding::Rtn | Rounding::Gptq { .. } => grid::plain(layout, &values, rows, columns, global),
                    Rounding::Search | Rounding::Feedback(_) => {
                        grid::search(layout, &values, rows, columns, None, global)
                    }
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
pub(crate) fn global_key(module: &str) -> String {
    names::fused_of(module).map_or_else(|| module.to_owned(), |(key, ..)| key)
}

fn encode(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::F16 => values.iter().flat_map(|value| f32_to_f16(*value).to_le_bytes()).collect(),
        Dtype::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        _ => values.iter().flat_map(|value| f32_to_bf16(*value).to_le_bytes()).collect(),
    }
}
