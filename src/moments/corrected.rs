//! A layer whose matrices are rounded one input after the other, from what the rounded ones before them give.
//!
//! Two streams of hidden states run side by side: the model's, and that of the model with all rounded so far. For each input
//! of a layer, in the order in which the layer comes to them, both run from the layer's start to where that input is seen, a
//! few sequences at a time, and no further. Inputs of experts are shown from the model's own stream: in the other one, tokens
//! choose other experts.

use std::path::PathBuf;
use std::sync::Arc;

use super::MomentsError;
use super::inputs::{Calibrated, Finished, Input, InputMatrix, Shape, in_order, plan_passes};
use super::states::{self, StatesReader, StatesWriter};
use super::stream::{Stream, Visitor, Work};
use crate::gguf::TensorType;
use crate::model::{ForwardOptions, HiddenStates, ModelError, NoTaps, Overrides, Pass, TapInput, Taps, TokenGroup};
use crate::os;
use crate::rounding::gptq::{CorrectedMoment, CorrectedRows, InputPair, JudgedInputs, SecondMoment};
use crate::text::Sequences;

/// Of so many groups of the calibration text one is held out, to choose the strength of the correction and the damping by.
const HELD_OUT: usize = 16;

/// Forward passes of a layer, in all, for one of the pass that rounds by the model's own inputs: both streams go to each
/// of four inputs, and then through the layer.
pub(super) const PASSES: f64 = 4.5;

/// Matrices of a layer that are rounded, as 32-bit floats.
type Replaced = Vec<(String, Vec<u8>)>;

/// What an input looks like in one of the two streams, and that stream before the product is added.
struct Seen {
    rows: Vec<f32>,
    hidden: HiddenStates,
    /// The layer showed the input of all tokens at once.
    at_once: bool,
}

impl<'g> Stream<'_, '_, 'g> {
    /// Where the states of the rounded model lie.
    pub(super) fn rounded_folder(&self) -> PathBuf {
        states::rounded_folder(self.folder)
    }

    /// Both streams begin alike.
    pub(super) fn begin_rounded(&self) -> Result<(), MomentsError> {
        let folder = self.rounded_folder();
        let failed = |source| MomentsError::Io { path: folder.clone(), action: "cannot make it", source };
        std::fs::create_dir_all(&folder).map_err(failed)?;
        std::fs::copy(states::path_of(self.folder, 0), states::path_of(&folder, 0)).map_err(failed)?;
        Ok(())
    }

    /// Shows the inputs `shapes` of layer `step`, in that order, and takes what becomes of their matrices.
    pub(super) fn run_corrected<V: Visitor>(
        &self,
        step: usize,
        shapes: &[Shape],
        visitor: &mut V,
        work: &Work<'_>,
    ) -> Result<(), V::Error> {
        let mut replaced = Replaced::new();
        let lone = shapes.iter().filter(|shape| shape.matrices == 1).count();
        let mut experts: Vec<Shape> = shapes.iter().filter(|shape| shape.matrices > 1).cloned().collect();
        for shape in shapes {
            if shape.matrices == 1 {
                let input = self.corrected_input(step, shape, lone, &replaced, work)?;
                let rounding: f64 = shape.tensors.iter().map(|name| self.rounding_work(name)).sum();
                visitor.input(input)?;
                work.add(rounding);
            } else {
                for pass in plan_passes(std::mem::take(&mut experts), self.settings.moment_memory) {
                    self.run_shapes(step, &pass, None, visitor, work)?;
                }
            }
            for tensor in shape.tensors.iter().filter(|_| shape.matrices == 1) {
                if let Some(weights) = visitor.rounded(tensor) {
                    replaced.push((tensor.clone(), weights.iter().flat_map(|weight| weight.to_le_bytes()).collect()));
                }
            }
        }
        Ok(self.go_on(step, &replaced, work)?)
    }

    /// Takes both streams through the layer.
    fn go_on(&self, step: usize, replaced: &Replaced, work: &Work<'_>) -> Result<(), MomentsError> {
        let rounded = self.rounded_pass(replaced)?;
        let own = self.folder.to_path_buf();
        for (folder, pass) in [(own, None), (self.rounded_folder(), Some(&rounded))] {
            let mut reader = self.reader_in(&folder, step)?;
            let mut writer = StatesWriter::create(&folder, step + 1)?;
            let mut first = 0;
            for (text, own) in [(self.calibration, &self.pass), (self.gate, &self.gate_pass)] {
                for group in text.batches() {
                    let tokens = group.len();
                    let mut hidden = reader.read(first, group, step)?;
                    pass.unwrap_or(own).run_layer(&mut hidden, &mut NoTaps)?;
                    writer.write(&hidden)?;
                    first += tokens;
                    work.add(self.forward_work(step) * tokens as f64);
                }
            }
            writer.commit()?;
        }
        Ok(())
    }

