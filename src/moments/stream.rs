//! One pass over the layers of the unquantized model, which shows each layer's second moments and forgets them.

use std::path::Path;

use super::corrected::PASSES;
use super::inputs::{Calibrated, Discovery, Input, MomentCollector, Purpose, Shape, join, plan_passes};
use super::states::{self, StatesReader, StatesWriter};
use super::{Damping, FactorOrder, MomentsError};
use crate::compute::{Kernel, Precision};
use crate::gguf::TensorInfo;
use crate::model::{ForwardOptions, HiddenStates, Model, Overrides, Pass, Taps, TokenGroup};
use crate::os;
use crate::progress::{Stop, Watch};
use crate::recipe::{Role, roles};
use crate::rows::read_rows;
use crate::text::Sequences;

/// Rows of a matrix that the damping is chosen with.
const SAMPLED_ROWS: u64 = 64;

/// Tokens on which a layer is run to find its inputs.
const DISCOVERY_TOKENS: usize = 16;

/// Most bytes that the second moments of a layer may take on one text. With as much again for their factors, the tokens
/// held out and a batch, a run takes 3.6 GB for models of 7 to 8 billion weights (rows up to 18,944 long: 1.4 GB a
/// moment).
pub const DEFAULT_MOMENT_MEMORY: u64 = 1_700_000_000;

/// Flop of a multiplication and an addition.
const FLOP: f64 = 2.0;

/// Products of rows with the moment's n^2 numbers that rounding a tensor takes: feedback, two sweeps, losses.
const PRODUCTS: f64 = 4.0;

/// What the searches for scales and points take for each weight, as the flop of products in that time: from 40,000 for
/// the k-quants to 130,000 for IQ2 and IQ3.
const SEARCH_WORK: f64 = 70_000.0;

/// Time of a bfloat16 product, in that of a 32-bit one.
const FAST: f64 = 0.5;

/// What a pass depends on beside the model.
#[derive(Clone, Debug)]
pub struct StreamSettings {
    /// How much of the correlations is not relied on.
    pub damping: Damping,
    /// Most bytes for the moments of one text; layers that need more are run more than once.
    pub moment_memory: u64,
    /// How the forward pass computes.
    pub precision: Precision,
    /// Tokens of the calibration text go through all experts; those of the gate, which judges, through those they choose.
    pub all_experts: bool,
    /// Moments are shown as they are, of all tokens, and not factored.
    pub raw: bool,
    /// The order of inputs in factors.
    pub order: FactorOrder,
    /// So many of the inputs that are held out are shown beside their moments.
    pub sampled: usize,
    /// Inputs come from the model with all rounded that was shown before.
    pub corrected: bool,
}

/// Takes what a pass shows.
pub trait Visitor {
    /// What can stop it.
    type Error: From<MomentsError>;

    /// How often a tensor of a step is rounded; its inputs are wanted unless that is 0.
    fn roundings(&self, tensor: &str, step: usize) -> usize;

    /// Orders in which the input of a tensor is wanted: `None` is the model's, others have the model's column for each column
    /// of the input to be shown. It is shown once for each.
    fn column_orders(&self, tensor: &str) -> Vec<Option<Vec<usize>>> {
        let _ = tensor;
        vec![None]
    }

    /// Takes an input of the current step; it is gone afterwards.
    ///
    /// # Errors
    /// An error stops the pass.
    fn input(&mut self, input: Input) -> Result<(), Self::Error>;

    /// What became of a matrix of the last input, `[rows, columns]` as the model has it, in a pass whose inputs depend on
    /// that; `None` where it stays.
    fn rounded(&mut self, tensor: &str) -> Option<Vec<f32>> {
        let _ = tensor;
        None
    }

    /// The step is done: layer `step`, or the output matrix when it equals the number of layers. A later pass may begin
    /// behind it.
    ///
    /// # Errors
    /// An error stops the pass.
    fn done(&mut self, step: usize) -> Result<(), Self::Error>;
}

/// A pass.
pub struct Stream<'a, 'm, 'g> {
    pub(super) pass: Pass<'m, 'g, 'static>,
    pub(super) gate_pass: Pass<'m, 'g, 'static>,
    pub(super) calibration: &'a Sequences,
    pub(super) gate: &'a Sequences,
    /// Folder for hidden states.
    pub(super) folder: &'a Path,
    pub(super) settings: StreamSettings,
    pub(super) stop: Stop,
}

