//! An export that is decided: what each tensor of the output is made of, and where it stands.

use std::path::Path;

use safetensors::tensor::Dtype;
use serde_json::{Map, Value};

use super::calibrated::guests::AlsoGguf;
use super::config::{self, ConfigGroup};
use super::mixed::Mixture;
use super::names;
use super::pack::{self, dtype_bytes};
use super::request::Rounding;
use super::scheme::{Activations, Scheme};
use super::shards::{self, NewTensor, Shards};
use super::{ExportError, files};
use crate::convert::source::{Matrix, ModelFolder};
use crate::rounding::grid::{Grid, Groups, Layout};

/// A linear layer that is quantized.
#[derive(Clone, Debug)]
pub(crate) struct Module {
    /// Without `.weight`.
    pub(crate) name: String,
    pub(crate) matrix: Matrix,
    /// Index into [`Draft::layouts`].
    pub(crate) group: usize,
}

/// What tensors are made of.
#[derive(Clone, Debug)]
pub(crate) enum Content {
    /// A rounded matrix.
    Module(Module),
    /// The bytes of the source.
    Stored { weight: usize, dtype: Dtype, bytes: u64, shape: Vec<u64> },
    /// Values of codes in the source, or of a part of a stack, in 16 bits.
    Decoded { matrix: Matrix, dtype: Dtype, shape: Vec<u64> },
}

/// Tensors that are written together.
#[derive(Clone, Debug)]
pub(crate) struct Item {
    /// Of the module, or of the only tensor.
    pub(crate) name: String,
    pub(crate) content: Content,
}

impl Item {
    pub(crate) fn module(&self) -> Option<&Module> {
        match &self.content {
            Content::Module(module) => Some(module),
            _ => None,
        }
    }
}

/// A linear layer that keeps its 16 bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptTensor {
    /// Its name, without `.weight`.
    pub module: String,
    /// Why.
    pub reason: &'static str,
    /// The groups do not fit it.
    pub(crate) odd: bool,
}

/// A matrix that the scheme's groups do not fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OddTensor {
    /// Its name, without `.weight`.
    pub module: String,
    /// What does not fit.
    pub problem: String,
    /// What becomes of it.
    pub becomes: String,
}

/// A folder that was read, and what becomes of it.
#[derive(Debug)]
pub struct Draft {
    pub(crate) scheme: Scheme,
    pub(crate) rounding: Rounding,
    /// Norms may take up factors of the matrices behind them.
    pub(crate) smooths: bool,
    /// All choices but those of the rounding, in words.
    pub(crate) settings: String,
    pub(crate) source: ModelFolder,
    pub(crate) layouts: Vec<Layout>,
    /// The mix of 4 and 8 bits that is wanted.
    pub(crate) mixture: Option<Mixture>,
    /// GGUF files that the same pass of the model makes.
    pub(crate) also: Vec<AlsoGguf>,
    /// Largest number of bytes of tensors in a file.
    pub(crate) shard_bytes: u64,
    pub(crate) items: Vec<Item>,
    /// Those of each item.
    pub(crate) tensors: Vec<Vec<NewTensor>>,
    /// The first tensor of each item, counted over all.
    pub(crate) starts: Vec<usize>,
    pub(crate) shards: Shards,
    /// `config.json` of the output.
    pub(crate) config: Map<String, Value>,
    /// Files that go along.
    pub(crate) extra: Vec<String>,
    pub(crate) ignore: Vec<String>,
    pub(crate) kept: Vec<KeptTensor>,
    pub(crate) odd: Vec<OddTensor>,
    pub(crate) warnings: Vec<String>,
}

/// The tensors that an item becomes.
fn tensors_of(item: &Item, scheme: Scheme, layouts: &[Layout]) -> Vec<NewTensor> {
    match &item.content {
        Content::Module(module) => {
            let Matrix { rows, columns, .. } = module.matrix;
            let parts = pack::parts(scheme.row().format, &layouts[module.group], rows, columns);
            let of_part = |part: pack::PartInfo| NewTensor {
                name: format!("{}{}", module.name, part.suffix),
                dtype: part.dtype,
                bytes: part.bytes(),
                shape: part.shape,
            };
            parts.into_iter().map(of_part).collect()
        }
        Content::Stored { dtype, bytes, shape, .. } => {
            vec![NewTensor { name: item.name.clone(), dtype: *dtype, shape: shape.clone(), bytes: *bytes }]
        }
        Content::Decoded { dtype, shape, matrix } => {
            let bytes = matrix.rows * matrix.columns * dtype_bytes(*dtype);
            vec![NewTensor { name: item.name.clone(), dtype: *dtype, shape: shape.clone(), bytes }]
        }
    }
}

