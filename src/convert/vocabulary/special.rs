//! Special tokens, whether texts begin or end with them, chat templates and normalizer flags.
//!
//! Sources and their precedence follow `SpecialVocab` of llama.cpp b10605 (`gguf-py/gguf/vocab.py`): the
//! post-processor of tokenizer.json, then tokenizer_config.json, then the ids of config.json.

use serde_json::{Map, Value};

use super::tokenizer_json::{CONFIG, Sources, token_text};
use crate::convert::ConvertError;
use crate::convert::architectures::RoleToken;
use crate::convert::files::Folder;
use crate::gguf::{Array, Metadata};

/// A role that a token can have, with the key of its id and of the flag that adds it.
struct Kind {
    name: &'static str,
    id_key: Option<&'static str>,
    add_key: Option<&'static str>,
}

const fn kind(name: &'static str, id_key: Option<&'static str>, add_key: Option<&'static str>) -> Kind {
    Kind { name, id_key, add_key }
}

const KINDS: [Kind; 9] = [
    kind("bos", Some("tokenizer.ggml.bos_token_id"), Some("tokenizer.ggml.add_bos_token")),
    kind("eos", Some("tokenizer.ggml.eos_token_id"), Some("tokenizer.ggml.add_eos_token")),
    kind("unk", Some("tokenizer.ggml.unknown_token_id"), None),
    kind("sep", Some("tokenizer.ggml.seperator_token_id"), Some("tokenizer.ggml.add_sep_token")),
    kind("pad", Some("tokenizer.ggml.padding_token_id"), None),
    kind("cls", None, None),
    kind("mask", Some("tokenizer.ggml.mask_token_id"), None),
    kind("eot", Some("tokenizer.ggml.eot_token_id"), None),
    kind("eom", Some("tokenizer.ggml.eom_token_id"), None),
];

/// How many of `KINDS` every model is asked for; the others only where a post-processor brings them up.
const USUAL: usize = 7;

/// What was found, in the order of [`KINDS`].
#[derive(Default)]
pub(super) struct Special {
    ids: [Option<u32>; KINDS.len()],
    adds: [Option<bool>; KINDS.len()],
    template: Option<Template>,
    lowercase: Option<bool>,
    strip_accents: Option<bool>,
}

enum Template {
    One(String),
    /// Names and templates.
    Many(Vec<(String, String)>),
}

fn slot(name: &str) -> usize {
    KINDS.iter().position(|kind| kind.name == name).unwrap_or(0)
}

impl Special {
    /// Reads everything; ids at or above `limit`, where there is one, are left out with a warning.
    pub(super) fn read(
        sources: &Sources,
        limit: Option<u64>,
        warnings: &mut Vec<String>,
    ) -> Result<Special, ConvertError> {
        let mut special = Special::default();
        let mut config = sources.config.clone();
        let mut kinds = USUAL;
        if let Some(json) = &sources.json {
            if let Some(normalizer) = &json.normalizer {
                special.read_normalizer(normalizer);
            }
            kinds = special.read_post_processor(json.post_processor.as_ref(), &mut config);
        }
        let no_config = Map::new();
        special.template = read_template(sources.folder, config.as_ref().unwrap_or(&no_config), warnings)?;
        if let Some(config) = &config {
            for (slot, Kind { name, .. }) in KINDS.iter().enumerate().take(kinds) {
                if let Some(Value::Bool(add)) = config.get(&format!("add_{name}_token")) {
                    special.adds[slot] = Some(*add);
                }
                let text = config.get(&format!("{name}_token")).and_then(token_text);
                if let (Some(text), Some(json)) = (text, &sources.json) {
                    let added = json.added_tokens.iter().find(|token| token.content == text);
                    special.set_id(slot, added.map(|token| token.id), limit, warnings);
                }
            }
        }
        special.read_model_config(sources.folder, kinds, limit, warnings)?;
        Ok(special)
    }

