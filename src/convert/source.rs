//! A model folder for other verbs: its weights under the folder's own names, as they are stored or as floats.

use std::path::Path;

use safetensors::tensor::Dtype;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::ConvertError;
use super::OutputType;
use super::architectures::Row;
use super::checkpoint::{Checkpoint, Dense};
use super::config::Config;
use super::files::Folder;
use super::plan::{self, OTHER_TOWERS, Part};
use super::rows::{Rows, Scratch};
use super::weights::{self, Coding, Weight};
use crate::quant;

/// Bytes of each tensor that a fingerprint looks at, at its start and in its middle.
const SAMPLE: u64 = 4096;

/// A folder whose configuration and safetensors headers were read and checked.
pub(crate) struct ModelFolder {
    folder: Folder,
    config: Config,
    row: Option<&'static Row>,
    checkpoint: Checkpoint,
    weights: Vec<Weight>,
    warnings: Vec<String>,
}

/// A matrix inside a weight of the folder: so many rows, of a stack or of a tensor that holds several.
#[derive(Debug, Clone)]
pub(crate) struct Matrix {
    pub(super) part: Part,
    /// Rows, which are outputs.
    pub(crate) rows: u64,
    /// Values of a row.
    pub(crate) columns: u64,
}

/// Buffers that reading needs, kept from piece to piece.
#[derive(Default)]
pub(crate) struct ReadBuffers {
    raw: Vec<u8>,
    scratch: Scratch,
}

/// How a stack of experts is cut into matrices that loaders of single experts know.
#[derive(Debug)]
pub(crate) struct ExpertMatrix {
    /// Name of the module, without `.weight`.
    pub(crate) module: String,
    pub(crate) matrix: Matrix,
}

