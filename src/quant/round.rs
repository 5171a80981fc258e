//! Float-to-integer conversions with the results that ggml's x86-64 build gets, in range and out of it.

/// Nearest integer, ties to even, by adding 1.5 * 2^23 and keeping the low 23 mantissa bits (ggml's
/// `nearest_int`). Outside of +-2^22 the result is whatever those bits hold, never more than 23 bits wide:
/// blocks made of NaN or huge ratios depend on it.
#[inline(always)]
pub(crate) fn nearest_int(value: f32) -> i32 {
    let bits = (value + 12_582_912.0).to_bits();
    (bits & 0x007f_ffff) as i32 - 0x0040_0000
}

/// [`nearest_int`] as a float, for values known to lie within +-2^22 (others give nonsense).
#[inline(always)]
pub(crate) fn nearest_small(value: f32) -> f32 {
    (value + 12_582_912.0) - 12_582_912.0
}

/// C's `(int) value` on x86 (`cvttss2si`): toward zero; NaN and everything out of range give `i32::MIN`.
#[inline(always)]
pub(crate) fn truncate(value: f32) -> i32 {
    if (-2_147_483_648.0..2_147_483_648.0).contains(&value) { value as i32 } else { i32::MIN }
}

/// C's `(int) roundf(value)` on x86: to nearest, halves away from zero; NaN and out of range as [`truncate`].
#[inline(always)]
pub(crate) fn round_away(value: f32) -> i32 {
    let whole = truncate(value);
    if whole == i32::MIN {
        return whole;
    }
    // Exact: below 2^24 both numbers share their unit, above it the difference is zero.
    let rest = value - whole as f32;
    whole + i32::from(rest >= 0.5) - i32::from(rest <= -0.5)
}

/// [`truncate`] for values known to lie within `0..2^22`, in a form that compiles to vectors.
#[inline(always)]
pub(crate) fn truncate_small(value: f32) -> i32 {
    nearest_int(value) - i32::from(nearest_small(value) > value)
}

/// [`round_away`] for values known to lie within +-2^22, in a form that compiles to vectors.
#[inline(always)]
pub(crate) fn round_away_small(value: f32) -> i32 {
    // Where ties to even went toward zero, the exact half remains.
    let rest = value - nearest_small(value);
    let up = (rest == 0.5) & (value > 0.0);
    let down = (rest == -0.5) & (value < 0.0);
    nearest_int(value) + i32::from(up) - i32::from(down)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_int_breaks_ties_to_even() {
        for (value, expected) in
            [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2), (-2.5, -2), (4_194_303.0, 4_194_303)]
        {
            assert_eq!(nearest_int(value), expected, "{value}");
        }
    }

    #[test]
    fn nearest_int_of_the_absurd_is_the_low_mantissa_bits() {
        assert_eq!(nearest_int(f32::INFINITY), -0x0040_0000);
        assert_eq!(nearest_int(f32::from_bits(0x7fc0_0000)), 0);
    }

    #[test]
    fn truncate_answers_out_of_range_with_the_lowest_integer() {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 2_147_483_648.0, -2_147_483_904.0] {
            assert_eq!(truncate(value), i32::MIN, "{value}");
        }
        assert_eq!(truncate(-1.9), -1);
        assert_eq!(truncate(2_147_483_520.0), 2_147_483_520);
        for (value, expected) in [(-2.5, -3), (2.5, 3), (0.49999997, 0), (-0.5, -1), (8_388_609.0, 8_388_609)] {
            assert_eq!(round_away(value), expected, "{value}");
        }
        assert_eq!(round_away(f32::INFINITY), i32::MIN);
        assert_eq!(round_away(f32::NEG_INFINITY), i32::MIN);
    }

    #[test]
    fn small_forms_agree_with_the_general_ones() {
        for i in -400_000..400_000 {
            for value in [i as f32 / 1024.0, (i as f32 / 1024.0).next_up(), i as f32 * 10.0 + 0.5] {
                assert_eq!(round_away_small(value), round_away(value), "{value}");
                assert_eq!(nearest_small(value), nearest_int(value) as f32, "{value}");
                if value >= 0.0 {
                    assert_eq!(truncate_small(value), truncate(value), "{value}");
                }
            }
        }
    }
}
