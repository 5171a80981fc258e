//! Tensors of a model for other programs: safetensors, or NumPy's .npy.

use std::path::{Path, PathBuf};

use regex::Regex;
use safetensors::tensor::Dtype;
use serde::Serialize;

use super::copy::refuse_source;
use super::{FilesError, npy};
use crate::atomic_file::{AtomicFile, Replace, check_target};
use crate::display::printable;
use crate::export::pack::dtype_bytes;
use crate::export::shards::{NewTensor, lay_out};
use crate::gguf::{Gguf, TensorInfo, TensorType};
use crate::os;
use crate::progress::{Interrupted, Unit, Watch};
use crate::quant;
use crate::rows;
use crate::workers::cut;

/// Weights that are decoded at a time.
const PIECE_WEIGHTS: u64 = 1 << 20;

/// The one name that no tensor of a safetensors file can have.
const SAFETENSORS_METADATA: &str = "__metadata__";

/// What floats become. Integers and F64 always stay as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Numbers {
    /// All are decoded to F32.
    #[default]
    F32,
    /// F16 and BF16 stay; block types, which no other program knows, become F32.
    Kept,
}

/// Tensors chosen by their names, to be written for other programs.
pub struct Extraction<'a> {
    gguf: &'a Gguf,
    tensors: Vec<(&'a TensorInfo, Dtype)>,
}

/// A tensor that is written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Extracted {
    /// Its name.
    pub name: String,
    /// ggml's name of its type in the model.
    pub source_type: String,
    /// Type in the file, as safetensors names it.
    #[serde(rename = "type")]
    pub ty: String,
    /// Dimensions as other programs have them, slowest first.
    pub shape: Vec<u64>,
    /// The file.
    #[serde(serialize_with = "super::path_as_text")]
    pub file: PathBuf,
}

/// A form of output.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// All in one file.
    Safetensors,
    /// One tensor.
    Npy,
    /// A .npy file for each.
    Folder,
}

impl Form {
    /// By the name of the output.
    fn of(output: &Path) -> Form {
        let ends = |with: &str| output.extension().is_some_and(|extension| extension.eq_ignore_ascii_case(with));
        match (ends("safetensors"), ends("npy")) {
            (true, _) => Form::Safetensors,
            (_, true) => Form::Npy,
            _ => Form::Folder,
        }
    }
}

impl<'a> Extraction<'a> {
    /// Chooses all tensors whose names match one of `patterns` somewhere; all tensors if there are none.
    ///
    /// # Errors
    /// If a pattern matches nothing, or a tensor is of a type that cannot be decoded.
    pub fn new(gguf: &'a Gguf, patterns: &[Regex], numbers: Numbers) -> Result<Self, FilesError> {
        let refused = |problem: String| FilesError::refused(gguf.label(), problem);
        let matches = |pattern: &Regex| gguf.tensors().iter().any(|tensor| pattern.is_match(&tensor.name));
        if let Some(pattern) = patterns.iter().find(|pattern| !matches(pattern)) {
            let pattern = printable(pattern.as_str());
            return Err(refused(format!("no tensor's name matches {pattern:?}; lwq inspect --tensors lists them")));
        }
        let chosen =
            |tensor: &&TensorInfo| patterns.is_empty() || patterns.iter().any(|pattern| pattern.is_match(&tensor.name));
        let tensors = gguf.tensors().iter().filter(chosen).map(|tensor| {
            let problem =
                || refused(format!("tensor {} is of type {}, which is not decoded", tensor.shown_name(), tensor.ty));
            Ok((tensor, written_type(tensor.ty, numbers).ok_or_else(problem)?))
        });
        let tensors = tensors.collect::<Result<Vec<_>, FilesError>>()?;
        if tensors.is_empty() {
            return Err(refused("has no tensors".to_owned()));
        }
        Ok(Extraction { gguf, tensors })
    }

