//! The second moments of the gradients at the outputs of a model's matrices: what an error in each output does to what the
//! model says.
//!
//! The loss is cross entropy with labels drawn from the model's own distribution, summed over all positions, so that the mean
//! of `g gᵀ` is the Fisher information of a matrix's outputs. One pass forward keeps the hidden states at the boundaries of the
//! layers, in 16 bits; one pass backward computes the inside of each layer again, from the last to the first, over all tokens.
//! Each weight is read once in either pass and given back, so that a model larger than memory works. The moments belong to the
//! model and the text, not to a type of weights.
//!
//! # Memory
//! Gradients of the stream of all tokens, 4 bytes for each value (16,384 tokens of a model 4,096 wide take 268 MB); hidden
//! states of half as much for each layer, in files where that is more than 512 MB; the moments of one layer, 4 n² bytes for
//! each matrix of n outputs; and what a batch of 8,192 tokens takes in a layer.

mod capped;
mod checkpoint;
mod file;
mod request;
mod states;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use rayon::prelude::*;

use super::MomentsError;
use crate::model::{
    ForwardOptions, GradientTaps, HiddenStates, Model, ModelError, NoTaps, Overrides, Pass, SampledLabels, TapGradient,
    TokenGroup,
};
use crate::progress::{Interrupted, Unit, Watch};
use crate::recipe::roles;
use crate::rounding::gptq::SecondMoment;
use crate::text::Sequences;
use crate::unfinished::{GOES_ON, going_on};
use capped::CappedMoment;
pub use file::{GradientMoments, GradientProvenance, GradientSquares, GradientsWriter, save_gradients};
pub use request::{GradientReport, GradientRequest};
use states::States;

/// Tokens of the text that gradients are taken of, unless another number is asked for.
pub const DEFAULT_GRADIENT_TOKENS: usize = 16_384;

/// Work of the way back through a layer beside the way there, in that of the latter: its inside again, and the gradients.
const BACKWARD: f64 = 2.0;

/// Work of the head, there and back.
const HEAD: f64 = 2.0;

/// What the gradients are of, and which are wanted.
#[derive(Clone, Debug)]
pub struct GradientSettings {
    /// Labels are drawn from this seed.
    pub seed: u64,
    /// Names of the matrices, such as those of [`Model::gradient_matrices`].
    pub tensors: Vec<String>,
    /// Others of which the squares alone are added up, such as those of [`Model::further_gradient_matrices`].
    pub squares: Vec<String>,
    /// Most bytes of hidden states that stay in memory; more lie in files.
    pub states_memory: u64,
}

/// What is known of the gradients at a matrix's outputs.
#[derive(Clone, Debug)]
pub enum OutputGradients {
    /// The mean of `g gᵀ`.
    Moment(SecondMoment),
    /// Its diagonal.
    Squares(GradientSquares),
}

/// Where an earlier run has come to.
pub struct Reached {
    /// The lowest layer whose matrices are done; the number of layers stands for the head.
    pub layer: usize,
    /// Gradients at what entered that layer, or the last one left, group by group.
    pub gradients: Vec<HiddenStates>,
    /// The loss, summed over all tokens.
    pub loss: f64,
}

/// Takes what a pass finds, and may know what an earlier one has found.
pub trait GradientSink {
    /// Where to go on; `None` begins with the head.
    ///
    /// # Errors
    /// When what is there cannot be read.
    fn go_on(&mut self, groups: &[Arc<TokenGroup>]) -> Result<Option<Reached>, MomentsError> {
        let _ = groups;
        Ok(None)
    }

    /// What was found for the matrices of a layer by their names, the gradients at what entered it, and the loss; the head
    /// comes first, as the layer behind the last one.
    ///
    /// # Errors
    /// Whatever shall end the pass.
    fn take(
        &mut self,
        layer: usize,
        found: Vec<(String, OutputGradients)>,
        gradients: &[HiddenStates],
        loss: f64,
    ) -> Result<(), MomentsError>;
}

/// Bytes of hidden states that stay in memory by default.
pub const DEFAULT_STATES_MEMORY: u64 = 1 << 29;

