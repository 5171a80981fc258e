//! KL divergence of a model from its reference, and the figures that llama-perplexity prints beside it.

use serde::{Deserialize, Serialize};

use crate::model::math::{divergence_sum, log_sum_exp, max};

/// What is kept of a scored prediction.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct ScoredToken {
    /// Negative log-likelihood of the token that follows, in nats.
    pub nll: f32,
    /// The same of the reference.
    pub nll_base: f32,
    /// KL divergence of the predicted distribution from the reference's, in nats.
    pub kld: f32,
    /// The most likely token is the reference's.
    pub same_top: bool,
    /// How the experts that it went to differ from the reference's.
    pub routing: TokenRouting,
}

/// The experts of a scored prediction against the reference's.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct TokenRouting {
    /// Layers that sent it to other experts.
    pub flips: u16,
    /// KL divergence with the reference's experts forced on the model, in nats; NaN where that was not asked for.
    pub forced_kld: f32,
}

impl ScoredToken {
    /// Compares a row of logits with the reference's. `base` holds logits with `base_lse` their log-sum-exp; or
    /// log-probabilities with `base_lse` 0, where entries at or below `cut` are left out of the divergence.
    ///
    /// # Panics
    /// When `target` is not in the rows.
    pub(crate) fn compare(base: &[f32], base_lse: f64, logits: &[f32], target: usize, cut: f32) -> ScoredToken {
        let lse = log_sum_exp(logits);
        let kld = divergence_sum(base, base_lse as f32, logits, (base_lse - lse) as f32, cut);
        ScoredToken {
            nll: (lse - f64::from(logits[target])) as f32,
            nll_base: (base_lse - f64::from(base[target])) as f32,
            kld: kld as f32,
            same_top: first_maximum(base) == first_maximum(logits),
            routing: TokenRouting::default(),
        }
    }

    /// Difference of the probabilities of the token that follows.
    pub(crate) fn delta_p(&self) -> f64 {
        f64::from(-self.nll).exp() - f64::from(-self.nll_base).exp()
    }
}

fn first_maximum(row: &[f32]) -> Option<usize> {
    let largest = max(row);
    row.iter().position(|&v| v == largest)
}

/// Scored predictions of one model against the reference, in the order of the text.
#[derive(Clone, Debug, Default)]
pub(crate) struct Divergence {
    /// One entry a prediction.
    pub tokens: Vec<ScoredToken>,
    /// Layers with experts, where model and reference have some and routes were compared.
    pub routed_layers: usize,
}

/// Extremes and percentiles of a series, interpolated linearly.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Percentiles {
    /// Largest value.
    pub maximum: f64,
    /// 99.9th percentile.
    pub p99_9: f64,
    /// 99th percentile.
    pub p99: f64,
    /// 95th percentile.
    pub p95: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 75th percentile.
    pub p75: f64,
    /// Median.
    pub median: f64,
    /// 25th percentile.
    pub p25: f64,
    /// 10th percentile.
    pub p10: f64,
    /// 5th percentile.
    pub p5: f64,
    /// 1st percentile.
    pub p1: f64,
    /// 0.1th percentile.
    pub p0_1: f64,
    /// Smallest value.
    pub minimum: f64,
}

