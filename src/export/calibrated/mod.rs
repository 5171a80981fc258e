//! Matrices of a folder rounded by the model's own inputs.
//!
//! The folder is converted to a 16-bit GGUF beside the output, which the model runs from, layer by layer; names, experts and
//! columns are matched through convert's tables. Each matrix is read from the folder itself, rounded by search and with
//! feedback (or as llm-compressor does, for comparison), judged on the gate's text, and handed over before the next one is
//! begun. Hidden states between two layers lie in a file, from where an interrupted run goes on behind the last layer whose
//! matrices are all there.
//!
//! The same pass can round GGUF files, as `lwq quantize` does: it shows each input to both.

pub(super) mod guests;
mod matrix;
pub(super) mod model;
mod norms;
mod pass;

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use crate::atomic_file::Replace;
use crate::convert::source::{Matrix, ModelFolder};
use crate::export::ExportError;
use crate::moments::CalibrationOptions;
use crate::progress::Watch;
use crate::quantize::feedback::Outcome;
use crate::recipe::Target;
use crate::rounding::grid::{Layout, Rounded};

/// A matrix to be rounded.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    /// What the caller knows it by.
    pub(crate) key: usize,
    /// Name of the module, for messages and reports.
    pub(crate) module: String,
    pub(crate) matrix: Matrix,
    pub(crate) layout: Layout,
    /// NVFP4's global scale, where the matrix shares one with others.
    pub(crate) global: Option<f32>,
}

/// How matrices are rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    /// With feedback, or by search where that is better on the gate's text.
    Feedback,
    /// As llm-compressor does by default; `resaved` repeats what it loses by saving 16-bit weights of a bfloat16 model.
    Gptq {
        /// See [`resaved_in_bf16`](crate::rounding::grid::resaved_in_bf16).
        resaved: bool,
    },
}

/// What is to be rounded, and by what.
pub(crate) struct Calibrated<'a> {
    pub(crate) folder: &'a ModelFolder,
    /// All matrices of the output, done or not.
    pub(crate) jobs: &'a [Job],
    /// Keys of those that an earlier run has finished.
    pub(crate) done: &'a HashSet<usize>,
    pub(crate) method: Method,
    /// Columns get factors that norms take up, where that is better for inputs rounded to 8 bits.
    pub(crate) smooths: bool,
    pub(crate) options: &'a CalibrationOptions,
    /// Folder for the 16-bit model and hidden states, which must be there. What lies in it must be of the same folder, texts
    /// and settings.
    pub(crate) work: &'a Path,
    /// GGUF files that the same pass makes.
    pub(crate) also: &'a [(Target, PathBuf)],
    /// Whether these may replace others.
    pub(crate) replace: Replace,
}

/// Takes what is done.
pub(crate) trait Sink {
    /// Takes a matrix with what became of it.
    fn matrix(&mut self, key: usize, rounded: Rounded, outcome: Outcome) -> Result<(), ExportError>;

    /// Takes a vector of the folder that is not what it was: its weight, and its bytes, in the same type. Comes before the
    /// matrices that it goes with, and again if one of them was not taken.
    fn vector(&mut self, weight: usize, bytes: &[u8]) -> Result<(), ExportError>;
}

impl Calibrated<'_> {
    /// Rounds all matrices that are not done and whose inputs the model shows, layer by layer, and hands each to `sink`; then
    /// writes the GGUF files. Gives the keys of the others: no text tells anything about them.
    ///
    /// # Errors
    /// When the model cannot be run, a matrix cannot be read, `sink` refuses one, or `watch` stops the run; the same call
    /// then goes on.
    pub(crate) fn round(&self, watch: &dyn Watch, sink: &mut dyn Sink) -> Result<Vec<usize>, ExportError> {
        let converted = model::Converted::open(self.folder, self.work, self.also.is_empty(), watch)?;
        pass::run(self, &converted, watch, sink)
    }

    /// Everything beside folder and texts that the result depends on, in words.
    pub(crate) fn words(&self) -> String {
        let CalibrationOptions {
            text, gate, tokens, ctx, damping, fast, all_experts, moment_memory, corrected, ..
        } = self.options;
        let texts = format!("{} {}", digest(&text.joined()), digest(&gate.joined()));
        let method = self.method;
        let smooths = if self.smooths { " smooth" } else { "" };
        let corrected = if *corrected { " corrected" } else { "" };
        format!(
            "{method:?}{smooths}{corrected} {texts} {tokens} {ctx:?} {damping:?} {fast} {all_experts} {moment_memory}"
        )
    }
}

fn digest(text: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    format!("{:x}", Sha256::digest(text))
}
