//! The vocabulary: tokens, scores, types and special ids, as `tokenizer.*` keys.
//!
//! Which files count, and in which order, follows llama.cpp b10605 (`conversion/*.py`, `gguf-py/gguf/vocab.py`).

mod byte_level;
mod families;
mod merged;
mod sentencepiece;
mod special;
mod tokenizer_json;
mod union;

use sentencepiece::Rules;
use special::Special;
use tokenizer_json::Sources;

use super::architectures::{Row, VocabularyKind};
use super::files::Folder;
use super::{ConvertError, Options};
use crate::gguf::{Array, Metadata, Value, ValueType};

/// Parses tokenizer.json and recognizes its pre-tokenizer; for the fuzz target.
pub(super) fn recognize_bytes(bytes: &[u8]) -> Option<&'static str> {
    let json: tokenizer_json::TokenizerJson = serde_json::from_slice(bytes).ok()?;
    families::recognize(&json).ok()
}

/// `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TokenType {
    Normal = 1,
    Unknown = 2,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

/// Tokens with what is known of each.
#[derive(Debug)]
struct Vocabulary {
    /// `tokenizer.ggml.model`.
    model: &'static str,
    /// `tokenizer.ggml.pre`.
    pre: String,
    tokens: Vec<Vec<u8>>,
    /// Empty for byte-level vocabularies.
    scores: Vec<f32>,
    types: Vec<TokenType>,
    merges: Vec<String>,
}

impl Vocabulary {
    /// `size` unused tokens of a SentencePiece vocabulary.
    fn padding(size: u64, score: f32) -> Vocabulary {
        Vocabulary {
            model: "llama",
            pre: "default".to_owned(),
            tokens: (0..size).map(padding_token).collect(),
            scores: vec![score; size as usize],
            types: vec![TokenType::Unused; size as usize],
            merges: Vec::new(),
        }
    }

    fn set(&mut self, id: usize, text: Vec<u8>, score: f32, kind: TokenType) {
        self.tokens[id] = text;
        self.scores[id] = score;
        self.types[id] = kind;
    }

    /// Makes tokens ones that are shown, whatever else they are.
    fn show(&mut self, shown: &[&str]) {
        for (token, kind) in self.tokens.iter().zip(&mut self.types) {
            if shown.iter().any(|text| text.as_bytes() == token) {
                *kind = TokenType::UserDefined;
            }
        }
    }

    fn write(&self, metadata: &mut Metadata) {
        metadata.set("tokenizer.ggml.model", self.model);
        if !self.pre.is_empty() {
            metadata.set("tokenizer.ggml.pre", self.pre.as_str());
        }
        metadata.set("tokenizer.ggml.tokens", Array::of_strings(&self.tokens));
        if !self.scores.is_empty() {
            let scores: Vec<Value> = self.scores.iter().map(|score| Value::F32(*score)).collect();
            metadata.set("tokenizer.ggml.scores", Array::of_values(ValueType::F32, &scores));
        }
        let types: Vec<Value> = self.types.iter().map(|kind| Value::I32(*kind as i32)).collect();
        metadata.set("tokenizer.ggml.token_type", Array::of_values(ValueType::I32, &types));
        if !self.merges.is_empty() {
            metadata.set("tokenizer.ggml.merges", Array::of_strings(&self.merges));
        }
    }
}

/// Gemma 4's tokens around thoughts and calls of tools, which a program that reads answers must see.
const GEMMA4_SHOWN: [&str; 7] =
    ["<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", "<|\"|>"];

fn padding_token(id: u64) -> Vec<u8> {
    format!("[PAD{id}]").into_bytes()
}

/// True for tokens that are for control by their look, whatever the publisher's flag says.
fn looks_special(text: &str) -> bool {
    let framed = |start: &str, end: &str| text.starts_with(start) && text.ends_with(end);
    matches!(text, "<pad>" | "<mask>" | "<2mass>" | "[@BOS@]")
        || framed("<|", "|>")
        || framed("<｜", "｜>")
        || framed("<unused", ">")
}

