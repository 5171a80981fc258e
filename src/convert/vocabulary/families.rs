//! Recognizes the pre-tokenizer of a byte-level vocabulary from its own definition.
//!
//! `tokenizer.json` says how text is cut before merging, as a tree of steps with regular expressions. The tree is
//! brought to a plain list of steps in one spelling (GPT-2's expression that `ByteLevel` implies is written out,
//! digits become an expression, case-insensitive groups are spelled one way) and compared with the list of each
//! family that the tokenizer knows. The expressions are those that llama.cpp b10605 quotes from the published files.
//! Names that cut alike are told apart by tokens that only one of them has.

use serde_json::Value;

use super::tokenizer_json::TokenizerJson;
use crate::convert::files::kind;
use crate::gguf::shown;

/// One step of a pre-tokenizer.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    /// Cut out the matches of an expression.
    Cut(String),
    /// Cut out runs of punctuation.
    PunctuationRuns,
}

/// A family: steps before bytes become characters, and what tells it from families with the same steps.
struct Family {
    name: &'static str,
    steps: &'static [&'static str],
    /// Must agree, where it is set.
    ignore_merges: Option<bool>,
    /// One of these tokens must be an added token, where any are given.
    marks: &'static [&'static str],
}

const PUNCTUATION_RUNS: &str = "<punctuation runs>";

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Words of Youtu and Tiny Aya, which take letters and digits as GPT-4o does, with this many digits.
const YOUTU: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK_V3: &str = "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const BAILING: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
const SEED: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
const EXAONE_MOE: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+";
const MINICPM5: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const JAIS2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}";
const SENTENCES: &str = r" ?[^(\s|.,!?…。，、।۔،)]+";
const HAN_AND_KANA: &str = "[一-龥぀-ゟ゠-ヿ]+";
const ASIAN_BLOCKS: &str = "[一-龥ࠀ-一가-퟿]+";
const YOUTU_SCRIPTS: &str = "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+";
const DIGIT: &str = r"\p{N}";
const DIGITS: &str = r"\p{N}+";
const THREE_DIGITS: &str = r"\p{N}{1,3}";
const LINE_BREAK: &str = r"[\r\n]";
/// The published class lists every cased letter; its beginning stands for it, see [`spelled`].
const DEEPSEEK_LATIN: &str = r"\s?[A-Za-zµÀ-Ö..]+";
const DEEPSEEK_LATIN_START: &str = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁ";
const DEEPSEEK_MARKS: &str = r"\s?[!-/:-~！-／：-～‘-‟　-。]+";

