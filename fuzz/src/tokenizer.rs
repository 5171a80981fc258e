use lwq::gguf::{Array, Metadata, Value, ValueType};
use lwq::tokenizer::{Tokenizer, pretokenize};

const MODELS: [&str; 9] = ["llama", "gpt2", "bert", "t5", "rwkv", "plamo2", "gemma4", "whitespace", "hybriddna"];

/// The type of a token that stands for one byte.
const BYTE: i32 = 6;

/// Any vocabulary, any text: an error of one line, or ids that the vocabulary has.
///
/// Input: a byte for the model, one for the pre-tokenizer, one of flags, then fields ended by 0xFF: tokens up to an
/// empty field, merges up to an empty field, the rest is text.
pub fn tokenizer(input: &[u8]) {
    let [model, pre, flags, rest @ ..] = input else { return };
    let mut fields = rest.split(|byte| *byte == 0xFF);
    let tokens: Vec<&[u8]> = fields.by_ref().take_while(|field| !field.is_empty()).collect();
    let merges: Vec<&[u8]> = fields.by_ref().take_while(|field| !field.is_empty()).collect();
    let text: Vec<u8> = fields.collect::<Vec<_>>().join(&0xFF);
    let names: Vec<_> = pretokenize::known_names().collect();

    let mut metadata = Metadata::new("fuzz.gguf");
    metadata.set("tokenizer.ggml.model", MODELS[usize::from(*model) % MODELS.len()]);
    metadata.set("tokenizer.ggml.pre", names[usize::from(*pre) % names.len()]);
    metadata.set("tokenizer.ggml.tokens", Array::of_strings(&tokens));
    metadata.set("tokenizer.ggml.merges", Array::of_strings(&merges));
    // Scores and types follow from the texts, so that changing a text changes them too.
    let scores: Vec<Value> = tokens.iter().map(|text| Value::F32(-f32::from(text.len() as u8 % 16))).collect();
    metadata.set("tokenizer.ggml.scores", Array::of_values(ValueType::F32, &scores));
    let kind = |text: &[u8]| match text {
        // Some models demand all 256.
        [b'<', b'0', b'x', _, _, b'>'] => BYTE,
        _ => i32::from(text[0] & 7),
    };
    let kinds: Vec<Value> = tokens.iter().map(|text| Value::I32(kind(text))).collect();
    if flags & 1 != 0 {
        metadata.set("tokenizer.ggml.token_type", Array::of_values(ValueType::I32, &kinds));
    }
    metadata.set("tokenizer.ggml.add_bos_token", flags & 2 != 0);
    metadata.set("tokenizer.ggml.remove_extra_whitespaces", flags & 4 != 0);
    for (bit, key) in [(8, "bos"), (16, "eos"), (32, "unknown"), (64, "seperator")] {
        if flags & bit != 0 {
            metadata.set(&format!("tokenizer.ggml.{key}_token_id"), u32::from(*model) / 16);
        }
    }
    if flags & 128 != 0 {
        metadata.set("general.name", "phi-3");
        let bytes: Vec<Value> = text.iter().map(|byte| Value::U8(*byte)).collect();
        metadata.set("tokenizer.ggml.precompiled_charsmap", Array::of_values(ValueType::U8, &bytes));
    }
    let Some(tokenizer) = super::accepted(Tokenizer::from_gguf(&metadata, None)) else { return };
    for parse_special in [false, true] {
        let ids = tokenizer.encode(&text, true, parse_special);
        assert!(ids.iter().all(|id| (*id as usize) < tokenizer.len()));
        let _ = tokenizer.decode(&ids);
    }
}
