//! `lwq convert`: a Hugging Face model folder in, a GGUF out.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::{Map, Value as Json};

use super::args::RevisionArg;
use super::{Common, count, decimal_size, printable};
use lwq::atomic_file::AtomicFile;
use lwq::convert::{Conversion, Options, OutputType};
use lwq::gguf::{GgufLayout, TensorType, Value};
use lwq::hub::repository_of;

/// Convert a Hugging Face model folder to a 16-bit GGUF
///
/// Reads config.json, safetensors files and tokenizer files as transformers saves them. Tensors and metadata are those
/// of llama.cpp's convert_hf_to_gguf.py.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  lwq convert path/to/model -o model-f16.gguf --type f16\n  lwq convert path/to/model --dry-run --json\n  lwq convert org/name    # a model that `hf download org/name` brought"
)]
pub struct ConvertArgs {
    /// Folder with config.json, *.safetensors and the tokenizer, or ORG/NAME of a model in the Hugging Face cache
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
    #[command(flatten)]
    revision: RevisionArg,
    /// File to write [default: the folder's name with the type, beside it; of a model in the cache in the current folder]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Type of the matrices; auto keeps the source's 16-bit type, and MXFP4 and NVFP4 codes as they are; source keeps
    /// 4- and 8-bit integers as well where Q4_0, Q4_1 or Q8_0 hold them exactly
    #[arg(long = "type", value_name = "TYPE", value_enum, default_value_t = TypeChoice::Auto, ignore_case = true)]
    ty: TypeChoice,
    /// Name of the pre-tokenizer, instead of recognizing it from tokenizer.json
    #[arg(long, value_name = "NAME", value_parser = parse_pre)]
    pre: Option<String>,
    /// Take scores of a SentencePiece vocabulary without tokenizer.model from the order of its merges
    #[arg(long)]
    rank_scores: bool,
    /// Leave out the blocks that predict further tokens (MTP, NextN), which speculative decoding uses
    #[arg(long)]
    drop_mtp: bool,
    /// Model name to write [default: from the model card or the folder]
    #[arg(long, value_name = "TEXT")]
    name: Option<String>,
    /// Show what would be written, without writing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum TypeChoice {
    Auto,
    Source,
    F16,
    Bf16,
    F32,
    #[value(name = "q8_0")]
    Q8_0,
}

fn parse_pre(text: &str) -> Result<String, String> {
    if lwq::tokenizer::pretokenize::known_names().any(|name| name == text) {
        return Ok(text.to_owned());
    }
    let known: Vec<&str> = lwq::tokenizer::pretokenize::known_names().collect();
    Err(format!("not a known pre-tokenizer; known: {}", known.join(" ")))
}

#[derive(Serialize)]
struct ConvertReport<'a> {
    source: String,
    output: String,
    written: bool,
    class: &'a str,
    architecture: &'a str,
    #[serde(rename = "type")]
    ty: String,
    parameters: u64,
    tensors: Vec<TensorReport<'a>>,
    metadata: Map<String, Json>,
    size_bytes: u64,
    tensor_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peak_memory_bytes: Option<u64>,
    warnings: &'a [String],
}

#[derive(Serialize)]
struct TensorReport<'a> {
    name: &'a str,
    #[serde(rename = "type")]
    ty: String,
    shape: &'a [u64],
    bytes: u64,
}