/// Writes the `tokenizer.*` keys; `size` is the vocabulary of `config.json`, to which the tokens are padded.
pub(super) fn write(
    folder: &Folder,
    row: &Row,
    size: u64,
    options: &Options,
    metadata: &mut Metadata,
    warnings: &mut Vec<String>,
) -> Result<(), ConvertError> {
    let sources = Sources::read(folder)?;
    let model_file = match row.vocabulary {
        VocabularyKind::ByteLevel | VocabularyKind::Hunyuan | VocabularyKind::Gemma4 => None,
        VocabularyKind::Phi3 if is_gpt2_class(&sources) => None,
        _ => folder.bytes(sentencepiece::FILE)?,
    };
    let model_file = match model_file {
        Some(bytes) if sources.json.is_some() && sentencepiece::is_tiktoken(&bytes) => {
            warnings.push(format!("{} is a tiktoken vocabulary; tokenizer.json counts", sentencepiece::FILE));
            None
        }
        other => other,
    };
    if matches!(row.vocabulary, VocabularyKind::Llama | VocabularyKind::SentencePiece)
        && let Some(add) = sources.setting("add_prefix_space").and_then(serde_json::Value::as_bool)
    {
        metadata.set("tokenizer.ggml.add_space_prefix", add);
    }
    let rules = match row.vocabulary {
        VocabularyKind::Phi3 => Rules::Phi3,
        VocabularyKind::InternLm2 => Rules::InternLm2,
        _ => Rules::Common,
    };
    let only_pieces = matches!(row.vocabulary, VocabularyKind::SentencePiece | VocabularyKind::InternLm2);
    if only_pieces && model_file.is_none() {
        let problem = "is missing; classes of this kind have their vocabulary there, download the tokenizer again";
        return Err(ConvertError::Json { file: folder.file(sentencepiece::FILE), problem: problem.to_owned() });
    }
    if row.vocabulary == VocabularyKind::InternLm2
        && let Some(add) = model_file.as_deref().and_then(sentencepiece::adds_space)
    {
        metadata.set("tokenizer.ggml.add_space_prefix", add);
    }
    let (vocabulary, limit) = if let Some(bytes) = model_file {
        (sentencepiece::read(&sources, &bytes, size, rules, warnings)?, Some(size))
    } else {
        let json = sources.require_json()?;
        let sentencepiece_like = merged::fits(json);
        match row.vocabulary {
            VocabularyKind::Gemma { .. } | VocabularyKind::Phi3 if sentencepiece_like => {
                (merged::read(&sources, json, size, merged::Scores::Ranks, warnings)?, Some(size))
            }
            VocabularyKind::Gemma4 if sentencepiece_like => {
                let mut vocabulary = merged::read(&sources, json, size, merged::Scores::Equal, warnings)?;
                vocabulary.model = "gemma4";
                vocabulary.merges = byte_level::read_merges(&sources, json)?;
                vocabulary.show(&GEMMA4_SHOWN);
                (vocabulary, None)
            }
            VocabularyKind::Llama if sentencepiece_like => {
                let scores = if options.rank_scores { merged::Scores::Ranks } else { merged::Scores::Equal };
                if scores == merged::Scores::Equal {
                    warnings.push(
                        "there is no tokenizer.model, and tokenizer.json has merges instead of scores: every token gets \
                         the score -1000, as from llama.cpp's converter, and texts are cut unlike in training; \
                         --rank-scores takes scores from the merges"
                            .to_owned(),
                    );
                }
                (merged::read(&sources, json, size, scores, warnings)?, Some(size))
            }
            _ => (byte_level::read(&sources, json, size, options.pre.as_deref(), warnings)?, None),
        }
    };
    if vocabulary.model == "llama"
        && let Some(pre) = &options.pre
    {
        warnings.push(format!("--pre {pre} has no effect: this is a SentencePiece vocabulary"));
    }
    vocabulary.write(metadata);
    let mut special = Special::read(&sources, limit, warnings)?;
    special.give(row.special, &sources, limit, warnings);
    special.write(metadata);
    match row.vocabulary {
        VocabularyKind::Gemma { infill } if vocabulary.model == "llama" => {
            metadata.set("tokenizer.ggml.add_space_prefix", false);
            write_infill(infill, metadata);
        }
        VocabularyKind::Gemma4 => {
            metadata.remove("tokenizer.ggml.pre");
            metadata.set("tokenizer.ggml.add_space_prefix", false);
            metadata.set("tokenizer.ggml.add_bos_token", true);
        }
        VocabularyKind::Hunyuan => write_hunyuan_ends(folder, metadata)?,
        // Code Llama.
        VocabularyKind::Llama if size == 32016 => {
            write_infill(&[("prefix", 32007), ("suffix", 32008), ("middle", 32009), ("eot", 32010)], metadata);
        }
        // Granite's small models; SmolLM has the same size, and no BOS before texts either.
        VocabularyKind::Llama if size == 49152 => metadata.set("tokenizer.ggml.add_bos_token", false),
        _ => {}
    }
    Ok(())
}

/// Infill tokens, which no file names.
fn write_infill(ids: &[(&str, u32)], metadata: &mut Metadata) {
    for (name, id) in ids {
        metadata.set(&format!("tokenizer.ggml.{name}_token_id"), *id);
    }
}

/// Hunyuan's configurations name other ends of texts and turns than its models were trained with.
fn write_hunyuan_ends(folder: &Folder, metadata: &mut Metadata) -> Result<(), ConvertError> {
    let id = |value: &serde_json::Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let config = folder.object("config.json")?.unwrap_or_default();
    // transformers drops the field of a type that it knows, and so the reference does not see it.
    let known = config.get("model_type").and_then(serde_json::Value::as_str) == Some("hunyuan_v1_dense");
    if let Some(end) = config.get("eod_token_id").and_then(id).filter(|_| !known) {
        metadata.set("tokenizer.ggml.eos_token_id", end);
    }
    let generation = folder.object("generation_config.json")?.unwrap_or_default();
    if let Some([end, _, ..]) = generation.get("eos_token_id").and_then(serde_json::Value::as_array).map(Vec::as_slice)
        && let Some(end) = id(end)
    {
        metadata.set("tokenizer.ggml.eot_token_id", end);
    }
    Ok(())
}

fn is_gpt2_class(sources: &Sources) -> bool {
    let class = sources.setting("tokenizer_class").and_then(serde_json::Value::as_str);
    matches!(class, Some("GPT2Tokenizer" | "GPT2TokenizerFast"))
}
