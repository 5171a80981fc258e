//! What loaders put into one must be alike.

use std::collections::{BTreeMap, BTreeSet};

use safetensors::tensor::Dtype;

use super::CheckReport;
use super::groups::Scheme;
use super::modules::{Module, keys_of};
use super::tensors::Tensors;
use crate::export::ExportError;
use crate::export::names;

/// Queries, keys and values, gate and up, and the experts of a layer must have one scheme, and for transformers those of all
/// layers; NVFP4 wants one global scale for what is put into one.
pub(super) fn check(
    tensors: &Tensors,
    scheme: &Scheme,
    modules: &[Module],
    report: &mut CheckReport,
) -> Result<(), ExportError> {
    let mut groups: BTreeMap<String, (String, Option<usize>)> = BTreeMap::new();
    let mut told = BTreeSet::new();
    let quantized = modules.iter().map(|module| (module.name.as_str(), Some(module.group)));
    let known: BTreeSet<&str> = modules.iter().map(|module| module.name.as_str()).collect();
    let is_float = |dtype| matches!(dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32);
    let plain = tensors.by_name.iter().filter_map(|(name, found)| {
        let module = names::module_of(name)?;
        let is_plain = is_float(found.info.dtype) && found.info.shape.len() == 2 && !known.contains(module);
        is_plain.then_some((module, None))
    });
    let name_of = |group: Option<usize>| group.map_or("16 bits", |group| scheme.name_of(group)).to_owned();
    for (module, group) in quantized.chain(plain) {
        for key in keys_of(module) {
            let (first, of_first) = groups.entry(key.clone()).or_insert_with(|| (module.to_owned(), group));
            if *of_first != group && told.insert(key) {
                report.faults.push(format!(
                    "{module}: is in {}, but {first} in {}: vLLM puts them into one and refuses that",
                    name_of(group),
                    name_of(*of_first)
                ));
            }
        }
    }
    let read_by = scheme.group_of_experts();
    let other = modules.iter().find(|module| names::experts_of(&module.name).is_some() && module.group != read_by);
    if let Some(module) = other.filter(|_| !told.iter().any(|key: &String| key.ends_with(".experts"))) {
        report.faults.push(format!(
            "{}: is in {}, but transformers (5.17) decodes all experts by {}: garbage, without a word",
            module.name,
            scheme.name_of(module.group),
            scheme.name_of(read_by)
        ));
    }
    let mut scales: BTreeMap<String, (String, f32)> = BTreeMap::new();
    for module in modules {
        let (Some(stored), Some((key, ..))) = (&module.stored, names::fused_of(&module.name)) else { continue };
        let (first, scale) = scales.entry(key).or_insert_with(|| (module.name.clone(), stored.global_scale)).clone();
        if scale != stored.global_scale {
            report.warnings.push(format!(
                "{}.weight_global_scale: is {}, but that of {first} is {scale}: vLLM takes the larger for both",
                module.name, stored.global_scale
            ));
        }
    }
    Ok(())
}
