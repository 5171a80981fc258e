//! A few floats side by side: candidates of a search that share their input but not their sums.
//!
//! Each lane does exactly what scalar code would do, in the same order, so results do not depend on how many
//! lanes there are. The compiler turns the loops into vector instructions of whatever width it may use.

use std::ops::{Add, AddAssign, Div, Mul, Sub};

/// `N` floats with elementwise arithmetic.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lanes<const N: usize>(pub [f32; N]);

impl<const N: usize> Lanes<N> {
    /// Zero in every lane.
    pub(super) const ZERO: Self = Self([0.0; N]);

    // Plain loops: LLVM vectorizes them, while the array methods `from_fn` and `map` of the standard library often
    // end up as scalar code with copies.

    /// Lane `k` gets `f(k)`.
    #[inline(always)]
    pub(super) fn from_fn(mut f: impl FnMut(usize) -> f32) -> Self {
        let mut lanes = [0.0; N];
        for (k, lane) in lanes.iter_mut().enumerate() {
            *lane = f(k);
        }
        Self(lanes)
    }

    /// Applies `f` to every lane.
    #[inline(always)]
    pub(super) fn map(self, mut f: impl FnMut(f32) -> f32) -> Self {
        Self::from_fn(|k| f(self.0[k]))
    }

    /// `f` of the corresponding lanes of two values.
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self::from_fn(|k| f(self.0[k], other.0[k]))
    }
}

macro_rules! elementwise {
    ($($operation:ident $method:ident $symbol:tt;)*) => {$(
        impl<const N: usize> $operation for Lanes<N> {
            type Output = Self;

            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                self.zip(other, |a, b| a $symbol b)
            }
        }

        impl<const N: usize> $operation<f32> for Lanes<N> {
            type Output = Self;

            #[inline(always)]
            fn $method(self, other: f32) -> Self {
                self.map(|a| a $symbol other)
            }
        }
    )*};
}

elementwise! {
    Add add +;
    Sub sub -;
    Mul mul *;
    Div div /;
}

impl<const N: usize> AddAssign for Lanes<N> {
    #[inline(always)]
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

/// Folds eight values by halves, for operations whose result does not depend on the order.
#[inline(always)]
pub(super) fn fold_halves(mut values: [f32; 8], pick: impl Fn(f32, f32) -> f32) -> f32 {
    for half in [4, 2, 1] {
        for k in 0..half {
            values[k] = pick(values[k], values[k + half]);
        }
    }
    values[0]
}
