//! `tokenizer.model`: the pieces of a SentencePiece model, and what other files add to them.
//!
//! The protobuf has many fields; those read here are stable since SentencePiece 0.1 (`sentencepiece_model.proto`).

use std::collections::HashSet;

use prost::bytes::{Buf, BufMut};
use prost::encoding::{self, DecodeContext, WireType};
use prost::{DecodeError, Message};

use super::tokenizer_json::{AddedToken, Sources, TOKENIZER};
use super::union::{self, Contradictions};
use super::{TokenType, Vocabulary, looks_special};
use crate::convert::ConvertError;
use crate::gguf::shown;

pub(super) const FILE: &str = "tokenizer.model";

/// The messages are written out: prost's derive macro would bring a crate into the library that only the command line has.
#[derive(Clone, Debug, Default, PartialEq)]
struct ModelProto {
    /// Field 1.
    pieces: Vec<Piece>,
    /// Field 3.
    normalizer: Option<Normalizer>,
}

impl Message for ModelProto {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        encoding::message::encode_repeated(1, &self.pieces, buf);
        self.normalizer.iter().for_each(|normalizer| encoding::message::encode(3, normalizer, buf));
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        match tag {
            1 => encoding::message::merge_repeated(wire_type, &mut self.pieces, buf, ctx),
            3 => encoding::message::merge(wire_type, self.normalizer.get_or_insert_default(), buf, ctx),
            _ => encoding::skip_field(wire_type, tag, buf, ctx),
        }
    }

    fn encoded_len(&self) -> usize {
        let normalizer = self.normalizer.as_ref().map_or(0, |part| encoding::message::encoded_len(3, part));
        encoding::message::encoded_len_repeated(1, &self.pieces) + normalizer
    }

    fn clear(&mut self) {
        *self = ModelProto::default();
    }
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Normalizer {
    /// Field 3: a space is put before a text; true where it is absent.
    add_dummy_prefix: Option<bool>,
}

impl Message for Normalizer {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        self.add_dummy_prefix.iter().for_each(|add| encoding::bool::encode(3, add, buf));
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        match tag {
            3 => encoding::bool::merge(wire_type, self.add_dummy_prefix.get_or_insert_default(), buf, ctx),
            _ => encoding::skip_field(wire_type, tag, buf, ctx),
        }
    }

    fn encoded_len(&self) -> usize {
        self.add_dummy_prefix.as_ref().map_or(0, |add| encoding::bool::encoded_len(3, add))
    }

    fn clear(&mut self) {
        *self = Normalizer::default();
    }
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Piece {
    /// Field 1.
    piece: Option<String>,
    /// Field 2.
    score: Option<f32>,
    /// Field 3: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte; normal where it is absent.
    kind: Option<i32>,
}

impl Message for Piece {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        self.piece.iter().for_each(|piece| encoding::string::encode(1, piece, buf));
        self.score.iter().for_each(|score| encoding::float::encode(2, score, buf));
        self.kind.iter().for_each(|kind| encoding::int32::encode(3, kind, buf));
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        match tag {
            1 => encoding::string::merge(wire_type, self.piece.get_or_insert_default(), buf, ctx),
            2 => encoding::float::merge(wire_type, self.score.get_or_insert_default(), buf, ctx),
            3 => encoding::int32::merge(wire_type, self.kind.get_or_insert_default(), buf, ctx),
            _ => encoding::skip_field(wire_type, tag, buf, ctx),
        }
    }

    fn encoded_len(&self) -> usize {
        let piece = self.piece.as_ref().map_or(0, |piece| encoding::string::encoded_len(1, piece));
        let score = self.score.as_ref().map_or(0, |score| encoding::float::encoded_len(2, score));
        piece + score + self.kind.as_ref().map_or(0, |kind| encoding::int32::encoded_len(3, kind))
    }

    fn clear(&mut self) {
        *self = Piece::default();
    }
}

