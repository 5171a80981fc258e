//! How far an output matrix is from the embedding that it should share.

use std::fmt;

use super::{Part, Planner};
use crate::convert::ConvertError;
use crate::convert::rows::{Rows, Scratch};

/// Rows that are compared at a time.
const ROWS: u64 = 256;

/// Distance of two matrices.
pub(super) struct Difference {
    largest: f32,
    /// Of the second to the first, in the Euclidean norm.
    relative: f64,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "largest difference {:.3}, {:.1}% of the embedding's norm", self.largest, self.relative * 100.0)
    }
}

impl Planner<'_> {
    /// `None` if both hold the same values.
    pub(super) fn head_difference(&self, embedding: usize, output: usize) -> Result<Option<Difference>, ConvertError> {
        let (count, width) = (self.sizes.vocab, self.sizes.width);
        let parts = [embedding, output].map(|weight| Part::rows(weight, 0, count));
        let [embedding, output] = [&parts[0], &parts[1]].map(|part| Rows {
            checkpoint: self.checkpoint,
            weight: &self.plan.weights[part.weight],
            part,
            row_len: width,
            permuted_rows: None,
        });
        let (mut scratch, mut raw) = (Scratch::default(), [Vec::new(), Vec::new()]);
        let (mut a, mut b) = (Vec::new(), Vec::new());
        let (mut largest, mut difference, mut norm) = (0f32, 0f64, 0f64);
        for first in (0..count).step_by(ROWS as usize) {
            let rows = ROWS.min(count - first);
            embedding.read(first, rows, &mut raw[0], &mut scratch)?;
            output.read(first, rows, &mut raw[1], &mut scratch)?;
            for (rows_of, raw, values) in [(&embedding, &raw[0], &mut a), (&output, &raw[1], &mut b)] {
                values.resize((rows * width) as usize, 0.0);
                rows_of.widen(first, raw, values)?;
            }
            for (a, b) in a.iter().zip(&b) {
                let apart = (a - b).abs();
                largest = largest.max(apart);
                difference += f64::from(apart).powi(2);
                norm += f64::from(*a).powi(2);
            }
        }
        // NaN, which the run refuses later, is a difference as well.
        let equal = difference == 0.0;
        Ok((!equal).then(|| Difference { largest, relative: (difference / norm.max(f64::MIN_POSITIVE)).sqrt() }))
    }
}
