//! The forward pass on the small model of the repository: taps, replaced tensors, kept states, shared prefixes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use lwq::gguf::testing::RawGguf;
use lwq::gguf::{Gguf, TensorType};
use lwq::model::{
    ForwardOptions, HiddenStates, Model, ModelError, NoTaps, Overrides, Pass, TapInput, Taps, TokenGroup,
};

const DOCLET: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/doclet-4m-f16.gguf");

fn tokens(n: usize, seed: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * 7919 + seed * 104_729) % 2048) as u32).collect()
}

fn run(pass: &Pass<'_, '_, '_>, group: TokenGroup, taps: &mut dyn Taps) -> HiddenStates {
    let mut hidden = pass.embed(Arc::new(group)).unwrap();
    pass.run_remaining(&mut hidden, taps).unwrap();
    hidden
}

fn logits(pass: &Pass<'_, '_, '_>, hidden: &HiddenStates, rows: &[usize]) -> Vec<f32> {
    let mut out = vec![0.0; rows.len() * pass.model().n_vocab()];
    pass.logits_into(hidden, rows, &mut out, &mut NoTaps).unwrap();
    out
}

#[derive(Default)]
struct Counter {
    rows: BTreeMap<String, usize>,
    widths: BTreeMap<String, usize>,
}

impl Taps for Counter {
    fn input(&mut self, input: &TapInput<'_>) -> Result<(), ModelError> {
        for name in input.tensors {
            *self.rows.entry((*name).to_owned()).or_default() += input.rows.len();
            self.widths.insert((*name).to_owned(), input.rows.width());
        }
        Ok(())
    }
}

#[test]
fn taps_see_every_row_of_every_matrix_once() {
    let gguf = Gguf::open(DOCLET).unwrap();
    let model = Model::open(&gguf).unwrap();
    let pass = model.pass(ForwardOptions::default(), Overrides::new()).unwrap();
    let sequences: Vec<_> = (0..9).map(|i| tokens(300, i)).collect();
    let mut counter = Counter::default();
    let hidden = run(&pass, TokenGroup::from_sequences(&sequences), &mut counter);
    pass.tap_output(&hidden, &[1, 5, 2699], &mut counter).unwrap();
    assert_eq!(counter.rows.remove(model.output_tensor()), Some(3));
    let matrices: Vec<_> = gguf.tensors().iter().filter(|t| t.name.starts_with("blk.") && t.shape.len() == 2).collect();
    assert_eq!(counter.rows.len(), matrices.len());
    for tensor in matrices {
        assert_eq!(counter.rows.get(&tensor.name), Some(&2700), "{}", tensor.name);
        assert_eq!(counter.widths.get(&tensor.name), Some(&(tensor.row_len() as usize)), "{}", tensor.name);
    }
}

#[test]
fn a_replaced_tensor_needs_only_the_layers_after_it() {
    let gguf = Gguf::open(DOCLET).unwrap();
    let model = Model::open(&gguf).unwrap();
    let base = model.pass(ForwardOptions::default(), Overrides::new()).unwrap();
    let name = "blk.3.ffn_down.weight";
    let tensor = gguf.tensor(name).unwrap();
    let mut zeros = Overrides::new();
    zeros.insert(name, TensorType::Q8_0, vec![0u8; tensor.elements() as usize / 32 * 34]);
    let changed = model.pass(ForwardOptions::default(), zeros).unwrap();

    let group = || TokenGroup::from_sequences([tokens(100, 1), tokens(64, 2)]);
    let whole = run(&changed, group(), &mut NoTaps);
    let mut cached = base.embed(Arc::new(group())).unwrap();
    for _ in 0..3 {
        base.run_layer(&mut cached, &mut NoTaps).unwrap();
    }
    assert_eq!(cached.next_layer(), 3);
    let mut kept = HiddenStates::from_parts(cached.group().clone(), 3, 256, &[], cached.data().to_vec()).unwrap();
    changed.run_remaining(&mut kept, &mut NoTaps).unwrap();
    assert_eq!(kept.data(), whole.data());
    base.run_remaining(&mut cached, &mut NoTaps).unwrap();
    assert_ne!(cached.data(), whole.data());
    assert!(base.run_layer(&mut cached, &mut NoTaps).is_err(), "all layers have run");
}

#[test]
fn replacements_of_the_wrong_size_are_refused() {
    let gguf = Gguf::open(DOCLET).unwrap();
    let model = Model::open(&gguf).unwrap();
    for (name, ty, len) in [
        ("blk.3.ffn_down.weight", TensorType::Q8_0, 34),
        ("blk.99.ffn_down.weight", TensorType::F32, 4),
        ("blk.3.ffn_down.weight", TensorType(99), 4),
    ] {
        let mut overrides = Overrides::new();
        overrides.insert(name, ty, vec![0u8; len]);
        assert!(matches!(model.pass(ForwardOptions::default(), overrides).err(), Some(ModelError::BadOverride { .. })));
    }
}