impl Draft {
    /// Fixes tensors, files and configuration by what each item is to become.
    pub(crate) fn lay_out(&mut self) -> Result<(), ExportError> {
        self.tensors = self.items.iter().map(|item| tensors_of(item, self.scheme, &self.layouts)).collect();
        self.starts =
            self.tensors.iter().scan(0, |next, tensors| Some(std::mem::replace(next, *next + tensors.len()))).collect();
        self.shards = shards::lay_out(&self.tensors, self.shard_bytes);
        self.config = self.source.config_json()?;
        let quantization = config::quantization_config(&self.config_groups(), &self.ignore);
        files::set_quantization(&mut self.config, quantization);
        Ok(())
    }

    /// Groups of the configuration: one for each layout that some module has.
    fn config_groups(&self) -> Vec<ConfigGroup> {
        let row = self.scheme.row();
        let usual = self.mixture.as_ref().map_or(0, |mixture| mixture.usual_layout(&self.items));
        let modules = |is_in: &dyn Fn(usize) -> bool| -> Vec<&str> {
            let modules = self.items.iter().filter_map(Item::module).filter(|module| is_in(module.group));
            modules.map(|module| module.name.as_str()).collect()
        };
        let group = |(index, layout): (usize, &Layout)| {
            let of_layout = modules(&|group| group == index);
            // transformers decodes all experts by the group whose patterns speak of them, whatever else they find.
            let experts = |modules: &[&str]| modules.iter().filter(|name| names::experts_of(name).is_some()).count();
            let (of_this, all) = (experts(&of_layout), experts(&modules(&|_| true)));
            let has_all = of_this > 0 && of_this == all && of_layout.len() < self.quantized();
            let experts = has_all.then(|| names::ALL_EXPERTS.to_owned());
            let targets = match index == usual {
                true => ["Linear".to_owned()].into_iter().chain(experts).collect(),
                false if of_layout.is_empty() => return None,
                false => names::targets(&of_layout, &modules(&|group| group != index)),
            };
            // Inputs are rounded in groups as wide as blocks; a scale a row goes with one a token.
            let activations = match (row.activations, layout.groups) {
                (Activations::Group, Groups::Channel) => Activations::Token,
                (activations, _) => activations,
            };
            Some(ConfigGroup { targets, format: row.format, layout: *layout, activations })
        };
        self.layouts.iter().enumerate().filter_map(group).collect()
    }

    /// GGUF files that are made as well.
    pub fn also_gguf(&self) -> &[AlsoGguf] {
        &self.also
    }

    /// Most bits per weight of the quantized matrices, where that was asked for.
    pub fn wanted_bits(&self) -> Option<f64> {
        self.mixture.as_ref().map(|mixture| mixture.wanted)
    }

    /// Bits of each quantized matrix, by its module, in a mix that is planned: before [`Draft::write`] has measured it there is
    /// none.
    pub fn mixed_bits(&self) -> Option<Vec<(&str, u32)>> {
        self.mixture.as_ref().filter(|mixture| mixture.is_planned)?;
        let bits = |module: &Module| match self.layouts[module.group].grid {
            Grid::Int { bits, .. } => bits,
            _ => 0,
        };
        Some(self.items.iter().filter_map(Item::module).map(|module| (module.name.as_str(), bits(module))).collect())
    }

    /// The scheme.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// How codes and scales are chosen.
    pub fn rounding(&self) -> &Rounding {
        &self.rounding
    }

    /// The source folder.
    pub fn folder(&self) -> &Path {
        self.source.path()
    }

    /// The class that `config.json` names.
    pub fn class(&self) -> &str {
        self.source.class()
    }

    /// Number of matrices that are quantized.
    pub fn quantized(&self) -> usize {
        self.items.iter().filter(|item| item.module().is_some()).count()
    }

    /// Weights in them.
    pub fn quantized_weights(&self) -> u64 {
        self.items.iter().filter_map(Item::module).map(|module| module.matrix.rows * module.matrix.columns).sum()
    }

    /// Bytes that they take, with their scales.
    pub fn quantized_bytes(&self) -> u64 {
        let of_modules = self.items.iter().zip(&self.tensors).filter(|(item, _)| item.module().is_some());
        of_modules.flat_map(|(_, tensors)| tensors).map(|tensor| tensor.bytes).sum()
    }

    /// Bytes of all safetensors files.
    pub fn file_bytes(&self) -> u64 {
        self.shards.files.iter().map(|shard| shard.bytes).sum()
    }

    /// Names of the safetensors files.
    pub fn file_names(&self) -> impl Iterator<Item = &str> {
        self.shards.files.iter().map(|shard| shard.name.as_str())
    }

    /// `ignore` of the configuration.
    pub fn ignored(&self) -> &[String] {
        &self.ignore
    }

    /// Linear layers that keep their 16 bits.
    pub fn kept(&self) -> &[KeptTensor] {
        &self.kept
    }

    /// Matrices that the scheme's groups do not fit.
    pub fn odd(&self) -> &[OddTensor] {
        &self.odd
    }

    /// What a user should know though it does not stop the export, one line each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}
