//! `lwq bench kernels`: matrix products against the peak of multiply-adds from registers.
//!
//! Peak and product alternate, and of each the best of N rounds counts: clock speed and the load of
//! other programs change slowly enough that both see the same good moments. A second figure relates the
//! operations to the CPU time that this process got, which other programs' load lowers less.

use std::fmt::Write as _;
use std::time::Instant;

use anyhow::{Context, ensure};
use clap::Args;
use rayon::ThreadPool;
use serde::Serialize;

use super::super::Common;
use lwq::compute::peak::Peak;
use lwq::compute::{
    IntegerActivations, Kernel, Matrix, PackedActivations, Precision, Steps, integer_engine, matmul, matmul_integer,
    multiplies_as_integers,
};
use lwq::cpu;
use lwq::gguf::TensorType;
use lwq::quant;

/// Arguments of `lwq bench kernels`.
#[derive(Args, Debug)]
pub struct KernelsArgs {
    /// Tokens that share one pass over the weights
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65536))]
    tokens: u32,
    /// Shapes of the weights, outputs x inputs
    #[arg(long = "shape", value_name = "ROWSxCOLS", value_parser = shape, value_delimiter = ',', default_value = "2048x2048,2048x8192")]
    shapes: Vec<Shape>,
    /// Storage types of the weights
    #[arg(long = "type", value_name = "TYPE", value_parser = tensor_type, value_delimiter = ',', default_value = "f32,f16,bf16,q8_0,q4_K,q6_K,iq4_xs")]
    types: Vec<TensorType>,
    /// Kernels to measure, such as avx512-f32 [default: the best of each precision]
    #[arg(long = "kernel", value_name = "NAME", value_delimiter = ',')]
    kernels: Vec<String>,
    /// Rounds, of which the best counts
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=10000))]
    rounds: u32,
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    rows: usize,
    cols: usize,
}

fn shape(text: &str) -> Result<Shape, String> {
    let parse = |part: &str| part.parse::<usize>().ok().filter(|&n| (1..=1 << 20).contains(&n));
    text.split_once('x')
        .and_then(|(rows, cols)| Some(Shape { rows: parse(rows)?, cols: parse(cols)? }))
        .ok_or_else(|| "expected ROWSxCOLS, such as 2048x8192, each at most 1048576".to_owned())
}

pub(super) fn tensor_type(name: &str) -> Result<TensorType, String> {
    TensorType::from_name(name).ok_or_else(|| "not a tensor type of ggml".to_owned())
}

#[derive(Serialize)]
struct Report {
    cpu: String,
    isa: &'static str,
    tokens: usize,
    rounds: u32,
    peaks: Vec<PeakRow>,
    products: Vec<ProductRow>,
}

#[derive(Serialize)]
struct PeakRow {
    name: &'static str,
    isa: &'static str,
    threads: usize,
    gflops: f64,
}

#[derive(Serialize)]
struct ProductRow {
    kernel: &'static str,
    #[serde(rename = "type")]
    ty: &'static str,
    rows: usize,
    cols: usize,
    threads: usize,
    gflops: f64,
    share_of_peak: f64,
    share_of_peak_cpu_time: f64,
    /// Times the speed of the same product on one thread.
    scaling: f64,
}

/// The best rates seen, in operations per second of wall time and of CPU time divided by threads.
#[derive(Clone, Copy, Default)]
struct Best {
    wall: f64,
    cpu: f64,
}

impl Best {
    /// Times `work`, which keeps all of `threads` busy and returns the number of operations.
    fn observe(&mut self, threads: usize, work: impl FnOnce() -> f64) {
        let (start, cpu_start) = (Instant::now(), process_cpu_seconds());
        let operations = work();
        let wall = start.elapsed().as_secs_f64();
        // A clock of CPU time that is missing or too coarse for this leaves wall time to stand for both.
        let cpu = match (cpu_start, process_cpu_seconds()) {
            (Some(start), Some(end)) if end - start > 1e-4 => (end - start) / threads as f64,
            _ => wall,
        };
        self.wall = self.wall.max(operations / wall);
        self.cpu = self.cpu.max(operations / cpu);
    }
}

/// Seconds of one sample of a peak: shorter than a scheduler's time slice, so that some sample is undisturbed.
const PEAK_SECONDS: f64 = 0.002;

