//! `tokenizer.model`: the pieces of a SentencePiece model, and what other files add to them.
//!
//! The protobuf has many fields; those read here are stable since SentencePiece 0.1 (`sentencepiece_model.proto`).

use prost::Message;

use super::tokenizer_json::{CONFIG, Sources};
use super::{TokenType, Vocabulary, looks_special};
use crate::convert::ConvertError;

pub(super) const FILE: &str = "tokenizer.model";

#[derive(Clone, PartialEq, Message)]
struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<Piece>,
}

#[derive(Clone, PartialEq, Message)]
struct Piece {
    #[prost(string, optional, tag = "1")]
    piece: Option<String>,
    #[prost(float, optional, tag = "2")]
    score: Option<f32>,
    /// 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte; normal where it is absent.
    #[prost(int32, optional, tag = "3")]
    kind: Option<i32>,
}

/// Whose rules say what added tokens become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rules {
    /// The common ones.
    Common,
    /// Phi-3's: no guesses from the look of a token, and tokenizer.json counts as well.
    Phi3,
}

const PADDING_SCORE: f32 = -10_000.0;
const ADDED_SCORE: f32 = -1_000.0;

/// The vocabulary of `size` tokens.
pub(super) fn read(
    sources: &Sources,
    bytes: &[u8],
    size: u64,
    rules: Rules,
    warnings: &mut Vec<String>,
) -> Result<Vocabulary, ConvertError> {
    let wrong = |problem: String| ConvertError::Json { file: sources.folder.file(FILE), problem };
    if bytes.starts_with(b"version https://git-lfs") {
        return Err(wrong("is a Git LFS pointer, not the tokenizer; run git lfs pull".into()));
    }
    let model =
        ModelProto::decode(bytes).map_err(|e| wrong(format!("is no SentencePiece model: {e}; download it again")))?;
    if model.pieces.is_empty() {
        return Err(wrong("is a SentencePiece model without pieces; download it again".into()));
    }
    let mut vocabulary = Vocabulary::padding(size, PADDING_SCORE);
    if model.pieces.len() as u64 > size {
        warnings.push(format!(
            "{FILE} has {} pieces, config.json a vocabulary of {size}; those behind it are left out",
            model.pieces.len()
        ));
    }
    for (id, piece) in model.pieces.into_iter().enumerate().take(size as usize) {
        let kind = match piece.kind {
            Some(2) => TokenType::Unknown,
            Some(3) => TokenType::Control,
            Some(5) => TokenType::Unused,
            Some(6) => TokenType::Byte,
            // The reference converter takes user-defined pieces as normal ones.
            _ => TokenType::Normal,
        };
        vocabulary.set(id, piece.piece.unwrap_or_default().into_bytes(), piece.score.unwrap_or(0.0), kind);
    }
    let mut skipped = 0;
    for (token, id) in sources.added_file()? {
        match id < size {
            true => vocabulary.set(id as usize, token.into_bytes(), ADDED_SCORE, TokenType::UserDefined),
            false => skipped += 1,
        }
    }
    let mut added = sources.configured_tokens()?;
    if rules == Rules::Phi3
        && let Some(json) = &sources.json
    {
        added.extend(json.added_tokens.iter().cloned());
    }
    for token in added {
        if token.id >= size {
            skipped += 1;
            continue;
        }
        let (text, kind) = match rules {
            Rules::Phi3 if token.special => (token.content, TokenType::Control),
            Rules::Phi3 => (token.content, TokenType::UserDefined),
            Rules::Common if token.special || looks_special(&token.content) => (token.content, TokenType::Control),
            Rules::Common => (token.content.replace('▁', " "), TokenType::UserDefined),
        };
        vocabulary.set(token.id as usize, text.into_bytes(), ADDED_SCORE, kind);
    }
    if skipped > 0 {
        warnings.push(format!(
            "{skipped} added tokens of {CONFIG} have ids above config.json's vocabulary of {size}; they are left out"
        ));
    }
    Ok(vocabulary)
}
