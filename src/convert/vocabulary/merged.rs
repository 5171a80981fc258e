//! SentencePiece vocabularies that are written as merges in tokenizer.json, without a tokenizer.model beside it.

use std::collections::HashMap;

use serde_json::Value;

use super::byte_level::added_tokens;
use super::tokenizer_json::{Merge, Sources, TOKENIZER, TokenizerJson, Vocab};
use super::{TokenType, Vocabulary};
use crate::convert::ConvertError;
use crate::gguf::shown;

/// What the tokens' scores are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scores {
    /// All -1000, as the reference converter writes them.
    Equal,
    /// From the order of the merges, so that llama.cpp merges in the same order.
    Ranks,
}

const EQUAL_SCORE: f32 = -1000.0;

/// True if merges run over characters with bytes as a fallback, and spaces are written `▁`.
pub(super) fn fits(json: &TokenizerJson) -> bool {
    let decoder = json.decoder.as_ref().and_then(|decoder| decoder.get("type")).and_then(Value::as_str);
    json.model.kind.as_deref() == Some("BPE") && json.model.byte_fallback == Some(true) && decoder == Some("Sequence")
}

/// The vocabulary, padded to `size` tokens.
pub(super) fn read(
    sources: &Sources,
    json: &TokenizerJson,
    size: u64,
    scores: Scores,
    warnings: &mut Vec<String>,
) -> Result<Vocabulary, ConvertError> {
    let Vocab::Ids(ids) = &json.model.vocab else {
        return Err(sources.wrong(TOKENIZER, "model.vocab", "is a list, expected tokens with ids"));
    };
    check_steps(sources, json)?;
    let added = added_tokens(sources, ids, warnings)?;
    let highest = ids.values().chain(added.keys()).max().copied().unwrap_or(0);
    if highest >= size {
        let problem =
            format!("has id {highest}, but config.json a vocabulary of {size}; the files are of different models");
        return Err(sources.wrong(TOKENIZER, "model.vocab", problem));
    }
    let ranks = match scores {
        Scores::Equal => HashMap::new(),
        Scores::Ranks => merge_ranks(sources, json)?,
    };
    let merge_count = ranks.len() as u64;
    let mut vocabulary = Vocabulary::padding(size, EQUAL_SCORE);
    let named = named_specials(sources);
    for (text, id) in ids {
        let score = match scores {
            Scores::Equal => EQUAL_SCORE,
            Scores::Ranks => -(ranks.get(text.as_str()).copied().unwrap_or(merge_count + id) as f32),
        };
        let kind = if is_byte(text) {
            TokenType::Byte
        } else if scores == Scores::Ranks && json.model.unk_token.as_ref() == Some(text) {
            TokenType::Unknown
        } else if named.contains(text) {
            TokenType::Control
        } else {
            TokenType::Normal
        };
        vocabulary.set(*id as usize, text.clone().into_bytes(), score, kind);
    }
    for (id, token) in &added {
        let in_model = ids.contains_key(&token.content);
        if scores == Scores::Equal && in_model {
            continue;
        }
        let unknown = json.model.unk_token.as_ref() == Some(&token.content);
        let special = token.special || super::looks_special(&token.content);
        let (text, kind) = match scores {
            Scores::Equal if named.contains(&token.content) => (token.content.clone(), TokenType::Control),
            Scores::Equal => (token.content.clone(), TokenType::UserDefined),
            Scores::Ranks if unknown => (token.content.clone(), TokenType::Unknown),
            Scores::Ranks if special => (token.content.clone(), TokenType::Control),
            Scores::Ranks => (token.content.replace('▁', " "), TokenType::UserDefined),
        };
        vocabulary.set(*id as usize, text.into_bytes(), EQUAL_SCORE, kind);
    }
    Ok(vocabulary)
}

/// Tokens with a name in the configuration; Llama's class has names for three where nothing is said.
fn named_specials(sources: &Sources) -> Vec<String> {
    let mut named = sources.named_tokens();
    let class = sources.setting("tokenizer_class").and_then(Value::as_str).unwrap_or_default();
    if class.starts_with("LlamaTokenizer") || class.starts_with("CodeLlamaTokenizer") {
        for (key, token) in [("unk_token", "<unk>"), ("bos_token", "<s>"), ("eos_token", "</s>")] {
            if sources.setting(key).is_none() {
                named.push(token.to_owned());
            }
        }
    }
    named
}

fn is_byte(text: &str) -> bool {
    let hex = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    hex.is_some_and(|hex| hex.len() == 2 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// Rank of the first merge that makes each token.
fn merge_ranks(sources: &Sources, json: &TokenizerJson) -> Result<HashMap<String, u64>, ConvertError> {
    let merges = json.model.merges.as_deref().unwrap_or_default();
    let mut ranks = HashMap::with_capacity(merges.len());
    for (rank, merge) in merges.iter().enumerate() {
        let Some((left, right)) = Merge::parts(merge) else {
            let problem = format!("{rank} has no two parts; download the file again");
            return Err(sources.wrong(TOKENIZER, "merge", problem));
        };
        ranks.entry(format!("{left}{right}")).or_insert(rank as u64);
    }
    Ok(ranks)
}

/// Steps before the merges that llama.cpp's SentencePiece does as well: spaces become `▁`, one may be put in front.
fn check_steps(sources: &Sources, json: &TokenizerJson) -> Result<(), ConvertError> {
    let mut unknown = Vec::new();
    if let Some(tree) = &json.normalizer {
        check_normalizer(tree, &mut unknown);
    }
    if let Some(tree) = &json.pre_tokenizer {
        check_pre_tokenizer(tree, &mut unknown);
    }
    if unknown.is_empty() {
        return Ok(());
    }
    Err(ConvertError::Field {
        file: sources.folder.file(TOKENIZER),
        field: "normalizer or pre_tokenizer".into(),
        problem: format!(
            "of this SentencePiece tokenizer is not understood: {}; add its tokenizer.model to the folder",
            unknown.join(", ")
        ),
    })
}

fn check_normalizer(tree: &Value, unknown: &mut Vec<String>) {
    let text = |key: &str| tree.get(key).and_then(Value::as_str);
    let pattern = tree.get("pattern").and_then(|pattern| pattern.get("String")).and_then(Value::as_str);
    match text("type") {
        Some("Sequence") => {
            for part in tree.get("normalizers").and_then(Value::as_array).into_iter().flatten() {
                check_normalizer(part, unknown);
            }
        }
        Some("Prepend") if text("prepend") == Some("▁") => {}
        Some("Replace") if pattern == Some(" ") && text("content") == Some("▁") => {}
        Some("NFC" | "NFKC") => {}
        other => unknown.push(format!("normalizer {}", shown(other.unwrap_or("missing").as_bytes()))),
    }
}

fn check_pre_tokenizer(tree: &Value, unknown: &mut Vec<String>) {
    let text = |key: &str| tree.get(key).and_then(Value::as_str);
    let pattern = tree.get("pattern").and_then(|pattern| pattern.get("String")).and_then(Value::as_str);
    match text("type") {
        Some("Sequence") => {
            for part in tree.get("pretokenizers").and_then(Value::as_array).into_iter().flatten() {
                check_pre_tokenizer(part, unknown);
            }
        }
        Some("Metaspace") if text("replacement").is_none_or(|mark| mark == "▁") => {}
        // Gemma: spaces are marks by then, so nothing is cut.
        Some("Split") if pattern == Some(" ") => {}
        other => unknown.push(format!("pre_tokenizer {}", shown(other.unwrap_or("missing").as_bytes()))),
    }
}
