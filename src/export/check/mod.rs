//! A loader of its own for folders in compressed-tensors form: it names every fault that the loaders of transformers and vLLM
//! trip over, and those that they let pass.
//!
//! Structure first (files, index, configuration), then each quantized module: its tensors, their shapes, finite scales and
//! codes. With the source folder at hand every tensor is compared with the one that it was made from.

mod compare;
mod fused;
mod groups;
mod holes;
mod modules;
mod tensors;

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value};

use super::ExportError;
use crate::convert::source::ModelFolder;
use crate::progress::{Interrupted, Unit, Watch};
use crate::workers;

use compare::Source;
use groups::Scheme;
use modules::Module;
use tensors::Tensors;

/// A module that was read.
#[derive(Clone, Debug, Serialize, PartialEq)]
pub struct CheckedTensor {
    /// The module's name, without `.weight`.
    pub name: String,
    /// `format` of its group.
    pub format: &'static str,
    /// Rows and columns.
    pub shape: [u64; 2],
    /// SHA-256, in hexadecimal, of the values as little-endian 32-bit floats, row by row.
    pub values_sha256: String,
    /// Length of the difference to the source, over the length of the source's weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub relative_error: Option<f64>,
}

/// What was found in a folder.
#[derive(Clone, Debug, Default, Serialize, PartialEq)]
pub struct CheckReport {
    /// What loaders refuse, or load as something else than was meant, one line each.
    pub faults: Vec<String>,
    /// What is unusual, one line each.
    pub warnings: Vec<String>,
    /// Quantized modules without a fault of their own, by name.
    pub tensors: Vec<CheckedTensor>,
}

/// Checks a folder, against `source` if that is given.
///
/// # Errors
/// If a folder is not there, or the source cannot be read, or `watch` stops the run. Faults of the folder are in the report.
pub fn check(folder: &Path, source: Option<&Path>, watch: &dyn Watch) -> Result<CheckReport, ExportError> {
    if !folder.is_dir() {
        let problem = "is no folder; give the folder that an export has written".to_owned();
        return Err(ExportError::Folder { path: folder.to_path_buf(), problem });
    }
    let source = source.map(ModelFolder::open).transpose()?;
    let mut report = CheckReport::default();
    let config = read_config(folder, &mut report.faults);
    let tensors = Tensors::open(folder, &mut report);
    let Some(config) = config else { return Ok(report) };
    let Some(scheme) = Scheme::read(&config, &mut report) else { return Ok(report) };
    let modules = modules::collect(&tensors, &scheme, &mut report.faults)?;
    scheme.check_unquantized(&tensors, &modules, &mut report.faults);
    fused::check(&tensors, &scheme, &modules, &mut report)?;
    holes::check(&config, &tensors, &modules, scheme.layers, &mut report.faults);
    let source = source.as_ref().map(|source| Source::new(source, &tensors, &modules, &mut report.faults));
    let source = source.transpose()?;
    read_all(&tensors, &modules, source.as_ref(), watch, &mut report)?;
    Ok(report)
}

fn read_config(folder: &Path, faults: &mut Vec<String>) -> Option<Map<String, Value>> {
    let text = match std::fs::read(folder.join("config.json")) {
        Ok(text) => text,
        Err(error) => {
            faults.push(format!("config.json: cannot be read: {error}"));
            return None;
        }
    };
    match serde_json::from_slice::<Map<String, Value>>(&text) {
        Ok(config) => Some(config),
        Err(error) => {
            faults.push(format!("config.json: is no JSON object: {error}"));
            None
        }
    }
}

/// Decodes every module that has no fault so far.
fn read_all(
    tensors: &Tensors,
    modules: &[Module],
    source: Option<&Source<'_>>,
    watch: &dyn Watch,
    report: &mut CheckReport,
) -> Result<(), ExportError> {
    let whole: Vec<&Module> = modules.iter().filter(|module| module.stored.is_some()).collect();
    let bytes = |module: &Module| module.rows * module.columns;
    watch.begin("checking", whole.iter().map(|module| bytes(module)).sum(), Unit::Bytes);
    let stop = watch.abandon();
    let found = workers::work_off(&whole, rayon::current_num_threads(), Vec::new, |found, index, module| {
        stop.check()?;
        found.push((index, module.read(tensors, source)?));
        watch.advance(bytes(module), &module.name);
        Ok::<_, ExportError>(())
    });
    let stopped = stop.end();
    watch.end();
    let mut found: Vec<_> = found?.into_iter().flatten().collect();
    if stopped {
        return Err(Interrupted.into());
    }
    found.sort_by_key(|(index, _)| *index);
    let mut factors = BTreeMap::new();
    for (_, result) in found {
        match result {
            Ok((checked, taken)) => {
                factors.insert(checked.name.clone(), taken);
                report.tensors.push(checked);
            }
            Err(fault) => report.faults.push(fault),
        }
    }
    if let Some(source) = source {
        source.compare_factors(&factors, &mut report.faults);
        source.compare_stored(tensors, &mut report.faults)?;
    }
    Ok(())
}
