//! The points of a lattice and the search for those that are nearest when columns count each for itself.
//!
//! Coordinates take few values, so that what a point costs is the sum of four entries of small tables, each made for
//! one coordinate or two. Vector code looks all of them up by a permutation; the sums are the same for every
//! instruction set.

use crate::quant::shape::LatticePoints;

/// Most points of a lattice.
const MOST: usize = 1024;

/// Tables whose entries add up to the cost of a point.
const TABLES: usize = 4;

/// Entries of a table.
const ENTRIES: usize = 16;

/// Points that are passed over at once when none of them is near enough.
const CHUNK: usize = 16;

/// Room for what each point costs.
pub(super) type Costs = [f32; MOST];

pub(super) const NO_COSTS: Costs = [0.0; MOST];

type Tables = [[f32; ENTRIES]; TABLES];

/// The points of a lattice, as magnitudes in their own units.
pub(super) struct Points {
    /// Coordinates; those of four dimensions are followed by zeros.
    rows: Vec<[u8; 8]>,
    /// 8 or 4.
    pub dims: usize,
    /// Values that coordinates take, ascending.
    magnitudes: Vec<f32>,
    /// For each table and point, the entry that belongs to the point.
    entries: [Vec<u8>; TABLES],
}

impl Points {
    /// Prepares the points of a lattice.
    ///
    /// # Panics
    /// When there are more of them than [`MOST`], a number that [`CHUNK`] does not divide, or more magnitudes than
    /// tables have room for.
    pub(super) fn new(points: LatticePoints) -> Points {
        let (rows, dims): (Vec<[u8; 8]>, _) = match points {
            LatticePoints::Of8(points) => (points.iter().map(|point| point.to_le_bytes()).collect(), 8),
            LatticePoints::Of4(points) => (points.iter().map(|&point| u64::from(point).to_le_bytes()).collect(), 4),
        };
        assert!(rows.len() <= MOST && rows.len().is_multiple_of(CHUNK));
        let mut magnitudes: Vec<u8> = rows.iter().flat_map(|row| row[..dims].iter().copied()).collect();
        magnitudes.sort_unstable();
        magnitudes.dedup();
        let per_table = dims / TABLES;
        assert!(magnitudes.len().pow(per_table as u32) <= ENTRIES);
        let digit = |v: u8| magnitudes.iter().position(|&m| m == v).unwrap_or(0);
        let entries = std::array::from_fn(|table| {
            let of_row = |row: &[u8; 8]| {
                let digits = row[table * per_table..(table + 1) * per_table].iter();
                digits.fold(0, |entry, &v| entry * magnitudes.len() + digit(v)) as u8
            };
            rows.iter().map(of_row).collect()
        });
        Points { dims, magnitudes: magnitudes.iter().map(|&v| f32::from(v)).collect(), entries, rows }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    /// The magnitudes of a point.
    #[inline(always)]
    pub(super) fn row(&self, point: u16) -> &[u8; 8] {
        &self.rows[usize::from(point)]
    }

    /// What coordinates add to the cost `sum of linear * coordinate + square * coordinate^2`.
    #[inline(always)]
    fn tables(&self, linear: &[f32], square: &[f32]) -> Tables {
        let mut tables = [[0.0; ENTRIES]; TABLES];
        let cost = |i: usize, v: f32| linear[i] * v + square[i] * (v * v);
        let count = self.magnitudes.len();
        for (k, table) in tables.iter_mut().enumerate() {
            if self.dims == TABLES {
                for (entry, &v) in table.iter_mut().zip(&self.magnitudes) {
                    *entry = cost(k, v);
                }
            } else {
                for (a, &first) in self.magnitudes.iter().enumerate() {
                    for (b, &second) in self.magnitudes.iter().enumerate() {
                        table[(a * count + b) % ENTRIES] = cost(2 * k, first) + cost(2 * k + 1, second);
                    }
                }
            }
        }
        tables
    }

    /// The `K` points with the least `sum of linear * coordinate + square * coordinate^2`, best first, of equal ones
    /// the first, and how many of the list are filled.
    #[inline(always)]
    pub(super) fn shortlist<const K: usize, L: Lookup>(
        &self,
        lookup: L,
        linear: &[f32],
        square: &[f32],
        costs: &mut Costs,
    ) -> ([u16; K], usize) {
        const { assert!(K <= CHUNK) };
        let costs = &mut costs[..self.rows.len()];
        let least = lookup.costs(&self.entries, &self.tables(linear, square), costs);
        // At least K points cost no more than this.
        let bound = kth_least::<K>(&least);
        let (mut best, mut list) = ([f32::INFINITY; K], [0u16; K]);
        let mut count = 0;
        for (chunk, costs) in costs.as_chunks::<CHUNK>().0.iter().enumerate() {
            let mut near = lookup.near(costs, bound);
            while near != 0 {
                let k = near.trailing_zeros() as usize;
                near &= near - 1;
                let cost = costs[k % CHUNK];
                if cost < best[K - 1] {
                    let place = best.iter().position(|&known| cost < known).unwrap_or(K - 1);
                    for i in (place + 1..K).rev() {
                        (best[i], list[i]) = (best[i - 1], list[i - 1]);
                    }
                    (best[place], list[place]) = (cost, (chunk * CHUNK + k) as u16);
                    count = (count + 1).min(K);
                }
            }
        }
        // Costs that are not finite leave the list empty: then any point does.
        (list, count.max(1))
    }
}

/// The `K`th least of a few numbers, none of them NaN.
#[inline(always)]
fn kth_least<const K: usize>(numbers: &[f32; CHUNK]) -> f32 {
    let mut less = [0u32; CHUNK];
    for number in numbers {
        for (less, other) in less.iter_mut().zip(numbers) {
            *less += u32::from(number < other);
        }
    }
    let mut bound = f32::NEG_INFINITY;
    for (&less, &number) in less.iter().zip(numbers) {
        let number = if less < K as u32 { number } else { f32::NEG_INFINITY };
        bound = if number > bound { number } else { bound };
    }
    bound
}

/// How the costs of all points are found. A value proves that this CPU has what that takes, see [`cpu`](crate::cpu).
pub(super) trait Lookup: Copy {
    /// Writes what each point costs: `(0 + 1) + (2 + 3)` of its entries. Gives the least of the costs at each place of
    /// a chunk, infinity where there is none.
    fn costs(self, entries: &[Vec<u8>; TABLES], tables: &Tables, costs: &mut [f32]) -> [f32; CHUNK];

