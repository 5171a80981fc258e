//! The vocabulary: tokens, scores, attributes and the ids of special tokens, read from `tokenizer.ggml.*`.

use std::collections::hash_map::Entry;

use super::pretokenize::{self, Flags, PreTokenizer};
use super::{Map, TokenizerError};
use crate::gguf::{Metadata, ValueType, shown};

/// Bits of a token's attributes.
pub(super) mod attr {
    pub(crate) const UNKNOWN: u8 = 1;
    pub(crate) const UNUSED: u8 = 2;
    pub(crate) const NORMAL: u8 = 4;
    pub(crate) const CONTROL: u8 = 8;
    pub(crate) const USER_DEFINED: u8 = 16;
    pub(crate) const BYTE: u8 = 32;
    /// White space before the token is dropped.
    pub(crate) const LSTRIP: u8 = 64;
    /// White space after the token is dropped.
    pub(crate) const RSTRIP: u8 = 128;
}

const KEY_MODEL: &str = "tokenizer.ggml.model";
const KEY_PRE: &str = "tokenizer.ggml.pre";
const KEY_TOKENS: &str = "tokenizer.ggml.tokens";
const KEY_SCORES: &str = "tokenizer.ggml.scores";
const KEY_TYPES: &str = "tokenizer.ggml.token_type";
const KEY_ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
const KEY_ADD_EOS: &str = "tokenizer.ggml.add_eos_token";

/// Suffix that keeps DNA words apart from ordinary tokens of the same letters (`hybriddna`).
pub(super) const DNA_MARKER: &[u8] = "\u{e000}".as_bytes();

/// The algorithm, by `tokenizer.ggml.model`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Model {
    /// `llama`: SentencePiece with scores.
    SentencePiece,
    /// `gpt2`, `gemma4`: merges.
    BytePair,
    /// `whitespace`: merges inside words, white space is dropped.
    WhitespaceWords,
    /// `hybriddna`: merges, and words of six letters between `<dna>` and `</dna>`.
    HybridDna,
    /// `bert`.
    WordPiece,
    /// `t5`: unigram language model.
    Unigram,
    /// `rwkv`: longest match.
    Rwkv,
    /// `plamo2`.
    Plamo,
}

const MODELS: [(&str, Model); 9] = [
    ("llama", Model::SentencePiece),
    ("gpt2", Model::BytePair),
    ("gemma4", Model::BytePair),
    ("whitespace", Model::WhitespaceWords),
    ("hybriddna", Model::HybridDna),
    ("bert", Model::WordPiece),
    ("t5", Model::Unigram),
    ("rwkv", Model::Rwkv),
    ("plamo2", Model::Plamo),
];

impl Model {
    pub(crate) fn has_merges(self) -> bool {
        matches!(self, Model::BytePair | Model::WhitespaceWords | Model::HybridDna)
    }
}

/// Ids of the tokens with a role.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct SpecialIds {
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub unk: Option<u32>,
    pub sep: Option<u32>,
}

pub(super) struct Vocab {
    pub file: String,
    pub model: Model,
    pub pre: Option<&'static PreTokenizer>,
    /// The name by which `pre` was asked for.
    pub pre_name: String,
    pub texts: Vec<Box<[u8]>>,
    pub ids: Map<Box<[u8]>, u32>,
    /// Empty where the file has none.
    pub scores: Vec<f32>,
    /// Attributes as the file has them, before the corrections by name.
    pub file_attrs: Vec<u8>,
    pub attrs: Vec<u8>,
    pub special: SpecialIds,
    pub add_bos: bool,
    pub add_eos: bool,
    pub add_space_prefix: bool,
    pub escape_spaces: bool,
    pub remove_extra_whitespaces: bool,
    pub lowercase: bool,
    pub strip_accents: bool,
    /// Bytes of the longest token.
    pub max_token_len: usize,
    pub warnings: Vec<String>,
}

