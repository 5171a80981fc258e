use std::collections::BTreeMap;

use super::*;
use crate::gguf::Gguf;

const MODEL: &str = "tests/data/doclet-4m-f16.gguf";

fn text(tokens: usize) -> Sequences {
    let tokens: Vec<u32> = (0..tokens as u32).map(|at| (at * at * 7 + at * 31 + 11) % 1000).collect();
    Sequences::new("text", &tokens, usize::MAX, 64, None).unwrap()
}

fn moments(model: &Model<'_>, seed: u64, memory: u64) -> (f64, BTreeMap<String, SecondMoment>) {
    let (loss, moments, _) = gradients(model, seed, memory);
    (loss, moments)
}

/// Loss, moments of what is wanted whole, and squares of all else.
type Found = (f64, BTreeMap<String, SecondMoment>, BTreeMap<String, GradientSquares>);

fn gradients(model: &Model<'_>, seed: u64, memory: u64) -> Found {
    let folder = tempfile::tempdir().unwrap();
    let names = |found: Vec<&str>| found.into_iter().map(str::to_owned).collect();
    let (tensors, squares) = (names(model.gradient_matrices()), names(model.further_gradient_matrices()));
    let settings = GradientSettings { seed, tensors, squares, states_memory: memory };
    let mut all = All::default();
    let loss = gradient_moments(model, &text(256), &settings, folder.path(), &(), &mut all);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "states stay behind");
    (loss.unwrap(), all.moments, all.squares)
}

/// Keeps everything.
#[derive(Default)]
struct All {
    moments: BTreeMap<String, SecondMoment>,
    squares: BTreeMap<String, GradientSquares>,
}

impl GradientSink for All {
    fn take(
        &mut self,
        _layer: usize,
        found: Vec<(String, OutputGradients)>,
        _gradients: &[HiddenStates],
        _loss: f64,
    ) -> Result<(), MomentsError> {
        for (name, found) in found {
            match found {
                OutputGradients::Moment(found) => drop(self.moments.insert(name, found)),
                OutputGradients::Squares(found) => drop(self.squares.insert(name, found)),
            }
        }
        Ok(())
    }
}

/// The gradients of all tokens.
#[derive(Default)]
struct Exact(BTreeMap<String, (usize, Vec<f32>)>);

impl GradientTaps for Exact {
    fn wants(&self, _tensor: &str) -> bool {
        true
    }

    fn gradient(&mut self, gradient: &TapGradient<'_>) -> Result<(), ModelError> {
        let (_, rows) = self.0.entry(gradient.tensor.to_owned()).or_insert((gradient.rows.width(), Vec::new()));
        rows.extend_from_slice(gradient.rows.data());
        Ok(())
    }
}

/// The gradients from the states that a run keeps: of others the model would draw other labels now and then.
fn exact(model: &Model<'_>, seed: u64) -> Exact {
    let folder = tempfile::tempdir().unwrap();
    let pass = model.pass(ForwardOptions::default(), Overrides::new()).unwrap();
    let group = text(256).batches()[0].clone();
    let mut states = States::new(model, 256, folder.path(), u64::MAX).unwrap();
    states.write(model, 0, &pass.embed(group.clone()).unwrap()).unwrap();
    for layer in 0..model.n_layer() {
        let mut hidden = states.read(model, layer, 0, &group).unwrap();
        pass.run_layer(&mut hidden, &mut NoTaps).unwrap();
        states.write(model, 0, &hidden).unwrap();
    }
    let mut exact = Exact::default();
    let last = states.read(model, model.n_layer(), 0, &group).unwrap();
    let mut gradient = pass.head_gradient(&last, &mut SampledLabels::new(seed, 0), &mut exact).unwrap();
    for layer in (0..model.n_layer()).rev() {
        let input = states.read(model, layer, 0, &group).unwrap();
        gradient = pass.layer_gradient(&input, gradient, &mut exact).unwrap();
    }
    exact
}

#[test]
fn squares_of_all_other_matrices_are_told() {
    let gguf = Gguf::open(MODEL).unwrap();
    let model = Model::open(&gguf).unwrap();
    let (_, _, squares) = gradients(&model, 4, u64::MAX);
    // Gate and up of every layer, and the embedding, which is the output here.
    assert_eq!(squares.len(), 2 * model.n_layer() + 1);
    let exact = exact(&model, 4);
    for (name, found) in &squares {
        let (n, rows) = &exact.0[name];
        assert_eq!((found.mean.len(), found.tokens), (*n, 256));
        let mut expected = vec![0.0f64; *n];
        for row in rows.chunks(*n) {
            expected.iter_mut().zip(row).for_each(|(sum, g)| *sum += f64::from(*g) * f64::from(*g) / 256.0);
        }
        let all: f64 = expected.iter().sum();
        for (found, expected) in found.mean.iter().zip(&expected) {
            assert!((f64::from(*found) - expected).abs() < 1e-2 * expected + 1e-4 * all / *n as f64, "{name}");
        }
    }
}

#[test]
fn moments_are_the_mean_products_of_the_gradients() {
    let gguf = Gguf::open(MODEL).unwrap();
    let model = Model::open(&gguf).unwrap();
    let (loss, found) = moments(&model, 4, u64::MAX);
    assert!(loss > 0.5 && loss < 7.0, "{loss}");
    assert_eq!(found.len(), 5 * model.n_layer());
    let exact = exact(&model, 4);
    for (name, found) in &found {
        let (n, rows) = &exact.0[name];
        assert_eq!((found.n(), found.tokens()), (*n, 256));
        let mut squares = vec![0.0f64; *n];
        for row in rows.chunks(*n) {
            squares.iter_mut().zip(row).for_each(|(sum, g)| *sum += f64::from(*g) * f64::from(*g) / 256.0);
        }
        let all: f64 = squares.iter().sum();
        for (found, square) in found.diagonal().iter().zip(&squares) {
            assert!((f64::from(*found) - square).abs() < 1e-4 * square + 1e-6 * all, "{name}: {found} {square}");
        }
    }
}

#[test]
fn moments_depend_on_the_seed_and_on_neither_threads_nor_files() {
    let gguf = Gguf::open(MODEL).unwrap();
    let model = Model::open(&gguf).unwrap();
    let diagonals = |(loss, found): (f64, BTreeMap<String, SecondMoment>)| {
        (loss, found.into_iter().map(|(name, moment)| (name, moment.diagonal())).collect::<BTreeMap<_, _>>())
    };
    let one = diagonals(moments(&model, 1, u64::MAX));
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    assert!(one == pool.install(|| diagonals(moments(&model, 1, 0))), "three threads, states in files");
    assert!(one != diagonals(moments(&model, 2, u64::MAX)), "another seed");
}
