//! One pass over the layers of the unquantized model, which shows each layer's second moments and forgets them.

use std::path::Path;

use super::RoundingError;
use super::inputs::{Calibrated, Collector, Discovery, Input, Shape, join, plan_passes};
use super::states::{self, StatesReader, StatesWriter};
use super::text::Text;
use crate::gguf::TensorInfo;
use crate::model::{ForwardOptions, HiddenStates, Model, Overrides, Pass, Taps, TokenGroup};
use crate::recipe::{Role, roles};

/// Tokens on which a layer is run to find its inputs.
const DISCOVERY_TOKENS: usize = 16;

/// Most bytes that the second moments of a layer may take on one text. With as much again for their factors and a batch
/// of tokens, a run stays below 4 GB for models of 7 to 8 billion weights (rows up to 18,944 long: 1.4 GB a moment).
pub const DEFAULT_MOMENT_MEMORY: u64 = 1_700_000_000;

/// Flop of a multiplication and an addition.
const FLOP: f64 = 2.0;

/// What a pass depends on beside the model.
#[derive(Clone, Debug)]
pub struct StreamSettings {
    /// Share of the second moments' off-diagonal part that is given up, so that they can be factored and do not
    /// overfit.
    pub damping: f64,
    /// Most bytes for the moments of one text; layers that need more are run more than once.
    pub moment_memory: u64,
    /// How the forward pass computes, and what stops it.
    pub forward: ForwardOptions,
}

/// Takes what a pass shows.
pub trait Visitor {
    /// How often a tensor of a step is rounded; its inputs are wanted unless that is 0.
    fn roundings(&self, tensor: &str, step: usize) -> usize;

    /// Takes an input of the current step; it is gone afterwards.
    ///
    /// # Errors
    /// An error stops the pass.
    fn input(&mut self, input: Input) -> Result<(), RoundingError>;

    /// The step is done: layer `step`, or the output matrix when it equals the number of layers. A later pass may begin
    /// behind it.
    ///
    /// # Errors
    /// An error stops the pass.
    fn done(&mut self, step: usize) -> Result<(), RoundingError>;
}

/// A pass.
pub struct Stream<'a, 'm, 'g> {
    pass: Pass<'m, 'g, 'static>,
    calibration: &'a Text,
    gate: &'a Text,
    /// Folder for hidden states.
    folder: &'a Path,
    settings: StreamSettings,
}

/// Follows the work: what was done since the last call, in flop, and what it was.
pub type OnWork<'f> = &'f mut dyn FnMut(f64, &str);

impl<'a, 'm, 'g> Stream<'a, 'm, 'g> {
    /// A pass over both texts that keeps hidden states in `folder`, which must be there.
    ///
    /// # Errors
    /// Never in practice: nothing of the model is replaced.
    pub fn new(
        model: &'m Model<'g>,
        calibration: &'a Text,
        gate: &'a Text,
        folder: &'a Path,
        settings: StreamSettings,
    ) -> Result<Self, RoundingError> {
        let pass = model.pass(settings.forward.clone(), Overrides::new())?;
        Ok(Stream { pass, calibration, gate, folder, settings })
    }

    /// Number of steps: the layers and the output matrix.
    pub fn steps(&self) -> usize {
        self.pass.model().n_layer() + 1
    }

    /// Runs the steps from `first` on. Unless that is 0, `folder` must hold what an earlier pass over the same texts
    /// left.
    ///
    /// # Errors
    /// Those of the forward pass, of the files, and of the visitor.
    pub fn run(&self, first: usize, visitor: &mut dyn Visitor, on_work: OnWork<'_>) -> Result<(), RoundingError> {
        let layers = self.pass.model().n_layer();
        if first == 0 {
            self.embed()?;
        }
        for step in first..=layers {
            let wants = |tensor: &str| visitor.roundings(tensor, step) > 0;
            let shapes = self.discover(step, &wants)?;
            let what = match step {
                step if step < layers => format!("layer {} of {layers}", step + 1),
                _ => "output".to_owned(),
            };
            let mut passes = plan_passes(shapes, self.settings.moment_memory);
            if passes.is_empty() && step < layers {
                passes.push(Vec::new());
            }
            let last = passes.len().saturating_sub(1);
            for (index, shapes) in passes.iter().enumerate() {
                let keeps = (index == last && step < layers).then(|| StatesWriter::create(self.folder, step + 1));
                let mut work = Work { on_work: &mut *on_work, what: &what };
                self.run_shapes(step, shapes, keeps.transpose()?, visitor, &mut work)?;
            }
            visitor.done(step)?;
            states::remove(self.folder, step);
        }
        Ok(())
    }

    fn embed(&self) -> Result<(), RoundingError> {
        let mut writer = StatesWriter::create(self.folder, 0)?;
        for group in self.calibration.batches().into_iter().chain(self.gate.batches()) {
            writer.write(&self.pass.embed(group)?)?;
        }
        writer.commit()
    }

    fn reader(&self, step: usize) -> Result<StatesReader, RoundingError> {
        let tokens = self.calibration.len() + self.gate.len();
        StatesReader::open(self.folder, step, tokens, self.pass.model().hparams().n_embd)
    }

    /// The inputs of a step that are wanted.
    fn discover(&self, step: usize, wants: &dyn Fn(&str) -> bool) -> Result<Vec<Shape>, RoundingError> {
        let mut discovery = Discovery::new(wants);
        let tokens = self.calibration.batches()[0].tokens().to_vec();
        let few = &tokens[..DISCOVERY_TOKENS.min(self.calibration.n_ctx())];
        let group = std::sync::Arc::new(TokenGroup::from_sequences([few]).with_context(self.calibration.n_ctx()));
        let mut hidden = self.reader(step)?.read(0, group, step)?;
        self.step(step, &mut hidden, &mut discovery)?;
        Ok(discovery.shapes)
    }

