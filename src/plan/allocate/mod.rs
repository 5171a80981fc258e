//! Which of several choices each item gets, so that the damage is least within a budget. Pure: no tensors, no files.
//!
//! This is the multiple-choice knapsack problem. The way to its solution (`knapsack`):
//!
//! 1. Choices that another one beats in both bytes and damage are dropped; the convex hull of the rest is found.
//! 2. All hull steps, in the order of damage saved per byte, up to the budget: the step at which the budget ends gives
//!    the Lagrange multiplier, and its fraction the dual bound, below which no allocation can get.
//! 3. The hull allocation within the budget, improved by upgrades and exchanges into the bytes that are left, is a
//!    first solution. Its distance to the bound limits how far a choice may lie from the multiplier's favour: most drop
//!    out.
//! 4. Dynamic programming over the rest: all sums of bytes and damage that no other sum beats in both and that can
//!    still end below the first solution. Bytes are not rounded, so the result is the optimum, proven, unless there
//!    are more sums than fit in memory; then sums of nearly equal bytes are thinned out, the result is improved by
//!    exchanges again, and [`Solution::optimal`] is false. The bound holds in both cases.
//!
//! Equal results are told apart in a fixed way: less damage, then fewer bytes, then the choice that stands first in
//! the first item that differs, as far as step 4 sees both. The same input always gives the same solution.

mod class;
mod error;
mod hull;
mod improve;
mod knapsack;
mod siblings;
#[cfg(test)]
mod tests;

use crate::gguf::TensorType;

pub use error::AllocateError;
pub use siblings::Siblings;

use class::{Class, Point};

/// One way to store an item.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// The type.
    pub ty: TensorType,
    /// Bytes of the tensor's data in this type, padding included.
    pub bytes: u64,
    /// What this type adds to the damage of the whole, such as nats of KL divergence; not negative. Infinite damage
    /// marks a type that must not be chosen.
    pub damage: f64,
}

/// A tensor and its possible types.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// Its name, for errors.
    pub name: String,
    /// The types it may get, in any order; at least one.
    pub candidates: Vec<Candidate>,
}

/// A choice for each item.
#[derive(Debug, Clone, PartialEq)]
pub struct Solution {
    /// For each item the position of its choice in [`Item::candidates`].
    pub picks: Vec<usize>,
    /// Sum of the bytes.
    pub bytes: u64,
    /// Sum of the damage.
    pub damage: f64,
    /// The dual bound: no allocation that keeps the limit has less damage, or for [`minimize_bytes`] fewer bytes.
    pub bound: f64,
    /// True if the search was complete: nothing better exists.
    pub optimal: bool,
}

impl Solution {
    /// The distance of `value` (damage or bytes, whichever was made small) to the bound, as a part of the value.
    pub fn relative_gap(&self, value: f64) -> f64 {
        if value > 0.0 { ((value - self.bound) / value).max(0.0) } else { 0.0 }
    }
}

/// Finds the allocation of least damage that takes at most `budget` bytes.
///
/// # Errors
/// When the smallest allocation is larger than the budget, or an item is malformed.
pub fn minimize_damage(items: &[Item], budget: u64) -> Result<Solution, AllocateError> {
    let classes = classes(items, |candidate| Point { weight: candidate.bytes as f64, cost: candidate.damage })?;
    let Some(found) = knapsack::solve(&classes, budget as f64) else {
        let (smallest, largest) = byte_range(items);
        return Err(AllocateError::BudgetTooSmall { budget, smallest, largest });
    };
    Ok(solution(items, found))
}

/// Most that filling may add to the damage: predictions are less certain than that.
const FILLING_COSTS: f64 = 0.03;

/// Where `solution` leaves more than `room` bytes of the budget, looks for the allocation of least damage that leaves
/// less. It may have up to 3% more damage; if it takes more, `solution` stays as it is. Of no use for the model, but for
/// those who asked for a size.
///
/// # Errors
/// When an item is malformed.
pub fn fill_budget(items: &[Item], solution: &Solution, budget: u64, room: u64) -> Result<Solution, AllocateError> {
    let least = budget.saturating_sub(room);
    if solution.bytes >= least {
        return Ok(solution.clone());
    }
    let classes = classes(items, |candidate| Point { weight: candidate.bytes as f64, cost: candidate.damage })?;
    let most = solution.damage * (1.0 + FILLING_COSTS);
    let Some(picks) = knapsack::fill(&classes, least as f64, budget as f64, most) else { return Ok(solution.clone()) };
    Ok(self::solution(items, knapsack::Found { picks, bound: solution.bound, optimal: false }))
}

/// Finds the allocation of fewest bytes whose damage is at most `max_damage`.
///
/// # Errors
/// When even the least damage possible is above the limit, or an item is malformed.
pub fn minimize_bytes(items: &[Item], max_damage: f64) -> Result<Solution, AllocateError> {
    let classes = classes(items, |candidate| Point { weight: candidate.damage, cost: candidate.bytes as f64 })?;
    let Some(found) = knapsack::solve(&classes, max_damage) else {
        let least =
            items.iter().map(|item| item.candidates.iter().map(|c| c.damage).fold(f64::INFINITY, f64::min)).sum();
        return Err(AllocateError::DamageTooSmall { limit: max_damage, least });
    };
    Ok(solution(items, found))
}

/// Bytes of the smallest and of the largest allocation, whatever its damage; types of infinite damage do not count.
pub fn byte_range(items: &[Item]) -> (u64, u64) {
    let bytes = |item: &Item| {
        let usable = item.candidates.iter().filter(|candidate| candidate.damage.is_finite());
        let bytes = usable.map(|candidate| candidate.bytes);
        (bytes.clone().min().unwrap_or(0), bytes.max().unwrap_or(0))
    };
    items.iter().map(bytes).fold((0, 0), |(small, large), (least, most)| (small + least, large + most))
}

fn classes(items: &[Item], point: impl Fn(&Candidate) -> Point) -> Result<Vec<Class>, AllocateError> {
    items
        .iter()
        .map(|item| {
            if let Some(bad) = item.candidates.iter().find(|c| c.damage.is_nan() || c.damage < 0.0) {
                return Err(AllocateError::BadDamage { item: item.name.clone(), ty: bad.ty, damage: bad.damage });
            }
            let usable = item.candidates.iter().enumerate().filter(|(_, candidate)| candidate.damage.is_finite());
            let class = Class::new(usable.map(|(at, candidate)| (at, point(candidate))));
            if class.is_empty() { Err(AllocateError::NoCandidate { item: item.name.clone() }) } else { Ok(class) }
        })
        .collect()
}

fn solution(items: &[Item], found: knapsack::Found) -> Solution {
    let picked = || items.iter().zip(&found.picks).map(|(item, &pick)| &item.candidates[pick]);
    let bytes = picked().map(|candidate| candidate.bytes).sum();
    let damage = picked().map(|candidate| candidate.damage).sum();
    Solution { bytes, damage, bound: found.bound, optimal: found.optimal, picks: found.picks }
}
