//! AVX-512 with VNNI: `vpdpbusd` adds the products of four unsigned bytes with four signed ones to each lane.
//!
//! Levels are stored plus 128, so sums start from -128 times the sum of the codes. 6 tokens x 32 outputs: 12 sums of
//! integers, 12 of floats, two vectors of weights and a broadcast fill 27 of 32 registers.

use std::arch::x86_64::*;

use super::activations::{RECORD, STEPS, SUMS_16, SUMS_32, low_byte};
use super::panel::Panel;
use super::{BLOCK, Engine, Steps, Target, TileShape};
use crate::compute::aligned::AlignedBuf;
use crate::cpu::Avx512Vnni;
use crate::vectorized::vectorized;

const MR: usize = 6;
const NR: usize = 32;

pub(super) fn engine(_: Avx512Vnni) -> Engine {
    Engine { name: "avx512-vnni", mr: MR, nr: NR, tile, pack }
}

/// Codes as signed bytes, `[quad][lane]`, and what the sums of each group start from.
fn pack(panel: &mut Panel) {
    panel.packed.reserve(BLOCK / 4 * NR);
    let (columns, group) = (panel.columns, panel.group);
    assert!(panel.lanes == NR && columns <= BLOCK);
    let (packed, starts) = (panel.packed.as_mut_slice(), panel.starts.as_mut_slice());
    for (lane, codes) in panel.codes.as_mut_f32().chunks_exact(BLOCK).take(NR).enumerate() {
        let mut quads = [0; BLOCK / 4];
        let mut sums = [0.0; BLOCK / 16];
        to_bytes(&codes[..columns], group, &mut quads, &mut sums);
        for (line, quad) in packed.chunks_exact_mut(NR).zip(&quads[..columns / 4]) {
            line[lane] = *quad;
        }
        for (line, sum) in starts.chunks_exact_mut(NR).zip(&sums[..columns / group]) {
            line[lane] = (-128.0 * sum) as i32 as u32;
        }
    }
}

vectorized! {
    /// Codes as bytes, four to an element, and their sums by group.
    fn to_bytes(codes: &[f32], group: usize, quads: &mut [u32; BLOCK / 4], sums: &mut [f32; BLOCK / 16]) {
        for (quads, codes) in quads.as_chunks_mut::<4>().0.iter_mut().zip(codes.as_chunks::<16>().0) {
            let bytes = codes.map(low_byte);
            for (quad, bytes) in quads.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *quad = u32::from_le_bytes(*bytes);
            }
        }
        for (sum, codes) in sums.iter_mut().zip(codes.chunks_exact(group)) {
            let mut lanes = [0.0; 16];
            for codes in codes.as_chunks::<16>().0 {
                lanes.iter_mut().zip(codes).for_each(|(lane, code)| *lane += code);
            }
            *sum = lanes.iter().sum();
        }
    }
}

/// See [`super::TileFn`].
unsafe fn tile(shape: TileShape, rows: usize, x: *const u32, panel: &Panel, target: Target, _: &mut AlignedBuf) {
    macro_rules! with_rows {
        ($group:literal, $affine:literal, $of_32:literal) => {
            match rows {
                1 => tile_rows::<1, $group, $affine, $of_32>(shape.columns, x, panel, target),
                2 => tile_rows::<2, $group, $affine, $of_32>(shape.columns, x, panel, target),
                3 => tile_rows::<3, $group, $affine, $of_32>(shape.columns, x, panel, target),
                4 => tile_rows::<4, $group, $affine, $of_32>(shape.columns, x, panel, target),
                5 => tile_rows::<5, $group, $affine, $of_32>(shape.columns, x, panel, target),
                6 => tile_rows::<6, $group, $affine, $of_32>(shape.columns, x, panel, target),
                rows => unreachable!("a tile of {rows} rows"),
            }
        };
    }
    // SAFETY: passed on unchanged.
    unsafe {
        match (shape.steps, shape.lines.group, shape.lines.affine) {
            (Steps::Of256, 16, false) => with_rows!(16, false, false),
            (Steps::Of256, 16, true) => with_rows!(16, true, false),
            (Steps::Of256, _, false) => with_rows!(32, false, false),
            (Steps::Of256, _, true) => with_rows!(32, true, false),
            (Steps::Of32, _, false) => with_rows!(32, false, true),
            (Steps::Of32, _, true) => with_rows!(32, true, true),
        }
    }
}