impl Vocab {
    pub(crate) fn read(metadata: &Metadata, pre_override: Option<&str>) -> Result<Vocab, TokenizerError> {
        let file = metadata.file().to_owned();
        let mut warnings = Vec::new();
        let model_name = metadata.str(KEY_MODEL)?.ok_or_else(|| metadata.missing(KEY_MODEL))?;
        let model = MODELS.iter().find(|(name, _)| *name == model_name).map(|(_, model)| *model).ok_or_else(|| {
            let supported: Vec<_> = MODELS.iter().map(|(name, _)| *name).collect();
            TokenizerError::Model {
                file: file.clone(),
                found: shown(model_name.as_bytes()),
                supported: supported.join(" "),
            }
        })?;
        let file_pre = metadata.bytes(KEY_PRE)?.unwrap_or_default();
        let (pre_bytes, origin) = match pre_override {
            Some(name) => (name.as_bytes(), "--pre"),
            None if model_name == "gemma4" => (b"gemma4".as_slice(), KEY_MODEL),
            None => (file_pre, KEY_PRE),
        };
        let unknown = || TokenizerError::pre_tokenizer(&file, pre_bytes, origin);
        let mut pre_name = std::str::from_utf8(pre_bytes).map_err(|_| unknown())?.to_owned();
        let mut pre = None;
        if model.has_merges() {
            if pre_name.is_empty() && pre_override.is_none() {
                pre_name = "default".into();
                warnings.push(format!(
                    "{file}: {KEY_PRE} is missing, text is split by \"default\", which may not be what the model \
                     learned; name the right one with --pre NAME"
                ));
            }
            pre = Some(pretokenize::find(&pre_name).ok_or_else(unknown)?);
        } else if pre_override.is_some() {
            pretokenize::find(&pre_name).ok_or_else(unknown)?;
            warnings.push(format!("{file}: --pre has no effect on a tokenizer of model {model_name}"));
        }
        let flags = pre.map_or_else(Flags::default, |pre| pre.flags);

        let (texts, ids) = read_tokens(metadata)?;
        let count = texts.len();
        let scores = read_scores(metadata, count)?;
        let file_attrs = read_attrs(metadata, count)?;
        let special = read_special_ids(metadata, model, model_name, flags, count)?;
        let flag = |key: &str, default: bool| metadata.bool(key).map(|found| found.unwrap_or(default));
        let bert_like = model == Model::WordPiece;
        let sentence_piece = model == Model::SentencePiece;
        let lowercase = flag("tokenizer.ggml.normalizer.lowercase", pre_name != "whitespace")?;
        let mut vocab = Vocab {
            model,
            pre,
            attrs: file_attrs.clone(),
            file_attrs,
            special,
            add_bos: flags.force_bos | flag(KEY_ADD_BOS, flags.add_bos || sentence_piece || bert_like)?,
            add_eos: flag(KEY_ADD_EOS, model == Model::Unigram)?,
            add_space_prefix: flag("tokenizer.ggml.add_space_prefix", sentence_piece)?,
            escape_spaces: if pre.is_some() { flags.escape_spaces } else { true },
            remove_extra_whitespaces: flag("tokenizer.ggml.remove_extra_whitespaces", false)?,
            lowercase,
            strip_accents: flag("tokenizer.ggml.normalizer.strip_accents", lowercase)?,
            max_token_len: texts.iter().map(|text| text.len()).max().unwrap_or(0),
            file,
            pre_name,
            texts,
            ids,
            scores,
            warnings,
        };
        vocab.require_special_tokens()?;
        vocab.correct_attrs(metadata)?;
        Ok(vocab)
    }

    pub(crate) fn len(&self) -> usize {
        self.texts.len()
    }

    pub(crate) fn id(&self, text: &[u8]) -> Option<u32> {
        self.ids.get(text).copied()
    }

    pub(crate) fn score(&self, id: u32) -> f32 {
        self.scores.get(id as usize).copied().unwrap_or(0.0)
    }

    /// The token `<0xXX>` of a byte.
    pub(crate) fn byte_token(&self, byte: u8) -> Option<u32> {
        self.id(format!("<0x{byte:02X}>").as_bytes())
    }

