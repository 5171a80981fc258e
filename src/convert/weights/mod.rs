//! Weight tensors as the model knows them, however the checkpoint stores them.
//!
//! What a tensor is follows from its parts, as writers of checkpoints name them:
//!
//! - FP8 and int8: `X.weight` with `X.weight_scale` or `X.weight_scale_inv`, for a tensor, a row, a group or a block of
//!   rows and columns.
//! - compressed-tensors, packed: `X.weight_packed`, `X.weight_scale`, `X.weight_shape` and where codes are asymmetric
//!   `X.weight_zero_point`.
//! - NVFP4: codes, a scale for 16 columns, one more for the tensor: `X.weight_packed`, `X.weight_global_scale` (a divisor)
//!   of compressed-tensors, or `X.weight`, `X.weight_scale_2` of ModelOpt.
//! - MXFP4: codes and a power of two for 32 columns: `X.weight_packed` and `X.weight_scale`, or `X_blocks` and `X_scales`
//!   of gpt-oss.
//!
//! A part that is missing or has another shape is refused: codes taken as values give a model of noise.

mod codes;
mod fp8;
mod method;
mod scales;

use std::collections::BTreeMap;

use byteorder::{ByteOrder, LittleEndian};
use safetensors::tensor::Dtype;

pub(super) use codes::{Coded, Factors};
pub(super) use fp8::e4m3_to_f32;
pub(super) use method::source_of;

use codes::{Codes, ZeroPoints, read_global};
use method::Method;
use scales::Scales;

use super::ConvertError;
use super::checkpoint::{Checkpoint, Dense, shape_text};
use super::config::Config;
use super::files::Folder;
use crate::gguf::shown;

/// Scales of activations and caches, which a file of weights has no use for.
const UNUSED: [&str; 8] = [
    ".input_scale",
    ".input_global_scale",
    ".activation_scale",
    "_activation_scale",
    ".qscale_act",
    ".k_scale",
    ".v_scale",
    ".q_scale",
];

/// Longest row that is believed; the shape of packed weights is a tensor's content.
const MAX_COLUMNS: u64 = 1 << 31;

/// A weight tensor.
#[derive(Debug)]
pub(super) struct Weight {
    /// Its name without the suffixes of its parts.
    pub name: String,
    /// Dimensions of the values, slowest first.
    pub shape: Vec<u64>,
    /// The tensor that holds values or codes.
    pub tensor: usize,
    pub coding: Coding,
}

/// How values are stored.
#[derive(Debug)]
pub(super) enum Coding {
    /// As they are.
    Dense(Dense),
    /// As codes with scales.
    Coded(Box<Coded>),
    /// As nothing that holds weights.
    Other(Dtype),
}

impl Weight {
    pub(super) fn shape_text(&self) -> String {
        shape_text(&self.shape)
    }

    /// Stored bytes of a row of `columns` values.
    pub(super) fn row_bytes(&self, columns: u64) -> u64 {
        match &self.coding {
            Coding::Dense(dense) => columns * dense.bytes(),
            Coding::Coded(coded) => coded.row_bytes(columns),
            Coding::Other(_) => 0,
        }
    }

    /// Its codes, if it has any.
    pub(super) fn coded(&self) -> Option<&Coded> {
        match &self.coding {
            Coding::Coded(coded) => Some(coded),
            _ => None,
        }
    }

    /// Rows of one matrix of a stack.
    pub(super) fn rows_per_matrix(&self) -> u64 {
        self.shape.iter().rev().nth(1).copied().unwrap_or(1)
    }
}

pub(super) fn wrong(checkpoint: &Checkpoint, tensor: usize, problem: impl Into<String>) -> ConvertError {
    ConvertError::Tensor {
        file: checkpoint.file_of(tensor).to_path_buf(),
        tensor: shown(checkpoint.tensors()[tensor].name.as_bytes()),
        problem: problem.into(),
    }
}

