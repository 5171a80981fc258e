//! What the gradients are of: a loss at the logits.

use rayon::prelude::*;

use super::derivatives;
use crate::model::error::ModelError;
use crate::model::group::TokenGroup;
use crate::model::math;

/// Logits that are summed up at once when a label is drawn.
const PART: usize = 1024;

/// A loss, told by its gradient at the logits.
pub trait OutputLoss {
    /// Turns the logits of some rows of a group, `[rows.len(), n_vocab]`, into the gradient at them.
    ///
    /// # Errors
    /// An error stops the run.
    fn gradient(&mut self, group: &TokenGroup, rows: &[usize], logits: &mut [f32]) -> Result<(), ModelError>;
}

/// Cross entropy with labels drawn from the model's own distribution, summed over all positions: its gradients have the Fisher
/// information as their second moment.
///
/// A label depends on the seed, the number of its sequence and its position alone, not on what is computed together.
#[derive(Debug)]
pub struct SampledLabels {
    seed: u64,
    /// Number of the first sequence of the next group.
    first_sequence: u64,
    labels: Vec<u32>,
    loss: f64,
}

impl SampledLabels {
    /// Labels of sequences that are numbered from `first_sequence` on, in the order of their group.
    pub fn new(seed: u64, first_sequence: u64) -> SampledLabels {
        SampledLabels { seed, first_sequence, labels: Vec::new(), loss: 0.0 }
    }

    /// The labels of all rows so far, in their order.
    pub fn labels(&self) -> &[u32] {
        &self.labels
    }

    /// Sum of `-ln p` of all labels so far.
    pub fn loss(&self) -> f64 {
        self.loss
    }
}

impl OutputLoss for SampledLabels {
    fn gradient(&mut self, group: &TokenGroup, rows: &[usize], logits: &mut [f32]) -> Result<(), ModelError> {
        let n_vocab = logits.len() / rows.len().max(1);
        let SampledLabels { seed, first_sequence, .. } = *self;
        let drawn: Vec<(u32, f64)> = logits
            .par_chunks_mut(n_vocab.max(1))
            .zip(rows)
            .map(|(logits, &row)| {
                let (sequence, position) = group.place_of(row);
                let chance = uniform(seed, first_sequence + sequence as u64, position as u64);
                draw(logits, chance)
            })
            .collect();
        for (label, loss) in drawn {
            self.labels.push(label);
            self.loss += loss;
        }
        Ok(())
    }
}

/// Draws a label at `chance` of the cumulative distribution and turns the logits into the gradient of its cross entropy. Gives
/// the label and its loss.
fn draw(logits: &mut [f32], chance: f64) -> (u32, f64) {
    let shift = math::max(logits);
    let sums: Vec<f64> = logits.chunks(PART).map(|part| math::exp_sum(part, shift)).collect();
    let sum: f64 = sums.iter().sum();
    let mut left = chance * sum;
    let mut part = 0;
    while part + 1 < sums.len() && left >= sums[part] {
        left -= sums[part];
        part += 1;
    }
    let first = part * PART;
    let of_part = &logits[first..logits.len().min(first + PART)];
    let mut label = first + of_part.len() - 1;
    for (at, logit) in of_part.iter().enumerate() {
        left -= math::exp_sum(&[*logit], shift);
        if left < 0.0 {
            label = first + at;
            break;
        }
    }
    let loss = sum.ln() - f64::from(logits[label] - shift);
    derivatives::probabilities(logits, shift, sum);
    logits[label] -= 1.0;
    (label as u32, loss)
}

/// Uniform in [0, 1), from three numbers and nothing else (the finalizer of SplitMix64, Steele and others, 2014, once for
/// each).
fn uniform(seed: u64, sequence: u64, position: u64) -> f64 {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    let bits = [sequence, position].into_iter().fold(mix(seed.wrapping_add(GOLDEN)), |state, number| {
        mix((state ^ number.wrapping_mul(GOLDEN)).wrapping_add(GOLDEN))
    });
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_follow_the_distribution() {
        let logits: Vec<f32> = (0..2500).map(|i| if i % 500 == 7 { 6.0 } else { -6.0 }).collect();
        let mut counts = std::collections::BTreeMap::new();
        for position in 0..4000 {
            let (label, loss) = draw(&mut logits.clone(), uniform(5, 1, position));
            *counts.entry(label).or_insert(0) += 1;
            assert!(loss > 0.0);
        }
        // Five labels share all but 2500 e^-12 / 5 of the chance.
        let common: i32 = (0..5).map(|i| counts.get(&(500 * i + 7)).copied().unwrap_or(0)).sum();
        assert!(common > 3950, "{common}");
        for i in 0..5 {
            let count = counts[&(500 * i + 7)];
            assert!((650..950).contains(&count), "{i}: {count}");
        }
    }

    #[test]
    fn the_gradient_is_the_slope_of_the_loss() {
        let logits: Vec<f32> = (0..40).map(|i| ((i * 7) % 11) as f32 * 0.3).collect();
        let mut gradient = logits.clone();
        let (label, loss) = draw(&mut gradient, 0.4);
        assert!((gradient.iter().sum::<f32>()).abs() < 1e-5);
        let of = |logits: &[f32]| math::log_sum_exp(logits) - f64::from(logits[label as usize]);
        assert!((of(&logits) - loss).abs() < 1e-6);
        for i in [0, 3, label as usize] {
            let moved = |by: f32| {
                let mut moved = logits.clone();
                moved[i] += by;
                of(&moved)
            };
            let expected = (moved(0.01) - moved(-0.01)) / 0.02;
            assert!((f64::from(gradient[i]) - expected).abs() < 1e-4);
        }
    }

    #[test]
    fn labels_depend_on_sequence_and_position_and_not_on_the_group() {
        let logits: Vec<f32> = (0..6 * 50).map(|i| ((i * 13) % 17) as f32 * 0.2).collect();
        let together = TokenGroup::from_sequences([vec![0; 4], vec![0; 2]]);
        let mut all = SampledLabels::new(9, 3);
        all.gradient(&together, &[0, 1, 2, 3, 4, 5], &mut logits.clone()).unwrap();
        let mut second = SampledLabels::new(9, 4);
        second.gradient(&TokenGroup::from_sequences([[0, 0]]), &[0, 1], &mut logits[200..].to_vec()).unwrap();
        assert_eq!(all.labels()[4..], *second.labels());
        let mut other = SampledLabels::new(10, 3);
        other.gradient(&together, &[0, 1, 2, 3, 4, 5], &mut logits.clone()).unwrap();
        assert_ne!(all.labels(), other.labels());
    }
}
