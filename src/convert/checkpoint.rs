//! The tensors of a folder: one or many safetensors files, with or without an index over them.
//!
//! Headers are read through a map of the file, checked once, and then trusted. Data are read with positioned reads
//! into buffers of a few megabytes, so that memory does not grow with the model and a file that shrinks gives an
//! error.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};

use byteorder::{ByteOrder, LittleEndian};
use safetensors::tensor::{Dtype, Metadata as Header};
use serde_json::Value;

use super::ConvertError;
use super::files::{Folder, kind};
use crate::gguf::shown;

/// Largest header in bytes; the safetensors crate has the same limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Bytes before the header: its length.
const LENGTH_BYTES: u64 = 8;

const INDEX: &str = "model.safetensors.index.json";

/// The name of a checkpoint that is one file.
const WHOLE: &str = "model.safetensors";

/// Element types that can be converted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dense {
    F32,
    F16,
    BF16,
    F8E4M3,
}

impl Dense {
    pub(super) fn bytes(self) -> u64 {
        match self {
            Dense::F32 => 4,
            Dense::F16 | Dense::BF16 => 2,
            Dense::F8E4M3 => 1,
        }
    }
}

/// One tensor of a safetensors file.
#[derive(Debug, Clone)]
pub(super) struct SourceTensor {
    pub name: String,
    /// Dimensions, slowest first.
    pub shape: Vec<u64>,
    pub dtype: Dtype,
    pub shard: usize,
    /// First byte in the file.
    pub offset: u64,
    pub bytes: u64,
}

impl SourceTensor {
    /// Element type, if it is one that holds weights.
    pub(super) fn dense(&self) -> Option<Dense> {
        match self.dtype {
            Dtype::F32 => Some(Dense::F32),
            Dtype::F16 => Some(Dense::F16),
            Dtype::BF16 => Some(Dense::BF16),
            Dtype::F8_E4M3 => Some(Dense::F8E4M3),
            _ => None,
        }
    }

    pub(super) fn elements(&self) -> u64 {
        // A zero makes any other dimension possible.
        self.shape.iter().fold(1, |product: u64, dim| product.saturating_mul(*dim))
    }

    pub(super) fn shape_text(&self) -> String {
        shape_text(&self.shape)
    }
}

/// A shape for messages, as Python shows it.
pub(super) fn shape_text(shape: &[u64]) -> String {
    let dims: Vec<String> = shape.iter().map(u64::to_string).collect();
    format!("[{}]", dims.join(", "))
}

struct Shard {
    path: PathBuf,
    file: File,
}

/// All tensors of a folder.
pub(super) struct Checkpoint {
    shards: Vec<Shard>,
    /// In file order, then by name: the order in which the reference converter meets them.
    tensors: Vec<SourceTensor>,
    by_name: HashMap<String, usize>,
}

impl Checkpoint {
    pub(super) fn open(folder: &Folder, warnings: &mut Vec<String>) -> Result<Checkpoint, ConvertError> {
        let is_part = |name: &String| name.starts_with("model") && name.ends_with(".safetensors");
        let index = match read_index(folder) {
            // What transformers loads where both are there, whatever an earlier save left beside it.
            found if folder.has(WHOLE) => match Checkpoint::beside_index(folder, found, warnings)? {
                Source::Whole(checkpoint) => return Ok(checkpoint),
                Source::Index(index) => index,
            },
            found => found?,
        };
        let names: Vec<String> = match &index {
            Some(index) => index.files(),
            None => folder.names()?.into_iter().filter(is_part).collect(),
        };
        let is_shard = |name: &String| name.contains("-of-");
        if index.is_none() && names.iter().any(|name| name == WHOLE) && names.iter().any(is_shard) {
            warnings.push(format!("{WHOLE} is read, the shards beside it are not: no {INDEX} names them"));
            return Checkpoint::whole(folder);
        }
        if names.is_empty() {
            let problem = match folder.names()?.iter().any(|name| name.ends_with(".bin") || name.ends_with(".pth")) {
                true => "holds PyTorch files but no model*.safetensors; save the model as safetensors first",
                false => "holds no model*.safetensors; download the weights",
            };
            return Err(ConvertError::Folder { path: folder.path().to_path_buf(), problem: problem.to_owned() });
        }
        let mut checkpoint = Checkpoint { shards: Vec::new(), tensors: Vec::new(), by_name: HashMap::new() };
        for name in names {
            checkpoint.add_shard(&folder.file(&name))?;
        }
        if let Some(index) = &index {
            checkpoint.compare(index)?;
        }
        Ok(checkpoint)
    }

