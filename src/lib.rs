//! Layer-wise quantization of language models in GGUF.
//!
//! Data flows one way: [`gguf`] reader, imatrix, recipe, [`quant`] kernels, [`gguf`] writer.
#![warn(missing_docs)]

pub mod allocate;
pub mod atomic_file;
pub mod calibration;
pub mod cli;
pub mod compute;
pub mod convert;
pub mod cpu;
pub mod eval;
pub mod feedback;
pub mod gguf;
pub mod imatrix;
pub mod model;
pub mod os;
pub mod pipeline;
pub mod plan;
pub mod quant;
pub mod recipe;
pub mod report;
pub mod rounding;
pub mod sensitivity;
pub mod tokenizer;
mod vectorized;
