//! Quantized modules: which tensors each must have, and what stands in them.

use std::collections::{BTreeMap, BTreeSet};

use byteorder::{ByteOrder, LittleEndian};
use safetensors::tensor::Dtype;
use sha2::{Digest, Sha256};

use super::CheckedTensor;
use super::compare::Source;
use super::groups::Scheme;
use super::tensors::{Found, Tensors};
use crate::export::ExportError;
use crate::export::names;
use crate::export::pack::{self, Part, PartInfo, ROWS_TOGETHER};
use crate::export::scheme::Format;
use crate::quant::first_non_finite;
use crate::rounding::grid::{Grid, Layout, Rounded, ScaleType};

/// How names of tensors end that belong to a quantized module.
const SUFFIXES: [&str; 10] = [
    ".weight_packed",
    ".weight_scale",
    ".weight_zero_point",
    ".weight_shape",
    ".weight_global_scale",
    ".weight_g_idx",
    ".input_scale",
    ".input_zero_point",
    ".input_global_scale",
    ".weight",
];

/// Weights that are decoded at a time.
const PIECE_WEIGHTS: u64 = 1 << 22;

/// A quantized module.
pub(super) struct Module {
    /// Without `.weight`.
    pub(super) name: String,
    /// Of the configuration.
    pub(super) group: usize,
    pub(super) rows: u64,
    pub(super) columns: u64,
    /// How its tensors are stored; `None` if one is missing or has another shape.
    pub(super) stored: Option<Stored>,
}

pub(super) struct Stored {
    format: Format,
    layout: Layout,
    parts: Vec<PartInfo>,
    pub(super) global_scale: f32,
}

/// Finds all quantized modules, and what is wrong with their tensors.
pub(super) fn collect(
    tensors: &Tensors,
    scheme: &Scheme,
    faults: &mut Vec<String>,
) -> Result<Vec<Module>, ExportError> {
    let mut by_module: BTreeMap<&str, BTreeSet<&'static str>> = BTreeMap::new();
    for (name, found) in &tensors.by_name {
        let Some(suffix) = SUFFIXES.into_iter().find(|suffix| name.ends_with(suffix)) else { continue };
        let is_plain = suffix == ".weight" && !matches!(found.info.dtype, Dtype::I8 | Dtype::F8_E4M3);
        let module = &name[..name.len() - suffix.len()];
        if is_plain && !tensors.by_name.contains_key(&format!("{module}.weight_packed")) {
            continue;
        }
        by_module.entry(module).or_default().insert(suffix);
    }
    let mut modules = Vec::new();
    for (name, suffixes) in by_module {
        if scheme.is_ignored(name) {
            faults.push(format!("{name}: is quantized, but ignore names it: loaders look for 16-bit weights"));
            continue;
        }
        let Some(group) = scheme.group_of(name) else {
            faults.push(format!("{name}: is quantized, but no group has it among its targets"));
            continue;
        };
        let before = faults.len();
        let mut module = Module { name: name.to_owned(), group, rows: 0, columns: 0, stored: None };
        let found = module.check(tensors, scheme, &suffixes, faults)?;
        if faults.len() == before {
            module.stored = found;
        }
        modules.push(module);
    }
    Ok(modules)
}

