//! The folder beside the one that it was made from.

use std::collections::{BTreeMap, BTreeSet};

use super::modules::Module;
use super::tensors::Tensors;
use crate::convert::source::{Matrix, ModelFolder, ReadBuffers};
use crate::export::ExportError;
use crate::export::{names, pack};
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
    /// Norms that are the source's divided by powers of two.
    divided: Vec<Divided>,
}

/// A norm that has taken up factors of matrices behind it.
struct Divided {
    name: String,
    layer: Option<u64>,
    factors: Vec<f32>,
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
        let (matrices, stored, divided) = (BTreeMap::new(), Vec::new(), Vec::new());
        let mut source = Source { folder, matrices, stored, divided };
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
        source.divided = source.find_divided(tensors)?;
        Ok(source)
    }

    /// Vectors that differ from the source's by powers of two.
    fn find_divided(&self, tensors: &Tensors) -> Result<Vec<Divided>, ExportError> {
        let mut divided = Vec::new();
        for (weight, name) in &self.stored {
            let Some(found) = tensors.get(name) else { continue };
            let is_vector = found.info.shape.len() == 1 && found.info.bytes <= BYTES;
            if !is_vector || self.folder.stored_type(*weight) != Some(found.info.dtype) {
                continue;
            }
            let mut original = vec![0; found.info.bytes as usize];
            self.folder.read_stored(*weight, 0, &mut original)?;
            let here = tensors.read(found, 0, found.info.bytes)?;
            if here == original {
                continue;
            }
            let [original, here] = [&original, &here].map(|raw| pack::floats(found.info.dtype, raw));
            if let Some(factors) = original.zip(here).and_then(|(original, here)| factors(&original, &here)) {
                divided.push(Divided { name: name.clone(), layer: names::layer_of(name), factors });
            }
        }
        Ok(divided)
    }

    /// What the columns of a module may have been multiplied with: a number and the factors.
    pub(super) fn factors_of(&self, module: &str, columns: u64) -> impl Iterator<Item = (usize, &[f32])> {
        let layer = names::layer_of(module);
        let fits = move |(_, norm): &(usize, &Divided)| norm.layer == layer && norm.factors.len() as u64 == columns;
        self.divided.iter().enumerate().filter(fits).map(|(at, norm)| (at, norm.factors.as_slice()))
    }

    /// A norm that was divided needs matrices that were multiplied, and those that loaders put into one alike. `taken` is what
    /// [`Self::factors_of`] each module was nearest to its source with.
    pub(super) fn compare_factors(&self, taken: &BTreeMap<String, Option<usize>>, faults: &mut Vec<String>) {
        let mut told = BTreeSet::new();
        for (at, norm) in self.divided.iter().enumerate() {
            let mut with =
                taken.iter().filter(|(_, factors)| **factors == Some(at)).map(|(module, _)| module).peekable();
            if with.peek().is_none() {
                faults.push(format!("{}: is not quantized, but differs from the source", norm.name));
            }
            for module in with {
                let Some((key, ..)) = names::fused_of(module) else { continue };
                let other = taken.iter().find(|(other, factors)| {
                    **factors != Some(at) && names::fused_of(other).is_some_and(|(found, ..)| found == key)
                });
                if let Some((other, _)) = other.filter(|(other, _)| told.insert(other.as_str())) {
                    faults.push(format!("{other}: lacks the factors of {}, which {module} has", norm.name));
                }
            }
        }
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
            if self.divided.iter().any(|norm| norm.name == *name) {
                continue;
            }
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

/// By which powers of two `here` is smaller than `original`, if nothing else tells them apart.
fn factors(original: &[f32], here: &[f32]) -> Option<Vec<f32>> {
    let factor = |(original, here): (&f32, &f32)| {
        let factor = if original == here { 1.0 } else { original / here };
        let is_power = factor.is_normal() && factor > 0.0 && factor.to_bits() & 0x007f_ffff == 0;
        is_power.then_some(factor)
    };
    original.iter().zip(here).map(factor).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_are_powers_of_two() {
        assert_eq!(factors(&[3.0, 0.0, 1.0], &[1.5, 0.0, 4.0]), Some(vec![2.0, 1.0, 0.25]));
        for (original, here) in [(3.0, 1.0), (1.0, -0.5), (0.0, 1.0), (1.0, 0.0), (f32::NAN, 1.0)] {
            assert_eq!(factors(&[original], &[here]), None, "{original} {here}");
        }
    }
}
