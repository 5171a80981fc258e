//! Tests that may be looked at after every window, and end a run as soon as they have decided.

use serde::Serialize;

use super::compare_means;

/// Fewest windows on which a test may decide.
const FEWEST_WINDOWS: usize = 16;

/// What a look at the data says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Not decided yet.
    Open,
    /// The first is smaller.
    First,
    /// The second is smaller.
    Second,
}

/// A test of two means that may be looked at after every window without losing its error probability.
///
/// The boundary is the asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas
/// (arXiv 2103.06476), a normal mixture: after t windows the mean difference d is significant when
/// `|d| > s * sqrt(2 (t r^2 + 1) / (t^2 r^2) * ln(sqrt(t r^2 + 1) / alpha))`,
/// s the standard deviation of the windows' differences; r is set so that the boundary is tightest at about 32
/// windows. No decision is made on fewer than 16 windows,
/// whose deviation is too uncertain.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SequentialTest {
    /// Probability to call equal models different, over all looks together.
    pub alpha: f64,
}

impl SequentialTest {
    /// The test in a line, for reports.
    pub const DESCRIPTION: &str = "asymptotic confidence sequence of the windows' paired differences of mean KLD (arXiv 2103.06476), Bonferroni over pairs";

    /// Half the width of the confidence interval of the mean after `t` windows, in units of their standard deviation.
    fn half_width(&self, t: f64) -> f64 {
        // The value of r^2 t that makes the boundary tightest at a given t depends on alpha alone (the paper's
        // equation for rho); the usual approximation is accurate to a few percent.
        const TIGHTEST_AT: f64 = 32.0;
        let log = -2.0 * self.alpha.ln();
        let r2 = (log + log.ln_1p()) / TIGHTEST_AT;
        let x = t * r2 + 1.0;
        (2.0 * x / (t * t * r2) * (x.sqrt() / self.alpha).ln()).sqrt()
    }

    /// Looks at the windows so far.
    pub fn look(&self, a: &[f64], b: &[f64]) -> Verdict {
        let n = a.len().min(b.len());
        let Some(pair) = compare_means(a, b).filter(|_| n >= FEWEST_WINDOWS) else {
            return Verdict::Open;
        };
        let deviation = pair.error * (n as f64).sqrt();
        if pair.difference.abs() <= deviation * self.half_width(n as f64) || pair.difference == 0.0 {
            Verdict::Open
        } else if pair.difference < 0.0 {
            Verdict::First
        } else {
            Verdict::Second
        }
    }

    /// True when the best of several models, whose windows' means are given in the same order, differs significantly from
    /// every other one. The error probability is shared among the comparisons (Bonferroni).
    pub fn separates_best(&self, means: &[Vec<f64>]) -> bool {
        let total = |m: &Vec<f64>| m.iter().sum::<f64>();
        let Some(best) = (0..means.len()).min_by(|&a, &b| total(&means[a]).total_cmp(&total(&means[b]))) else {
            return false;
        };
        let others = means.len() - 1;
        let pairs = (means.len() * others / 2).max(1);
        let shared = SequentialTest { alpha: self.alpha / pairs as f64 };
        others > 0
            && (0..means.len()).filter(|&i| i != best).all(|i| shared.look(&means[best], &means[i]) == Verdict::First)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    /// Standard normal values (Box-Muller), the same for the same seed.
    fn normals(seed: u64, n: usize) -> Vec<f64> {
        let mut random = Random::new(seed);
        let mut uniform = || (random.bits() >> 11) as f64 / (1u64 << 53) as f64;
        (0..n)
            .map(|_| {
                let (u, v) = (uniform().max(1e-300), uniform());
                (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
            })
            .collect()
    }

    #[test]
    fn equal_models_are_rarely_called_different_however_often_one_looks() {
        let test = SequentialTest { alpha: 0.05 };
        let wrong = (0..400)
            .filter(|&seed| {
                let a = normals(seed + 1, 200);
                let b = vec![0.0; 200];
                (1..=200).any(|n| test.look(&a[..n], &b[..n]) != Verdict::Open)
            })
            .count();
        assert!(wrong <= 28, "{wrong} of 400 at alpha 0.05");
    }

    #[test]
    fn different_models_are_told_apart_early_and_the_right_way_round() {
        let test = SequentialTest { alpha: 0.05 };
        let better = normals(7, 200);
        let worse: Vec<f64> = better.iter().zip(normals(8, 200)).map(|(v, e)| v + 1.0 + 0.3 * e).collect();
        let decided = (1..200).find(|&n| test.look(&better[..n], &worse[..n]) != Verdict::Open).unwrap();
        assert!(decided <= 16, "{decided}");
        assert_eq!(test.look(&better, &worse), Verdict::First);
        assert_eq!(test.look(&worse, &better), Verdict::Second);
        assert_eq!(test.look(&better, &better), Verdict::Open);
    }

    #[test]
    fn a_run_is_decided_when_the_best_differs_from_every_other() {
        let test = SequentialTest { alpha: 0.05 };
        let best = normals(7, 64);
        let shifted = |by: f64, seed| best.iter().zip(normals(seed, 64)).map(|(v, e)| v + by + 0.3 * e).collect();
        let (worse, worst): (Vec<f64>, Vec<f64>) = (shifted(1.0, 8), shifted(3.0, 9));
        assert!(test.separates_best(&[worst.clone(), best.clone(), worse.clone()]));
        assert!(!test.separates_best(&[worst, best.clone(), best.clone()]));
        assert!(!test.separates_best(&[best]) && !test.separates_best(&[]));
    }
}
