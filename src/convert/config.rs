//! `config.json`: hyperparameters under Hugging Face's names, with the defaults of transformers.
//!
//! The reference converter loads the configuration through transformers 4.57, which fills in what a publisher left
//! out (Gemma 3 lists almost nothing). The same defaults stand here, one table per model type.

use std::path::PathBuf;

use serde_json::{Map, Value, json};

use super::ConvertError;
use super::files::{Folder, kind};

const FILE: &str = "config.json";

/// Largest width, count or length that is believed.
const MAX_COUNT: u64 = 1 << 31;

/// Fields of the base of rotary frequencies, and of that of layers with a window.
const THETA: [&str; 5] =
    ["global_rope_theta", "rope_global_theta", "rope_theta_global", "rope_theta", "rotary_emb_base"];
const LOCAL_THETA: [&str; 5] =
    ["local_rope_theta", "rope_local_theta", "rope_theta_local", "swa_rope_theta", "rope_local_base_freq"];

/// The configuration of a model's text part.
#[derive(Debug, Clone)]
pub(super) struct Config {
    file: PathBuf,
    /// `text_config`, where there is one, laid over the root.
    values: Map<String, Value>,
    architecture: String,
    /// True if the text part is one of several, so that tensors of other parts are passed over.
    pub multimodal: bool,
}

