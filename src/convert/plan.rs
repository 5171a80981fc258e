//! Which source tensors make which output tensors.

use std::collections::HashMap;
use std::ops::Range;
use std::path::PathBuf;

use super::architectures::{Change, Dim, Row};
use super::checkpoint::{Checkpoint, Dense, SourceTensor, shape_text};
use super::config::Config;
use super::hparams::{RopeFactors, Sizes};
use super::scales::Scales;
use super::{ConvertError, OutputType};
use crate::gguf::{NewTensor, TensorType, shown};
use crate::model::OutputMatrix;
use crate::recipe::roles::{OUTPUT_WEIGHT, TOKEN_EMBD_WEIGHT};

/// Rows of a source tensor, counted over all its leading dimensions.
#[derive(Debug, Clone)]
pub(super) struct Part {
    pub tensor: usize,
    pub rows: Range<u64>,
}

/// What an output tensor holds.
#[derive(Debug)]
pub(super) enum Content {
    /// Rows of source tensors, one after the other.
    Rows {
        parts: Vec<Part>,
        /// Values of a row, 1 for a vector whose values move like rows.
        row_len: u64,
        /// Heads whose rows are permuted.
        permuted_heads: Option<u64>,
        add_one: bool,
    },
    /// Values that no source tensor holds.
    Values(Vec<f32>),
}

/// One tensor of the GGUF.
#[derive(Debug)]
pub(super) struct Output {
    pub tensor: NewTensor,
    pub content: Content,
}

/// All tensors of the GGUF, and what reading them needs.
pub(super) struct Plan {
    pub outputs: Vec<Output>,
    pub scales: HashMap<usize, Scales>,
}

/// Suffixes of tensors that no program needs: buffers that older transformers saved.
const BUFFERS: [&str; 3] = [".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"];

/// Parts of names of image and sound towers, which stay out of the language model's file.
const OTHER_TOWERS: [&str; 7] =
    ["vision_", "visual.", "vision.", "audio_", "audio.", "multi_modal_projector.", "mm_projector."];

struct Planner<'a> {
    config: &'a Config,
    row: &'static Row,
    sizes: &'a Sizes,
    checkpoint: &'a Checkpoint,
    folder: PathBuf,
    /// Source tensors by their name in transformers' plain text model.
    names: HashMap<String, usize>,
    used: Vec<bool>,
    ty: OutputType,
    plan: Plan,
}

/// Finds and checks every tensor.
pub(super) fn make(
    config: &Config,
    row: &'static Row,
    sizes: &Sizes,
    checkpoint: &Checkpoint,
    folder: PathBuf,
    ty: OutputType,
    factors: Vec<RopeFactors>,
) -> Result<Plan, ConvertError> {
    let scales = Scales::collect(config, checkpoint)?;
    let mut planner = Planner {
        config,
        row,
        sizes,
        checkpoint,
        folder,
        names: HashMap::new(),
        used: vec![false; checkpoint.tensors().len()],
        ty,
        plan: Plan { outputs: Vec::new(), scales: HashMap::new() },
    };
    planner.index(&scales.consumed)?;
    planner.plan.scales = scales.by_tensor;
    for RopeFactors { tensor, values } in factors {
        let tensor = NewTensor { name: tensor.into(), shape: vec![values.len() as u64], ty: TensorType::F32 };
        planner.plan.outputs.push(Output { tensor, content: Content::Values(values) });
    }
    planner.ends()?;
    for layer in 0..sizes.layers {
        planner.layer(layer)?;
    }
    planner.refuse_unused()?;
    Ok(planner.plan)
}

/// The name that a tensor has in transformers' plain text model, or `None` for parts that stay out.
fn plain_name(name: &str, multimodal: bool) -> Option<String> {
    if BUFFERS.iter().any(|suffix| name.ends_with(suffix)) {
        return None;
    }
    if multimodal && OTHER_TOWERS.iter().any(|part| name.contains(part)) {
        return None;
    }
    let name = name.replace("language_model.", "");
    let bare = ["layers.", "embed_tokens.", "norm."].iter().any(|start| name.starts_with(start));
    Some(if bare { format!("model.{name}") } else { name })
}

