//! Encoders and decoders of every type, at every instruction set that this machine has.
//!
//! Bell-shaped rows of 4096 weights, as many for each thread; the best of N rounds counts. GB/s are bytes read and written,
//! and their share is that of a plain copy of as many bytes on the same threads, measured beside.

use std::fmt::{self, Write as _};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use rayon::ThreadPool;
use serde::Serialize;

use super::{BenchError, RandomFloats, pools};
use crate::cpu::{self, Level};
use crate::gguf::{TensorType, TypeInfo};
use crate::progress::Watch;
use crate::quant::{self, CODECS, kernels};

/// What to measure.
#[derive(Clone, Debug)]
pub struct CodecsBench {
    /// Types; all that can be written or read when empty.
    pub types: Vec<TensorType>,
    /// Names of instruction sets; all that this CPU has and `LWQ_ISA` allows when empty.
    pub levels: Vec<String>,
    /// Rounds, of which the best counts.
    pub rounds: u32,
    /// Rows of 4096 weights for each thread; slow encoders get fewer.
    pub rows: usize,
    /// Threads; one is measured, too.
    pub threads: usize,
}

const ROW_LEN: usize = 4096;

/// Seconds that one round of an encoder takes at most, by having fewer rows.
const ROUND_SECONDS: f64 = 0.02;

/// Seconds that a round takes at least, by repeating what is measured: starting the threads should not count.
const LEAST_SECONDS: f64 = 0.004;

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct CodecsReport {
    /// Name of the CPU.
    pub cpu: String,
    /// Rounds, of which the best counts.
    pub rounds: u32,
    /// Plain copies.
    pub copies: Vec<CopySpeed>,
    /// Encoders and decoders.
    pub rows: Vec<CodecRow>,
}

/// Speed of a plain copy.
#[derive(Clone, Debug, Serialize)]
pub struct CopySpeed {
    /// Threads.
    pub threads: usize,
    /// Billions of bytes read and written per second.
    pub gigabytes_per_second: f64,
}

/// Speed of an encoder or decoder.
#[derive(Clone, Debug, Serialize)]
pub struct CodecRow {
    /// ggml's name of the type.
    #[serde(rename = "type")]
    pub ty: &'static str,
    /// `quantize`, `quantize weighted` or `decode`.
    pub what: &'static str,
    /// Instruction set.
    pub isa: &'static str,
    /// Threads.
    pub threads: usize,
    /// Weights per second.
    pub weights_per_second: f64,
    /// Billions of bytes read and written per second.
    pub gigabytes_per_second: f64,
    /// The same by that of a copy on as many threads.
    pub share_of_copy: f64,
    /// Times the speed of scalar code on as many threads, where that was measured too.
    pub times_scalar: Option<f64>,
    /// Times the speed of one thread.
    pub scaling: f64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Plain,
    Weighted,
    Decode,
}

impl What {
    const ALL: [What; 3] = [What::Plain, What::Weighted, What::Decode];

    fn name(self) -> &'static str {
        match self {
            What::Plain => "quantize",
            What::Weighted => "quantize weighted",
            What::Decode => "decode",
        }
    }
}

/// What all measurements share.
struct Rows {
    weights: Vec<f32>,
    importance: Vec<f32>,
    rounds: u32,
    rows_per_thread: usize,
}

