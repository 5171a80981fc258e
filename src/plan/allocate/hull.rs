//! Lower convex hulls of choices, and the linear relaxation that they solve.

use super::class::Class;

/// A step from one hull point of a class to the next, heavier one.
#[derive(Debug, Clone, Copy)]
struct Step {
    class: usize,
    /// Position of the heavier point on the class's frontier.
    to: usize,
    weight: f64,
    /// Cost saved per unit of weight, positive.
    slope: f64,
}

/// The solution of the linear relaxation.
#[derive(Debug, Clone)]
pub(super) struct Relaxed {
    /// For each class a position on its frontier: the last whole hull step within the capacity.
    pub picks: Vec<usize>,
    /// Least cost of the relaxed problem: the maximum of the Lagrange dual.
    pub bound: f64,
    /// The multiplier of that maximum: cost per unit of weight.
    pub lambda: f64,
}

/// Positions of a frontier's points (heavier and cheaper from one to the next) that lie on its lower convex hull.
fn lower_hull(class: &Class) -> Vec<usize> {
    let mut hull: Vec<usize> = Vec::new();
    for at in 0..class.len() {
        while let [.., a, b] = hull[..] {
            let (a, b, c) = (class.point(a), class.point(b), class.point(at));
            // b is below the line from a to c if the slope falls off at b.
            if (b.cost - a.cost) * (c.weight - a.weight) < (c.cost - a.cost) * (b.weight - a.weight) {
                break;
            }
            hull.pop();
        }
        hull.push(at);
    }
    hull
}

/// Solves the relaxation in which a class may mix two hull points; `None` if nothing fits. Steps are taken in the order
/// of cost saved per weight, equal ones in the order of the classes.
pub(super) fn relax(classes: &[Class], capacity: f64) -> Option<Relaxed> {
    let mut picks = vec![0; classes.len()];
    let mut weight: f64 = classes.iter().map(|class| class.point(0).weight).sum();
    if weight > capacity {
        return None;
    }
    let mut bound: f64 = classes.iter().map(|class| class.point(0).cost).sum();
    let mut steps = Vec::new();
    for (number, class) in classes.iter().enumerate() {
        for pair in lower_hull(class).windows(2) {
            let (from, to) = (class.point(pair[0]), class.point(pair[1]));
            let step_weight = to.weight - from.weight;
            let slope = (from.cost - to.cost) / step_weight;
            steps.push(Step { class: number, to: pair[1], weight: step_weight, slope });
        }
    }
    // Slopes fall along a hull, so that the stable order keeps the steps of a class in sequence.
    steps.sort_by(|a, b| b.slope.total_cmp(&a.slope));
    let mut lambda = 0.0;
    for step in &steps {
        if weight + step.weight > capacity {
            lambda = step.slope;
            bound -= step.slope * (capacity - weight);
            break;
        }
        weight += step.weight;
        bound -= step.slope * step.weight;
        picks[step.class] = step.to;
    }
    Some(Relaxed { picks, bound, lambda })
}

#[cfg(test)]
mod tests {
    use super::super::class::Point;
    use super::*;

    fn class(points: &[(f64, f64)]) -> Class {
        Class::new(points.iter().map(|&(weight, cost)| Point { weight, cost }).enumerate())
    }

    #[test]
    fn points_above_the_line_between_others_are_no_hull_points() {
        assert_eq!(lower_hull(&class(&[(1.0, 10.0), (2.0, 8.0), (3.0, 2.0), (4.0, 1.0)])), [0, 2, 3]);
        assert_eq!(lower_hull(&class(&[(1.0, 10.0)])), [0]);
        // On the line counts as above: fewer steps, same bound.
        assert_eq!(lower_hull(&class(&[(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)])), [0, 2]);
    }

    #[test]
    fn the_relaxation_ends_in_a_fraction() {
        let classes = [class(&[(1.0, 10.0), (3.0, 2.0)]), class(&[(1.0, 5.0), (3.0, 3.0)])];
        let relaxed = relax(&classes, 5.0).unwrap();
        assert_eq!((relaxed.picks, relaxed.lambda, relaxed.bound), (vec![1, 0], 1.0, 6.0));
        assert!(relax(&classes, 1.9).is_none());
        let relaxed = relax(&classes, 100.0).unwrap();
        assert_eq!((relaxed.picks, relaxed.lambda, relaxed.bound), (vec![1, 1], 0.0, 5.0));
    }
}