/// All weights of a checkpoint, in its order.
///
/// # Errors
/// If a quantized tensor lacks a part, or a part contradicts another.
pub(super) fn collect(
    config: &Config,
    folder: &Folder,
    checkpoint: &Checkpoint,
    warnings: &mut Vec<String>,
) -> Result<Vec<Weight>, ConvertError> {
    let method = Method::read(config, folder)?;
    let mut collector = Collector {
        checkpoint,
        method: &method,
        consumed: vec![false; checkpoint.tensors().len()],
        coded: BTreeMap::new(),
    };
    for (index, tensor) in checkpoint.tensors().iter().enumerate() {
        if let Some(stem) = tensor.name.strip_suffix("_packed") {
            collector.packed(index, stem)?;
        } else if let Some(stem) = tensor.name.strip_suffix("_blocks")
            && tensor.dtype == Dtype::U8
        {
            collector.blocks(index, stem)?;
        } else if tensor.dtype == Dtype::U8 && tensor.shape.len() >= 2 {
            collector.halves(index)?;
        }
    }
    let mut bare: Vec<usize> = Vec::new();
    for (index, tensor) in checkpoint.tensors().iter().enumerate() {
        if collector.consumed[index] || collector.coded.contains_key(&index) {
            continue;
        }
        let codes = match tensor.dtype {
            Dtype::F8_E4M3 => Some(Codes::E4M3),
            Dtype::I8 => Some(Codes::I8),
            _ => None,
        };
        if let Some(codes) = codes
            && !collector.bytes(index, codes)?
            && codes == Codes::E4M3
        {
            bare.push(index);
        }
        if UNUSED.iter().any(|suffix| tensor.name.ends_with(suffix)) {
            collector.consumed[index] = true;
        }
    }
    collector.check_bare(&bare, warnings)?;
    let Collector { consumed, mut coded, .. } = collector;
    let mut weights = Vec::new();
    for (index, tensor) in checkpoint.tensors().iter().enumerate() {
        if let Some(weight) = coded.remove(&index) {
            weights.push(weight);
        } else if !consumed[index] {
            let coding = tensor.dense().map_or(Coding::Other(tensor.dtype), Coding::Dense);
            weights.push(Weight { name: tensor.name.clone(), shape: tensor.shape.clone(), tensor: index, coding });
        }
    }
    Ok(weights)
}

struct Collector<'a> {
    checkpoint: &'a Checkpoint,
    method: &'a Method,
    /// Parts of other tensors.
    consumed: Vec<bool>,
    /// Weights by the tensor of their codes.
    coded: BTreeMap<usize, Weight>,
}