/// The figures of llama-perplexity's `--kl-divergence`. Every `_error` is a standard error that takes tokens as
/// independent; shares and probabilities are fractions of 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DivergenceSummary {
    /// Perplexity of the model.
    pub ppl: f64,
    /// Its standard error.
    pub ppl_error: f64,
    /// Perplexity of the reference.
    pub ppl_base: f64,
    /// Its standard error.
    pub ppl_base_error: f64,
    /// `ln(PPL(Q) / PPL(base))`.
    pub log_ppl_ratio: f64,
    /// Its standard error, with the covariance of the two.
    pub log_ppl_ratio_error: f64,
    /// `PPL(Q) / PPL(base)`.
    pub ppl_ratio: f64,
    /// Its standard error.
    pub ppl_ratio_error: f64,
    /// `PPL(Q) - PPL(base)`.
    pub ppl_difference: f64,
    /// Its standard error.
    pub ppl_difference_error: f64,
    /// Correlation of the negative log-likelihoods of model and reference.
    pub correlation: f64,
    /// Mean KL divergence, nats a token.
    pub mean_kld: f64,
    /// Its standard error.
    pub mean_kld_error: f64,
    /// Median KL divergence.
    pub median_kld: f64,
    /// Percentiles of the KL divergence.
    pub kld: Percentiles,
    /// Mean change of the probability of the token that follows.
    pub mean_delta_p: f64,
    /// Its standard error.
    pub mean_delta_p_error: f64,
    /// Root mean square of that change.
    pub rms_delta_p: f64,
    /// Its standard error.
    pub rms_delta_p_error: f64,
    /// Percentiles of that change.
    pub delta_p: Percentiles,
    /// Share of predictions whose most likely token is the reference's.
    pub same_top_p: f64,
    /// Its standard error.
    pub same_top_p_error: f64,
    /// Predictions scored.
    pub tokens: usize,
    /// What became of the routing, for mixtures of experts beside their reference.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub routing: Option<RoutingSummary>,
}

/// How the choice of experts differs from the reference's. A token whose experts change diverges by far more than others; with
/// the reference's experts forced on the model, what is left is the damage of the weights.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoutingSummary {
    /// Share of token-layers, a scored prediction in a layer with experts each, whose chosen experts differ.
    pub flips: f64,
    /// Share of predictions with a layer whose experts differ.
    pub tokens_flipped: f64,
    /// Mean KL divergence of the predictions without any.
    pub steady_mean_kld: f64,
    /// Mean KL divergence with the reference's experts forced on the model, where that was run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forced_mean_kld: Option<f64>,
    /// Its standard error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forced_mean_kld_error: Option<f64>,
    /// Median KL divergence with the reference's experts forced on the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forced_median_kld: Option<f64>,
}

/// Mean and standard error of a sum.
#[derive(Clone, Copy, Default)]
struct Moments {
    n: f64,
    sum: f64,
    squares: f64,
}

impl Moments {
    fn of(values: impl Iterator<Item = f64>) -> Moments {
        values.fold(Moments::default(), |m, v| Moments { n: m.n + 1.0, sum: m.sum + v, squares: m.squares + v * v })
    }

    fn mean(&self) -> f64 {
        self.sum / self.n.max(1.0)
    }

    /// Standard error of the mean; 0 for ten values and fewer, as llama-perplexity has it.
    fn error(&self) -> f64 {
        let variance = self.squares / self.n - self.mean() * self.mean();
        if self.n > 10.0 && variance > 0.0 { (variance / (self.n - 1.0)).sqrt() } else { 0.0 }
    }
}

impl Divergence {
    /// Mean KL divergence, nats a token.
    pub(crate) fn mean_kld(&self) -> f64 {
        Moments::of(self.tokens.iter().map(|t| f64::from(t.kld))).mean()
    }