impl<'a, 'm, 'g> Stream<'a, 'm, 'g> {
    /// A pass over both texts that keeps hidden states in `folder`, which must be there, and ends when `stop` asks for it.
    ///
    /// # Errors
    /// Never in practice: nothing of the model is replaced.
    pub fn new(
        model: &'m Model<'g>,
        calibration: &'a Sequences,
        gate: &'a Sequences,
        folder: &'a Path,
        settings: StreamSettings,
        stop: Stop,
    ) -> Result<Self, MomentsError> {
        let options = ForwardOptions {
            precision: settings.precision,
            cancel: Some(stop.flag().clone()),
            ..ForwardOptions::default()
        };
        let gate_pass = model.pass(options.clone(), Overrides::new())?;
        let options = ForwardOptions { all_experts: settings.all_experts, ..options };
        let pass = model.pass(options, Overrides::new())?;
        Ok(Stream { pass, gate_pass, calibration, gate, folder, settings, stop })
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
    pub fn run<V: Visitor>(&self, first: usize, visitor: &mut V, watch: &dyn Watch) -> Result<(), V::Error> {
        let layers = self.pass.model().n_layer();
        if first == 0 {
            self.embed()?;
            if self.settings.corrected {
                self.begin_rounded()?;
            }
        }
        for step in first..=layers {
            let wants = |tensor: &str| visitor.roundings(tensor, step) > 0;
            let mut shapes = Vec::new();
            for shape in self.discover(step, &wants)? {
                let mut orders = visitor.column_orders(&shape.tensors[0]);
                orders
                    .iter_mut()
                    .for_each(|order| *order = order.take().filter(|order| is_permutation(order, shape.n)));
                orders.dedup();
                shapes.extend(orders.into_iter().map(|order| Shape { order, ..shape.clone() }));
            }
            let what = match step {
                step if step < layers => format!("layer {} of {layers}", step + 1),
                _ => "output".to_owned(),
            };
            let work = Work { watch, what: &what };
            if self.settings.corrected && step < layers {
                self.run_corrected(step, &shapes, visitor, &work)?;
                visitor.done(step)?;
                states::remove(self.folder, step);
                states::remove(&self.rounded_folder(), step);
                continue;
            }
            let mut passes = plan_passes(shapes, self.settings.moment_memory);
            if passes.is_empty() && step < layers {
                passes.push(Vec::new());
            }
            let last = passes.len().saturating_sub(1);
            for (index, shapes) in passes.iter().enumerate() {
                let keeps = (index == last && step < layers).then(|| StatesWriter::create(self.folder, step + 1));
                self.run_shapes(step, shapes, keeps.transpose()?, visitor, &work)?;
            }
            visitor.done(step)?;
            states::remove(self.folder, step);
        }
        Ok(())
    }

    fn embed(&self) -> Result<(), MomentsError> {
        let mut writer = StatesWriter::create(self.folder, 0)?;
        for group in self.calibration.batches().into_iter().chain(self.gate.batches()) {
            writer.write(&self.pass.embed(group)?)?;
        }
        writer.commit()
    }

    fn reader(&self, step: usize) -> Result<StatesReader, MomentsError> {
        self.reader_in(self.folder, step)
    }

    pub(super) fn reader_in(&self, folder: &Path, step: usize) -> Result<StatesReader, MomentsError> {
        let tokens = self.calibration.len() + self.gate.len();
        let model = self.pass.model();
        StatesReader::open(folder, step, tokens, model.hparams().n_embd, model.kept_widths(step))
    }

    /// The inputs of a step that are wanted.
    fn discover(&self, step: usize, wants: &dyn Fn(&str) -> bool) -> Result<Vec<Shape>, MomentsError> {
        let mut discovery = Discovery::new(wants);
        let tokens = self.calibration.batches()[0].tokens().to_vec();
        let few = &tokens[..DISCOVERY_TOKENS.min(self.calibration.n_ctx())];
        let group = std::sync::Arc::new(TokenGroup::from_sequences([few]).with_context(self.calibration.n_ctx()));
        let mut hidden = self.reader(step)?.read(0, group, step)?;
        self.step(&self.pass, step, &mut hidden, &mut discovery)?;
        Ok(discovery.shapes)
    }

    /// Runs a layer, or shows the input of the output matrix.
    fn step(
        &self,
        pass: &Pass<'m, 'g, 'static>,
        step: usize,
        hidden: &mut HiddenStates,
        taps: &mut dyn Taps,
    ) -> Result<(), MomentsError> {
        if step < pass.model().n_layer() {
            return Ok(pass.run_layer(hidden, taps)?);
        }
        let rows: Vec<usize> = (0..hidden.group().len()).collect();
        Ok(pass.tap_output(hidden, &rows, taps)?)
    }

    /// Runs all tokens of both texts through a step, collects the moments of `shapes` and shows them. The calibration
    /// moments are factored and gone before those of the gate exist.
    pub(super) fn run_shapes<V: Visitor>(
        &self,
        step: usize,
        shapes: &[Shape],
        mut keeps: Option<StatesWriter>,
        visitor: &mut V,
        work: &Work<'_>,
    ) -> Result<(), V::Error> {
        let collector = self.collect(step, shapes, self.calibration, 0, keeps.as_mut(), work)?;
        // The pass is over, and factors need the most memory of all.
        os::give_back_freed_memory();
        let mut calibrated = Vec::with_capacity(shapes.len());
        for (shape, moments) in collector.finish() {
            let mut of_shape = Vec::with_capacity(moments.len());
            for (matrix, found) in moments.into_iter().enumerate() {
                let (_, sample) = self.sample(&shape, matrix)?;
                of_shape.push(match self.settings.raw {
                    true => Calibrated::raw(found),
                    false => Calibrated::new(found, &self.settings, &sample),
                });
                self.stop.check().map_err(MomentsError::from)?;
                work.add(self.factor_work(shape.n));
            }
            calibrated.push(of_shape);
        }
        let collector = self.collect(step, shapes, self.gate, self.calibration.len(), keeps.as_mut(), work)?;
        if let Some(writer) = keeps {
            writer.commit()?;
        }
        for ((shape, gate), calibrated) in collector.finish_judging().zip(calibrated) {
            let of_tensor = |name: &String| self.rounding_work(name) * visitor.roundings(name, step) as f64;
            let rounding: f64 = shape.tensors.iter().map(of_tensor).sum();
            visitor.input(join(shape, calibrated, gate)?)?;
            work.add(rounding);
        }
        Ok(())
    }

    /// Some rows of a matrix that has an input, with their numbers, where they are needed to choose a damping or the strength
    /// of a correction.
    pub(super) fn sample(&self, shape: &Shape, matrix: usize) -> Result<(Vec<usize>, Vec<f32>), MomentsError> {
        let gguf = self.pass.model().gguf();
        let StreamSettings { raw, damping, corrected, .. } = self.settings;
        let is_needed = !raw && (damping == Damping::Chosen || corrected);
        let Some(tensor) = gguf.tensor(&shape.tensors[0]).filter(|_| is_needed) else {
            return Ok((Vec::new(), Vec::new()));
        };
        let rows = tensor.rows_per_matrix();
        let count = SAMPLED_ROWS.min(rows);
        let numbers: Vec<usize> = (0..count).map(|at| (at * rows / count) as usize).collect();
        let mut sample = Vec::with_capacity((count * tensor.row_len()) as usize);
        for &number in &numbers {
            let row = read_rows(gguf, tensor, matrix as u64 * rows + number as u64, 1)?;
            match &shape.order {
                None => sample.extend(row),
                Some(order) => sample.extend(order.iter().map(|&at| row[at])),
            }
        }
        // The system may have mapped many pages around each row.
        gguf.release(tensor);
        Ok((numbers, sample))
    }

    fn collect(
        &self,
        step: usize,
        shapes: &[Shape],
        text: &Sequences,
        first: usize,
        mut keeps: Option<&mut StatesWriter>,
        work: &Work<'_>,
    ) -> Result<MomentCollector, MomentsError> {
        let (pass, purpose) = if std::ptr::eq(text, self.calibration) {
            let StreamSettings { raw, damping, sampled, .. } = self.settings;
            (&self.pass, Purpose::Rounding { holds_out: (damping == Damping::Chosen || sampled > 0) && !raw, raw })
        } else {
            (&self.gate_pass, Purpose::Judging { tokens: text.len() })
        };
        let mut collector = MomentCollector::new(shapes, self.settings.precision, purpose)?;
        let mut reader = self.reader(step)?;
        let per_token = self.forward_work(step) + shapes.iter().map(|shape| self.moment_work(shape.n)).sum::<f64>();
        let mut first = first;
        for group in text.batches() {
            let tokens = group.len();
            let mut hidden = reader.read(first, group, step)?;
            self.step(pass, step, &mut hidden, &mut collector)?;
            if let Some(writer) = keeps.as_deref_mut() {
                writer.write(&hidden)?;
            }
            first += tokens;
            work.add(per_token * tokens as f64);
        }
        Ok(collector)
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
    pub(super) fn forward_work(&self, step: usize) -> f64 {
        if step == self.pass.model().n_layer() {
            return 0.0;
        }
        self.pace() * self.tensors_of(step).map(|tensor| FLOP * tensor.elements() as f64).sum::<f64>()
    }

    /// Flop of adding a token to a moment of rows of `n`: one triangle.
    pub(super) fn moment_work(&self, n: usize) -> f64 {
        self.pace() * (n * n) as f64
    }

    /// Flop of factoring a moment, as often as choosing a damping takes.
    pub(super) fn factor_work(&self, n: usize) -> f64 {
        let chosen = if self.settings.damping == Damping::Chosen { 4.0 } else { 1.0 };
        let times = if self.settings.order == FactorOrder::Both { chosen + 1.0 } else { chosen };
        times * (n as f64).powi(3) / 3.0
    }

    fn pace(&self) -> f64 {
        if Kernel::best(self.settings.precision).is_bf16() { FAST } else { 1.0 }
    }

    /// Flop of rounding a tensor and of judging the result.
    pub(super) fn rounding_work(&self, name: &str) -> f64 {
        let tensor = self.pass.model().gguf().tensor(name);
        let per_weight = |tensor: &TensorInfo| PRODUCTS * FLOP * tensor.row_len() as f64 + SEARCH_WORK;
        tensor.map_or(0.0, |tensor| tensor.elements() as f64 * per_weight(tensor))
    }

    /// About the work of the steps from `first` on, in millions of floating-point operations: what [`Self::run`] counts.
    /// Layers that are run twice are counted once.
    pub fn total_work<V: Visitor>(&self, first: usize, visitor: &V) -> u64 {
        let tokens = (self.calibration.len() + self.gate.len()) as f64;
        let corrected = self.settings.corrected;
        let is_stack = |tensor: &TensorInfo| tensor.rows() > tensor.rows_per_matrix();
        let of_step = |step: usize| {
            let of_tensor = |tensor: &TensorInfo| {
                let roundings = visitor.roundings(&tensor.name, step);
                if roundings == 0 {
                    return 0.0;
                }
                let n = tensor.row_len() as usize;
                let shared = matches!(Role::of(&tensor.name), Role::AttnK | Role::AttnV | Role::FfnUp);
                let sums = if corrected && !is_stack(tensor) { 3.0 } else { 1.0 };
                let moment = if shared { 0.0 } else { sums * self.moment_work(n) * tokens + self.factor_work(n) };
                moment + self.rounding_work(&tensor.name) * roundings as f64
            };
            // Experts are shown by a pass of their own.
            let has_stack = || self.tensors_of(step).any(|t| is_stack(t) && visitor.roundings(&t.name, step) > 0);
            let passes = match corrected {
                true if has_stack() => PASSES + 1.0,
                true => PASSES,
                false => 1.0,
            };
            passes * self.forward_work(step) * tokens + self.tensors_of(step).map(of_tensor).sum::<f64>()
        };
        ((first..self.steps()).map(of_step).sum::<f64>() / FLOP_PER_UNIT) as u64
    }
}

/// True if each of `0..n` is there once.
fn is_permutation(order: &[usize], n: usize) -> bool {
    let mut seen = vec![false; n];
    order.len() == n && order.iter().all(|&at| at < n && !std::mem::replace(&mut seen[at], true))
}

/// Flop in a unit of progress.
const FLOP_PER_UNIT: f64 = 1e6;

/// Work of one step.
pub(super) struct Work<'w> {
    watch: &'w dyn Watch,
    what: &'w str,
}

impl Work<'_> {
    pub(super) fn add(&self, flop: f64) {
        self.watch.advance((flop / FLOP_PER_UNIT) as u64, self.what);
    }
}
