//! `lwq convert` on models whose blocks differ: delta nets beside attention, blocks that predict further tokens.

mod common;
mod convert_support;

use std::path::Path;

use common::{args, doclet, error_line, run};
use convert_support::{Raw, Source, Tensors};
use lwq::gguf::Gguf;
use safetensors::Dtype;
use serde_json::{Value as Json, json};

const WIDTH: usize = 8;
const KEY_HEADS: usize = 2;
const VALUE_HEADS: usize = 6;
const HEAD: usize = 4;
const KEYS: usize = KEY_HEADS * HEAD;
const VALUES: usize = VALUE_HEADS * HEAD;
const FEED_FORWARD: usize = 16;
const VOCABULARY: usize = 2048;

/// Value heads in the order of the file: those of both key heads take turns.
const TURNS: [usize; VALUE_HEADS] = [0, 3, 1, 4, 2, 5];

fn f32s(shape: &[usize], value: impl Fn(usize) -> f32) -> Raw {
    let count = shape.iter().product();
    let data = (0..count).flat_map(|at| value(at).to_le_bytes()).collect();
    Raw { dtype: Dtype::F32, shape: shape.to_vec(), data }
}

/// A matrix whose values tell their row and column.
fn matrix(rows: usize, columns: usize) -> Raw {
    f32s(&[rows, columns], |at| (at / columns) as f32 + (at % columns) as f32 / 64.0)
}

fn attention(tensors: &mut Tensors, at: &str) {
    for (name, rows, columns) in [("q", 2 * WIDTH, WIDTH), ("k", HEAD, WIDTH), ("v", HEAD, WIDTH), ("o", WIDTH, WIDTH)]
    {
        tensors.insert(format!("{at}self_attn.{name}_proj.weight"), matrix(rows, columns));
    }
    for norm in ["q_norm", "k_norm"] {
        tensors.insert(format!("{at}self_attn.{norm}.weight"), f32s(&[HEAD], |_| 0.5));
    }
}

fn block(tensors: &mut Tensors, at: &str, recurrent: bool) {
    for norm in ["input_layernorm", "post_attention_layernorm"] {
        tensors.insert(format!("{at}{norm}.weight"), f32s(&[WIDTH], |_| 0.25));
    }
    for (name, rows, columns) in
        [("gate", FEED_FORWARD, WIDTH), ("up", FEED_FORWARD, WIDTH), ("down", WIDTH, FEED_FORWARD)]
    {
        tensors.insert(format!("{at}mlp.{name}_proj.weight"), matrix(rows, columns));
    }
    if !recurrent {
        return attention(tensors, at);
    }
    let mut insert = |name: &str, raw| tensors.insert(format!("{at}linear_attn.{name}"), raw);
    insert("in_proj_qkv.weight", matrix(2 * KEYS + VALUES, WIDTH));
    insert("in_proj_z.weight", matrix(VALUES, WIDTH));
    insert("in_proj_a.weight", matrix(VALUE_HEADS, WIDTH));
    insert("in_proj_b.weight", matrix(VALUE_HEADS, WIDTH));
    insert("conv1d.weight", f32s(&[2 * KEYS + VALUES, 1, 4], |at| at as f32));
    insert("A_log", f32s(&[VALUE_HEADS], |at| at as f32));
    insert("dt_bias", f32s(&[VALUE_HEADS], |at| at as f32));
    insert("norm.weight", f32s(&[HEAD], |_| 0.75));
    insert("out_proj.weight", matrix(WIDTH, VALUES));
}

