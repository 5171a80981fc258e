//! Why a file cannot be quantized.

use std::path::PathBuf;

use super::feedback::RoundingError;
use super::write::PipelineError;
use crate::atomic_file::OutputError;
use crate::display::decimal_size;
use crate::gguf::GgufError;
use crate::imatrix::MatchError;
use crate::progress::Interrupted;
use crate::recipe::RecipeError;

/// Errors of deciding on a file and of writing it. Each is one line that names the file, tensor or key.
#[derive(Debug, thiserror::Error)]
pub enum QuantizeError {
    /// The source is no model.
    #[error("{file}: {problem}")]
    Source {
        /// The file.
        file: String,
        /// What it is, and what to do.
        problem: &'static str,
    },
    /// The file could not be read, or its metadata are wrong.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The recipe cannot be made.
    #[error("{file}: {source}")]
    Recipe {
        /// The source.
        file: String,
        /// What is wrong.
        source: RecipeError,
    },
    /// Layers cannot be removed.
    #[error("{file}: {problem}")]
    Prune {
        /// The source.
        file: String,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// Blocks of one file do not fit another.
    #[error("{file} and {donor}: {problem}")]
    Graft {
        /// The source.
        file: String,
        /// The file with the blocks.
        donor: String,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// A metadata value given by hand cannot be what readers of its key expect.
    #[error("{flag} {key}: readers of this key expect {expected}, found {found}; {advice}")]
    Override {
        /// What the value was given with.
        flag: &'static str,
        /// The key, quoted and escaped.
        key: String,
        /// The type, with its range.
        expected: String,
        /// The value.
        found: String,
        /// What to do.
        advice: &'static str,
    },
    /// The importance matrix or the choice of its entries does not fit the model.
    #[error(transparent)]
    Match(#[from] MatchError),
    /// The choices were made for another model.
    #[error("{file}: tensor {tensor} is not in {choices}; make the choices for this file")]
    NotChosen {
        /// The source.
        file: String,
        /// A tensor without a choice.
        tensor: String,
        /// What the choices are called.
        choices: String,
    },
    /// More parts than a split model may have.
    #[error("{count} output files, but a split model has at most 65535; choose a larger --split-max-size")]
    TooManyFiles {
        /// Parts that there would be.
        count: usize,
    },
    /// Something that a run needs is missing, see [`Draft::problems`](super::Draft::problems).
    #[error("{file}: {problem}")]
    Problem {
        /// The source.
        file: String,
        /// What, and what to do.
        problem: String,
    },
    /// The output would replace the source.
    #[error("{}: is the input; choose another name for the output", .0.display())]
    IsInput(PathBuf),
    /// Two outputs of one run have the same name.
    #[error("{}: two outputs would have this name; make them one by one", .0.display())]
    SameName(PathBuf),
    /// Outputs of one run round with different calibrations.
    #[error("outputs of one run share one calibration; write the others by themselves")]
    Calibrations,
    /// Inputs that depend on what was rounded before are those of one output.
    #[error("with corrected targets files are rounded one at a time; write each by itself")]
    CorrectedTogether,
    /// The finished file cannot be run.
    #[error("{file}: cannot be judged as a whole: {source}; --no-final-gate leaves that out")]
    WholeGate {
        /// The source.
        file: String,
        /// Why.
        source: Box<crate::model::ModelError>,
    },
    /// The disk is too full.
    #[error(
        "{}: {} are needed and {} are free; free some space or choose another folder",
        folder.display(), decimal_size(*needed), decimal_size(*free)
    )]
    NoSpace {
        /// The output's folder.
        folder: PathBuf,
        /// Bytes that the run takes.
        needed: u64,
        /// Bytes that there are.
        free: u64,
    },
    /// An output cannot be made.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// A tensor could not be read, rounded or written.
    #[error(transparent)]
    Write(PipelineError),
    /// Rounding with feedback failed.
    #[error("{file}: {source}")]
    Rounding {
        /// The source.
        file: String,
        /// What is wrong.
        source: Box<RoundingError>,
    },
    /// Unfinished work of feedback could not be used.
    #[error(transparent)]
    Unfinished(RoundingError),
    /// An output could not be completed.
    #[error("the tensors are done, but the file is not complete: {0}")]
    Incomplete(OutputError),
    /// The run was stopped.
    #[error("{0}")]
    Interrupted(#[from] Interrupted),
}

impl From<PipelineError> for QuantizeError {
    fn from(error: PipelineError) -> QuantizeError {
        match error {
            PipelineError::Interrupted(interrupted) => QuantizeError::Interrupted(interrupted),
            other => QuantizeError::Write(other),
        }
    }
}
