//! How much do two models differ? Paired figures over the windows of a text.
//!
//! Tokens of one window are not independent, windows nearly are: the unit of everything here is the mean of a window.

use serde::Serialize;

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
pub(crate) fn compare_means(a: &[f64], b: &[f64]) -> Option<PairedDifference> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paired_difference_uses_the_pairing() {
        let a = [1.0, 2.0, 3.0, 4.0];
        let b = [0.9, 1.9, 2.9, 3.9];
        let pair = compare_means(&a, &b).unwrap();
        assert!((pair.difference - 0.1).abs() < 1e-12 && pair.error < 1e-12);
        assert!(pair.ratio_low <= pair.ratio && pair.ratio <= pair.ratio_high);
        assert!(compare_means(&[], &[]).is_none());
    }
}
