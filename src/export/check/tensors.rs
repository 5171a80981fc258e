//! The safetensors files of a folder and the index over them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value};

use super::CheckReport;
use crate::convert::source::{FileTensor, TensorFile};
use crate::export::ExportError;

const INDEX: &str = "model.safetensors.index.json";
const WHOLE: &str = "model.safetensors";

/// A tensor and where it is.
pub(super) struct Found {
    pub(super) info: FileTensor,
    file: usize,
    place: usize,
}

/// What the index says.
struct Index {
    /// File by tensor.
    places: BTreeMap<String, String>,
    total_size: Option<Value>,
}

/// All tensors by name.
pub(super) struct Tensors {
    files: Vec<TensorFile>,
    pub(super) by_name: BTreeMap<String, Found>,
}

impl Tensors {
    /// Opens what a loader would open.
    pub(super) fn open(folder: &Path, report: &mut CheckReport) -> Tensors {
        let mut tensors = Tensors { files: Vec::new(), by_name: BTreeMap::new() };
        let index = read_index(folder, &mut report.faults);
        let names: BTreeSet<String> = match &index {
            Some(index) => index.places.values().cloned().collect(),
            None => BTreeSet::from([WHOLE.to_owned()]),
        };
        if index.is_some() && folder.join(WHOLE).is_file() && !names.contains(WHOLE) {
            report.faults.push(format!("{WHOLE}: lies beside {INDEX}, and loaders take it; remove one of them"));
        }
        for name in names {
            let path = folder.join(&name);
            if !path.is_file() {
                let by = if index.is_some() { format!("; {INDEX} names it") } else { String::new() };
                report.faults.push(format!("{name}: is missing{by}"));
                continue;
            }
            match TensorFile::open(&path) {
                Ok(file) => tensors.add(&name, file, index.as_ref(), &mut report.faults),
                Err(error) => {
                    let line = error.to_string();
                    let prefix = format!("{}/", folder.display());
                    report.faults.push(line.strip_prefix(&prefix).unwrap_or(&line).to_owned());
                }
            }
        }
        if let Some(index) = &index {
            tensors.check_total(index, &mut report.faults);
        }
        for (tensor, file) in index.iter().flat_map(|index| &index.places) {
            if !tensors.by_name.contains_key(tensor) {
                report.faults.push(format!("{tensor}: {INDEX} says that it is in {file}, which lacks it"));
            }
        }
        tensors
    }

    fn add(&mut self, name: &str, file: TensorFile, index: Option<&Index>, faults: &mut Vec<String>) {
        let number = self.files.len();
        for (place, info) in file.tensors().enumerate() {
            let tensor = info.name.clone();
            match index.map(|index| index.places.get(&tensor)) {
                Some(None) => faults.push(format!("{tensor}: is in {name}, but {INDEX} does not list it")),
                Some(Some(other)) if other != name => {
                    faults.push(format!("{tensor}: is in {name}, but {INDEX} says {other}"));
                }
                _ => {}
            }
            if self.by_name.insert(tensor.clone(), Found { info, file: number, place }).is_some() {
                faults.push(format!("{tensor}: is in two files"));
            }
        }
        self.files.push(file);
    }

    /// The index may say how many bytes all tensors have.
    fn check_total(&self, index: &Index, faults: &mut Vec<String>) {
        let bytes: u64 = self.by_name.values().map(|found| found.info.bytes).sum();
        let is_whole = index.places.keys().all(|tensor| self.by_name.contains_key(tensor));
        if let Some(said) = index.total_size.as_ref().filter(|said| is_whole && said.as_u64() != Some(bytes)) {
            faults.push(format!("{INDEX}: metadata.total_size is {said}, but the tensors have {bytes} bytes"));
        }
    }

    pub(super) fn get(&self, name: &str) -> Option<&Found> {
        self.by_name.get(name)
    }

    /// Bytes of a tensor from byte `at` of it.
    pub(super) fn read(&self, found: &Found, at: u64, bytes: u64) -> Result<Vec<u8>, ExportError> {
        let mut buffer = vec![0; bytes as usize];
        self.files[found.file].read(found.place, at, &mut buffer)?;
        Ok(buffer)
    }
}

fn read_index(folder: &Path, faults: &mut Vec<String>) -> Option<Index> {
    let text = std::fs::read(folder.join(INDEX)).ok()?;
    let index: Map<String, Value> = match serde_json::from_slice(&text) {
        Ok(index) => index,
        Err(error) => {
            faults.push(format!("{INDEX}: is no JSON object: {error}"));
            return None;
        }
    };
    let Some(Value::Object(map)) = index.get("weight_map") else {
        faults.push(format!("{INDEX}: has no weight_map"));
        return None;
    };
    let mut places = BTreeMap::new();
    for (tensor, file) in map {
        match file.as_str() {
            Some(file) if !file.contains(['/', '\\', '\0']) && !file.is_empty() && file != ".." => {
                places.insert(tensor.clone(), file.to_owned());
            }
            _ => faults.push(format!("{tensor}: {INDEX} gives no file name for it")),
        }
    }
    let total_size = index.get("metadata").and_then(|metadata| metadata.get("total_size")).cloned();
    Some(Index { places, total_size })
}
