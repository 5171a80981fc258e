//! Which source tensors make which output tensors.

mod head;
mod tensors;
mod unknown;

use std::collections::HashMap;

use safetensors::tensor::Dtype;

use super::architectures::{Dim, Row};
use super::checkpoint::{Checkpoint, Dense, shape_text};
use super::config::Config;
use super::files::Folder;
use super::hparams::RopeFactors;
use super::sizes::{Block, Layout, Sizes};
use super::weights::{self, Coding, Weight};
use super::{ConvertError, Options, OutputType};
use crate::gguf::{NewTensor, TensorType, shown};

/// Rows of a weight, counted over all its matrices.
#[derive(Debug, Clone)]
pub(super) struct Part {
    /// Index into [`Plan::weights`].
    pub weight: usize,
    pub first: u64,
    pub count: u64,
    /// From one row to the next.
    pub step: u64,
    /// The matrix of which rows are columns.
    pub transposed: Option<u64>,
}

impl Part {
    fn rows(weight: usize, first: u64, count: u64) -> Part {
        Part { weight, first, count, step: 1, transposed: None }
    }
}

/// What becomes of values on their way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ValueChange {
    /// They are encoded.
    Keep,
    /// One is added, in the precision of the source.
    AddOne,
    /// Minus the exponential.
    MinusExp,
    /// Their codes move into the blocks of the output's type as they are.
    Blocks,
}

/// Heads in groups, side by side in a row, which move so that those of all groups take turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Turns {
    pub groups: usize,
    /// Heads of a group.
    pub each: usize,
}

impl Turns {
    /// Writes the columns of a row in their new order; each head is as many items as its share of the row.
    pub(super) fn arrange<T: Copy>(self, row: &[T], moved: &mut [T]) {
        let head = row.len() / (self.groups * self.each).max(1);
        let order = (0..self.each).flat_map(|inner| (0..self.groups).map(move |group| group * self.each + inner));
        for (from, to) in order.zip(moved.chunks_exact_mut(head.max(1))) {
            to.copy_from_slice(&row[from * head..][..head]);
        }
    }
}

/// What an output tensor holds.
#[derive(Debug)]
pub(super) enum Content {
    /// Rows of source tensors, one after the other.
    Rows {
        parts: Vec<Part>,
        /// Values of a row, 1 for a vector whose values move like rows.
        row_len: u64,
        /// Rows of a head, inside which they are permuted.
        permuted_rows: Option<u64>,
        /// Columns that move.
        turns: Option<Turns>,
        change: ValueChange,
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
    pub weights: Vec<Weight>,
}

impl Plan {
    /// The type of blocks that codes moved to, where any did: the first of the file.
    pub(super) fn kept_blocks(&self) -> Option<TensorType> {
        let kept = |output: &Output| match output.content {
            Content::Rows { change: ValueChange::Blocks, .. } => Some(output.tensor.ty),
            _ => None,
        };
        self.outputs.iter().find_map(kept)
    }
}

/// Suffixes of tensors that no program needs: buffers that older transformers saved.
const BUFFERS: [&str; 3] = [".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"];

/// Parts of names of image and sound towers, which stay out of the language model's file.
pub(super) const OTHER_TOWERS: [&str; 15] = [
    "vision_",
    "visual.",
    "vision.",
    "audio_",
    "audio.",
    "projector.",
    "talker.",
    "token2wav.",
    "code2wav.",
    "image_newline",
    "view_seperator",
    "patch_embed",
    "patch_merge",
    "model.connector.",
    "speech_embeddings.",
];

struct Planner<'a> {
    config: &'a Config,
    row: &'static Row,
    sizes: &'a Sizes,
    checkpoint: &'a Checkpoint,
    folder: &'a Folder,
    /// Weights by their name in transformers' plain text model.
    names: HashMap<String, usize>,
    used: Vec<bool>,
    ty: OutputType,
    options: &'a Options,
    /// Type of the blocks that hold a weight's codes as they are; asked once for each weight.
    block_types: HashMap<usize, Option<TensorType>>,
    warnings: &'a mut Vec<String>,
    plan: Plan,
}

/// What a plan is made from.
pub(super) struct Inputs<'a> {
    pub config: &'a Config,
    pub row: &'static Row,
    pub sizes: &'a Sizes,
    pub folder: &'a Folder,
    pub checkpoint: &'a Checkpoint,
    pub options: &'a Options,
    pub ty: OutputType,
}