impl CodecsBench {
    /// Measures. Types without encoder and decoder are passed over with a warning.
    ///
    /// # Errors
    /// When an instruction set is not available here.
    pub fn run(&self, watch: &dyn Watch) -> Result<CodecsReport, BenchError> {
        let levels = selected_levels(&self.levels)?;
        let pools = pools(self.threads)?;
        let count = self.rows * ROW_LEN * self.threads.max(1);
        let mut uniform = RandomFloats(1);
        let mut next = || uniform.next().unwrap_or(0.0);
        let bench = Rows {
            weights: (0..count).map(|_| (next() + next() + next() + next()) * 0.05).collect(),
            importance: (0..ROW_LEN).map(|_| (next() * 2.0).exp()).collect(),
            rounds: self.rounds,
            rows_per_thread: self.rows,
        };
        let copies: Vec<CopySpeed> = pools.iter().map(|pool| bench.copy(pool)).collect();
        let mut rows = Vec::new();
        for codec in CODECS {
            let Some(info) = codec.ty.info().filter(|_| self.types.is_empty() || self.types.contains(&codec.ty)) else {
                continue;
            };
            for what in What::ALL {
                if what != What::Decode && codec.quantize.is_none() || what == What::Plain && codec.needs_importance() {
                    continue;
                }
                rows.extend(bench.measure(info, what, &levels, &pools, &copies)?);
            }
        }
        for ty in self.types.iter().filter(|ty| quant::codec(**ty).is_none()) {
            watch.warn(&format!("{ty}: no encoder and no decoder; skipped"));
        }
        Ok(CodecsReport { cpu: cpu::name(), rounds: self.rounds, copies, rows })
    }
}

fn selected_levels(names: &[String]) -> Result<Vec<Level>, BenchError> {
    // The kernels of AVX-512 with BF16 are those of AVX-512.
    let known = || cpu::available_levels().filter(|level| *level != Level::Avx512Bf16);
    if names.is_empty() {
        return Ok(known().collect());
    }
    names
        .iter()
        .map(|name| {
            let names = || known().map(Level::name).collect::<Vec<_>>().join(", ");
            let level = known().find(|level| level.name().eq_ignore_ascii_case(name));
            level.ok_or_else(|| BenchError::LevelNotHere { name: name.clone(), known: names() })
        })
        .collect()
}

