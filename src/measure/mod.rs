//! What rounding does to a model, measured: the error that each type makes in each tensor, and the divergence that it
//! causes.
//!
//! A [`Request`] measures a model and leaves a [`Sensitivity`], from which a [`DamageModel`] predicts what any choice of
//! types costs. [`weight_errors`] rounds samples of rows and runs nothing. [`Prober`] runs the model with tensors replaced;
//! [`Measurement`] probes them all. Nothing here decides anything; [`crate::plan::allocate`] does.

mod curvature;
mod damage;
mod encode;
mod error;
mod feedback;
mod file;
mod inventory;
mod prior;
mod prober;
mod probes;
mod request;
mod tensor;
mod transfer;
mod units;
mod weight_error;

pub use curvature::CurvatureCheck;
pub use damage::{DamageModel, SECOND_ROUND_BITS};
pub use encode::encode_tensor;
pub use error::MeasureError;
pub use feedback::{FeedbackErrors, FeedbackProvenance, TensorFeedback};
pub use file::{JointProbe, Probe, Provenance, SENSITIVITY_VERSION, Sensitivity, TensorSensitivity, type_name};
pub use inventory::SourceFile;
pub(crate) use inventory::{Inventory, with_planning};
pub use prior::prior_slopes;
pub use prober::{ProbeResult, ProbeText, Prober};
pub use probes::Measurement;
pub(crate) use request::Job;
pub use request::{ProbeOptions, Request, default_path, path_for};
pub use tensor::MeasuredTensor;
pub use transfer::{CHECKED_PROBES, TransferCheck};
pub(crate) use units::{RoundedUnit, Unit};
pub use weight_error::{
    ColumnWeights, DEFAULT_SAMPLED_WEIGHTS, RowErrors, Sampling, WeightErrorProblem, fits_row, weight_errors,
};
