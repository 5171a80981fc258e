//! The damage that each type does to each tensor, by the method that was asked for.

use std::collections::HashMap;

use anyhow::Result;

use super::make::Subject;
use crate::cli::{Common, Progress, Unit};
use crate::gguf::TensorType;
use crate::plan::{Method, ProbeText};
use crate::sensitivity::{ColumnWeights, Sampling, prior_slopes, weight_errors};

/// Predicted damage of every choice.
pub(super) struct Estimate {
    damage: HashMap<String, Vec<(TensorType, f64)>>,
    /// Divergence that is there whatever the types are.
    pub floor: f64,
    /// Standard error of the whole damage, as a part of it; `None` where nobody knows.
    pub relative_error: Option<f64>,
    /// The text of the probes.
    pub text: Option<ProbeText>,
}

impl Estimate {
    /// Damage of a type in a tensor; infinite for types that were not looked at.
    pub fn damage(&self, tensor: &str, ty: TensorType) -> f64 {
        let known = self.damage.get(tensor).and_then(|types| types.iter().find(|(known, _)| *known == ty));
        known.map_or(f64::INFINITY, |(_, damage)| *damage)
    }
}

/// Finds the damage of all legal types.
///
/// # Errors
/// When the model cannot be read or holds values that are not finite.
pub(super) fn estimate(subject: &Subject<'_>, method: Method, bits: Option<f64>, common: &Common) -> Result<Estimate> {
    match method {
        Method::Error | Method::Measured => by_error(subject, bits, common),
    }
}

/// Types this many bits below the budget's average are not tried without measurements: the damage of so few bits is
/// guessed too badly, and the encoders of the smallest types are by far the slowest.
const BITS_BELOW_AVERAGE: f64 = 2.0;

/// Weights that are rounded per tensor: the guesses are no better than a larger sample would deserve.
const SAMPLED_WEIGHTS: u64 = 1 << 17;

/// The types worth rounding to: all, if the budget is not known in bits.
fn tried(types: &[TensorType], bits: Option<f64>) -> Vec<TensorType> {
    let size = |ty: &TensorType| ty.info().map_or(0.0, |info| info.bits_per_weight());
    let least = bits.map_or(0.0, |bits| bits - BITS_BELOW_AVERAGE);
    // Rows that only large types fit have one of those, whatever the budget.
    let most = types.iter().map(size).fold(0.0, f64::max);
    types.iter().copied().filter(|ty| size(ty) >= least.min(most)).collect()
}

/// Relative rounding errors times what is usual for the role of a tensor.
fn by_error(subject: &Subject<'_>, bits: Option<f64>, common: &Common) -> Result<Estimate> {
    let names: Vec<&str> = subject.choosable().map(|(tensor, _)| tensor.name.as_str()).collect();
    let total = subject.choosable().filter_map(|(tensor, _)| tensor.bytes).sum();
    let progress = Progress::new(common, "rounding samples", total, Unit::Bytes);
    let sampling = Sampling { weights: SAMPLED_WEIGHTS, ..Sampling::default() };
    let mut damage = HashMap::new();
    for ((tensor, types), slope) in subject.choosable().zip(prior_slopes(&names)) {
        let importance = subject.importance.get(&tensor.name);
        let rows: Option<Vec<f64>> = importance.filter(|found| !found.tokens.is_empty()).map(|found| {
            let rows = tensor.rows_per_matrix() as usize;
            found.tokens.iter().flat_map(|&tokens| std::iter::repeat_n(tokens as f64, rows)).collect()
        });
        let weights =
            ColumnWeights { importance: importance.map(|found| found.values.as_slice()), rows: rows.as_deref() };
        let errors = weight_errors(subject.gguf, tensor, weights, &tried(types, bits), sampling)?;
        subject.gguf.release(tensor);
        let scaled = errors.into_iter().map(|(ty, errors)| (ty, slope * errors.relative())).collect();
        damage.insert(tensor.name.clone(), scaled);
        progress.advance(tensor.bytes.unwrap_or(0), &tensor.name);
    }
    progress.finish();
    Ok(Estimate { damage, floor: 0.0, relative_error: None, text: None })
}
