//! Entry points of the fuzz targets: parsers that are private otherwise.

use std::path::Path;

use super::architectures::Row;
use super::checkpoint::{Checkpoint, parse_header};
use super::config::Config;
use super::files::Folder;
use super::plan::Part;
use super::rows::{Rows, Scratch};
use super::{ConvertError, Options, vocabulary, weights};
use crate::gguf::Metadata;

/// Parses a whole safetensors file that is in memory; true if it is sound.
pub fn safetensors(bytes: &[u8]) -> bool {
    parse_header(Path::new("fuzz.safetensors"), bytes).is_ok()
}

/// Opens one safetensors file on disk and reads the first byte of every tensor.
pub fn safetensors_file(path: &Path) -> bool {
    let Ok(checkpoint) = Checkpoint::open_file(path) else { return false };
    for (index, tensor) in checkpoint.tensors().iter().enumerate() {
        let mut byte = [0; 1];
        if tensor.bytes > 0 && checkpoint.read_at(index, 0, &mut byte).is_err() {
            return false;
        }
    }
    true
}

/// Parses tokenizer.json and looks for its pre-tokenizer; the name, if it was recognized.
pub fn tokenizer_json(bytes: &[u8]) -> Option<&'static str> {
    vocabulary::recognize_bytes(bytes)
}

/// Finds the weights of a folder with config.json and model.safetensors, whatever they are for, and reads the first rows of
/// each as floats and, where they fit, as blocks. Gives the number of weights.
pub fn checkpoint(folder: &Path) -> Result<usize, ConvertError> {
    const ROWS: u64 = 40;
    const COLUMNS: u64 = 1 << 16;
    let folder = Folder::open(folder)?;
    let config = Config::read(&folder)?;
    let mut warnings = Vec::new();
    let checkpoint = Checkpoint::open(&folder, &mut warnings)?;
    let found = weights::collect(&config, &folder, &checkpoint, &mut warnings)?;
    for weight in &found {
        let columns = weight.shape.last().copied().unwrap_or(0);
        let Some(coded) = weight.coded().filter(|_| columns <= COLUMNS) else { continue };
        let count = (weight.shape.iter().rev().skip(1).product::<u64>()).min(ROWS);
        let part = Part { weight: 0, first: 0, count, step: 1, transposed: None };
        let rows = Rows { checkpoint: &checkpoint, weight, part: &part, row_len: columns, permuted_rows: None };
        let (mut raw, mut scratch) = (Vec::new(), Scratch::default());
        rows.read(0, count, &mut raw, &mut scratch)?;
        let mut floats = vec![0.0; (count * columns) as usize];
        rows.widen(0, &raw, &mut floats)?;
        if let Some(ty) = coded.block_type(&checkpoint, columns, true)? {
            let bytes = ty.info().and_then(|info| info.row_bytes(columns)).expect("rows fit its blocks");
            let mut blocks = vec![0; (bytes * count) as usize];
            rows.to_blocks(ty, 0, &raw, &mut blocks, &mut scratch)?;
            let mut decoded = vec![0.0; floats.len()];
            crate::quant::dequantize(ty, &blocks, &mut decoded).expect("the blocks are whole");
            for ((row, values), decoded) in
                floats.chunks(columns as usize).enumerate().zip(decoded.chunks(columns as usize))
            {
                let global = coded.global_of(row as u64 / weight.rows_per_matrix());
                let same = |(value, decoded): (&f32, &f32)| *value == decoded * global || value.is_nan();
                assert!(values.iter().zip(decoded).all(same), "row {row} of {} as {ty}", weight.name);
            }
        }
    }
    Ok(found.len())
}

/// Reads the tokenizer files of a folder as for a model of `class` with `size` tokens.
pub fn tokenizer_folder(folder: &Path, class: &str, size: u64) -> Result<usize, ConvertError> {
    let (folder, row) = (Folder::open(folder)?, Row::by_class(class).expect("a class of the table"));
    let mut metadata = Metadata::new("fuzz.gguf");
    let mut warnings = Vec::new();
    vocabulary::write(&folder, row, size, &Options::default(), &mut metadata, &mut warnings)?;
    Ok(warnings.len())
}