pub(super) fn run(args: &KernelsArgs, common: &Common) -> anyhow::Result<()> {
    let kernels = selected_kernels(&args.kernels)?;
    let mut thread_counts = vec![1, common.thread_count()];
    thread_counts.dedup();
    let pools = thread_counts
        .iter()
        .map(|&threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build())
        .collect::<Result<Vec<_>, _>>()?;
    let tokens = args.tokens as usize;
    let mut report = Report {
        cpu: cpu::name(),
        isa: cpu::level().name(),
        tokens,
        rounds: args.rounds,
        peaks: measure_peaks(args.rounds, &pools),
        products: Vec::new(),
    };
    for shape in &args.shapes {
        for &ty in &args.types {
            let Some(bytes) = random_weights(ty, *shape).with_context(|| format!("weights of type {ty}"))? else {
                common.warn(format!("{ty}: no encoder or rows of {} are not whole blocks; skipped", shape.cols));
                continue;
            };
            let weights = Matrix::new(ty, shape.rows, shape.cols, &bytes)?;
            for kernel in &kernels {
                report.products.extend(measure_product(Product::Floats(kernel), &weights, tokens, args.rounds, &pools));
            }
            if args.kernels.is_empty() && multiplies_as_integers(ty) {
                report.products.extend(measure_product(Product::Integers, &weights, tokens, args.rounds, &pools));
            }
        }
    }
    if common.json { common.result_json(&report) } else { common.result(table(&report)) }
}

fn selected_kernels(names: &[String]) -> anyhow::Result<Vec<&'static Kernel>> {
    if names.is_empty() {
        let mut best = vec![Kernel::best(Precision::Fast), Kernel::best(Precision::Accurate)];
        best.dedup_by_key(|kernel| kernel.name);
        return Ok(best);
    }
    names
        .iter()
        .map(|name| {
            let known = || Kernel::all().iter().map(|kernel| kernel.name).collect::<Vec<_>>().join(", ");
            let kernel = Kernel::all().iter().copied().find(|kernel| kernel.name == name);
            let kernel = kernel.with_context(|| format!("--kernel {name}: unknown; use one of {}", known()))?;
            ensure!(kernel.level.is_available(), "--kernel {name}: this CPU lacks {}", kernel.level.name());
            Ok(kernel)
        })
        .collect()
}

/// One sample of a peak on every thread of the pool.
fn sample_peak(best: &mut Best, peak: &Peak, rounds: u64, pool: &ThreadPool) {
    best.observe(pool.current_num_threads(), || pool.broadcast(|_| peak.run(rounds)).into_iter().sum::<u64>() as f64);
}

fn measure_peaks(rounds: u32, pools: &[ThreadPool]) -> Vec<PeakRow> {
    let mut rows = Vec::new();
    for peak in Peak::all().iter().filter(|peak| peak.level.is_available()) {
        for pool in pools {
            let mut best = Best::default();
            let length = peak.rounds_for(PEAK_SECONDS);
            (0..rounds).for_each(|_| sample_peak(&mut best, peak, length, pool));
            let threads = pool.current_num_threads();
            rows.push(PeakRow { name: peak.name, isa: peak.level.name(), threads, gflops: best.wall / 1e9 });
        }
    }
    rows
}

/// A way to multiply.
#[derive(Clone, Copy)]
enum Product {
    /// With this kernel.
    Floats(&'static Kernel),
    /// With activations rounded as ggml's CPU backend does; its share is that of the peak of 32-bit floats.
    Integers,
}

impl Product {
    fn name(self) -> &'static str {
        match self {
            Product::Floats(kernel) => kernel.name,
            Product::Integers => integer_engine(),
        }
    }

    fn peak(self) -> Option<&'static Peak> {
        let (level, bf16) = match self {
            Product::Floats(kernel) => (kernel.level, kernel.is_bf16()),
            Product::Integers => (Kernel::best(Precision::Accurate).level, false),
        };
        Peak::all().iter().find(|peak| peak.level == level && peak.bf16 == bf16)
    }

    /// Packs `x` and multiplies; the buffer of packed floats is kept.
    fn run(self, x: &[f32], weights: &Matrix, packed: &mut Option<PackedActivations>, y: &mut [f32]) {
        let (rows, cols) = (weights.rows(), weights.cols());
        match self {
            Product::Floats(kernel) => {
                let packed = packed.get_or_insert_with(|| PackedActivations::for_kernel(kernel));
                packed.pack(x, x.len() / cols, cols, cols);
                matmul(packed, weights, y, rows);
            }
            Product::Integers => {
                let wide = weights.ty().info().is_some_and(|info| info.block_len == 256);
                let steps = if wide { Steps::Of256 } else { Steps::Of32 };
                matmul_integer(&IntegerActivations::round(x, cols, steps), weights, y, rows);
            }
        }
    }
}