/// Runs a model forward and backward over a text and shows `sink` the second moment of the gradients at the outputs of each
/// matrix, by name: the mean of `g gᵀ`, where the longest of a thousand gradients are scaled down to the length of the next.
/// Gives the mean cross entropy with the drawn labels, nats per token: about the entropy of what the model says.
///
/// Hidden states that are too large for memory lie in `folder`, which must be there, while it runs. A run that is stopped goes
/// on where `sink` knows how far it came; its hidden states are computed again.
///
/// # Errors
/// When the model does not predict the next token, the forward pass or `sink` fails, there is no space, or `watch` asks to
/// stop.
pub fn gradient_moments(
    model: &Model<'_>,
    text: &Sequences,
    settings: &GradientSettings,
    folder: &Path,
    watch: &dyn Watch,
    sink: &mut dyn GradientSink,
) -> Result<f64, MomentsError> {
    model.check_predicts()?;
    let stop = watch.stop();
    let options = ForwardOptions { cancel: Some(stop.flag().clone()), ..ForwardOptions::default() };
    let run = Run {
        pass: model.pass(options, Overrides::new())?,
        groups: text.batches(),
        n_ctx: text.n_ctx(),
        settings,
        tokens: text.len(),
        watch,
    };
    let reached = sink.go_on(&run.groups)?;
    if let Some(reached) = &reached {
        watch.note(&going_on(run.layers() + 1 - reached.layer, run.layers() + 1, "steps"));
    }
    watch.begin("gradients", run.work_left(reached.as_ref().map(|reached| reached.layer)), Unit::Megaflop);
    let loss = run.run(folder, reached, sink);
    if stop.end() {
        watch.warn(GOES_ON);
        return Err(Interrupted.into());
    }
    watch.end();
    loss
}

/// One pass there and back.
struct Run<'a, 'm, 'g> {
    pass: Pass<'m, 'g, 'static>,
    groups: Vec<Arc<TokenGroup>>,
    n_ctx: usize,
    settings: &'a GradientSettings,
    tokens: usize,
    watch: &'a dyn Watch,
}

impl Run<'_, '_, '_> {
    fn run(&self, folder: &Path, reached: Option<Reached>, sink: &mut dyn GradientSink) -> Result<f64, MomentsError> {
        let model = self.pass.model();
        let layers = self.layers();
        let mut states = States::new(model, self.tokens, folder, self.settings.states_memory)?;
        // A layer that is done needs no states of its own.
        let done = reached.as_ref().map_or(layers + 1, |reached| reached.layer);
        self.forward(&mut states, done.saturating_sub(1))?;
        let (mut gradients, loss) = match reached {
            Some(Reached { gradients, loss, .. }) => (gradients, loss),
            None => {
                let mut moments = self.moments();
                let (gradients, loss) = self.head_back(&states, &mut moments)?;
                sink.take(layers, moments.finish(), &gradients, loss)?;
                (gradients, loss)
            }
        };
        states.remove(layers);
        for layer in (self.lowest()..layers.min(done)).rev() {
            let mut moments = self.moments();
            gradients = self.layer_back(layer, &states, gradients, &mut moments)?;
            sink.take(layer, moments.finish(), &gradients, loss)?;
            states.remove(layer);
        }
        Ok(loss / self.tokens.max(1) as f64)
    }

    fn layers(&self) -> usize {
        self.pass.model().n_layer()
    }

    /// Below the lowest matrix that is wanted nobody needs gradients.
    fn lowest(&self) -> usize {
        let wanted = self.settings.tensors.iter().chain(&self.settings.squares);
        let lowest = wanted.filter_map(|name| roles::block_number(name)).min();
        lowest.map_or(self.layers(), |block| usize::try_from(block).unwrap_or_default())
    }

    fn moments(&self) -> Moments<'_> {
        Moments { settings: self.settings, tokens: self.tokens, moments: BTreeMap::new(), squares: BTreeMap::new() }
    }

    /// The gradients of each group at what left the last layer, and the loss, summed over all tokens.
    fn head_back(&self, states: &States, moments: &mut Moments<'_>) -> Result<(Vec<HiddenStates>, f64), MomentsError> {
        let model = self.pass.model();
        let layers = model.n_layer();
        let mut loss = 0.0;
        let mut gradients = Vec::with_capacity(self.groups.len());
        for (first, group) in self.placed_groups() {
            let hidden = states.read(model, layers, first, group)?;
            let mut labels = SampledLabels::new(self.settings.seed, (first / self.n_ctx) as u64);
            gradients.push(self.pass.head_gradient(&hidden, &mut labels, moments)?);
            loss += labels.loss();
            self.advance(HEAD * self.work_of(layers) * group.len() as f64, "output");
        }
        Ok((gradients, loss))
    }

    /// Keeps the states that enter the first `layers` layers and those that leave them. Each layer sees those that were kept, as
    /// it will on the way back.
    fn forward(&self, states: &mut States, layers: usize) -> Result<(), MomentsError> {
        let model = self.pass.model();
        for (first, group) in self.placed_groups() {
            states.write(model, first, &self.pass.embed(group.clone())?)?;
        }
        for layer in 0..layers {
            let what = format!("layer {} of {} forward", layer + 1, model.n_layer());
            for (first, group) in self.placed_groups() {
                let mut hidden = states.read(model, layer, first, group)?;
                self.pass.run_layer(&mut hidden, &mut NoTaps)?;
                states.write(model, first, &hidden)?;
                self.advance(self.work_of(layer) * group.len() as f64, &what);
            }
        }
        Ok(())
    }

    fn layer_back(
        &self,
        layer: usize,
        states: &States,
        before: Vec<HiddenStates>,
        moments: &mut Moments<'_>,
    ) -> Result<Vec<HiddenStates>, MomentsError> {
        let model = self.pass.model();
        let what = format!("layer {} of {} backward", layer + 1, model.n_layer());
        let mut gradients = Vec::with_capacity(before.len());
        for ((first, group), gradient) in self.placed_groups().zip(before) {
            let hidden = states.read(model, layer, first, group)?;
            gradients.push(self.pass.layer_gradient(&hidden, gradient, moments)?);
            self.advance(BACKWARD * self.work_of(layer) * group.len() as f64, &what);
        }
        Ok(gradients)
    }

    /// The groups, each with the number of its first token.
    fn placed_groups(&self) -> impl Iterator<Item = (usize, &Arc<TokenGroup>)> {
        self.groups.iter().scan(0, |next, group| {
            let first = *next;
            *next += group.len();
            Some((first, group))
        })
    }

    /// Flop of a layer's products for a token, or, behind the last layer, of the output matrix.
    fn work_of(&self, layer: usize) -> f64 {
        let model = self.pass.model();
        let tensors = model.gguf().tensors().iter().filter(|tensor| match roles::block_number(&tensor.name) {
            Some(block) => usize::try_from(block) == Ok(layer),
            None => layer == model.n_layer() && tensor.name == model.output_tensor(),
        });
        2.0 * tensors.map(|tensor| tensor.elements() as f64).sum::<f64>()
    }

    /// Work that is left when the layers from `done` on are done.
    fn work_left(&self, done: Option<usize>) -> u64 {
        let layers = self.layers();
        let upto = done.unwrap_or(layers + 1);
        let forward: f64 = (0..upto.saturating_sub(1)).map(|layer| self.work_of(layer)).sum();
        let back: f64 = (self.lowest()..layers.min(upto)).map(|layer| BACKWARD * self.work_of(layer)).sum();
        let head = if done.is_none() { HEAD * self.work_of(layers) } else { 0.0 };
        ((forward + back + head) * self.tokens as f64 / FLOP_PER_UNIT) as u64
    }

    fn advance(&self, flop: f64, what: &str) {
        self.watch.advance((flop / FLOP_PER_UNIT) as u64, what);
    }
}

