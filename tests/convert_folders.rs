//! `lwq convert` on folders as people have them: left-overs, several tokenizers, parts of other models.

mod common;
mod convert_support;

use std::path::Path;

use common::{args, doclet, error_line, run, run_with, tensor_digest};
use convert_support::{Raw, Source, Tensors, save};
use lwq::gguf::Gguf;
use safetensors::Dtype;
use serde_json::{Value as Json, json};

const EMBEDDING: &str = "model.embed_tokens.weight";

fn source() -> Source {
    Source::doclet(&doclet())
}

/// Converts a folder; what it wrote, and what it said.
fn converted(folder: &Path) -> (Gguf, String) {
    let output = folder.join("out.gguf");
    let done = run(args!["convert", folder, "-o", &output, "--force"]);
    let said = String::from_utf8(done.stderr).unwrap();
    assert!(done.status.success(), "{said}");
    (Gguf::open(output).unwrap(), said)
}

fn template(gguf: &Gguf) -> Option<&str> {
    gguf.metadata().str("tokenizer.chat_template").unwrap()
}

#[test]
fn the_template_file_counts_before_its_copy() {
    let dir = tempfile::tempdir().unwrap();
    let mut source = source();
    source.tokenizer_config["chat_template"] = json!("{{ old }}");
    let folder = source.write(&dir.path().join("model"));
    std::fs::write(folder.join("chat_template.json"), r#"{"chat_template": "{{ json }}"}"#).unwrap();
    assert_eq!(template(&converted(&folder).0), Some("{{ old }}"));
    std::fs::write(folder.join("chat_template.jinja"), "{{ new }}").unwrap();
    let (gguf, said) = converted(&folder);
    assert_eq!(template(&gguf), Some("{{ new }}"));
    assert!(said.contains("chat_template.jinja differs from"), "{said}");
    std::fs::write(folder.join("chat_template.jinja"), "{{ old }}").unwrap();
    assert!(!converted(&folder).1.contains("chat_template"));
    std::fs::remove_file(folder.join("tokenizer_config.json")).unwrap();
    assert_eq!(template(&converted(&folder).0), Some("{{ old }}"));
}

fn write_index(folder: &Path, places: &[(&str, &str)]) {
    let places: serde_json::Map<String, Json> =
        places.iter().map(|(tensor, file)| ((*tensor).to_owned(), json!(file))).collect();
    std::fs::write(folder.join("model.safetensors.index.json"), json!({ "weight_map": places }).to_string()).unwrap();
}

#[test]
fn a_whole_file_counts_before_a_stale_index_and_stale_shards() {
    let dir = tempfile::tempdir().unwrap();
    let (source, shard) = (source(), "model-00001-of-00002.safetensors");
    let folder = source.write(&dir.path().join("model"));
    let said_of = |warned: bool| {
        let (gguf, said) = converted(&folder);
        assert_eq!(said.contains("the whole file is read"), warned, "{said}");
        drop(gguf);
        assert_eq!(tensor_digest(&folder.join("out.gguf")), tensor_digest(&doclet()));
    };
    let names: Vec<&str> = source.tensors.keys().map(String::as_str).collect();
    let all = |file| names.iter().map(|name| (*name, file)).collect::<Vec<_>>();
    // Shards that are gone, names that are gone, an index that is damaged, and one that is right.
    write_index(&folder, &all(shard));
    said_of(true);
    write_index(&folder, &[("other.weight", "model.safetensors")]);
    said_of(true);
    std::fs::write(folder.join("model.safetensors.index.json"), "{").unwrap();
    said_of(true);
    write_index(&folder, &all("model.safetensors"));
    said_of(false);
    // A shard of an earlier save, without an index.
    std::fs::remove_file(folder.join("model.safetensors.index.json")).unwrap();
    let stale: Tensors = [(EMBEDDING.to_owned(), source.tensors[EMBEDDING].clone())].into();
    save(&stale, &folder.join(shard));
    let (_, said) = converted(&folder);
    assert!(said.contains("the shards beside it are not"), "{said}");
    // A file of the name that holds a part only, beside shards that are whole.
    let folder = source.write_sharded(&dir.path().join("sharded"), 2);
    save(&stale, &folder.join("model.safetensors"));
    let (_, said) = converted(&folder);
    assert!(said.contains("is not the whole model"), "{said}");
    assert_eq!(tensor_digest(&folder.join("out.gguf")), tensor_digest(&doclet()));
}

#[test]
fn an_absent_output_matrix_is_assumed_to_be_the_embedding() {
    let dir = tempfile::tempdir().unwrap();
    for (tie, said_of_tie) in [(json!(false), "is false"), (Json::Null, "is absent")] {
        let mut source = source();
        source.config["tie_word_embeddings"] = tie;
        let (gguf, said) = converted(&source.write(&dir.path().join("model")));
        assert!(gguf.tensor("output.weight").is_none());
        assert!(said.contains("lm_head.weight is missing") && said.contains(said_of_tie), "{said}");
    }
}

#[test]
fn a_head_beside_a_tied_embedding_is_compared_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut source = source();
    let mut head = source.tensors[EMBEDDING].clone();
    source.tensors.insert("lm_head.weight".into(), head.clone());
    let (gguf, said) = converted(&source.write(&dir.path().join("equal")));
    assert!(gguf.tensor("output.weight").is_none() && !said.contains("lm_head"), "{said}");

    // The same values in another type are equal, too.
    let values: Vec<u8> =
        head.data.as_chunks().0.iter().flat_map(|b| half::f16::from_le_bytes(*b).to_f32().to_le_bytes()).collect();
    let wide = Raw { dtype: Dtype::F32, shape: head.shape.clone(), data: values };
    source.tensors.insert("lm_head.weight".into(), wide);
    assert!(converted(&source.write(&dir.path().join("wide"))).0.tensor("output.weight").is_none());

    // 2.0 instead of whatever the first weight was.
    let first = half::f16::from_le_bytes([head.data[0], head.data[1]]).to_f32();
    head.data[..2].copy_from_slice(&half::f16::from_f32(2.0).to_le_bytes());
    source.tensors.insert("lm_head.weight".into(), head);
    let (gguf, said) = converted(&source.write(&dir.path().join("other")));
    assert!(gguf.tensor("output.weight").is_some());
    assert!(said.contains("\"lm_head.weight\" differs from the embedding"), "{said}");
    assert!(said.contains(&format!("largest difference {:.3}", 2.0 - first)), "{said}");
}

