//! Which experts a token goes to, and with what weights.

use super::arch::Gating;
use super::hparams::Experts;
use super::math;

/// Smallest normal binary16 number, below which llama.cpp does not let the sum of expert weights fall.
pub(super) const LEAST_WEIGHT_SUM: f32 = 6.103_515_6e-5;

/// The experts of some tokens.
#[derive(Debug, PartialEq)]
pub(super) struct Routing {
    /// Experts per token.
    used: usize,
    /// Their numbers, `[n, used]`, best first.
    chosen: Vec<u32>,
    /// Their weights, `[n, used]`.
    weights: Vec<f32>,
}

/// How experts are chosen.
#[derive(Clone, Copy)]
pub(super) struct Choice<'a> {
    pub params: Experts,
    /// Added to the scores for the choice, not for the weights.
    pub bias: Option<&'a [f32]>,
    /// The router's outputs decide, before any function is applied to them.
    pub by_logits: bool,
    /// Experts that are taken whatever the scores say, `[n, used]`.
    pub forced: Option<&'a [u32]>,
}

impl Choice<'_> {
    /// Chooses the experts of every row of `scores`, `[n, count]`; equal scores go to the lower number.
    pub(super) fn route(&self, scores: &mut [f32]) -> Routing {
        let Experts { count, used, .. } = self.params;
        let n = scores.len() / count;
        let mut routing = Routing { used, chosen: Vec::with_capacity(n * used), weights: Vec::with_capacity(n * used) };
        let mut order: Vec<u32> = Vec::new();
        let mut deciding: Vec<f32> = Vec::new();
        for (token, row) in scores.chunks_exact_mut(count).enumerate() {
            deciding.clear();
            deciding.extend_from_slice(row);
            match self.params.gating {
                Gating::Softmax | Gating::SoftmaxNormalized => math::soft_max(row, None),
                Gating::Sigmoid | Gating::SigmoidNormalized => row.iter_mut().for_each(|x| *x = math::sigmoid(*x)),
                Gating::SqrtSoftplus | Gating::SqrtSoftplusNormalized => {
                    row.iter_mut().for_each(|x| *x = math::softplus(*x).sqrt());
                }
                Gating::SoftmaxOfChosen => {}
            }
            if !self.by_logits {
                deciding.copy_from_slice(row);
            }
            order.clear();
            match self.forced {
                Some(forced) => order.extend_from_slice(&forced[token * used..][..used]),
                None => self.best(&mut deciding, &mut order),
            }
            let chosen = &order[..used];
            let mut weights: Vec<f32> = chosen.iter().map(|&e| row[e as usize]).collect();
            self.finish(&mut weights);
            routing.chosen.extend_from_slice(chosen);
            routing.weights.extend_from_slice(&weights);
        }
        routing
    }

    /// All experts by their score, best first.
    fn best(&self, scores: &mut [f32], order: &mut Vec<u32>) {
        if let Some(bias) = self.bias {
            math::add(scores, bias);
        }
        if let Some((groups, chosen)) = self.params.groups {
            keep_best_groups(scores, groups, chosen);
        }
        order.extend(0..scores.len() as u32);
        order.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]));
    }

    /// The weights of one token's experts from their scores.
    fn finish(&self, weights: &mut [f32]) {
        let gating = self.params.gating;
        if gating == Gating::SoftmaxOfChosen {
            math::soft_max(weights, None);
        } else if gating.is_normalized() {
            let sum = weights.iter().sum::<f32>().max(LEAST_WEIGHT_SUM);
            weights.iter_mut().for_each(|w| *w /= sum);
        }
        weights.iter_mut().for_each(|w| *w *= self.params.scale);
    }
}

impl Routing {
    /// The experts of all tokens, `[n, used]`.
    pub(super) fn chosen(&self) -> &[u32] {
        &self.chosen
    }

    /// Their weights, `[n, used]`.
    pub(super) fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// Experts per token.
    pub(super) fn used(&self) -> usize {
        self.used
    }

    /// Which of the experts of `token` is number `expert`, one that it chose.
    pub(super) fn slot(&self, token: usize, expert: usize) -> usize {
        let chosen = &self.chosen[token * self.used..][..self.used];
        chosen.iter().position(|&of| of as usize == expert).expect("the token chose the expert")
    }

    /// Tokens and weights of each of `count` experts, tokens ascending. With `all`, every token goes to every expert, with no
    /// weight where it did not choose it.
    pub(super) fn per_expert(&self, count: usize, all: bool) -> Vec<Vec<(usize, f32)>> {
        let mut per_expert = vec![Vec::new(); count];
        let tokens = self.chosen.chunks_exact(self.used).zip(self.weights.chunks_exact(self.used)).enumerate();
        for (token, (chosen, weights)) in tokens {
            if all {
                per_expert.iter_mut().for_each(|assigned| assigned.push((token, 0.0)));
            }
            for (&expert, &weight) in chosen.iter().zip(weights) {
                let assigned: &mut Vec<(usize, f32)> = &mut per_expert[expert as usize];
                if all {
                    assigned.pop();
                }
                assigned.push((token, weight));
            }
        }
        per_expert
    }
}

