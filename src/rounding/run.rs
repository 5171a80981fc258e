//! The pass that rounds a model.

use std::collections::HashMap;
use std::sync::atomic::AtomicBool;

use super::checkpoint::PartialFolder;
use super::outcome::Outcome;
use super::stream::{OnWork, Stream, StreamSettings, Visitor};
use super::tensor::TensorJob;
use super::{Input, RoundingError, Text};
use crate::gguf::{Gguf, NewTensor, TensorInfo, TensorType};
use crate::model::Model;
use crate::recipe::roles;

/// True if the forward pass of `model` shows the input of this tensor, as far as its name tells: those of the layers,
/// and that of the output matrix.
pub fn has_input(name: &str, output: &str) -> bool {
    name == output || roles::block_number(name).is_some()
}

/// Name of the matrix that gives the logits, told from the tensors alone.
pub fn output_tensor(gguf: &Gguf) -> &'static str {
    if gguf.tensor(roles::OUTPUT_WEIGHT).is_some() { roles::OUTPUT_WEIGHT } else { "token_embd.weight" }
}

/// A run: a model, its texts, and the type that each tensor is rounded to.
pub struct Run<'a, 'm, 'g> {
    /// The unquantized model.
    pub model: &'m Model<'g>,
    /// The text that rounding goes by.
    pub calibration: &'a Text,
    /// The text that judges it.
    pub gate: &'a Text,
    /// Types by name of the source tensor. Tensors whose input the pass does not show are left alone.
    pub types: &'a HashMap<String, TensorType>,
    /// Where finished layers are kept.
    pub folder: &'a PartialFolder,
    /// How to run.
    pub settings: StreamSettings,
}

impl Run<'_, '_, '_> {
    /// Rounds all tensors, layer by layer, going on behind the steps that the folder holds.
    ///
    /// # Errors
    /// When a tensor cannot be rounded, a file cannot be written, or the run is interrupted. What is finished stays in
    /// the folder.
    pub fn round(&self, on_work: OnWork<'_>) -> Result<(), RoundingError> {
        let first = self.folder.steps_done();
        let settings = self.settings.clone();
        let stream = Stream::new(self.model, self.calibration, self.gate, self.folder.path(), settings)?;
        let mut rounder = Rounder {
            gguf: self.model.gguf(),
            types: self.types,
            folder: self.folder,
            cancel: self.settings.forward.cancel.as_deref(),
            tensors: Vec::new(),
            outcomes: Vec::new(),
        };
        stream.run(first, &mut rounder, on_work)
    }

    /// About the flop that [`Self::round`] still has to do.
    ///
    /// # Errors
    /// As [`Stream::new`].
    pub fn work(&self) -> Result<f64, RoundingError> {
        let settings = self.settings.clone();
        let stream = Stream::new(self.model, self.calibration, self.gate, self.folder.path(), settings)?;
        Ok(stream.total_work(self.folder.steps_done(), &|name| self.types.contains_key(name)))
    }

    /// Number of steps of a whole run.
    pub fn steps(&self) -> usize {
        self.model.n_layer() + 1
    }
}

/// Rounds what the pass shows.
struct Rounder<'a> {
    gguf: &'a Gguf,
    types: &'a HashMap<String, TensorType>,
    folder: &'a PartialFolder,
    cancel: Option<&'a AtomicBool>,
    /// Of the step at work.
    tensors: Vec<(NewTensor, Vec<u8>)>,
    outcomes: Vec<Outcome>,
}

impl Visitor for Rounder<'_> {
    fn wants(&self, tensor: &str) -> bool {
        self.types.contains_key(tensor)
    }

    fn input(&mut self, input: Input) -> Result<(), RoundingError> {
        for name in &input.tensors {
            let (Some(source), Some(&ty)) = (self.gguf.tensor(name), self.types.get(name)) else { continue };
            let (data, outcome) = TensorJob { gguf: self.gguf, source, ty, cancel: self.cancel }.round(&input)?;
            self.tensors.push((new_tensor(source, ty), data));
            self.outcomes.push(outcome);
        }
        Ok(())
    }

    fn done(&mut self, step: usize) -> Result<(), RoundingError> {
        self.folder.save(step, &self.tensors, &self.outcomes)?;
        self.tensors.clear();
        self.outcomes.clear();
        Ok(())
    }
}

fn new_tensor(source: &TensorInfo, ty: TensorType) -> NewTensor {
    NewTensor { ty, ..NewTensor::from(source) }
}
