//! Second moments of gradients whose longest rows do not own the sum.

use crate::rounding::gptq::{FeedbackError, SecondMoment};

/// Of so many gradients at a matrix's outputs one may be longer than the limit; those that are, are scaled down to it.
const ONE_IN: u64 = 1000;

/// A gradient that is among the longest so far.
struct Held {
    square: f64,
    /// Its place among all.
    at: u64,
    row: Vec<f32>,
}

/// Adds gradients up to a second moment, in which the longest of a thousand are scaled down to the length of the next. Which
/// these are is known when all have come, so the longest are held back until then.
pub(super) struct CappedMoment {
    moment: SecondMoment,
    n: usize,
    /// At most `most` of them.
    held: Vec<Held>,
    most: usize,
    added: u64,
}

impl CappedMoment {
    /// Of at most `tokens` gradients at `n` outputs.
    pub(super) fn new(n: usize, tokens: usize) -> Result<CappedMoment, FeedbackError> {
        let most = above_limit(tokens as u64) as usize + 1;
        Ok(CappedMoment { moment: SecondMoment::new(n)?.uncapped(), n, held: Vec::new(), most, added: 0 })
    }

    /// Adds gradients, row-major `[rows, n]`.
    pub(super) fn add(&mut self, rows: &[f32]) {
        let mut passed = Vec::with_capacity(rows.len());
        for row in rows.chunks_exact(self.n) {
            let square = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
            let at = self.added;
            self.added += 1;
            if self.held.len() < self.most {
                self.held.push(Held { square, at, row: row.to_vec() });
                continue;
            }
            let shortest = (0..self.held.len()).min_by(|&a, &b| self.held[a].square.total_cmp(&self.held[b].square));
            match shortest.filter(|&shortest| self.held[shortest].square < square) {
                Some(shortest) => {
                    let held = &mut self.held[shortest];
                    passed.extend_from_slice(&held.row);
                    held.row.copy_from_slice(row);
                    (held.square, held.at) = (square, at);
                }
                None => passed.extend_from_slice(row),
            }
        }
        self.moment.accumulate(&passed, None);
    }

    /// The second moment of all.
    pub(super) fn finish(self) -> SecondMoment {
        let CappedMoment { mut moment, mut held, added, .. } = self;
        held.sort_by(|a, b| b.square.total_cmp(&a.square).then(a.at.cmp(&b.at)));
        let above = above_limit(added) as usize;
        let limit = held.get(above).map_or(f64::INFINITY, |held| held.square);
        for held in held.iter_mut().take(above) {
            let factor = (limit / held.square).sqrt() as f32;
            if factor < 1.0 {
                held.row.iter_mut().for_each(|x| *x *= factor);
            }
        }
        held.sort_by_key(|held| held.at);
        let rows: Vec<f32> = held.into_iter().flat_map(|held| held.row).collect();
        moment.accumulate(&rows, None);
        moment
    }
}

/// How many of `count` are longer than the quantile of 99.9 %.
fn above_limit(count: u64) -> u64 {
    count / ONE_IN
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    /// The mean of `g gᵀ` on the diagonal, with rows longer than the quantile scaled down to it.
    fn expected(rows: &[f32], n: usize) -> Vec<f64> {
        let squares: Vec<f64> = rows.chunks(n).map(|row| row.iter().map(|x| f64::from(x * x)).sum()).collect();
        let mut sorted = squares.clone();
        sorted.sort_by(f64::total_cmp);
        let limit = sorted[sorted.len() - 1 - sorted.len() / 1000];
        let mut sums = vec![0.0; n];
        for (row, square) in rows.chunks(n).zip(&squares) {
            let factor = (limit / square).min(1.0);
            sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += factor * f64::from(x * x));
        }
        sums.into_iter().map(|sum| sum / squares.len() as f64).collect()
    }

    #[test]
    fn one_in_a_thousand_is_scaled_down() {
        let (n, count) = (6, 3500);
        let mut random = Random::new(3);
        let mut rows: Vec<f32> = (0..n * count).map(|_| random.bell()).collect();
        for token in [0, 17, 3499] {
            rows[token * n..][..n].iter_mut().for_each(|x| *x *= 100.0);
        }
        let mut moment = CappedMoment::new(n, 10_000).unwrap();
        rows.chunks(n * 900).for_each(|rows| moment.add(rows));
        let found = moment.finish();
        assert_eq!(found.tokens(), count as u64);
        for (found, expected) in found.diagonal().iter().zip(expected(&rows, n)) {
            assert!((f64::from(*found) / expected - 1.0).abs() < 1e-4, "{found} {expected}");
        }
    }

    #[test]
    fn few_gradients_are_added_as_they_are() {
        let mut moment = CappedMoment::new(2, 100).unwrap();
        moment.add(&[1.0, 2.0, 300.0, 4.0]);
        assert_eq!(moment.finish().diagonal(), [(1.0 + 90_000.0) / 2.0, (4.0 + 16.0) / 2.0]);
    }
}
