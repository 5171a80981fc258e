//! Layer-wise quantization of language models: find the tensors that matter, give them more bits, give the others fewer,
//! and prove with perplexity and KL divergence that the result is better than the usual file of the same size.
//!
//! Every verb is a request. It takes what it works on, [`progress::Watch`] follows it, `()` is one that listens to nothing:
//!
//! ```
//! use lwq::atomic_file::Replace;
//! use lwq::gguf::Gguf;
//! use lwq::imatrix::{Collection, Named};
//! use lwq::plan::{self, DamageMethod};
//! use lwq::quantize;
//! use lwq::recipe::Target;
//! use lwq::text::{Set, Text};
//!
//! let model = Gguf::open("tests/data/doclet-4m-f16.gguf")?;
//!
//! // Which columns of the weights matter, on calibration text.
//! let imatrix = Collection::new(&model, &Text::built_in(Set::Calibration)).chunks(2).run(&())?;
//! let imatrix = Named { name: "imatrix", imatrix: &imatrix };
//!
//! // A type for every tensor in the bytes of the usual file.
//! let plan = plan::Request::like(Target::Q4_K_M).method(DamageMethod::Error).imatrix(imatrix).make(&model, &())?;
//!
//! // The file.
//! let choices = plan.choices_for(&model, Some(imatrix.imatrix))?;
//! let draft = quantize::Request::choices(choices).imatrix(imatrix).decide(&model)?;
//! let folder = tempfile::tempdir()?;
//! draft.write(&folder.path().join("planned.gguf"), Replace::No, &())?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! | To | begin at |
//! |---|---|
//! | read and write GGUF files | [`gguf::Gguf`], [`gguf::GgufWriter`] |
//! | split, merge, digest, compare, edit and extract files | [`files`] |
//! | find a model in the Hugging Face cache | [`hub::find_model`] |
//! | make a GGUF of a Hugging Face folder | [`convert::Conversion`] |
//! | make a folder for vLLM and transformers | [`export::Request`] |
//! | collect an importance matrix | [`imatrix::Collection`] |
//! | quantize | [`quantize::Request`] |
//! | measure what rounding costs | [`measure::Request`] |
//! | plan types for a size | [`plan::Request`] |
//! | score models | [`eval::PerplexityRequest`], [`eval::DivergenceRequest`], [`eval::TaskRequest`] |
//! | compare quantized files with their base | [`report::ComparisonRequest`] |
//! | make a repository with its card | [`publish::Request`] |
//! | run a model | [`model::Model`] |
//! | encode and decode blocks | [`quant::quantize_rows`], [`quant::dequantize`] |
//!
//! Data flows one way: [`gguf`] reader, [`tokenizer`] and [`model`], [`imatrix`], [`recipe`] or [`plan`], [`rounding`] and
//! [`quant`] kernels, [`quantize`] writer, [`eval`] and [`report`]. `ARCHITECTURE.md` says who may call whom.

pub mod atomic_file;
pub mod bench;
pub mod capabilities;
pub mod compute;
pub mod convert;
pub mod cpu;
pub mod display;
pub mod eval;
pub mod export;
pub mod files;
pub mod gguf;
pub mod hub;
pub mod imatrix;
pub mod interrupt;
pub mod measure;
pub mod model;
pub mod moments;
pub mod os;
pub mod plan;
pub mod progress;
pub mod publish;
pub mod quant;
pub mod quantize;
pub mod recipe;
pub mod report;
pub mod rounding;
pub mod rows;
#[cfg(test)]
mod testing;
pub mod text;
pub mod tokenizer;
pub mod unfinished;
mod vectorized;
mod workers;
