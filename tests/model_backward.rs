//! The way back through whole models: gradients are the slopes of the loss, at hidden states and at weights.

use std::collections::HashMap;
use std::sync::Arc;

use lwq::gguf::{Gguf, TensorType};
use lwq::model::{
    Activations, ForwardOptions, GradientTaps, HiddenStates, Model, ModelError, NoTaps, OutputLoss, Overrides, Pass,
    SampledLabels, TapGradient, TapInput, Taps, TokenGroup,
};
use lwq::quant;

const DOCLET: &str = "tests/data/doclet-4m-f16.gguf";
const HYBRID: &str = "tests/data/doclet-hybrid-f16.gguf";

/// Cross entropy with the next token of a text as label.
#[derive(Default)]
struct NextToken {
    loss: f64,
}

impl OutputLoss for NextToken {
    fn gradient(&mut self, _group: &TokenGroup, rows: &[usize], logits: &mut [f32]) -> Result<(), ModelError> {
        let n_vocab = logits.len() / rows.len();
        for (&row, logits) in rows.iter().zip(logits.chunks_mut(n_vocab)) {
            let label = token(row + 1) as usize;
            let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
            self.loss += sum.ln() - f64::from(logits[label]);
            logits.iter_mut().for_each(|x| *x = (f64::from(*x).exp() / sum) as f32);
            logits[label] -= 1.0;
        }
        Ok(())
    }
}

fn token(at: usize) -> u32 {
    (at * at * 7 + at * 31 + 11) as u32 % 1000
}

/// Two sequences, the longer one of more than one block of a recurrence.
fn group() -> Arc<TokenGroup> {
    let tokens: Vec<u32> = (0..100).map(token).collect();
    Arc::new(TokenGroup::from_sequences([&tokens[..70], &tokens[70..]]))
}

/// The inputs of the matrices, and the gradients at their outputs.
#[derive(Default)]
struct Seen {
    inputs: HashMap<String, (usize, Vec<f32>)>,
    gradients: HashMap<String, (usize, Vec<f32>)>,
}

impl Taps for Seen {
    fn input(&mut self, input: &TapInput<'_>) -> Result<(), ModelError> {
        for &tensor in input.tensors {
            let width = input.rows.width();
            let (_, rows) = self.inputs.entry(tensor.to_owned()).or_insert((width, Vec::new()));
            rows.extend_from_slice(input.rows.data());
        }
        Ok(())
    }
}

impl GradientTaps for Seen {
    fn wants(&self, _tensor: &str) -> bool {
        true
    }

    fn gradient(&mut self, gradient: &TapGradient<'_>) -> Result<(), ModelError> {
        let width = gradient.rows.width();
        let (_, rows) = self.gradients.entry(gradient.tensor.to_owned()).or_insert((width, Vec::new()));
        rows.extend_from_slice(gradient.rows.data());
        Ok(())
    }
}

impl Seen {
    /// The gradient at the weights of a matrix, `[n_out, n_in]`: the sum of `g xᵀ`.
    fn of_weights(&self, tensor: &str) -> Vec<f32> {
        let ((n_in, x), (n_out, g)) = (&self.inputs[tensor], &self.gradients[tensor]);
        let mut sums = vec![0.0f64; n_in * n_out];
        for (x, g) in x.chunks(*n_in).zip(g.chunks(*n_out)) {
            for (sums, g) in sums.chunks_mut(*n_in).zip(g) {
                sums.iter_mut().zip(x).for_each(|(sum, x)| *sum += f64::from(*g) * f64::from(*x));
            }
        }
        sums.into_iter().map(|sum| sum as f32).collect()
    }
}

/// The states that enter each layer and leave the last, and the gradients at them.
fn there_and_back(pass: &Pass<'_, '_, '_>, seen: &mut Seen) -> (Vec<HiddenStates>, Vec<HiddenStates>) {
    let n_layer = pass.model().n_layer();
    let mut states = vec![pass.embed(group()).unwrap()];
    for layer in 0..n_layer {
        let mut hidden = states[layer].clone();
        pass.run_layer(&mut hidden, seen).unwrap();
        states.push(hidden);
    }
    pass.tap_output(&states[n_layer], &(0..100).collect::<Vec<_>>(), seen).unwrap();
    let mut gradients = vec![pass.head_gradient(&states[n_layer], &mut NextToken::default(), seen).unwrap()];
    for input in states[..n_layer].iter().rev() {
        let gradient = pass.layer_gradient(input, gradients[gradients.len() - 1].clone(), seen).unwrap();
        assert_eq!(gradient.next_layer(), input.next_layer());
        gradients.push(gradient);
    }
    gradients.reverse();
    (states, gradients)
}

fn loss_from(pass: &Pass<'_, '_, '_>, mut hidden: HiddenStates) -> f64 {
    pass.run_remaining(&mut hidden, &mut NoTaps).unwrap();
    let mut loss = NextToken::default();
    let rows: Vec<usize> = (0..hidden.group().len()).collect();
    pass.logits(&hidden, &rows, &mut NoTaps, |tile| loss.gradient(&group(), tile.rows, &mut tile.logits.to_vec()))
        .unwrap();
    loss.loss
}

fn square(values: &[f32]) -> f64 {
    values.iter().map(|&x| f64::from(x) * f64::from(x)).sum()
}

