//! Rounding that answers for what it has done: each column is rounded so as to make up for the errors of the columns
//! before it, as far as the model's own inputs let one column stand in for another.
//!
//! A linear layer turns inputs `x` into `W x`. Rounding W to `Q` changes the output by `(W - Q) x`, whose mean square
//! over inputs is `tr(E H E^T)`, with `E = W - Q` and the second moment `H = mean of x x^T`. With the factorisation
//! `H = (I + A) D (I + A)^T`, A strictly upper triangular and D diagonal, the loss of a row is
//! `sum over j of D[j] * u[j]^2` with `u[j] = E[j] + sum over k < j of E[k] * A[k, j]`: column `j` is rounded best as
//! if its weight were `W[j] + sum over k < j of E[k] * A[k, j]`, and `D[j]` is what an error there costs. This is the
//! method of GPTQ (Frantar et al., arXiv 2210.17323) in the form of LDLQ (Chee et al., arXiv 2307.13304), with the
//! scales of block formats chosen on the way: those of a block when its first column comes up, those of a group when
//! the group does, both from weights that already carry the feedback.
//!
//! - [`SecondMoment`] sums up inputs; [`Factor`] factors the sum, damped and repaired so that it never fails.
//!   [`choose_damping`] finds out how much of it holds on other text.
//! - [`JudgedInputs`] are of other text and tell what a rounding is worth there.
//! - [`CorrectedMoment`] shifts the weights to be rounded so that they make up for what was rounded before.
//! - [`search_rows`] knows importance only and searches the scales of each block on the grid that readers decode.
//! - [`improve_rows`] rounds with feedback, IQ2 and IQ3 eight columns at a time, and then improves levels and scales by
//!   coordinate descent. No row ends worse on the calibration moment than it was; [`round_rows`] does both.
//! - [`improve_two_sided`] does that with the second moment of gradients beside that of inputs: [`OutputFactor`].
//!
//! Rows are independent (but for those of [`improve_two_sided`]) and divided among the threads of rayon's current pool; sums have a fixed order. The bytes
//! depend neither on the number of threads nor on the instruction set.

mod columns;
mod corrected;
mod damping;
mod error;
mod factor;
mod format;
mod grid;
mod judged;
mod lattice;
mod layout;
mod moment;
mod round;
mod scaled;
mod scales;
mod sweep;
#[cfg(test)]
pub(in crate::rounding) mod tests;
mod two_sided;

pub(in crate::rounding) use columns::{TASK_ROWS, TILE, column_weights};
pub(in crate::rounding) use factor::factor_in_place;
pub(in crate::rounding) use grid::{Nearest, Whole, inverse};
pub(in crate::rounding) use moment::zeros;
pub(in crate::rounding) use round::{losses, task_rows};
pub(in crate::rounding) use sweep::{Directions, Rounded, TileState, sweep_tiles};

pub use corrected::{CorrectedMoment, CorrectedRows, Correction, InputPair};
pub use damping::choose_damping;
pub use error::FeedbackError;
pub use factor::{DEFAULT_DAMPING, Factor};
pub use judged::{InputRows, JudgedInputs};
pub use moment::SecondMoment;
pub use round::{improve_rows, round_rows, search_rows, supports_feedback, supports_search};
pub use two_sided::{OUTPUT_DAMPING, OutputFactor, improve_two_sided};