    /// Gives added tokens the roles that their class knows them by.
    pub(super) fn give(
        &mut self,
        tokens: &[RoleToken],
        sources: &Sources,
        limit: Option<u64>,
        warnings: &mut Vec<String>,
    ) {
        for RoleToken { role, token, replaces } in tokens {
            let added = sources.json.as_ref().map_or(&[][..], |json| json.added_tokens.as_slice());
            let configured = sources.configured_tokens().unwrap_or_default();
            let id = added.iter().chain(&configured).find(|added| added.content == **token).map(|added| added.id);
            match (id, replaces) {
                (None, true) => {}
                (None, false) => warnings.push(format!("there is no token {token}, which would be {role}")),
                (Some(_), replaces) => {
                    if *replaces {
                        self.ids[slot(role)] = None;
                    }
                    self.set_id(slot(role), id, limit, warnings);
                }
            }
        }
    }

    fn set_id(&mut self, slot: usize, id: Option<u64>, limit: Option<u64>, warnings: &mut Vec<String>) {
        let Some(id) = id else { return };
        let limit = limit.unwrap_or(u32::MAX.into());
        if id >= limit {
            let name = KINDS[slot].name;
            warnings.push(format!("the id of the {name} token is {id}, but ids end at {limit}; it is left out"));
        } else if self.ids[slot].is_none() {
            self.ids[slot] = Some(id as u32);
        }
    }

    /// Ids of `config.json` fill what is still open.
    fn read_model_config(
        &mut self,
        folder: &Folder,
        kinds: usize,
        limit: Option<u64>,
        warnings: &mut Vec<String>,
    ) -> Result<(), ConvertError> {
        let Some(config) = folder.object("config.json")? else { return Ok(()) };
        for (slot, Kind { name, .. }) in KINDS.iter().enumerate().take(kinds) {
            let key = format!("{name}_token_id");
            let found = config.get(&key).filter(|id| !id.is_null());
            let found = found.or_else(|| config.get("text_config")?.get(&key));
            self.set_id(slot, found.and_then(Value::as_u64), limit, warnings);
        }
        Ok(())
    }

    fn read_normalizer(&mut self, normalizer: &Value) {
        let flag = |name: &str| normalizer.get(name).and_then(Value::as_bool);
        match normalizer.get("type").and_then(Value::as_str) {
            Some("Lowercase") => self.lowercase = Some(true),
            Some("StripAccents") => self.strip_accents = Some(true),
            Some("BertNormalizer") => {
                self.lowercase = flag("lowercase").or(self.lowercase);
                self.strip_accents = flag("strip_accents").or(self.strip_accents);
            }
            Some("Sequence") => {
                for part in normalizer.get("normalizers").and_then(Value::as_array).into_iter().flatten() {
                    self.read_normalizer(part);
                }
            }
            _ => {}
        }
    }

    /// Finds out from the templates of the post-processor which tokens stand around a text. They may also rename the
    /// configuration's tokens. Gives the number of kinds that are asked for afterwards.
    fn read_post_processor(&mut self, processor: Option<&Value>, config: &mut Option<Map<String, Value>>) -> usize {
        let text = |config: &Option<Map<String, Value>>, key: &str| {
            config.as_ref().and_then(|config| config.get(key)).and_then(token_text).filter(|text| !text.is_empty())
        };
        let mut names = Names {
            bos: text(config, "bos_token"),
            eos: text(config, "eos_token"),
            cls: text(config, "cls_token"),
            sep: text(config, "sep_token"),
            kinds: USUAL,
        };
        let rename = |config: &mut Option<Map<String, Value>>, key: &str, token: &Option<String>| {
            if let (Some(config), Some(token)) = (config.as_mut(), token) {
                config.insert(key.to_owned(), Value::String(token.clone()));
            }
        };
        if names.bos.is_none() && names.cls.is_some() {
            names.bos = names.cls.clone();
            rename(config, "bos_token", &names.bos);
        }
        if names.eos.is_none() && names.sep.is_some() {
            names.eos = names.sep.clone();
            rename(config, "eos_token", &names.eos);
        }
        let Some(processor) = processor else { return names.kinds };
        let list = match processor.get("processors").and_then(Value::as_array) {
            Some(list) => list.as_slice(),
            None => std::slice::from_ref(processor),
        };
        for processor in list {
            match processor.get("type").and_then(Value::as_str) {
                Some("RobertaProcessing") => {
                    for name in ["bos", "eos", "sep"] {
                        self.adds[slot(name)] = Some(true);
                    }
                    let first = |key: &str| processor.get(key).and_then(|pair| pair.get(0)).and_then(token_text);
                    if names.cls.is_none() && config.is_some() {
                        names.cls = first("cls").or(names.bos.clone());
                        rename(config, "cls_token", &names.cls);
                    }
                    if names.sep.is_none() && config.is_some() {
                        names.sep = first("sep").or(names.eos.clone());
                        rename(config, "sep_token", &names.sep);
                    }
                }
                Some("TemplateProcessing") => self.read_template_processing(processor, &mut names, config),
                _ => {}
            }
        }
        names.kinds
    }