#[test]
fn continuations_equal_whole_sequences() {
    let gguf = Gguf::open(DOCLET).unwrap();
    let model = Model::open(&gguf).unwrap();
    let pass = model.pass(ForwardOptions::default(), Overrides::new()).unwrap();
    let (prefix, a, b) = (tokens(120, 1), tokens(30, 2), tokens(17, 3));
    let mut tree = TokenGroup::new();
    let root = tree.push(&prefix);
    tree.push_continuation(root, &a).unwrap();
    let last = tree.push_continuation(root, &b).unwrap();
    let rows: Vec<usize> = tree.rows(last).collect();
    let shared = run(&pass, tree, &mut NoTaps);
    let apart = run(&pass, TokenGroup::from_sequences([[prefix, b].concat()]), &mut NoTaps);
    let want = logits(&pass, &apart, &(120..137).collect::<Vec<_>>());
    for (x, y) in logits(&pass, &shared, &rows).iter().zip(&want) {
        assert!((x - y).abs() < 1e-3, "{x} {y}");
    }
}

#[test]
fn sequences_do_not_see_each_other_or_the_number_of_threads() {
    let gguf = Gguf::open(DOCLET).unwrap();
    let model = Model::open(&gguf).unwrap();
    let pass = model.pass(ForwardOptions::default(), Overrides::new()).unwrap();
    let sequences: Vec<_> = (0..5).map(|i| tokens(700 + i, i)).collect();
    let all = run(&pass, TokenGroup::from_sequences(&sequences), &mut NoTaps);
    let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let mut start = 0;
    for sequence in &sequences {
        let alone = one_thread.install(|| run(&pass, TokenGroup::from_sequences([sequence]), &mut NoTaps));
        assert_eq!(alone.data(), &all.data()[start * 256..(start + sequence.len()) * 256]);
        start += sequence.len();
    }
}

