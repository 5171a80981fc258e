//! Which tasks of a file are scored.

use rand_mt::Mt;

use super::TaskKind;

/// llama-perplexity's seed.
const LLAMA_SEED: u32 = 1;

/// Indices of `count` of `total` tasks, drawn without replacement, in the order drawn; all in file order when
/// `count` is `total` or more.
pub(crate) fn draw(total: usize, count: usize, seed: u32) -> Vec<usize> {
    if count >= total {
        return (0..total).collect();
    }
    let mut random = Mt::new(seed);
    let mut left: Vec<usize> = (0..total).collect();
    (0..count)
        .map(|_| {
            let at = uniform_below(&mut random, left.len());
            left.swap_remove(at)
        })
        .collect()
}

/// The tasks that llama-perplexity scores, in its order. Those of HellaSwag are shuffled even when all are used.
pub(crate) fn draw_like_llama(kind: TaskKind, total: usize, count: usize) -> Vec<usize> {
    let mut random = Mt::new(LLAMA_SEED);
    let mut left: Vec<usize> = (0..total).collect();
    match kind {
        TaskKind::HellaSwag => {
            (0..count.min(total)).map(|_| left.remove(uniform_below(&mut random, left.len()))).collect()
        }
        TaskKind::WinoGrande | TaskKind::MultipleChoice if count < total => {
            (0..count).map(|_| left.swap_remove(scaled_below(random.next_u32(), left.len()))).collect()
        }
        TaskKind::WinoGrande | TaskKind::MultipleChoice => left,
    }
}

/// `std::uniform_int_distribution` of libstdc++ (GCC 11 and later) over `0..range` with 32-bit random numbers:
/// Lemire's multiplication with rejection. `range` is at most 2^32 - 1: task files are smaller.
fn uniform_below(random: &mut Mt, range: usize) -> usize {
    let range = u32::try_from(range).unwrap_or(u32::MAX);
    let mut product = u64::from(random.next_u32()) * u64::from(range);
    if (product as u32) < range {
        let threshold = range.wrapping_neg() % range;
        while (product as u32) < threshold {
            product = u64::from(random.next_u32()) * u64::from(range);
        }
    }
    (product >> 32) as usize
}

/// `int(2^-32 * r * range)` in single precision. A number that rounds up to 2^32 would lie past the end there; it
/// gives the last index here.
fn scaled_below(r: u32, range: usize) -> usize {
    let scaled = (1.0 / 4_294_967_296.0_f32) * r as f32 * range as f32;
    (scaled as usize).min(range - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_is_the_standard_one() {
        // The C++ standard: the 10,000th output of a default-seeded mt19937.
        let mut random = Mt::new(5489);
        assert_eq!((0..10_000).map(|_| random.next_u32()).last(), Some(4_123_659_995));
    }

    #[test]
    fn draws_are_without_replacement_and_repeatable() {
        let drawn = draw(1000, 100, 7);
        let mut sorted = drawn.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), 100);
        assert_eq!(drawn, draw(1000, 100, 7));
        assert_ne!(drawn, draw(1000, 100, 8));
        assert_eq!(draw(5, 9, 1), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn llama_perplexitys_choice_is_that_of_libstdcxx() {
        // From a C++ program with std::mt19937(1), compiled by GCC 12.
        use TaskKind::{HellaSwag, MultipleChoice, WinoGrande};
        assert_eq!(draw_like_llama(HellaSwag, 12, 400), [5, 11, 8, 10, 0, 1, 3, 9, 2, 4, 6, 7]);
        assert_eq!(draw_like_llama(HellaSwag, 10_042, 8), [4187, 10_013, 7233, 9363, 1, 1286, 3036, 10_032]);
        assert_eq!(draw_like_llama(WinoGrande, 13, 12), [5, 11, 7, 9, 0, 1, 2, 12, 8, 4, 3, 6]);
        assert_eq!(draw_like_llama(WinoGrande, 13, 13), (0..13).collect::<Vec<_>>());
        assert_eq!(draw_like_llama(MultipleChoice, 1267, 8), [528, 1262, 911, 1178, 0, 161, 381, 1258]);
        assert_eq!(draw_like_llama(MultipleChoice, 100_000, 6), [41_702, 99_717, 72_031, 93_252, 11, 12_811]);
    }

    #[test]
    fn scaling_stays_below_the_range() {
        for range in [1, 2, 3, 10, 1267, 10_042, 100_000] {
            assert!(scaled_below(u32::MAX, range) < range);
        }
    }
}