/// Sets the scores of all but the `chosen` best of `groups` groups to minus infinity; a group is as good as its two best
/// experts together.
fn keep_best_groups(scores: &mut [f32], groups: usize, chosen: usize) {
    let size = scores.len() / groups;
    let best_two = |group: &[f32]| {
        let mut sorted = group.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        sorted.iter().take(2).sum::<f32>()
    };
    let sums: Vec<f32> = scores.chunks_exact(size).map(best_two).collect();
    let mut order: Vec<usize> = (0..groups).collect();
    order.sort_by(|&a, &b| sums[b].total_cmp(&sums[a]));
    for &group in &order[chosen..] {
        scores[group * size..][..size].fill(f32::NEG_INFINITY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCORES: [f32; 4] = [0.0, std::f32::consts::LN_2, 0.0, 1.098_612_3];

    fn choice(gating: Gating) -> Choice<'static> {
        let params = Experts { count: 4, used: 2, n_ff: None, shared_n_ff: None, gating, scale: 1.0, groups: None };
        Choice { params, bias: None, by_logits: false, forced: None }
    }

    /// The weight of each expert.
    fn weights(choice: Choice) -> [f32; 4] {
        let routing = choice.route(&mut SCORES.clone());
        let per_expert = routing.per_expert(4, false);
        std::array::from_fn(|e| per_expert[e].first().map_or(0.0, |&(_, w)| w))
    }

    fn close(a: [f32; 4], b: [f32; 4]) -> bool {
        a.iter().zip(&b).all(|(x, y)| (x - y).abs() < 1e-6)
    }

    #[test]
    fn weights_follow_the_gating_rule() {
        let plain = |gating| weights(choice(gating));
        assert!(close(plain(Gating::Softmax), [0.0, 2.0 / 7.0, 0.0, 3.0 / 7.0]));
        assert!(close(plain(Gating::SoftmaxNormalized), [0.0, 0.4, 0.0, 0.6]));
        assert!(close(plain(Gating::SoftmaxOfChosen), [0.0, 0.4, 0.0, 0.6]));
        assert!(close(plain(Gating::Sigmoid), [0.0, 2.0 / 3.0, 0.0, 0.75]));
        assert!(close(plain(Gating::SigmoidNormalized), [0.0, 8.0 / 17.0, 0.0, 9.0 / 17.0]));
        let roots = [3f32.ln().sqrt(), 4f32.ln().sqrt()];
        assert!(close(plain(Gating::SqrtSoftplus), [0.0, roots[0], 0.0, roots[1]]));
        let mut scaled = choice(Gating::SigmoidNormalized);
        scaled.params.scale = 2.5;
        assert!(close(weights(scaled), [0.0, 20.0 / 17.0, 0.0, 22.5 / 17.0]));
    }

    #[test]
    fn bias_and_groups_choose_and_scores_weigh() {
        let biased = Choice { bias: Some(&[1.0, 0.0, 0.9, 0.0]), ..choice(Gating::Sigmoid) };
        assert!(close(weights(biased), [0.5, 0.0, 0.5, 0.0]));
        // Of two groups of two the one with the better sum.
        let mut grouped = choice(Gating::Sigmoid);
        grouped.params.groups = Some((2, 1));
        assert!(close(weights(grouped), [0.0, 0.0, 0.5, 0.75]));
    }

    #[test]
    fn forced_experts_are_weighed_by_the_own_scores() {
        let forced = Choice { forced: Some(&[2, 1]), ..choice(Gating::Softmax) };
        assert!(close(weights(forced), [0.0, 2.0 / 7.0, 1.0 / 7.0, 0.0]));
        assert_eq!(forced.route(&mut SCORES.clone()).chosen(), [2, 1]);
    }

    #[test]
    fn logits_decide_where_sigmoids_are_equal() {
        let mut saturated = [200.0, 100.0, 300.0, 0.0];
        let by_logits = Choice { by_logits: true, ..choice(Gating::Sigmoid) };
        assert_eq!(by_logits.route(&mut saturated).chosen(), [2, 0]);
    }

    #[test]
    fn all_experts_see_every_token_and_keep_their_weights() {
        let routing = choice(Gating::SoftmaxNormalized).route(&mut [SCORES, SCORES].concat());
        let per_expert = routing.per_expert(4, true);
        assert!(per_expert.iter().all(|assigned| assigned.iter().map(|&(token, _)| token).eq(0..2)));
        assert_eq!(per_expert[0], [(0, 0.0), (1, 0.0)]);
        assert_eq!(per_expert[3], [(0, per_expert[3][0].1), (1, per_expert[3][0].1)]);
        assert!((per_expert[3][0].1 - 0.6).abs() < 1e-6);
    }
}
