//! The choice of damping: the one that leaves the least error on tokens that the moment has not seen.
//!
//! How far correlations between inputs hold on other text depends on the number of tokens for each column, and on how
//! few of them are much longer than the rest. With 65,536 tokens of a 1.5B model, inputs 1,536 wide get .02 to .3, mostly
//! .06 or .15; those of `ffn_down`, 8,960 wide, .3 or .5.

use super::error::FeedbackError;
use super::factor::{DEFAULT_DAMPING, Factor};
use super::judged::{cap_rows, squared_outputs};
use super::moment::SecondMoment;
use super::round::{improve_rows, search_rows};
use crate::gguf::TensorType;
use crate::quant;

/// Dampings that are tried.
const CANDIDATES: [f64; 6] = [0.02, 0.06, 0.15, 0.3, 0.5, 0.7];

/// Tokens for each column from which on the first one tried is small.
const MANY_TOKENS: u64 = 16;

/// A damping counts as no worse when its error exceeds the least by at most this part: held-out tokens come from the
/// documents of the others, and texts of other documents want more.
const TOLERANCE: f64 = 0.01;

/// Fewer tokens than this cannot judge.
const LEAST_TOKENS: usize = 64;

/// Chooses the damping for [`Factor::new`]: `weights`, some rows `[rows, n]` of the matrix, are rounded with feedback for
/// several dampings and judged by the inputs `held_out`, `[tokens, n]`, which are not in `moment`; those that `moment` would
/// scale down or leave out are treated so in place. Gives [`DEFAULT_DAMPING`] where these are too few or nothing can be
/// rounded.
///
/// Of dampings that are about as good the largest counts. Tries neighbours as long as they are no worse, four in most
/// cases; each takes `4 n^2` bytes and a factorisation. Runs on rayon's current pool, with the same result for any number
/// of threads.
///
/// # Errors
/// [`FeedbackError`] when there is no memory for a factor or a weight is not finite.
#[doc(alias = "percdamp")]
#[doc(alias = "damp_percent")]
pub fn choose_damping(moment: &SecondMoment, held_out: &mut Vec<f32>, weights: &[f32]) -> Result<f64, FeedbackError> {
    let n = moment.n();
    cap_rows(moment.cap(), n, held_out, 0);
    // The type matters little: what fits the rows.
    let ty = [TensorType::Q4_K, TensorType::Q4_0].into_iter().find(|ty| {
        let block_len = ty.info().map_or(n + 1, |info| info.block_len);
        n.is_multiple_of(block_len)
    });
    let (Some(ty), true) = (ty, held_out.len() >= LEAST_TOKENS * n && !weights.is_empty()) else {
        return Ok(DEFAULT_DAMPING);
    };
    let row_bytes = ty.info().and_then(|info| info.row_bytes(n as u64)).unwrap_or(0) as usize;
    let mut searched = vec![0u8; weights.len() / n * row_bytes];
    search_rows(ty, weights, n, Some(&moment.diagonal()), &mut searched)?;
    let mut errors = vec![0.0f32; weights.len()];
    let mut error_with = |damping: f64| -> Result<f64, FeedbackError> {
        let factor = Factor::new(moment, damping)?;
        let mut bytes = searched.clone();
        improve_rows(ty, weights, n, &factor, &mut bytes)?;
        quant::dequantize(ty, &bytes, &mut errors)?;
        errors.iter_mut().zip(weights).for_each(|(error, w)| *error = w - *error);
        Ok(squared_outputs(&errors, held_out, n))
    };
    let few = moment.tokens() < MANY_TOKENS * n as u64;
    let start = if few { CANDIDATES.len() / 2 } else { 0 };
    let mut errors_of = vec![(start, error_with(CANDIDATES[start])?)];
    for step in [1, -1] {
        let mut last = errors_of[0];
        while let Some(next) = last.0.checked_add_signed(step).filter(|&next| next < CANDIDATES.len()) {
            let error = error_with(CANDIDATES[next])?;
            errors_of.push((next, error));
            if error > last.1 * (1.0 + TOLERANCE) {
                break;
            }
            last = (next, error);
        }
    }
    let least = errors_of.iter().map(|(_, error)| *error).fold(f64::INFINITY, f64::min);
    let good = errors_of.iter().filter(|(_, error)| *error <= least * (1.0 + TOLERANCE)).map(|(at, _)| *at);
    Ok(good.max().map_or(DEFAULT_DAMPING, |at| CANDIDATES[at]))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{inputs, noise};
    use super::*;

    #[test]
    fn many_tokens_want_little_damping_and_few_want_much() {
        let n = 256;
        let weights = noise(16 * n, 1);
        let held_out = inputs(400, n, 2);
        let chosen = |tokens: usize| {
            let mut moment = SecondMoment::new(n).unwrap();
            moment.accumulate(&inputs(tokens, n, 3), None);
            choose_damping(&moment, &mut held_out.clone(), &weights).unwrap()
        };
        let (many, few) = (chosen(20 * n), chosen(n));
        assert!(many < few, "{many} {few}");
        assert!(CANDIDATES.contains(&many) && CANDIDATES.contains(&few));
    }

    #[test]
    fn without_tokens_to_judge_by_the_default_is_left() {
        let mut moment = SecondMoment::new(32).unwrap();
        moment.accumulate(&inputs(200, 32, 4), None);
        let weights = noise(4 * 32, 5);
        let few = inputs(LEAST_TOKENS - 1, 32, 6);
        for (held_out, weights) in [(&few[..], &weights[..]), (&[][..], &weights[..]), (&inputs(100, 32, 7), &[])] {
            assert_eq!(choose_damping(&moment, &mut held_out.to_vec(), weights).unwrap(), DEFAULT_DAMPING);
        }
        // Rows that no type divides.
        let mut odd = SecondMoment::new(20).unwrap();
        odd.accumulate(&inputs(200, 20, 8), None);
        assert_eq!(choose_damping(&odd, &mut inputs(100, 20, 9), &noise(40, 10)).unwrap(), DEFAULT_DAMPING);
    }
}