/// Asserts that the loss changes along a direction by as much as the direction's squared length: that it is the gradient.
/// `loss` is given what to multiply the direction by.
fn assert_slope(what: &str, direction: &[f32], loss: impl Fn(f64) -> f64) {
    let length = square(direction);
    assert!(length > 0.0, "{what} has no gradient");
    // So small that the loss is straight there, so large that it is far above what f32 rounds: both differ by thousandths. A
    // step on which a token's experts change tells of that change, and a smaller one misses it.
    let mut slopes = Vec::new();
    for (change, within) in [(0.03, 2e-3), (0.006, 1e-2), (0.0015, 3e-2)] {
        let step = change / length;
        let slope = (loss(step) - loss(-step)) / (2.0 * step);
        if (slope / length - 1.0).abs() < within {
            return;
        }
        slopes.push(slope);
    }
    panic!("{what}: {slopes:?} for {length}");
}

fn opened(path: &str) -> Gguf {
    Gguf::open(path).unwrap()
}

#[test]
fn gradients_at_hidden_states_are_the_slopes_of_the_loss() {
    for path in [DOCLET, HYBRID] {
        let gguf = opened(path);
        let model = Model::open(&gguf).unwrap();
        let pass = model.pass(ForwardOptions::default(), Overrides::new()).unwrap();
        let (states, gradients) = there_and_back(&pass, &mut Seen::default());
        for (states, gradient) in states.iter().zip(&gradients) {
            let layer = states.next_layer();
            assert_slope(&format!("{path}, layer {layer}"), gradient.data(), |step| {
                let moved = states.data().iter().zip(gradient.data());
                let moved = moved.map(|(x, g)| (f64::from(*x) + step * f64::from(*g)) as f32).collect();
                let n_embd = model.hparams().n_embd;
                loss_from(&pass, HiddenStates::from_parts(group(), layer, n_embd, &[], moved).unwrap())
            });
        }
    }
}

#[test]
fn taps_see_the_gradients_of_every_matrix() {
    for path in [DOCLET, HYBRID] {
        let gguf = opened(path);
        let model = Model::open(&gguf).unwrap();
        let pass = model.pass(ForwardOptions::default(), Overrides::new()).unwrap();
        let mut seen = Seen::default();
        there_and_back(&pass, &mut seen);
        let matrices = gguf.tensors().iter().filter(|t| t.shape.len() == 2 && seen.inputs.contains_key(&t.name));
        let mut checked = 0;
        for tensor in matrices
            .filter(|t| !t.name.starts_with("blk.") || t.name.starts_with("blk.1") || t.name.starts_with("blk.3"))
        {
            assert!(seen.gradients.contains_key(&tensor.name), "{} has no gradient", tensor.name);
            if tensor.name == model.output_tensor() {
                // Here the embedding, too: another gradient.
                continue;
            }
            let direction = seen.of_weights(&tensor.name);
            let mut weights = vec![0.0f32; direction.len()];
            quant::dequantize(tensor.ty, gguf.data(tensor).unwrap(), &mut weights).unwrap();
            assert_slope(&format!("{path}, {}", tensor.name), &direction, |step| {
                let moved = weights.iter().zip(&direction);
                let moved: Vec<u8> =
                    moved.flat_map(|(w, g)| ((f64::from(*w) + step * f64::from(*g)) as f32).to_le_bytes()).collect();
                let mut overrides = Overrides::new();
                overrides.insert(tensor.name.clone(), TensorType::F32, moved);
                let pass = model.pass(ForwardOptions::default(), overrides).unwrap();
                loss_from(&pass, pass.embed(group()).unwrap())
            });
            checked += 1;
        }
        assert!(checked >= 7, "{path}: {checked}");
    }
}

#[test]
fn gradients_are_the_same_for_any_number_of_threads() {
    for path in [DOCLET, HYBRID] {
        let gguf = opened(path);
        let model = Model::open(&gguf).unwrap();
        let pass = model.pass(ForwardOptions::default(), Overrides::new()).unwrap();
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut seen = Seen::default();
            let (_, gradients) = pool.install(|| there_and_back(&pass, &mut seen));
            (gradients[0].data().to_vec(), seen.gradients)
        };
        let one = with(1);
        for threads in [2, 3] {
            assert!(one == with(threads), "{path} with {threads} threads");
        }
    }
}

#[test]
fn what_has_no_gradient_is_refused() {
    let gguf = opened(DOCLET);
    let model = Model::open(&gguf).unwrap();
    let pass = model.pass(ForwardOptions::default(), Overrides::new()).unwrap();
    let (states, gradients) = there_and_back(&pass, &mut Seen::default());
    let taps = &mut Seen::default();
    let wrong = pass.layer_gradient(&states[1], gradients[1].clone(), taps).unwrap_err().to_string();
    assert!(wrong.contains("of what leaves the layer"), "{wrong}");

    let mut tree = TokenGroup::new();
    let root = tree.push(&[1, 2]);
    tree.push_continuation(root, &[3]).unwrap();
    let mut hidden = pass.embed(Arc::new(tree)).unwrap();
    pass.run_remaining(&mut hidden, &mut NoTaps).unwrap();
    let error = pass.head_gradient(&hidden, &mut SampledLabels::new(0, 0), taps).unwrap_err().to_string();
    assert!(error.contains("continuations"), "{error}");

    let options = ForwardOptions { activations: Activations::Ggml, ..ForwardOptions::default() };
    let rounded = model.pass(options, Overrides::new()).unwrap();
    let error = rounded.layer_gradient(&states[0], gradients[1].clone(), taps).unwrap_err().to_string();
    assert!(error.contains("unrounded activations"), "{error}");
}