/// The best of some rounds, in seconds.
fn best_of(rounds: u32, mut work: impl FnMut()) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..rounds {
        let start = Instant::now();
        work();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

/// [`best_of`] for all threads of the pool at once. `work` is called with a thread's number and its output, of `len`
/// values.
fn best_of_all<T: Clone + Default + Send>(
    pool: &ThreadPool,
    rounds: u32,
    len: usize,
    work: impl Fn(usize, &mut [T]) + Sync,
) -> f64 {
    let outputs: Vec<_> = (0..pool.current_num_threads()).map(|_| Mutex::new(vec![T::default(); len])).collect();
    let round = |repeat: u32| {
        pool.broadcast(|thread| {
            let mut out = outputs[thread.index()].lock().unwrap_or_else(PoisonError::into_inner);
            for _ in 0..repeat {
                work(thread.index(), &mut out);
            }
        });
    };
    // The first time touches the outputs' pages.
    round(1);
    let once = best_of(1, || round(1));
    let repeat = (LEAST_SECONDS / once).ceil().clamp(1.0, 1e5) as u32;
    best_of(rounds, || round(repeat)) / f64::from(repeat)
}

impl Rows {
    fn copy(&self, pool: &ThreadPool) -> CopySpeed {
        let threads = pool.current_num_threads();
        let share = self.rows_per_thread * ROW_LEN;
        let seconds = best_of_all(pool, self.rounds.max(5), share, |thread, dst| {
            dst.copy_from_slice(&self.weights[thread * share..][..share]);
        });
        CopySpeed { threads, gigabytes_per_second: 8.0 * (threads * share) as f64 / seconds / 1e9 }
    }

    /// One row of the report for each level and pool.
    fn measure(
        &self,
        info: &'static TypeInfo,
        what: What,
        levels: &[Level],
        pools: &[ThreadPool],
        copies: &[CopySpeed],
    ) -> Result<Vec<CodecRow>, BenchError> {
        let row_bytes = ROW_LEN / info.block_len * info.block_bytes;
        debug_assert!(ROW_LEN.is_multiple_of(info.block_len), "{}", info.name);
        let mut measured: Vec<CodecRow> = Vec::new();
        for &level in levels {
            let mut one_thread = 0.0;
            for (pool, copy) in pools.iter().zip(copies) {
                let threads = pool.current_num_threads();
                let rows = self.rows_for(info.ty, what, level);
                let weights = &self.weights[..threads * rows * ROW_LEN];
                let mut blocks = vec![0u8; threads * rows * row_bytes];
                let share = rows * ROW_LEN;
                let seconds = if what == What::Decode {
                    if quant::codec(info.ty).is_some_and(|codec| codec.quantize.is_some()) {
                        quant::quantize_rows(info.ty, weights, ROW_LEN, Some(&self.importance), &mut blocks)?;
                    }
                    let decode = kernels::dequantizer_at(info.ty, level).ok_or(BenchError::NoCodec(info.ty))?;
                    best_of_all(pool, self.rounds, share, |thread, out| {
                        decode(&blocks[thread * rows * row_bytes..][..rows * row_bytes], out);
                    })
                } else {
                    let encode = kernels::quantizer_at(info.ty, level).ok_or(BenchError::NoCodec(info.ty))?;
                    let importance = (what == What::Weighted).then_some(&self.importance[..]);
                    best_of_all(pool, self.rounds, rows * row_bytes, |thread, out| {
                        encode(&weights[thread * share..][..share], ROW_LEN, importance, out);
                    })
                };
                let speed = weights.len() as f64 / seconds;
                let gigabytes = (4 * weights.len() + blocks.len()) as f64 / seconds / 1e9;
                if one_thread == 0.0 {
                    one_thread = speed;
                }
                let scalar = measured.iter().find(|row| row.threads == threads && row.isa == Level::Scalar.name());
                measured.push(CodecRow {
                    ty: info.name,
                    what: what.name(),
                    isa: level.name(),
                    threads,
                    weights_per_second: speed,
                    gigabytes_per_second: gigabytes,
                    share_of_copy: gigabytes / copy.gigabytes_per_second,
                    times_scalar: match level {
                        Level::Scalar => Some(1.0),
                        _ => scalar.map(|scalar| speed / scalar.weights_per_second),
                    },
                    scaling: speed / one_thread,
                });
            }
        }
        Ok(measured)
    }

    /// Rows per thread that take no longer than a round should.
    fn rows_for(&self, ty: TensorType, what: What, level: Level) -> usize {
        let importance = (what == What::Weighted).then_some(&self.importance[..]);
        let Some(encode) = kernels::quantizer_at(ty, level).filter(|_| what != What::Decode) else {
            return self.rows_per_thread;
        };
        let mut out = vec![0u8; 8 * ROW_LEN];
        let bytes = ty.info().and_then(|info| info.row_bytes(ROW_LEN as u64)).unwrap_or(0) as usize;
        let seconds = best_of(2, || encode(&self.weights[..ROW_LEN], ROW_LEN, importance, &mut out[..bytes]));
        ((ROUND_SECONDS / seconds) as usize).clamp(1, self.rows_per_thread)
    }
}

impl fmt::Display for CodecsReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&table(self))
    }
}

fn table(report: &CodecsReport) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "{} ({} rounds, best of each)\n", report.cpu, report.rounds);
    for copy in &report.copies {
        let _ = writeln!(out, "copy, {} threads: {:.1} GB/s read and written", copy.threads, copy.gigabytes_per_second);
    }
    let _ = writeln!(
        out,
        "\n{:<8} {:<18} {:<8} {:>7} {:>11} {:>7} {:>8} {:>9} {:>8}",
        "type", "what", "isa", "threads", "Mweights/s", "GB/s", "of copy", "of scalar", "scaling"
    );
    for row in &report.rows {
        let _ = writeln!(
            out,
            "{:<8} {:<18} {:<8} {:>7} {:>11.1} {:>7.2} {:>7.1}% {:>9} {:>7.2}x",
            row.ty,
            row.what,
            row.isa,
            row.threads,
            row.weights_per_second / 1e6,
            row.gigabytes_per_second,
            row.share_of_copy * 100.0,
            row.times_scalar.map_or("-".to_owned(), |times| format!("{times:.2}x")),
            row.scaling
        );
    }
    out
}
