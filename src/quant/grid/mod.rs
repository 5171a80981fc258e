//! The lattices behind the IQ1, IQ2 and IQ3 types.
//!
//! These types store several weights at once as the index of a point in a fixed table. A [`Lattice`] holds one
//! such table for encoding: it tells whether a tuple of levels is a point, and if not which points lie nearest.
//! The decode tables (`iq2xxs_grid`, `iq3s_grid`, … in ggml) are the same points with each level replaced by the
//! magnitude that it stands for, so both are derived here from one list of points.

pub(super) mod fit;
mod points;

use std::sync::OnceLock;

/// Points of a lattice whose coordinates are packed as magnitudes, one byte each, first coordinate lowest.
pub(super) type DecodeTable<const N: usize> = [u64; N];

/// Magnitudes of the three levels of the IQ2 types, in eighths.
const IQ2_MAGNITUDES: [u8; 3] = [0x08, 0x19, 0x2b];
/// Values of the three levels of the IQ1 types: -1, 0, 1 as bytes.
const IQ1_VALUES: [u8; 3] = [0xff, 0x00, 0x01];
/// Magnitudes of the eight levels of IQ3_XXS, in eighths (halves of what a uniform grid would have at the top).
const IQ3_XXS_MAGNITUDES: [u8; 8] = [0x04, 0x0c, 0x14, 0x1c, 0x24, 0x2c, 0x34, 0x3e];
/// Magnitudes of the eight levels of IQ3_S.
const IQ3_S_MAGNITUDES: [u8; 8] = [1, 3, 5, 7, 9, 11, 13, 15];

/// `iq2xxs_grid`: 256 points of eight magnitudes.
pub(super) static IQ2_XXS_POINTS: DecodeTable<256> = decode_table::<256, 8, 3>(&points::IQ2_XXS, IQ2_MAGNITUDES);
/// `iq2xs_grid`: 512 points of eight magnitudes.
pub(super) static IQ2_XS_POINTS: DecodeTable<512> = decode_table::<512, 8, 3>(&points::IQ2_XS, IQ2_MAGNITUDES);
/// `iq2s_grid`: 1024 points of eight magnitudes.
pub(super) static IQ2_S_POINTS: DecodeTable<1024> = decode_table::<1024, 8, 3>(&points::IQ2_S, IQ2_MAGNITUDES);
/// `iq1s_grid`: 2048 points of eight signed values, shared by IQ1_S and IQ1_M.
pub(super) static IQ1_POINTS: DecodeTable<2048> = decode_table::<2048, 8, 3>(&points::IQ1, IQ1_VALUES);
/// The same with coordinates packed as levels 0, 1, 2, two bits each.
#[cfg(target_arch = "x86_64")] // only its decoders look weights up
pub(super) static IQ1_PACKED: [u16; 2048] = points::IQ1;
/// `iq3xxs_grid`: 256 points of four magnitudes.
pub(super) static IQ3_XXS_POINTS: [u32; 256] = narrow(&decode_table::<256, 4, 8>(&points::IQ3_XXS, IQ3_XXS_MAGNITUDES));
/// `iq3s_grid`: 512 points of four magnitudes.
pub(super) static IQ3_S_POINTS: [u32; 512] = narrow(&decode_table::<512, 4, 8>(&points::IQ3_S, IQ3_S_MAGNITUDES));

/// Coordinate `i` of a packed point of `D` coordinates.
const fn level(point: u16, i: usize, dims: usize) -> usize {
    let bits = if dims == 8 { 2 } else { 3 };
    (point as usize >> (bits * i)) & ((1 << bits) - 1)
}

const fn decode_table<const N: usize, const D: usize, const L: usize>(
    points: &[u16; N],
    magnitudes: [u8; L],
) -> [u64; N] {
    let mut table = [0u64; N];
    let mut n = 0;
    while n < N {
        let mut i = 0;
        while i < D {
            table[n] |= (magnitudes[level(points[n], i, D)] as u64) << (8 * i);
            i += 1;
        }
        n += 1;
    }
    table
}

const fn narrow<const N: usize>(wide: &[u64; N]) -> [u32; N] {
    let mut table = [0u32; N];
    let mut n = 0;
    while n < N {
        table[n] = wide[n] as u32;
        n += 1;
    }
    table
}

/// Spreads a 7-bit sign code over eight weights: bit 7 makes the number of minus signs even (`ksigns_iq2xs`).
#[inline(always)]
pub(super) const fn even_signs(code: u8) -> u8 {
    let code = code & 127;
    code | ((code.count_ones() as u8 & 1) << 7)
}

