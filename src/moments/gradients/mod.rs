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
//! each matrix of n outputs, and those that are done; and what a batch of 2,048 tokens takes in a layer.

mod capped;
mod states;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::MomentsError;
use crate::model::{
    ForwardOptions, GradientTaps, HiddenStates, Model, ModelError, NoTaps, Overrides, Pass, SampledLabels, TapGradient,
    TokenGroup,
};
use crate::progress::{Unit, Watch};
use crate::recipe::roles;
use crate::rounding::gptq::SecondMoment;
use crate::text::Sequences;
use capped::CappedMoment;
use states::States;

/// Tokens of the text that gradients are taken of, unless another number is asked for.
pub const DEFAULT_GRADIENT_TOKENS: usize = 16_384;

/// Work of the way back through a layer beside the way there, in that of the latter: its inside again, and the gradients.
const BACKWARD: f64 = 2.0;

/// What the gradients are of, and which are wanted.
#[derive(Clone, Debug, Default)]
pub struct GradientSettings {
    /// Labels are drawn from this seed.
    pub seed: u64,
    /// Names of matrices; without them those of [`Model::gradient_matrices`].
    pub tensors: Option<Vec<String>>,
}

/// Second moments of gradients.
#[derive(Clone, Debug)]
pub struct GradientMoments {
    /// By the matrix's name, of the gradients at its outputs: the mean of `g gᵀ`, where the longest of a thousand gradients are
    /// scaled down to the length of the next.
    pub moments: BTreeMap<String, SecondMoment>,
    /// Tokens, one gradient each.
    pub tokens: usize,
    /// Mean cross entropy with the drawn labels, nats per token: about the entropy of what the model says.
    pub loss: f64,
}

/// Runs a model forward and backward over a text and gives the second moments of its gradients. Hidden states that are too
/// large for memory lie in `folder`, which must be there, while it runs; a run that is stopped leaves nothing and begins again.
///
/// # Errors
/// When the model does not predict the next token, the forward pass fails, there is no space, or `watch` asks to stop.
pub fn gradient_moments(
    model: &Model<'_>,
    text: &Sequences,
    settings: &GradientSettings,
    folder: &Path,
    watch: &dyn Watch,
) -> Result<GradientMoments, MomentsError> {
    model.check_predicts()?;
    let stop = watch.abandon();
    let options = ForwardOptions { cancel: Some(stop.flag().clone()), ..ForwardOptions::default() };
    let run = Run {
        pass: model.pass(options, Overrides::new())?,
        groups: text.batches(),
        wanted: match &settings.tensors {
            Some(tensors) => tensors.clone(),
            None => model.gradient_matrices().into_iter().map(str::to_owned).collect(),
        },
        tokens: text.len(),
        watch,
    };
    watch.begin("gradients", run.total_work(), Unit::Megaflop);
    let found = run.run(settings.seed, folder);
    watch.end();
    stop.check()?;
    found
}

/// One pass there and back.
struct Run<'a, 'm, 'g> {
    pass: Pass<'m, 'g, 'static>,
    groups: Vec<Arc<TokenGroup>>,
    wanted: Vec<String>,
    tokens: usize,
    watch: &'a dyn Watch,
}

impl Run<'_, '_, '_> {
    fn run(&self, seed: u64, folder: &Path) -> Result<GradientMoments, MomentsError> {
        let model = self.pass.model();
        let mut states = States::new(model, self.tokens, folder)?;
        self.forward(&mut states)?;
        let mut moments = Moments::new(&self.wanted, self.tokens);
        let layers = model.n_layer();
        let mut loss = 0.0;
        let mut gradients = Vec::with_capacity(self.groups.len());
        for (first, group) in self.placed_groups() {
            let hidden = states.read(model, layers, first, group)?;
            let mut labels = SampledLabels::new(seed, (first / group.longest().max(1)) as u64);
            gradients.push(self.pass.head_gradient(&hidden, &mut labels, &mut moments)?);
            loss += labels.loss();
            self.advance(2.0 * self.work_of(layers) * group.len() as f64, "output");
        }
        states.remove(layers);
        let lowest = self.wanted.iter().filter_map(|name| roles::block_number(name)).min();
        let lowest = lowest.map_or(layers, |block| usize::try_from(block).unwrap_or(layers));
        let mut done = moments.finish();
        for layer in (lowest..layers).rev() {
            let mut moments = Moments::new(&self.wanted, self.tokens);
            self.layer_back(layer, &states, &mut gradients, &mut moments)?;
            done.extend(moments.finish());
            states.remove(layer);
        }
        Ok(GradientMoments { moments: done, tokens: self.tokens, loss: loss / self.tokens.max(1) as f64 })
    }

    /// Keeps the states at all boundaries. Each layer sees those that were kept, as it will on the way back.
    fn forward(&self, states: &mut States) -> Result<(), MomentsError> {
        let model = self.pass.model();
        for (first, group) in self.placed_groups() {
            states.write(model, first, &self.pass.embed(group.clone())?)?;
        }
        for layer in 0..model.n_layer() {
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
        gradients: &mut Vec<HiddenStates>,
        moments: &mut Moments<'_>,
    ) -> Result<(), MomentsError> {
        let model = self.pass.model();
        let what = format!("layer {} of {} backward", layer + 1, model.n_layer());
        let before = std::mem::take(gradients);
        for ((first, group), gradient) in self.placed_groups().zip(before) {
            let hidden = states.read(model, layer, first, group)?;
            gradients.push(self.pass.layer_gradient(&hidden, gradient, moments)?);
            self.advance(BACKWARD * self.work_of(layer) * group.len() as f64, &what);
        }
        Ok(())
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

    fn total_work(&self) -> u64 {
        let layers = self.pass.model().n_layer();
        let of_layers: f64 = (0..layers).map(|layer| (1.0 + BACKWARD) * self.work_of(layer)).sum();
        ((of_layers + 2.0 * self.work_of(layers)) * self.tokens as f64 / FLOP_PER_UNIT) as u64
    }

    fn advance(&self, flop: f64, what: &str) {
        self.watch.advance((flop / FLOP_PER_UNIT) as u64, what);
    }
}

/// Flop in a unit of progress.
const FLOP_PER_UNIT: f64 = 1e6;

/// Moments of the matrices that are seen.
struct Moments<'a> {
    wanted: &'a [String],
    tokens: usize,
    moments: BTreeMap<String, CappedMoment>,
}

impl<'a> Moments<'a> {
    fn new(wanted: &'a [String], tokens: usize) -> Moments<'a> {
        Moments { wanted, tokens, moments: BTreeMap::new() }
    }

    fn finish(self) -> BTreeMap<String, SecondMoment> {
        self.moments.into_iter().map(|(name, moment)| (name, moment.finish())).collect()
    }
}

impl GradientTaps for Moments<'_> {
    fn wants(&self, tensor: &str) -> bool {
        self.wanted.iter().any(|wanted| wanted == tensor)
    }

    fn gradient(&mut self, gradient: &TapGradient<'_>) -> Result<(), ModelError> {
        let n = gradient.rows.width();
        if !self.moments.contains_key(gradient.tensor) {
            let moment = CappedMoment::new(n, self.tokens)
                .map_err(|error| ModelError::BadInput { reason: format!("tensor {}: {error}", gradient.tensor) })?;
            self.moments.insert(gradient.tensor.to_owned(), moment);
        }
        if let Some(moment) = self.moments.get_mut(gradient.tensor) {
            moment.add(gradient.rows.data());
        }
        Ok(())
    }
}
