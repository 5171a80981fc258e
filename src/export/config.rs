//! `quantization_config` in the form that compressed-tensors 0.12 to 0.20 and vLLM accept: no key that one of them refuses.

use serde_json::{Map, Value, json};

use super::pack::ROWS_TOGETHER;
use super::scheme::{Activations, Format};
use crate::rounding::grid::{Grid, Groups, Layout};

/// Version of compressed-tensors whose rules are followed.
const VERSION: &str = "0.17.0";

/// Modules that become the same.
#[derive(Debug)]
pub(crate) struct ConfigGroup {
    pub(crate) targets: Vec<String>,
    pub(crate) format: Format,
    pub(crate) layout: Layout,
    pub(crate) activations: Activations,
}

/// The value of `quantization_config`.
pub(crate) fn quantization_config(groups: &[ConfigGroup], ignore: &[String]) -> Value {
    let formats: Vec<&str> = groups.iter().map(|group| group.format.name()).collect();
    let format = match formats.as_slice() {
        [first, rest @ ..] if rest.iter().all(|format| format == first) => first,
        _ => "mixed-precision",
    };
    let of_group = |(index, group): (usize, &ConfigGroup)| {
        let value = json!({
            "targets": group.targets,
            "format": group.format.name(),
            "weights": weights(&group.layout),
            "input_activations": activations(group),
            "output_activations": null,
        });
        (format!("group_{index}"), value)
    };
    let of_groups: Map<String, Value> = groups.iter().enumerate().map(of_group).collect();
    json!({
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": format,
        "quantization_status": "compressed",
        "global_compression_ratio": null,
        "kv_cache_scheme": null,
        "ignore": ignore,
        "sparsity_config": {},
        "transform_config": {},
        "config_groups": of_groups,
    })
}

fn weights(layout: &Layout) -> Value {
    let (bits, ty, symmetric) = match layout.grid {
        Grid::Int { bits, symmetric } => (bits, "int", symmetric),
        Grid::Fp8 => (8, "float", true),
        Grid::Nvfp4 | Grid::Mxfp4 => (4, "float", true),
    };
    let mut weights = json!({ "num_bits": bits, "type": ty, "symmetric": symmetric });
    match (layout.grid, layout.groups) {
        (Grid::Nvfp4, Groups::Columns(size)) => {
            weights["strategy"] = "tensor_group".into();
            weights["group_size"] = size.into();
        }
        (_, Groups::Columns(size)) => {
            weights["strategy"] = "group".into();
            weights["group_size"] = size.into();
        }
        (_, Groups::Channel) => weights["strategy"] = "channel".into(),
        (_, Groups::Blocks { rows, columns }) => {
            weights["strategy"] = "block".into();
            weights["block_structure"] = json!([rows, columns]);
        }
    }
    weights["dynamic"] = false.into();
    weights
}

fn activations(group: &ConfigGroup) -> Value {
    let ty = if group.layout.grid == Grid::Fp8 { "float" } else { "int" };
    match group.activations {
        Activations::Kept => Value::Null,
        Activations::Token => {
            json!({ "num_bits": 8, "type": ty, "symmetric": true, "strategy": "token", "dynamic": true })
        }
        Activations::Group => json!({
            "num_bits": 8, "type": ty, "symmetric": true, "strategy": "group", "group_size": 128, "dynamic": true,
        }),
    }
}