    /// A bit for each of the costs that is at most `bound`.
    fn near(self, costs: &[f32; CHUNK], bound: f32) -> u32;

    /// `sum of x * y`, as `((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7))`.
    fn dot(self, x: &[f32; 8], y: &[f32; 8]) -> f32;

    /// The least of `base + 4 v (p + v d)` over eight values each, and the first place where it is.
    fn least_turn(self, base: f32, v: &[f32; 8], p: &[f32; 8], d: &[f32; 8]) -> (f32, usize);
}

/// For every machine.
#[derive(Clone, Copy)]
pub(super) struct Portable;

impl Lookup for Portable {
    fn costs(self, entries: &[Vec<u8>; TABLES], tables: &Tables, costs: &mut [f32]) -> [f32; CHUNK] {
        let mut least = [f32::INFINITY; CHUNK];
        for (point, out) in costs.iter_mut().enumerate() {
            let term = |k: usize| tables[k][usize::from(entries[k][point]) % ENTRIES];
            let cost = (term(0) + term(1)) + (term(2) + term(3));
            *out = cost;
            let least = &mut least[point % CHUNK];
            *least = if cost < *least { cost } else { *least };
        }
        least
    }

    fn near(self, costs: &[f32; CHUNK], bound: f32) -> u32 {
        costs.iter().rev().fold(0, |near, &cost| near << 1 | u32::from(cost <= bound))
    }

