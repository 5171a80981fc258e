//! Models whose metadata or tensors contradict each other: one clear line, never a panic.

use std::collections::BTreeMap;
use std::sync::Arc;

use lwq::gguf::Gguf;
use lwq::gguf::testing::RawGguf;
use lwq::model::{ForwardOptions, Model, ModelError, NoTaps, Overrides, TapInput, Taps, TokenGroup};

#[derive(Clone, Debug)]
enum Key {
    U32(u32),
    U64(u64),
    I32(i32),
    F32(f32),
    Str(Vec<u8>),
    I32s(Vec<i32>),
    Bool(bool),
}

#[derive(Clone)]
struct Spec {
    arch: &'static str,
    keys: BTreeMap<String, Key>,
    tensors: BTreeMap<String, Vec<u64>>,
}

const VOCAB: u64 = 11;
const EMBD: u64 = 8;
const FF: u64 = 12;
const EXPERTS: u64 = 3;

impl Spec {
    /// Two layers of width 8, two heads of 4, one key/value head.
    fn new(arch: &'static str, experts: bool) -> Spec {
        Spec::of_layers(arch, experts, 2)
    }

    fn of_layers(arch: &'static str, experts: bool, layers: u32) -> Spec {
        let mut spec = Spec { arch, keys: BTreeMap::new(), tensors: BTreeMap::new() };
        spec.keys.insert("general.architecture".into(), Key::Str(arch.into()));
        for (key, value) in [
            ("block_count", layers),
            ("context_length", 64),
            ("embedding_length", EMBD as u32),
            ("feed_forward_length", FF as u32),
            ("attention.head_count", 2),
            ("attention.head_count_kv", 1),
            ("rope.dimension_count", 4),
        ] {
            spec.set(key, Key::U32(value));
        }
        spec.set("attention.layer_norm_rms_epsilon", Key::F32(1e-5));
        spec.tensor("token_embd.weight", &[EMBD, VOCAB]);
        spec.tensor("output.weight", &[EMBD, VOCAB]);
        spec.tensor("output_norm.weight", &[EMBD]);
        for il in 0..layers {
            for (part, shape) in [
                ("attn_norm", vec![EMBD]),
                ("attn_q", vec![EMBD, 8]),
                ("attn_k", vec![EMBD, 4]),
                ("attn_v", vec![EMBD, 4]),
                ("attn_output", vec![8, EMBD]),
            ] {
                spec.tensor(&format!("blk.{il}.{part}.weight"), &shape);
            }
            let (suffix, stack) = if experts { ("_exps", vec![EXPERTS]) } else { ("", vec![]) };
            for (part, shape) in [("gate", [EMBD, FF]), ("up", [EMBD, FF]), ("down", [FF, EMBD])] {
                spec.tensor(&format!("blk.{il}.ffn_{part}{suffix}.weight"), &[shape.to_vec(), stack.clone()].concat());
            }
            if experts {
                spec.tensor(&format!("blk.{il}.ffn_gate_inp.weight"), &[EMBD, EXPERTS]);
            }
            spec.tensor(&format!("blk.{il}.ffn_norm.weight"), &[EMBD]);
        }
        if experts {
            spec.set("expert_count", Key::U32(EXPERTS as u32));
            spec.set("expert_used_count", Key::U32(2));
        }
        spec
    }

    fn set(&mut self, key: &str, value: Key) {
        self.keys.insert(format!("{}.{key}", self.arch), value);
    }

    fn tensor(&mut self, name: &str, shape: &[u64]) {
        self.tensors.insert(name.into(), shape.to_vec());
    }

    /// Adds tensors to a layer.
    fn add(&mut self, il: u32, tensors: &[(&str, &[u64])]) {
        tensors.iter().for_each(|(part, shape)| self.tensor(&format!("blk.{il}.{part}"), shape));
    }