impl Config {
    pub(super) fn read(folder: &Folder) -> Result<Config, ConvertError> {
        let Some(mut values) = folder.object(FILE)? else {
            let problem = if folder.has("params.json") {
                "holds params.json but no config.json; use the Hugging Face form of the model"
            } else if folder.has("adapter_config.json") {
                "holds a LoRA adapter and no config.json; merge it into its base model and convert that, or make an adapter \
                 file with llama.cpp's convert_lora_to_gguf.py"
            } else if folder.names()?.iter().any(|name| name.ends_with(".gguf")) {
                "holds GGUF files and no config.json; they need no conversion"
            } else {
                "holds no config.json; give a folder as transformers saves it"
            };
            return Err(ConvertError::Folder { path: folder.path().to_path_buf(), problem: problem.to_owned() });
        };
        let file = folder.file(FILE);
        let first = |values: &Map<String, Value>| match values.get("architectures") {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Array(names)) => Ok(names.first().and_then(Value::as_str).map(str::to_owned)),
            Some(other) => Err(ConvertError::Field {
                file: file.clone(),
                field: "architectures".into(),
                problem: format!("is {}, expected a list of class names", kind(other)),
            }),
        };
        let mut architecture = first(&values)?;
        let multimodal = match values.remove("text_config") {
            Some(Value::Object(text)) => {
                architecture = first(&text)?.or(architecture);
                values.extend(text);
                true
            }
            _ => ["vision_config", "audio_config"].iter().any(|part| values.get(*part).is_some_and(Value::is_object)),
        };
        let architecture = architecture.ok_or_else(|| ConvertError::Field {
            file: file.clone(),
            field: "architectures".into(),
            problem: "is missing; name the model's class, such as [\"LlamaForCausalLM\"]".into(),
        })?;
        Ok(Config { file, values, architecture, multimodal })
    }

    /// The model's class, such as `LlamaForCausalLM`.
    pub(super) fn architecture(&self) -> &str {
        &self.architecture
    }

    pub(super) fn file(&self) -> PathBuf {
        self.file.clone()
    }

    /// Fills in what transformers would.
    pub(super) fn apply_defaults(&mut self, defaults: &[(&str, Value)]) {
        for (key, value) in defaults {
            self.values.entry(*key).or_insert_with(|| value.clone());
        }
        if self.get("num_key_value_heads").is_none()
            && let Some(heads) = self.get("num_attention_heads").cloned()
        {
            self.values.insert("num_key_value_heads".into(), heads);
        }
    }

    /// Gives fields that go by other names the usual ones as well.
    pub(super) fn apply_aliases(&mut self, aliases: &[(&str, &str)]) {
        for (usual, own) in aliases {
            if let Some(value) = self.get(own).cloned() {
                self.values.insert((*usual).to_owned(), value);
            }
        }
    }

    /// The head size that transformers derives, for the classes that do.
    pub(super) fn derive_head_dim(&mut self) -> Result<(), ConvertError> {
        if self.get("head_dim").is_none() {
            let (width, heads) = (self.count("hidden_size")?, self.count("num_attention_heads")?);
            self.values.insert("head_dim".into(), json!(width / heads));
        }
        Ok(())
    }

    /// The first of these fields that is there and not null.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn wrong(&self, field: &str, problem: impl Into<String>) -> ConvertError {
        ConvertError::Field { file: self.file.clone(), field: field.to_owned(), problem: problem.into() }
    }

    /// A count that must be there and at least 1.
    pub(super) fn count(&self, key: &str) -> Result<u64, ConvertError> {
        self.optional_count(key)?.ok_or_else(|| self.wrong(key, "is missing; this is no complete model configuration"))
    }

    /// A count, at least 1 where it is there.
    pub(super) fn optional_count(&self, key: &str) -> Result<Option<u64>, ConvertError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match integer(value) {
            Some(count) if (1..=MAX_COUNT).contains(&count) => Ok(Some(count)),
            _ => Err(self.wrong(key, format!("is {}, expected an integer from 1 to {MAX_COUNT}", kind(value)))),
        }
    }

    /// An integer that may be 0.
    pub(super) fn optional_u32(&self, key: &str) -> Result<Option<u32>, ConvertError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match integer(value).and_then(|value| u32::try_from(value).ok()) {
            Some(value) => Ok(Some(value)),
            None => Err(self.wrong(key, format!("is {}, expected an integer of 32 bits", kind(value)))),
        }
    }

    pub(super) fn optional_f64(&self, key: &str) -> Result<Option<f64>, ConvertError> {
        self.get(key).map(|value| self.number(key, value)).transpose()
    }

    pub(super) fn f64(&self, key: &str) -> Result<f64, ConvertError> {
        self.optional_f64(key)?.ok_or_else(|| self.wrong(key, "is missing; this is no complete model configuration"))
    }

    pub(super) fn number(&self, key: &str, value: &Value) -> Result<f64, ConvertError> {
        value
            .as_f64()
            .filter(|value| value.is_finite() && (*value as f32).is_finite())
            .ok_or_else(|| self.wrong(key, format!("is {}, expected a number", kind(value))))
    }

    pub(super) fn bool(&self, key: &str) -> bool {
        self.get(key).and_then(Value::as_bool).unwrap_or(false)
    }

    /// A flag; `None` where it is absent.
    pub(super) fn optional_bool(&self, key: &str) -> Result<Option<bool>, ConvertError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_bool() {
            Some(flag) => Ok(Some(flag)),
            None => Err(self.wrong(key, format!("is {}, expected true or false", kind(value)))),
        }
    }

    /// True for a flag that is set and a number that is not 0.
    pub(super) fn is_set(&self, key: &str) -> bool {
        self.get(key).is_some_and(|value| *value == true || value.as_f64().is_some_and(|number| number != 0.0))
    }

    /// A field as text, if it is text.
    pub(super) fn str(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(Value::as_str)
    }

    /// Rotary parameters: `rope_parameters` or the older `rope_scaling`, with the fields that used to stand beside
    /// them mirrored in.
    pub(super) fn rope(&self) -> Result<Rope, ConvertError> {
        let key = if self.get("rope_parameters").is_some() { "rope_parameters" } else { "rope_scaling" };
        let mut values = match self.get(key) {
            None => Map::new(),
            Some(Value::Object(map)) => map.clone(),
            Some(other) => return Err(self.wrong(key, format!("is {}, expected an object or null", kind(other)))),
        };
        let per_kind = ["full_attention", "sliding_attention"].map(|kind| values.contains_key(kind));
        if per_kind == [false, false] {
            let mut mirror = |name: &str, sources: &[&str]| {
                if !values.contains_key(name)
                    && let Some(value) = sources.iter().find_map(|source| self.get(source))
                {
                    values.insert(name.to_owned(), value.clone());
                }
            };
            mirror("rope_theta", &THETA);
            // A base for each layer: the first sees everything, the second has a window.
            let by_layer = match values.get("rope_theta") {
                Some(Value::Array(list)) => Some([list.first().cloned(), list.get(1).cloned()]),
                _ => None,
            };
            if let Some([full, windowed]) = by_layer {
                values.insert("rope_theta".into(), full.unwrap_or_default());
                if let Some(theta) = windowed {
                    values.insert("sliding_attention".into(), json!({ "rope_theta": theta }));
                }
            }
            let mut mirror = |name: &str, sources: &[&str]| {
                if !values.contains_key(name)
                    && let Some(value) = sources.iter().find_map(|source| self.get(source))
                {
                    values.insert(name.to_owned(), value.clone());
                }
            };
            mirror("partial_rotary_factor", &["partial_rotary_factor", "rope_pct", "rope_percent"]);
            mirror("original_max_position_embeddings", &["original_max_position_embeddings"]);
            if let Some(theta) = LOCAL_THETA.iter().find_map(|name| self.get(name)) {
                values.insert("sliding_attention".into(), json!({ "rope_theta": theta }));
            }
            if !values.contains_key("rope_type")
                && let Some(old) = values.get("type").filter(|old| !old.is_null()).cloned()
            {
                values.insert("rope_type".into(), old);
            }
        }
        let part = |name: &str| match values.get(name) {
            Some(Value::Object(map)) => Some(map.clone()),
            _ => None,
        };
        let sliding = part("sliding_attention");
        let full = part("full_attention").unwrap_or(values);
        Ok(Rope { key, full, sliding })
    }
}