/// Finds and checks every tensor.
pub(super) fn make(
    inputs: Inputs<'_>,
    factors: Vec<RopeFactors>,
    warnings: &mut Vec<String>,
) -> Result<Plan, ConvertError> {
    let Inputs { config, row, sizes, folder, checkpoint, options, ty } = inputs;
    let weights = weights::collect(config, folder, checkpoint, warnings)?;
    let mut planner = Planner {
        config,
        row,
        sizes,
        checkpoint,
        folder,
        names: HashMap::new(),
        used: vec![false; weights.len()],
        ty,
        options,
        block_types: HashMap::new(),
        warnings,
        plan: Plan { outputs: Vec::new(), weights },
    };
    planner.index()?;
    for RopeFactors { tensor, values } in factors {
        let tensor = NewTensor { name: tensor.into(), shape: vec![values.len() as u64], ty: TensorType::F32 };
        planner.plan.outputs.push(Output { tensor, content: Content::Values(values) });
    }
    let mut made = planner.ends();
    for (number, block) in (0..).zip(&sizes.blocks) {
        made = made.and_then(|()| planner.layer(number, *block));
    }
    planner.refuse_unknown(made)?;
    Ok(planner.plan)
}

/// Decides whether the blocks that predict further tokens are written: not if that is not wanted, or if the folder holds
/// none of their tensors.
pub(super) fn choose_nextn(
    config: &Config,
    row: &Row,
    sizes: &mut Sizes,
    checkpoint: &Checkpoint,
    drop: bool,
    warnings: &mut Vec<String>,
) -> Result<(), ConvertError> {
    let names = checkpoint.tensors().iter().map(|tensor| (row.names)(tensor.name.clone(), sizes.layers));
    let last = names.filter_map(|name| sizes.nextn_block(&name)).max();
    let counted = row.layout.iter().any(|step| matches!(step, Layout::NextNOrStored(_)));
    if sizes.nextn() == 0
        && counted
        && let Some(last) = last
    {
        sizes.add_nextn(config, "number of blocks under mtp", last - sizes.layers + 1)?;
    }
    sizes.set_nextn_experts(row, checkpoint);
    if drop {
        sizes.drop_nextn();
    } else if sizes.nextn() > 0 && last.is_none() {
        warnings.push(
            "the folder holds no tensors of the blocks that predict further tokens, which config.json mentions; the file \
             will have none either"
                .to_owned(),
        );
        sizes.drop_nextn();
    }
    Ok(())
}