    /// Takes tensors from a layer.
    fn remove(&mut self, il: u32, parts: &[&str]) {
        parts.iter().for_each(|part| {
            self.tensors.remove(&format!("blk.{il}.{part}.weight"));
        });
    }

    /// Numbers under the architecture's name.
    fn set_all(&mut self, values: &[(&str, u32)]) {
        values.iter().for_each(|(key, value)| self.set(key, Key::U32(*value)));
    }

    fn build(&self) -> Vec<u8> {
        let mut file = RawGguf::new();
        for (key, value) in &self.keys {
            file = match value {
                Key::U32(v) => file.u32(key, *v),
                Key::U64(v) => file.u64(key, *v),
                Key::I32(v) => file.i32(key, *v),
                Key::F32(v) => file.f32(key, *v),
                Key::Str(v) => file.str(key, v),
                Key::I32s(v) => file.i32s(key, v),
                Key::Bool(v) => file.bool(key, *v),
            };
        }
        for (index, (name, shape)) in self.tensors.iter().enumerate() {
            let elements = shape.iter().product::<u64>() as usize;
            let values: Vec<f32> = (0..elements).map(|i| ((i * 37 + index * 11) % 17) as f32 / 17.0 - 0.4).collect();
            file = file.f32_tensor(name, shape, &values);
        }
        file.build()
    }

    /// Opens and runs the model; the error's text if it is refused.
    fn run(&self) -> Result<(), String> {
        let gguf = Gguf::from_bytes(self.build()).map_err(|e| e.to_string())?;
        let model = Model::open(&gguf).map_err(|e| e.to_string())?;
        let pass = model.pass(ForwardOptions::default(), Overrides::new()).map_err(|e| e.to_string())?;
        let mut group = TokenGroup::from_sequences([vec![1, 2, 3, 4, 5], vec![6, 7]]);
        group.push_continuation(1, &[8, 9]).map_err(|e| e.to_string())?;
        let mut hidden = pass.embed(Arc::new(group)).map_err(|e| e.to_string())?;
        pass.run_remaining(&mut hidden, &mut NoTaps).map_err(|e| e.to_string())?;
        pass.logits(&hidden, &[0, 8], &mut NoTaps, |_| Ok(())).map_err(|e| e.to_string())?;
        model.group_tokens(None, 512);
        Ok(())
    }

    /// Runs a broken variant: refused in one line, or computed.
    fn survives(&self, what: &str) -> bool {
        match self.run() {
            Ok(()) => true,
            Err(text) => {
                assert!(!text.contains('\n') && text.len() < 500, "{what}: {text}");
                false
            }
        }
    }

    /// What the model warns of.
    fn warnings(&self) -> Vec<String> {
        let gguf = Gguf::from_bytes(self.build()).unwrap();
        Model::open(&gguf).unwrap().warnings().to_vec()
    }
}

