//! The pass that rounds a model.

use std::collections::{HashMap, HashSet};

use rayon::prelude::*;

use super::RoundingError;
use super::checkpoint::PartialFolder;
use super::outcome::Outcome;
use super::tensor::{RoundedTensor, TensorJob};
use crate::gguf::{Gguf, NewTensor, TensorInfo, TensorType};
use crate::moments::{Calibration, GradientMoments, Input, Stream, Visitor, has_states};
use crate::progress::{Stop, Watch};
use crate::quant;

/// One file that a run makes.
#[derive(Clone, Copy)]
pub struct RunOutput<'a> {
    /// Types by name of the source tensor. Tensors whose input the pass does not show are left alone.
    pub types: &'a HashMap<String, TensorType>,
    /// Where finished layers are kept.
    pub folder: &'a PartialFolder,
}

/// A run: a model, its texts, and one or several choices of types. All outputs share the forward pass, the second
/// moments and their factors, which are most of the work; a tensor that has the same type in several is rounded once.
pub struct Run<'a, 'g> {
    /// The unquantized model and its texts.
    pub calibration: &'a Calibration<'g>,
    /// What is made.
    pub outputs: &'a [RunOutput<'a>],
    /// What ends the run.
    pub stop: Stop,
}

impl<'a, 'g> Run<'a, 'g> {
    /// Rounds all tensors, layer by layer, going on behind the steps that the folders hold.
    ///
    /// # Errors
    /// When a tensor cannot be rounded, a file cannot be written, or the run is interrupted. What is finished stays in
    /// the folders.
    pub fn round(&self, watch: &dyn Watch) -> Result<(), RoundingError> {
        let Some((stream, first)) = self.stream()? else { return Ok(()) };
        let mut rounder = self.rounder(first);
        stream.run(first, &mut rounder, watch)
    }

    /// About the work that [`Self::round`] still has to do, in millions of floating-point operations.
    ///
    /// # Errors
    /// As [`Stream::new`].
    pub fn work(&self) -> Result<u64, RoundingError> {
        let Some((stream, first)) = self.stream()? else { return Ok(0) };
        Ok(stream.total_work(first, &self.rounder(first)))
    }

    /// Number of steps of a whole run.
    pub fn steps(&self) -> usize {
        self.calibration.model().n_layer() + 1
    }

    /// Number of steps that are done for every output.
    pub fn steps_done(&self) -> usize {
        self.outputs.iter().map(|output| output.folder.steps_done()).min().unwrap_or(0)
    }

    /// The pass and its first step: behind the steps that all outputs have, if a folder holds the hidden states that
    /// enter it. `None` when there is nothing to do.
    fn stream(&self) -> Result<Option<(Stream<'a, 'a, 'g>, usize)>, RoundingError> {
        let (Some(start), done) = (self.outputs.first(), self.steps_done()) else { return Ok(None) };
        if done == self.steps() {
            return Ok(None);
        }
        let holds_states =
            |output: &&RunOutput<'a>| has_states(output.folder.path(), done, self.calibration.is_corrected());
        let (folder, first) = match self.outputs.iter().find(holds_states) {
            Some(output) if done > 0 => (output.folder, done),
            _ => (start.folder, 0),
        };
        let stream = self.calibration.stream(folder.path(), self.stop.clone())?;
        Ok(Some((stream, first)))
    }

    /// What rounds, in a pass of its own or somebody else's that begins at step `first`.
    pub(crate) fn rounder(&self, first: usize) -> Rounder<'_> {
        let outputs = self.outputs.iter().map(|output| RounderOutput {
            output: *output,
            done: output.folder.steps_done(),
            tensors: Vec::new(),
            searched: Vec::new(),
            outcomes: Vec::new(),
        });
        Rounder {
            gguf: self.calibration.model().gguf(),
            gradients: self.calibration.gradients(),
            keeps_search: self.calibration.has_final_gate(),
            outputs: outputs.collect(),
            step: first,
            stop: self.stop.clone(),
        }
    }
}