    /// Runs a layer, or shows the input of the output matrix.
    fn step(&self, step: usize, hidden: &mut HiddenStates, taps: &mut dyn Taps) -> Result<(), RoundingError> {
        if step < self.pass.model().n_layer() {
            return Ok(self.pass.run_layer(hidden, taps)?);
        }
        let rows: Vec<usize> = (0..hidden.group().len()).collect();
        Ok(self.pass.tap_output(hidden, &rows, taps)?)
    }

    /// Runs all tokens of both texts through a step, collects the moments of `shapes` and shows them. The calibration
    /// moments are factored and gone before those of the gate exist.
    fn run_shapes(
        &self,
        step: usize,
        shapes: &[Shape],
        mut keeps: Option<StatesWriter>,
        visitor: &mut dyn Visitor,
        work: &mut Work<'_, '_>,
    ) -> Result<(), RoundingError> {
        let collector = self.collect(step, shapes, self.calibration, 0, keeps.as_mut(), work)?;
        let mut calibrated = Vec::with_capacity(shapes.len());
        for (shape, moments) in collector.finish() {
            let mut of_shape = Vec::with_capacity(moments.len());
            for found in moments {
                of_shape.push(Calibrated::new(found, self.settings.damping));
                self.check_cancelled()?;
                work.add(factor_work(shape.n));
            }
            calibrated.push(of_shape);
        }
        let collector = self.collect(step, shapes, self.gate, self.calibration.len(), keeps.as_mut(), work)?;
        if let Some(writer) = keeps {
            writer.commit()?;
        }
        for ((shape, gate), calibrated) in collector.finish().zip(calibrated) {
            let of_tensor = |name: &String| self.rounding_work(name) * visitor.roundings(name, step) as f64;
            let rounding: f64 = shape.tensors.iter().map(of_tensor).sum();
            visitor.input(join(shape, calibrated, gate)?)?;
            work.add(rounding);
        }
        Ok(())
    }

    fn collect(
        &self,
        step: usize,
        shapes: &[Shape],
        text: &Text,
        first: usize,
        mut keeps: Option<&mut StatesWriter>,
        work: &mut Work<'_, '_>,
    ) -> Result<Collector, RoundingError> {
        let mut collector = Collector::new(shapes, self.settings.forward.precision)?;
        let mut reader = self.reader(step)?;
        let per_token = self.forward_work(step) + shapes.iter().map(|shape| (shape.n * shape.n) as f64).sum::<f64>();
        let mut first = first;
        for group in text.batches() {
            let tokens = group.len();
            let mut hidden = reader.read(first, group, step)?;
            self.step(step, &mut hidden, &mut collector)?;
            if let Some(writer) = keeps.as_deref_mut() {
                writer.write(&hidden)?;
            }
            first += tokens;
            work.add(per_token * tokens as f64);
        }
        Ok(collector)
    }

    fn check_cancelled(&self) -> Result<(), RoundingError> {
        match &self.settings.forward.cancel {
            Some(flag) if flag.load(std::sync::atomic::Ordering::Relaxed) => {
                Err(crate::model::ModelError::Interrupted.into())
            }
            _ => Ok(()),
        }
    }

    fn tensors_of(&self, step: usize) -> impl Iterator<Item = &'g TensorInfo> {
        let model = self.pass.model();
        let (layers, output) = (model.n_layer(), model.output_tensor());
        model.gguf().tensors().iter().filter(move |tensor| match roles::block_number(&tensor.name) {
            Some(block) => usize::try_from(block) == Ok(step),
            None => step == layers && tensor.name == output,
        })
    }

    /// Flop of the forward pass of a step, per token.
    fn forward_work(&self, step: usize) -> f64 {
        if step == self.pass.model().n_layer() {
            return 0.0;
        }
        self.tensors_of(step).map(|tensor| FLOP * tensor.elements() as f64).sum()
    }

    /// Flop of rounding a tensor and of judging the result.
    fn rounding_work(&self, name: &str) -> f64 {
        let tensor = self.pass.model().gguf().tensor(name);
        tensor.map_or(0.0, |tensor| 3.0 * FLOP * tensor.elements() as f64 * tensor.row_len() as f64)
    }

    /// About the flop of the steps from `first` on: the unit of progress. Layers that are run twice are counted once.
    pub fn total_work(&self, first: usize, visitor: &dyn Visitor) -> f64 {
        let tokens = (self.calibration.len() + self.gate.len()) as f64;
        let of_step = |step: usize| {
            let of_tensor = |tensor: &TensorInfo| {
                let roundings = visitor.roundings(&tensor.name, step);
                if roundings == 0 {
                    return 0.0;
                }
                let n = tensor.row_len() as usize;
                let shared = matches!(Role::of(&tensor.name), Role::AttnK | Role::AttnV | Role::FfnUp);
                let moment = if shared { 0.0 } else { (n * n) as f64 * tokens + factor_work(n) };
                moment + self.rounding_work(&tensor.name) * roundings as f64
            };
            self.forward_work(step) * tokens + self.tensors_of(step).map(of_tensor).sum::<f64>()
        };
        (first..self.steps()).map(of_step).sum()
    }
}

fn factor_work(n: usize) -> f64 {
    (n as f64).powi(3) / 3.0
}

/// Work of one step.
struct Work<'f, 'w> {
    on_work: &'f mut dyn FnMut(f64, &str),
    what: &'w str,
}

impl Work<'_, '_> {
    fn add(&mut self, flop: f64) {
        (self.on_work)(flop, self.what);
    }
}