impl ConvertArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// Anything wrong with the folder or the output; no output file is left then.
    pub fn run(&self, common: &Common) -> anyhow::Result<()> {
        let started = Instant::now();
        let options = Options {
            ty: match self.ty {
                TypeChoice::Auto | TypeChoice::Source => None,
                TypeChoice::F16 => Some(OutputType::F16),
                TypeChoice::Bf16 => Some(OutputType::Bf16),
                TypeChoice::F32 => Some(OutputType::F32),
                TypeChoice::Q8_0 => Some(OutputType::Q8_0),
            },
            keep_integers: self.ty == TypeChoice::Source,
            pre: self.pre.clone(),
            rank_scores: self.rank_scores,
            name: self.name.clone(),
            drop_mtp: self.drop_mtp,
        };
        let folder = self.revision.find(&self.folder, common)?;
        let conversion = Conversion::open(&folder, &options)?;
        let output = match &self.output {
            Some(output) => output.clone(),
            None => default_output(&folder, conversion.main_type()),
        };
        super::output_name::check_converted(common, &output, conversion.main_type());
        let layout = conversion.layout(&output.display().to_string())?;
        for warning in conversion.warnings() {
            common.warn(warning);
        }
        if !self.dry_run {
            if conversion.reads(&output) {
                anyhow::bail!("{}: is one of the files to convert; choose another output", output.display());
            }
            let file = AtomicFile::create(&output, common.force)?;
            file.reserve(layout.file_bytes())?;
            conversion.write(&layout, file.file(), &common.watch())?;
            file.commit()?;
        }
        self.report(common, (&folder, &conversion), &layout, &output, started.elapsed())
    }

    fn report(
        &self,
        common: &Common,
        (folder, conversion): (&Path, &Conversion),
        layout: &GgufLayout,
        output: &Path,
        elapsed: Duration,
    ) -> anyhow::Result<()> {
        let tensors = layout.tensors();
        let parameters: u64 = tensors.iter().map(|placed| placed.tensor.shape.iter().product::<u64>()).sum();
        let pre = conversion.metadata().str("tokenizer.ggml.pre")?.unwrap_or_default();
        if common.json {
            return common.result_json(&ConvertReport {
                source: folder.display().to_string(),
                output: output.display().to_string(),
                written: !self.dry_run,
                class: conversion.class(),
                architecture: conversion.architecture(),
                ty: conversion.main_type().to_string(),
                parameters,
                tensors: tensors
                    .iter()
                    .map(|placed| TensorReport {
                        name: &placed.tensor.name,
                        ty: placed.tensor.ty.to_string(),
                        shape: &placed.tensor.shape,
                        bytes: placed.bytes,
                    })
                    .collect(),
                metadata: conversion.metadata().iter().map(|(key, value)| (key.to_owned(), shown(value))).collect(),
                size_bytes: layout.file_bytes(),
                tensor_bytes: layout.data_bytes(),
                seconds: (!self.dry_run).then_some(elapsed.as_secs_f64()),
                peak_memory_bytes: lwq::os::peak_memory(),
                warnings: conversion.warnings(),
            });
        }
        if common.quiet && !self.dry_run {
            return Ok(());
        }
        let mut text = String::new();
        let verb = if self.dry_run { "would write" } else { "wrote" };
        let _ = writeln!(
            text,
            "{verb} {}: {}",
            printable(&output.display().to_string()),
            decimal_size(layout.file_bytes())
        );
        let _ = writeln!(
            text,
            "{} as {}, {} parameters in {} tensors of type {}, pre-tokenizer {pre}",
            conversion.class(),
            conversion.architecture(),
            count(parameters),
            tensors.len(),
            conversion.main_type(),
        );
        if self.dry_run {
            for placed in tensors {
                let shape: Vec<String> = placed.tensor.shape.iter().map(u64::to_string).collect();
                let _ = writeln!(text, "{:40} {:5} {}", placed.tensor.name, placed.tensor.ty, shape.join(" x "));
            }
        } else {
            let seconds = elapsed.as_secs_f64();
            let speed = layout.file_bytes() as f64 / 1e6 / seconds.max(1e-9);
            let _ = writeln!(text, "{seconds:.1} s, {speed:.0} MB/s");
        }
        common.result(text)
    }
}

/// `folder-f16.gguf` beside the folder; of a snapshot in the hub's cache, where no other files belong, `name-f16.gguf` here.
fn default_output(folder: &Path, ty: TensorType) -> PathBuf {
    let path = std::fs::canonicalize(folder).unwrap_or_else(|_| folder.to_path_buf());
    if let Some(repository) = repository_of(&path) {
        let name = repository.rsplit('/').next().unwrap_or(&repository);
        return PathBuf::from(format!("{name}-{ty}.gguf"));
    }
    let name = path.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned());
    path.with_file_name(format!("{name}-{ty}.gguf"))
}

/// A metadata value for the report; long arrays are shown by their length.
fn shown(value: &Value) -> Json {
    const LONGEST: u64 = 16;
    match value {
        Value::Bool(value) => Json::from(*value),
        Value::F32(value) => Json::from(f64::from(*value)),
        Value::F64(value) => Json::from(*value),
        Value::String(text) => Json::from(String::from_utf8_lossy(text)),
        Value::Array(array) if array.len() <= LONGEST => array.iter().map(|value| shown(&value)).collect(),
        Value::Array(array) => Json::from(format!("{} of {}", array.len(), array.elem_type())),
        other => other.as_integer().and_then(|number| i64::try_from(number).ok()).map_or(Json::Null, Json::from),
    }
}
