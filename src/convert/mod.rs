//! A Hugging Face model folder to GGUF, without Python.
//!
//! [`Conversion::open`] reads configuration, tokenizer and safetensors headers and checks that they belong together:
//! every tensor that the architecture needs is there with the shape that the configuration implies, and no other.
//! [`Conversion::write`] streams the weights. Names, types, bytes and the metadata that influence a run are those of
//! llama.cpp's `convert_hf_to_gguf.py` at release b10605.

mod architectures;
mod checkpoint;
mod config;
mod description;
mod differences;
mod error;
mod files;
#[doc(hidden)]
pub mod fuzzing;
mod hparams;
pub(crate) mod places;
mod plan;
mod rows;
mod sizes;
pub(crate) mod source;
mod vocabulary;
mod weights;
mod write;

use std::fs::File;
use std::path::Path;

use architectures::{ROWS, Row};
use checkpoint::Checkpoint;
use config::Config;
use files::Folder;
use hparams::Source;
use plan::{Inputs, Plan};
use sizes::Sizes;

pub(crate) use description::front_matter;
pub use error::ConvertError;

use crate::gguf::{GgufLayout, Metadata, NewTensor, TensorType, shown};
use crate::progress::Watch;

/// Type of the weight matrices. Vectors, norms and routers are always F32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputType {
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// 8-bit blocks; matrices whose rows do not fit blocks of 32 become F16, of a BF16 source BF16.
    Q8_0,
}

impl OutputType {
    /// The storage type.
    pub fn tensor_type(self) -> TensorType {
        match self {
            OutputType::F32 => TensorType::F32,
            OutputType::F16 => TensorType::F16,
            OutputType::Bf16 => TensorType::BF16,
            OutputType::Q8_0 => TensorType::Q8_0,
        }
    }

    /// `general.file_type` (`llama_ftype`).
    fn file_type(self) -> u32 {
        match self {
            OutputType::F32 => 0,
            OutputType::F16 => 1,
            OutputType::Q8_0 => 7,
            OutputType::Bf16 => 32,
        }
    }
}

/// `general.file_type` of files whose matrices kept the codes of the source.
fn kept_file_type(ty: TensorType) -> u32 {
    match ty {
        TensorType::Q4_0 => 2,
        TensorType::Q4_1 => 3,
        TensorType::Q8_0 => 7,
        TensorType::MXFP4 => 38,
        _ => 39,
    }
}

/// Class names in `config.json` that are converted to the architecture `name`.
pub(crate) fn classes(name: &str) -> Vec<&'static str> {
    ROWS.iter().filter(|row| row.arch.name == name).flat_map(|row| row.classes).copied().collect()
}

/// What a user may choose.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Type of the matrices; `None` keeps the source's 16-bit type, and MXFP4 and NVFP4 codes where ggml's blocks can hold
    /// them.
    pub ty: Option<OutputType>,
    /// With `ty` none, 4- and 8-bit integers stay as they are, too, where blocks of Q4_0, Q4_1 or Q8_0 can hold them.
    pub keep_integers: bool,
    /// Pre-tokenizer, instead of recognizing it.
    pub pre: Option<String>,
    /// SentencePiece vocabularies without tokenizer.model get scores from the order of the merges.
    pub rank_scores: bool,
    /// `general.name`, instead of deriving it from the folder.
    pub name: Option<String>,
    /// Blocks that predict further tokens are left out.
    pub drop_mtp: bool,
}

/// A folder that was read and checked, ready to be written.
pub struct Conversion {
    architecture: &'static str,
    class: String,
    ty: OutputType,
    metadata: Metadata,
    plan: Plan,
    checkpoint: Checkpoint,
    warnings: Vec<String>,
}