    /// All figures; `None` before the first prediction.
    pub(crate) fn summary(&self) -> Option<DivergenceSummary> {
        if self.tokens.is_empty() {
            return None;
        }
        let n = self.tokens.len() as f64;
        let nll = Moments::of(self.tokens.iter().map(|t| f64::from(t.nll)));
        let nll_base = Moments::of(self.tokens.iter().map(|t| f64::from(t.nll_base)));
        let product: f64 = self.tokens.iter().map(|t| f64::from(t.nll) * f64::from(t.nll_base)).sum();
        let covariance = if n < 10.0 { 0.0 } else { (product / n - nll.mean() * nll_base.mean()) / (n - 1.0) };
        let errors = nll.error() * nll_base.error();
        let (ppl, ppl_base) = (nll.mean().exp(), nll_base.mean().exp());
        let (ppl_error, ppl_base_error) = (ppl * nll.error(), ppl_base * nll_base.error());
        let log_ratio = nll.mean() - nll_base.mean();
        let log_ratio_error = root(nll.error().powi(2) + nll_base.error().powi(2) - 2.0 * covariance);

        let mut klds: Vec<f64> = self.tokens.iter().map(|t| f64::from(t.kld)).collect();
        let mut deltas: Vec<f64> = self.tokens.iter().map(ScoredToken::delta_p).collect();
        let kld = Moments::of(klds.iter().copied());
        let delta = Moments::of(deltas.iter().copied());
        let squared = Moments::of(deltas.iter().map(|d| d * d));
        klds.sort_by(f64::total_cmp);
        deltas.sort_by(f64::total_cmp);
        let rms = squared.mean().sqrt();
        let same_top = self.tokens.iter().filter(|t| t.same_top).count() as f64 / n;
        Some(DivergenceSummary {
            ppl,
            ppl_error,
            ppl_base,
            ppl_base_error,
            log_ppl_ratio: log_ratio,
            log_ppl_ratio_error: log_ratio_error,
            ppl_ratio: log_ratio.exp(),
            ppl_ratio_error: log_ratio.exp() * log_ratio_error,
            ppl_difference: ppl - ppl_base,
            ppl_difference_error: root(ppl_error.powi(2) + ppl_base_error.powi(2) - 2.0 * ppl * ppl_base * covariance),
            correlation: if errors > 0.0 { covariance / errors } else { 1.0 },
            mean_kld: kld.mean(),
            mean_kld_error: kld.error(),
            median_kld: percentile(&klds, 0.5),
            kld: Percentiles::of(&klds),
            mean_delta_p: delta.mean(),
            mean_delta_p_error: delta.error(),
            rms_delta_p: rms,
            rms_delta_p_error: if rms > 0.0 { 0.5 / rms * squared.error() } else { 0.0 },
            delta_p: Percentiles::of(&deltas),
            same_top_p: same_top,
            same_top_p_error: if n > 1.0 { (same_top * (1.0 - same_top) / (n - 1.0)).sqrt() } else { 0.0 },
            tokens: self.tokens.len(),
            routing: self.routing(),
        })
    }

    /// What became of the routing; `None` where no routes were compared.
    fn routing(&self) -> Option<RoutingSummary> {
        let n = self.tokens.len() as f64;
        let layers = Some(self.routed_layers as f64).filter(|&layers| layers > 0.0)?;
        let flips: f64 = self.tokens.iter().map(|t| f64::from(t.routing.flips)).sum();
        let steady = self.tokens.iter().filter(|t| t.routing.flips == 0);
        let steady = Moments::of(steady.map(|t| f64::from(t.kld)));
        let mut forced: Vec<f64> = self.tokens.iter().map(|t| f64::from(t.routing.forced_kld)).collect();
        let was_forced = forced.iter().all(|kld| !kld.is_nan());
        let moments = Moments::of(forced.iter().copied());
        forced.sort_by(f64::total_cmp);
        Some(RoutingSummary {
            flips: flips / (n * layers),
            tokens_flipped: 1.0 - steady.n / n,
            steady_mean_kld: steady.mean(),
            forced_mean_kld: was_forced.then(|| moments.mean()),
            forced_mean_kld_error: was_forced.then(|| moments.error()),
            forced_median_kld: was_forced.then(|| percentile(&forced, 0.5)),
        })
    }
}

impl Percentiles {
    /// Those of sorted values, of which there is at least one.
    fn of(sorted: &[f64]) -> Percentiles {
        let at = |fraction| percentile(sorted, fraction);
        Percentiles {
            maximum: at(1.0),
            p99_9: at(0.999),
            p99: at(0.99),
            p95: at(0.95),
            p90: at(0.9),
            p75: at(0.75),
            median: at(0.5),
            p25: at(0.25),
            p10: at(0.1),
            p5: at(0.05),
            p1: at(0.01),
            p0_1: at(0.001),
            minimum: at(0.0),
        }
    }
}

/// The differences below can round to a little under zero.
fn root(variance: f64) -> f64 {
    variance.max(0.0).sqrt()
}

