//! A written file in the place of the original's tensors.

use std::collections::HashMap;

use super::super::feedback::{Outcome, PartialFolder};
use super::super::write::PipelineError;
use super::super::{Draft, QuantizeError};
use crate::atomic_file::AtomicFile;
use crate::gguf::{Gguf, TensorType};
use crate::model::Overrides;
use crate::os;
use crate::recipe::roles::split_block;

/// The tensors that the pass over the model rounded, a step for each layer and one for the output matrix.
pub(in super::super) struct Steps {
    rounded: Vec<Gguf>,
    /// Of the same tensors those that search rounds to other bytes.
    searched: Vec<Option<Gguf>>,
}

impl Steps {
    /// All steps of a finished folder.
    ///
    /// # Errors
    /// When one of them is damaged.
    pub(in super::super) fn load(folder: &PartialFolder, steps: usize) -> Result<Steps, QuantizeError> {
        let rounded = (0..steps).map(|step| folder.load(step).map(|(gguf, _)| gguf));
        let searched = (0..steps).map(|step| folder.load_searched(step));
        Ok(Steps {
            rounded: rounded.collect::<Result<_, _>>().map_err(QuantizeError::Unfinished)?,
            searched: searched.collect::<Result<_, _>>().map_err(QuantizeError::Unfinished)?,
        })
    }

    /// Steps in which search gives other bytes.
    pub(in super::super) fn differ(&self) -> Vec<bool> {
        self.searched.iter().map(Option::is_some).collect()
    }

    /// What search gives in a step, where that differs.
    pub(in super::super) fn searched(&self, step: usize) -> Option<&Gguf> {
        self.searched.get(step)?.as_ref()
    }

    /// The outcome of a tensor of `step`, whose rounding by search was kept.
    pub(in super::super) fn settle(&self, step: usize, outcome: &mut Outcome) {
        if self.searched(step).is_some_and(|gguf| gguf.tensor(&outcome.tensor).is_some()) {
            outcome.keep_search();
        }
    }
}

/// A written file, by the names of the source.
pub(in super::super) struct Candidate<'a> {
    steps: &'a Steps,
    /// Rounded tensors by the layer that they are part of.
    tensors: HashMap<Option<usize>, Vec<Tensor<'a>>>,
}

struct Tensor<'a> {
    name: &'a str,
    ty: TensorType,
    data: Data,
}

enum Data {
    /// In the step that rounded it.
    Step(usize),
    /// Of a tensor that is rounded without knowing the model's inputs.
    Read(Vec<u8>),
}

impl<'a> Candidate<'a> {
    /// The files of a draft with `layers` layers, which hold all that no step has rounded.
    ///
    /// # Errors
    /// When they cannot be read.
    pub(in super::super) fn new(
        draft: &'a Draft<'_>,
        files: &[AtomicFile],
        steps: &'a Steps,
        layers: usize,
    ) -> Result<Candidate<'a>, QuantizeError> {
        let numbered = steps.rounded.iter().enumerate();
        let step_of: HashMap<&str, usize> = numbered
            .flat_map(|(step, gguf)| gguf.tensors().iter().map(move |tensor| (tensor.name.as_str(), step)))
            .collect();
        let mut tensors: HashMap<Option<usize>, Vec<Tensor<'_>>> = HashMap::new();
        // What another file gives is no part of the forward pass.
        let own = draft.tensors.iter().filter(|tensor| draft.gguf.tensor(&tensor.source.name).is_some());
        for tensor in own.filter(|tensor| tensor.is_rounded()) {
            let name = tensor.source.name.as_str();
            let data = match step_of.get(name) {
                Some(&step) => Data::Step(step),
                None => {
                    let (file, offset) = tensor.place();
                    let mut data = vec![0; tensor.bytes as usize];
                    os::read_exact_at(files[file].file(), &mut data, offset).map_err(|source| {
                        PipelineError::ReadBack { file: files[file].target().to_path_buf(), source }
                    })?;
                    Data::Read(data)
                }
            };
            let layer = split_block(name).and_then(|(layer, _)| usize::try_from(layer).ok());
            let tensor = Tensor { name, ty: tensor.choice.ty, data };
            tensors.entry(layer.filter(|layer| *layer < layers)).or_default().push(tensor);
        }
        Ok(Candidate { steps, tensors })
    }

    pub(super) fn steps(&self) -> &Steps {
        self.steps
    }

    /// What replaces the original's tensors in a layer, or outside of all.
    pub(super) fn overrides(&self, layer: Option<usize>, searched: &[bool]) -> Overrides<'_> {
        let mut overrides = Overrides::new();
        for tensor in self.tensors.get(&layer).into_iter().flatten() {
            let data = match &tensor.data {
                Data::Read(data) => Some(data.as_slice()),
                Data::Step(step) => {
                    let by_search =
                        if searched[*step] { data_of(self.steps.searched(*step), tensor.name) } else { None };
                    by_search.or_else(|| data_of(self.steps.rounded.get(*step), tensor.name))
                }
            };
            // Files of steps were checked when they were opened.
            if let Some(data) = data {
                overrides.insert(tensor.name, tensor.ty, data);
            }
        }
        overrides
    }

    /// Lets the system drop the pages of a layer.
    pub(super) fn release(&self, layer: usize) {
        let both = [self.steps.rounded.get(layer), self.steps.searched(layer)];
        both.into_iter().flatten().for_each(|gguf| gguf.tensors().iter().for_each(|tensor| gguf.release(tensor)));
    }
}

fn data_of<'a>(gguf: Option<&'a Gguf>, name: &str) -> Option<&'a [u8]> {
    let gguf = gguf?;
    gguf.data(gguf.tensor(name)?).ok()
}