/// What an encoder finds at one tuple of levels.
#[derive(Clone, Copy)]
enum Cell {
    /// The tuple is the point with this index.
    Point(u16),
    /// It is none; these entries of [`Lattice::neighbours`] are the points to choose from, nearest first, points
    /// at the same distance by rising index.
    Near { start: u32, end: u32 },
}

/// A lattice (a codebook, or grid in ggml) of `D` coordinates, prepared for encoding. Each coordinate takes one of `32 / D` levels in a
/// [`CostTable`]; the eight-dimensional lattices use three of their four.
#[doc(alias = "codebook")]
#[doc(alias = "grid")]
pub(super) struct Lattice<const D: usize> {
    /// Levels of every point.
    levels: Vec<[u8; D]>,
    /// One cell per tuple of levels; coordinate `i` counts `levels ^ i`.
    cells: Vec<Cell>,
    /// Candidate points of all cells that are no point, back to back.
    neighbours: Vec<u16>,
    /// The same points, packed, with [`LOOKAHEAD`] numbers behind the last.
    packed: Vec<u16>,
}

/// Cost of giving each coordinate each level; entry `coordinate * 32 / D + level`.
pub(super) type CostTable = [f32; 32];

/// Numbers that may be read from the start of a list of packed points on, whatever its length.
pub(super) const LOOKAHEAD: usize = 16;

/// How to choose among points.
pub(super) trait Chooser: Copy {
    /// Position of the cheapest among the first `count` of the packed `points`, the first of equals. A point's cost is
    /// the sum over its coordinates in order, from zero. Costs that overflow never win; 0 if all do. Behind the
    /// `count` points `points` is filled up to a multiple of [`LOOKAHEAD`] at least.
    fn cheapest<const D: usize>(self, points: &[u16], count: usize, costs: &CostTable) -> usize;
}

/// Looks at one point after the other (`iq2_find_best_neighbour` and its siblings).
#[derive(Clone, Copy)]
pub(super) struct InOrder;

impl Chooser for InOrder {
    #[inline(always)]
    fn cheapest<const D: usize>(self, points: &[u16], count: usize, costs: &CostTable) -> usize {
        let mut best = f32::MAX;
        let mut winner = 0;
        for (n, &point) in points[..count].iter().enumerate() {
            let cost = (0..D).fold(0f32, |sum, i| sum + costs[i * (32 / D) + level(point, i, D)]);
            if cost < best {
                best = cost;
                winner = n;
            }
        }
        winner
    }
}

impl<const D: usize> Lattice<D> {
    /// Levels that a coordinate can take.
    pub(super) const LEVELS: usize = if D == 8 { 3 } else { 8 };

    /// Builds the neighbour lists (`iq2xs_init_impl`, `iq3xs_init_impl`): for every tuple of levels that is no
    /// point, all points at the `shells` smallest distances that occur.
    fn new(packed: &[u16], shells: usize) -> Self {
        let levels: Vec<[u8; D]> = packed.iter().map(|&p| std::array::from_fn(|i| level(p, i, D) as u8)).collect();
        let count = Self::LEVELS.pow(D as u32);
        let mut cells = vec![Cell::Near { start: 0, end: 0 }; count];
        for (n, l) in levels.iter().enumerate() {
            cells[Self::tuple(l)] = Cell::Point(n as u16);
        }
        let mut neighbours = Vec::new();
        let mut distances = vec![0u16; levels.len()];
        for (tuple, cell) in cells.iter_mut().enumerate() {
            if matches!(cell, Cell::Point(_)) {
                continue;
            }
            let at: [u8; D] = std::array::from_fn(|i| (tuple / Self::LEVELS.pow(i as u32) % Self::LEVELS) as u8);
            let mut occurs = [false; 512];
            for (distance, l) in distances.iter_mut().zip(&levels) {
                *distance = (0..D).map(|i| (l[i] as i16 - at[i] as i16).pow(2) as u16).sum();
                occurs[*distance as usize] = true;
            }
            let start = neighbours.len() as u32;
            for shell in (0..occurs.len()).filter(|&d| occurs[d]).take(shells) {
                let on_shell = distances.iter().enumerate().filter(|&(_, &d)| d as usize == shell);
                neighbours.extend(on_shell.map(|(n, _)| n as u16));
            }
            *cell = Cell::Near { start, end: neighbours.len() as u32 };
        }
        let mut packed_neighbours: Vec<u16> = neighbours.iter().map(|&n| packed[n as usize]).collect();
        packed_neighbours.resize(neighbours.len() + LOOKAHEAD, 0);
        Lattice { levels, cells, neighbours, packed: packed_neighbours }
    }