fn sound_models() -> Vec<Spec> {
    let mut gemma3 = Spec::new("gemma3", false);
    gemma3.set("attention.sliding_window", Key::U32(3));
    gemma3.set("attention.sliding_window_pattern", Key::U32(2));
    let mut gpt_oss = Spec::new("gpt-oss", true);
    gpt_oss.set("attention.sliding_window", Key::U32(3));
    gpt_oss.set("expert_feed_forward_length", Key::U32(FF as u32));
    let mut qwen2moe = Spec::new("qwen2moe", true);
    qwen2moe.set("expert_feed_forward_length", Key::U32(FF as u32));
    qwen2moe.set("expert_shared_feed_forward_length", Key::U32(5));
    for il in 0..2 {
        for part in ["attn_q_norm", "attn_k_norm"] {
            gemma3.tensor(&format!("blk.{il}.{part}.weight"), &[4]);
        }
        for part in ["post_attention_norm", "post_ffw_norm"] {
            gemma3.tensor(&format!("blk.{il}.{part}.weight"), &[EMBD]);
        }
        gpt_oss.tensors.remove(&format!("blk.{il}.ffn_norm.weight"));
        gpt_oss.tensor(&format!("blk.{il}.post_attention_norm.weight"), &[EMBD]);
        gpt_oss.tensor(&format!("blk.{il}.attn_sinks.weight"), &[2]);
        gpt_oss.tensor(&format!("blk.{il}.ffn_up_exps.bias"), &[FF, EXPERTS]);
        qwen2moe.tensor(&format!("blk.{il}.ffn_gate_inp_shexp.weight"), &[EMBD]);
        for (part, shape) in [("gate", [EMBD, 5]), ("up", [EMBD, 5]), ("down", [5, EMBD])] {
            qwen2moe.tensor(&format!("blk.{il}.ffn_{part}_shexp.weight"), &shape);
        }
    }
    let mut llama = Spec::new("llama", false);
    llama.set("rope.scaling.type", Key::Str(b"yarn".to_vec()));
    llama.set("rope.scaling.factor", Key::F32(4.0));
    llama.set("rope.freq_base", Key::F32(10_000.0));
    llama.set("rope.scaling.original_context_length", Key::U32(16));
    llama.tensor("rope_freqs.weight", &[2]);
    let mut qwen2vl = Spec::new("qwen2vl", false);
    qwen2vl.set("rope.dimension_sections", Key::I32s(vec![1, 1, 0, 0]));
    let mut granite = Spec::new("granite", false);
    for (key, factor) in
        [("embedding_scale", 3.0), ("residual_scale", 0.5), ("logit_scale", 2.0), ("attention.scale", 0.2)]
    {
        granite.set(key, Key::F32(factor));
    }
    let mut models = vec![llama, Spec::new("llama", true), gemma3, gpt_oss, qwen2moe, qwen2vl, granite];
    models.extend([qwen35moe(), gemma4(), gemma4_experts(), step35(), mimo2(), glm4moe(), llama4()]);
    models
}

/// A layer with a delta net, one with gated attention, and a block for further tokens; fused experts in one layer.
fn qwen35moe() -> Spec {
    let mut spec = Spec::new("qwen35moe", true);
    spec.set_all(&[
        ("block_count", 3),
        ("nextn_predict_layers", 1),
        ("full_attention_interval", 2),
        ("expert_feed_forward_length", FF as u32),
        ("expert_shared_feed_forward_length", 5),
        ("ssm.conv_kernel", 3),
        ("ssm.inner_size", 8),
        ("ssm.state_size", 2),
        ("ssm.time_step_rank", 4),
        ("ssm.group_count", 2),
    ]);
    spec.set("rope.dimension_sections", Key::I32s(vec![1, 1, 0, 0]));
    for il in 0..2 {
        spec.remove(il, &["ffn_norm"]);
        spec.add(il, &[("post_attention_norm.weight", &[EMBD]), ("ffn_gate_inp_shexp.weight", &[EMBD])]);
        for (part, shape) in [("gate", [EMBD, 5]), ("up", [EMBD, 5]), ("down", [5, EMBD])] {
            spec.tensor(&format!("blk.{il}.ffn_{part}_shexp.weight"), &shape);
        }
    }
    spec.remove(0, &["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_exps", "ffn_up_exps"]);
    spec.add(
        0,
        &[
            ("attn_qkv.weight", &[EMBD, 16]),
            ("attn_gate.weight", &[EMBD, 8]),
            ("ssm_beta.weight", &[EMBD, 4]),
            ("ssm_alpha.weight", &[EMBD, 4]),
            ("ssm_conv1d.weight", &[3, 16]),
            ("ssm_dt.bias", &[4]),
            ("ssm_a", &[4]),
            ("ssm_norm.weight", &[2]),
            ("ssm_out.weight", &[8, EMBD]),
            ("ffn_gate_up_exps.weight", &[EMBD, 2 * FF, EXPERTS]),
        ],
    );
    spec.add(1, &[("attn_q.weight", &[EMBD, 16]), ("attn_q_norm.weight", &[4]), ("attn_k_norm.weight", &[4])]);
    spec
}