    fn require_special_tokens(&self) -> Result<(), TokenizerError> {
        let bert_like = self.model == Model::WordPiece;
        let needed = [
            ("bos", self.special.bos, self.add_bos || bert_like, "texts begin with BOS"),
            ("eos", self.special.eos, self.add_eos, "texts end with EOS"),
            ("seperator", self.special.sep, bert_like, "texts end with the separator"),
            ("unknown", self.special.unk, bert_like || self.model == Model::Unigram, "text may have unknown words"),
        ];
        for (role, id, is_needed, why) in needed {
            if is_needed && id.is_none() {
                let key = format!("tokenizer.ggml.{role}_token_id");
                let problem = format!("names no token of the {} in {KEY_TOKENS}, but {why}", self.len());
                return Err(TokenizerError::key(&self.file, &key, problem));
            }
        }
        Ok(())
    }

    /// Corrections that llama.cpp makes because converters got types wrong or could not express them.
    fn correct_attrs(&mut self, metadata: &Metadata) -> Result<(), TokenizerError> {
        for (keys, names) in FILL_IN_TOKENS {
            let named = keys.iter().map(|key| metadata.u64(key)).collect::<Result<Vec<_>, _>>()?;
            if !named.into_iter().flatten().any(|id| id < self.len() as u64) {
                let first = names.iter().filter_map(|name| self.id(name.as_bytes())).min();
                self.change_attr(first, |attrs| attrs | attr::CONTROL);
            }
        }
        for name in END_TOKENS {
            self.change_attr(self.id(name.as_bytes()), |attrs| attrs | attr::CONTROL);
        }
        for name in ["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"] {
            self.change_attr(self.id(name.as_bytes()), |_| attr::USER_DEFINED);
        }
        let has = |name: &str| self.id(name.as_bytes()).is_some();
        let ends_are_calls = (has("<|call|>") || has("<|calls|>")) && (has("<|return|>") || has("<|flush|>"));
        let has_tool_response = has("<|tool_response>");
        if ends_are_calls {
            self.change_attr(self.id(b"<|end|>"), |_| attr::USER_DEFINED);
        }
        if has_tool_response {
            self.change_attr(self.id(b"</s>"), |_| attr::NORMAL);
        }

        let model_name = metadata.bytes("general.name")?.unwrap_or_default().to_ascii_lowercase();
        let architecture = metadata.bytes("general.architecture")?.unwrap_or_default();
        let contains = |text: &[u8], part: &str| text.windows(part.len()).any(|window| window == part.as_bytes());
        if ["jina-v2-de", "jina-v2-es", "jina-v2-code"].iter().any(|pre| self.pre_name.contains(pre))
            || ["nomic-bert-moe", "jina-bert-v3"].iter().any(|name| contains(architecture, name))
        {
            self.change_attr(self.id(b"<mask>"), |attrs| attrs | attr::LSTRIP);
        } else if contains(&model_name, "phi-3") || contains(&model_name, "phi3") {
            for id in self.special_tokens() {
                self.change_attr(Some(id), |attrs| attrs | attr::RSTRIP);
            }
            self.change_attr(self.id(b"</s>"), |attrs| attrs | attr::RSTRIP);
            for name in ["<unk>", "<s>", "<|endoftext|>"] {
                self.change_attr(self.id(name.as_bytes()), |attrs| attrs & !attr::RSTRIP);
            }
        } else if contains(&model_name, "modern-bert") {
            self.change_attr(self.id(b"[MASK]"), |attrs| attrs | attr::LSTRIP);
        }
        Ok(())
    }

    fn change_attr(&mut self, id: Option<u32>, change: impl Fn(u8) -> u8) {
        if let Some(attrs) = id.and_then(|id| self.attrs.get_mut(id as usize)) {
            *attrs = change(*attrs);
        }
    }

    /// Tokens that are looked for in text before anything else, in order of id.
    pub(crate) fn special_tokens(&self) -> Vec<u32> {
        let is_special =
            |id: &u32| self.attrs[*id as usize] & (attr::CONTROL | attr::USER_DEFINED | attr::UNKNOWN) != 0;
        (0..self.len() as u32).filter(is_special).collect()
    }

