//! Several descriptions of one tokenizer in a folder: all of them count, and what contradicts is named.
//!
//! Publishers ship `tokenizer.model`, `tokenizer.json` and `tokenizer_config.json` side by side. Which of them knows that a
//! token is a chat marker depends on what wrote the folder: transformers 4 repeats the added tokens in
//! `tokenizer_config.json`, transformers 5 has them in `tokenizer.json` only.

use std::collections::HashMap;

use super::tokenizer_json::{AddedToken, CONFIG, Sources, TOKENIZER, Vocab};
use crate::convert::ConvertError;
use crate::gguf::shown;

/// Differences between two descriptions, of which the first is shown.
pub(super) struct Contradictions {
    files: [&'static str; 2],
    /// The file that counts.
    counts: &'static str,
    first: Option<String>,
    more: usize,
}

impl Contradictions {
    pub(super) fn between(files: [&'static str; 2], counts: &'static str) -> Contradictions {
        Contradictions { files, counts, first: None, more: 0 }
    }

    pub(super) fn add(&mut self, id: u64, [one, other]: [&str; 2]) {
        match &self.first {
            Some(_) => self.more += 1,
            None => self.first = Some(format!("token {id} is {one} there and {other} here")),
        }
    }

    pub(super) fn note(self, warnings: &mut Vec<String>) {
        let Some(first) = self.first else { return };
        let more = if self.more > 0 { format!(" and {} more", self.more) } else { String::new() };
        let [there, here] = self.files;
        let counts = self.counts;
        warnings.push(format!("{there} and {here} contradict each other: {first}{more}; {counts} counts"));
    }
}

/// Added tokens of tokenizer.json and of tokenizer_config.json by id; where both have one, that of the latter, as the
/// reference converter takes it.
pub(super) fn added_tokens(
    sources: &Sources,
    warnings: &mut Vec<String>,
) -> Result<HashMap<u64, AddedToken>, ConvertError> {
    let mut added: HashMap<u64, AddedToken> = HashMap::new();
    let mut contradictions = Contradictions::between([TOKENIZER, CONFIG], CONFIG);
    let of_json = sources.json.iter().flat_map(|json| json.added_tokens.iter().cloned());
    for (token, configured) in
        of_json.map(|token| (token, false)).chain(sources.configured_tokens()?.into_iter().map(|token| (token, true)))
    {
        let described = |token: &AddedToken| {
            format!("{} ({})", shown(token.content.as_bytes()), if token.special { "special" } else { "text" })
        };
        let id = token.id;
        let described_here = described(&token);
        if let Some(first) = added.insert(id, token)
            && configured
            && described(&first) != described_here
        {
            contradictions.add(id, [&described(&first), &described_here]);
        }
    }
    contradictions.note(warnings);
    Ok(added)
}

/// Compares the pieces of tokenizer.model with the vocabulary of tokenizer.json.
pub(super) fn compare_pieces(sources: &Sources, pieces: &[Vec<u8>], warnings: &mut Vec<String>) {
    let Some(json) = &sources.json else { return };
    let Vocab::Ids(ids) = &json.model.vocab else { return };
    let mut contradictions =
        Contradictions::between([super::sentencepiece::FILE, TOKENIZER], super::sentencepiece::FILE);
    let mut differing: Vec<(u64, &str)> = ids
        .iter()
        .filter(|(text, id)| {
            usize::try_from(**id).ok().and_then(|id| pieces.get(id)).is_some_and(|piece| piece != text.as_bytes())
        })
        .map(|(text, id)| (*id, text.as_str()))
        .collect();
    differing.sort_unstable();
    for (id, text) in differing {
        contradictions.add(id, [&shown(&pieces[id as usize]), &shown(text.as_bytes())]);
    }
    contradictions.note(warnings);
}
