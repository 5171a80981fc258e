//! A Hugging Face model folder to a folder in compressed-tensors form, which vLLM and transformers load.
//!
//! [`Request::decide`] reads configuration and headers of the source and fixes everything that does not depend on values:
//! which weights are quantized and how, names, shapes, files and places. [`Draft::write`] streams the weights through a
//! rounding into their places. [`check`] is a loader of its own that looks for what other loaders let pass.
//!
//! Names of tensors stay those of the source folder.

pub(crate) mod calibrated;
mod check;
mod config;
mod decide;
mod draft;
mod error;
mod files;
mod folder;
mod mixed;
mod names;
pub(crate) mod pack;
mod pieces;
mod request;
mod scheme;
pub(crate) mod shards;
mod sink;
mod write;

pub use calibrated::guests::AlsoGguf;
pub use check::{CheckReport, CheckedTensor, check};
pub use draft::{Draft, KeptTensor, OddTensor};
pub use error::ExportError;
pub use request::{Odd, Request, Rounding};
pub use scheme::{GroupSize, Scheme, schemes};
pub use write::Written;
