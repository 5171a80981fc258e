//! What there is to choose from: a class of points for each item.

/// A choice: what it takes of the capacity and what it costs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Point {
    pub weight: f64,
    pub cost: f64,
}

/// The frontier of a class: its points that no other beats in weight and cost, from light and dear to heavy and cheap.
#[derive(Debug, Clone)]
pub(super) struct Class {
    pub(super) points: Vec<(usize, Point)>,
}

impl Class {
    /// From points with the numbers by which the caller knows them. Of equal points the first stays.
    pub(super) fn new(points: impl Iterator<Item = (usize, Point)>) -> Class {
        let mut points: Vec<(usize, Point)> = points.collect();
        points.sort_by(|(_, a), (_, b)| a.weight.total_cmp(&b.weight).then(a.cost.total_cmp(&b.cost)));
        let mut least = f64::INFINITY;
        points.retain(|(_, point)| {
            let better = point.cost < least;
            least = least.min(point.cost);
            better
        });
        Class { points }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.points.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.points.len()
    }

    pub(super) fn point(&self, at: usize) -> Point {
        self.points[at].1
    }

    /// The caller's number of a point.
    pub(super) fn number(&self, at: usize) -> usize {
        self.points[at].0
    }
}
