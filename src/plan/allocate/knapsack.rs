//! The multiple-choice knapsack: one point of each class, least cost within a capacity.

use super::class::Class;
use super::hull;
use super::improve::{improve, total};

/// Most sums kept over all classes, and behind any class: they bound memory and time.
const MAX_STATES: usize = 1 << 22;
const MAX_STATES_PER_CLASS: usize = 1 << 16;

/// Slack for comparing sums that were rounded in another order, relative to the cost.
const ROUNDING: f64 = 1e-12;

/// A solution.
#[derive(Debug, Clone)]
pub(super) struct Found {
    /// For each class the caller's number of the chosen point.
    pub picks: Vec<usize>,
    /// Least cost of the relaxed problem.
    pub bound: f64,
    /// True if the search was complete.
    pub optimal: bool,
}

/// Solves the problem for classes that are not empty; `None` if nothing fits.
pub(super) fn solve(classes: &[Class], capacity: f64) -> Option<Found> {
    let relaxed = hull::relax(classes, capacity)?;
    let mut picks = relaxed.picks.clone();
    improve(classes, &mut picks, capacity);
    let search = Search::new(classes, capacity, relaxed.lambda, relaxed.bound, total(classes, &picks).cost);
    let (better, optimal) = search.run();
    if let Some(better) = better {
        let (old, new) = (total(classes, &picks), total(classes, &better));
        // A search that left sums out may end above what is known.
        if optimal || (new.cost, new.weight) < (old.cost, old.weight) {
            picks = better;
        }
    }
    if !optimal {
        improve(classes, &mut picks, capacity);
    }
    let found = total(classes, &picks).cost;
    let picks = picks.iter().zip(classes).map(|(&pick, class)| class.number(pick)).collect();
    Some(Found { picks, bound: relaxed.bound.min(found), optimal })
}

/// The cheapest choice of points whose weight is at least `least`, if one costs at most `most_cost`; numbers as in
/// [`Found::picks`].
pub(super) fn fill(classes: &[Class], least: f64, capacity: f64, most_cost: f64) -> Option<Vec<usize>> {
    let relaxed = hull::relax(classes, capacity)?;
    let search = Search { least, ..Search::new(classes, capacity, relaxed.lambda, relaxed.bound, most_cost) };
    let (picks, _) = search.run();
    let picks = picks?;
    let sum = total(classes, &picks);
    let fits = sum.weight >= least && sum.weight <= capacity && sum.cost <= most_cost;
    fits.then(|| picks.iter().zip(classes).map(|(&pick, class)| class.number(pick)).collect())
}

/// A sum over the first classes.
#[derive(Debug, Clone, Copy)]
struct State {
    weight: f64,
    cost: f64,
    /// Sum of the reduced costs: what the bound rises by because of these choices.
    excess: f64,
    /// The sum over one class less, and the point added to it.
    parent: u32,
    pick: u32,
}

/// Dynamic programming over all sums that can still end at or below a known cost.
///
/// With multiplier λ, each point has the reduced cost r = cost + λ weight − (the least of its class); a whole solution
/// costs bound + Σ r + λ (capacity − Σ weight). So a sum whose Σ r exceeds known − bound leads to nothing better.
struct Search<'a> {
    classes: &'a [Class],
    capacity: f64,
    lambda: f64,
    /// Most excess that may still lead to a solution at least as good as the known one.
    allowance: f64,
    /// For each class the points worth trying, with their reduced costs.
    points: Vec<Vec<(usize, f64)>>,
    /// Least weight of the classes behind each class.
    weight_behind: Vec<f64>,
    max_states: usize,
    /// Least weight of a solution. Above zero, heavier sums are kept though lighter ones cost less.
    least: f64,
}

