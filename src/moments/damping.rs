//! How much of the correlations between inputs is relied on.

/// Share of the second moments' off-diagonal part that is given up, so that they can be factored and do not overfit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Damping {
    /// The same for all.
    Given(f64),
    /// For each input the one that is best on tokens that were held out, see [`choose_damping`].
    ///
    /// [`choose_damping`]: crate::rounding::gptq::choose_damping
    Chosen,
}