#[test]
fn damaged_weights_are_named() {
    let gguf = Gguf::open(DOCLET).unwrap();
    let model = Model::open(&gguf).unwrap();
    let mut overrides = Overrides::new();
    let elements = gguf.tensor("blk.2.attn_k.weight").unwrap().elements() as usize;
    let mut weights = vec![0u8; elements * 4];
    weights[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    overrides.insert("blk.2.attn_k.weight", TensorType::F32, weights);
    let pass = model.pass(ForwardOptions::default(), overrides).unwrap();
    let mut hidden = pass.embed(Arc::new(TokenGroup::from_sequences([tokens(8, 0)]))).unwrap();
    let error = pass.run_remaining(&mut hidden, &mut NoTaps).unwrap_err();
    assert!(error.to_string().starts_with("layer 2: blk.2.attn_k.weight gave NaN or infinity for token 0"), "{error}");
}

#[test]
fn runs_can_be_cancelled() {
    let gguf = Gguf::open(DOCLET).unwrap();
    let model = Model::open(&gguf).unwrap();
    let options = ForwardOptions { cancel: Some(Arc::new(AtomicBool::new(true))), ..ForwardOptions::default() };
    let pass = model.pass(options, Overrides::new()).unwrap();
    let mut hidden = pass.embed(Arc::new(TokenGroup::from_sequences([tokens(8, 0)]))).unwrap();
    assert!(matches!(pass.run_layer(&mut hidden, &mut NoTaps), Err(ModelError::Interrupted)));
}

#[test]
fn group_size_follows_the_memory() {
    let gguf = Gguf::open(DOCLET).unwrap();
    let model = Model::open(&gguf).unwrap();
    let small = model.group_tokens(Some(0), 512);
    let large = model.group_tokens(Some(4 << 30), 512);
    assert_eq!(small, 512);
    assert!(large > 10 * small && large.is_multiple_of(512));
}

/// A model of one layer whose weights are known.
struct OneLayer {
    tensors: BTreeMap<&'static str, (Vec<u64>, Vec<f32>)>,
}

const EMBD: usize = 8;
const HEAD: usize = 4;
const FF: usize = 12;
const VOCAB: usize = 11;

impl OneLayer {
    fn new() -> OneLayer {
        let shapes: [(&str, &[usize]); 11] = [
            ("token_embd.weight", &[EMBD, VOCAB]),
            ("output_norm.weight", &[EMBD]),
            ("blk.0.attn_norm.weight", &[EMBD]),
            ("blk.0.attn_q.weight", &[EMBD, EMBD]),
            ("blk.0.attn_k.weight", &[EMBD, HEAD]),
            ("blk.0.attn_v.weight", &[EMBD, HEAD]),
            ("blk.0.attn_output.weight", &[EMBD, EMBD]),
            ("blk.0.ffn_norm.weight", &[EMBD]),
            ("blk.0.ffn_gate.weight", &[EMBD, FF]),
            ("blk.0.ffn_up.weight", &[EMBD, FF]),
            ("blk.0.ffn_down.weight", &[FF, EMBD]),
        ];
        let tensors = shapes.iter().enumerate().map(|(index, (name, shape))| {
            let count: usize = shape.iter().product();
            let values = (0..count).map(|i| ((i * 37 + index * 11) % 17) as f32 / 8.5 - 0.9).collect();
            (*name, (shape.iter().map(|&n| n as u64).collect(), values))
        });
        OneLayer { tensors: tensors.collect() }
    }

    fn gguf(&self, causal: bool) -> Gguf {
        let mut file = RawGguf::new().str("general.architecture", "llama").bool("llama.attention.causal", causal);
        for (key, value) in [
            ("block_count", 1),
            ("context_length", 512),
            ("embedding_length", EMBD),
            ("feed_forward_length", FF),
            ("attention.head_count", EMBD / HEAD),
            ("attention.head_count_kv", 1),
        ] {
            file = file.u32(&format!("llama.{key}"), value as u32);
        }
        file = file.f32("llama.attention.layer_norm_rms_epsilon", 1e-5);
        for (name, (shape, values)) in &self.tensors {
            file = file.f32_tensor(name, shape, values);
        }
        Gguf::from_bytes(file.build()).unwrap()
    }

    fn vector(&self, name: &str) -> &[f32] {
        &self.tensors[name].1
    }

    fn times(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let dot = |row: &[f32]| row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum();
        self.vector(name).chunks(x.len()).map(dot).collect()
    }

    fn normed(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + 1e-5;
        x.iter().zip(self.vector(name)).map(|(x, w)| x / mean.sqrt() * f64::from(*w)).collect()
    }

    /// Queries or keys of one head after their turn.
    fn turned(mut head: Vec<f64>, position: usize) -> Vec<f64> {
        for (pair, values) in head.chunks_mut(2).enumerate() {
            let angle = position as f64 * 10_000f64.powf(-2.0 * pair as f64 / HEAD as f64);
            let (a, b) = (values[0], values[1]);
            values[0] = a * angle.cos() - b * angle.sin();
            values[1] = a * angle.sin() + b * angle.cos();
        }
        head
    }

    /// The layer as a textbook has it, one sequence at a time; `sees` says which positions one sees.
    fn run(&self, tokens: &[u32], sees: impl Fn(usize, usize) -> bool) -> Vec<f64> {
        let embd = self.vector("token_embd.weight");
        let embedded: Vec<Vec<f64>> =
            tokens.iter().map(|&t| embd[t as usize * EMBD..][..EMBD].iter().map(|x| f64::from(*x)).collect()).collect();
        let inputs: Vec<Vec<f64>> = embedded.iter().map(|x| self.normed("blk.0.attn_norm.weight", x)).collect();
        let turned = |(position, x): (usize, &Vec<f64>)| Self::turned(self.times("blk.0.attn_k.weight", x), position);
        let keys: Vec<Vec<f64>> = inputs.iter().enumerate().map(turned).collect();
        let values: Vec<Vec<f64>> = inputs.iter().map(|x| self.times("blk.0.attn_v.weight", x)).collect();
        let mut out = Vec::new();
        for (position, (x, input)) in embedded.iter().zip(&inputs).enumerate() {
            let mut mixed = Vec::new();
            for query in self.times("blk.0.attn_q.weight", input).chunks(HEAD) {
                let query = Self::turned(query.to_vec(), position);
                let weight = |other: usize| match sees(position, other) {
                    true => (query.iter().zip(&keys[other]).map(|(q, k)| q * k).sum::<f64>() / 2.0).exp(),
                    false => 0.0,
                };
                let weights: Vec<f64> = (0..tokens.len()).map(weight).collect();
                let total: f64 = weights.iter().sum();
                mixed
                    .extend((0..HEAD).map(|i| weights.iter().zip(&values).map(|(w, v)| w * v[i]).sum::<f64>() / total));
            }
            let attended: Vec<f64> =
                x.iter().zip(self.times("blk.0.attn_output.weight", &mixed)).map(|(x, o)| x + o).collect();
            let normed = self.normed("blk.0.ffn_norm.weight", &attended);
            let gate = self.times("blk.0.ffn_gate.weight", &normed);
            let up = self.times("blk.0.ffn_up.weight", &normed);
            let inner: Vec<f64> = gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            out.extend(attended.iter().zip(self.times("blk.0.ffn_down.weight", &inner)).map(|(a, f)| a + f));
        }
        out
    }
}

#[test]
fn a_layer_agrees_with_the_textbook_one_way_and_both_ways() {
    let layer = OneLayer::new();
    let sequences: Vec<Vec<u32>> =
        [130, 7, 1].iter().map(|&n| (0..n).map(|i| ((i * 7 + n) % VOCAB) as u32).collect()).collect();
    for causal in [true, false] {
        let gguf = layer.gguf(causal);
        let model = Model::open(&gguf).unwrap();
        assert_eq!((model.is_causal(), model.check_predicts().is_ok()), (causal, causal));
        let pass = model.pass(ForwardOptions::default(), Overrides::new()).unwrap();
        let hidden = run(&pass, TokenGroup::from_sequences(&sequences), &mut NoTaps);
        let sees = |position: usize, other: usize| other <= position || !causal;
        let want: Vec<f64> = sequences.iter().flat_map(|tokens| layer.run(tokens, sees)).collect();
        for (got, want) in hidden.data().iter().zip(&want) {
            assert!((f64::from(*got) - want).abs() < 1e-3 * want.abs().max(1.0), "{causal}: {got} {want}");
        }
    }
}