impl Collector<'_> {
    fn wrong(&self, tensor: usize, problem: impl Into<String>) -> ConvertError {
        wrong(self.checkpoint, tensor, problem)
    }

    /// A part of a tensor, which is used up by that.
    fn part(&mut self, name: &str) -> Option<usize> {
        let index = self.checkpoint.find(name)?;
        self.consumed[index] = true;
        Some(index)
    }

    fn required(&mut self, tensor: usize, name: &str) -> Result<usize, ConvertError> {
        self.part(name).ok_or_else(|| {
            let problem =
                format!("is quantized, but {} is missing; download the weights again", shown(name.as_bytes()));
            self.wrong(tensor, problem)
        })
    }

    fn add(&mut self, tensor: usize, name: &str, shape: Vec<u64>, coded: Coded) {
        let weight = Weight { name: name.to_owned(), shape, tensor, coding: Coding::Coded(Box::new(coded)) };
        self.coded.insert(tensor, weight);
    }

    /// `stem_packed` of compressed-tensors: integers in words, or 4-bit floats in bytes.
    fn packed(&mut self, index: usize, stem: &str) -> Result<(), ConvertError> {
        match self.checkpoint.tensors()[index].dtype {
            Dtype::I32 => self.packed_integers(index, stem),
            Dtype::U8 => {
                let scale = self.required(index, &format!("{stem}_scale"))?;
                self.small_floats(index, scale, stem, stem, true)
            }
            other => Err(self.wrong(index, format!("has dtype {other:?}, expected packed weights of I32 or U8"))),
        }
    }

    fn packed_integers(&mut self, index: usize, stem: &str) -> Result<(), ConvertError> {
        let scale = self.required(index, &format!("{stem}_scale"))?;
        let shape_at = self.required(index, &format!("{stem}_shape"))?;
        let shape = self.read_shape(shape_at)?;
        let [rows, columns] = shape;
        let packed = self.checkpoint.tensors()[index].shape.clone();
        let words = |bits: u64| (columns * bits).div_ceil(32);
        let fits = |bits: &u64| packed == [rows, words(*bits)];
        let named = self.method.bits.iter().copied().find(fits);
        let Some(bits) = named.or_else(|| [4, 8].into_iter().find(fits)).filter(|bits| matches!(bits, 4 | 8)) else {
            let problem = format!(
                "has shape {}, which is neither 4 nor 8 bits for each of {} weights; only these can be read",
                shape_text(&packed),
                shape_text(&shape)
            );
            return Err(self.wrong(index, problem));
        };
        if !self.method.bits.is_empty() && !self.method.bits.contains(&bits) {
            let problem = format!("holds {bits} bits a weight; config.json says {:?}", self.method.bits);
            return Err(self.wrong(index, problem));
        }
        let scales = Scales::read(self.checkpoint, scale, index, &shape, &[])?;
        let zero_points = match self.part(&format!("{stem}_zero_point")) {
            None => None,
            Some(zero) => Some(self.zero_points(zero, scale, rows, bits as u32)?),
        };
        let groups = match self.part(&format!("{stem}_g_idx")) {
            None => None,
            Some(order) => self.column_groups(order, &scales, columns)?,
        };
        let codes = Codes::Packed { bits: bits as u32 };
        let coded = plain(codes, scales);
        self.add(index, stem, shape.to_vec(), Coded { zero_points, groups, ..coded });
        Ok(())
    }

    /// The content of a `weight_shape`: rows and columns.
    fn read_shape(&self, index: usize) -> Result<[u64; 2], ConvertError> {
        let tensor = &self.checkpoint.tensors()[index];
        let bytes = match tensor.dtype {
            Dtype::I64 => 8,
            Dtype::I32 => 4,
            other => return Err(self.wrong(index, format!("has dtype {other:?}, expected I64"))),
        };
        if tensor.shape != [2] {
            return Err(self.wrong(index, format!("has shape {}, expected [2]", tensor.shape_text())));
        }
        let mut raw = vec![0; 2 * bytes];
        self.checkpoint.read_at(index, 0, &mut raw)?;
        let shape = [&raw[..bytes], &raw[bytes..]].map(|value| LittleEndian::read_int(value, bytes));
        match shape.map(|value| u64::try_from(value).ok().filter(|value| (1..=MAX_COLUMNS).contains(value))) {
            [Some(rows), Some(columns)] => Ok([rows, columns]),
            _ => Err(self.wrong(index, format!("says {shape:?}, expected rows and columns; the file is damaged"))),
        }
    }

    fn zero_points(&self, index: usize, scale: usize, rows: u64, bits: u32) -> Result<ZeroPoints, ConvertError> {
        let tensor = &self.checkpoint.tensors()[index];
        let groups = self.checkpoint.tensors()[scale].shape.get(1).copied().unwrap_or(1);
        let packed = [(rows * u64::from(bits)).div_ceil(32), groups];
        match tensor.dtype {
            Dtype::I32 if tensor.shape == packed => Ok(ZeroPoints::Packed { tensor: index, bits, groups }),
            Dtype::I8 if tensor.shape == [rows, groups] => Ok(ZeroPoints::Bytes { tensor: index, groups }),
            dtype => {
                let problem = format!(
                    "has dtype {dtype:?} and shape {}, expected I32 of {} or I8 of {}",
                    tensor.shape_text(),
                    shape_text(&packed),
                    shape_text(&[rows, groups])
                );
                Err(self.wrong(index, problem))
            }
        }
    }

    /// The group of each column, unless they are runs of neighbours anyway.
    fn column_groups(&self, index: usize, scales: &Scales, columns: u64) -> Result<Option<Vec<u32>>, ConvertError> {
        let tensor = &self.checkpoint.tensors()[index];
        if tensor.dtype != Dtype::I32 || tensor.shape != [columns] {
            let problem =
                format!("has dtype {:?} and shape {}, expected I32 of [{columns}]", tensor.dtype, tensor.shape_text());
            return Err(self.wrong(index, problem));
        }
        let mut raw = vec![0; tensor.bytes as usize];
        self.checkpoint.read_at(index, 0, &mut raw)?;
        let found: Vec<i32> = raw.as_chunks().0.iter().map(|bytes| i32::from_le_bytes(*bytes)).collect();
        let group = scales.group();
        let count = (columns as usize).div_ceil(group.max(1));
        // -1 throughout is what a writer leaves that did not sort.
        if found.iter().all(|group| *group == -1) || found.iter().enumerate().all(|(i, g)| *g as usize == i / group) {
            return Ok(None);
        }
        match found.iter().position(|group| *group < 0 || *group as usize >= count) {
            None => Ok(Some(found.into_iter().map(|group| group as u32).collect())),
            Some(at) => Err(self.wrong(index, format!("value {at} is {}, but there are {count} groups", found[at]))),
        }
    }

    /// 4-bit floats, two a byte: `name` is the weight's, `stem` that of its parts. NVFP4 and MXFP4 are told apart by the
    /// dtype of their scales.
    fn small_floats(
        &mut self,
        index: usize,
        scale: usize,
        name: &str,
        stem: &str,
        divides: bool,
    ) -> Result<(), ConvertError> {
        let tensor = &self.checkpoint.tensors()[index];
        let [leading @ .., rows, bytes] = tensor.shape.as_slice() else {
            return Err(self.wrong(index, "is quantized but no matrix; use an unquantized model"));
        };
        let rows = *rows;
        let shape = [leading, &[rows, bytes.saturating_mul(2)]].concat();
        let scales = Scales::read(self.checkpoint, scale, index, &shape, &[])?;
        let matrices = leading.iter().product();
        let mut coded = plain(Codes::E2M1, scales);
        if self.checkpoint.tensors()[scale].dtype == Dtype::F8_E4M3 {
            let global = if divides { format!("{stem}_global_scale") } else { format!("{stem}_scale_2") };
            let global = self.required(index, &global)?;
            coded.global = read_global(self.checkpoint, global, matrices, divides)?;
            let module = stem.strip_suffix(".weight").unwrap_or(stem);
            let input = if divides { format!("{module}.input_global_scale") } else { format!("{module}.input_scale") };
            if let Some(input) = self.part(&input) {
                coded.input = read_global(self.checkpoint, input, matrices, divides)?;
            }
        }
        self.add(index, name, shape, coded);
        Ok(())
    }

    /// `X.weight` of bytes with two codes each, if scales for them are there.
    fn halves(&mut self, index: usize) -> Result<(), ConvertError> {
        let name = self.checkpoint.tensors()[index].name.clone();
        let Some(scale) = self.checkpoint.find(&format!("{name}_scale")) else { return Ok(()) };
        let dtype = self.checkpoint.tensors()[scale].dtype;
        if !matches!(dtype, Dtype::F8_E4M3 | Dtype::F8_E8M0 | Dtype::U8) {
            return Ok(());
        }
        self.consumed[scale] = true;
        self.small_floats(index, scale, &name, &name, false)
    }

    /// gpt-oss: `stem_blocks` of shape rows x blocks x 16 bytes, `stem_scales` of rows x blocks.
    fn blocks(&mut self, index: usize, stem: &str) -> Result<(), ConvertError> {
        let scale = self.required(index, &format!("{stem}_scales"))?;
        let [front @ .., blocks, 16] = self.checkpoint.tensors()[index].shape.as_slice() else {
            let found = self.checkpoint.tensors()[index].shape_text();
            return Err(self.wrong(index, format!("has shape {found}, expected blocks of 16 bytes")));
        };
        let shape = [front, &[blocks.saturating_mul(32)]].concat();
        let scales = Scales::read(self.checkpoint, scale, index, &shape, &[])?;
        self.add(index, stem, shape, plain(Codes::E2M1, scales));
        Ok(())
    }

    /// Codes of a byte each; false if there are no scales for them.
    fn bytes(&mut self, index: usize, codes: Codes) -> Result<bool, ConvertError> {
        let tensor = &self.checkpoint.tensors()[index];
        let name = tensor.name.clone();
        let mut names = vec![format!("{name}_scale_inv"), format!("{name}_scale")];
        names.extend(name.strip_suffix("weight").map(|module| format!("{module}qscale_weight")));
        let found: Vec<usize> = names.iter().filter_map(|name| self.part(name)).collect();
        let scale = match found.as_slice() {
            [] => return Ok(false),
            [scale] => *scale,
            _ => return Err(self.wrong(index, "has two tensors of scales; remove one of them")),
        };
        let shape = tensor.shape.clone();
        let scales = Scales::read(self.checkpoint, scale, index, &shape, &self.method.blocks)?;
        let rows = shape.iter().rev().nth(1).copied().unwrap_or(1);
        let mut coded = plain(codes, scales);
        if codes == Codes::I8
            && let Some(zero) = self.part(&format!("{name}_zero_point"))
        {
            coded.zero_points = Some(self.zero_points(zero, scale, rows, 8)?);
        }
        self.add(index, &name, shape, coded);
        Ok(true)
    }

    /// FP8 weights without scales: refused where the folder says that it is quantized, values otherwise.
    fn check_bare(&self, bare: &[usize], warnings: &mut Vec<String>) -> Result<(), ConvertError> {
        let Some(&first) = bare.first() else { return Ok(()) };
        let name = &self.checkpoint.tensors()[first].name;
        let Some(method) = &self.method.name else {
            warnings.push(format!(
                "{} and {} other tensors are FP8 without scales, and config.json names no quantization: their codes are \
                 taken as values",
                shown(name.as_bytes()),
                bare.len() - 1
            ));
            return Ok(());
        };
        let module = name.strip_suffix("weight").unwrap_or(name);
        let other = self.checkpoint.tensors().iter().enumerate().find(|(index, tensor)| {
            !self.consumed[*index]
                && *index != first
                && tensor.name.starts_with(module)
                && tensor.name.contains("scale")
        });
        let other = other.map_or(String::new(), |(_, other)| {
            format!(" ({} is no name that is known)", shown(other.name.as_bytes()))
        });
        let problem = format!(
            "is FP8, and config.json names the method {}, but its scale {} is missing{other}; without it the weights would \
             be wrong by a factor of thousands; download the weights again",
            shown(method.as_bytes()),
            shown(format!("{name}_scale").as_bytes()),
        );
        Err(self.wrong(first, problem))
    }
}

/// Codes with scales and nothing else.
fn plain(codes: Codes, scales: Scales) -> Coded {
    Coded { codes, scales, zero_points: None, groups: None, global: Vec::new(), input: Vec::new() }
}
