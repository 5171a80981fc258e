//! What `config.json` says was done, and what of that loaders refuse.

use std::collections::BTreeSet;

use regex::Regex;
use safetensors::tensor::Dtype;
use serde_json::{Map, Value};

use super::CheckReport;
use super::modules::Module;
use super::tensors::Tensors;
use crate::export::config::layout_of;
use crate::export::names::{self, Role};
use crate::export::scheme::Format;
use crate::rounding::grid::Layout;

/// Keys of a group; another makes compressed-tensors refuse the file.
const GROUP_KEYS: [&str; 5] = ["targets", "weights", "input_activations", "output_activations", "format"];

/// Keys of `weights` and of activations.
const ARGUMENT_KEYS: [&str; 12] = [
    "num_bits",
    "type",
    "symmetric",
    "group_size",
    "strategy",
    "block_structure",
    "dynamic",
    "actorder",
    "observer",
    "observer_kwargs",
    "scale_dtype",
    "zp_dtype",
];

/// A group of modules that became the same.
pub(super) struct Group {
    name: String,
    targets: Vec<String>,
    pub(super) format: Format,
    pub(super) layout: Layout,
    /// Inputs of a module are rounded in groups of so many.
    pub(super) input_group: Option<u64>,
}

/// The quantization of a folder.
pub(super) struct Scheme {
    pub(super) groups: Vec<Group>,
    ignore: Vec<String>,
    /// `num_hidden_layers`.
    pub(super) layers: Option<u64>,
}

impl Scheme {
    /// Reads and checks it; `None` if nothing more can be checked by it.
    pub(super) fn read(config: &Map<String, Value>, report: &mut CheckReport) -> Option<Scheme> {
        let faults = &mut report.faults;
        let mut fault = |line: String| faults.push(format!("config.json: quantization_config {line}"));
        let settings = match config.get("quantization_config") {
            Some(Value::Object(settings)) => settings,
            Some(_) => {
                fault("is no object".to_owned());
                return None;
            }
            None => {
                fault("is missing: loaders take the codes for weights".to_owned());
                return None;
            }
        };
        let text = |key: &str| settings.get(key).and_then(Value::as_str).unwrap_or_default();
        if text("quant_method") != "compressed-tensors" {
            fault(format!("has quant_method {:?}, expected \"compressed-tensors\"", text("quant_method")));
            return None;
        }
        if text("quantization_status") != "compressed" {
            fault(format!(
                "has quantization_status {:?}, expected \"compressed\": loaders make random weights otherwise",
                text("quantization_status")
            ));
        }
        let empty = |key: &str, part: &str| {
            let value = settings.get(key).and_then(|value| value.get(part));
            value.is_none_or(|value| match value {
                Value::Null => true,
                Value::Array(items) => items.is_empty(),
                Value::Object(items) => items.is_empty(),
                _ => false,
            })
        };
        if !empty("sparsity_config", "targets") {
            fault("has a sparsity_config with targets, which vLLM refuses".to_owned());
        }
        if !empty("transform_config", "config_groups") {
            fault("has a transform_config, which lwq does not write and cannot check".to_owned());
        }
        let mut ignore = Vec::new();
        match settings.get("ignore") {
            Some(Value::Array(entries)) => {
                for entry in entries {
                    match entry.as_str() {
                        Some(entry) if is_pattern(entry) => ignore.push(entry.to_owned()),
                        _ => fault(format!("has {entry} in ignore, which is no name and no pattern")),
                    }
                }
            }
            None | Some(Value::Null) => {}
            Some(_) => fault("has an ignore that is no list".to_owned()),
        }
        let Some(Value::Object(groups)) = settings.get("config_groups") else {
            fault("has no config_groups".to_owned());
            return None;
        };
        if groups.is_empty() {
            fault("has no group in config_groups".to_owned());
        }
        let top = text("format");
        let (mut read, mut all_read) = (Vec::new(), true);
        for (name, group) in groups {
            check_keys(name, group, &mut fault);
            match layout_of(group, top) {
                Err(problem) => {
                    fault(format!("{name} {problem}"));
                    all_read = false;
                }
                Ok((format, layout)) => {
                    let targets = group.get("targets").and_then(Value::as_array).into_iter().flatten();
                    let targets: Vec<String> = targets.filter_map(Value::as_str).map(str::to_owned).collect();
                    if targets.is_empty() {
                        fault(format!("{name} has no targets"));
                    }
                    let inputs = &group["input_activations"];
                    let input_group = inputs["group_size"].as_u64().filter(|_| inputs["strategy"] == "group");
                    read.push(Group { name: name.clone(), targets, format, layout, input_group });
                }
            }
        }
        if !all_read {
            return None;
        }
        let formats: BTreeSet<&str> = read.iter().map(|group| group.format.name()).collect();
        let expected = if formats.len() > 1 { "mixed-precision" } else { formats.first().copied().unwrap_or(top) };
        if top != expected {
            fault(format!("has format {top:?}; its groups make it {expected:?}"));
        }
        let counts = [Some(config), config.get("text_config").and_then(Value::as_object)];
        let layers = counts.into_iter().flatten().find_map(|config| config.get("num_hidden_layers")?.as_u64());
        Some(Scheme { groups: read, ignore, layers })
    }