    /// Chooses between `model.safetensors`, which is there, and what an index names.
    fn beside_index(
        folder: &Folder,
        index: Result<Option<Index>, ConvertError>,
        warnings: &mut Vec<String>,
    ) -> Result<Source, ConvertError> {
        let index = match index {
            Ok(None) => return Ok(Source::Index(None)),
            Ok(Some(index)) => Some(index),
            Err(_) => None,
        };
        if let Some(index) = index {
            let files = index.files();
            let is_part = files.iter().any(|name| name == WHOLE);
            if is_part && files.len() > 1 {
                return Ok(Source::Index(Some(index)));
            }
            let complete = !is_part && files.iter().all(|name| folder.has(name));
            match Checkpoint::whole(folder) {
                Ok(whole) if whole.compare(&index).is_ok() => return Ok(Source::Whole(whole)),
                Ok(whole) if !complete || index.places.keys().all(|name| whole.find(name).is_some()) => {}
                Err(error) if !complete => return Err(error),
                _ => {
                    warnings.push(format!("{WHOLE} is not the whole model; the files that {INDEX} names are read"));
                    return Ok(Source::Index(Some(index)));
                }
            }
        }
        warnings.push(format!("{INDEX} does not belong to {WHOLE}; the whole file is read and the index ignored"));
        Ok(Source::Whole(Checkpoint::whole(folder)?))
    }

    /// The checkpoint that is one file.
    fn whole(folder: &Folder) -> Result<Checkpoint, ConvertError> {
        Checkpoint::open_file(&folder.file(WHOLE))
    }

    /// One file whose name does not matter; for tests of the header's checks as well.
    pub(super) fn open_file(path: &Path) -> Result<Checkpoint, ConvertError> {
        let mut checkpoint = Checkpoint { shards: Vec::new(), tensors: Vec::new(), by_name: HashMap::new() };
        checkpoint.add_shard(path)?;
        Ok(checkpoint)
    }