    fn dot(self, x: &[f32; 8], y: &[f32; 8]) -> f32 {
        let terms: [f32; 8] = std::array::from_fn(|i| x[i] * y[i]);
        ((terms[0] + terms[4]) + (terms[2] + terms[6])) + ((terms[1] + terms[5]) + (terms[3] + terms[7]))
    }

    fn least_turn(self, base: f32, v: &[f32; 8], p: &[f32; 8], d: &[f32; 8]) -> (f32, usize) {
        let mut least = (f32::INFINITY, 0);
        for i in 0..8 {
            let turn = base + 4.0 * v[i] * (p[i] + v[i] * d[i]);
            if turn < least.0 {
                least = (turn, i);
            }
        }
        least
    }
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use super::{CHUNK, Lookup, TABLES, Tables};
    use crate::cpu::{Avx2, Avx512};
    use std::arch::x86_64::*;

    impl Lookup for Avx2 {
        #[inline(always)]
        fn costs(self, entries: &[Vec<u8>; TABLES], tables: &Tables, costs: &mut [f32]) -> [f32; CHUNK] {
            // SAFETY: the value proves that the CPU has AVX2.
            unsafe { avx2(entries, tables, costs) }
        }

        #[inline(always)]
        fn near(self, costs: &[f32; CHUNK], bound: f32) -> u32 {
            // SAFETY: the value proves that the CPU has AVX2.
            unsafe { near_avx2(costs, bound) }
        }

        #[inline(always)]
        fn dot(self, x: &[f32; 8], y: &[f32; 8]) -> f32 {
            // SAFETY: the value proves that the CPU has AVX2.
            unsafe { dot_avx2(x, y) }
        }

        #[inline(always)]
        fn least_turn(self, base: f32, v: &[f32; 8], p: &[f32; 8], d: &[f32; 8]) -> (f32, usize) {
            // SAFETY: the value proves that the CPU has AVX2.
            unsafe { least_turn_avx2(base, v, p, d) }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn load(from: &[f32; 8]) -> __m256 {
        // SAFETY: eight floats are there.
        unsafe { _mm256_loadu_ps(from.as_ptr()) }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn near_avx2(costs: &[f32; CHUNK], bound: f32) -> u32 {
        let near = |costs| {
            let near = _mm256_cmp_ps::<_CMP_LE_OQ>(load(costs), _mm256_set1_ps(bound));
            _mm256_movemask_ps(near) as u32
        };
        let halves = costs.as_chunks::<8>().0;
        near(&halves[0]) | near(&halves[1]) << 8
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn dot_avx2(x: &[f32; 8], y: &[f32; 8]) -> f32 {
        let terms = _mm256_mul_ps(load(x), load(y));
        let four = _mm_add_ps(_mm256_castps256_ps128(terms), _mm256_extractf128_ps::<1>(terms));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn least_turn_avx2(base: f32, v: &[f32; 8], p: &[f32; 8], d: &[f32; 8]) -> (f32, usize) {
        let (v, p, d) = (load(v), load(p), load(d));
        let gain = _mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(4.0), v), _mm256_add_ps(p, _mm256_mul_ps(v, d)));
        // NaN becomes infinity.
        let turns = _mm256_min_ps(_mm256_add_ps(_mm256_set1_ps(base), gain), _mm256_set1_ps(f32::INFINITY));
        let four = _mm_min_ps(_mm256_castps256_ps128(turns), _mm256_extractf128_ps::<1>(turns));
        let two = _mm_min_ps(four, _mm_movehl_ps(four, four));
        let least = _mm_cvtss_f32(_mm_min_ss(two, _mm_movehdup_ps(two)));
        let places = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_EQ_OQ>(turns, _mm256_set1_ps(least)));
        (least, places.trailing_zeros() as usize % 8)
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn avx2(entries: &[Vec<u8>; TABLES], tables: &Tables, costs: &mut [f32]) -> [f32; CHUNK] {
        let tables = tables.each_ref().map(|table| {
            let halves = table.as_chunks::<8>().0;
            [load(&halves[0]), load(&halves[1])]
        });
        let mut least = [_mm256_set1_ps(f32::INFINITY); 2];
        let chunks = entries.each_ref().map(|entries| entries.as_chunks::<8>().0);
        for (chunk, out) in costs.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let term = |k: usize| {
                let entries = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(i64::from_le_bytes(chunks[k][chunk])));
                let [low, high] = tables[k].map(|table| _mm256_permutevar8x32_ps(table, entries));
                // Bit 3 of the entry is the sign that chooses.
                _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(entries)))
            };
            let cost = _mm256_add_ps(_mm256_add_ps(term(0), term(1)), _mm256_add_ps(term(2), term(3)));
            // SAFETY: eight floats have room.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), cost) };
            // NaN leaves what is there.
            least[chunk % 2] = _mm256_min_ps(cost, least[chunk % 2]);
        }
        let mut found = [0.0; CHUNK];
        for (found, least) in found.as_chunks_mut::<8>().0.iter_mut().zip(least) {
            // SAFETY: eight floats have room.
            unsafe { _mm256_storeu_ps(found.as_mut_ptr(), least) };
        }
        found
    }