    pub(super) fn is_ignored(&self, module: &str) -> bool {
        self.ignore.iter().any(|entry| names::matches(entry, module))
    }

    /// The group of a module: one that names it before one that names its class.
    pub(super) fn group_of(&self, module: &str) -> Option<usize> {
        let by = |is_target: &dyn Fn(&str) -> bool| {
            self.groups.iter().position(|group| group.targets.iter().any(|target| is_target(target)))
        };
        by(&|target| target == module)
            .or_else(|| by(&|target| target.starts_with("re:") && names::matches(target, module)))
            .or_else(|| by(&|target| target == "Linear"))
    }

    /// The group by which transformers (5.17) decodes all experts: the first whose patterns speak of them, or else the first
    /// that names something.
    pub(super) fn group_of_experts(&self) -> usize {
        let first = |is_wanted: &dyn Fn(&String) -> bool| {
            self.groups.iter().position(|group| group.targets.iter().any(is_wanted))
        };
        first(&|target| target.starts_with("re:") && target.contains("experts"))
            .or_else(|| first(&|target| !target.starts_with("re:")))
            .unwrap_or(0)
    }

    /// The name of a group.
    pub(super) fn name_of(&self, group: usize) -> &str {
        &self.groups[group].name
    }

    /// Every linear layer that is not quantized must be in `ignore`.
    pub(super) fn check_unquantized(&self, tensors: &Tensors, modules: &[Module], faults: &mut Vec<String>) {
        let quantized: BTreeSet<&str> = modules.iter().map(|module| module.name.as_str()).collect();
        let is_free = |module: &str| self.group_of(module).is_some() && !self.is_ignored(module);
        for (name, found) in &tensors.by_name {
            let is_float = matches!(found.info.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32);
            let Some(module) = names::module_of(name) else { continue };
            // Tensors of these blocks are loaded by nobody but vLLM, which looks at their names.
            let role = names::role_of(module, self.layers);
            let is_layer =
                found.info.shape.len() == 2 && is_float && role.is_linear_layer() && role != Role::NextTokens;
            if is_layer && module != "lm_head" && !quantized.contains(module) && is_free(module) {
                faults.push(format!(
                    "{name}: is not quantized, but no entry of ignore names it: loaders make an empty quantized layer of it"
                ));
            }
        }
        if !quantized.contains("lm_head") && is_free("lm_head") {
            faults.push(
                "lm_head: is not quantized, but no entry of ignore names it: transformers makes NaN of all outputs"
                    .to_owned(),
            );
        }
    }
}

fn is_pattern(entry: &str) -> bool {
    match entry.strip_prefix("re:") {
        None => !entry.is_empty(),
        Some(pattern) => Regex::new(pattern).is_ok(),
    }
}

fn check_keys(name: &str, group: &Value, fault: &mut dyn FnMut(String)) {
    let keys = |value: &Value| -> Vec<String> {
        value.as_object().map(|map| map.keys().cloned().collect()).unwrap_or_default()
    };
    for key in keys(group) {
        if !GROUP_KEYS.contains(&key.as_str()) {
            fault(format!("{name} has key {key:?}, which compressed-tensors does not know and refuses"));
        }
    }
    for part in ["weights", "input_activations", "output_activations"] {
        for key in keys(&group[part]) {
            if !ARGUMENT_KEYS.contains(&key.as_str()) {
                fault(format!("{name}.{part} has key {key:?}, which compressed-tensors does not know and refuses"));
            }
        }
    }
    let order = &group["weights"]["actorder"];
    if *order == true
        || order.as_str().is_some_and(|order| matches!(order.to_lowercase().as_str(), "group" | "dynamic"))
    {
        fault(format!("{name} has actorder {order}, which vLLM and compressed-tensors refuse"));
    }
}