    /// Takes the markers off the words of DNA; `ids` keeps them.
    pub(crate) fn drop_dna_markers(&mut self) {
        let Some(first) = self.id(b"<oov>") else { return };
        for text in &mut self.texts[first as usize + 1..] {
            if text.len() > DNA_MARKER.len() && text.ends_with(DNA_MARKER) {
                *text = text[..text.len() - DNA_MARKER.len()].into();
            }
        }
    }
}

/// Tokens that end a text, a turn or a call: control tokens whatever their type in the file.
const END_TOKENS: [&str; 22] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];

type KeysAndNames = (&'static [&'static str], &'static [&'static str]);

/// Tokens of fill-in-the-middle prompts: where none of the keys names one, a token with one of the names is a control
/// token.
const FILL_IN_TOKENS: [KeysAndNames; 6] = [
    (
        &["tokenizer.ggml.fim_pre_token_id", "tokenizer.ggml.prefix_token_id"],
        &[
            "<|fim_prefix|>",
            "<fim-prefix>",
            "<fim_prefix>",
            "<｜fim▁begin｜>",
            "<PRE>",
            "▁<PRE>",
            "<|code_prefix|>",
            "<|prefix|>",
        ],
    ),
    (
        &["tokenizer.ggml.fim_suf_token_id", "tokenizer.ggml.suffix_token_id"],
        &[
            "<|fim_suffix|>",
            "<fim-suffix>",
            "<fim_suffix>",
            "<｜fim▁hole｜>",
            "<SUF>",
            "▁<SUF>",
            "<|code_suffix|>",
            "<|suffix|>",
        ],
    ),
    (
        &["tokenizer.ggml.fim_mid_token_id", "tokenizer.ggml.middle_token_id"],
        &[
            "<|fim_middle|>",
            "<fim-middle>",
            "<fim_middle>",
            "<｜fim▁end｜>",
            "<MID>",
            "▁<MID>",
            "<|code_middle|>",
            "<|middle|>",
        ],
    ),
    (&["tokenizer.ggml.fim_pad_token_id"], &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"]),
    (&["tokenizer.ggml.fim_rep_token_id"], &["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"]),
    (&["tokenizer.ggml.fim_sep_token_id"], &["<|file_sep|>"]),
];

type TokenTexts = (Vec<Box<[u8]>>, Map<Box<[u8]>, u32>);

fn read_tokens(metadata: &Metadata) -> Result<TokenTexts, TokenizerError> {
    let file = metadata.file();
    let array = metadata.array(KEY_TOKENS)?.ok_or_else(|| metadata.missing(KEY_TOKENS))?;
    let strings = array.iter_str()?;
    let count = strings.size_hint().1.unwrap_or(0);
    if array.is_empty() {
        return Err(TokenizerError::key(file, KEY_TOKENS, "is empty"));
    }
    if u32::try_from(array.len()).is_err() || array.len() > i32::MAX as u64 {
        return Err(TokenizerError::key(file, KEY_TOKENS, format!("has {} tokens, more than ids", array.len())));
    }
    let mut texts: Vec<Box<[u8]>> = Vec::with_capacity(count);
    let mut ids = Map::with_capacity_and_hasher(count, Default::default());
    for (id, text) in strings.enumerate() {
        // llama.cpp names empty tokens so; they match nothing.
        let text: Box<[u8]> = if text.is_empty() { format!("[EMPTY_{id}]").into_bytes().into() } else { text.into() };
        match ids.entry(text.clone()) {
            Entry::Vacant(free) => {
                free.insert(id as u32);
            }
            Entry::Occupied(first) => {
                let problem = format!("has the same text, {}, for ids {} and {id}", shown(&text), first.get());
                return Err(TokenizerError::key(file, KEY_TOKENS, problem));
            }
        }
        texts.push(text);
    }
    if texts.len() as u64 != array.len() {
        return Err(TokenizerError::key(file, KEY_TOKENS, "changed while it was read"));
    }
    Ok((texts, ids))
}

fn read_scores(metadata: &Metadata, count: usize) -> Result<Vec<f32>, TokenizerError> {
    let Some(array) = metadata.array(KEY_SCORES)? else { return Ok(Vec::new()) };
    let scores = match array.elem_type() {
        ValueType::F32 => array.to_f32_vec()?,
        ValueType::I32 => array.to_i64_vec()?.into_iter().map(|score| score as f32).collect(),
        other => return Err(wrong_elements(metadata, KEY_SCORES, other, "f32 or i32")),
    };
    check_count(metadata, KEY_SCORES, scores.len(), count)?;
    if let Some(id) = scores.iter().position(|score| score.is_nan()) {
        return Err(TokenizerError::key(metadata.file(), KEY_SCORES, format!("is NaN for token {id}")));
    }
    Ok(scores)
}

fn read_attrs(metadata: &Metadata, count: usize) -> Result<Vec<u8>, TokenizerError> {
    let Some(array) = metadata.array(KEY_TYPES)? else { return Ok(vec![attr::NORMAL; count]) };
    if array.elem_type() != ValueType::I32 {
        return Err(wrong_elements(metadata, KEY_TYPES, array.elem_type(), "i32"));
    }
    let types = array.to_i64_vec()?;
    check_count(metadata, KEY_TYPES, types.len(), count)?;
    let attr_of_type = |token_type: i64| match token_type {
        1 => attr::NORMAL,
        2 => attr::UNKNOWN,
        3 => attr::CONTROL,
        4 => attr::USER_DEFINED,
        5 => attr::UNUSED,
        6 => attr::BYTE,
        _ => 0,
    };
    Ok(types.into_iter().take(count).map(attr_of_type).collect())
}

fn wrong_elements(metadata: &Metadata, key: &str, found: ValueType, expected: &str) -> TokenizerError {
    TokenizerError::key(metadata.file(), key, format!("is an array of {found}, expected {expected}"))
}

/// Longer arrays pass, as in llama.cpp.
fn check_count(metadata: &Metadata, key: &str, found: usize, tokens: usize) -> Result<(), TokenizerError> {
    if found >= tokens {
        return Ok(());
    }
    let problem = format!("has {found} values for the {tokens} tokens of {KEY_TOKENS}");
    Err(TokenizerError::key(metadata.file(), key, problem))
}

fn read_special_ids(
    metadata: &Metadata,
    model: Model,
    model_name: &str,
    flags: Flags,
    count: usize,
) -> Result<SpecialIds, TokenizerError> {
    let none = SpecialIds::default();
    let mut special = match model {
        Model::SentencePiece | Model::Plamo => SpecialIds { bos: Some(1), eos: Some(2), unk: Some(0), ..none },
        Model::WordPiece => SpecialIds { bos: Some(101), unk: Some(100), sep: Some(102), ..none },
        Model::Unigram => SpecialIds { eos: Some(1), unk: Some(2), ..none },
        Model::Rwkv => none,
        _ if model_name == "gemma4" => none,
        _ => SpecialIds { bos: Some(11), eos: Some(11), ..none },
    };
    if flags.no_default_bos {
        special.bos = None;
    }
    let slots = [
        ("tokenizer.ggml.bos_token_id", &mut special.bos),
        ("tokenizer.ggml.eos_token_id", &mut special.eos),
        ("tokenizer.ggml.unknown_token_id", &mut special.unk),
        ("tokenizer.ggml.seperator_token_id", &mut special.sep),
    ];
    for (key, slot) in slots {
        *slot = slot.filter(|id| (*id as usize) < count);
        if let Some(id) = metadata.u64(key)? {
            if id >= count as u64 {
                let problem = format!("is {id}, but {KEY_TOKENS} has {count} tokens");
                return Err(TokenizerError::key(metadata.file(), key, problem));
            }
            *slot = Some(id as u32);
        }
    }
    Ok(special)
}
