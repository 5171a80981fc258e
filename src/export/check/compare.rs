//! The folder beside the one that it was made from.

use std::collections::{BTreeMap, BTreeSet};

use super::modules::Module;
use super::tensors::Tensors;
use crate::convert::source::{Matrix, ModelFolder, ReadBuffers};
use crate::export::ExportError;
use crate::export::names;
use crate::workers;

/// Bytes that are compared at a time.
const BYTES: u64 = 8 << 20;

/// The source of a folder.
pub(super) struct Source<'a> {
    folder: &'a ModelFolder,
    /// Of quantized modules.
    matrices: BTreeMap<String, Matrix>,
    /// Weights that are stored as values in both.
    stored: Vec<(usize, String)>,
}

impl<'a> Source<'a> {
    /// A quantized module that is further away from its source holds other weights. Two bits lose less.
    pub(super) const LARGEST_ERROR: f64 = 0.5;

    /// Pairs the tensors of both; names and shapes that do not correspond are faults.
    pub(super) fn new(
        folder: &'a ModelFolder,
        tensors: &Tensors,
        modules: &[Module],
        faults: &mut Vec<String>,
    ) -> Result<Source<'a>, ExportError> {
        let quantized: BTreeMap<&str, &Module> = modules.iter().map(|module| (module.name.as_str(), module)).collect();
        let mut source = Source { folder, matrices: BTreeMap::new(), stored: Vec::new() };
        let mut seen: BTreeSet<String> = BTreeSet::new();
        for weight in 0..folder.len() {
            let name = folder.name(weight);
            let module = names::module_of(name).unwrap_or(name);
            if quantized.contains_key(module)
                && let Some(matrix) = folder.matrix(weight)
            {
                source.matrices.insert(module.to_owned(), matrix);
                continue;
            }
            if let Some(found) = tensors.get(name) {
                seen.insert(name.to_owned());
                if found.info.shape != folder.shape(weight) {
                    let (found, expected) = (&found.info.shape, folder.shape(weight));
                    faults.push(format!("{name}: has shape {found:?}, in the source {expected:?}"));
                } else if folder.stored_type(weight).is_some() {
                    source.stored.push((weight, name.to_owned()));
                }
                continue;
            }
            let Some(experts) = folder.experts(weight) else {
                faults.push(format!("{name}: is in the source, but not here"));
                continue;
            };
            for expert in experts {
                let plain = format!("{}.weight", expert.module);
                if quantized.contains_key(expert.module.as_str()) {
                    source.matrices.insert(expert.module, expert.matrix);
                } else if tensors.get(&plain).is_some() {
                    seen.insert(plain);
                } else {
                    faults.push(format!("{plain}: is in the source, but not here"));
                }
            }
        }
        for module in modules.iter().filter(|module| module.stored.is_some()) {
            match source.matrices.get(&module.name) {
                None => faults.push(format!("{}: is not in the source", module.name)),
                Some(matrix) if [matrix.rows, matrix.columns] != [module.rows, module.columns] => {
                    let (found, expected) = ([module.rows, module.columns], [matrix.rows, matrix.columns]);
                    faults.push(format!("{}: has shape {found:?}, in the source {expected:?}", module.name));
                    source.matrices.remove(&module.name);
                }
                Some(_) => {}
            }
        }
        let belongs = |name: &str| {
            let module = names::module_of(name).unwrap_or(name);
            seen.contains(name)
                || quantized.contains_key(module)
                || modules.iter().any(|module| {
                    name.strip_prefix(module.name.as_str()).is_some_and(|rest| rest.starts_with(".weight_"))
                })
        };
        for name in tensors.by_name.keys().filter(|name| !belongs(name)) {
            faults.push(format!("{name}: is not in the source"));
        }
        Ok(source)
    }

    /// The matrix that a module was made from.
    pub(super) fn matrix(&self, module: &str) -> Option<&Matrix> {
        self.matrices.get(module)
    }

    pub(super) fn read(
        &self,
        matrix: &Matrix,
        first: u64,
        count: u64,
        values: &mut Vec<f32>,
    ) -> Result<(), ExportError> {
        Ok(self.folder.read_rows(matrix, first, count, &mut ReadBuffers::default(), values)?)
    }

    /// Tensors that were not quantized must be those of the source, byte for byte.
    pub(super) fn compare_stored(&self, tensors: &Tensors, faults: &mut Vec<String>) -> Result<(), ExportError> {
        for (weight, name) in &self.stored {
            let Some(found) = tensors.get(name) else { continue };
            let ours = self.folder.stored_type(*weight);
            if ours != Some(found.info.dtype) {
                faults.push(format!("{name}: has dtype {:?}, in the source {ours:?}", found.info.dtype));
                continue;
            }
            for range in workers::cut(found.info.bytes, BYTES) {
                let mut original = vec![0; (range.end - range.start) as usize];
                self.folder.read_stored(*weight, range.start, &mut original)?;
                if tensors.read(found, range.start, range.end - range.start)? != original {
                    faults.push(format!("{name}: is not quantized, but differs from the source"));
                    break;
                }
            }
        }
        Ok(())
    }
}