impl<'a> Search<'a> {
    fn new(classes: &'a [Class], capacity: f64, lambda: f64, bound: f64, known: f64) -> Search<'a> {
        let allowance = (known - bound).max(0.0) + ROUNDING * known.abs();
        let points = classes
            .iter()
            .map(|class| {
                let value = |at: usize| class.point(at).cost + lambda * class.point(at).weight;
                let least = (0..class.len()).map(value).fold(f64::INFINITY, f64::min);
                let reduced = (0..class.len()).map(|at| (at, value(at) - least));
                reduced.filter(|(_, excess)| *excess <= allowance).collect()
            })
            .collect();
        let mut weight_behind = vec![0.0; classes.len() + 1];
        for (at, class) in classes.iter().enumerate().rev() {
            weight_behind[at] = weight_behind[at + 1] + class.point(0).weight;
        }
        let max_states = (MAX_STATES / classes.len().max(1)).clamp(64, MAX_STATES_PER_CLASS);
        Search { classes, capacity, lambda, allowance, points, weight_behind, max_states, least: 0.0 }
    }

    /// The best solution that it meets, as positions on the frontiers, and whether nothing was left out.
    fn run(&self) -> (Option<Vec<usize>>, bool) {
        let mut optimal = true;
        let mut states = vec![State { weight: 0.0, cost: 0.0, excess: 0.0, parent: 0, pick: 0 }];
        let mut trail: Vec<Vec<(u32, u32)>> = Vec::with_capacity(self.classes.len());
        for number in 0..self.classes.len() {
            states = self.extend(&states, number);
            if states.len() > self.max_states {
                optimal = false;
                self.thin(&mut states);
            }
            trail.push(states.iter().map(|state| (state.parent, state.pick)).collect());
        }
        let enough = states.iter().enumerate().filter(|(_, state)| state.weight >= self.least);
        let Some((mut at, _)) = enough.min_by(|a, b| a.1.cost.total_cmp(&b.1.cost)) else { return (None, optimal) };
        let mut picks = vec![0; self.classes.len()];
        for (pick, layer) in picks.iter_mut().zip(&trail).rev() {
            let (parent, chosen) = layer[at];
            *pick = chosen as usize;
            at = parent as usize;
        }
        (Some(picks), optimal)
    }

    /// All sums of a state and a point of the class that fit and that no other beats, by rising weight.
    fn extend(&self, states: &[State], number: usize) -> Vec<State> {
        let class = &self.classes[number];
        let mut sums = Vec::with_capacity(states.len() * self.points[number].len());
        for &(at, reduced) in &self.points[number] {
            let point = class.point(at);
            sums.extend(states.iter().enumerate().filter_map(|(parent, state)| {
                let (weight, cost) = (state.weight + point.weight, state.cost + point.cost);
                let excess = state.excess + reduced;
                let worthwhile = excess <= self.allowance && weight + self.weight_behind[number + 1] <= self.capacity;
                worthwhile.then_some(State { weight, cost, excess, parent: parent as u32, pick: at as u32 })
            }));
        }
        // Each point's sums are sorted already: the stable sort merges these runs.
        sums.sort_by(|a, b| a.weight.total_cmp(&b.weight).then(a.cost.total_cmp(&b.cost)));
        if self.least > 0.0 {
            sums.dedup_by(|later, first| later.weight == first.weight);
            return sums;
        }
        let mut least = f64::INFINITY;
        sums.retain(|state| {
            let better = state.cost < least;
            least = least.min(state.cost);
            better
        });
        sums
    }

    /// Keeps the most promising sum of each of equally wide ranges of weight, and the ends.
    fn thin(&self, states: &mut Vec<State>) {
        let (Some(first), Some(last)) = (states.first(), states.last()) else { return };
        let (start, width) = (first.weight, (last.weight - first.weight) / self.max_states as f64);
        let range = |state: &State| ((state.weight - start) / width) as u64;
        let promise = |state: &State| state.cost + self.lambda * state.weight;
        let mut kept: Vec<State> = Vec::with_capacity(self.max_states + 2);
        for state in states.iter() {
            match kept.last_mut() {
                Some(best) if range(best) == range(state) => {
                    if promise(state) < promise(best) {
                        *best = *state;
                    }
                }
                _ => kept.push(*state),
            }
        }
        *states = kept;
    }
}

#[cfg(test)]
mod tests {
    use super::super::class::Point;
    use super::*;

    /// Classes whose sums all differ: weights are powers of two, costs irregular.
    fn spread_classes() -> Vec<Class> {
        let class = |number: u32| {
            let points = (0..3).map(|at| {
                let weight = f64::from((at + 1) << number);
                Point { weight, cost: (30.0 - weight.sqrt()) * (1.0 + 0.01 * f64::from(at * number)) }
            });
            Class::new(points.enumerate())
        };
        (0..8).map(class).collect()
    }

    #[test]
    fn a_search_that_leaves_sums_out_says_so_and_stays_within_the_capacity() {
        let classes = spread_classes();
        let capacity = 400.0;
        let best = solve(&classes, capacity).unwrap();
        assert!(best.optimal);
        // A wide allowance and room for few sums.
        let mut search = Search::new(&classes, capacity, 0.0, 0.0, 1e9);
        search.max_states = 5;
        let (picks, optimal) = search.run();
        let sum = total(&classes, &picks.unwrap());
        assert!(!optimal && sum.weight <= capacity);
        let cost: f64 = best
            .picks
            .iter()
            .zip(&classes)
            .map(|(&pick, class)| class.points.iter().find(|(number, _)| *number == pick).unwrap().1.cost)
            .sum();
        assert!(sum.cost >= cost);
    }
}