impl ModelFolder {
    /// Reads configuration and headers.
    ///
    /// # Errors
    /// As [`Conversion::open`](super::Conversion::open), but for architectures and shapes, which are not looked at.
    pub(crate) fn open(path: &Path) -> Result<ModelFolder, ConvertError> {
        let folder = Folder::open(path)?;
        let config = Config::read(&folder)?;
        let mut warnings = Vec::new();
        let checkpoint = Checkpoint::open(&folder, &mut warnings)?;
        let weights = weights::collect(&config, &folder, &checkpoint, &mut warnings)?;
        let row = Row::by_class(config.architecture());
        Ok(ModelFolder { folder, config, row, checkpoint, weights, warnings })
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// `config.json` as it stands.
    pub(crate) fn config_json(&self) -> Result<Map<String, Value>, ConvertError> {
        Ok(self.folder.object("config.json")?.unwrap_or_default())
    }

    /// A field of the configuration of the text part that is a count.
    pub(crate) fn count(&self, field: &str) -> Option<u64> {
        self.config.get(field).and_then(Value::as_u64)
    }

    /// The class that `config.json` names.
    pub(crate) fn class(&self) -> &str {
        self.config.architecture()
    }

    /// True if the forward pass knows this class.
    pub(crate) fn is_known(&self) -> bool {
        self.row.is_some()
    }

    /// What a user should know, one line each.
    pub(crate) fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Number of weights.
    pub(crate) fn len(&self) -> usize {
        self.weights.len()
    }

    pub(crate) fn name(&self, weight: usize) -> &str {
        &self.weights[weight].name
    }

    /// Name of the weight that a matrix is a part of.
    pub(crate) fn name_of(&self, matrix: &Matrix) -> &str {
        self.name(matrix.part.weight)
    }

    /// Dimensions, slowest first.
    pub(crate) fn shape(&self, weight: usize) -> &[u64] {
        &self.weights[weight].shape
    }

    /// Element type of a weight that is stored as values; `None` for codes with scales.
    pub(crate) fn stored_type(&self, weight: usize) -> Option<Dtype> {
        let weight = &self.weights[weight];
        weight.coded().is_none().then(|| self.checkpoint.tensors()[weight.tensor].dtype)
    }

    /// True if the weight can be read as floats.
    pub(crate) fn is_numeric(&self, weight: usize) -> bool {
        !matches!(self.weights[weight].coding, Coding::Other(_))
    }

    /// True if some weights are stored as codes.
    pub(crate) fn is_quantized(&self) -> bool {
        self.weights.iter().any(|weight| weight.coded().is_some())
    }

    /// Stored bytes of a weight that is stored as values.
    pub(crate) fn stored_bytes(&self, weight: usize) -> u64 {
        self.checkpoint.tensors()[self.weights[weight].tensor].bytes
    }

    /// The type of the model's matrices: BF16 or F16, F32 where none has 16 bits.
    pub(crate) fn model_type(&self) -> Dtype {
        let mut dense = self.weights.iter().filter(|weight| weight.shape.len() >= 2).filter_map(|weight| {
            let Coding::Dense(dense) = weight.coding else { return None };
            Some(dense)
        });
        let first = dense.clone().find(|dense| matches!(dense, Dense::F16 | Dense::BF16));
        match first.or_else(|| dense.next()) {
            Some(Dense::F16) => Dtype::F16,
            Some(Dense::F32) => Dtype::F32,
            Some(Dense::BF16) => Dtype::BF16,
            // Only codes: the type that their scales have been made for is not known.
            Some(Dense::F8E4M3) | None => match plan::source_type(&self.checkpoint) {
                OutputType::F16 if !self.is_quantized() => Dtype::F16,
                _ => Dtype::BF16,
            },
        }
    }

    /// A weight that is one matrix; `None` for other shapes.
    pub(crate) fn matrix(&self, weight: usize) -> Option<Matrix> {
        let [rows, columns] = *self.shape(weight) else { return None };
        let part = Part { weight, first: 0, count: rows, step: 1, transposed: None };
        (rows > 0 && columns > 0).then_some(Matrix { part, rows, columns })
    }

    /// All rows of a weight of any shape.
    pub(crate) fn rows_of(&self, weight: usize, rows: u64, columns: u64) -> Matrix {
        Matrix { part: Part { weight, first: 0, count: rows, step: 1, transposed: None }, rows, columns }
    }

    /// The weight that a matrix is the whole of, and its type, if it is stored as values.
    pub(crate) fn unquantized(&self, matrix: &Matrix) -> Option<(usize, Dtype)> {
        let weight = matrix.part.weight;
        let is_whole = self.shape(weight) == [matrix.rows, matrix.columns];
        self.stored_type(weight).filter(|_| is_whole).map(|dtype| (weight, dtype))
    }

    /// The matrices of single experts in a stack, under the names that the class has for them. `None` where the class is not
    /// known, or has no such names.
    pub(crate) fn experts(&self, weight: usize) -> Option<Vec<ExpertMatrix>> {
        let names = self.row?.experts?;
        if names.prefix.is_empty() || names.interleaved || names.kept_fused {
            return None;
        }
        let stem = self.name(weight);
        let stem = stem.strip_suffix(".weight").unwrap_or(stem);
        let [experts, down_rows, columns] = *self.shape(weight) else { return None };
        let parent = |stacked: &str| stem.strip_suffix(stacked).filter(|parent| parent.ends_with('.'));
        let [gate, up, down] = names.gate_up_down;
        let (parent, parts) = match (parent(names.stacked[0]), parent(names.stacked[1])) {
            (Some(parent), _) => (parent, vec![gate, up]),
            (None, Some(parent)) => (parent, vec![down]),
            (None, None) => return None,
        };
        let width = self.count("hidden_size")?;
        let is_fused = parts.len() == 2;
        let transposed = names.transposed
            && self.stored_type(weight).is_some()
            && if is_fused { down_rows == width } else { columns == width };
        let (rows, columns) = if transposed { (columns, down_rows) } else { (down_rows, columns) };
        if experts == 0 || columns == 0 || rows == 0 || !rows.is_multiple_of(parts.len() as u64) {
            return None;
        }
        let count = rows / parts.len() as u64;
        let mut matrices = Vec::new();
        for expert in 0..experts {
            for (at, part) in parts.iter().enumerate() {
                let first = at as u64 * count;
                let (first, transposed) = match transposed {
                    true => (first, Some(expert)),
                    false => (expert * rows + first, None),
                };
                let part_rows = Part { weight, first, count, step: 1, transposed };
                matrices.push(ExpertMatrix {
                    module: format!("{parent}{}{expert}.{part}", names.prefix),
                    matrix: Matrix { part: part_rows, rows: count, columns },
                });
            }
        }
        Some(matrices)
    }

    /// True for a tensor of an image or sound part.
    pub(crate) fn is_other_tower(&self, name: &str) -> bool {
        self.config.multimodal && OTHER_TOWERS.iter().any(|part| name.contains(part))
    }

    /// Appends `count` rows of a matrix, from row `first`, to `values`.
    ///
    /// # Errors
    /// If they cannot be read, or a value is NaN or infinite.
    pub(crate) fn read_rows(
        &self,
        matrix: &Matrix,
        first: u64,
        count: u64,
        buffers: &mut ReadBuffers,
        values: &mut Vec<f32>,
    ) -> Result<(), ConvertError> {
        let Matrix { part, columns, .. } = matrix;
        let weight = &self.weights[part.weight];
        let rows = Rows { checkpoint: &self.checkpoint, weight, part, row_len: *columns, permuted_rows: None };
        rows.read(first, count, &mut buffers.raw, &mut buffers.scratch)?;
        let start = values.len();
        values.resize(start + (count * columns) as usize, 0.0);
        rows.widen(first, &buffers.raw, &mut values[start..])?;
        match quant::first_non_finite(&values[start..]) {
            Some(at) => Err(rows.non_finite(first, at as u64)),
            None => Ok(()),
        }
    }

    /// Reads bytes of a weight that is stored as values, from byte `at` of it.
    ///
    /// # Errors
    /// If they cannot be read.
    pub(crate) fn read_stored(&self, weight: usize, at: u64, buffer: &mut [u8]) -> Result<(), ConvertError> {
        self.checkpoint.read_at(self.weights[weight].tensor, at, buffer)
    }

    /// Names of the files in the folder, sorted.
    pub(crate) fn file_names(&self) -> Result<Vec<String>, ConvertError> {
        self.folder.names()
    }

    /// SHA-256, in hexadecimal, over configuration, names, types and shapes, and a sample of each tensor's data.
    ///
    /// # Errors
    /// If the samples cannot be read.
    pub(crate) fn fingerprint(&self) -> Result<String, ConvertError> {
        let mut hash = Sha256::new();
        hash.update(self.folder.bytes("config.json")?.unwrap_or_default());
        let mut sample = Vec::new();
        for (index, tensor) in self.checkpoint.tensors().iter().enumerate() {
            let head = format!("{}:{} {:?} {:?}\n", tensor.name.len(), tensor.name, tensor.dtype, tensor.shape);
            hash.update(head);
            for at in [0, tensor.bytes / 2] {
                sample.resize(SAMPLE.min(tensor.bytes - at) as usize, 0);
                self.checkpoint.read_at(index, at, &mut sample)?;
                hash.update(&sample);
            }
        }
        Ok(format!("{:x}", hash.finalize()))
    }
}

impl std::fmt::Debug for ModelFolder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ModelFolder({}, {} weights)", self.path().display(), self.len())
    }
}

