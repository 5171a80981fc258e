//! Block scales of FP8 weights.
//!
//! Two conventions are read: `quant_method` "fp8" with `X.weight_scale_inv` (or `X.weight_scale`), and
//! compressed-tensors "float-quantized" with `X.weight_scale`. In both a stored value is multiplied by its scale:
//! one for the tensor, one for a row, or one for a block of `weight_block_size`, 128 x 128 where nothing is said.

use std::collections::HashMap;

use serde_json::Value;

use super::ConvertError;
use super::checkpoint::{Checkpoint, Dense, shape_text};
use super::config::Config;
use super::files::kind;
use crate::gguf::shown;
use crate::quant::float16::{bf16_to_f32, f16_to_f32};

const DEFAULT_BLOCK: [u64; 2] = [128, 128];

/// Names of the scales of `X.weight`.
const SUFFIXES: [&str; 2] = ["_scale_inv", "_scale"];

/// Scales of activations and caches, which a file of weights has no use for.
const UNUSED: [&str; 5] = [".input_scale", ".activation_scale", "_activation_scale", ".k_scale", ".v_scale"];

/// Scales of one tensor: `values[matrix][row block][column block]`.
#[derive(Debug)]
pub(super) struct Scales {
    values: Vec<f32>,
    /// Rows and columns that share a scale.
    block: [u64; 2],
    rows_per_matrix: u64,
    row_blocks: u64,
    column_blocks: u64,
}

/// What was found in a checkpoint.
pub(super) struct Found {
    /// Scales by the index of the tensor that they belong to.
    pub by_tensor: HashMap<usize, Scales>,
    /// Tensors that hold scales, or belong to activations.
    pub consumed: Vec<usize>,
}

impl Scales {
    pub(super) fn collect(config: &Config, checkpoint: &Checkpoint) -> Result<Found, ConvertError> {
        let block = block_size(config)?;
        let mut found = Found { by_tensor: HashMap::new(), consumed: Vec::new() };
        for (index, tensor) in checkpoint.tensors().iter().enumerate() {
            let weight = SUFFIXES.iter().find_map(|suffix| checkpoint.find(tensor.name.strip_suffix(suffix)?));
            if let Some(weight) = weight
                && checkpoint.tensors()[weight].dense() == Some(Dense::F8E4M3)
            {
                let scales = Scales::read(checkpoint, index, weight, block)?;
                if found.by_tensor.insert(weight, scales).is_some() {
                    return Err(wrong(checkpoint, weight, "has two tensors of scales; remove one of them".into()));
                }
                found.consumed.push(index);
            } else if UNUSED.iter().any(|suffix| tensor.name.ends_with(suffix)) {
                found.consumed.push(index);
            }
        }
        Ok(found)
    }