/// Windows in every second layer, heads of two sizes, inputs by layer, keys of the first two layers used twice.
fn gemma4() -> Spec {
    let mut spec = Spec::of_layers("gemma4", false, 4);
    spec.set_all(&[
        ("attention.sliding_window", 3),
        ("attention.key_length", 4),
        ("attention.value_length", 4),
        ("attention.key_length_swa", 2),
        ("attention.value_length_swa", 2),
        ("rope.dimension_count_swa", 2),
        ("attention.shared_kv_layers", 2),
        ("embedding_length_per_layer_input", 4),
    ]);
    spec.set("attention.sliding_window_pattern", Key::I32s(vec![1, 0, 1, 0]));
    spec.tensor("per_layer_token_embd.weight", &[16, VOCAB]);
    spec.tensor("per_layer_model_proj.weight", &[EMBD, 16]);
    spec.tensor("per_layer_proj_norm.weight", &[4]);
    spec.tensor("rope_freqs.weight", &[2]);
    for il in 0..4 {
        let head = if il % 2 == 0 { 2 } else { 4 };
        spec.add(
            il,
            &[
                ("attn_q.weight", &[EMBD, 2 * head]),
                ("attn_output.weight", &[2 * head, EMBD]),
                ("attn_q_norm.weight", &[head]),
                ("post_attention_norm.weight", &[EMBD]),
                ("post_ffw_norm.weight", &[EMBD]),
                ("inp_gate.weight", &[EMBD, 4]),
                ("proj.weight", &[4, EMBD]),
                ("post_norm.weight", &[EMBD]),
                ("layer_output_scale.weight", &[1]),
            ],
        );
        spec.remove(il, &["attn_k", "attn_v"]);
        if il < 2 {
            spec.add(il, &[("attn_k.weight", &[EMBD, head]), ("attn_k_norm.weight", &[head])]);
        }
    }
    spec.add(0, &[("attn_v.weight", &[EMBD, 2])]);
    spec
}

/// Experts beside the dense network.
fn gemma4_experts() -> Spec {
    let mut spec = Spec::new("gemma4", true);
    spec.set_all(&[("attention.sliding_window", 3), ("expert_feed_forward_length", FF as u32)]);
    spec.set_all(&[("attention.key_length", 4), ("attention.value_length", 4)]);
    spec.set("attention.sliding_window_pattern", Key::I32s(vec![1, 0]));
    for il in 0..2 {
        spec.add(
            il,
            &[
                ("ffn_gate.weight", &[EMBD, FF]),
                ("ffn_up.weight", &[EMBD, FF]),
                ("ffn_down.weight", &[FF, EMBD]),
                ("ffn_down_exps.scale", &[EXPERTS]),
                ("ffn_gate_inp.scale", &[EMBD]),
                ("attn_q_norm.weight", &[4]),
                ("attn_k_norm.weight", &[4]),
                ("post_attention_norm.weight", &[EMBD]),
                ("post_ffw_norm.weight", &[EMBD]),
                ("post_ffw_norm_1.weight", &[EMBD]),
                ("pre_ffw_norm_2.weight", &[EMBD]),
                ("post_ffw_norm_2.weight", &[EMBD]),
            ],
        );
    }
    spec
}

