//! The solver against trying everything, and on cases whose answer is known.

use proptest::prelude::*;

use super::*;

/// Types of the test items, smallest first, with relative squared errors as published for Gaussian weights.
const TYPES: &[(TensorType, f64)] = &[
    (TensorType::IQ1_S, 0.25),
    (TensorType::IQ1_M, 0.2),
    (TensorType::IQ2_XXS, 0.108),
    (TensorType::IQ2_XS, 0.082),
    (TensorType::IQ2_S, 0.0573),
    (TensorType::Q2_K, 0.0688),
    (TensorType::IQ3_XXS, 0.0317),
    (TensorType::Q3_K, 0.0209),
    (TensorType::IQ3_S, 0.0167),
    (TensorType::IQ4_XS, 5.53e-3),
    (TensorType::IQ4_NL, 5.42e-3),
    (TensorType::Q4_0, 6.64e-3),
    (TensorType::Q4_K, 4.93e-3),
    (TensorType::Q4_1, 4.9e-3),
    (TensorType::Q5_0, 1.62e-3),
    (TensorType::Q5_K, 1.21e-3),
    (TensorType::Q5_1, 1.15e-3),
    (TensorType::Q6_K, 2.83e-4),
    (TensorType::Q8_0, 2.3e-5),
    (TensorType::F16, 0.0),
];

fn item(name: &str, rows: u64, row_len: u64, scale: f64) -> Item {
    let candidates = TYPES.iter().map(|(ty, error)| Candidate {
        ty: *ty,
        bytes: (rows * ty.info().unwrap().row_bytes(row_len).unwrap()).next_multiple_of(32),
        damage: scale * error,
    });
    Item { name: name.to_owned(), candidates: candidates.collect() }
}

fn types(items: &[Item], solution: &Solution) -> Vec<TensorType> {
    items.iter().zip(&solution.picks).map(|(item, &pick)| item.candidates[pick].ty).collect()
}

/// Every allocation, as bytes and damage.
fn everything(items: &[Item]) -> Vec<(u64, f64)> {
    items.iter().fold(vec![(0, 0.0)], |sums, item| {
        let add = |(bytes, damage): &(u64, f64)| {
            let (bytes, damage) = (*bytes, *damage);
            item.candidates.iter().map(move |candidate| (bytes + candidate.bytes, damage + candidate.damage))
        };
        sums.iter().flat_map(add).collect()
    })
}

fn small_items() -> impl Strategy<Value = Vec<Item>> {
    // Few distinct numbers, so that ties and dominated choices occur.
    let candidate = (1_u64..12, prop_oneof![(0_u32..8).prop_map(f64::from), 0.0..8.0_f64]);
    let candidates = prop::collection::vec(candidate, 1..5).prop_map(|list| {
        let candidates =
            list.into_iter().map(|(bytes, damage)| Candidate { ty: TensorType::Q4_K, bytes: bytes * 32, damage });
        Item { name: "t".to_owned(), candidates: candidates.collect() }
    });
    prop::collection::vec(candidates, 1..7)
}

proptest! {
    #[test]
    fn least_damage_equals_that_of_trying_everything(items in small_items(), budget in 0_u64..2400) {
        let fitting = everything(&items).into_iter().filter(|sum| sum.0 <= budget);
        let best = fitting.map(|sum| sum.1).min_by(f64::total_cmp);
        match (minimize_damage(&items, budget), best) {
            (Ok(found), Some(best)) => {
                prop_assert!(found.bytes <= budget);
                prop_assert!((found.damage - best).abs() <= 1e-9, "found {}, best {best}", found.damage);
                prop_assert!(found.optimal && found.bound <= found.damage);
            }
            (Err(AllocateError::BudgetTooSmall { smallest, .. }), None) => prop_assert!(smallest > budget),
            other => prop_assert!(false, "{other:?}"),
        }
    }

    #[test]
    fn fewest_bytes_equal_those_of_trying_everything(items in small_items(), limit in 0.0..40.0_f64) {
        let fitting = everything(&items).into_iter().filter(|sum| sum.1 <= limit);
        let best = fitting.map(|sum| sum.0).min();
        match (minimize_bytes(&items, limit), best) {
            (Ok(found), Some(best)) => {
                prop_assert!(found.damage <= limit);
                prop_assert_eq!(found.bytes, best);
                prop_assert!(found.bound <= found.bytes as f64);
            }
            (Err(AllocateError::DamageTooSmall { least, .. }), None) => prop_assert!(least > limit),
            other => prop_assert!(false, "{other:?}"),
        }
    }

    #[test]
    fn a_larger_budget_never_hurts(items in small_items(), budget in 0_u64..1200, more in 0_u64..600) {
        if let Ok(small) = minimize_damage(&items, budget) {
            let large = minimize_damage(&items, budget + more).unwrap();
            prop_assert!(large.damage <= small.damage + 1e-9);
            prop_assert!(large.bound <= small.bound + 1e-9);
        }
    }
}