    impl Lookup for Avx512 {
        #[inline(always)]
        fn costs(self, entries: &[Vec<u8>; TABLES], tables: &Tables, costs: &mut [f32]) -> [f32; CHUNK] {
            // SAFETY: the value proves that the CPU has AVX-512.
            unsafe { avx512(entries, tables, costs) }
        }

        #[inline(always)]
        fn near(self, costs: &[f32; CHUNK], bound: f32) -> u32 {
            // SAFETY: the value proves that the CPU has AVX-512.
            unsafe { near_avx512(costs, bound) }
        }

        #[inline(always)]
        fn dot(self, x: &[f32; 8], y: &[f32; 8]) -> f32 {
            self.avx2().dot(x, y)
        }

        #[inline(always)]
        fn least_turn(self, base: f32, v: &[f32; 8], p: &[f32; 8], d: &[f32; 8]) -> (f32, usize) {
            self.avx2().least_turn(base, v, p, d)
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn near_avx512(costs: &[f32; CHUNK], bound: f32) -> u32 {
        // SAFETY: sixteen floats are there.
        let costs = unsafe { _mm512_loadu_ps(costs.as_ptr()) };
        _mm512_cmp_ps_mask::<_CMP_LE_OQ>(costs, _mm512_set1_ps(bound)).into()
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn avx512(entries: &[Vec<u8>; TABLES], tables: &Tables, costs: &mut [f32]) -> [f32; CHUNK] {
        // SAFETY: a table has sixteen floats.
        let tables = tables.each_ref().map(|table| unsafe { _mm512_loadu_ps(table.as_ptr()) });
        let mut least = _mm512_set1_ps(f32::INFINITY);
        let chunks = entries.each_ref().map(|entries| entries.as_chunks::<CHUNK>().0);
        for (chunk, out) in costs.as_chunks_mut::<CHUNK>().0.iter_mut().enumerate() {
            let term = |k: usize| {
                // SAFETY: a chunk has sixteen bytes.
                let entries = unsafe { _mm_loadu_si128(chunks[k][chunk].as_ptr().cast()) };
                _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(entries), tables[k])
            };
            let cost = _mm512_add_ps(_mm512_add_ps(term(0), term(1)), _mm512_add_ps(term(2), term(3)));
            // SAFETY: sixteen floats have room.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), cost) };
            // NaN leaves what is there.
            least = _mm512_min_ps(cost, least);
        }
        let mut found = [0.0; CHUNK];
        // SAFETY: sixteen floats have room.
        unsafe { _mm512_storeu_ps(found.as_mut_ptr(), least) };
        found
    }
}