fn measure_product(
    product: Product,
    weights: &Matrix,
    tokens: usize,
    rounds: u32,
    pools: &[ThreadPool],
) -> Vec<ProductRow> {
    let (rows, cols) = (weights.rows(), weights.cols());
    let x: Vec<f32> = RandomFloats(1).take(tokens * cols).collect();
    let mut y = vec![0f32; tokens * rows];
    let mut packed = None;
    let peak = product.peak().expect("every kernel has a peak of its level");
    let operations = 2.0 * tokens as f64 * rows as f64 * cols as f64;
    let length = peak.rounds_for(PEAK_SECONDS);
    let mut one_thread = 0.0;
    pools
        .iter()
        .map(|pool| {
            let threads = pool.current_num_threads();
            let (mut best_peak, mut best) = (Best::default(), Best::default());
            for _ in 0..rounds {
                sample_peak(&mut best_peak, peak, length, pool);
                pool.install(|| {
                    best.observe(threads, || {
                        product.run(&x, weights, &mut packed, &mut y);
                        operations
                    });
                });
            }
            if one_thread == 0.0 {
                one_thread = best.wall;
            }
            ProductRow {
                kernel: product.name(),
                ty: weights.ty().info().map_or("", |info| info.name),
                rows,
                cols,
                threads,
                gflops: best.wall / 1e9,
                share_of_peak: best.wall / best_peak.wall,
                share_of_peak_cpu_time: best.cpu / best_peak.cpu,
                scaling: best.wall / one_thread,
            }
        })
        .collect()
}

/// Encoded random rows, or `None` when the type cannot be encoded in this shape. A few rows repeat: encoding is not
/// what is measured, and the slow encoders would take longer than the products.
fn random_weights(ty: TensorType, shape: Shape) -> anyhow::Result<Option<Vec<u8>>> {
    const DISTINCT_ROWS: usize = 4;
    let Some(row_bytes) = ty.info().and_then(|info| info.row_bytes(shape.cols as u64)) else {
        return Ok(None);
    };
    if quant::codec(ty).and_then(|codec| codec.quantize).is_none() {
        return Ok(None);
    }
    let row_bytes = usize::try_from(row_bytes)?;
    let values: Vec<f32> = RandomFloats(2).take(DISTINCT_ROWS * shape.cols).map(|v| v * 0.1).collect();
    let importance = vec![1f32; shape.cols];
    let mut rows = vec![0u8; DISTINCT_ROWS * row_bytes];
    quant::quantize_rows(ty, &values, shape.cols, Some(&importance), &mut rows)?;
    let mut bytes = Vec::with_capacity(shape.rows * row_bytes);
    for row in 0..shape.rows {
        let first = row % DISTINCT_ROWS * row_bytes;
        bytes.extend_from_slice(&rows[first..first + row_bytes]);
    }
    Ok(Some(bytes))
}

/// Uniform in [-1, 1): a linear congruential generator (Knuth's MMIX constants), the high bits of each state.
pub(super) struct RandomFloats(pub u64);

impl Iterator for RandomFloats {
    type Item = f32;

    fn next(&mut self) -> Option<f32> {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        Some((self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0)
    }
}

/// CPU time of all threads of this process so far.
#[cfg(unix)]
fn process_cpu_seconds() -> Option<f64> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place for the result.
    let status = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    (status == 0).then_some(time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9)
}

#[cfg(not(unix))]
fn process_cpu_seconds() -> Option<f64> {
    None
}

fn table(report: &Report) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "{}, {} ({} rounds, best of each)\n", report.cpu, report.isa, report.rounds);
    let _ = writeln!(out, "{:<18} {:>7} {:>9}", "peak", "threads", "GFLOP/s");
    for row in &report.peaks {
        let _ = writeln!(out, "{:<18} {:>7} {:>9.1}", row.name, row.threads, row.gflops);
    }
    let _ = writeln!(
        out,
        "\n{:<12} {:<8} {:>12} {:>6} {:>7} {:>9} {:>8} {:>10} {:>8}",
        "kernel", "weights", "shape", "tokens", "threads", "GFLOP/s", "of peak", "(CPU time)", "scaling"
    );
    for row in &report.products {
        let _ = writeln!(
            out,
            "{:<12} {:<8} {:>12} {:>6} {:>7} {:>9.1} {:>7.1}% {:>9.1}% {:>7.2}x",
            row.kernel,
            row.ty,
            format!("{}x{}", row.rows, row.cols),
            report.tokens,
            row.threads,
            row.gflops,
            row.share_of_peak * 100.0,
            row.share_of_peak_cpu_time * 100.0,
            row.scaling
        );
    }
    out
}