/// Heads per layer, gates per head, limits per layer, a dense layer without a router.
fn step35() -> Spec {
    let mut spec = Spec::new("step35", true);
    spec.set_all(&[
        ("attention.sliding_window", 3),
        ("attention.key_length", 4),
        ("attention.value_length", 4),
        ("expert_feed_forward_length", FF as u32),
        ("expert_shared_feed_forward_length", 5),
    ]);
    spec.set("attention.sliding_window_pattern", Key::I32s(vec![0, 1]));
    spec.set("attention.head_count", Key::I32s(vec![2, 3]));
    spec.set("swiglu_clamp_exp", Key::F32(0.5));
    spec.remove(0, &["ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"]);
    spec.add(0, &[("ffn_gate.weight", &[EMBD, FF]), ("ffn_up.weight", &[EMBD, FF]), ("ffn_down.weight", &[FF, EMBD])]);
    spec.add(
        1,
        &[
            ("attn_q.weight", &[EMBD, 12]),
            ("attn_output.weight", &[12, EMBD]),
            ("attn_gate.weight", &[EMBD, 3]),
            ("exp_probs_b.bias", &[EXPERTS]),
            ("ffn_gate_shexp.weight", &[EMBD, 5]),
            ("ffn_up_shexp.weight", &[EMBD, 5]),
            ("ffn_down_shexp.weight", &[5, EMBD]),
        ],
    );
    spec
}

/// Values of another size than keys.
fn mimo2() -> Spec {
    let mut spec = Spec::new("mimo2", true);
    spec.set_all(&[
        ("attention.sliding_window", 3),
        ("attention.key_length", 4),
        ("attention.value_length", 3),
        ("attention.value_length_swa", 3),
        ("expert_feed_forward_length", FF as u32),
    ]);
    spec.set("attention.sliding_window_pattern", Key::I32s(vec![0, 1]));
    spec.set("attention.value_scale", Key::F32(0.7));
    for il in 0..2 {
        spec.add(il, &[("attn_v.weight", &[EMBD, 3]), ("attn_output.weight", &[6, EMBD])]);
    }
    spec
}

/// A dense first layer, experts by sigmoid with a bias.
fn glm4moe() -> Spec {
    let mut spec = Spec::new("glm4moe", true);
    spec.set_all(&[
        ("leading_dense_block_count", 1),
        ("expert_feed_forward_length", FF as u32),
        ("expert_shared_count", 1),
        ("expert_gating_func", 2),
    ]);
    spec.set("expert_weights_norm", Key::Bool(true));
    spec.remove(0, &["ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"]);
    spec.add(0, &[("ffn_gate.weight", &[EMBD, FF]), ("ffn_up.weight", &[EMBD, FF]), ("ffn_down.weight", &[FF, EMBD])]);
    spec.add(
        1,
        &[
            ("ffn_gate_shexp.weight", &[EMBD, FF]),
            ("ffn_up_shexp.weight", &[EMBD, FF]),
            ("ffn_down_shexp.weight", &[FF, EMBD]),
            ("exp_probs_b.bias", &[EXPERTS]),
        ],
    );
    for il in 0..2 {
        spec.remove(il, &["ffn_norm"]);
        spec.add(il, &[("post_attention_norm.weight", &[EMBD])]);
    }
    spec
}

/// Experts whose inputs are weighed, beside a shared one.
fn llama4() -> Spec {
    let mut spec = Spec::new("llama4", true);
    spec.set_all(&[("interleave_moe_layer_step", 1), ("expert_feed_forward_length", FF as u32)]);
    for il in 0..2 {
        spec.add(
            il,
            &[
                ("ffn_gate_shexp.weight", &[EMBD, FF]),
                ("ffn_up_shexp.weight", &[EMBD, FF]),
                ("ffn_down_shexp.weight", &[FF, EMBD]),
            ],
        );
    }
    spec
}

#[test]
fn the_models_that_the_other_tests_break_are_sound() {
    for spec in sound_models() {
        assert_eq!(spec.run(), Ok(()), "{}", spec.arch);
    }
}

#[test]
fn sound_models_warn_of_nothing() {
    for spec in sound_models() {
        assert_eq!(spec.warnings(), Vec::<String>::new(), "{}", spec.arch);
    }
}

