//! Tokenizers built from small vocabularies and from the bundled model. Agreement with llama.cpp on its own
//! vocabularies is checked by `tests/interop/test_tokenizer.py`.

use std::time::{Duration, Instant};

use lwq::gguf::{Array, Gguf, Metadata, Value, ValueType};
use lwq::tokenizer::{Tokenizer, pretokenize};
use proptest::prelude::*;

const DOCLET: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/doclet-4m-f16.gguf");

/// Text, and its ids without and with special tokens parsed, as llama-cpp-python 0.3.36 gives them.
type Expected = (&'static [u8], &'static [u32], Option<&'static [u32]>);

#[rustfmt::skip]
const DOCLET_IDS: &[Expected] = &[
    (b"", &[], None),
    (b"Hello world", &[42, 397, 311, 287, 270, 1459], None),
    (b"  two  spaces\tand\n\n newline ", &[223, 1075, 223, 269, 82, 1804, 200, 386, 201, 201, 709, 1045, 223], None),
    (b"It's DON'T we'll", &[43, 86, 9, 85, 559, 1205, 9, 54, 521, 9, 697], None),
    (b"2024-11-22 3.14159", &[20, 18, 20, 22, 15, 19, 19, 15, 20, 20, 223, 21, 16, 19, 22, 19, 23, 27], None),
    ("naïve façade Straße".as_bytes(),
     &[80, 67, 130, 110, 344, 278, 67, 130, 103, 1743, 391, 324, 67, 130, 256, 71], None),
    ("Привет, мир! 你好 🚀👨\u{200d}👩\u{200d}👧".as_bytes(),
     &[143, 256, 144, 225, 143, 119, 143, 113, 143, 116, 144, 227, 14, 223, 143, 123, 143, 119, 144, 225, 3, 223, 894,
       257, 164, 101, 124, 223, 175, 256, 251, 225, 175, 256, 242, 104, 332, 238, 175, 256, 242, 105, 332, 238, 175,
       256, 242, 103], None),
    (b"<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
     &[30, 94, 316, 65, 2021, 94, 32, 87, 525, 201, 42, 75, 30, 94, 316, 65, 556, 94, 32, 201, 30, 94, 556, 1779, 992,
       94, 32],
     Some(&[1, 87, 525, 201, 42, 75, 2, 201, 0])),
    (b"fn main() { println!(\"{}\", x[0] + 1); }",
     &[592, 653, 295, 342, 618, 1894, 1198, 620, 61, 18, 63, 939, 223, 19, 450, 519], None),
    ("a\u{a0}b\u{3000}c\u{200b}d\u{301}".as_bytes(),
     &[67, 129, 257, 68, 534, 225, 69, 332, 236, 70, 1609], None),
    (b"bad \xff\xc3 utf8\xe2\x82",
     &[68, 330, 223, 174, 126, 124, 174, 126, 124, 223, 302, 72, 26, 174, 126, 124, 174, 126, 124], None),
];

#[test]
fn the_bundled_model_gives_llama_cpps_ids() {
    let gguf = Gguf::open(DOCLET).unwrap();
    let tokenizer = Tokenizer::from_gguf(gguf.metadata(), None).unwrap();
    assert_eq!(tokenizer.pre_name(), "smollm");
    assert_eq!((tokenizer.len(), tokenizer.bos(), tokenizer.eos()), (2048, Some(0), Some(0)));
    assert!(!tokenizer.adds_bos() && tokenizer.warnings().is_empty());
    for (text, plain, special) in DOCLET_IDS {
        assert_eq!(tokenizer.encode(text, true, false), *plain, "{}", text.escape_ascii());
        assert_eq!(tokenizer.encode(text, true, true), special.unwrap_or(plain), "{}", text.escape_ascii());
        if let Ok(valid) = std::str::from_utf8(text) {
            assert_eq!(tokenizer.decode(plain), valid.as_bytes());
        }
    }
}

/// A vocabulary of `model` with the keys that every one has.
fn metadata(model: &str, tokens: &[&str]) -> Metadata {
    let mut metadata = Metadata::new("small.gguf");
    metadata.set("tokenizer.ggml.model", model);
    metadata.set("tokenizer.ggml.tokens", Array::of_strings(tokens));
    metadata
}

fn scores(scores: &[f32]) -> Array {
    Array::of_values(ValueType::F32, &scores.iter().map(|score| Value::F32(*score)).collect::<Vec<_>>())
}

fn types(types: &[i32]) -> Array {
    Array::of_values(ValueType::I32, &types.iter().map(|kind| Value::I32(*kind)).collect::<Vec<_>>())
}

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

/// `<unk> <s> </s>`, then letters and merges of them.
fn small_sentence_piece() -> Metadata {
    let tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁a", "abab", "<x>", "<0xC3>", "<0xA9>", "b▁"];
    let mut metadata = metadata("llama", &tokens);
    let values = [0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -1.0, -2.0, -3.0, 0.0, 0.0, 0.0, -8.0];
    metadata.set("tokenizer.ggml.scores", scores(&values));
    let mut kinds = [NORMAL; 13];
    (kinds[0], kinds[1], kinds[2], kinds[9]) = (UNKNOWN, CONTROL, CONTROL, USER_DEFINED);
    metadata.set("tokenizer.ggml.token_type", types(&kinds));
    metadata
}

#[test]
fn sentence_piece_merges_by_score_and_prefixes_a_space() {
    let tokenizer = Tokenizer::from_gguf(&small_sentence_piece(), None).unwrap();
    assert!(tokenizer.adds_bos() && !tokenizer.adds_eos());
    assert_eq!(tokenizer.encode("abab", true, false), [1, 3, 8], "ab scores higher than ▁a");
    assert_eq!(tokenizer.encode("", true, false), [1]);
    assert_eq!(tokenizer.encode("", false, false), [] as [u32; 0]);
    assert_eq!(tokenizer.encode("b b", false, false), [3, 12, 5], "a token may end in a space");
    assert_eq!(tokenizer.encode("é", false, false), [3, 10, 11], "bytes where there is no token");
    assert_eq!(tokenizer.encode("z", false, false), [3, 0], "unknown where there is no byte either");
    assert_eq!(tokenizer.encode("a<x>a", false, false), [7, 9, 7], "a space after every added token");
    assert_eq!(tokenizer.encode("a<s>a", false, true), [7, 1, 7]);
    assert_eq!(tokenizer.decode(&[7, 9, 7]), b"a<x> a");

    let mut metadata = small_sentence_piece();
    metadata.set("tokenizer.ggml.add_space_prefix", false);
    metadata.set("tokenizer.ggml.add_bos_token", false);
    metadata.set("tokenizer.ggml.add_eos_token", true);
    let tokenizer = Tokenizer::from_gguf(&metadata, None).unwrap();
    assert_eq!(tokenizer.encode("a<x>a", true, false), [4, 9, 4, 2]);
}

#[test]
fn stripping_of_white_space_follows_the_models_name() {
    let mut metadata = small_sentence_piece();
    metadata.set("general.name", "Tiny Phi-3 test");
    let tokenizer = Tokenizer::from_gguf(&metadata, None).unwrap();
    assert_eq!(tokenizer.encode("a<x> \n a", false, false), [7, 9, 7]);
    let tokenizer = Tokenizer::from_gguf(&small_sentence_piece(), None).unwrap();
    assert_eq!(tokenizer.encode("a<x>  a", false, false), [7, 9, 3, 3, 7]);
}

/// All letters of the byte alphabet, then two merges.
fn small_byte_pairs(pre: &str) -> Metadata {
    let letters: Vec<String> = (0x100..0x144u32)
        .chain(0x21..0x7F)
        .chain(0xA1..0xAD)
        .chain(0xAE..0x100)
        .map(|code_point| char::from_u32(code_point).unwrap().to_string())
        .collect();
    assert_eq!(letters.len(), 256);
    let mut tokens: Vec<&str> = letters.iter().map(String::as_str).collect();
    tokens.extend(["ab", "abc", "Ġab", "<|x|>", "abca"]);
    let mut metadata = metadata("gpt2", &tokens);
    metadata.set("tokenizer.ggml.pre", pre);
    metadata.set("tokenizer.ggml.merges", Array::of_strings(["a b", "b c", "ab c", "Ġ ab", "x y", "nospace"]));
    metadata
}

#[test]
fn byte_pairs_merge_by_rank() {
    let tokenizer = Tokenizer::from_gguf(&small_byte_pairs("gpt-2"), None).unwrap();
    let letter = |byte: u8| 68 + u32::from(byte - b'!');
    assert_eq!(tokenizer.encode("abc", false, false), [257]);
    assert_eq!(tokenizer.encode("bc", false, false), [letter(b'b'), letter(b'c')], "a merge without token falls back");
    assert_eq!(tokenizer.encode(" ab", false, false), [258]);
    assert_eq!(tokenizer.encode("abca", false, false), [257, letter(b'a')]);
    assert_eq!(tokenizer.warnings().len(), 1, "{:?}", tokenizer.warnings());
    assert!(tokenizer.warnings()[0].contains("tokenizer.ggml.merges number 5, \"nospace\""));

    let tokenizer = Tokenizer::from_gguf(&small_byte_pairs("gpt-2"), Some("llama-bpe")).unwrap();
    assert_eq!(tokenizer.pre_name(), "llama-bpe");
    assert_eq!(tokenizer.encode("abca", true, false), [11, 260], "whole words and BOS come with the name");
}

#[test]
fn every_name_splits_text_without_losing_a_byte() {
    let text =
        "It's 1234567 x² naïve\r\n\r\n  你好、世界!? \u{a0}\u{3000} ab\tc  ４５ <sentinel:3>IMGIMGAZ ĳ\u{301}\u{0}   ";
    let names: Vec<_> = pretokenize::known_names().collect();
    assert_eq!(names.len(), 87);
    for name in names {
        let tokenizer = Tokenizer::from_gguf(&small_byte_pairs(name), None).unwrap();
        if !["gemma4", "granite-embed-multi-311m", "sarvam-moe", "whitespace"].contains(&name) {
            let ids = tokenizer.encode(text, false, false);
            assert_eq!(tokenizer.decode(&ids), text.as_bytes(), "{name}");
        }
    }
}

#[test]
fn word_pieces_are_the_longest_and_unknown_words_are_one_token() {
    let mut metadata = metadata("bert", &["[UNK]", "[CLS]", "[SEP]", "▁un", "aff", "able", "▁naive", "▁!", "▁你"]);
    for (key, id) in [("unknown", 0u32), ("bos", 1), ("seperator", 2)] {
        metadata.set(&format!("tokenizer.ggml.{key}_token_id"), id);
    }
    let tokenizer = Tokenizer::from_gguf(&metadata, None).unwrap();
    assert_eq!(tokenizer.encode("Unaffable!", true, false), [1, 3, 4, 5, 7, 2]);
    assert_eq!(tokenizer.encode("Naïve unx 你你", false, false), [6, 0, 8, 8]);
}

/// The one line that a vocabulary is refused with.
fn refusal(metadata: &Metadata) -> String {
    let message = Tokenizer::from_gguf(metadata, None).unwrap_err().to_string();
    assert!(message.starts_with("small.gguf: ") && !message.contains('\n'), "{message}");
    message
}

#[test]
fn unknown_names_are_refused_with_what_to_do() {
    let message = refusal(&small_byte_pairs("brand-new"));
    for part in ["unknown pre-tokenizer \"brand-new\"", "tokenizer.ggml.pre", "--pre NAME", " llama-bpe "] {
        assert!(message.contains(part), "{message}");
    }
    let error = Tokenizer::from_gguf(&small_byte_pairs("gpt-2"), Some("typo")).unwrap_err();
    assert!(error.to_string().contains("\"typo\" from --pre"), "{error}");
    let message = refusal(&metadata("brand-new", &["a"]));
    assert!(message.contains("\"brand-new\"") && message.contains("gpt2"), "{message}");
    assert!(refusal(&Metadata::new("small.gguf")).contains("tokenizer.ggml.model"));

    let mut metadata = small_byte_pairs("gpt-2");
    metadata.remove("tokenizer.ggml.pre");
    let tokenizer = Tokenizer::from_gguf(&metadata, None).unwrap();
    assert_eq!(tokenizer.pre_name(), "default");
    assert!(tokenizer.warnings()[0].contains("--pre NAME"));
}

#[test]
fn contradictory_vocabularies_are_refused_by_key() {
    let cases: &[(&str, Value, &str)] = &[
        ("tokenizer.ggml.scores", scores(&[1.0; 12]).into(), "has 12 values for the 13 tokens"),
        ("tokenizer.ggml.scores", scores(&[f32::NAN; 13]).into(), "is NaN for token 0"),
        ("tokenizer.ggml.scores", Array::of_strings(["x"; 13]).into(), "is an array of str, expected f32 or i32"),
        ("tokenizer.ggml.scores", Array::of_values(ValueType::I8, &vec![Value::I8(0); 13]).into(), "is an array of i8"),
        ("tokenizer.ggml.scores", 7u32.into(), "u32"),
        ("tokenizer.ggml.token_type", types(&[1; 3]).into(), "has 3 values for the 13 tokens"),
        ("tokenizer.ggml.token_type", scores(&[1.0; 13]).into(), "is an array of f32, expected i32"),
        ("tokenizer.ggml.tokens", Array::of_strings::<&str>([]).into(), "is empty"),
        (
            "tokenizer.ggml.tokens",
            Array::of_strings(["a", "b", "a"]).into(),
            "has the same text, \"a\", for ids 0 and 2",
        ),
        ("tokenizer.ggml.tokens", scores(&[1.0]).into(), "arr of f32"),
        ("tokenizer.ggml.bos_token_id", 13u32.into(), "is 13, but tokenizer.ggml.tokens has 13 tokens"),
        ("tokenizer.ggml.eos_token_id", u32::MAX.into(), "is 4294967295, but"),
        ("tokenizer.ggml.unknown_token_id", (-1i32).into(), "i32 (-1)"),
        ("tokenizer.ggml.add_bos_token", 1u8.into(), "bool"),
        ("tokenizer.ggml.model", 1u8.into(), "str"),
    ];
    for (key, value, part) in cases {
        let mut metadata = small_sentence_piece();
        metadata.set(key, value.clone());
        let message = refusal(&metadata);
        assert!(message.contains(key) && message.contains(part), "{key}: {message}");
    }

    let mut metadata = small_byte_pairs("gpt-2");
    metadata.set("tokenizer.ggml.merges", types(&[1]));
    assert!(refusal(&metadata).contains("tokenizer.ggml.merges"));
    metadata.remove("tokenizer.ggml.merges");
    assert!(refusal(&metadata).contains("tokenizer.ggml.merges"));

    let mut metadata = metadata_without_bos();
    assert!(refusal(&metadata).contains("tokenizer.ggml.bos_token_id names no token of the 3"));
    metadata.set("tokenizer.ggml.bos_token_id", 2u32);
    assert_eq!(Tokenizer::from_gguf(&metadata, None).unwrap().encode("a", true, false), [2, 0]);
}

/// Llama 3's pre-tokenizer adds BOS, whose default id, 11, is not there.
fn metadata_without_bos() -> Metadata {
    let mut metadata = metadata("gpt2", &["a", "b", "<s>"]);
    metadata.set("tokenizer.ggml.pre", "llama-bpe");
    metadata.set("tokenizer.ggml.merges", Array::of_strings(["a b"]));
    metadata
}

#[test]
fn broken_tables_of_normalization_are_refused_or_harmless() {
    let unigram = |bytes: &[u8]| {
        let mut metadata = metadata("t5", &["<pad>", "</s>", "<unk>", "▁", "a", "▁a"]);
        metadata.set("tokenizer.ggml.scores", scores(&[0.0, 0.0, 0.0, -2.0, -2.0, -1.0]));
        metadata.set("tokenizer.ggml.add_space_prefix", true);
        let elements: Vec<_> = bytes.iter().map(|byte| Value::U8(*byte)).collect();
        metadata.set("tokenizer.ggml.precompiled_charsmap", Array::of_values(ValueType::U8, &elements));
        metadata
    };
    assert!(refusal(&unigram(b"abc")).contains("tokenizer.ggml.precompiled_charsmap has 3 bytes"));
    assert!(refusal(&unigram(&[255; 16])).contains("announces 4294967295 bytes"));
    for filler in 0..=255 {
        let mut bytes = vec![filler; 80];
        bytes[..4].copy_from_slice(&64u32.to_le_bytes());
        let tokenizer = Tokenizer::from_gguf(&unigram(&bytes), None).unwrap();
        assert!(tokenizer.encode("a b é \0", true, false).iter().all(|id| *id < 6));
    }
    let tokenizer = Tokenizer::from_gguf(&unigram(&[0, 0, 0, 0, 0]), None).unwrap();
    assert_eq!(tokenizer.encode("a xyz", true, false), [5, 3, 2, 1], "unknown characters in a row are one token");
}

#[test]
fn text_without_spaces_takes_time_in_proportion() {
    let tokenizers = [small_byte_pairs("gpt-2"), small_byte_pairs("gemma4"), small_byte_pairs("tekken")]
        .map(|metadata| Tokenizer::from_gguf(&metadata, None).unwrap());
    let sentence_piece = Tokenizer::from_gguf(&small_sentence_piece(), None).unwrap();
    let start = Instant::now();
    for tokenizer in tokenizers.iter().chain([&sentence_piece]) {
        for unit in ["a", "ab", " ", "\n", "1", "é"] {
            let text = unit.repeat((1 << 20) / unit.len());
            assert!(tokenizer.encode(&text, false, false).len() <= 3 * text.len() + 1);
        }
    }
    // 24 texts of 1 MiB: a quadratic algorithm would take hours.
    assert!(start.elapsed() < Duration::from_secs(120), "{:?}", start.elapsed());
}

/// Texts made of parts that mean something to one model or another.
fn bytes(parts: std::ops::Range<usize>) -> impl Strategy<Value = Vec<u8>> {
    let part = prop_oneof![
        4 => proptest::sample::select(vec!["a", "b", "c", "1", " ", "▁", "Ġ", "\n", "é", "中", "\u{301}", "'", "s", "."])
            .prop_map(|text| text.as_bytes().to_vec()),
        1 => proptest::sample::select(vec!["<0x61>", "<unk>", "</s>", "<|end|>", "<|call|>", "<|return|>", "<dna>", "\\n"])
            .prop_map(|text| text.as_bytes().to_vec()),
        1 => any::<u8>().prop_map(|byte| vec![byte]),
    ];
    proptest::collection::vec(part, parts).prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn any_vocabulary_and_text_give_its_ids_or_an_error_of_one_line(
        model in proptest::sample::select(
            vec!["llama", "gpt2", "bert", "t5", "rwkv", "plamo2", "gemma4", "whitespace", "hybriddna"]),
        pre in proptest::sample::select(pretokenize::known_names().collect::<Vec<_>>()),
        tokens in proptest::collection::btree_set(bytes(1..5), 1..30),
        kinds in proptest::collection::vec(0i32..8, 30),
        values in proptest::collection::vec(prop_oneof![4 => -9f32..1.0, 1 => proptest::num::f32::ANY], 30),
        merges in proptest::collection::vec((bytes(1..3), bytes(1..3)), 0..20),
        special in proptest::collection::vec(0u32..8, 4),
        flags in proptest::collection::vec(any::<bool>(), 5),
        text in bytes(0..60),
    ) {
        let mut metadata = Metadata::new("random.gguf");
        metadata.set("tokenizer.ggml.model", model);
        metadata.set("tokenizer.ggml.pre", pre);
        let byte_tokens: Vec<Vec<u8>> = (0..=255u8).map(|byte| format!("<0x{byte:02X}>").into_bytes()).collect();
        let more = if flags[0] { byte_tokens.as_slice() } else { &[] };
        let tokens: Vec<&Vec<u8>> = tokens.iter().chain(more.iter().filter(|text| !tokens.contains(*text))).collect();
        metadata.set("tokenizer.ggml.tokens", Array::of_strings(&tokens));
        let kinds: Vec<i32> = kinds.iter().copied().chain([6; 256]).take(tokens.len()).collect();
        metadata.set("tokenizer.ggml.token_type", types(&kinds));
        let values: Vec<f32> = values.iter().copied().chain([0.0; 256]).take(tokens.len()).collect();
        metadata.set("tokenizer.ggml.scores", scores(&values));
        let merges = merges.iter().map(|(left, right)| [left.as_slice(), b" ", right].concat());
        metadata.set("tokenizer.ggml.merges", Array::of_strings(merges));
        for (key, id) in ["bos", "eos", "unknown", "seperator"].iter().zip(&special) {
            metadata.set(&format!("tokenizer.ggml.{key}_token_id"), *id);
        }
        metadata.set("tokenizer.ggml.add_space_prefix", flags[1]);
        metadata.set("tokenizer.ggml.remove_extra_whitespaces", flags[2]);
        metadata.set("tokenizer.ggml.add_eos_token", flags[3]);
        metadata.set("general.name", if flags[4] { "phi-3" } else { "other" });
        match Tokenizer::from_gguf(&metadata, None) {
            Ok(tokenizer) => {
                for parse_special in [false, true] {
                    let ids = tokenizer.encode(&text, true, parse_special);
                    prop_assert!(ids.iter().all(|id| (*id as usize) < tokenizer.len()));
                    tokenizer.decode(&ids);
                }
            }
            Err(error) => {
                let message = error.to_string();
                prop_assert!(message.starts_with("random.gguf: ") && !message.contains('\n'), "{}", message);
            }
        }
    }
}