    /// Number of a tuple of levels among all tuples.
    #[inline(always)]
    fn tuple(levels: &[u8; D]) -> usize {
        let mut tuple = 0;
        let mut weight = 1;
        for &l in levels {
            tuple += l as usize * weight;
            weight *= Self::LEVELS;
        }
        tuple
    }

    /// Levels of the point with this index.
    #[inline(always)]
    pub(super) fn levels(&self, point: u16) -> &[u8; D] {
        &self.levels[point as usize]
    }

    /// The point that stands for a tuple of levels, and whether it is that tuple itself. Otherwise the cheapest
    /// of the neighbours is taken, the first where several cost the same; `costs` is called only then. Where ggml
    /// aborts because all costs overflow, the nearest point is returned.
    #[inline(always)]
    pub(super) fn nearest(
        &self,
        chooser: impl Chooser,
        levels: &[u8; D],
        costs: impl FnOnce() -> CostTable,
    ) -> (u16, bool) {
        self.nearest_to_tuple(chooser, Self::tuple(levels), costs)
    }

    /// [`Self::nearest`] for the number of a tuple of levels: coordinate `i` counts `levels ^ i`.
    #[inline(always)]
    pub(super) fn nearest_to_tuple(
        &self,
        chooser: impl Chooser,
        tuple: usize,
        costs: impl FnOnce() -> CostTable,
    ) -> (u16, bool) {
        match self.cells[tuple] {
            Cell::Point(point) => (point, true),
            Cell::Near { start, end } => {
                let (start, count) = (start as usize, (end - start) as usize);
                let winner = chooser.cheapest::<D>(&self.packed[start..], count, &costs());
                (self.neighbours[start + winner], false)
            }
        }
    }
}

/// Each of `D` numbers once per level, as a [`CostTable`] orders them.
#[inline(always)]
pub(super) fn spread<const D: usize>(numbers: &[f32; D]) -> CostTable {
    let mut table = [0f32; 32];
    for (row, number) in table.chunks_exact_mut(32 / D).zip(numbers) {
        row.fill(*number);
    }
    table
}

/// The values of the levels, once per coordinate, as a [`CostTable`] orders them.
pub(super) const fn repeat<const D: usize, const L: usize>(values: &[f32; L]) -> CostTable {
    let mut table = [0f32; 32];
    let mut entry = 0;
    while entry < 32 {
        if entry % (32 / D) < L {
            table[entry] = values[entry % (32 / D)];
        }
        entry += 1;
    }
    table
}

/// Weighted squared error of each coordinate at each level: `weight * (scale * value - target)^2`.
#[inline(always)]
pub(super) fn squared_errors(values: &CostTable, scale: f32, targets: &CostTable, weights: &CostTable) -> CostTable {
    let mut costs = [0f32; 32];
    for i in 0..32 {
        let error = scale * values[i] - targets[i];
        costs[i] = weights[i] * error * error;
    }
    costs
}

macro_rules! lattice {
    ($(#[$doc:meta])* $name:ident: $dims:literal from $points:ident, $shells:literal shells) => {
        $(#[$doc])*
        pub(super) fn $name() -> &'static Lattice<$dims> {
            static LATTICE: OnceLock<Lattice<$dims>> = OnceLock::new();
            LATTICE.get_or_init(|| Lattice::new(&points::$points, $shells))
        }
    };
}

lattice!(/// Lattice of IQ2_XXS.
    iq2_xxs: 8 from IQ2_XXS, 2 shells);
lattice!(/// Lattice of IQ2_XS.
    iq2_xs: 8 from IQ2_XS, 2 shells);
lattice!(/// Lattice of IQ2_S.
    iq2_s: 8 from IQ2_S, 1 shells);
lattice!(/// Lattice of IQ1_S and IQ1_M.
    iq1: 8 from IQ1, 3 shells);
lattice!(/// Lattice of IQ3_XXS.
    iq3_xxs: 4 from IQ3_XXS, 2 shells);
lattice!(/// Lattice of IQ3_S.
    iq3_s: 4 from IQ3_S, 3 shells);

#[cfg(test)]
mod tests;