#[test]
fn keys_that_the_forward_pass_ignores_are_told_unless_they_change_nothing() {
    let text = |text: &str| Key::Str(text.into());
    let cases = [
        ("attention.scale", Key::F32(0.3), Key::F32(0.5)),
        ("attention.clamp_kqv", Key::F32(8.0), Key::F32(0.0)),
        ("attention.sliding_window", Key::U32(8), Key::U32(64)),
        ("attention.max_alibi_bias", Key::F32(8.0), Key::F32(0.0)),
        ("attention.layer_norm_epsilon", Key::F32(1e-3), Key::F32(1e-5)),
        ("logit_scale", Key::F32(2.0), Key::F32(1.0)),
        ("embedding_scale", Key::F32(12.0), Key::F32(0.0)),
        ("residual_scale", Key::F32(0.5), Key::F32(1.0)),
        ("expert_weights_scale", Key::F32(2.5), Key::F32(1.0)),
        ("expert_gating_func", Key::U32(2), Key::U32(1)),
        ("expert_weights_norm", Key::Bool(false), Key::Bool(true)),
        ("expert_shared_count", Key::U32(1), Key::U32(0)),
        ("final_logit_softcapping", Key::F32(30.0), Key::F32(0.0)),
        ("attn_logit_softcapping", Key::F32(50.0), Key::F32(0.0)),
        ("rope.scaling.yarn_beta_fast", Key::F32(16.0), Key::F32(32.0)),
        ("rope.scaling.yarn_log_multiplier", Key::F32(0.1), Key::F32(0.0)),
        ("rope.dimension_sections", Key::I32s(vec![1, 1, 0, 0]), Key::I32s(vec![0; 4])),
        ("rope.freq_base_swa", Key::F32(5e3), Key::F32(1e4)),
        ("use_parallel_residual", Key::Bool(true), Key::Bool(false)),
        ("hidden_activation", text("gelu"), text("silu")),
        ("nextn_predict_layers", Key::U32(1), Key::U32(0)),
        ("interleave_moe_layer_step", Key::U32(2), Key::U32(1)),
        ("mystery", text("on"), text("")),
    ];
    let mut base = Spec::new("llama", true);
    base.set("rope.scaling.type", text("yarn"));
    base.set("rope.scaling.factor", Key::F32(4.0));
    assert_eq!(base.warnings(), Vec::<String>::new());
    for (key, on, off) in cases {
        let mut spec = base.clone();
        spec.set(key, on);
        let found = spec.warnings();
        let begin = format!("metadata key llama.{key} is ");
        assert!(found.len() == 1 && found[0].starts_with(&begin) && found[0].contains("ignores"), "{key}: {found:?}");
        spec.set(key, off);
        assert_eq!(spec.warnings(), Vec::<String>::new(), "{key}");
    }
}

#[test]
fn rotary_factors_that_are_not_read_are_told_unless_they_are_one() {
    let mut spec = Spec::new("qwen2", false);
    spec.tensor("rope_freqs.weight", &[2]);
    let found = spec.warnings();
    assert!(found.len() == 1 && found[0].contains("rope_freqs.weight") && found[0].contains("ignores"), "{found:?}");
    let mut spec = Spec::new("llama", false);
    spec.tensor("blk.1.rope_freqs.weight", &[2]);
    assert_eq!(spec.warnings().len(), 1);
    spec.tensors.remove("blk.1.rope_freqs.weight");
    spec.tensor("rope_freqs.weight", &[2]);
    assert_eq!(spec.warnings(), Vec::<String>::new());
}

#[test]
fn a_file_of_many_unknown_keys_gives_few_lines() {
    let mut spec = Spec::new("llama", false);
    (0..1000).for_each(|number| spec.set(&format!("mystery.{number}"), Key::U32(7)));
    let found = spec.warnings();
    assert!(found.len() == 21 && found[20].starts_with("980 more"), "{found:?}");
}

/// Rows that each expert of the first layer with experts saw, none of them empty.
#[derive(Default)]
struct ExpertRows(BTreeMap<usize, usize>);