#[test]
fn equal_tensors_get_equal_types() {
    let items: Vec<Item> = (0..40).map(|at| item(&at.to_string(), 512, 512, 1.0)).collect();
    for bits in [TensorType::IQ3_XXS, TensorType::IQ4_XS, TensorType::Q6_K] {
        let budget = 40 * 512 * bits.info().unwrap().row_bytes(512).unwrap();
        let found = minimize_damage(&items, budget).unwrap();
        assert_eq!(types(&items, &found), vec![bits; 40]);
        assert_eq!(found.bytes, budget);
    }
    // Between two types, no more than two neighbours are in use.
    let found = minimize_damage(&items, 40 * 512 * 512 * 5 / 8).unwrap();
    let mut used = types(&items, &found);
    used.sort();
    used.dedup();
    assert_eq!(used, [TensorType::Q5_K, TensorType::IQ4_XS]);
}

#[test]
fn a_fragile_tensor_gets_its_bits() {
    let mut items: Vec<Item> = (0..30).map(|at| item(&at.to_string(), 256, 512, 1.0)).collect();
    items[17] = item("fragile", 256, 512, 1000.0);
    let found = minimize_damage(&items, 30 * 256 * 512 * 4 / 8).unwrap();
    let types = types(&items, &found);
    assert!(types[17].info().unwrap().bits_per_weight() > 8.0, "{types:?}");
    let others = types.iter().enumerate().filter(|(at, _)| *at != 17);
    assert!(others.clone().all(|(_, ty)| ty.info().unwrap().bits_per_weight() < 5.0), "{types:?}");
}

#[test]
fn dominated_types_are_never_chosen() {
    let items: Vec<Item> = (0..20).map(|at| item(&at.to_string(), 256, 512, 1.0 + f64::from(at))).collect();
    for percent in 10..100 {
        let budget = 20 * 256 * 512 * 16 / 8 * percent / 100;
        let Ok(found) = minimize_damage(&items, budget) else { continue };
        let types = types(&items, &found);
        assert!(!types.contains(&TensorType::Q2_K) && !types.contains(&TensorType::Q4_0), "{types:?}");
    }
}

/// A model of 500 tensors in seven shapes, each with its own damage scale.
fn large_model() -> (Vec<Item>, u64) {
    let shapes = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)];
    let items: Vec<Item> = (0..500_u64)
        .map(|at| {
            let (rows, row_len) = shapes[at as usize % 7];
            // Scales over three orders of magnitude, without a pattern.
            let scale =
                10_f64.powf(-3.0 * (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 11) as f64 / (1_u64 << 53) as f64);
            item(&at.to_string(), rows, row_len, scale)
        })
        .collect();
    let weights = (0..500).map(|at| shapes[at % 7].0 * shapes[at % 7].1).sum();
    (items, weights)
}

#[test]
fn large_models_are_solved_close_to_the_bound() {
    let (items, weights) = large_model();
    for bits in [2.3, 3.1, 3.9, 4.85, 6.57] {
        let budget = (weights as f64 * bits / 8.0) as u64;
        let found = minimize_damage(&items, budget).unwrap();
        let gap = found.relative_gap(found.damage);
        assert!(found.bytes <= budget && found.bytes as f64 > 0.999 * budget as f64);
        assert!((0.0..1e-3).contains(&gap), "{gap}");
        assert_eq!(found, minimize_damage(&items, budget).unwrap());
        let back = minimize_bytes(&items, found.damage).unwrap();
        assert!(back.bytes <= found.bytes || !back.optimal, "{} {}", back.bytes, found.bytes);
    }
}

