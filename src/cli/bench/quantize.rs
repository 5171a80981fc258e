//! `lwq bench quantize`: encoders and decoders of every type, at every instruction set that this machine has.
//!
//! Bell-shaped rows of 4096 weights, as many for each thread; the best of N rounds counts. GB/s are bytes read and written, and their share is
//! that of a plain copy of as many bytes on the same threads, measured beside.

use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, ensure};
use clap::Args;
use rayon::ThreadPool;
use serde::Serialize;

use super::super::Common;
use super::kernels::{RandomFloats, tensor_type};
use lwq::cpu::{self, Level};
use lwq::gguf::{TensorType, TypeInfo};
use lwq::quant::{self, CODECS, kernels};

/// Arguments of `lwq bench quantize`.
#[derive(Args, Debug)]
pub struct QuantizeArgs {
    /// Types to measure [default: all that can be written or read]
    #[arg(long = "type", value_name = "TYPE", value_parser = tensor_type, value_delimiter = ',')]
    types: Vec<TensorType>,
    /// Instruction sets to measure, such as avx2 [default: all that this CPU has and LWQ_ISA allows]
    #[arg(long = "isa", value_name = "NAME", value_delimiter = ',')]
    levels: Vec<String>,
    /// Rounds, of which the best counts
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=10000))]
    rounds: u32,
    /// Rows of 4096 weights for each thread; slow encoders get fewer
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65536))]
    rows: u32,
}

const ROW_LEN: usize = 4096;

/// Seconds that one round of an encoder takes at most, by having fewer rows.
const ROUND_SECONDS: f64 = 0.02;

/// Seconds that a round takes at least, by repeating what is measured: starting the threads should not count.
const LEAST_SECONDS: f64 = 0.004;

#[derive(Serialize)]
struct Report {
    cpu: String,
    rounds: u32,
    copies: Vec<CopySpeed>,
    rows: Vec<Row>,
}

#[derive(Serialize)]
struct CopySpeed {
    threads: usize,
    gigabytes_per_second: f64,
}

#[derive(Serialize)]
struct Row {
    #[serde(rename = "type")]
    ty: &'static str,
    what: &'static str,
    isa: &'static str,
    threads: usize,
    weights_per_second: f64,
    gigabytes_per_second: f64,
    share_of_copy: f64,
    /// Times the speed of scalar code on as many threads, where that was measured too.
    times_scalar: Option<f64>,
    /// Times the speed of one thread.
    scaling: f64,
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
struct Bench {
    weights: Vec<f32>,
    importance: Vec<f32>,
    rounds: u32,
    rows_per_thread: usize,
}

pub(super) fn run(args: &QuantizeArgs, common: &Common) -> anyhow::Result<()> {
    let levels = selected_levels(&args.levels)?;
    let mut thread_counts = vec![1, common.thread_count()];
    thread_counts.dedup();
    let pools = thread_counts
        .iter()
        .map(|&threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build())
        .collect::<Result<Vec<_>, _>>()?;
    let rows_per_thread = args.rows as usize;
    let count = rows_per_thread * ROW_LEN * thread_counts[thread_counts.len() - 1];
    let mut uniform = RandomFloats(1);
    let mut next = || uniform.next().unwrap_or(0.0);
    let bench = Bench {
        weights: (0..count).map(|_| (next() + next() + next() + next()) * 0.05).collect(),
        importance: (0..ROW_LEN).map(|_| (next() * 2.0).exp()).collect(),
        rounds: args.rounds,
        rows_per_thread,
    };
    let copies: Vec<CopySpeed> = pools.iter().map(|pool| bench.copy(pool)).collect();
    let mut rows = Vec::new();
    for codec in CODECS {
        let Some(info) = codec.ty.info().filter(|_| args.types.is_empty() || args.types.contains(&codec.ty)) else {
            continue;
        };
        for what in What::ALL {
            if what != What::Decode && codec.quantize.is_none() || what == What::Plain && codec.needs_importance() {
                continue;
            }
            rows.extend(bench.measure(info, what, &levels, &pools, &copies)?);
        }
    }
    for ty in args.types.iter().filter(|ty| quant::codec(**ty).is_none()) {
        common.warn(format!("{ty}: no encoder and no decoder; skipped"));
    }
    let report = Report { cpu: cpu::name(), rounds: args.rounds, copies, rows };
    if common.json { common.result_json(&report) } else { common.result(table(&report)) }
}

fn selected_levels(names: &[String]) -> anyhow::Result<Vec<Level>> {
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
            level.with_context(|| format!("--isa {name}: not available here; use one of {}", names()))
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

impl Bench {
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
    ) -> anyhow::Result<Vec<Row>> {
        let row_bytes = ROW_LEN / info.block_len * info.block_bytes;
        ensure!(ROW_LEN.is_multiple_of(info.block_len), "{}: rows of {ROW_LEN} are not whole blocks", info.name);
        let mut measured: Vec<Row> = Vec::new();
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
                    let decode = kernels::dequantizer_at(info.ty, level).context("the type has a decoder")?;
                    best_of_all(pool, self.rounds, share, |thread, out| {
                        decode(&blocks[thread * rows * row_bytes..][..rows * row_bytes], out);
                    })
                } else {
                    let encode = kernels::quantizer_at(info.ty, level).context("the type has an encoder")?;
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
                measured.push(Row {
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

fn table(report: &Report) -> String {
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
