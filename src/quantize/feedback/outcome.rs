//! What became of each tensor, and what it says about the roles of tensors.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::recipe::Role;
use crate::rounding::RoundingMethod;

/// Why a tensor was not rounded with feedback.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kept {
    /// Its type is not rounded with feedback.
    Type,
    /// Its error on text that was not used for rounding was larger than by search.
    HeldOutError,
    /// The text says too little about its input.
    TooFewTokens,
    /// The second moment of its input has no factor.
    Factorization,
    /// Feedback led to values that the type cannot hold.
    Unsound,
    /// The forward pass does not show its input.
    NoInput,
    /// With it the whole file diverged more from the original.
    WholeFile,
}

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Kept::Type => "type",
            Kept::HeldOutError => "larger held-out error",
            Kept::TooFewTokens => "too few tokens",
            Kept::Factorization => "no factorization",
            Kept::Unsound => "values out of range",
            Kept::NoInput => "no input",
            Kept::WholeFile => "divergence of the whole file",
        })
    }
}

/// How one tensor was rounded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Its name in the source.
    pub tensor: String,
    /// The method; of a stack of experts, feedback if any of them was rounded so.
    pub method: RoundingMethod,
    /// Why it, or the first of its matrices that was not, was not rounded with feedback.
    pub kept: Option<Kept>,
    /// Number of matrices.
    pub matrices: usize,
    /// Matrices that were rounded with feedback.
    pub with_feedback: usize,
    /// Squared error of its outputs on the text of the gate, feedback over search.
    pub held_out_ratio: Option<f64>,
    /// Damping that the factorization took.
    pub damping: Option<f64>,
    /// Feedback went from row to row, too, and errors are those that the loss's gradients weigh.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub two_sided: bool,
    /// Tokens of the calibration text that its input saw; of experts the fewest.
    pub tokens: u64,
}

impl Outcome {
    /// Search was kept after all, for the sake of the whole file.
    pub(crate) fn keep_search(&mut self) {
        self.method = RoundingMethod::Search;
        self.kept = Some(Kept::WholeFile);
        self.with_feedback = 0;
    }
}

/// A row of the closing table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RoleRow {
    /// The role.
    pub role: String,
    /// Tensors of the role.
    pub tensors: usize,
    /// How many were rounded with feedback.
    pub feedback: usize,
    /// Mean ratio of held-out errors, feedback over search, of those that were judged.
    pub held_out_ratio: Option<f64>,
}

/// The outcomes by role, in the order in which roles first occur.
pub fn by_role(outcomes: &[Outcome]) -> Vec<RoleRow> {
    let mut roles: Vec<Role> = Vec::new();
    for outcome in outcomes {
        let role = Role::of(&outcome.tensor);
        if !roles.contains(&role) {
            roles.push(role);
        }
    }
    let row = |role: Role| {
        let of_role: Vec<&Outcome> = outcomes.iter().filter(|outcome| Role::of(&outcome.tensor) == role).collect();
        let ratios: Vec<f64> = of_role.iter().filter_map(|outcome| outcome.held_out_ratio).collect();
        RoleRow {
            role: role.to_string(),
            tensors: of_role.len(),
            feedback: of_role.iter().filter(|outcome| outcome.method == RoundingMethod::Feedback).count(),
            held_out_ratio: (!ratios.is_empty()).then(|| ratios.iter().sum::<f64>() / ratios.len() as f64),
        }
    };
    roles.into_iter().map(row).collect()
}

/// Counts of the reasons why tensors were not rounded with feedback.
pub fn reasons(outcomes: &[Outcome]) -> BTreeMap<Kept, usize> {
    let mut counts = BTreeMap::new();
    let not = outcomes.iter().filter(|outcome| outcome.method != RoundingMethod::Feedback);
    not.filter_map(|outcome| outcome.kept).for_each(|kept| *counts.entry(kept).or_insert(0) += 1);
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(tensor: &str, method: RoundingMethod, ratio: Option<f64>, kept: Option<Kept>) -> Outcome {
        let with_feedback = usize::from(method == RoundingMethod::Feedback);
        Outcome {
            tensor: tensor.to_owned(),
            method,
            kept,
            matrices: 1,
            with_feedback,
            held_out_ratio: ratio,
            damping: None,
            two_sided: false,
            tokens: 100,
        }
    }

    #[test]
    fn outcomes_are_counted_by_role_and_by_reason() {
        let outcomes = [
            outcome("blk.0.attn_q.weight", RoundingMethod::Feedback, Some(0.5), None),
            outcome("blk.0.ffn_down.weight", RoundingMethod::Search, Some(1.1), Some(Kept::HeldOutError)),
            outcome("blk.1.attn_q.weight", RoundingMethod::Feedback, Some(0.7), None),
            outcome("blk.1.ffn_down.weight", RoundingMethod::Search, None, Some(Kept::TooFewTokens)),
            outcome("blk.2.ffn_down.weight", RoundingMethod::Search, Some(1.3), Some(Kept::HeldOutError)),
        ];
        let rows = by_role(&outcomes);
        assert_eq!((rows[0].role.as_str(), rows[0].tensors, rows[0].feedback), ("attn_q", 2, 2));
        assert_eq!(rows[0].held_out_ratio, Some(0.6));
        assert_eq!((rows[1].tensors, rows[1].feedback), (3, 0));
        assert!((rows[1].held_out_ratio.unwrap() - 1.2).abs() < 1e-12);
        assert_eq!(reasons(&outcomes), [(Kept::HeldOutError, 2), (Kept::TooFewTokens, 1)].into());
    }
}
