//! Text to token ids, as llama.cpp b10605 does it, from the vocabulary in a GGUF's metadata.
//!
//! [`Tokenizer::encode`] works in three steps: added and special tokens are found in the text (`special`); the rest
//! is cut and merged by the model of the vocabulary (`bpe`, `sentencepiece`, `wordpiece`, `unigram`,
//! `rwkv`, `plamo`); BOS, EOS or separators are put around. Text may be any bytes.

mod bpe;
pub(crate) mod byte_alphabet;
mod error;
mod plamo;
mod prefix_index;
pub mod pretokenize;
mod rwkv;
mod sentencepiece;
mod special;
mod unicode;
mod unigram;
mod vocab;
mod wordpiece;

use std::borrow::Cow;

use crate::gguf::Metadata;
pub use error::TokenizerError;
use special::{Fragment, SpecialTokens};
use vocab::{Model, Vocab, attr};

/// Hash table of the vocabularies: seeded at random, results do not depend on its order.
type Map<K, V> = std::collections::HashMap<K, V, foldhash::fast::RandomState>;

/// How SentencePiece writes a space, U+2581.
const SPACE: &[u8] = "▁".as_bytes();

/// A vocabulary, ready to tokenize.
pub struct Tokenizer {
    vocab: Vocab,
    special: SpecialTokens,
    algorithm: Algorithm,
}

enum Algorithm {
    BytePair(Box<bpe::BytePair>),
    SentencePiece(Box<sentencepiece::SentencePiece>),
    WordPiece(wordpiece::WordPiece),
    Unigram(Box<unigram::Unigram>),
    Rwkv(rwkv::Rwkv),
    Plamo(plamo::Plamo),
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Vocab { file, model, pre_name, .. } = &self.vocab;
        write!(f, "Tokenizer({file}: {model:?}, pre {pre_name:?}, {} tokens)", self.len())
    }
}

impl Tokenizer {
    /// Builds the tokenizer that a file's metadata describes; `pre_override` replaces `tokenizer.ggml.pre`.
    ///
    /// # Errors
    /// If keys are missing, have wrong types or contradict each other, or if the model of the tokenizer or the
    /// pre-tokenizer is not known.
    pub fn from_gguf(metadata: &Metadata, pre_override: Option<&str>) -> Result<Tokenizer, TokenizerError> {
        let mut vocab = Vocab::read(metadata, pre_override)?;
        let algorithm = match vocab.model {
            Model::BytePair | Model::WhitespaceWords | Model::HybridDna => {
                let bpe = bpe::BytePair::new(metadata, &mut vocab)?;
                if vocab.model == Model::HybridDna {
                    vocab.drop_dna_markers();
                }
                // `bpe` has its own.
                vocab.ids = Map::default();
                Algorithm::BytePair(Box::new(bpe))
            }
            Model::SentencePiece => Algorithm::SentencePiece(Box::new(sentencepiece::SentencePiece::new(&vocab))),
            Model::WordPiece => Algorithm::WordPiece(wordpiece::WordPiece::new(&vocab)),
            Model::Unigram => Algorithm::Unigram(Box::new(unigram::Unigram::new(metadata, &vocab)?)),
            Model::Rwkv => Algorithm::Rwkv(rwkv::Rwkv::new(&vocab)),
            Model::Plamo => Algorithm::Plamo(plamo::Plamo::new(&vocab)?),
        };
        Ok(Tokenizer { special: SpecialTokens::new(&vocab), vocab, algorithm })
    }

    /// The ids of a text (`llama_tokenize`).
    ///
    /// With `add_special`, BOS, EOS or separators are added as the vocabulary says. With `parse_special`, control
    /// tokens such as `<|im_start|>` are recognized in the text; user-defined tokens always are.
    pub fn encode(&self, text: impl AsRef<[u8]>, add_special: bool, parse_special: bool) -> Vec<u32> {
        let vocab = &self.vocab;
        // llama.cpp adds nothing to these, whatever the file says.
        let has_ends = !matches!(self.algorithm, Algorithm::Rwkv(_) | Algorithm::Plamo(_));
        let bert_like = matches!(self.algorithm, Algorithm::WordPiece(_));
        let mut out = Vec::new();
        if add_special && has_ends && (vocab.add_bos || bert_like) {
            out.extend(vocab.special.bos);
        }
        let mut after_token = true;
        for fragment in self.special.partition(text.as_ref(), parse_special) {
            match fragment {
                Fragment::Token(id) => out.push(id),
                Fragment::Text(text) => self.encode_text(text, after_token, &mut out),
            }
            after_token = matches!(fragment, Fragment::Token(_));
        }
        if add_special && bert_like {
            out.extend(vocab.special.sep);
        } else if add_special && has_ends && vocab.add_eos {
            out.extend(vocab.special.eos);
        }
        out
    }

