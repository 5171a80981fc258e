//! Do two models differ? Paired figures over the windows of a text.
//!
//! Tokens of one window are not independent, windows nearly are: the unit of every test here is the mean of a window.

use serde::Serialize;

/// Fewest windows on which a test may decide.
const FEWEST_WINDOWS: usize = 16;

/// A mean difference of two models on the same windows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PairedDifference {
    /// Mean of `a`.
    pub a: f64,
    /// Mean of `b`.
    pub b: f64,
    /// `a - b`.
    pub difference: f64,
    /// Standard error of the difference, from the scatter of the windows' differences.
    pub error: f64,
    /// `a / b`.
    pub ratio: f64,
    /// Lower end of the 95% confidence interval of the ratio (delta method over windows).
    pub ratio_low: f64,
    /// Its upper end.
    pub ratio_high: f64,
    /// Windows.
    pub windows: usize,
}

/// Compares the means of two series measured on the same windows, `a[i]` and `b[i]` of window i.
/// `None` without windows.
pub fn compare_means(a: &[f64], b: &[f64]) -> Option<PairedDifference> {
    let n = a.len().min(b.len());
    if n == 0 {
        return None;
    }
    let mean = |x: &[f64]| x[..n].iter().sum::<f64>() / n as f64;
    let (mean_a, mean_b) = (mean(a), mean(b));
    let difference = mean_a - mean_b;
    let scatter = |deviation: &dyn Fn(usize) -> f64| -> f64 {
        if n < 2 {
            return 0.0;
        }
        let squares: f64 = (0..n).map(|i| deviation(i).powi(2)).sum();
        (squares / (n - 1) as f64 / n as f64).sqrt()
    };
    let error = scatter(&|i| a[i] - b[i] - difference);
    let ratio = mean_a / mean_b;
    let ratio_error = scatter(&|i| a[i] - ratio * b[i]) / mean_b.abs();
    Some(PairedDifference {
        a: mean_a,
        b: mean_b,
        difference,
        error,
        ratio,
        ratio_low: ratio - 1.96 * ratio_error,
        ratio_high: ratio + 1.96 * ratio_error,
        windows: n,
    })
}

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
    fn paired_difference_uses_the_pairing() {
        let a = [1.0, 2.0, 3.0, 4.0];
        let b = [0.9, 1.9, 2.9, 3.9];
        let pair = compare_means(&a, &b).unwrap();
        assert!((pair.difference - 0.1).abs() < 1e-12 && pair.error < 1e-12);
        assert!(pair.ratio_low <= pair.ratio && pair.ratio <= pair.ratio_high);
        assert!(compare_means(&[], &[]).is_none());
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
}