/// Rounds what the pass shows.
pub(crate) struct Rounder<'a> {
    gguf: &'a Gguf,
    gradients: Option<&'a GradientMoments>,
    /// What search gives is kept beside what feedback gives.
    keeps_search: bool,
    outputs: Vec<RounderOutput<'a>>,
    /// The step at work.
    step: usize,
    stop: Stop,
}

struct RounderOutput<'a> {
    output: RunOutput<'a>,
    /// Steps that an earlier run has done.
    done: usize,
    /// Of the step at work.
    tensors: Vec<(NewTensor, Vec<u8>)>,
    /// Those that search rounds to other bytes, so rounded, where the whole is to be judged.
    searched: Vec<(NewTensor, Vec<u8>)>,
    outcomes: Vec<Outcome>,
}

impl Visitor for Rounder<'_> {
    type Error = RoundingError;

    fn roundings(&self, tensor: &str, step: usize) -> usize {
        let unfinished = self.outputs.iter().filter(|output| step >= output.done);
        unfinished.filter_map(|output| output.output.types.get(tensor)).collect::<HashSet<_>>().len()
    }

    fn input(&mut self, input: Input) -> Result<(), RoundingError> {
        let step = self.step;
        let sources: Vec<&TensorInfo> = input.tensors.iter().filter_map(|name| self.gguf.tensor(name)).collect();
        let mut jobs: Vec<(&TensorInfo, TensorType)> = Vec::new();
        for &source in &sources {
            let unfinished = self.outputs.iter().filter(|output| step >= output.done);
            for &ty in unfinished.filter_map(|output| output.output.types.get(&source.name)) {
                if !jobs.contains(&(source, ty)) {
                    jobs.push((source, ty));
                }
            }
        }
        let (gguf, gradients, keeps_search, stop) = (self.gguf, self.gradients, self.keeps_search, &self.stop);
        // Side by side, as what ties rows together leaves threads idle in narrow matrices.
        let round = |&(source, ty): &(&TensorInfo, TensorType)| {
            TensorJob { gguf, source, ty, gradients, keeps_search, stop }.round(&input)
        };
        let rounded: Vec<RoundedTensor> = jobs.par_iter().map(round).collect::<Result<_, _>>()?;
        for &source in &sources {
            for output in self.outputs.iter_mut().filter(|output| step >= output.done) {
                let Some(&ty) = output.output.types.get(&source.name) else { continue };
                let Some(at) = jobs.iter().position(|job| *job == (source, ty)) else { continue };
                let RoundedTensor { data, searched, outcome } = &rounded[at];
                output.tensors.push((new_tensor(source, ty), data.clone()));
                output.searched.extend(searched.clone().map(|data| (new_tensor(source, ty), data)));
                output.outcomes.push(outcome.clone());
            }
        }
        Ok(())
    }

    fn rounded(&mut self, tensor: &str) -> Option<Vec<f32>> {
        // There is but one output where this is asked for.
        let tensors = &self.outputs.first()?.tensors;
        let (tensor, data) = tensors.iter().find(|(found, _)| found.name == tensor)?;
        let mut weights = vec![0.0; usize::try_from(tensor.shape.iter().product::<u64>()).ok()?];
        quant::dequantize(tensor.ty, data, &mut weights).ok()?;
        Some(weights)
    }

    fn done(&mut self, step: usize) -> Result<(), RoundingError> {
        for output in self.outputs.iter_mut().filter(|output| step >= output.done) {
            output.output.folder.save_searched(step, &output.searched)?;
            output.output.folder.save(step, &output.tensors, &output.outcomes)?;
            output.searched.clear();
            output.tensors.clear();
            output.outcomes.clear();
        }
        self.step = step + 1;
        Ok(())
    }
}

fn new_tensor(source: &TensorInfo, ty: TensorType) -> NewTensor {
    NewTensor { ty, ..NewTensor::from(source) }
}