impl Planner<'_> {
    fn index(&mut self) -> Result<(), ConvertError> {
        let (mut towers, mut further) = (Vec::<usize>::new(), 0);
        for index in 0..self.plan.weights.len() {
            let name = &self.plan.weights[index].name;
            let tower = self.config.multimodal && OTHER_TOWERS.iter().any(|part| name.contains(part));
            let plain = (self.row.names)(name.clone(), self.sizes.layers);
            let left_out = self.is_left_out(name, &plain);
            if tower || left_out || BUFFERS.iter().any(|suffix| name.ends_with(suffix)) {
                if tower {
                    towers.push(index);
                }
                further += u64::from(left_out);
                self.used[index] = true;
                continue;
            }
            if let Some(first) = self.names.insert(plain, index) {
                let other = shown(self.plan.weights[first].name.as_bytes());
                return Err(self.wrong(index, format!("stands for the same weights as {other}; remove one of them")));
            }
        }
        if further > 0 && !self.options.drop_mtp {
            self.warnings.push(format!(
                "{further} tensors of blocks that predict further tokens are left out: llama.cpp has no place for them"
            ));
        }
        if let Some(first) = towers.first() {
            let first = shown(self.plan.weights[*first].name.as_bytes());
            let what = match towers.len() {
                1 => format!("{first}, a tensor of the image or sound part, is left out"),
                count => format!("{count} tensors of the image or sound part, such as {first}, are left out"),
            };
            self.warnings.push(format!(
                "{what}: the file holds the text part only; llama.cpp's convert_hf_to_gguf.py --mmproj makes that of the \
                 other part"
            ));
        }
        Ok(())
    }

    /// Tensors of blocks that predict further tokens and are not written.
    fn is_left_out(&self, name: &str, plain: &str) -> bool {
        let dropped = || {
            let block = self.sizes.nextn_block(plain);
            block.is_some_and(|block| block < self.sizes.layers + self.sizes.dropped) || plain.starts_with("mtp.")
        };
        self.row.left_out.iter().any(|start| name.starts_with(start)) || (self.sizes.dropped > 0 && dropped())
    }

    fn wrong(&self, weight: usize, problem: String) -> ConvertError {
        let weight = &self.plan.weights[weight];
        ConvertError::Tensor {
            file: self.checkpoint.file_of(weight.tensor).to_path_buf(),
            tensor: shown(weight.name.as_bytes()),
            problem,
        }
    }

    fn missing(&self, name: &str, shape: &[u64]) -> ConvertError {
        ConvertError::Missing {
            file: self.folder.path().to_path_buf(),
            tensor: shown(name.as_bytes()),
            class: self.config.architecture().to_owned(),
            shape: shape_text(shape),
        }
    }

    fn dim(&self, dim: Dim, block: &Block) -> u64 {
        let (s, b, l) = (self.sizes, block, &self.sizes.linear);
        match dim {
            Dim::Width => s.width,
            Dim::DoubleWidth => 2 * s.width,
            Dim::Vocabulary => s.vocab,
            Dim::Heads => b.heads,
            Dim::Queries => b.heads * b.head,
            Dim::DoubleQueries => 2 * b.heads * b.head,
            Dim::Keys => b.key_heads * b.head,
            Dim::Values => b.key_heads * b.value_head,
            Dim::Outputs => b.heads * b.value_head,
            Dim::Fused => (b.heads + b.key_heads) * b.head + b.key_heads * b.value_head,
            Dim::Head => b.head,
            Dim::FeedForward => b.feed_forward,
            Dim::GateUp => 2 * b.feed_forward,
            Dim::Experts => s.experts,
            Dim::SharedWidth => s.shared_width,
            Dim::LinearKeys => l.key_heads * l.key_head,
            Dim::LinearValues => l.value_heads * l.value_head,
            Dim::LinearFused => 2 * l.key_heads * l.key_head + l.value_heads * l.value_head,
            Dim::LinearHeads => l.value_heads,
            Dim::DoubleLinearHeads => 2 * l.value_heads,
            Dim::LinearHead => l.value_head,
            Dim::Kernel => l.kernel,
            Dim::PerLayer => s.per_layer,
            Dim::AllPerLayer => s.per_layer * s.layers,
            Dim::PerLayerVocabulary => s.per_layer_vocab,
            Dim::One => 1,
        }
    }

    fn dims(&self, shape: &[Dim], block: &Block) -> Vec<u64> {
        shape.iter().map(|dim| self.dim(*dim, block)).collect()
    }

    /// A weight of this shape, if it is there.
    fn find(&mut self, name: &str, shape: &[u64]) -> Result<Option<usize>, ConvertError> {
        let Some(&index) = self.names.get(name) else { return Ok(None) };
        let weight = &self.plan.weights[index];
        if let Coding::Other(dtype @ (Dtype::U8 | Dtype::I8)) = &weight.coding {
            let scale = shown(format!("{}_scale", weight.name).as_bytes());
            let problem = format!("holds codes of dtype {dtype:?}, but {scale} is missing; download the weights again");
            return Err(self.wrong(index, problem));
        }
        if weight.shape != shape {
            let (found, expected) = (weight.shape_text(), shape_text(shape));
            return Err(self.wrong(
                index,
                format!("has shape {found}; config.json implies {expected}; take both files from one model"),
            ));
        }
        if let Coding::Other(dtype) = &weight.coding {
            let problem = format!(
                "has dtype {dtype:?}; F32, F16, BF16, FP8 and 4-bit codes with their scales can be converted, use an \
                 unquantized model"
            );
            return Err(self.wrong(index, problem));
        }
        self.used[index] = true;
        Ok(Some(index))
    }

    fn require(&mut self, name: &str, shape: &[u64]) -> Result<usize, ConvertError> {
        self.find(name, shape)?.ok_or_else(|| self.missing(name, shape))
    }

    /// Type of an output tensor, by the rules of the reference converter.
    fn storage(&self, name: &str, shape: &[u64]) -> TensorType {
        if always_f32(name, shape) {
            return TensorType::F32;
        }
        let ty = self.ty.tensor_type();
        let fits = ty.info().is_some_and(|info| shape[shape.len() - 1].is_multiple_of(info.block_len as u64));
        if fits { ty } else { self.fallback() }
    }

    /// The type of matrices whose rows fit no blocks: 16 bits, with the exponents of the source.
    fn fallback(&self) -> TensorType {
        match source_type(self.checkpoint) {
            OutputType::Bf16 => TensorType::BF16,
            _ => TensorType::F16,
        }
    }

    /// The type of the blocks that can take the codes of all parts as they are, if that is asked for.
    fn kept_blocks(&mut self, name: &str, shape: &[u64], parts: &[Part]) -> Result<Option<TensorType>, ConvertError> {
        if self.options.ty.is_some() || always_f32(name, shape) {
            return Ok(None);
        }
        let mut common = None;
        for part in parts {
            let weight = &self.plan.weights[part.weight];
            let Some(coded) = weight.coded() else { return Ok(None) };
            let ty = match self.block_types.get(&part.weight) {
                Some(known) => *known,
                None => {
                    let columns = weight.shape.last().copied().unwrap_or(0);
                    let ty = coded.block_type(self.checkpoint, columns, self.options.keep_integers)?;
                    self.block_types.insert(part.weight, ty);
                    ty
                }
            };
            if ty.is_none() || common.is_some_and(|common| common != ty) {
                return Ok(None);
            }
            common = Some(ty);
        }
        Ok(common.flatten())
    }
}

/// Vectors, norms, routers and convolutions.
fn always_f32(name: &str, shape: &[u64]) -> bool {
    let vector = shape.len() <= 1 || name.ends_with("_norm.weight") || !name.ends_with(".weight");
    let narrow = [".ffn_gate_inp.weight", ".ffn_gate_inp_shexp.weight", ".ssm_conv1d.weight"];
    vector || narrow.iter().any(|suffix| name.ends_with(suffix))
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