impl Taps for ExpertRows {
    fn input(&mut self, input: &TapInput<'_>) -> Result<(), ModelError> {
        if let (Some(expert), true) = (input.expert, input.tensors.contains(&"blk.1.ffn_up_exps.weight")) {
            assert!(input.rows.iter().all(|row| row.iter().any(|&x| x != 0.0)));
            *self.0.entry(expert.index).or_default() += input.rows.len();
        }
        Ok(())
    }
}

#[test]
fn all_experts_see_every_token_and_change_nothing() {
    let mixtures = sound_models().into_iter().filter(|spec| spec.tensors.contains_key("blk.1.ffn_up_exps.weight"));
    let mut seen = 0;
    for spec in mixtures {
        let gguf = Gguf::from_bytes(spec.build()).unwrap();
        let model = Model::open(&gguf).unwrap();
        let run = |all_experts: bool| {
            let options = ForwardOptions { all_experts, ..ForwardOptions::default() };
            let pass = model.pass(options, Overrides::new()).unwrap();
            let mut hidden = pass.embed(Arc::new(TokenGroup::from_sequences([vec![1, 2, 3, 4, 5]]))).unwrap();
            let mut rows = ExpertRows::default();
            pass.run_remaining(&mut hidden, &mut rows).unwrap();
            (hidden.data().to_vec(), rows.0)
        };
        let ((chosen, chosen_rows), (all, all_rows)) = (run(false), run(true));
        assert_eq!(chosen, all, "{}", spec.arch);
        assert_eq!(chosen_rows.values().sum::<usize>(), 10, "{}", spec.arch);
        assert_eq!(all_rows, (0..EXPERTS as usize).map(|expert| (expert, 5)).collect(), "{}", spec.arch);
        seen += 1;
    }
    assert!(seen > 5, "{seen}");
}