#[test]
fn parts_for_images_are_named_and_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let mut source = source();
    source.config["vision_config"] = json!({ "hidden_size": 64 });
    let raw = source.tensors["model.norm.weight"].clone();
    source.tensors.insert("vision_tower.blocks.0.weight".into(), raw.clone());
    source.tensors.insert("multi_modal_projector.weight".into(), raw);
    let folder = source.write(&dir.path().join("model"));
    let (_, said) = converted(&folder);
    assert!(said.contains("2 tensors of the image or sound part") && said.contains("--mmproj"), "{said}");
    assert_eq!(tensor_digest(&folder.join("out.gguf")), tensor_digest(&doclet()));
    source.config["vision_config"] = Json::Null;
    let line = error_line(&run(args!["convert", source.write(&folder), "--dry-run"]));
    assert!(line.contains("image or sound part that config.json does not mention"), "{line}");
}

/// New names for the tensors of the second layer's network, and a part of the message.
type NameCase = (&'static str, &'static str);

#[test]
fn tensors_under_other_names_are_listed_before_what_is_missing() {
    let cases: &[NameCase] = &[
        ("model.layers.1.mlp.switch_mlp.{}.weight", "MLX names"),
        ("model.layers.1.mlp.{}.qweight", "GPTQ or AWQ codes"),
        ("model.layers.1.mlp.{}.weight.absmax", "bitsandbytes codes"),
        ("base_model.model.model.layers.1.mlp.{}.lora_A.weight", "a LoRA adapter"),
        ("layers.1.feed_forward.w1.{}.weight", "the publisher's own names"),
        ("model.layers.1.mlp.experts.0.{}.weight", "experts under names"),
        ("transformer.h.1.{}.weight", "an architecture that config.json does not name"),
    ];
    let dir = tempfile::tempdir().unwrap();
    for (pattern, meaning) in cases {
        let mut source = source();
        for part in ["gate_proj", "up_proj", "down_proj"] {
            let raw = source.tensors.remove(&format!("model.layers.1.mlp.{part}.weight")).unwrap();
            source.tensors.insert(pattern.replace("{}", part), raw);
        }
        let line = error_line(&run_with(args!["convert", source.write(&dir.path().join("model"))], &["--dry-run"]));
        let (unknown, missing) = (line.find(&pattern.replace("{}", "down_proj")), line.find("is missing"));
        assert!(unknown.is_some() && unknown < missing, "{line}");
        assert!(line.contains(meaning), "{line}");
        assert!(line.contains("model.layers.1.mlp.gate_proj.weight"), "{line}");
    }
}

#[test]
fn a_shape_that_unknown_tensors_explain_comes_after_them() {
    let dir = tempfile::tempdir().unwrap();
    let mut source = source();
    let name = "model.layers.1.mlp.up_proj";
    let codes = Raw { dtype: Dtype::U32, shape: vec![512, 32], data: vec![0; 512 * 32 * 4] };
    source.tensors.insert(format!("{name}.weight"), codes);
    for part in ["scales", "biases"] {
        let raw = Raw { dtype: Dtype::F16, shape: vec![512, 4], data: vec![0; 512 * 8] };
        source.tensors.insert(format!("{name}.{part}"), raw);
    }
    let line = error_line(&run_with(args!["convert", source.write(&dir.path().join("model"))], &["--dry-run"]));
    let (unknown, shape) = (line.find("up_proj.biases"), line.find("has shape [512, 32]"));
    assert!(unknown.is_some() && unknown < shape && line.contains("MLX names"), "{line}");
}