    /// What [`Self::write`] to `output` makes.
    ///
    /// # Errors
    /// If the tensors cannot be written in the form that the output's name asks for: several in one .npy file, bfloat16
    /// for NumPy, or a name that cannot be that of a file.
    pub fn report(&self, output: &Path) -> Result<Vec<Extracted>, FilesError> {
        let form = Form::of(output);
        let refused = |problem: String| FilesError::refused(&output.display().to_string(), problem);
        if form == Form::Npy && self.tensors.len() > 1 {
            let count = self.tensors.len();
            return Err(refused(format!("a .npy file has one tensor, {count} match; give a folder or .safetensors")));
        }
        self.tensors
            .iter()
            .map(|&(tensor, dtype)| {
                let name = tensor.shown_name();
                if form != Form::Safetensors && npy::header(dtype, &[]).is_none() {
                    let advice = "write it as F32, or to a .safetensors file";
                    return Err(refused(format!("NumPy has no {dtype:?}, the type of tensor {name}; {advice}")));
                }
                if form == Form::Safetensors && tensor.name == SAFETENSORS_METADATA {
                    return Err(refused(format!("safetensors keeps the name {name} for itself; write a .npy file")));
                }
                if form == Form::Folder && !is_file_name(&tensor.name) {
                    let problem =
                        format!("the name of tensor {name} cannot be that of a file; write to a .safetensors file");
                    return Err(refused(problem));
                }
                Ok(Extracted {
                    name: tensor.name.clone(),
                    source_type: tensor.ty.to_string(),
                    ty: serde_json::to_value(dtype)
                        .ok()
                        .and_then(|ty| Some(ty.as_str()?.to_owned()))
                        .unwrap_or_default(),
                    shape: slowest_first(tensor),
                    file: match form {
                        Form::Folder => output.join(format!("{}.npy", tensor.name)),
                        _ => output.to_owned(),
                    },
                })
            })
            .collect()
    }

    /// Writes the tensors: to one `.safetensors` file, to one `.npy` file, or, with any other name, as a `.npy` file each in a
    /// folder, which is made. A file has its name when it is complete.
    ///
    /// # Errors
    /// As [`Self::report`]; if an output exists and may not be replaced or cannot be written, the source cannot be read or
    /// decoded, or `watch` stops the run.
    pub fn write(&self, output: &Path, replace: Replace, watch: &dyn Watch) -> Result<Vec<Extracted>, FilesError> {
        let rows = self.report(output)?;
        let form = Form::of(output);
        if form == Form::Folder {
            std::fs::create_dir_all(output).map_err(|source| FilesError::Write { file: output.to_owned(), source })?;
        }
        for row in &rows {
            refuse_source(self.gguf, &row.file)?;
            check_target(&row.file, replace.is_allowed())?;
        }
        watch.begin("extracting", self.tensors.iter().filter_map(|(tensor, _)| tensor.bytes).sum(), Unit::Bytes);
        let stop = watch.abandon();
        match form {
            Form::Safetensors => {
                let items = rows.iter().zip(&self.tensors).map(|(row, &(tensor, dtype))| NewTensor {
                    name: row.name.clone(),
                    dtype,
                    shape: row.shape.clone(),
                    bytes: tensor.elements() * dtype_bytes(dtype),
                });
                let laid_out = lay_out(&[items.collect()], u64::MAX);
                let file = begin(output, replace, &laid_out.files[0].header, laid_out.files[0].bytes)?;
                for (&(tensor, dtype), place) in self.tensors.iter().zip(&laid_out.places) {
                    self.write_tensor(tensor, dtype, (&file, place.offset), watch)?;
                    stop.check()?;
                }
                file.commit()?;
            }
            Form::Npy | Form::Folder => {
                for (&(tensor, dtype), row) in self.tensors.iter().zip(&rows) {
                    let header = npy::header(dtype, &row.shape).unwrap_or_default();
                    let bytes = header.len() as u64 + tensor.elements() * dtype_bytes(dtype);
                    let file = begin(&row.file, replace, &header, bytes)?;
                    self.write_tensor(tensor, dtype, (&file, header.len() as u64), watch)?;
                    stop.check()?;
                    file.commit()?;
                }
            }
        }
        if stop.end() {
            return Err(Interrupted.into());
        }
        watch.end();
        Ok(rows)
    }

    /// Writes a tensor to its place in a file.
    fn write_tensor(
        &self,
        tensor: &TensorInfo,
        dtype: Dtype,
        (file, offset): (&AtomicFile, u64),
        watch: &dyn Watch,
    ) -> Result<(), FilesError> {
        let row_len = tensor.row_len();
        if row_len == 0 {
            return Ok(());
        }
        let (mut data, mut weights) = (Vec::new(), Vec::new());
        let row_bytes = row_len * dtype_bytes(dtype);
        for rows in cut(tensor.rows(), (PIECE_WEIGHTS / row_len).max(1)) {
            let count = rows.end - rows.start;
            let stored = self.gguf.load_rows(tensor, rows.start, count, &mut data)?;
            let read = stored.len() as u64;
            let at = offset + rows.start * row_bytes;
            let decoded;
            let piece = match stored_type(tensor.ty) == Some(dtype) {
                true => stored,
                false => {
                    weights.resize((count * row_len) as usize, 0.0);
                    let failed = |source| FilesError::Rows { file: printable(self.gguf.label()), source };
                    rows::decode_any(tensor, stored, &mut weights).map_err(failed)?;
                    decoded = weights.iter().flat_map(|weight| weight.to_le_bytes()).collect::<Vec<u8>>();
                    &decoded
                }
            };
            os::write_all_at(file.file(), piece, at)
                .map_err(|source| FilesError::Write { file: file.target().to_owned(), source })?;
            watch.advance(read, &tensor.name);
        }
        Ok(())
    }
}