#[test]
fn the_refusal_of_an_architecture_names_the_nearest_and_what_is_missing() {
    let mut spec = Spec::new("mystery", true);
    for il in 0..2 {
        spec.add(
            il,
            &[("attn_q_norm.weight", &[4]), ("attn_k_norm.weight", &[4]), ("altup_router.weight", &[EMBD, 4])],
        );
    }
    spec.add(1, &[("strange_gate.weight", &[EMBD])]);
    let error = spec.run().unwrap_err();
    for part in ["\"mystery\"", "nearest is qwen3moe", "mixture of experts", "AltUp", "strange_gate.weight"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert!(!error.contains('\n'));
}

#[test]
fn attention_both_ways_runs_and_shares_no_prefix() {
    for mut spec in sound_models() {
        spec.set("attention.causal", Key::Bool(false));
        let error = spec.run().unwrap_err();
        assert!(error.contains("needs causal attention"), "{}: {error}", spec.arch);
        spec.set("attention.causal", Key::U32(0));
        let error = spec.run().unwrap_err();
        assert!(error.contains("attention.causal") && error.contains("bool"), "{}: {error}", spec.arch);
    }
}

#[test]
fn hostile_metadata_never_panics() {
    let values = [
        Key::U32(0),
        Key::U32(1),
        Key::U32(3),
        Key::U32(512),
        Key::U32(u32::MAX),
        Key::U64(1 << 32),
        Key::U64(u64::MAX),
        Key::I32(-1),
        Key::F32(f32::NAN),
        Key::F32(f32::INFINITY),
        Key::F32(0.0),
        Key::F32(-1.0),
        Key::Str(b"none".to_vec()),
        Key::Str(b"\x1b[2J\n\xff".to_vec()),
        Key::Str(vec![b'x'; 1 << 20]),
        Key::I32s(vec![]),
        Key::I32s(vec![1, 2]),
        Key::I32s(vec![2, -7]),
        Key::I32s(vec![1; 3]),
    ];
    let mut refused = 0;
    for spec in sound_models() {
        let mut keys: Vec<String> = spec.keys.keys().cloned().collect();
        for extra in [
            "attention.key_length",
            "attention.value_length",
            "attention.key_length_swa",
            "attention.recurrent_layers",
            "attention.temperature_scale",
            "rope.dimension_count_swa",
            "rope.scaling.alpha",
            "expert_count",
            "expert_used_count",
            "expert_group_count",
            "attention.sliding_window_pattern",
            "rope.freq_base_swa",
            "final_logit_softcapping",
            "attn_logit_softcapping",
            "rope.scaling.attn_factor",
            "rope.scale_linear",
        ] {
            keys.push(format!("{}.{extra}", spec.arch));
        }
        for key in keys {
            for value in &values {
                let mut broken = spec.clone();
                broken.keys.insert(key.clone(), value.clone());
                refused += usize::from(!broken.survives(&format!("{key} = {value:?}")));
            }
            let mut broken = spec.clone();
            broken.keys.remove(&key);
            broken.survives(&format!("without {key}"));
        }
    }
    assert!(refused > 500, "{refused}");
}

#[test]
fn positions_and_multipliers_are_checked() {
    let models = sound_models();
    let of = |arch: &str| models.iter().find(|spec| spec.arch == arch).unwrap();
    for sections in [vec![], vec![0, 0, 0, 0], vec![1, -1, 0, 0], vec![1, 0, 0, 0, 0], vec![i32::MAX, 0, 0, 0]] {
        let mut spec = of("qwen2vl").clone();
        spec.set("rope.dimension_sections", Key::I32s(sections.clone()));
        assert!(spec.run().unwrap_err().contains("rope.dimension_sections"), "{sections:?}");
    }
    for factor in [0.0, f32::NAN, f32::INFINITY] {
        let mut spec = of("granite").clone();
        spec.set("logit_scale", Key::F32(factor));
        assert!(spec.run().unwrap_err().contains("granite.logit_scale"), "{factor}");
    }
}

#[test]
fn hostile_shapes_are_refused() {
    for spec in sound_models() {
        for (name, shape) in &spec.tensors {
            let mut variants = vec![vec![], [shape.clone(), vec![2]].concat(), vec![0; shape.len()]];
            let mut reversed = shape.clone();
            reversed.reverse();
            variants.push(reversed);
            for dim in 0..shape.len() {
                for change in [0, 1, shape[dim] + 1, shape[dim] - 1] {
                    let mut changed = shape.clone();
                    changed[dim] = change;
                    variants.push(changed);
                }
            }
            for variant in variants.into_iter().filter(|variant| variant != shape) {
                let mut broken = spec.clone();
                broken.tensors.insert(name.clone(), variant.clone());
                assert!(!broken.survives(&format!("{name} {variant:?}")), "{}: {name} {variant:?}", spec.arch);
            }
            let mut without = spec.clone();
            without.tensors.remove(name);
            let tied = ["llama", "gemma3", "qwen2vl", "granite", "qwen35moe", "gemma4", "glm4moe", "llama4"];
            let optional = name.ends_with(".bias") && !name.ends_with("ssm_dt.bias")
                || name == "rope_freqs.weight"
                || name == "output.weight" && tied.contains(&spec.arch)
                || name.ends_with("layer_output_scale.weight")
                || name.ends_with("_exps.scale")
                || name.ends_with("attn_v.weight") && spec.arch == "gemma4"
                || name.ends_with("attn_gate.weight") && spec.arch == "step35";
            assert_eq!(without.survives(name), optional, "{}: without {name}", spec.arch);
        }
    }
}

#[test]
fn tensors_that_no_layer_uses_are_refused() {
    for name in ["blk.2.attn_norm.weight", "blk.999999999999.x.weight", "blk.-1.attn_norm.weight", "blk.0.a\n\x1b[31m"]
    {
        let mut spec = Spec::new("llama", false);
        spec.tensor(name, &[EMBD]);
        let error = spec.run().unwrap_err();
        assert!(error.contains("is not part of architecture llama") && !error.contains(['\n', '\x1b']), "{error}");
    }
}