    fn encode_text(&self, text: &[u8], after_token: bool, out: &mut Vec<u32>) {
        match &self.algorithm {
            Algorithm::BytePair(bpe) => bpe.encode(text, out),
            Algorithm::SentencePiece(pieces) if self.vocab.add_space_prefix && after_token => {
                pieces.encode(&self.vocab, &[b" ", text].concat(), out);
            }
            Algorithm::SentencePiece(pieces) => pieces.encode(&self.vocab, text, out),
            Algorithm::WordPiece(words) => words.encode(&self.vocab, text, out),
            Algorithm::Unigram(unigram) => unigram.encode(text, out),
            Algorithm::Rwkv(rwkv) => rwkv.encode(text, out),
            Algorithm::Plamo(plamo) => plamo.encode(text, out),
        }
    }

    /// The bytes that a token stands for, special tokens by their names; empty for ids out of range
    /// (`llama_token_to_piece`).
    pub fn token_bytes(&self, id: u32) -> Cow<'_, [u8]> {
        let Some(text) = self.vocab.texts.get(id as usize) else { return Cow::Borrowed(&[]) };
        let attrs = self.vocab.attrs[id as usize];
        if self.vocab.model == Model::Rwkv {
            return Cow::Owned(rwkv::unescape(text));
        }
        if attrs & (attr::UNKNOWN | attr::CONTROL | attr::USER_DEFINED) != 0 {
            return Cow::Borrowed(text);
        }
        if self.vocab.model == Model::Plamo && attrs & attr::BYTE == 0 {
            return Cow::Borrowed(text);
        }
        if attrs & attr::NORMAL != 0 {
            if self.vocab.escape_spaces {
                return Cow::Owned(replace(text, SPACE, b" "));
            }
            let mut out = Vec::with_capacity(text.len());
            for code_point in unicode::code_points(text) {
                match byte_alphabet::byte_of(code_point) {
                    Some(byte) => out.push(byte),
                    None => unicode::encode(code_point, &mut out),
                }
            }
            return Cow::Owned(out);
        }
        let hex = text.strip_prefix(b"<0x").and_then(|rest| rest.get(..2));
        let byte = hex.and_then(|hex| std::str::from_utf8(hex).ok()).and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match byte {
            Some(byte) if attrs & attr::BYTE != 0 => Cow::Owned(vec![byte]),
            _ => Cow::Borrowed(&[]),
        }
    }

    /// The bytes of a sequence of tokens, one after the other; the space that `encode` puts in front is removed.
    pub fn decode(&self, ids: &[u32]) -> Vec<u8> {
        let mut out = Vec::new();
        for id in ids {
            out.extend_from_slice(&self.token_bytes(*id));
        }
        if self.vocab.add_space_prefix && out.first() == Some(&b' ') {
            out.remove(0);
        }
        out
    }

    /// Beginning of sequence.
    pub fn bos(&self) -> Option<u32> {
        self.vocab.special.bos
    }

    /// End of sequence.
    pub fn eos(&self) -> Option<u32> {
        self.vocab.special.eos
    }

    /// Whether texts begin with BOS (`llama_vocab_get_add_bos`).
    pub fn adds_bos(&self) -> bool {
        self.vocab.add_bos
    }

    /// Whether texts end with EOS (`llama_vocab_get_add_eos`).
    pub fn adds_eos(&self) -> bool {
        self.vocab.add_eos
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.vocab.len()
    }

    /// False: a vocabulary without tokens is refused.
    pub fn is_empty(&self) -> bool {
        self.vocab.len() == 0
    }

    /// The pre-tokenizer's name; empty for models that have none.
    pub fn pre_name(&self) -> &str {
        &self.vocab.pre_name
    }

    /// What was wrong with the vocabulary but could be passed over: one line each.
    pub fn warnings(&self) -> &[String] {
        &self.vocab.warnings
    }
}

/// Writes spaces as SentencePiece does.
fn replace_spaces(text: &[u8]) -> Vec<u8> {
    replace(text, b" ", SPACE)
}

fn replace(text: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len() + text.len() / 4);
    let mut done = 0;
    for at in memchr::memmem::find_iter(text, from) {
        out.extend_from_slice(&text[done..at]);
        out.extend_from_slice(to);
        done = at + from.len();
    }
    out.extend_from_slice(&text[done..]);
    out
}