#[test]
fn folders_that_are_no_model_say_what_they_are() {
    let dir = tempfile::tempdir().unwrap();
    for (file, message) in
        [("adapter_config.json", "LoRA adapter"), ("a.gguf", "need no conversion"), ("x", "transformers")]
    {
        let folder = dir.path().join(file.replace('.', "-"));
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join(file), "{}").unwrap();
        let line = error_line(&run(args!["convert", &folder]));
        assert!(line.contains(message), "{line}");
    }
}

#[test]
fn models_that_see_both_ways_say_so() {
    let dir = tempfile::tempdir().unwrap();
    for (setting, causal) in [(json!(false), Some(false)), (json!(true), None), (Json::Null, None)] {
        let mut source = source();
        source.config["is_causal"] = setting;
        let (gguf, _) = converted(&source.write(&dir.path().join("model")));
        let found = gguf.metadata().get("llama.attention.causal").cloned();
        assert_eq!(found, causal.map(lwq::gguf::Value::Bool));
    }
}

/// A SentencePiece model of these pieces and kinds.
fn sentencepiece(pieces: &[(&str, u8)]) -> Vec<u8> {
    let field = |content: &[u8]| [&[0x0A, content.len() as u8][..], content].concat();
    let piece = |(text, kind): &(&str, u8)| [&field(text.as_bytes())[..], b"\x15\0\0\x80\xbf", &[0x18, *kind]].concat();
    pieces.iter().flat_map(|entry| field(&piece(entry))).collect()
}

#[test]
fn two_tokenizers_in_a_folder_make_one_vocabulary() {
    const NORMAL: i128 = 1;
    const UNKNOWN: i128 = 2;
    const CONTROL: i128 = 3;
    const USER: i128 = 4;
    let pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("[tool]", 1), ("<turn>", 4), ("a", 1), ("b", 1)];
    let added = |id: u64, content: &str, special: bool| json!({ "id": id, "content": content, "special": special });
    let mut source = source();
    let vocab: serde_json::Map<String, Json> =
        pieces.iter().enumerate().map(|(id, (text, _))| ((*text).to_owned(), json!(id))).collect();
    source.tokenizer["model"] = json!({ "type": "BPE", "vocab": vocab, "byte_fallback": true, "merges": [["a", "b"]] });
    source.tokenizer["added_tokens"] = json!([
        added(0, "<unk>", true),
        added(1, "<s>", true),
        added(2, "</s>", true),
        added(3, "[tool]", true),
        added(4, "<turn>", true),
        added(7, "<dom>", false),
        added(8, "<ctl>", true),
    ]);
    source.tokenizer_config = json!({ "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>" });
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("model");
    let tokens = |source: &Source| {
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("tokenizer.model"), sentencepiece(&pieces)).unwrap();
        let (gguf, said) = converted(&source.write(&folder));
        let texts = gguf.metadata().array("tokenizer.ggml.tokens").unwrap().unwrap();
        let texts: Vec<String> =
            texts.iter_str().unwrap().take(9).map(|text| String::from_utf8_lossy(text).into_owned()).collect();
        let types = gguf.metadata().array("tokenizer.ggml.token_type").unwrap().unwrap();
        let types: Vec<i128> = types.iter().take(9).filter_map(|kind| kind.as_integer()).collect();
        (texts, types, said)
    };
    let (texts, types, said) = tokens(&source);
    assert_eq!(texts, ["<unk>", "<s>", "</s>", "[tool]", "<turn>", "a", "b", "<dom>", "<ctl>"]);
    assert_eq!(types, [UNKNOWN, CONTROL, CONTROL, CONTROL, CONTROL, NORMAL, NORMAL, USER, CONTROL]);
    assert!(!said.contains("contradict"), "{said}");

    // tokenizer_config.json says otherwise of one token, tokenizer.json of another than the model.
    source.tokenizer_config["added_tokens_decoder"] = json!({ "8": { "content": "<ctl>", "special": false } });
    source.tokenizer["added_tokens"][3]["content"] = json!("[other]");
    let (texts, types, said) = tokens(&source);
    assert_eq!((texts[3].as_str(), types[3], types[8]), ("[other]", CONTROL, USER));
    assert!(said.contains("tokenizer.json and tokenizer_config.json contradict each other: token 8"), "{said}");
    assert!(said.contains("tokenizer.model and tokenizer.json contradict each other: token 3"), "{said}");
}