    pub(super) fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    pub(super) fn find(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// The file that holds a tensor.
    pub(super) fn file_of(&self, tensor: usize) -> &Path {
        &self.shards[self.tensors[tensor].shard].path
    }

    /// True if `path` is one of the files.
    pub(super) fn reads(&self, path: &Path) -> bool {
        self.shards.iter().any(|shard| crate::os::same_file(&shard.path, path))
    }

    /// Reads `buffer.len()` bytes of a tensor's data, from byte `at` of it.
    pub(super) fn read_at(&self, tensor: usize, at: u64, buffer: &mut [u8]) -> Result<(), ConvertError> {
        let SourceTensor { shard, offset, bytes, .. } = &self.tensors[tensor];
        debug_assert!(at + buffer.len() as u64 <= *bytes);
        let shard = &self.shards[*shard];
        crate::os::read_exact_at(&shard.file, buffer, offset + at)
            .map_err(|source| ConvertError::Read { file: shard.path.clone(), source })
    }

    fn add_shard(&mut self, path: &Path) -> Result<(), ConvertError> {
        let failed = |source| ConvertError::Read { file: path.to_path_buf(), source };
        if !path.is_file() {
            let problem = format!("is missing; {INDEX} names it, download it");
            return Err(ConvertError::Shard { file: path.to_path_buf(), problem });
        }
        let file = File::open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        // SAFETY: only the header is touched, here; a file that others shorten meanwhile raises SIGBUS, which the
        // program turns into an error. Nothing is written through the map.
        let map = (length > 0).then(|| unsafe { memmap2::Mmap::map(&file) }).transpose().map_err(failed)?;
        let (data_start, header) = parse_header(path, map.as_deref().unwrap_or_default())?;
        let shard = self.shards.len();
        let mut tensors: Vec<SourceTensor> = header
            .tensors()
            .into_iter()
            .map(|(name, info)| SourceTensor {
                name,
                shape: info.shape.iter().map(|dim| *dim as u64).collect(),
                dtype: info.dtype,
                shard,
                offset: data_start + info.data_offsets.0 as u64,
                bytes: (info.data_offsets.1 - info.data_offsets.0) as u64,
            })
            .collect();
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        self.shards.push(Shard { path: path.to_path_buf(), file });
        for tensor in tensors {
            if let Some(first) = self.by_name.insert(tensor.name.clone(), self.tensors.len()) {
                return Err(ConvertError::Tensor {
                    file: path.to_path_buf(),
                    tensor: shown(tensor.name.as_bytes()),
                    problem: format!("is also in {}; keep the files of one model only", self.file_of(first).display()),
                });
            }
            self.tensors.push(tensor);
        }
        Ok(())
    }

    /// The index and the files must name the same tensors.
    fn compare(&self, index: &Index) -> Result<(), ConvertError> {
        for (name, file) in &index.places {
            let wrong = |problem: String| ConvertError::Tensor {
                file: index.path.clone(),
                tensor: shown(name.as_bytes()),
                problem,
            };
            match self.find(name) {
                None => return Err(wrong(format!("should be in {file}, which lacks it; download that file again"))),
                Some(found) if !self.file_of(found).ends_with(file) => {
                    let holder = self.file_of(found).display();
                    return Err(wrong(format!("should be in {file} but is in {holder}; download both again")));
                }
                Some(_) => {}
            }
        }
        match self.tensors.iter().find(|tensor| !index.places.contains_key(&tensor.name)) {
            None => Ok(()),
            Some(extra) => Err(ConvertError::Tensor {
                file: self.shards[extra.shard].path.clone(),
                tensor: shown(extra.name.as_bytes()),
                problem: format!("is not listed in {INDEX}; the files are of different models"),
            }),
        }
    }
}

/// What is read of a folder that holds `model.safetensors`.
enum Source {
    Whole(Checkpoint),
    /// What the index names, or every part where there is none.
    Index(Option<Index>),
}

/// `model.safetensors.index.json`.
struct Index {
    path: PathBuf,
    /// File of each tensor.
    places: BTreeMap<String, String>,
}

impl Index {
    fn files(&self) -> Vec<String> {
        let mut files: Vec<String> = self.places.values().cloned().collect();
        files.sort();
        files.dedup();
        files
    }
}

fn read_index(folder: &Folder) -> Result<Option<Index>, ConvertError> {
    let Some(index) = folder.object(INDEX)? else { return Ok(None) };
    let path = folder.file(INDEX);
    let wrong = |field: String, problem: String| Err(ConvertError::Field { file: folder.file(INDEX), field, problem });
    let Some(Value::Object(map)) = index.get("weight_map") else {
        let found = index.get("weight_map").map_or_else(|| "missing".to_owned(), kind);
        return wrong("weight_map".into(), format!("is {found}, expected the file of each tensor"));
    };
    let mut places = BTreeMap::new();
    for (tensor, file) in map {
        let plain = |name: &str| !name.is_empty() && !name.contains(['/', '\\', '\0']) && name != "..";
        match file.as_str() {
            Some(name) if plain(name) => places.insert(tensor.clone(), name.to_owned()),
            _ => {
                let field = format!("weight_map[{}]", shown(tensor.as_bytes()));
                return wrong(field, format!("is {}, expected a file name in this folder", kind(file)));
            }
        };
    }
    Ok(Some(Index { path, places }))
}

/// Parses and checks a safetensors header; gives the first byte of the data as well.
pub(super) fn parse_header(path: &Path, bytes: &[u8]) -> Result<(u64, Header), ConvertError> {
    let wrong = |problem: String| ConvertError::Shard { file: path.to_path_buf(), problem };
    let total = bytes.len() as u64;
    let Some(length) = bytes.get(..LENGTH_BYTES as usize).map(LittleEndian::read_u64) else {
        return Err(wrong(format!("has {total} bytes and no safetensors header; download it again")));
    };
    if bytes.starts_with(b"version https://git-lfs") {
        return Err(wrong("is a Git LFS pointer, not the weights; run git lfs pull".to_owned()));
    }
    if length > MAX_HEADER_BYTES {
        let limit = MAX_HEADER_BYTES / 1_000_000;
        return Err(wrong(format!(
            "says its header has {length} bytes, at most {limit} MB are allowed; no safetensors"
        )));
    }
    let data_start = LENGTH_BYTES + length;
    let Some(json) = bytes.get(LENGTH_BYTES as usize..data_start as usize) else {
        return Err(wrong(format!("is cut inside its header ({total} of {data_start} bytes); download it again")));
    };
    let header: Header = serde_json::from_slice(json).map_err(|e| {
        let problem = damaged_entry(json).unwrap_or_else(|| {
            let text: String = e.to_string().chars().filter(|c| !c.is_control()).take(200).collect();
            format!("header is damaged: {text}")
        });
        wrong(format!("{problem}; download it again"))
    })?;
    let data_bytes = header.data_len() as u64;
    match data_start.checked_add(data_bytes) {
        Some(end) if end == total => Ok((data_start, header)),
        Some(end) if end < total => {
            Err(wrong(format!("has {} bytes behind its last tensor; download it again", total - end)))
        }
        _ => Err(wrong(format!(
            "is cut: {} of {data_bytes} bytes of tensor data are there; download it again",
            total - data_start
        ))),
    }
}

/// The tensor that makes a header invalid, which the safetensors crate does not always name.
fn damaged_entry(json: &[u8]) -> Option<String> {
    let header: serde_json::Map<String, Value> = serde_json::from_slice(json).ok()?;
    let mut entries = Vec::new();
    for (name, entry) in header.iter().filter(|(name, _)| *name != "__metadata__") {
        let named = |problem: String| Some(format!("tensor {} {problem}", shown(name.as_bytes())));
        let Ok(dtype) = serde_json::from_value::<Dtype>(entry.get("dtype").cloned().unwrap_or_default()) else {
            return named(format!("has dtype {}", entry.get("dtype").map_or("missing".into(), kind)));
        };
        let Ok(shape) = serde_json::from_value::<Vec<u64>>(entry.get("shape").cloned().unwrap_or_default()) else {
            return named("has no valid shape".into());
        };
        let Ok([first, end]) =
            serde_json::from_value::<[u64; 2]>(entry.get("data_offsets").cloned().unwrap_or_default())
        else {
            return named("has no valid data_offsets".into());
        };
        let bits = shape.iter().try_fold(dtype.bitsize() as u64, |product, dim| product.checked_mul(*dim));
        if bits.is_none_or(|bits| end.checked_sub(first) != Some(bits.div_ceil(8))) {
            return named(format!("of shape {} has data_offsets {first} to {end}", shape_text(&shape)));
        }
        entries.push((first, end, name));
    }
    entries.sort();
    let mut expected = 0;
    for (first, end, name) in entries {
        if first != expected {
            let name = shown(name.as_bytes());
            return Some(format!("tensor {name} begins at byte {first} of the data, expected {expected}"));
        }
        expected = end;
    }
    None
}
