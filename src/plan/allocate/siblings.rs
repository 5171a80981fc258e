//! Items that have to get the same type: what loaders put into one matrix, such as q, k and v.

use std::collections::HashMap;

use super::{AllocateError, Candidate, Item, Solution};
use crate::gguf::TensorType;

/// Items of which some stand for several.
#[derive(Debug, Clone)]
pub struct Siblings {
    /// One for each group, to be solved for.
    items: Vec<Item>,
    /// For each group the positions of its items.
    groups: Vec<Vec<usize>>,
}

impl Siblings {
    /// Puts items together whose `key` is equal; those without one stay alone. A group has the types that all its items
    /// have, with the sums of their bytes and damage.
    ///
    /// # Errors
    /// When the items of a group have no type in common.
    pub fn new(items: &[Item], key: impl Fn(&str) -> Option<String>) -> Result<Siblings, AllocateError> {
        let mut groups: Vec<Vec<usize>> = Vec::new();
        let mut known: HashMap<String, usize> = HashMap::new();
        for (at, item) in items.iter().enumerate() {
            let group = match key(&item.name) {
                Some(key) => *known.entry(key).or_insert(groups.len()),
                None => groups.len(),
            };
            match groups.get_mut(group) {
                Some(group) => group.push(at),
                None => groups.push(vec![at]),
            }
        }
        let merged = groups.iter().map(|group| merged(items, group)).collect::<Result<_, _>>()?;
        Ok(Siblings { items: merged, groups })
    }

    /// The groups as items.
    pub fn items(&self) -> &[Item] {
        &self.items
    }

    /// The solution for the items that the groups were made of.
    pub fn apart(&self, items: &[Item], solution: Solution) -> Solution {
        let mut picks = vec![0; items.len()];
        for ((group, item), &pick) in self.groups.iter().zip(&self.items).zip(&solution.picks) {
            let ty = item.candidates[pick].ty;
            for &at in group {
                picks[at] = position(&items[at], ty).unwrap_or(0);
            }
        }
        Solution { picks, ..solution }
    }
}

fn position(item: &Item, ty: TensorType) -> Option<usize> {
    item.candidates.iter().position(|candidate| candidate.ty == ty)
}

fn merged(items: &[Item], group: &[usize]) -> Result<Item, AllocateError> {
    let [first, others @ ..] = group else { return Err(AllocateError::NoCandidate { item: String::new() }) };
    let first = &items[*first];
    let mut candidates = Vec::new();
    for candidate in &first.candidates {
        let mut of_others =
            others.iter().map(|&at| position(&items[at], candidate.ty).map(|to| items[at].candidates[to]));
        let sum = of_others.try_fold(*candidate, |sum, other| {
            let other = other?;
            Some(Candidate { bytes: sum.bytes + other.bytes, damage: sum.damage + other.damage, ..sum })
        });
        candidates.extend(sum);
    }
    if candidates.is_empty() {
        let names: Vec<&str> = group.iter().map(|&at| items[at].name.as_str()).collect();
        return Err(AllocateError::NoCandidate { item: names.join(" with ") });
    }
    Ok(Item { name: first.name.clone(), candidates })
}

#[cfg(test)]
mod tests {
    use super::super::minimize_damage;
    use super::*;

    fn item(name: &str, candidates: &[(TensorType, u64, f64)]) -> Item {
        let candidates = candidates.iter().map(|&(ty, bytes, damage)| Candidate { ty, bytes, damage }).collect();
        Item { name: name.to_owned(), candidates }
    }

    #[test]
    fn siblings_get_one_type_and_the_best_that_they_share() {
        let (small, middle, large) = (TensorType::Q2_K, TensorType::Q4_K, TensorType::Q8_0);
        let items = [
            item("q", &[(small, 2, 9.0), (middle, 4, 1.0), (large, 8, 0.0)]),
            item("o", &[(small, 2, 3.0), (large, 8, 0.0)]),
            item("k", &[(large, 8, 0.0), (middle, 4, 5.0)]),
        ];
        let key = |name: &str| ["q", "k"].contains(&name).then(|| "qkv".to_owned());
        let siblings = Siblings::new(&items, key).unwrap();
        assert_eq!(siblings.items().len(), 2);
        let solve = |budget| {
            let solution = minimize_damage(siblings.items(), budget).unwrap();
            let solution = siblings.apart(&items, solution);
            let picked: Vec<_> = items.iter().zip(&solution.picks).map(|(item, &at)| item.candidates[at].ty).collect();
            let bytes: u64 = items.iter().zip(&solution.picks).map(|(item, &at)| item.candidates[at].bytes).sum();
            assert_eq!(bytes, solution.bytes);
            picked
        };
        assert_eq!(solve(10), [middle, small, middle]);
        assert_eq!(solve(17), [middle, large, middle]);
        assert_eq!(solve(18), [large, small, large]);
        assert_eq!(solve(24), [large, large, large]);
        // What is smallest for each alone is not there for both.
        assert!(minimize_damage(siblings.items(), 9).is_err());
    }

    #[test]
    fn siblings_without_a_common_type_are_refused() {
        let items = [item("q", &[(TensorType::Q2_K, 1, 0.0)]), item("k", &[(TensorType::Q8_0, 1, 0.0)])];
        let error = Siblings::new(&items, |_| Some("one".to_owned())).unwrap_err().to_string();
        assert!(error.contains("q with k"), "{error}");
    }
}