/// Linear interpolation at `fraction * (n - 1)` of sorted values.
fn percentile(sorted: &[f64], fraction: f64) -> f64 {
    let place = fraction * (sorted.len() - 1) as f64;
    let below = place as usize;
    let above = (below + 1).min(sorted.len() - 1);
    let share = place - below as f64;
    (1.0 - share) * sorted[below] + share * sorted[above]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_does_not_diverge_from_itself() {
        let row: Vec<f32> = (0..100).map(|i| (i as f32 * 0.7).sin() * 9.0).collect();
        let token = ScoredToken::compare(&row, log_sum_exp(&row), &row, 7, f32::NEG_INFINITY);
        assert_eq!((token.kld, token.same_top, token.delta_p()), (0.0, true, 0.0));
        assert_eq!(token.nll, token.nll_base);
    }

    #[test]
    fn summary_follows_the_definitions() {
        let tokens: Vec<ScoredToken> = (0..20)
            .map(|i| ScoredToken {
                nll: 1.0 + i as f32 * 0.1,
                nll_base: 1.0 + i as f32 * 0.08,
                kld: i as f32 * 0.01,
                same_top: i % 4 != 0,
                routing: TokenRouting { flips: u16::from(i == 19), forced_kld: i as f32 * 0.005 },
            })
            .collect();
        let s = Divergence { tokens: tokens.clone(), routed_layers: 0 }.summary().unwrap();
        assert!(s.routing.is_none());
        assert!((s.ppl - 1.95f64.exp()).abs() < 1e-6);
        assert!((s.ppl_base - 1.76f64.exp()).abs() < 1e-6);
        assert!((s.ppl_ratio - 0.19f64.exp()).abs() < 1e-6);
        assert!((s.correlation - 1.0).abs() < 1e-6, "one is a linear function of the other: {}", s.correlation);
        // sqrt((variance of 0.02 i) / (n - 1)), as both move together.
        let error = 0.02 * (33.25f64 / 19.0).sqrt();
        assert!((s.log_ppl_ratio_error - error).abs() < 1e-6);
        assert!((s.mean_kld - 0.095).abs() < 1e-8 && (s.median_kld - 0.095).abs() < 1e-8);
        assert!((s.kld.p90 - 0.171).abs() < 1e-7 && (s.kld.maximum - 0.19).abs() < 1e-7 && s.kld.minimum == 0.0);
        assert_eq!(s.same_top_p, 0.75);
        assert!((s.same_top_p_error - (0.75 * 0.25 / 19.0f64).sqrt()).abs() < 1e-12);
        assert!(s.rms_delta_p > 0.0 && s.mean_delta_p < 0.0);
        let routing = Divergence { tokens, routed_layers: 4 }.summary().unwrap().routing.unwrap();
        assert!((routing.flips - 1.0 / 80.0).abs() < 1e-12 && (routing.tokens_flipped - 0.05).abs() < 1e-12);
        assert!((routing.steady_mean_kld - 0.09).abs() < 1e-8);
        assert!((routing.forced_mean_kld.unwrap() - 0.0475).abs() < 1e-8);
        assert!((routing.forced_median_kld.unwrap() - 0.0475).abs() < 1e-8);
        assert!(Divergence::default().summary().is_none());
    }

    #[test]
    fn few_tokens_have_no_errors_but_figures() {
        let routing = TokenRouting { flips: 0, forced_kld: f32::NAN };
        let tokens = vec![ScoredToken { nll: 1.0, nll_base: 0.5, kld: 0.1, same_top: true, routing }];
        let s = Divergence { tokens, routed_layers: 1 }.summary().unwrap();
        assert_eq!(s.routing.unwrap().forced_mean_kld, None);
        assert_eq!((s.ppl_error, s.mean_kld_error, s.same_top_p_error), (0.0, 0.0, 0.0));
        assert!([s.correlation, s.rms_delta_p_error, s.log_ppl_ratio_error].iter().all(|v| v.is_finite()));
    }
}