#[test]
fn a_budget_is_filled_where_that_costs_little() {
    // Few types on few large tensors: many budgets are not met by the best choice.
    let mut items: Vec<Item> = (0..12).map(|at| item(&at.to_string(), 256, 512, 1.0 + 0.1 * f64::from(at))).collect();
    items.iter_mut().for_each(|item| item.candidates.retain(|candidate| candidate.bytes >= 55_000));
    let room = 1100;
    let mut filled_up = 0;
    for budget in (12 * 64_000..12 * 100_000).step_by(5000) {
        let found = minimize_damage(&items, budget).unwrap();
        let filled = fill_budget(&items, &found, budget, room).unwrap();
        assert!(filled.bytes <= budget && filled.damage <= 1.03 * found.damage && filled.damage >= found.damage);
        if filled != found {
            assert!(found.bytes < budget - room && filled.bytes >= budget - room && !filled.optimal);
            filled_up += 1;
        }
    }
    assert!(filled_up > 0);
    let found = minimize_damage(&items, 12 * 80_000).unwrap();
    // What is full, or cannot be filled, stays.
    assert_eq!(fill_budget(&items, &found, found.bytes, 0).unwrap(), found);
    let all = minimize_damage(&items, u64::MAX).unwrap();
    assert_eq!(fill_budget(&items, &all, u64::MAX, 100).unwrap(), all);
}

proptest! {
    #[test]
    fn filling_equals_trying_everything(items in small_items(), budget in 64_u64..1600, room in 0_u64..200) {
        if let Ok(found) = minimize_damage(&items, budget) {
            let filled = fill_budget(&items, &found, budget, room).unwrap();
            let most = found.damage * 1.03;
            let enough = |sum: &(u64, f64)| sum.0 <= budget && sum.0 + room >= budget && sum.1 <= most;
            // Choices that another beats in both bytes and damage do not serve for filling.
            match everything(&frontier(&items)).into_iter().filter(enough).map(|sum| sum.1).min_by(f64::total_cmp) {
                Some(best) => prop_assert!((filled.damage - best).abs() <= 1e-9, "{} {best}", filled.damage),
                None => prop_assert_eq!(filled, found),
            }
        }
    }
}

/// The items without the choices that others beat.
fn frontier(items: &[Item]) -> Vec<Item> {
    let beats = |a: &Candidate, b: &Candidate| {
        a.bytes <= b.bytes && a.damage <= b.damage && (a.bytes, a.damage) != (b.bytes, b.damage)
    };
    let best = |item: &Item| {
        let kept = item.candidates.iter().filter(|one| !item.candidates.iter().any(|other| beats(other, one)));
        Item { name: item.name.clone(), candidates: kept.copied().collect() }
    };
    items.iter().map(best).collect()
}

#[test]
fn malformed_items_are_refused() {
    let mut items = vec![item("a", 256, 256, 1.0)];
    assert!(matches!(minimize_damage(&items, 0), Err(AllocateError::BudgetTooSmall { .. })));
    items[0].candidates[0].damage = f64::NAN;
    assert!(matches!(minimize_damage(&items, 1 << 30), Err(AllocateError::BadDamage { .. })));
    items[0].candidates.clear();
    assert!(matches!(minimize_damage(&items, 1 << 30), Err(AllocateError::NoCandidate { .. })));
    let none = minimize_damage(&[], 0).unwrap();
    assert_eq!((none.bytes, none.damage), (0, 0.0));
}

#[test]
fn a_type_of_infinite_damage_is_never_chosen() {
    let mut items = vec![item("a", 256, 256, 1.0)];
    items[0].candidates[0].damage = f64::INFINITY;
    let smallest = items[0].candidates[0].bytes;
    assert!(minimize_damage(&items, smallest).is_err());
    assert_eq!(byte_range(&items).0, items[0].candidates[1].bytes);
    items[0].candidates.truncate(1);
    assert!(matches!(minimize_damage(&items, 1 << 30), Err(AllocateError::NoCandidate { .. })));
}