/// Whose rules say what added tokens become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rules {
    /// The common ones.
    Common,
    /// Phi-3's: no guesses from the look of a token, and tokenizer.json counts as well.
    Phi3,
    /// InternLM2's: those of Phi-3; pieces named as unused are, and the one of a zero byte gets another name.
    InternLm2,
}

/// Whether the model puts a space before a text; `None` if it is damaged.
pub(super) fn adds_space(bytes: &[u8]) -> Option<bool> {
    let model = ModelProto::decode(bytes).ok()?;
    Some(model.normalizer.and_then(|normalizer| normalizer.add_dummy_prefix).unwrap_or(true))
}

/// True for the other kind of file of this name: lines of a token in base64 and its rank.
pub(super) fn is_tiktoken(bytes: &[u8]) -> bool {
    let line = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = std::str::from_utf8(line).unwrap_or_default();
    let is_base64 = |text: &str| {
        !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+/=".contains(&byte))
    };
    line.split_once(' ').is_some_and(|(token, rank)| is_base64(token) && rank.trim_end().parse::<u64>().is_ok())
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
    let piece_count = model.pieces.len().min(size as usize);
    for (id, piece) in model.pieces.into_iter().enumerate().take(piece_count) {
        let kind = match piece.kind {
            Some(2) => TokenType::Unknown,
            Some(3) => TokenType::Control,
            Some(5) => TokenType::Unused,
            Some(6) => TokenType::Byte,
            // The reference converter takes user-defined pieces as normal ones.
            _ => TokenType::Normal,
        };
        let mut text = piece.piece.unwrap_or_default();
        let kind = match rules {
            Rules::InternLm2 if text.starts_with("[UNUSED") => TokenType::Unused,
            _ => kind,
        };
        if rules == Rules::InternLm2 && text == "\0" {
            text = "🐉".to_owned();
        }
        vocabulary.set(id, text.into_bytes(), piece.score.unwrap_or(0.0), kind);
    }
    union::compare_pieces(sources, &vocabulary.tokens[..piece_count], warnings);
    let mut skipped = 0;
    for (token, id) in sources.added_file()? {
        match id < size {
            true => vocabulary.set(id as usize, token.into_bytes(), ADDED_SCORE, TokenType::UserDefined),
            false => skipped += 1,
        }
    }
    let configured: HashSet<u64> = sources.configured_tokens()?.iter().map(|token| token.id).collect();
    let mut contradictions = Contradictions::between([FILE, TOKENIZER], TOKENIZER);
    let mut added: Vec<AddedToken> = union::added_tokens(sources, warnings)?.into_values().collect();
    added.sort_unstable_by_key(|token| token.id);
    for token in added {
        if token.id >= size {
            skipped += 1;
            continue;
        }
        let id = token.id as usize;
        let (text, kind) = match rules {
            Rules::Phi3 | Rules::InternLm2 if token.special => (token.content, TokenType::Control),
            Rules::Phi3 | Rules::InternLm2 => (token.content, TokenType::UserDefined),
            Rules::Common if token.special || looks_special(&token.content) => (token.content, TokenType::Control),
            Rules::Common => (token.content.replace('▁', " "), TokenType::UserDefined),
        };
        if rules == Rules::Common && !configured.contains(&token.id) {
            let same = vocabulary.tokens[id] == text.as_bytes();
            // What the model says of these is more than that they are added.
            if same && matches!(vocabulary.types[id], TokenType::Unknown | TokenType::Control | TokenType::Byte) {
                continue;
            }
            let piece = String::from_utf8_lossy(&vocabulary.tokens[id]).replace('▁', " ");
            if id < piece_count && piece != text.replace('▁', " ") {
                contradictions.add(token.id, [&shown(&vocabulary.tokens[id]), &shown(text.as_bytes())]);
            }
        }
        vocabulary.set(id, text.into_bytes(), ADDED_SCORE, kind);
    }
    contradictions.note(warnings);
    if skipped > 0 {
        warnings.push(format!(
            "{skipped} added tokens have ids above config.json's vocabulary of {size}; they are left out"
        ));
    }
    Ok(vocabulary)
}