/// What groups of `config.json` say about weights: the counterpart of [`quantization_config`].
///
/// # Errors
/// What is wrong, in words that follow the group's name.
pub(crate) fn layout_of(group: &Value, default_format: &str) -> Result<(Format, Layout), String> {
    use crate::rounding::grid::ScaleType;
    let weights = &group["weights"];
    let name = group["format"].as_str().unwrap_or(default_format);
    let format = Format::ALL.into_iter().find(|format| format.name() == name);
    let format = format.ok_or_else(|| format!("has format {name:?}, which is not one that lwq writes"))?;
    let bits = weights["num_bits"].as_u64();
    let symmetric = weights["symmetric"].as_bool().unwrap_or(true);
    let grid = match (format, weights["type"].as_str(), bits, symmetric) {
        (Format::PackQuantized, Some("int"), Some(bits @ (4 | 8)), symmetric) => {
            Grid::Int { bits: bits as u32, symmetric }
        }
        (Format::IntQuantized, Some("int"), Some(8), true) => Grid::Int { bits: 8, symmetric },
        (Format::FloatQuantized, Some("float"), Some(8), true) => Grid::Fp8,
        (Format::Nvfp4Pack, Some("float"), Some(4), true) => Grid::Nvfp4,
        (Format::Mxfp4Pack, Some("float"), Some(4), true) => Grid::Mxfp4,
        (_, ty, bits, _) => {
            return Err(format!("has {} weights of {} bits in format {name}", ty.unwrap_or("no"), bits.unwrap_or(0)));
        }
    };
    let size = weights["group_size"].as_u64().filter(|size| (1..=1 << 20).contains(size));
    let strategy = weights["strategy"].as_str().unwrap_or(if size.is_some() { "group" } else { "" });
    let groups = match (strategy, size, grid) {
        ("tensor_group", Some(16), Grid::Nvfp4) => Groups::Columns(16),
        ("group", Some(32), Grid::Mxfp4) => Groups::Columns(32),
        ("group", Some(size), Grid::Int { .. }) => Groups::Columns(size as usize),
        ("channel", _, Grid::Int { .. } | Grid::Fp8) => Groups::Channel,
        ("block", _, Grid::Fp8) => match serde_json::from_value::<[usize; 2]>(weights["block_structure"].clone()) {
            // Rows are read in pieces that whole blocks must fill.
            Ok([rows, columns]) if rows > 0 && ROWS_TOGETHER.is_multiple_of(rows as u64) && columns > 0 => {
                Groups::Blocks { rows, columns }
            }
            _ => return Err("has strategy block and no block_structure such as [128, 128]".to_owned()),
        },
        _ => {
            return Err(format!(
                "has strategy {strategy:?} with group_size {size:?}, which format {name} does not take"
            ));
        }
    };
    // The type in the file counts; this is what readers compute with.
    let scale_type = match grid {
        Grid::Nvfp4 => ScaleType::F8E4M3,
        Grid::Mxfp4 => ScaleType::E8M0,
        Grid::Int { .. } | Grid::Fp8 => ScaleType::Bf16,
    };
    Ok((format, Layout { grid, groups, scale_type }))
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::Dtype;

    use super::*;
    use crate::export::scheme::SCHEMES;

    #[test]
    fn what_is_written_is_understood() {
        for row in &SCHEMES {
            let layout = row.layout(row.groups, Dtype::BF16);
            let group = ConfigGroup {
                targets: vec!["Linear".into()],
                format: row.format,
                layout,
                activations: row.activations,
            };
            let config = quantization_config(&[group], &["lm_head".into()]);
            assert_eq!(config["format"], row.format.name());
            let group = &config["config_groups"]["group_0"];
            assert_eq!(layout_of(group, ""), Ok((row.format, layout)), "{}", row.name);
            assert!(!config.to_string().contains("scale_dtype") && !config.to_string().contains("actorder"));
        }
    }

    #[test]
    fn block_scheme_is_as_published() {
        let row = &SCHEMES[5];
        let layout = row.layout(row.groups, Dtype::BF16);
        let group =
            ConfigGroup { targets: vec!["Linear".into()], format: row.format, layout, activations: row.activations };
        let config = quantization_config(&[group], &[]);
        let weights = json!({
            "num_bits": 8, "type": "float", "symmetric": true, "strategy": "block", "block_structure": [128, 128],
            "dynamic": false,
        });
        assert_eq!(config["config_groups"]["group_0"]["weights"], weights);
        assert_eq!(config["config_groups"]["group_0"]["input_activations"]["group_size"], 128);
    }
}