impl Conversion {
    /// Reads everything but the weights.
    ///
    /// # Errors
    /// Anything that is missing, damaged, contradictory or unknown, see [`ConvertError`].
    pub fn open(path: &Path, options: &Options) -> Result<Conversion, ConvertError> {
        let folder = Folder::open(path)?;
        let mut config = Config::read(&folder)?;
        let row = Row::by_class(config.architecture()).ok_or_else(|| {
            let known: Vec<&str> = ROWS.iter().flat_map(|row| row.classes).copied().collect();
            ConvertError::Architecture {
                file: config.file(),
                found: shown(config.architecture().as_bytes()),
                known: known.join(", "),
            }
        })?;
        config.apply_defaults(&(row.defaults)());
        config.apply_aliases(row.aliases);
        if row.derives_head_dim {
            config.derive_head_dim()?;
        }
        let mut sizes = Sizes::read(&config, row)?;
        let mut warnings = Vec::new();
        let checkpoint = Checkpoint::open(&folder, &mut warnings)?;
        plan::choose_nextn(&config, row, &mut sizes, &checkpoint, options.drop_mtp, &mut warnings)?;
        let ty = options.ty.unwrap_or_else(|| plan::source_type(&checkpoint));

        let mut metadata = Metadata::new(folder.path().display().to_string());
        metadata.set("general.architecture", row.arch.name);
        metadata.set("general.type", "model");
        description::write_sampling(&folder, &mut metadata)?;
        let mut keys = Metadata::new(folder.path().display().to_string());
        let source = Source { arch: row.arch, row, config: &config, sizes: &sizes, rope: config.rope()? };
        let factors = hparams::write(&source, ty.file_type(), &mut keys, &mut warnings)?;
        differences::note(&config, row, &sizes, &mut warnings);
        let inputs =
            Inputs { config: &config, row, sizes: &sizes, folder: &folder, checkpoint: &checkpoint, options, ty };
        let plan = plan::make(inputs, factors, &mut warnings)?;
        description::write(&folder, options.name.as_deref(), &plan, &mut metadata)?;
        for (key, value) in keys.iter() {
            metadata.set(key, value.clone());
        }
        if let Some(kept) = plan.kept_blocks() {
            metadata.set("general.file_type", kept_file_type(kept));
        }
        metadata.set("general.quantization_version", 2u32);
        vocabulary::write(&folder, row, sizes.vocab, options, &mut metadata, &mut warnings)?;
        let class = config.architecture().to_owned();
        Ok(Conversion { architecture: row.arch.name, class, ty, metadata, plan, checkpoint, warnings })
    }

    /// `general.architecture`.
    pub fn architecture(&self) -> &'static str {
        self.architecture
    }

    /// The class that `config.json` names.
    pub fn class(&self) -> &str {
        &self.class
    }

    /// The type that most of the file has: that of codes which were kept, or that of the other matrices.
    pub fn main_type(&self) -> TensorType {
        self.plan.kept_blocks().unwrap_or(self.ty.tensor_type())
    }

    /// All metadata of the GGUF.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// All tensors of the GGUF, in file order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &NewTensor> {
        self.plan.outputs.iter().map(|output| &output.tensor)
    }

    /// What a user should know though it does not stop the conversion, one line each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// True if `path` is one of the files that the weights come from.
    pub fn reads(&self, path: &Path) -> bool {
        self.checkpoint.reads(path)
    }

    /// Lays out the GGUF; `file` is its name for messages.
    ///
    /// # Errors
    /// If a name or the metadata cannot be stored.
    pub fn layout(&self, file: &str) -> Result<GgufLayout, ConvertError> {
        Ok(GgufLayout::new(file, &self.metadata, self.tensors().cloned())?)
    }

    /// Writes header and data with all threads of rayon's pool. A run that `watch` stops leaves an incomplete file: give
    /// that of an [`AtomicFile`](crate::atomic_file::AtomicFile).
    ///
    /// # Errors
    /// If the source cannot be read, holds NaN or infinity, or values too large for the type, or the output refuses, or
    /// `watch` stops the run.
    pub fn write(&self, layout: &GgufLayout, output: &File, watch: &dyn Watch) -> Result<(), ConvertError> {
        layout.write_header_at(output)?;
        write::run(&self.plan, &self.checkpoint, layout, output, rayon::current_num_threads(), watch)
    }
}

impl std::fmt::Debug for Conversion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Conversion({} to {}, {} tensors)", self.class, self.architecture, self.plan.outputs.len())
    }
}