    fn read(checkpoint: &Checkpoint, index: usize, weight: usize, block: [u64; 2]) -> Result<Scales, ConvertError> {
        let (tensor, target) = (&checkpoint.tensors()[index], &checkpoint.tensors()[weight]);
        let [leading @ .., rows, columns] = target.shape.as_slice() else {
            return Err(wrong(checkpoint, weight, "is FP8 but no matrix; use an unquantized model".into()));
        };
        let (rows, columns) = (*rows, *columns);
        let matrices: u64 = leading.iter().product();
        let grid = [rows.div_ceil(block[0]), columns.div_ceil(block[1])];
        let mut per_block = leading.to_vec();
        per_block.extend(grid);
        let mut per_row = leading.to_vec();
        per_row.push(rows);
        let mut per_row_column = per_row.clone();
        per_row_column.push(1);
        let (block, grid) = if tensor.elements() == 1 {
            ([u64::MAX, u64::MAX], [1, 1])
        } else if tensor.shape == per_block {
            (block, grid)
        } else if tensor.shape == per_row || tensor.shape == per_row_column {
            ([1, u64::MAX], [rows, 1])
        } else if !leading.is_empty() && tensor.elements() == matrices {
            ([u64::MAX, u64::MAX], [1, 1])
        } else {
            let problem = format!(
                "has shape {}; weights of shape {} have one scale, one a row, or {} for blocks of {} x {}",
                tensor.shape_text(),
                target.shape_text(),
                shape_text(&per_block),
                block[0],
                block[1]
            );
            return Err(wrong(checkpoint, index, problem));
        };
        let mut bytes = vec![0; tensor.bytes as usize];
        checkpoint.read_at(index, 0, &mut bytes)?;
        let mut values: Vec<f32> = match tensor.dense() {
            Some(Dense::F32) => bytes.as_chunks().0.iter().map(|raw| f32::from_le_bytes(*raw)).collect(),
            Some(Dense::BF16) => bytes.as_chunks().0.iter().map(|raw| bf16_to_f32(u16::from_le_bytes(*raw))).collect(),
            Some(Dense::F16) => bytes.as_chunks().0.iter().map(|raw| f16_to_f32(u16::from_le_bytes(*raw))).collect(),
            _ => {
                let problem = format!("has dtype {:?}, expected F32, BF16 or F16 scales", tensor.dtype);
                return Err(wrong(checkpoint, index, problem));
            }
        };
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            return Err(wrong(checkpoint, index, format!("value {at} is {}; the scales are damaged", values[at])));
        }
        let wanted = matrices.max(1) * grid[0] * grid[1];
        if values.len() == 1 && wanted > 1 {
            values = vec![values[0]; wanted as usize];
        }
        Ok(Scales { values, block, rows_per_matrix: rows, row_blocks: grid[0], column_blocks: grid[1] })
    }

    /// Multiplies the values of row `row`, counted over all matrices, of which `values` are all columns.
    pub(super) fn apply(&self, row: u64, values: &mut [f32]) {
        let (matrix, row) = (row / self.rows_per_matrix, row % self.rows_per_matrix);
        let first = ((matrix * self.row_blocks + row / self.block[0]) * self.column_blocks) as usize;
        let scales = &self.values[first..first + self.column_blocks as usize];
        let columns = usize::try_from(self.block[1]).unwrap_or(usize::MAX);
        for (chunk, scale) in values.chunks_mut(columns).zip(scales) {
            for value in chunk {
                *value *= scale;
            }
        }
    }
}

fn wrong(checkpoint: &Checkpoint, tensor: usize, problem: String) -> ConvertError {
    ConvertError::Tensor {
        file: checkpoint.file_of(tensor).to_path_buf(),
        tensor: shown(checkpoint.tensors()[tensor].name.as_bytes()),
        problem,
    }
}

/// Block size that the configuration names; an error for methods other than FP8.
fn block_size(config: &Config) -> Result<[u64; 2], ConvertError> {
    const FIELD: &str = "quantization_config";
    let settings = match config.get(FIELD) {
        None => return Ok(DEFAULT_BLOCK),
        Some(Value::Object(settings)) => settings,
        Some(other) => return Err(config.wrong(FIELD, format!("is {}, expected an object", kind(other)))),
    };
    let text = |key: &str| settings.get(key).and_then(Value::as_str).unwrap_or_default();
    let block = match (text("quant_method"), text("format")) {
        ("fp8", _) => settings.get("weight_block_size"),
        ("compressed-tensors", "float-quantized" | "naive-quantized") => {
            let groups = settings.get("config_groups").and_then(Value::as_object);
            let weights = groups.and_then(|groups| groups.values().next()).and_then(|group| group.get("weights"));
            weights.and_then(|weights| weights.get("block_structure"))
        }
        (method, format) => {
            let format = if format.is_empty() { String::new() } else { format!(" ({})", shown(format.as_bytes())) };
            let method = shown(method.as_bytes());
            let problem =
                format!("has method {method}{format}; only FP8 weights can be widened, use the unquantized model");
            return Err(config.wrong(FIELD, problem));
        }
    };
    match block {
        None | Some(Value::Null) => Ok(DEFAULT_BLOCK),
        Some(value) => match serde_json::from_value::<[u64; 2]>(value.clone()) {
            Ok([rows, columns]) if rows > 0 && columns > 0 => Ok([rows, columns]),
            _ => Err(config.wrong(FIELD, format!("has a block size of {}, expected two numbers", kind(value)))),
        },
    }
}
