//! Layer-wise quantization of language models in GGUF.
//!
//! Data flows one way: [`gguf`] reader, imatrix, recipe, [`quant`] kernels, [`gguf`] writer.
#![warn(missing_docs)]

pub mod atomic_file;
pub mod compute;
pub mod convert;
pub mod cpu;
pub mod display;
pub mod eval;
pub mod gguf;
pub mod imatrix;
pub mod interrupt;
pub mod measure;
pub mod model;
pub mod moments;
pub mod os;
pub mod plan;
pub mod progress;
pub mod quant;
pub mod quantize;
pub mod recipe;
pub mod report;
pub mod rounding;
pub mod rows;
pub mod text;
pub mod tokenizer;
pub mod unfinished;
mod vectorized;
