//! What can be wrong with a plan, or with the request for one.

use std::io;

use thiserror::Error;

use crate::gguf::GgufError;
use crate::measure::MeasureError;
use crate::progress::Interrupted;
use crate::quantize::QuantizeError;

/// Why a plan cannot be made, read or followed. Each is one line that names the file or tensor.
#[derive(Debug, Error)]
pub enum PlanError {
    /// The file could not be read.
    #[error("{file}: cannot be read: {source}; check the path and its permissions")]
    Read {
        /// The plan's name.
        file: String,
        /// The system's answer.
        source: io::Error,
    },
    /// The file is larger than any plan.
    #[error("{file}: has {bytes} bytes, a plan has at most {limit}; give a file that lwq plan wrote")]
    TooLarge {
        /// The plan's name.
        file: String,
        /// Its size.
        bytes: u64,
        /// The largest size that is read.
        limit: u64,
    },
    /// The file is no plan.
    #[error("{file}: is no plan of lwq: {problem}; make it again with lwq plan")]
    Malformed {
        /// The plan's name.
        file: String,
        /// What is wrong, with line and column where known.
        problem: String,
    },
    /// A row of the plan is wrong.
    #[error("{file}: tensor {tensor}: {problem}; make the plan again with lwq plan")]
    Row {
        /// The plan's name.
        file: String,
        /// The tensor's name.
        tensor: String,
        /// What is wrong.
        problem: String,
    },
    /// The plan was made for something else.
    #[error(
        "{file}: was made for another {what} ({planned}, {planned_sha256}), this is {found_sha256}; give that one or \
         plan again for this one"
    )]
    Mismatch {
        /// The plan's name.
        file: String,
        /// `model` or `importance matrix`.
        what: &'static str,
        /// The name that the plan records.
        planned: String,
        /// The start of the recorded fingerprint.
        planned_sha256: String,
        /// The start of the fingerprint found.
        found_sha256: String,
    },
    /// The plan was made with an importance matrix and none is given.
    #[error("{file}: was made with the importance matrix {planned}; give it with --imatrix")]
    ImatrixMissing {
        /// The plan's name.
        file: String,
        /// The recorded name of the imatrix.
        planned: String,
    },
    /// The plan was made without an importance matrix and one is given.
    #[error("{file}: was made without an importance matrix; leave --imatrix away or plan again with it")]
    ImatrixUnplanned {
        /// The plan's name.
        file: String,
    },
    /// The limit cannot be kept.
    #[error("{file}: {problem}")]
    Limit {
        /// The model.
        file: String,
        /// What is possible, and what to do.
        problem: String,
    },
    /// The damage of types could not be found.
    #[error("{file}: {source}")]
    Damage {
        /// The model.
        file: String,
        /// What is wrong.
        source: Box<MeasureError>,
    },
    /// The model, its importance matrix or its measurement is not usable.
    #[error(transparent)]
    Measure(Box<MeasureError>),
    /// The standard file that the plan is to be as large as cannot be made.
    #[error(transparent)]
    Standard(Box<QuantizeError>),
    /// A planned file cannot be laid out.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The measurement was stopped.
    #[error("{0}")]
    Interrupted(#[from] Interrupted),
}

impl From<MeasureError> for PlanError {
    fn from(error: MeasureError) -> PlanError {
        match error {
            MeasureError::Interrupted(interrupted) => PlanError::Interrupted(interrupted),
            other => PlanError::Measure(Box::new(other)),
        }
    }
}

impl From<QuantizeError> for PlanError {
    fn from(error: QuantizeError) -> PlanError {
        PlanError::Standard(Box::new(error))
    }
}