/// Three delta nets and one layer with attention, and a block that predicts further tokens; doclet's tokenizer.
fn hybrid() -> Source {
    let mut source = Source::doclet(&doclet());
    source.config = json!({
        "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "vocab_size": VOCABULARY, "hidden_size": WIDTH,
        "intermediate_size": FEED_FORWARD, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": HEAD, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": HEAD, "linear_value_head_dim": HEAD, "linear_num_key_heads": KEY_HEADS,
        "linear_num_value_heads": VALUE_HEADS, "full_attention_interval": 4, "tie_word_embeddings": true,
        "rope_parameters": { "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5 },
        "mtp_num_hidden_layers": 1,
    });
    source.tensors = Tensors::new();
    source.tensors.insert("model.embed_tokens.weight".into(), matrix(VOCABULARY, WIDTH));
    source.tensors.insert("model.norm.weight".into(), f32s(&[WIDTH], |_| 0.125));
    for layer in 0..4 {
        block(&mut source.tensors, &format!("model.layers.{layer}."), layer < 3);
    }
    block(&mut source.tensors, "mtp.layers.0.", false);
    source.tensors.insert("mtp.fc.weight".into(), matrix(WIDTH, 2 * WIDTH));
    for norm in ["pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"] {
        source.tensors.insert(format!("mtp.{norm}.weight"), f32s(&[WIDTH], |_| 0.0));
    }
    source
}

/// Converts to F32; the file, and what was said.
fn converted(folder: &Path, options: &[&str]) -> (Gguf, String) {
    let output = folder.join("out.gguf");
    let mut command = args!["convert", folder, "-o", &output, "--force", "--type", "f32"];
    command.extend(options.iter().map(Into::into));
    let done = run(command);
    let said = String::from_utf8(done.stderr).unwrap();
    assert!(done.status.success(), "{said}");
    (Gguf::open(output).unwrap(), said)
}

fn refused(source: &Source, folder: &Path) -> String {
    let done = run(args!["convert", source.write(folder), "-o", folder.join("out.gguf"), "--force"]);
    error_line(&done)
}

fn values(gguf: &Gguf, name: &str) -> Vec<f32> {
    let tensor = gguf.tensor(name).unwrap_or_else(|| panic!("{name} is missing"));
    let data = gguf.tensor_data(tensor).unwrap();
    data.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// The whole parts of the first values of rows.
fn rows(gguf: &Gguf, name: &str, columns: usize) -> Vec<usize> {
    values(gguf, name).chunks(columns).map(|row| row[0] as usize).collect()
}

#[test]
fn value_heads_of_a_delta_net_take_turns() {
    let dir = tempfile::tempdir().unwrap();
    let (gguf, _) = converted(&hybrid().write(&dir.path().join("model")), &[]);
    let heads = |first: usize, head: usize| {
        TURNS.iter().flat_map(move |from| (0..head).map(move |row| first + from * head + row)).collect::<Vec<usize>>()
    };
    let fused: Vec<usize> = (0..2 * KEYS).chain(heads(2 * KEYS, HEAD)).collect();
    assert_eq!(rows(&gguf, "blk.0.attn_qkv.weight", WIDTH), fused);
    assert_eq!(rows(&gguf, "blk.0.attn_gate.weight", WIDTH), heads(0, HEAD));
    assert_eq!(rows(&gguf, "blk.0.ssm_alpha.weight", WIDTH), TURNS);
    assert_eq!(rows(&gguf, "blk.0.ssm_beta.weight", WIDTH), TURNS);
    let steps: Vec<usize> = values(&gguf, "blk.0.ssm_dt.bias").iter().map(|value| *value as usize).collect();
    assert_eq!(steps, TURNS);
    let decays: Vec<f32> = TURNS.iter().map(|head| -((*head as f64).exp() as f32)).collect();
    assert_eq!(values(&gguf, "blk.0.ssm_a"), decays);
    let kernels: Vec<usize> =
        values(&gguf, "blk.0.ssm_conv1d.weight").iter().map(|value| *value as usize / 4).collect();
    assert_eq!(kernels, fused.iter().flat_map(|row| [*row; 4]).collect::<Vec<usize>>());
    assert_eq!(gguf.tensor("blk.0.ssm_conv1d.weight").unwrap().shape, [4, (2 * KEYS + VALUES) as u64]);
    let columns: Vec<usize> =
        values(&gguf, "blk.0.ssm_out.weight")[..VALUES].iter().map(|value| (value * 64.0) as usize).collect();
    assert_eq!(columns, heads(0, HEAD));
    // All norms but that of the delta net are stored minus one.
    assert_eq!(values(&gguf, "blk.0.ssm_norm.weight"), [0.75; HEAD]);
    assert_eq!(values(&gguf, "blk.3.attn_q_norm.weight"), [1.5; HEAD]);
    assert_eq!(values(&gguf, "blk.0.post_attention_norm.weight"), [1.25; WIDTH]);
    assert_eq!(values(&gguf, "output_norm.weight"), [1.125; WIDTH]);
}

#[test]
fn blocks_of_further_tokens_stand_behind_the_layers_unless_they_are_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let folder = hybrid().write_sharded(&dir.path().join("model"), 2);
    let (gguf, said) = converted(&folder, &[]);
    let number = |gguf: &Gguf, key: &str| gguf.metadata().u32(&format!("qwen35.{key}")).unwrap();
    assert_eq!(number(&gguf, "block_count"), Some(5));
    assert_eq!(number(&gguf, "nextn_predict_layers"), Some(1));
    assert_eq!(values(&gguf, "blk.4.nextn.enorm.weight"), [1.0; WIDTH]);
    for name in ["nextn.eh_proj", "nextn.hnorm", "nextn.shared_head_norm", "attn_q", "ffn_up"] {
        assert!(gguf.tensor(&format!("blk.4.{name}.weight")).is_some(), "{name}");
    }
    assert!(!said.contains("further tokens"), "{said}");

    let (dropped, said) = converted(&folder, &["--drop-mtp"]);
    assert_eq!(number(&dropped, "block_count"), Some(4));
    assert_eq!(number(&dropped, "nextn_predict_layers"), None);
    assert!(!dropped.tensors().iter().any(|tensor| tensor.name.starts_with("blk.4.")));
    assert!(!said.contains("further tokens"), "{said}");

    // The configuration speaks of a block that the folder does not hold.
    let mut source = hybrid();
    source.tensors.retain(|name, _| !name.starts_with("mtp."));
    let (gguf, said) = converted(&source.write(&dir.path().join("without")), &[]);
    assert_eq!(number(&gguf, "block_count"), Some(4));
    assert!(said.contains("no tensors of the blocks that predict further tokens"), "{said}");

    // The folder holds a block that the configuration does not speak of.
    let mut source = hybrid();
    source.config.as_object_mut().unwrap().remove("mtp_num_hidden_layers");
    let (gguf, _) = converted(&source.write(&dir.path().join("unsaid")), &[]);
    assert_eq!(number(&gguf, "nextn_predict_layers"), Some(1));
}

#[test]
fn tensors_of_blocks_that_are_missing_or_misshapen_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let cases: [(&str, Option<Raw>, &str); 6] = [
        ("model.layers.1.linear_attn.A_log", None, "is missing; Qwen3_5ForCausalLM needs it with shape [6]"),
        (
            "model.layers.1.linear_attn.conv1d.weight",
            Some(matrix(40, 4)),
            "has shape [40, 4]; config.json implies [40, 1, 4]",
        ),
        ("model.layers.2.linear_attn.in_proj_qkv.weight", Some(matrix(39, WIDTH)), "config.json implies [40, 8]"),
        ("model.layers.3.self_attn.q_proj.weight", Some(matrix(WIDTH, WIDTH)), "config.json implies [16, 8]"),
        ("mtp.fc.weight", None, "is missing"),
        ("mtp.layers.0.self_attn.v_proj.weight", None, "is missing"),
    ];
    for (name, tensor, expected) in cases {
        let mut source = hybrid();
        match tensor {
            Some(tensor) => source.tensors.insert(name.into(), tensor),
            None => source.tensors.remove(name),
        };
        let error = refused(&source, &dir.path().join("model"));
        assert!(error.contains(expected), "{name}: {error}");
    }
    // Attention where the number of the layer asks for a delta net.
    let mut source = hybrid();
    attention(&mut source.tensors, "model.layers.0.");
    let error = refused(&source, &dir.path().join("both"));
    assert!(error.contains("model.layers.0.self_attn"), "{error}");
}

