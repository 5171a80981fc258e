//! How a run rounds, decided before any tensor is touched.

use crate::cli::rounding::Calibration;
use lwq::gguf::{Gguf, TensorInfo};
use lwq::rounding::{Method, RoundingRecord, has_input, output_tensor};

/// How the run rounds.
#[derive(Clone)]
pub(super) struct RoundingPlan {
    pub method: Method,
    /// What the output records.
    pub record: Option<RoundingRecord>,
    /// Bytes of the hidden states that lie on the disk meanwhile.
    pub states_bytes: u64,
}

impl RoundingPlan {
    /// A run with these texts, if it has any.
    pub fn new(method: Method, calibration: Option<&Calibration>) -> RoundingPlan {
        let record = calibration.map_or(RoundingRecord { method, calibration: None }, Calibration::record);
        let states_bytes = calibration.map_or(0, Calibration::states_bytes);
        RoundingPlan { method, record: Some(record), states_bytes }
    }

    /// A run that leaves no record.
    pub fn unrecorded(method: Method) -> RoundingPlan {
        RoundingPlan { method, record: None, states_bytes: 0 }
    }

    /// True if the run finds out by itself how important the inputs of this tensor are.
    pub fn knows_input(&self, gguf: &Gguf, tensor: &TensorInfo) -> bool {
        self.method == Method::Feedback && has_input(&tensor.name, output_tensor(gguf))
    }
}
