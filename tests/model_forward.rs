//! The forward pass on the small model of the repository: taps, replaced tensors, kept states, shared prefixes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

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
    let mut kept = HiddenStates::from_parts(cached.group().clone(), 3, 256, cached.data().to_vec()).unwrap();
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
