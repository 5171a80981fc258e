//! Moments as they are before they are factored: scaled, and damped.

use rayon::prelude::*;

use super::error::FeedbackError;
use super::moment::{SecondMoment, zeros};

/// Added to the diagonal, in units of its mean.
pub(super) const FLOOR: f64 = 1e-6;

/// Inputs whose mean square is below this part of the mean over all inputs are dead: nothing is known about them.
const DEAD: f64 = 1e-12;

/// A moment in units of the mean of its diagonal, with dead inputs replaced.
pub(super) struct Scaled<'a> {
    moment: &'a SecondMoment,
    scale: f64,
    dead: Vec<bool>,
    /// The diagonal.
    pub plain: Vec<f32>,
}

impl<'a> Scaled<'a> {
    /// `None` where nothing is known.
    pub(super) fn new(moment: &'a SecondMoment) -> Option<Scaled<'a>> {
        let n = moment.n();
        let diagonal: Vec<f64> = (0..n).map(|j| f64::from(moment.upper_row(j)[0])).collect();
        let mean = diagonal.iter().sum::<f64>() / n.max(1) as f64;
        if moment.weight() <= 0.0 || !mean.is_finite() || mean <= 0.0 {
            return None;
        }
        let scale = 1.0 / mean;
        let dead: Vec<bool> = diagonal.iter().map(|square| *square <= DEAD * mean).collect();
        let plain = (diagonal.iter().zip(&dead))
            .map(|(square, dead)| (FLOOR + if *dead { 1.0 } else { square * scale }) as f32)
            .collect();
        Some(Scaled { moment, scale, dead, plain })
    }

    /// Fills the upper triangle of `target`, `[n, n]`, with the damped moment, and the rest with zeros.
    pub(super) fn damped(&self, damping: f64, target: &mut [f32]) {
        let keep = (self.scale * (1.0 - damping)) as f32;
        let (dead, plain) = (&self.dead, &self.plain);
        target.par_chunks_exact_mut(plain.len()).enumerate().for_each(|(i, row)| {
            row[..i].fill(0.0);
            row[i] = plain[i];
            for (j, (target, sum)) in row[i..].iter_mut().zip(self.moment.upper_row(i)).enumerate().skip(1) {
                *target = if dead[i] || dead[i + j] { 0.0 } else { sum * keep };
            }
        });
    }

    /// What the diagonal of the damped moment has beyond `1 - damping` times that of the moment.
    pub(super) fn excess(&self, damping: f64) -> Vec<f32> {
        let keep = (1.0 - damping) * self.scale;
        let excess = |(j, plain): (usize, &f32)| f64::from(*plain) - keep * f64::from(self.moment.upper_row(j)[0]);
        self.plain.iter().enumerate().map(|found| excess(found) as f32).collect()
    }
}

/// The upper triangle of the moment that [`Factor::new`](super::Factor::new) factors with this damping, `[n, n]`; `None` where nothing is known.
pub(super) fn damped_moment(moment: &SecondMoment, damping: f64) -> Result<Option<Vec<f32>>, FeedbackError> {
    let Some(scaled) = Scaled::new(moment) else { return Ok(None) };
    let mut damped = zeros(moment.n())?;
    scaled.damped(damping, &mut damped);
    Ok(Some(damped))
}
