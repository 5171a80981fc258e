//! What `config.json` says about how weights were quantized, and which methods can be read.

use serde_json::{Map, Value};

use crate::convert::ConvertError;
use crate::convert::config::Config;
use crate::convert::description;
use crate::convert::files::{Folder, kind};
use crate::gguf::shown;

/// Where ModelOpt writes the configuration, too.
const MODELOPT_FILE: &str = "hf_quant_config.json";

/// Rows and columns of FP8 blocks where nothing is said.
const DEFAULT_BLOCK: [u64; 2] = [128, 128];

/// Formats of compressed-tensors whose weights can be read.
const FORMATS: [&str; 9] = [
    "float-quantized",
    "naive-quantized",
    "int-quantized",
    "pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
    "dense",
];

/// How weights were quantized.
#[derive(Debug)]
pub(super) struct Method {
    /// `quant_method`, where the folder names one.
    pub name: Option<String>,
    /// Sizes of blocks with one scale, the likeliest first.
    pub blocks: Vec<[u64; 2]>,
    /// Bits that the groups of compressed-tensors name.
    pub bits: Vec<u64>,
}

impl Default for Method {
    /// Nothing is said.
    fn default() -> Method {
        Method { name: None, blocks: vec![DEFAULT_BLOCK], bits: Vec::new() }
    }
}

impl Method {
    /// Reads the configuration.
    ///
    /// # Errors
    /// If it names a method whose weights cannot be widened.
    pub(super) fn read(config: &Config, folder: &Folder) -> Result<Method, ConvertError> {
        let named = ["quantization_config", "compression_config"].into_iter().find(|field| config.get(field).is_some());
        // mlx-lm writes its settings twice, the second time under the name that transformers reads.
        let names_method = |field| config.get(field).is_some_and(|settings| settings.get("quant_method").is_some());
        if config.get("quantization").is_some_and(Value::is_object) && !named.is_some_and(names_method) {
            return Err(refused(config, folder, "quantization", "is MLX's: this folder holds weights for MLX"));
        }
        let Some(field) = named else { return Method::of_modelopt(folder) };
        let settings = match config.get(field) {
            Some(Value::Object(settings)) => settings,
            Some(other) => return Err(config.wrong(field, format!("is {}, expected an object", kind(other)))),
            None => return Ok(Method::default()),
        };
        let text = |key: &str| settings.get(key).and_then(Value::as_str).unwrap_or_default();
        let (name, format) = (text("quant_method").to_lowercase(), text("format"));
        let mut method = Method { name: Some(name.clone()), ..Method::default() };
        match name.as_str() {
            "fp8" | "fbgemm_fp8" | "mxfp4" => {
                if let Some(block) = settings.get("weight_block_size").filter(|block| !block.is_null()) {
                    method.blocks.insert(0, block_of(config, field, block)?);
                }
            }
            "compressed-tensors" => method.read_groups(config, folder, field, settings, format)?,
            name if name.starts_with("modelopt") => check_modelopt(config, folder, field, settings)?,
            // Written by tools that leave out what transformers adds.
            "" if settings.contains_key("quant_algo") => check_modelopt(config, folder, field, settings)?,
            "" if settings.contains_key("config_groups") => {
                method.read_groups(config, folder, field, settings, format)?
            }
            _ => {
                let format = if format.is_empty() { String::new() } else { format!(" ({})", shown(format.as_bytes())) };
                let problem = match name.as_str() {
                    "" => "names no method".to_owned(),
                    name => format!("has method {}{format}", shown(name.as_bytes())),
                };
                return Err(refused(config, folder, field, &problem));
            }
        }
        Ok(method)
    }

    /// ModelOpt's own file, where `config.json` says nothing.
    fn of_modelopt(folder: &Folder) -> Result<Method, ConvertError> {
        let Some(file) = folder.object(MODELOPT_FILE)? else { return Ok(Method::default()) };
        let settings = match file.get("quantization") {
            Some(Value::Object(settings)) => settings.clone(),
            _ => Map::new(),
        };
        if settings.get("quant_algo").is_none_or(Value::is_null) && !settings.contains_key("quantized_layers") {
            return Ok(Method::default());
        }
        match unread_algorithm(&settings) {
            None => Ok(Method { name: Some("modelopt".into()), ..Method::default() }),
            Some(algorithm) => Err(ConvertError::Field {
                file: folder.file(MODELOPT_FILE),
                field: "quant_algo".into(),
                problem: format!("is {}, which cannot be widened; {}", shown(algorithm.as_bytes()), source_of(folder)),
            }),
        }
    }

