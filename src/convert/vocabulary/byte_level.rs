//! Byte-level vocabularies with merges: Llama 3, Qwen, SmolLM, Phi-4 and most others.

use std::collections::HashMap;

use super::families::recognize;
use super::tokenizer_json::{AddedToken, MAX_TOKENS, Merge, Sources, TOKENIZER, TokenizerJson, Vocab};
use super::{TokenType, Vocabulary, looks_special, padding_token, union};
use crate::convert::ConvertError;
use crate::gguf::shown;
use crate::tokenizer::byte_alphabet;
use crate::tokenizer::pretokenize;

/// The vocabulary of `size` tokens; `pre` replaces what is recognized.
pub(super) fn read(
    sources: &Sources,
    json: &TokenizerJson,
    size: u64,
    pre: Option<&str>,
    warnings: &mut Vec<String>,
) -> Result<Vocabulary, ConvertError> {
    let ids = match &json.model.vocab {
        Vocab::Ids(ids) => ids,
        Vocab::Pieces(pieces) => {
            let problem =
                format!("is a list of {} pieces; add tokenizer.model of this SentencePiece tokenizer", pieces.len());
            return Err(sources.wrong(TOKENIZER, "model.vocab", problem));
        }
    };
    if ids.is_empty() {
        return Err(sources.wrong(TOKENIZER, "model.vocab", "is missing or empty; download the file again"));
    }
    let pre = match pre {
        Some(name) => name.to_owned(),
        None => recognize(json).map_err(|parts| unknown_pre(sources, &parts))?.to_owned(),
    };
    let added = added_tokens(sources, ids, warnings)?;

    let mut texts: HashMap<u64, &str> = HashMap::with_capacity(ids.len() + added.len());
    for (text, id) in ids {
        if texts.insert(*id, text).is_some() {
            return Err(sources.wrong(TOKENIZER, "model.vocab", format!("has id {id} twice; download the file again")));
        }
    }
    for token in added.values() {
        texts.insert(token.id, &token.content);
    }
    if let Some((id, text)) = texts.iter().filter(|(id, _)| **id >= size).max_by_key(|(id, _)| **id) {
        let problem = format!(
            "has token {} with id {id}, but config.json a vocabulary of {size}; the files are of different models",
            shown(text.as_bytes())
        );
        return Err(sources.wrong(TOKENIZER, "model.vocab", problem));
    }
    let mut tokens = Vec::with_capacity(size as usize);
    let mut types = Vec::with_capacity(size as usize);
    for id in 0..size {
        let (token, kind) = match (added.get(&id), texts.get(&id)) {
            (Some(added), _) => added_token(added),
            (None, Some(text)) => (text.as_bytes().to_vec(), TokenType::Normal),
            (None, None) => (padding_token(id), TokenType::Unused),
        };
        tokens.push(token);
        types.push(kind);
    }
    let merges = read_merges(sources, json)?;
    Ok(Vocabulary { model: "gpt2", pre, tokens, scores: Vec::new(), types, merges })
}

fn unknown_pre(sources: &Sources, parts: &[String]) -> ConvertError {
    let known: Vec<&str> = pretokenize::known_names().collect();
    ConvertError::PreTokenizer { file: sources.folder.file(TOKENIZER), parts: parts.join(", "), known: known.join(" ") }
}

/// All added tokens by id: those of tokenizer.json, with the flags of tokenizer_config.json, and named tokens that
/// are in neither.
pub(super) fn added_tokens(
    sources: &Sources,
    ids: &HashMap<String, u64>,
    warnings: &mut Vec<String>,
) -> Result<HashMap<u64, AddedToken>, ConvertError> {
    let mut added = union::added_tokens(sources, warnings)?;
    if let Some(id) = added.keys().copied().filter(|id| *id >= MAX_TOKENS).max() {
        let problem = format!("has id {id}; no vocabulary has so many tokens");
        return Err(sources.wrong(TOKENIZER, "added_tokens", problem));
    }
    for (content, id) in sources.added_file()? {
        added.entry(id).or_insert(AddedToken { id, content, special: false, normalized: None });
    }
    for content in sources.named_tokens() {
        if added.values().any(|token| token.content == content) {
            continue;
        }
        let next = || added.keys().copied().chain(ids.values().copied()).max().map_or(0, |id| id + 1);
        let id = ids.get(&content).copied().unwrap_or_else(next);
        added.insert(id, AddedToken { id, content, special: true, normalized: None });
    }
    Ok(added)
}

fn added_token(token: &AddedToken) -> (Vec<u8>, TokenType) {
    let text = if token.is_normalized() { token.content.clone() } else { decoded(&token.content) };
    if token.special || looks_special(&text) {
        return (text.into_bytes(), TokenType::Control);
    }
    (text.replace('▁', " ").into_bytes(), TokenType::UserDefined)
}

/// The text that the byte-level decoder makes of a token: bytes that its letters stand for, if all do.
fn decoded(text: &str) -> String {
    let bytes: Option<Vec<u8>> = text.chars().map(|c| byte_alphabet::byte_of(c.into())).collect();
    match bytes {
        Some(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        None => text.to_owned(),
    }
}

/// Merges of tokenizer.json, or of merges.txt where it has none.
pub(super) fn read_merges(sources: &Sources, json: &TokenizerJson) -> Result<Vec<String>, ConvertError> {
    const FILE: &str = "merges.txt";
    let merges: &[Merge] = json.model.merges.as_deref().unwrap_or_default();
    if !merges.is_empty() {
        if let Some(index) = merges.iter().position(|merge| merge.parts().is_none()) {
            let problem = format!("{index} has no two parts; download the file again");
            return Err(sources.wrong(TOKENIZER, "merge", problem));
        }
        return Ok(merges.iter().map(Merge::joined).collect());
    }
    let Some(text) = sources.folder.text(FILE)? else {
        let problem = "is missing, and there is no merges.txt; download the tokenizer again";
        return Err(sources.wrong(TOKENIZER, "model.merges", problem));
    };
    let body = if text.starts_with('#') { text.split_once('\n').map_or("", |(_, body)| body) } else { text.as_str() };
    let pairs = body.lines().filter_map(|line| {
        let mut parts = line.split_whitespace();
        match (parts.next(), parts.next(), parts.next()) {
            (Some(left), Some(right), None) => Some(format!("{left} {right}")),
            _ => None,
        }
    });
    Ok(pairs.collect())
}