impl Module {
    fn tensor<'a>(&self, tensors: &'a Tensors, suffix: &str) -> Option<&'a Found> {
        tensors.get(&format!("{}{suffix}", self.name))
    }

    /// Compares the tensors with those that the group asks for.
    fn check(
        &mut self,
        tensors: &Tensors,
        scheme: &Scheme,
        suffixes: &BTreeSet<&'static str>,
        faults: &mut Vec<String>,
    ) -> Result<Option<Stored>, ExportError> {
        let group = &scheme.groups[self.group];
        let (format, mut layout) = (group.format, group.layout);
        let codes = if format.is_packed() { ".weight_packed" } else { ".weight" };
        let Some(found) = self.tensor(tensors, codes) else {
            let others: Vec<&str> = suffixes.iter().copied().collect();
            faults.push(format!(
                "{}{codes}: is missing, but {} {} there: loaders make garbage of the layer",
                self.name,
                others.join(", "),
                if others.len() == 1 { "is" } else { "are" }
            ));
            return Ok(None);
        };
        let [rows, width] = *found.info.shape else {
            faults.push(format!("{}{codes}: has shape {:?}, expected two dimensions", self.name, found.info.shape));
            return Ok(None);
        };
        let per_element = match (format, layout.grid) {
            (Format::PackQuantized, Grid::Int { bits, .. }) => 32 / u64::from(bits),
            (Format::Nvfp4Pack | Format::Mxfp4Pack, _) => 2,
            _ => 1,
        };
        let Some(mut columns) = width.checked_mul(per_element).filter(|columns| rows.checked_mul(*columns).is_some())
        else {
            faults.push(format!("{}{codes}: has shape {:?}, which is too large", self.name, found.info.shape));
            return Ok(None);
        };
        if let Some(said) = self.said_shape(tensors, faults)? {
            if said[0] == rows && said[1] <= columns && columns - said[1] < per_element {
                columns = said[1];
            } else {
                faults.push(format!(
                    "{}.weight_shape: says {said:?}, but {codes} holds {rows} rows of {columns} weights",
                    self.name
                ));
            }
        }
        (self.rows, self.columns) = (rows, columns);
        if rows == 0 || columns == 0 || !layout.fits(columns as usize) {
            faults.push(format!(
                "{}: its rows of {columns} weights are no whole groups of {}, which compressed-tensors refuses",
                self.name,
                layout.group_columns(columns as usize)
            ));
            return Ok(None);
        }
        if let Some(wide) = group.input_group.filter(|wide| *wide == 0 || !columns.is_multiple_of(*wide)) {
            faults.push(format!(
                "{}: its rows of {columns} weights are no whole groups of {wide}, in which its inputs are rounded: the first run \
                 of the model fails",
                self.name
            ));
        }
        if let Some(scale) = self.tensor(tensors, ".weight_scale") {
            match (layout.scale_type, scale.info.dtype) {
                (ScaleType::F8E4M3 | ScaleType::E8M0, _) => {}
                (_, Dtype::F32) => layout.scale_type = ScaleType::F32,
                (_, Dtype::F16) => layout.scale_type = ScaleType::F16,
                _ => {}
            }
        }
        let parts = pack::parts(format, &layout, rows, columns);
        for info in &parts {
            self.check_part(tensors, info, faults);
        }
        for suffix in suffixes.iter().filter(|suffix| !parts.iter().any(|info| info.suffix == **suffix)) {
            let why = match *suffix {
                ".weight_g_idx" => "an order of columns, which vLLM has no place for and transformers ignores",
                ".weight_zero_point" => "zero points, but its group is symmetric: transformers ignores them",
                ".weight" => "16-bit weights beside codes",
                _ => "a tensor that its group does not have",
            };
            faults.push(format!("{}{suffix}: is {why}", self.name));
        }
        let global_scale = self.check_scales(tensors, &parts, faults)?;
        Ok(Some(Stored { format, layout, parts, global_scale }))
    }

    fn said_shape(&self, tensors: &Tensors, faults: &mut Vec<String>) -> Result<Option<[u64; 2]>, ExportError> {
        let Some(found) = self.tensor(tensors, ".weight_shape") else { return Ok(None) };
        let bytes = match found.info.dtype {
            Dtype::I64 => 8,
            Dtype::I32 => 4,
            _ => return Ok(None),
        };
        if found.info.shape != [2] {
            return Ok(None);
        }
        let raw = tensors.read(found, 0, 2 * bytes as u64)?;
        let said = [&raw[..bytes], &raw[bytes..]].map(|value| u64::try_from(LittleEndian::read_int(value, bytes)));
        match said {
            [Ok(rows), Ok(columns)] => Ok(Some([rows, columns])),
            _ => {
                faults.push(format!("{}.weight_shape: holds a negative number", self.name));
                Ok(None)
            }
        }
    }

    fn check_part(&self, tensors: &Tensors, info: &PartInfo, faults: &mut Vec<String>) {
        let name = format!("{}{}", self.name, info.suffix);
        let Some(found) = tensors.get(&name) else {
            let effect = match info.part {
                Part::GlobalScale => "loaders make NaN of the layer",
                Part::Shape => "the first run of the model fails",
                Part::Codes | Part::Scale | Part::ZeroPoint => "loaders make garbage of the layer",
            };
            faults.push(format!("{name}: is missing: {effect}"));
            return;
        };
        let fits = found.info.dtype == info.dtype || (info.part == Part::Shape && found.info.dtype == Dtype::I32);
        if !fits {
            faults.push(format!("{name}: has dtype {:?}, expected {:?}", found.info.dtype, info.dtype));
        }
        if found.info.shape != info.shape {
            faults.push(format!("{name}: has shape {:?}, expected {:?}", found.info.shape, info.shape));
        }
    }

    /// Scales must be finite; gives NVFP4's global one.
    fn check_scales(
        &self,
        tensors: &Tensors,
        parts: &[PartInfo],
        faults: &mut Vec<String>,
    ) -> Result<f32, ExportError> {
        let mut global = 1.0;
        for info in parts.iter().filter(|info| matches!(info.part, Part::Scale | Part::GlobalScale)) {
            let name = format!("{}{}", self.name, info.suffix);
            let Some(found) = tensors.get(&name).filter(|found| found.info.dtype == info.dtype) else { continue };
            let raw = tensors.read(found, 0, found.info.bytes)?;
            let Some(scales) = pack::floats(found.info.dtype, &raw) else { continue };
            if let Some(at) = first_non_finite(&scales) {
                faults.push(format!("{name}: value {at} is {}", scales[at]));
            } else if info.part == Part::GlobalScale {
                global = scales.first().copied().unwrap_or(1.0);
                if global <= 0.0 {
                    faults.push(format!("{name}: is {global}, which weights cannot be divided by"));
                }
            }
        }
        Ok(global)
    }

    /// Decodes all weights; with it the number of the factors of columns that it is nearest to its source with. The inner
    /// error is a fault.
    pub(super) fn read(
        &self,
        tensors: &Tensors,
        source: Option<&Source<'_>>,
    ) -> Result<Result<(CheckedTensor, Option<usize>), String>, ExportError> {
        let Some(stored) = &self.stored else { return Ok(Err(format!("{}: is not whole", self.name))) };
        let most = (PIECE_WEIGHTS / self.columns / ROWS_TOGETHER).max(1) * ROWS_TOGETHER;
        let mut hash = Sha256::new();
        let mut original = Vec::new();
        let compared = source.and_then(|source| source.matrix(&self.name).map(|matrix| (source, matrix)));
        let mut distances = vec![Distance::default()];
        if let Some((source, _)) = &compared {
            distances.extend(source.factors_of(&self.name, self.columns).map(Distance::with));
        }
        for range in crate::workers::cut(self.rows, most) {
            let (first, count) = (range.start, range.end - range.start);
            let values = stored.decode(self, tensors, first, count)?;
            if let Some(at) = first_non_finite(&values) {
                let at = first * self.columns + at as u64;
                return Ok(Err(format!("{}: weight {at} is NaN or infinite", self.name)));
            }
            values.iter().for_each(|value| hash.update(value.to_le_bytes()));
            if let Some((source, matrix)) = &compared {
                original.clear();
                source.read(matrix, first, count, &mut original)?;
                distances.iter_mut().for_each(|distance| distance.add(&values, &original, self.columns as usize));
            }
        }
        let nearest = distances.iter().min_by(|a, b| a.relative().total_cmp(&b.relative()));
        let relative_error = compared.and(nearest).map(Distance::relative);
        let factors = nearest.and_then(|nearest| nearest.factors).map(|(number, _)| number);
        if let Some(error) = relative_error.filter(|error| error.is_nan() || *error > Source::LARGEST_ERROR) {
            return Ok(Err(format!(
                "{}: is {:.0}% away from the source: these are other weights",
                self.name,
                100.0 * error
            )));
        }
        let checked = CheckedTensor {
            name: self.name.clone(),
            format: stored.format.name(),
            shape: [self.rows, self.columns],
            values_sha256: format!("{:x}", hash.finalize()),
            relative_error,
        };
        Ok(Ok((checked, factors)))
    }
}