const fn family(name: &'static str, steps: &'static [&'static str]) -> Family {
    Family { name, steps, ignore_merges: None, marks: &[] }
}

const fn marked(name: &'static str, steps: &'static [&'static str], marks: &'static [&'static str]) -> Family {
    Family { name, steps, ignore_merges: None, marks }
}

/// The first that fits counts: those with marks stand before those without.
const FAMILIES: &[Family] = &[
    marked("falcon3", &[LLAMA3], &[">>TITLE<<", ">>ABSTRACT<<"]),
    marked("glm4", &[LLAMA3], &["[gMASK]"]),
    Family { ignore_merges: Some(true), ..family("llama-bpe", &[LLAMA3]) },
    marked("smaug-bpe", &[LLAMA3], &["<|begin_of_text|>"]),
    family("dbrx", &[LLAMA3]),
    marked("deepseek-r1-qwen", &[QWEN2], &["<｜begin▁of▁sentence｜>"]),
    marked("megrez", &[QWEN2], &["<|role_start|>"]),
    family("qwen2", &[QWEN2]),
    family("qwen35", &[QWEN35]),
    family("tekken", &[TEKKEN]),
    marked("llama4", &[GPT4O], &["<|header_start|>"]),
    marked("minimax-m2", &[GPT4O], &["]~b]"]),
    family("gpt-4o", &[GPT4O]),
    marked("command-r", &[DIGIT, GPT2], &["<|START_OF_TURN_TOKEN|>"]),
    marked("exaone", &[DIGIT, GPT2], &["[|endofturn|]"]),
    marked("starcoder", &[DIGIT, GPT2], &["<fim_prefix>"]),
    family("smollm", &[DIGIT, GPT2]),
    family("falcon", &[PUNCTUATION_RUNS, GPT2, DIGITS, "[0-9][0-9][0-9]"]),
    family("falcon", &[PUNCTUATION_RUNS, GPT2, "[0-9][0-9][0-9]"]),
    marked("exaone4", &[GPT2], &["[|endofturn|]"]),
    marked("granite-docling", &[GPT2], &["<doctag>"]),
    marked("roberta-bpe", &[GPT2], &["<mask>"]),
    family("gpt-2", &[GPT2]),
    family("deepseek-llm", &[LINE_BREAK, DEEPSEEK_LATIN, DEEPSEEK_MARKS, r"\s+$", ASIAN_BLOCKS, DIGITS]),
    family("deepseek-llm", &[LINE_BREAK, DEEPSEEK_LATIN, DEEPSEEK_MARKS, r"\s+$", ASIAN_BLOCKS, DIGIT]),
    family("deepseek-coder", &[LINE_BREAK, r"\s?\p{L}+", r"\s?\p{P}+", ASIAN_BLOCKS, DIGIT]),
    marked("hunyuan-dense", &[THREE_DIGITS, HAN_AND_KANA, DEEPSEEK_V3], &["<｜hy_begin▁of▁sentence｜>"]),
    family("deepseek-v3", &[THREE_DIGITS, HAN_AND_KANA, DEEPSEEK_V3]),
    family("youtu", &[YOUTU_SCRIPTS, YOUTU]),
    family("bailingmoe", &[BAILING]),
    family("seed-coder", &[SEED]),
    family("exaone-moe", &[EXAONE_MOE]),
    family("minicpm5", &[THREE_DIGITS, MINICPM5]),
    family("jais-2", &[JAIS2]),
    family("superbpe", &[DIGITS, r"(?=(\d{3})+(?!\d))"]),
    family("tiny_aya", &[r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O]),
    family("laguna", &[r"[^\n]+|[\n]+", QWEN2]),
    family("viking", &[SENTENCES, DIGIT]),
    family("bloom", &[SENTENCES]),
];

/// The name of the pre-tokenizer.
///
/// # Errors
/// The parts that match no family.
pub(super) fn recognize(json: &TokenizerJson) -> Result<&'static str, Vec<String>> {
    let mut unknown = Vec::new();
    check_normalizer(json.normalizer.as_ref(), &mut unknown);
    let mut steps = Vec::new();
    let mut byte_level = false;
    match &json.pre_tokenizer {
        None => unknown.push("pre_tokenizer is null".to_owned()),
        Some(tree) => flatten(tree, &mut steps, &mut byte_level, &mut unknown),
    }
    if !byte_level && unknown.is_empty() {
        unknown.push("pre_tokenizer has no ByteLevel step".to_owned());
    }
    check_decoder(json.decoder.as_ref(), &mut unknown);
    check_model(json, &mut unknown);
    if !unknown.is_empty() {
        return Err(unknown);
    }
    let fits = |family: &&Family| {
        let same = family.steps.len() == steps.len()
            && family.steps.iter().zip(&steps).all(|(expected, step)| match step {
                Step::Cut(found) => *expected == found,
                Step::PunctuationRuns => *expected == PUNCTUATION_RUNS,
            });
        let merges = family.ignore_merges.is_none_or(|wanted| json.model.ignore_merges.unwrap_or(false) == wanted);
        let holds = |mark: &&str| json.added_tokens.iter().any(|token| token.content == **mark);
        same && merges && (family.marks.is_empty() || family.marks.iter().any(holds))
    };
    if let Some(family) = FAMILIES.iter().find(fits) {
        return Ok(family.name);
    }
    let known = |text: &str| FAMILIES.iter().any(|family| family.steps.contains(&text));
    let mut parts: Vec<String> = steps
        .iter()
        .filter_map(|step| match step {
            Step::Cut(found) if !known(found) => Some(format!("expression {}", excerpt(found))),
            _ => None,
        })
        .collect();
    if parts.is_empty() {
        let list: Vec<String> = steps
            .iter()
            .map(|step| match step {
                Step::Cut(found) => excerpt(found),
                Step::PunctuationRuns => "Punctuation".to_owned(),
            })
            .collect();
        parts.push(match list.is_empty() {
            true => "pre_tokenizer that cuts nothing".to_owned(),
            false => format!("this order of steps: {}", list.join(" then ")),
        });
    }
    Err(parts)
}

/// An expression for messages.
fn excerpt(text: &str) -> String {
    let short: String = text.chars().take(160).collect();
    let dots = if short.len() < text.len() { ".." } else { "" };
    shown(format!("{short}{dots}").as_bytes())
}

fn type_of(tree: &Value) -> &str {
    tree.get("type").and_then(Value::as_str).unwrap_or_default()
}

fn parts<'a>(tree: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    tree.get(key).and_then(Value::as_array).into_iter().flatten()
}

/// llama.cpp does not normalize for byte-level vocabularies; composed Unicode, which nearly all text is, stays as is.
fn check_normalizer(tree: Option<&Value>, unknown: &mut Vec<String>) {
    match tree {
        None => {}
        Some(tree) => match type_of(tree) {
            "NFC" => {}
            "Sequence" => {
                for part in parts(tree, "normalizers") {
                    check_normalizer(Some(part), unknown);
                }
            }
            other => unknown.push(format!("normalizer {}", excerpt(other))),
        },
    }
}

fn check_decoder(tree: Option<&Value>, unknown: &mut Vec<String>) {
    match tree {
        None => {}
        Some(tree) => match type_of(tree) {
            "ByteLevel" => {}
            "Sequence" => {
                for part in parts(tree, "decoders") {
                    check_decoder(Some(part), unknown);
                }
            }
            other => unknown.push(format!("decoder {}", excerpt(other))),
        },
    }
}

fn check_model(json: &TokenizerJson, unknown: &mut Vec<String>) {
    let model = &json.model;
    if let Some(other) = model.kind.as_deref().filter(|kind| *kind != "BPE") {
        unknown.push(format!("model type {}", excerpt(other)));
    }
    let affixes = [
        ("continuing_subword_prefix", &model.continuing_subword_prefix),
        ("end_of_word_suffix", &model.end_of_word_suffix),
    ];
    for (name, value) in affixes {
        if let Some(text) = value.as_deref().filter(|text| !text.is_empty()) {
            unknown.push(format!("model {name} {}", excerpt(text)));
        }
    }
    if model.byte_fallback == Some(true) {
        unknown.push("model byte_fallback beside byte-level steps".to_owned());
    }
}

/// Steps of the tree in order; what is not understood goes to `unknown`.
fn flatten(tree: &Value, steps: &mut Vec<Step>, byte_level: &mut bool, unknown: &mut Vec<String>) {
    let flag = |name: &str, default: bool| tree.get(name).and_then(Value::as_bool).unwrap_or(default);
    match type_of(tree) {
        "Sequence" => {
            for part in parts(tree, "pretokenizers") {
                flatten(part, steps, byte_level, unknown);
            }
        }
        "ByteLevel" => {
            *byte_level = true;
            if flag("add_prefix_space", true) {
                unknown.push("ByteLevel with add_prefix_space".to_owned());
            }
            if flag("use_regex", true) {
                steps.push(Step::Cut(GPT2.to_owned()));
            }
        }
        "Digits" => steps.push(Step::Cut(if flag("individual_digits", false) { DIGIT } else { DIGITS }.to_owned())),
        "Punctuation" => match tree.get("behavior").and_then(Value::as_str) {
            Some("Contiguous") => steps.push(Step::PunctuationRuns),
            other => unknown.push(format!("Punctuation with behavior {}", excerpt(other.unwrap_or("missing")))),
        },
        "Split" => flatten_split(tree, steps, unknown),
        other => unknown.push(format!("step {}", excerpt(other))),
    }
}

fn flatten_split(tree: &Value, steps: &mut Vec<Step>, unknown: &mut Vec<String>) {
    let pattern = tree.get("pattern");
    let regex = pattern.and_then(|pattern| pattern.get("Regex")).and_then(Value::as_str);
    let Some(regex) = regex else {
        let text = pattern.and_then(|pattern| pattern.get("String")).map_or("missing".to_owned(), kind);
        unknown.push(format!("Split at the text {text}"));
        return;
    };
    let behavior = tree.get("behavior").and_then(Value::as_str).unwrap_or_default();
    let invert = tree.get("invert").and_then(Value::as_bool).unwrap_or(false);
    let regex = spelled(regex);
    match (behavior, invert) {
        ("Isolated", _) => {}
        // Only the matches stay; where the expression takes every character, that is the same.
        ("Removed", true) if regex.ends_with(r"\s+(?!\S)|\s+") => {}
        _ => {
            unknown.push(format!("Split with behavior {} and invert {invert}", excerpt(behavior)));
            return;
        }
    }
    steps.push(Step::Cut(regex));
}

/// One spelling for expressions that mean the same.
fn spelled(regex: &str) -> String {
    const CONTRACTIONS: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";
    let same = [
        ("\r", r"\r"),
        ("\n", r"\n"),
        ("\t", r"\t"),
        ("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", CONTRACTIONS),
        ("'(?i:[sdmt]|ll|ve|re)", CONTRACTIONS),
        // Possessive and greedy runs match alike where nothing behind them can match a part of the run.
        ("]?+", "]?"),
        ("]++", "]+"),
        ("]*+", "]*"),
        ("}++", "}+"),
        ("}{1}", "}"),
        (r"\s++$", r"\s+$"),
    ];
    let text = same.iter().fold(regex.to_owned(), |text, (from, to)| text.replace(from, to));
    match text.starts_with(DEEPSEEK_LATIN_START) && text.ends_with("]+") {
        true => DEEPSEEK_LATIN.to_owned(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::pretokenize::known_names;

    #[test]
    fn every_family_is_one_that_the_tokenizer_knows() {
        let known: Vec<&str> = known_names().collect();
        for family in FAMILIES {
            assert!(known.contains(&family.name), "{}", family.name);
        }
    }

    #[test]
    fn no_family_hides_behind_another() {
        for (index, family) in FAMILIES.iter().enumerate() {
            let hidden = FAMILIES[..index]
                .iter()
                .any(|other| other.steps == family.steps && other.marks.is_empty() && other.ignore_merges.is_none());
            assert!(!hidden, "{}", family.name);
        }
    }
}