/// True if the forward pass knows a class that `config.json` names.
pub(crate) fn is_known_class(class: &str) -> bool {
    Row::by_class(class).is_some()
}

/// A tensor of a safetensors file, for verbs that check what they find there.
#[derive(Debug, Clone)]
pub(crate) struct FileTensor {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<u64>,
    pub(crate) bytes: u64,
}

/// One safetensors file, its header checked.
pub(crate) struct TensorFile {
    checkpoint: Checkpoint,
}

impl TensorFile {
    /// Opens it.
    ///
    /// # Errors
    /// If it cannot be read, or its header or length is wrong.
    pub(crate) fn open(path: &Path) -> Result<TensorFile, ConvertError> {
        Ok(TensorFile { checkpoint: Checkpoint::open_file(path)? })
    }

    /// All tensors, by name.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = FileTensor> {
        self.checkpoint.tensors().iter().map(|tensor| FileTensor {
            name: tensor.name.clone(),
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            bytes: tensor.bytes,
        })
    }

    /// Reads bytes of a tensor, by its place among [`TensorFile::tensors`].
    ///
    /// # Errors
    /// If they cannot be read.
    pub(crate) fn read(&self, tensor: usize, at: u64, buffer: &mut [u8]) -> Result<(), ConvertError> {
        self.checkpoint.read_at(tensor, at, buffer)
    }
}
