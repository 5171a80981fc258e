//! An export that is decided: what each tensor of the output is made of, and where it stands.

use std::path::Path;

use safetensors::tensor::Dtype;
use serde_json::{Map, Value};

use super::request::Rounding;
use super::scheme::Scheme;
use super::shards::{NewTensor, Shards};
use crate::convert::source::{Matrix, ModelFolder};
use crate::rounding::grid::Layout;

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

impl Draft {
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