    fn read_template_processing(
        &mut self,
        processor: &Value,
        names: &mut Names,
        config: &mut Option<Map<String, Value>>,
    ) {
        let list = |key: &str| processor.get(key).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let (single, mut pair) = (list("single"), list("pair"));
        let mut set = |key: &str, token: &Option<String>| {
            if let (Some(config), Some(token)) = (config.as_mut(), token) {
                config.insert(key.to_owned(), Value::String(token.clone()));
                return true;
            }
            config.is_some()
        };
        let configured = set("", &None);
        let (mut first, mut last) = (None, None);
        if let [head, .., tail] = single {
            first = special_token(head);
            last = special_token(tail);
        }
        if let Some(first) = &first {
            let token = Some(first.clone());
            if !configured {
                names.bos = token;
            } else if names.bos.as_ref() != Some(first) && names.cls.as_ref() != Some(first) {
                if names.bos.is_none() {
                    names.bos = token.clone();
                    set("bos_token", &token);
                }
                if names.cls.is_none() {
                    names.cls = token.clone();
                    set("cls_token", &token);
                }
            }
            let known = names.bos.as_ref() == Some(first) || names.cls.as_ref() == Some(first);
            self.adds[slot("bos")] = Some(known);
        }
        if let Some(last) = &last {
            let token = Some(last.clone());
            if !configured {
                names.eos = token;
            } else if names.eos.as_ref() != Some(last) {
                // The former end token ends a turn, or a message where that place is taken.
                if names.kinds < KINDS.len() {
                    let role = format!("{}_token", KINDS[names.kinds].name);
                    names.kinds += 1;
                    set(&role, &names.eos);
                }
                names.eos = token.clone();
                set("eos_token", &token);
            }
            self.adds[slot("eos")] = Some(names.eos.as_ref() == Some(last));
        }
        if pair.is_empty() {
            return;
        }
        if first.is_some() && pair.first().and_then(special_token) == first {
            pair = &pair[1..];
        }
        if last.is_some() && pair.last().and_then(special_token) == last {
            pair = &pair[..pair.len() - 1];
        }
        let is_sequence = |part: &Value, name: &str| {
            part.get("Sequence").and_then(|part| part.get("id")).and_then(Value::as_str) == Some(name)
        };
        let [a, middle @ .., b] = pair else { return };
        if !is_sequence(a, "A") || !is_sequence(b, "B") || middle.is_empty() {
            return;
        }
        let separates = |part: &Value| {
            let token = special_token(part);
            token.is_some() && (token == names.sep || token == names.eos)
        };
        let add = (separates(&middle[0]) && last.is_none()) || (middle.len() == 2 && separates(&middle[1]));
        self.adds[slot("sep")] = Some(add);
        if add && names.sep.is_none() {
            set("sep_token", &names.eos);
        }
    }