/// How far decoded weights are from the source's, whose columns are multiplied with factors.
#[derive(Default)]
struct Distance<'a> {
    /// Their number and themselves; `None` stands for 1.
    factors: Option<(usize, &'a [f32])>,
    difference: f64,
    norm: f64,
}

impl<'a> Distance<'a> {
    fn with(factors: (usize, &'a [f32])) -> Distance<'a> {
        Distance { factors: Some(factors), ..Distance::default() }
    }

    fn add(&mut self, values: &[f32], original: &[f32], columns: usize) {
        for (values, original) in values.chunks_exact(columns).zip(original.chunks_exact(columns)) {
            for (at, (value, original)) in values.iter().zip(original).enumerate() {
                let original = original * self.factors.map_or(1.0, |(_, factors)| factors[at]);
                self.difference += f64::from(value - original).powi(2);
                self.norm += f64::from(original).powi(2);
            }
        }
    }

    fn relative(&self) -> f64 {
        if self.difference == 0.0 { 0.0 } else { (self.difference / self.norm).sqrt() }
    }
}

impl Stored {
    fn decode(&self, module: &Module, tensors: &Tensors, first: u64, count: u64) -> Result<Vec<f32>, ExportError> {
        let (rows, columns) = (count as usize, module.columns as usize);
        let mut rounded = Rounded { global_scale: self.global_scale, ..Rounded::default() };
        for info in &self.parts {
            let Some(found) = module.tensor(tensors, info.suffix) else { continue };
            let (at, bytes) = info.range(first, count);
            let raw = tensors.read(found, at, bytes)?;
            match (info.part, self.layout.grid) {
                (Part::Codes, grid) => rounded.codes = pack::unpack_codes(info, grid, &raw, columns),
                (Part::Scale, _) => rounded.scales = pack::floats(info.dtype, &raw).unwrap_or_default(),
                (Part::ZeroPoint, Grid::Int { bits, .. }) => {
                    let across = self.layout.scale_shape(rows, columns)[1];
                    rounded.zero_points = pack::unpack_zero_points(&raw, rows, across, bits);
                }
                _ => {}
            }
        }
        Ok(self.layout.dequantize(&rounded, rows, columns))
    }
}

/// Modules that stand in one stack or are put into one, by a key.
pub(super) fn keys_of(module: &str) -> impl Iterator<Item = String> {
    let fused = names::fused_of(module).map(|(key, ..)| key);
    fused.into_iter().chain(names::experts_of(module).map(str::to_owned))
}
