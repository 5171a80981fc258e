//! Local search: upgrades and exchanges that use the capacity which is left.

use super::class::{Class, Point};

/// Most rounds of improvement. Each round lowers the cost; far fewer are needed in practice.
const MAX_ROUNDS: usize = 10_000;

/// A change of one class to another point of its frontier.
#[derive(Debug, Clone, Copy)]
struct Move {
    class: usize,
    to: usize,
    weight: f64,
    cost: f64,
}

/// Improves `picks` (positions on the frontiers) until no change of one class, and no change of one class paid for by
/// a change of another, lowers the cost within `capacity`. Always takes the change that saves most.
pub(super) fn improve(classes: &[Class], picks: &mut [usize], capacity: f64) {
    for _ in 0..MAX_ROUNDS {
        let left = capacity - total(classes, picks).weight;
        let Some((first, second)) = best_change(classes, picks, left) else { return };
        let before = (total(classes, picks).cost, picks[first.class]);
        picks[first.class] = first.to;
        let undo_second = second.map(|second| (second.class, std::mem::replace(&mut picks[second.class], second.to)));
        let after = total(classes, picks);
        // Differences are rounded, sums decide.
        if after.weight > capacity || after.cost >= before.0 {
            picks[first.class] = before.1;
            if let Some((class, old)) = undo_second {
                picks[class] = old;
            }
            return;
        }
    }
}

/// Sums over the classes, in their order.
pub(super) fn total(classes: &[Class], picks: &[usize]) -> Point {
    classes.iter().zip(picks).fold(Point { weight: 0.0, cost: 0.0 }, |sum, (class, &pick)| {
        let point = class.point(pick);
        Point { weight: sum.weight + point.weight, cost: sum.cost + point.cost }
    })
}

/// The move, or pair of moves, that saves most cost and adds at most `left` weight.
fn best_change(classes: &[Class], picks: &[usize], left: f64) -> Option<(Move, Option<Move>)> {
    let mut cheaper = Vec::new();
    let mut lighter = Vec::new();
    for (number, (class, &pick)) in classes.iter().zip(picks).enumerate() {
        let now = class.point(pick);
        for to in (0..class.len()).filter(|to| *to != pick) {
            let point = class.point(to);
            let change = Move { class: number, to, weight: point.weight - now.weight, cost: point.cost - now.cost };
            // A frontier is ordered: heavier points are cheaper.
            if to > pick { cheaper.push(change) } else { lighter.push(change) }
        }
    }
    // For each freed weight the two least costly moves of different classes that free at least as much.
    lighter.sort_by(|a, b| a.weight.total_cmp(&b.weight));
    let mut least: Vec<[Option<Move>; 2]> = Vec::with_capacity(lighter.len());
    let mut best: [Option<Move>; 2] = [None, None];
    for change in &lighter {
        best = match best {
            [None, _] => [Some(*change), None],
            [Some(a), b] if change.class == a.class => [Some(if change.cost < a.cost { *change } else { a }), b],
            [Some(a), _] if change.cost < a.cost => [Some(*change), Some(a)],
            [Some(a), Some(b)] => [Some(a), Some(if change.cost < b.cost { *change } else { b })],
            [Some(a), None] => [Some(a), Some(*change)],
        };
        least.push(best);
    }
    let mut found: Option<(f64, Move, Option<Move>)> = None;
    for up in cheaper {
        let (cost, down) = if up.weight <= left {
            (up.cost, None)
        } else {
            let enough = lighter.partition_point(|down| up.weight + down.weight <= left);
            let Some(pair) = enough.checked_sub(1).map(|at| least[at]) else { continue };
            let Some(down) = pair.into_iter().flatten().find(|down| down.class != up.class) else { continue };
            (up.cost + down.cost, Some(down))
        };
        if cost < found.map_or(0.0, |found| found.0) {
            found = Some((cost, up, down));
        }
    }
    found.map(|(_, up, down)| (up, down))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(points: &[(f64, f64)]) -> Class {
        Class::new(points.iter().map(|&(weight, cost)| Point { weight, cost }).enumerate())
    }

    #[test]
    fn what_is_left_is_used() {
        let classes = [class(&[(1.0, 10.0), (3.0, 2.0)]), class(&[(1.0, 5.0), (2.0, 3.0)])];
        let mut picks = vec![0, 0];
        improve(&classes, &mut picks, 4.0);
        assert_eq!(picks, [1, 0]);
    }

    #[test]
    fn one_gives_what_another_needs() {
        let classes = [class(&[(1.0, 10.0), (4.0, 1.0)]), class(&[(1.0, 5.0), (3.0, 3.0)])];
        let mut picks = vec![0, 1];
        improve(&classes, &mut picks, 5.0);
        assert_eq!(picks, [1, 0]);
    }
}