/// A file with its header, and place for `bytes` in all.
fn begin(path: &Path, replace: Replace, header: &[u8], bytes: u64) -> Result<AtomicFile, FilesError> {
    let file = AtomicFile::create(path, replace.is_allowed())?;
    file.reserve(bytes)?;
    os::write_all_at(file.file(), header, 0).map_err(|source| FilesError::Write { file: path.to_owned(), source })?;
    Ok(file)
}

/// Dimensions as all but ggml order them.
fn slowest_first(tensor: &TensorInfo) -> Vec<u64> {
    tensor.shape.iter().rev().copied().collect()
}

/// The type of the same numbers elsewhere; `None` for block types and unknown ones.
fn stored_type(ty: TensorType) -> Option<Dtype> {
    Some(match ty {
        TensorType::F32 => Dtype::F32,
        TensorType::F16 => Dtype::F16,
        TensorType::BF16 => Dtype::BF16,
        TensorType::F64 => Dtype::F64,
        TensorType::I8 => Dtype::I8,
        TensorType::I16 => Dtype::I16,
        TensorType::I32 => Dtype::I32,
        TensorType::I64 => Dtype::I64,
        _ => return None,
    })
}

/// The type that a tensor is written in, `None` if it cannot be decoded.
fn written_type(ty: TensorType, numbers: Numbers) -> Option<Dtype> {
    match stored_type(ty) {
        Some(half @ (Dtype::F16 | Dtype::BF16)) => Some(if numbers == Numbers::Kept { half } else { Dtype::F32 }),
        Some(stored) => Some(stored),
        None => quant::codec(ty).map(|_| Dtype::F32),
    }
}

/// True for names that are one plain part of a path on every system.
fn is_file_name(name: &str) -> bool {
    const LONGEST: usize = 200;
    let inside = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    !name.is_empty() && name.len() <= LONGEST && !name.starts_with(['.', '-']) && name.chars().all(inside)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::testing::RawGguf;

    fn model() -> Gguf {
        let halves = [0.5f32, -1.0].map(|v| half::bf16::from_f32(v).to_le_bytes());
        let file = RawGguf::new().f32_tensor("a", &[3, 2], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        let file = file.tensor("b", &[2], TensorType::BF16, halves.as_flattened());
        let file = file.tensor("../c", &[1], TensorType::I64, &7i64.to_le_bytes());
        Gguf::from_bytes(file.tensor("d", &[32], TensorType::Q8_1, &[0; 36]).build()).unwrap()
    }

    fn patterns(patterns: &[&str]) -> Vec<Regex> {
        patterns.iter().map(|pattern| Regex::new(pattern).unwrap()).collect()
    }

    #[test]
    fn a_safetensors_file_holds_what_the_tensors_hold() {
        let dir = tempfile::tempdir().unwrap();
        let gguf = model();
        let path = dir.path().join("out.safetensors");
        let written = Extraction::new(&gguf, &patterns(&["^a$", "b", "c"]), Numbers::Kept).unwrap();
        let rows = written.write(&path, Replace::No, &()).unwrap();
        assert_eq!(rows.iter().map(|row| row.ty.as_str()).collect::<Vec<_>>(), ["F32", "BF16", "I64"]);
        let bytes = std::fs::read(&path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.tensor("a").unwrap().shape(), [2, 3]);
        assert_eq!(file.tensor("a").unwrap().data(), &*gguf.tensor_data(gguf.tensor("a").unwrap()).unwrap());
        assert_eq!(file.tensor("b").unwrap().data(), &*gguf.tensor_data(gguf.tensor("b").unwrap()).unwrap());
        assert_eq!(file.tensor("../c").unwrap().data(), 7i64.to_le_bytes());
    }

    #[test]
    fn what_an_output_cannot_hold_is_refused() {
        let gguf = model();
        let refused = |names: &[&str], numbers, output: &str| {
            let made = Extraction::new(&gguf, &patterns(names), numbers).and_then(|e| e.report(Path::new(output)));
            made.map(drop).unwrap_err().to_string()
        };
        assert!(refused(&["^a$", "b"], Numbers::F32, "x.npy").contains("has one tensor, 2 match"));
        assert!(refused(&["b"], Numbers::Kept, "x.npy").contains("NumPy has no BF16"));
        assert!(refused(&["c"], Numbers::F32, "folder").contains("cannot be that of a file"));
        assert!(refused(&["d"], Numbers::F32, "x.npy").contains("is of type q8_1, which is not decoded"));
        assert!(refused(&["a", "zzz"], Numbers::F32, "x.npy").contains("no tensor's name matches \"zzz\""));
    }
}
