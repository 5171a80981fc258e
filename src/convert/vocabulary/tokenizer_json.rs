//! `tokenizer.json` and the files around it, as they stand on disk.

use std::collections::HashMap;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value};

use crate::convert::ConvertError;
use crate::convert::files::{Folder, kind};

pub(super) const TOKENIZER: &str = "tokenizer.json";
pub(super) const CONFIG: &str = "tokenizer_config.json";
pub(super) const ADDED: &str = "added_tokens.json";

/// Largest token id that is believed; published vocabularies have at most about 300,000 tokens.
pub(super) const MAX_TOKENS: u64 = 1 << 24;

/// The parts of `tokenizer.json` that matter here.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct TokenizerJson {
    #[serde(default)]
    pub added_tokens: Vec<AddedToken>,
    #[serde(default)]
    pub normalizer: Option<Value>,
    #[serde(default)]
    pub pre_tokenizer: Option<Value>,
    #[serde(default)]
    pub post_processor: Option<Value>,
    #[serde(default)]
    pub decoder: Option<Value>,
    pub model: Model,
}

/// A token that is found in texts before anything else is done to them.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct AddedToken {
    #[serde(default)]
    pub id: u64,
    pub content: String,
    #[serde(default)]
    pub special: bool,
    #[serde(default)]
    pub normalized: Option<bool>,
}

impl AddedToken {
    /// Whether texts are normalized before the token is looked for; special tokens are not, unless they say so.
    pub(super) fn is_normalized(&self) -> bool {
        self.normalized.unwrap_or(!self.special)
    }
}

/// The `model` part.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Model {
    #[serde(rename = "type", default)]
    pub kind: Option<String>,
    #[serde(default)]
    pub vocab: Vocab,
    #[serde(default)]
    pub merges: Option<Vec<Merge>>,
    #[serde(default)]
    pub unk_token: Option<String>,
    #[serde(default)]
    pub byte_fallback: Option<bool>,
    #[serde(default)]
    pub ignore_merges: Option<bool>,
    #[serde(default)]
    pub continuing_subword_prefix: Option<String>,
    #[serde(default)]
    pub end_of_word_suffix: Option<String>,
}

/// Tokens and ids of a merging model, or the list of a unigram model.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(super) enum Vocab {
    Ids(HashMap<String, u64>),
    Pieces(Vec<IgnoredAny>),
}

impl Default for Vocab {
    fn default() -> Vocab {
        Vocab::Ids(HashMap::new())
    }
}

/// A merge: `"a b"`, or `["a", "b"]` since transformers 4.45.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(super) enum Merge {
    Joined(String),
    Pair([String; 2]),
}

impl Merge {
    /// The two parts.
    pub(super) fn parts(&self) -> Option<(&str, &str)> {
        match self {
            Merge::Joined(text) => text.split_once(' '),
            Merge::Pair([left, right]) => Some((left, right)),
        }
    }

    /// GGUF's form: parts separated by a space. Spaces inside parts become `Ġ`, as the reference converter does.
    pub(super) fn joined(&self) -> String {
        match self {
            Merge::Joined(text) => text.clone(),
            Merge::Pair([left, right]) => format!("{} {}", left.replace(' ', "Ġ"), right.replace(' ', "Ġ")),
        }
    }
}

/// Everything about the tokenizer that the folder holds.
pub(super) struct Sources<'a> {
    pub folder: &'a Folder,
    pub json: Option<TokenizerJson>,
    pub config: Option<Map<String, Value>>,
}

impl<'a> Sources<'a> {
    pub(super) fn read(folder: &'a Folder) -> Result<Sources<'a>, ConvertError> {
        Ok(Sources { folder, json: folder.json(TOKENIZER)?, config: folder.object(CONFIG)? })
    }

    pub(super) fn wrong(&self, file: &str, field: impl Into<String>, problem: impl Into<String>) -> ConvertError {
        ConvertError::Field { file: self.folder.file(file), field: field.into(), problem: problem.into() }
    }

    /// A field of `tokenizer_config.json`.
    pub(super) fn setting(&self, key: &str) -> Option<&Value> {
        self.config.as_ref()?.get(key).filter(|value| !value.is_null())
    }

    /// `tokenizer.json`, where there is no way without it.
    pub(super) fn require_json(&self) -> Result<&TokenizerJson, ConvertError> {
        self.json.as_ref().ok_or_else(|| {
            let problem = if self.folder.has("tekken.json") {
                "holds tekken.json but neither tokenizer.json nor tokenizer.model; use the Hugging Face form of the model"
            } else {
                "holds neither tokenizer.json nor tokenizer.model; save the tokenizer with transformers' save_pretrained"
            };
            ConvertError::Folder { path: self.folder.path().to_path_buf(), problem: problem.into() }
        })
    }

    /// `added_tokens_decoder` of `tokenizer_config.json`, by id.
    pub(super) fn configured_tokens(&self) -> Result<Vec<AddedToken>, ConvertError> {
        const FIELD: &str = "added_tokens_decoder";
        let map = match self.setting(FIELD) {
            None => return Ok(Vec::new()),
            Some(Value::Object(map)) => map,
            Some(other) => return Err(self.wrong(CONFIG, FIELD, format!("is {}, expected an object", kind(other)))),
        };
        let mut tokens = Vec::with_capacity(map.len());
        for (id, entry) in map {
            let id = id.parse::<u64>().ok().filter(|id| *id < MAX_TOKENS);
            let token = serde_json::from_value::<AddedToken>(entry.clone()).ok();
            let (Some(id), Some(token)) = (id, token) else {
                return Err(self.wrong(CONFIG, FIELD, "has an entry that is no id with a token".to_owned()));
            };
            tokens.push(AddedToken { id, ..token });
        }
        tokens.sort_by_key(|token| token.id);
        Ok(tokens)
    }

    /// `added_tokens.json`: tokens and ids, in the order of the ids.
    pub(super) fn added_file(&self) -> Result<Vec<(String, u64)>, ConvertError> {
        let Some(map) = self.folder.object(ADDED)? else { return Ok(Vec::new()) };
        let mut tokens = Vec::with_capacity(map.len());
        for (token, id) in map {
            match id.as_u64().filter(|id| *id < MAX_TOKENS) {
                Some(id) => tokens.push((token, id)),
                None => return Err(self.wrong(ADDED, "an entry", format!("is {}, expected an id", kind(&id)))),
            }
        }
        tokens.sort_by_key(|(_, id)| *id);
        Ok(tokens)
    }

    /// Texts of the tokens that have a name in the configuration (`bos_token` and so on).
    pub(super) fn named_tokens(&self) -> Vec<String> {
        const NAMES: [&str; 7] =
            ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
        let mut texts: Vec<String> = NAMES.iter().filter_map(|name| token_text(self.setting(name)?)).collect();
        // The second name is that of transformers 5.
        for more in ["additional_special_tokens", "extra_special_tokens"] {
            if let Some(Value::Array(more)) = self.setting(more) {
                texts.extend(more.iter().filter_map(token_text));
            }
        }
        texts
    }
}

/// A token that is written as a string or as an object with `content`.
pub(super) fn token_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Object(map) => map.get("content")?.as_str().map(str::to_owned),
        _ => None,
    }
}