/// Rotary parameters of the two kinds of layers.
#[derive(Debug)]
pub(super) struct Rope {
    /// The field that they come from, for messages.
    pub key: &'static str,
    /// Layers that see everything.
    pub full: Map<String, Value>,
    /// Layers with a window, where they differ.
    pub sliding: Option<Map<String, Value>>,
}

impl Rope {
    pub(super) fn number(&self, config: &Config, name: &str) -> Result<Option<f64>, ConvertError> {
        let field = format!("{}.{name}", self.key);
        let value = self.full.get(name).filter(|value| !value.is_null());
        value.map(|value| config.number(&field, value)).transpose()
    }

    pub(super) fn required(&self, config: &Config, name: &str) -> Result<f64, ConvertError> {
        let missing =
            || config.wrong(&format!("{}.{name}", self.key), "is missing; this kind of rope scaling needs it");
        self.number(config, name)?.ok_or_else(missing)
    }

    /// `rope_type` in lower case.
    pub(super) fn kind(&self) -> Option<String> {
        self.full.get("rope_type").and_then(Value::as_str).map(str::to_lowercase)
    }

    /// A list of numbers, empty where there is none.
    pub(super) fn numbers(&self, config: &Config, name: &str) -> Result<Vec<f32>, ConvertError> {
        let field = format!("{}.{name}", self.key);
        match self.full.get(name) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Array(items)) => {
                items.iter().map(|item| config.number(&field, item).map(|number| number as f32)).collect()
            }
            Some(other) => Err(config.wrong(&field, format!("is {}, expected a list of numbers", kind(other)))),
        }
    }
}

/// An integer, also one that is written as `32000.0`.
fn integer(value: &Value) -> Option<u64> {
    let from_float =
        |value: f64| (value >= 0.0 && value.fract() == 0.0 && value <= 2f64.powi(53)).then_some(value as u64);
    value.as_u64().or_else(|| value.as_f64().and_then(from_float))
}