    fn read_groups(
        &mut self,
        config: &Config,
        folder: &Folder,
        field: &str,
        settings: &Map<String, Value>,
        format: &str,
    ) -> Result<(), ConvertError> {
        let groups = settings.get("config_groups").and_then(Value::as_object);
        let of_groups = groups.into_iter().flat_map(|groups| groups.values());
        let formats = of_groups.clone().filter_map(|group| group.get("format").and_then(Value::as_str));
        if let Some(unread) = std::iter::once(format).chain(formats).find(|format| !FORMATS.contains(format)) {
            let problem = match unread {
                "" => "has method \"compressed-tensors\" without a format".to_owned(),
                unread => format!("has method \"compressed-tensors\" ({})", shown(unread.as_bytes())),
            };
            return Err(refused(config, folder, field, &problem));
        }
        let sparse = settings.get("sparsity_config").and_then(|sparse| sparse.get("format")).and_then(Value::as_str);
        if let Some(sparse) = sparse.filter(|sparse| *sparse != "dense") {
            return Err(refused(config, folder, field, &format!("has sparse weights ({})", shown(sparse.as_bytes()))));
        }
        let transforms = settings.get("transform_config").and_then(|transform| transform.get("config_groups"));
        if transforms.and_then(Value::as_object).is_some_and(|groups| !groups.is_empty()) {
            let problem = "has a transform_config: its weights are rotated, which GGUF cannot undo";
            return Err(refused(config, folder, field, problem));
        }
        for weights in of_groups.filter_map(|group| group.get("weights")) {
            if let Some(block) = weights.get("block_structure").filter(|block| !block.is_null()) {
                let block = block_of(config, field, block)?;
                self.blocks.insert(0, block);
            }
            self.bits.extend(weights.get("num_bits").and_then(Value::as_u64));
        }
        Ok(())
    }
}

fn block_of(config: &Config, field: &str, value: &Value) -> Result<[u64; 2], ConvertError> {
    match serde_json::from_value::<[u64; 2]>(value.clone()) {
        Ok([rows, columns]) if rows > 0 && columns > 0 => Ok([rows, columns]),
        _ => Err(config.wrong(field, format!("has a block size of {}, expected two numbers", kind(value)))),
    }
}

fn check_modelopt(
    config: &Config,
    folder: &Folder,
    field: &str,
    settings: &Map<String, Value>,
) -> Result<(), ConvertError> {
    match unread_algorithm(settings) {
        None => Ok(()),
        Some(algorithm) => {
            Err(refused(config, folder, field, &format!("has quant_algo {}", shown(algorithm.as_bytes()))))
        }
    }
}

/// ModelOpt's algorithms that change weights by more than a scale, or activations with them.
fn unread_algorithm(settings: &Map<String, Value>) -> Option<&str> {
    let of_layers = settings.get("quantized_layers").and_then(Value::as_object);
    let of_layers =
        of_layers.into_iter().flat_map(|layers| layers.values()).filter_map(|layer| layer.get("quant_algo"));
    let read = |name: &str| {
        let name = name.to_uppercase();
        let plain = ["FP8", "NVFP4", "MXFP8", "MXFP4", "W4A16_NVFP4", "MIXED_PRECISION"].contains(&name.as_str());
        plain || (name.starts_with("FP8_") && !name.contains("AWQ"))
    };
    settings.get("quant_algo").into_iter().chain(of_layers).filter_map(Value::as_str).find(|name| !read(name))
}

fn refused(config: &Config, folder: &Folder, field: &str, problem: &str) -> ConvertError {
    config.wrong(
        field,
        format!("{problem}; FP8, MXFP4, NVFP4 and compressed-tensors can be read, not this; {}", source_of(folder)),
    )
}

/// What to convert from, as far as the model card tells.
pub(in crate::convert) fn source_of(folder: &Folder) -> String {
    match description::base_model(folder) {
        Some(base) => {
            format!("convert the 16-bit model that it was made from, {} by its README.md", shown(base.as_bytes()))
        }
        None => "convert the 16-bit model that it was made from".to_owned(),
    }
}