/// Flop in a unit of progress.
const FLOP_PER_UNIT: f64 = 1e6;

/// Moments of the matrices that are seen.
struct Moments<'a> {
    settings: &'a GradientSettings,
    tokens: usize,
    moments: BTreeMap<String, CappedMoment>,
    squares: BTreeMap<String, SquareSums>,
}

/// Sums of squares, and of how many gradients.
struct SquareSums {
    sums: Vec<f64>,
    tokens: u64,
}

impl SquareSums {
    fn add(&mut self, rows: &[f32]) {
        let n = self.sums.len();
        self.tokens += (rows.len() / n) as u64;
        self.sums.par_chunks_mut(COLUMNS_PER_TASK).enumerate().for_each(|(task, sums)| {
            let first = task * COLUMNS_PER_TASK;
            for row in rows.chunks_exact(n) {
                let part = &row[first..first + sums.len()];
                sums.iter_mut().zip(part).for_each(|(sum, x)| *sum += f64::from(*x) * f64::from(*x));
            }
        });
    }

    fn mean(self) -> GradientSquares {
        let tokens = self.tokens.max(1) as f64;
        GradientSquares { mean: self.sums.iter().map(|sum| (sum / tokens) as f32).collect(), tokens: self.tokens }
    }
}

/// Outputs whose squares one task adds up.
const COLUMNS_PER_TASK: usize = 1024;

impl Moments<'_> {
    fn finish(self) -> Vec<(String, OutputGradients)> {
        let moments = self.moments.into_iter().map(|(name, found)| (name, OutputGradients::Moment(found.finish())));
        let squares = self.squares.into_iter().map(|(name, found)| (name, OutputGradients::Squares(found.mean())));
        moments.chain(squares).collect()
    }
}

impl GradientTaps for Moments<'_> {
    fn wants(&self, tensor: &str) -> bool {
        let GradientSettings { tensors, squares, .. } = self.settings;
        tensors.iter().chain(squares).any(|wanted| wanted == tensor)
    }

    fn gradient(&mut self, gradient: &TapGradient<'_>) -> Result<(), ModelError> {
        let (n, name) = (gradient.rows.width(), gradient.tensor);
        if !self.settings.tensors.iter().any(|wanted| wanted == name) {
            let new = || SquareSums { sums: vec![0.0; n], tokens: 0 };
            self.squares.entry(name.to_owned()).or_insert_with(new).add(gradient.rows.data());
            return Ok(());
        }
        if !self.moments.contains_key(name) {
            let moment = CappedMoment::new(n, self.tokens)
                .map_err(|error| ModelError::BadInput { reason: format!("tensor {name}: {error}") })?;
            self.moments.insert(name.to_owned(), moment);
        }
        if let Some(moment) = self.moments.get_mut(name) {
            moment.add(gradient.rows.data());
        }
        Ok(())
    }
}