impl Planner<'_> {
    fn index(&mut self, consumed: &[usize]) -> Result<(), ConvertError> {
        for &tensor in consumed {
            self.used[tensor] = true;
        }
        for (index, tensor) in self.checkpoint.tensors().iter().enumerate() {
            if self.used[index] {
                continue;
            }
            let Some(name) = plain_name(&tensor.name, self.config.multimodal) else {
                self.used[index] = true;
                continue;
            };
            if let Some(first) = self.names.insert(name, index) {
                let other = shown(self.checkpoint.tensors()[first].name.as_bytes());
                return Err(self.wrong(index, format!("stands for the same weights as {other}; remove one of them")));
            }
        }
        Ok(())
    }

    fn wrong(&self, tensor: usize, problem: String) -> ConvertError {
        ConvertError::Tensor {
            file: self.checkpoint.file_of(tensor).to_path_buf(),
            tensor: shown(self.checkpoint.tensors()[tensor].name.as_bytes()),
            problem,
        }
    }

    /// `hint` says what else may help.
    fn missing(&self, name: &str, shape: &[u64], hint: &str) -> ConvertError {
        ConvertError::Tensor {
            file: self.folder.clone(),
            tensor: shown(name.as_bytes()),
            problem: format!(
                "is missing; {} needs it with shape {}, download the weights again{hint}",
                self.config.architecture(),
                shape_text(shape)
            ),
        }
    }

    fn dim(&self, dim: Dim) -> u64 {
        let s = self.sizes;
        match dim {
            Dim::Width => s.width,
            Dim::Queries => s.heads * s.head,
            Dim::Keys => s.key_heads * s.head,
            Dim::Fused => (s.heads + 2 * s.key_heads) * s.head,
            Dim::Head => s.head,
            Dim::FeedForward => s.feed_forward,
            Dim::GateUp => 2 * s.feed_forward,
            Dim::Experts => s.experts,
            Dim::SharedWidth => s.shared_width,
            Dim::One => 1,
        }
    }

    fn dims(&self, shape: &[Dim]) -> Vec<u64> {
        shape.iter().map(|dim| self.dim(*dim)).collect()
    }

    /// A source tensor of this shape, if it is there.
    fn find(&mut self, name: &str, shape: &[u64]) -> Result<Option<usize>, ConvertError> {
        let Some(&index) = self.names.get(name) else { return Ok(None) };
        let tensor = &self.checkpoint.tensors()[index];
        if tensor.shape != shape {
            let (found, expected) = (tensor.shape_text(), shape_text(shape));
            return Err(self.wrong(
                index,
                format!("has shape {found}; config.json implies {expected}; take both files from one model"),
            ));
        }
        if tensor.dense().is_none() {
            let problem = format!(
                "has dtype {:?}; F32, F16, BF16 and F8_E4M3 can be converted, use an unquantized model",
                tensor.dtype
            );
            return Err(self.wrong(index, problem));
        }
        self.used[index] = true;
        Ok(Some(index))
    }

    fn require(&mut self, name: &str, shape: &[u64]) -> Result<usize, ConvertError> {
        self.find(name, shape)?.ok_or_else(|| self.missing(name, shape, ""))
    }

    /// Type of an output tensor, by the rules of the reference converter.
    fn storage(&self, name: &str, shape: &[u64]) -> TensorType {
        let vector = shape.len() <= 1 || name.ends_with("_norm.weight") || !name.ends_with(".weight");
        let router = name.ends_with(".ffn_gate_inp.weight") || name.ends_with(".ffn_gate_inp_shexp.weight");
        if vector || router {
            return TensorType::F32;
        }
        let ty = self.ty.tensor_type();
        let fits = ty.info().is_some_and(|info| shape[shape.len() - 1].is_multiple_of(info.block_len as u64));
        if fits { ty } else { TensorType::F16 }
    }

    /// Adds an output of `shape`, rows first.
    fn push(&mut self, name: String, shape: &[u64], parts: Vec<Part>, change: Change) {
        let ty = self.storage(&name, shape);
        let permuted_heads = match change {
            Change::PermuteQueries => Some(self.sizes.heads),
            Change::PermuteKeys => Some(self.sizes.key_heads),
            Change::Keep | Change::AddOne => None,
        };
        // The values of a bias move as the rows of its weight do.
        let row_len = if shape.len() == 1 && permuted_heads.is_some() { 1 } else { shape.last().copied().unwrap_or(1) };
        let tensor = NewTensor { name, shape: shape.iter().rev().copied().collect(), ty };
        let content = Content::Rows { parts, row_len, permuted_heads, add_one: change == Change::AddOne };
        self.plan.outputs.push(Output { tensor, content });
    }

    /// All rows of a tensor; for a permuted vector each value is a row.
    fn whole(&self, tensor: usize, change: Change) -> Vec<Part> {
        let SourceTensor { shape, .. } = &self.checkpoint.tensors()[tensor];
        let permuted = matches!(change, Change::PermuteQueries | Change::PermuteKeys);
        let rows = match (shape.as_slice(), permuted) {
            ([len], true) => *len,
            (shape, _) => shape.iter().rev().skip(1).product(),
        };
        vec![Part { tensor, rows: 0..rows }]
    }

    /// Embedding, last norm, output matrix.
    fn ends(&mut self) -> Result<(), ConvertError> {
        let (vocabulary, width) = (self.sizes.vocab, self.sizes.width);
        let spare = |planner: &Self, name: &str| {
            let found = planner.names.get(name).map(|index| planner.checkpoint.tensors()[*index].shape.as_slice());
            match found {
                Some([rows, _]) if planner.row.spare_rows && *rows > vocabulary => *rows,
                _ => vocabulary,
            }
        };
        let rows = spare(self, "model.embed_tokens.weight");
        let embedding = self.require("model.embed_tokens.weight", &[rows, width])?;
        let kept = vec![Part { tensor: embedding, rows: 0..vocabulary }];
        self.push(TOKEN_EMBD_WEIGHT.into(), &[vocabulary, width], kept, Change::Keep);

        let norm = self.require("model.norm.weight", &[width])?;
        let change = if self.row.shifted_norms { Change::AddOne } else { Change::Keep };
        let parts = self.whole(norm, change);
        self.push("output_norm.weight".into(), &[width], parts, change);

        let rows = spare(self, "lm_head.weight");
        let output = self.find("lm_head.weight", &[rows, width])?;
        match output {
            _ if self.row.arch.output == OutputMatrix::Tied => {}
            Some(output) => {
                let kept = vec![Part { tensor: output, rows: 0..vocabulary }];
                self.push(OUTPUT_WEIGHT.into(), &[vocabulary, width], kept, Change::Keep);
            }
            None if self.config.bool("tie_word_embeddings") => {}
            None if self.config.architecture().ends_with("Model") => {}
            None => {
                let hint = " (or set tie_word_embeddings in config.json if it shares the embedding)";
                return Err(self.missing("lm_head.weight", &[rows, width], hint));
            }
        }
        Ok(())
    }

    fn layer(&mut self, layer: u64) -> Result<(), ConvertError> {
        for role in self.row.roles() {
            let shape = self.dims(role.shape);
            let source = format!("model.layers.{layer}.{}", role.source);
            let target = format!("blk.{layer}.{}", role.target);
            let weight = self.require(&format!("{source}.weight"), &shape)?;
            let parts = self.whole(weight, role.change);
            self.push(format!("{target}.weight"), &shape, parts, role.change);
            if role.bias
                && let Some(bias) = self.find(&format!("{source}.bias"), &shape[..1])?
            {
                let parts = self.whole(bias, role.change);
                self.push(format!("{target}.bias"), &shape[..1], parts, role.change);
            }
        }
        self.experts(layer)
    }

    fn experts(&mut self, layer: u64) -> Result<(), ConvertError> {
        let Some(names) = self.row.experts else { return Ok(()) };
        let (count, inner, width) = (self.sizes.experts, self.sizes.expert_width, self.sizes.width);
        let targets = ["gate", "up", "down"].map(|part| format!("blk.{layer}.ffn_{part}_exps.weight"));
        let shapes = [[count, inner, width], [count, inner, width], [count, width, inner]];
        let mut parts = [Vec::new(), Vec::new(), Vec::new()];

        let [fused, down] = names.stacked.map(|name| format!("model.layers.{layer}.{name}"));
        let spelled = |planner: &Self, name: String| {
            let weight = format!("{name}.weight");
            if planner.names.contains_key(&weight) { weight } else { name }
        };
        let (fused, down) = (spelled(self, fused), spelled(self, down));
        if self.names.contains_key(&fused) {
            let fused = self.require(&fused, &[count, 2 * inner, width])?;
            let down = self.require(&down, &[count, width, inner])?;
            for expert in 0..count {
                let first = expert * 2 * inner;
                parts[0].push(Part { tensor: fused, rows: first..first + inner });
                parts[1].push(Part { tensor: fused, rows: first + inner..first + 2 * inner });
            }
            parts[2] = self.whole(down, Change::Keep);
        } else {
            for expert in 0..count {
                for (slot, name) in names.gate_up_down.iter().enumerate() {
                    let source = format!("model.layers.{layer}.{}{expert}.{name}.weight", names.prefix);
                    let tensor = self.require(&source, &shapes[slot][1..])?;
                    parts[slot].extend(self.whole(tensor, Change::Keep));
                }
            }
        }
        for ((target, shape), parts) in targets.into_iter().zip(shapes).zip(parts) {
            self.push(target, &shape, parts, Change::Keep);
        }
        Ok(())
    }

    fn refuse_unused(&self) -> Result<(), ConvertError> {
        match self.used.iter().position(|used| !used) {
            None => Ok(()),
            Some(extra) => {
                let problem = format!(
                    "is not part of {} with {} layers; the weights do not belong to config.json",
                    self.config.architecture(),
                    self.sizes.layers
                );
                Err(self.wrong(extra, problem))
            }
        }
    }
}

/// The 16-bit type of the source: that of its first matrix that has one, else F16.
pub(super) fn source_type(checkpoint: &Checkpoint) -> OutputType {
    let first =
        checkpoint.tensors().iter().filter(|tensor| tensor.shape.len() >= 2).find_map(|tensor| match tensor.dense() {
            Some(Dense::BF16) => Some(OutputType::Bf16),
            Some(Dense::F16) => Some(OutputType::F16),
            _ => None,
        });
    first.unwrap_or(OutputType::F16)
}
