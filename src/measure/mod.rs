//! What rounding does to a model, measured: the error that each type makes in each tensor, and the divergence that it
//! causes.
//!
//! [`weight_errors`] rounds samples of rows and runs nothing. [`Prober`] runs the model with tensors replaced;
//! [`Measurement`] probes them all and leaves a [`Sensitivity`], from which a [`DamageModel`] predicts what any choice
//! of types costs. Nothing here decides anything; [`crate::plan::allocate`] does.

mod damage;
mod encode;
mod error;
mod feedback;
mod file;
mod measure;
mod prior;
mod probe;
mod weight_error;

pub use damage::{DamageModel, SECOND_ROUND_BITS};
pub use encode::encode_tensor;
pub use error::MeasureError;
pub use feedback::{
    FeedbackErrors, FeedbackMeter, FeedbackProvenance, FeedbackSubject, OnFeedbackStep, TensorFeedback,
};
pub use file::{JointProbe, Probe, Provenance, SENSITIVITY_VERSION, Sensitivity, TensorSensitivity, type_name};
pub use measure::{Measurement, OnMeasured, Subject, measure_errors};
pub use prior::prior_slopes;
pub use probe::{ProbeResult, ProbeText, Prober};
pub use weight_error::{
    ColumnWeights, DEFAULT_SAMPLED_WEIGHTS, RowErrors, Sampling, WeightErrorProblem, fits_row, weight_errors,
};
