//! The points of a lattice and the search for those that are nearest when columns count each for itself.
//!
//! Coordinates take few values, so that what a point costs is the sum of four entries of small tables, each made for
//! one coordinate or two. Vector code looks all of them up by a permutation; the sums are the same for every
//! instruction set.

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
    /// Points whose coordinate `i` is byte `i` of an element.
    ///
    /// # Panics
    /// When there are more of them than [`MOST`], a number that [`CHUNK`] does not divide, or more magnitudes than
    /// tables have room for.
    pub(super) fn new(points: impl Iterator<Item = u64>, dims: usize) -> Points {
        let rows: Vec<[u8; 8]> = points.map(u64::to_le_bytes).collect();
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
        linear: &[f32],
        square: &[f32],
        costs: &mut Costs,
    ) -> ([u16; K], usize) {
        const { assert!(K <= CHUNK) };
        let costs = &mut costs[..self.rows.len()];
        let least = L::costs(&self.entries, &self.tables(linear, square), costs);
        // At least K points cost no more than this.
        let bound = kth_least::<K>(&least);
        let (mut best, mut list) = ([f32::INFINITY; K], [0u16; K]);
        let mut count = 0;
        for (chunk, costs) in costs.as_chunks::<CHUNK>().0.iter().enumerate() {
            if !costs.iter().fold(false, |any, &cost| any | (cost <= bound)) {
                continue;
            }
            for (k, &cost) in costs.iter().enumerate() {
                if cost <= bound && cost < best[K - 1] {
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

/// How the costs of all points are found.
pub(super) trait Lookup {
    /// Writes what each point costs: `(0 + 1) + (2 + 3)` of its entries. Gives the least of the costs at each place of
    /// a chunk, infinity where there is none.
    fn costs(entries: &[Vec<u8>; TABLES], tables: &Tables, costs: &mut [f32]) -> [f32; CHUNK];
}

/// For every machine.
pub(super) struct Portable;

impl Lookup for Portable {
    fn costs(entries: &[Vec<u8>; TABLES], tables: &Tables, costs: &mut [f32]) -> [f32; CHUNK] {
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
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86_64::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use super::{CHUNK, ENTRIES, Lookup, TABLES, Tables};
    use std::arch::x86_64::*;

    /// For callers that are compiled for AVX2.
    pub struct Avx2;

    impl Lookup for Avx2 {
        #[inline(always)]
        fn costs(entries: &[Vec<u8>; TABLES], tables: &Tables, costs: &mut [f32]) -> [f32; CHUNK] {
            // SAFETY: the caller runs on a CPU with AVX2.
            unsafe { avx2(entries, tables, costs) }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn avx2(entries: &[Vec<u8>; TABLES], tables: &Tables, costs: &mut [f32]) -> [f32; CHUNK] {
        let load = |from: &[f32; ENTRIES], at: usize| {
            let half = &from[at..at + 8];
            // SAFETY: eight floats are there.
            unsafe { _mm256_loadu_ps(half.as_ptr()) }
        };
        let tables = [0, 1, 2, 3].map(|k| [load(&tables[k], 0), load(&tables[k], 8)]);
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

    /// For callers that are compiled for AVX-512.
    pub struct Avx512;

    impl Lookup for Avx512 {
        #[inline(always)]
        fn costs(entries: &[Vec<u8>; TABLES], tables: &Tables, costs: &mut [f32]) -> [f32; CHUNK] {
            // SAFETY: the caller runs on a CPU with AVX-512.
            unsafe { avx512(entries, tables, costs) }
        }
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
