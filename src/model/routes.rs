//! Which experts every token goes to, recorded in one pass and compared with, or forced on, another.

use std::ops::Range;

use super::taps::{ChosenExperts, Taps};

/// The experts of all tokens of a group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Routes {
    /// Experts per token.
    used: usize,
    /// By layer, `[n, used]`; empty in layers without experts.
    layers: Vec<Vec<u32>>,
}

impl Routes {
    /// Layers that have experts.
    pub fn n_layers(&self) -> usize {
        self.layers.iter().filter(|layer| !layer.is_empty()).count()
    }

    /// The experts of `rows` in `layer`, `[rows.len(), used]`.
    fn of(&self, layer: usize, rows: Range<usize>) -> Option<&[u32]> {
        self.layers.get(layer)?.get(rows.start * self.used..rows.end * self.used)
    }
}

/// Records.
impl Taps for Routes {
    fn wants(&self, _tensor: &str) -> bool {
        false
    }

    fn chosen_experts(&mut self, chosen: &ChosenExperts<'_>) {
        self.used = chosen.used;
        if self.layers.len() <= chosen.layer {
            self.layers.resize(chosen.layer + 1, Vec::new());
        }
        let layer = &mut self.layers[chosen.layer];
        layer.truncate(chosen.first_row * chosen.used);
        layer.extend_from_slice(chosen.experts);
    }
}

/// Compares a pass with the routes of another.
#[derive(Debug)]
pub struct RouteFlips<'a> {
    routes: &'a Routes,
    flips: Vec<u16>,
}

impl<'a> RouteFlips<'a> {
    /// Compares with `routes` the tokens of a group of `tokens`.
    pub fn new(routes: &'a Routes, tokens: usize) -> Self {
        RouteFlips { routes, flips: vec![0; tokens] }
    }

    /// For each token, the layers that sent it to other experts.
    pub fn flips(&self) -> &[u16] {
        &self.flips
    }
}

impl Taps for RouteFlips<'_> {
    fn wants(&self, _tensor: &str) -> bool {
        false
    }

    fn chosen_experts(&mut self, chosen: &ChosenExperts<'_>) {
        let rows = chosen.first_row..chosen.first_row + chosen.experts.len() / chosen.used;
        let Some(expected) = self.routes.of(chosen.layer, rows.clone()) else { return };
        let tokens = chosen.experts.chunks_exact(chosen.used).zip(expected.chunks_exact(chosen.used));
        for (flips, (found, expected)) in self.flips[rows].iter_mut().zip(tokens) {
            // Their order is that of scores, which says nothing of the output.
            if found.iter().any(|expert| !expected.contains(expert)) {
                *flips = flips.saturating_add(1);
            }
        }
    }
}

/// Forces the routes of another pass on a pass.
#[derive(Debug)]
pub struct ForcedRoutes<'a>(pub &'a Routes);

impl Taps for ForcedRoutes<'_> {
    fn wants(&self, _tensor: &str) -> bool {
        false
    }

    fn forced_experts(&self, layer: usize, rows: Range<usize>, used: usize) -> Option<&[u32]> {
        self.0.of(layer, rows).filter(|_| used == self.0.used)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(first_row: usize, experts: &[u32]) -> ChosenExperts<'_> {
        ChosenExperts { layer: 1, first_row, count: 4, used: 2, experts }
    }

    #[test]
    fn flips_count_layers_with_other_experts_in_any_order() {
        let mut routes = Routes::default();
        routes.chosen_experts(&chosen(0, &[0, 1, 2, 3]));
        routes.chosen_experts(&chosen(2, &[1, 2]));
        assert_eq!(routes.n_layers(), 1);
        let mut flips = RouteFlips::new(&routes, 3);
        flips.chosen_experts(&chosen(0, &[1, 0]));
        flips.chosen_experts(&chosen(1, &[2, 0, 2, 1]));
        assert_eq!(flips.flips(), [0, 1, 0]);
    }

    #[test]
    fn forced_routes_are_those_recorded() {
        let mut routes = Routes::default();
        routes.chosen_experts(&chosen(0, &[0, 1, 2, 3]));
        let forced = ForcedRoutes(&routes);
        assert_eq!(forced.forced_experts(1, 1..2, 2), Some(&[2, 3][..]));
        assert_eq!(forced.forced_experts(0, 0..1, 2), None);
        assert_eq!(forced.forced_experts(1, 1..3, 2), None);
        assert_eq!(forced.forced_experts(1, 0..1, 3), None);
    }
}