    fn rounded_pass<'r>(&self, replaced: &'r Replaced) -> Result<Pass<'_, 'g, 'r>, MomentsError> {
        let mut overrides = Overrides::new();
        for (tensor, bytes) in replaced {
            overrides.insert(tensor.clone(), TensorType::F32, bytes.as_slice());
        }
        let options = ForwardOptions {
            precision: self.settings.precision,
            cancel: Some(self.stop.flag().clone()),
            ..ForwardOptions::default()
        };
        Ok(self.pass.model().pass(options, overrides)?)
    }

    /// What is known of an input that both streams show. `lone` is the number of such inputs in the layer.
    fn corrected_input(
        &self,
        step: usize,
        shape: &Shape,
        lone: usize,
        replaced: &Replaced,
        work: &Work<'_>,
    ) -> Result<Input, MomentsError> {
        let model = self.pass.model();
        let pass = self.rounded_pass(replaced)?;
        let adds = shape.tensors.len() == 1 && model.adds_to_stream(step, &shape.tensors[0]);
        let outputs = adds.then_some(model.hparams().n_embd);
        let per_token = (PASSES - 2.0) * self.forward_work(step) / lone as f64 + 3.0 * self.moment_work(shape.n);
        let mut sums = CorrectedMoment::new(SecondMoment::with_precision(shape.n, self.settings.precision)?, outputs)?;
        let (mut held_out, mut judge) = (CorrectedRows::new(shape.n, outputs), CorrectedRows::new(shape.n, outputs));
        let mut first = 0;
        let mut readers = [self.reader_in(self.folder, step)?, self.reader_in(&self.rounded_folder(), step)?];
        for (text, own) in [(self.calibration, &self.pass), (self.gate, &self.gate_pass)] {
            let calibrates = std::ptr::eq(text, self.calibration);
            for (index, group) in self.groups(text, step).into_iter().enumerate() {
                let tokens = group.len();
                let exact = self.seen(own, &mut readers[0], first, &group, step, shape)?;
                let rounded = self.seen(&pass, &mut readers[1], first, &group, step, shape)?;
                let at_once = exact.at_once && rounded.at_once;
                let stream = (outputs.is_some() && at_once).then(|| difference(&exact.hidden, &rounded.hidden));
                let pair = InputPair { exact: &exact.rows, rounded: &rounded.rows, stream: stream.as_deref() };
                match calibrates {
                    true if index % HELD_OUT == HELD_OUT / 2 => held_out.accumulate(pair),
                    true => sums.accumulate(pair),
                    false => judge.accumulate(pair),
                }
                first += tokens;
                work.add(per_token * tokens as f64);
                self.stop.check()?;
            }
        }
        os::give_back_freed_memory();
        let (moment, mut correction) = sums.finish()?;
        let (rows, weights) = self.sample(shape, 0)?;
        if let Some(correction) = &mut correction {
            correction.choose_strength(&weights, &rows, &held_out);
        }
        let tokens = moment.tokens() + held_out.tokens() as u64;
        let found = Finished { moment, held_out: held_out.into_rounded(), own_tokens: tokens, tokens };
        let calibrated = Calibrated::new(found, &self.settings, &weights);
        work.add(self.factor_work(shape.n));
        let matrix = InputMatrix {
            factor: calibrated.factor,
            stored: calibrated.stored,
            importance: calibrated.importance,
            tokens: calibrated.tokens,
            gate: JudgedInputs::Corrected(judge),
            raw: None,
            sample: calibrated.sample,
            correction,
        };
        let (tensors, is_moved) = (shape.tensors.clone(), shape.order.is_some());
        Ok(Input { n: shape.n, matrices: vec![matrix], tensors, is_moved })
    }

    /// Sequences that the layer handles at once, at least as many groups of them as it takes to hold one out.
    fn groups(&self, text: &Sequences, step: usize) -> Vec<Arc<TokenGroup>> {
        text.groups_of(self.pass.model().rows_at_once(step).min(text.len() / HELD_OUT))
    }

    /// Runs a layer for some tokens until an input of all of them was seen.
    fn seen(
        &self,
        pass: &Pass<'_, 'g, '_>,
        reader: &mut StatesReader,
        first: usize,
        group: &Arc<TokenGroup>,
        step: usize,
        shape: &Shape,
    ) -> Result<Seen, MomentsError> {
        let mut hidden = reader.read(first, group.clone(), step)?;
        let mut capture =
            Capture { tensor: &shape.tensors[0], values: group.len() * shape.n, rows: Vec::new(), blocks: 0 };
        match pass.run_layer(&mut hidden, &mut capture) {
            Err(ModelError::Seen) => {}
            Err(error) => return Err(error.into()),
            Ok(()) => return Err(MomentsError::Inputs { tensor: shape.tensors[0].clone() }),
        }
        let Capture { rows, blocks, .. } = capture;
        let rows = match &shape.order {
            Some(order) => in_order(&rows, order),
            None => rows,
        };
        Ok(Seen { rows, hidden, at_once: blocks == 1 })
    }
}

/// Hidden states of the model minus those of the rounded one.
fn difference(exact: &HiddenStates, rounded: &HiddenStates) -> Vec<f32> {
    exact.data().iter().zip(rounded.data()).map(|(exact, rounded)| exact - rounded).collect()
}

/// Keeps an input, and stops the layer when all of it is there.
struct Capture<'a> {
    tensor: &'a str,
    values: usize,
    rows: Vec<f32>,
    blocks: usize,
}

impl Taps for Capture<'_> {
    fn wants(&self, tensor: &str) -> bool {
        tensor == self.tensor
    }

    fn input(&mut self, input: &TapInput<'_>) -> Result<(), ModelError> {
        if !input.tensors.contains(&self.tensor) {
            return Ok(());
        }
        self.rows.extend_from_slice(input.rows.data());
        self.blocks += 1;
        if self.rows.len() < self.values { Ok(()) } else { Err(ModelError::Seen) }
    }
}