#[test]
fn settings_of_blocks_that_gguf_cannot_express_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let cases: [(&str, Json, &str); 5] = [
        ("linear_num_value_heads", json!(5), "expected a multiple of linear_num_key_heads, 2"),
        ("linear_num_key_heads", json!(0), "linear_num_key_heads is 0"),
        ("linear_conv_kernel_dim", Json::Null, "linear_conv_kernel_dim is missing"),
        ("layer_types", json!(["full_attention"]), "full attention in every 4th layer"),
        ("mtp_num_hidden_layers", json!(4_000_000), "expected at most 10000"),
    ];
    for (field, value, expected) in cases {
        let mut source = hybrid();
        source.config[field] = value;
        let error = refused(&source, &dir.path().join("model"));
        assert!(error.contains(expected), "{field}: {error}");
    }
}

#[test]
fn a_gate_that_is_off_is_warned_of() {
    let dir = tempfile::tempdir().unwrap();
    let mut source = hybrid();
    source.config["attn_output_gate"] = json!(false);
    source.config["hidden_act"] = json!("relu");
    let (_, said) = converted(&source.write(&dir.path().join("model")), &[]);
    assert!(said.contains("attn_output_gate is false; llama.cpp computes qwen35 with true"), "{said}");
    assert!(said.contains("hidden_act is relu; llama.cpp computes qwen35 with silu"), "{said}");
}