    /// Adds the keys.
    pub(super) fn write(&self, metadata: &mut Metadata) {
        for (kind, id) in KINDS.iter().zip(self.ids) {
            if let (Some(key), Some(id)) = (kind.id_key, id) {
                metadata.set(key, id);
            }
        }
        for (kind, add) in KINDS.iter().zip(self.adds) {
            if let (Some(key), Some(add)) = (kind.add_key, add) {
                metadata.set(key, add);
            }
        }
        match &self.template {
            None => {}
            Some(Template::One(text)) => metadata.set("tokenizer.chat_template", text.as_str()),
            Some(Template::Many(list)) => write_templates(list, metadata),
        }
        if let Some(lowercase) = self.lowercase {
            metadata.set("tokenizer.ggml.normalizer.lowercase", lowercase);
        }
        if let Some(strip) = self.strip_accents {
            metadata.set("tokenizer.ggml.normalizer.strip_accents", strip);
        }
    }
}

/// Tokens by role while a post-processor is read.
struct Names {
    bos: Option<String>,
    eos: Option<String>,
    cls: Option<String>,
    sep: Option<String>,
    kinds: usize,
}

fn special_token(part: &Value) -> Option<String> {
    let id = part.get("SpecialToken")?.get("id")?.as_str()?;
    (!id.is_empty()).then(|| id.to_owned())
}

fn write_templates(list: &[(String, String)], metadata: &mut Metadata) {
    let mut names: Vec<String> = Vec::new();
    let mut default = None;
    for (name, text) in list {
        let name: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        match name.as_str() {
            "" => {}
            "default" => default = Some(text),
            _ => {
                metadata.set(&format!("tokenizer.chat_template.{name}"), text.as_str());
                if !names.contains(&name) {
                    names.push(name);
                }
            }
        }
    }
    if !names.is_empty() {
        metadata.set("tokenizer.chat_templates", Array::of_strings(&names));
    }
    if let Some(text) = default {
        metadata.set("tokenizer.chat_template", text.as_str());
    }
}

fn read_template(
    folder: &Folder,
    config: &Map<String, Value>,
    warnings: &mut Vec<String>,
) -> Result<Option<Template>, ConvertError> {
    let configured = config.get("chat_template");
    if let Some(text) = folder.text("chat_template.jinja")? {
        if configured.and_then(Value::as_str).is_some_and(|copy| copy != text) {
            warnings.push(format!("chat_template.jinja differs from the chat_template in {CONFIG}; the file counts"));
        }
        let more = folder.file("additional_chat_templates");
        let more = if more.is_dir() { Folder::open(&more)?.names()? } else { Vec::new() };
        let more: Vec<String> = more.into_iter().filter(|name| name.ends_with(".jinja")).collect();
        if more.is_empty() {
            return Ok(Some(Template::One(text)));
        }
        let mut list = vec![("default".to_owned(), text)];
        for name in more {
            if let Some(text) = folder.text(&format!("additional_chat_templates/{name}"))? {
                list.push((name.trim_end_matches(".jinja").to_owned(), text));
            }
        }
        return Ok(Some(Template::Many(list)));
    }
    if let Some(template) = configured {
        return Ok(template_of(template, CONFIG, warnings));
    }
    match folder.object("chat_template.json")? {
        Some(map) => Ok(map.get("chat_template").and_then(|found| template_of(found, "chat_template.json", warnings))),
        None => Ok(None),
    }
}

fn template_of(value: &Value, file: &str, warnings: &mut Vec<String>) -> Option<Template> {
    match value {
        Value::Null => None,
        Value::String(text) => Some(Template::One(text.clone())),
        Value::Array(items) => {
            let entry = |item: &Value| {
                let name = item.get("name").and_then(Value::as_str).unwrap_or_default();
                Some((name.to_owned(), item.get("template")?.as_str()?.to_owned()))
            };
            Some(Template::Many(items.iter().filter_map(entry).collect()))
        }
        _ => {
            warnings.push(format!("chat_template of {file} is neither text nor a list; it is left out"));
            None
        }
    }
}