/// `ROWS` tokens; see the arithmetic of the module.
///
/// # Safety
/// As [`super::TileFn`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn tile_rows<const ROWS: usize, const GROUP: usize, const AFFINE: bool, const OF_32: bool>(
    columns: usize,
    x: *const u32,
    panel: &Panel,
    target: Target,
) {
    let (codes, starts) = (panel.packed.as_ptr(), panel.starts.as_ptr());
    let (scales, offsets) = (panel.scales.as_ptr(), panel.offsets.as_ptr());
    let sums_at = if GROUP == 16 { SUMS_16 } else { SUMS_32 };
    // SAFETY: tokens below ROWS, groups of the columns and lanes below NR lie within the records, the panel and the target by
    // the contract of `TileFn`; all vectors of the panel are whole cache lines.
    unsafe {
        // The records of the tokens that follow come from the second-level cache or farther.
        for line in 0..ROWS * RECORD / 16 {
            _mm_prefetch::<_MM_HINT_T0>(x.wrapping_add(ROWS * RECORD + 16 * line).cast());
        }
        let mut totals = [[_mm512_setzero_ps(); 2]; ROWS];
        for group in 0..columns / GROUP {
            let start = [0, 16].map(|at| _mm512_load_si512(starts.add(group * NR + at).cast()));
            let mut sums = [start; ROWS];
            for quad in group * GROUP / 4..(group + 1) * GROUP / 4 {
                let w0 = _mm512_load_si512(codes.add(quad * NR).cast());
                let w1 = _mm512_load_si512(codes.add(quad * NR + 16).cast());
                for (row, sums) in sums.iter_mut().enumerate() {
                    let levels = _mm512_set1_epi32(*x.add(row * RECORD + quad) as i32);
                    sums[0] = _mm512_dpbusd_epi32(sums[0], levels, w0);
                    sums[1] = _mm512_dpbusd_epi32(sums[1], levels, w1);
                }
            }
            for half in 0..2 {
                let scale = _mm512_load_ps(scales.add(group * NR + 16 * half).cast());
                let offset = _mm512_load_ps(offsets.add(group * NR + 16 * half).cast());
                for (row, (totals, sums)) in totals.iter_mut().zip(&sums).enumerate() {
                    let record = x.add(row * RECORD);
                    let level_sum = _mm512_set1_ps(f32::from_bits(*record.add(sums_at + group)));
                    let sum = _mm512_cvtepi32_ps(sums[half]);
                    if OF_32 {
                        let step = _mm512_set1_ps(f32::from_bits(*record.add(STEPS + group * GROUP / 32)));
                        let mut value = _mm512_mul_ps(sum, scale);
                        if AFFINE {
                            value = _mm512_fmadd_ps(level_sum, offset, value);
                        }
                        totals[half] = _mm512_fmadd_ps(value, step, totals[half]);
                    } else {
                        totals[half] = _mm512_fmadd_ps(sum, scale, totals[half]);
                        if AFFINE {
                            totals[half] = _mm512_fmadd_ps(level_sum, offset, totals[half]);
                        }
                    }
                }
            }
        }
        for (row, totals) in totals.iter().enumerate() {
            let step = if OF_32 { 1.0 } else { f32::from_bits(*x.add(row * RECORD + STEPS)) };
            for (half, total) in totals.iter().enumerate() {
                let place = target.start.add(row * target.stride + 16 * half);
                let mut value = _mm512_mul_ps(*total, _mm512_set1_ps(step));
                if target.accumulate {
                    value = _mm512_add_ps(_mm512_loadu_ps(place), value);
                }
                _mm512_storeu_ps(place, value);
            }
        }
    }
}
