//! Matrix products against the peak of multiply-adds from registers.
//!
//! Peak and product alternate, and of each the best of N rounds counts: clock speed and the load of
//! other programs change slowly enough that both see the same good moments. A second figure relates the
//! operations to the CPU time that this process got, which other programs' load lowers less.

use std::fmt::{self, Write as _};
use std::time::Instant;

use rayon::ThreadPool;
use serde::Serialize;

use super::{BenchError, RandomFloats, pools};
use crate::compute::peak::Peak;
use crate::compute::{
    IntegerActivations, Kernel, Matrix, PackedActivations, Precision, Steps, integer_engine, matmul, matmul_integer,
    multiplies_as_integers,
};
use crate::cpu;
use crate::gguf::TensorType;
use crate::os;
use crate::progress::Watch;
use crate::quant;

/// What to measure.
#[derive(Clone, Debug)]
pub struct KernelsBench {
    /// Tokens that share one pass over the weights.
    pub tokens: usize,
    /// Shapes of the weights.
    pub shapes: Vec<Shape>,
    /// Storage types of the weights.
    pub types: Vec<TensorType>,
    /// Names of kernels, such as `avx512-f32`; the best of each precision when empty.
    pub kernels: Vec<String>,
    /// Rounds, of which the best counts.
    pub rounds: u32,
    /// Threads; one is measured, too.
    pub threads: usize,
}

/// A matrix of weights.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct KernelsReport {
    /// Name of the CPU.
    pub cpu: String,
    /// Instruction set that is used.
    pub isa: &'static str,
    /// Whether products of bfloat16 are used for fast passes, and why.
    pub bf16: &'static str,
    /// Tokens that share a pass over the weights.
    pub tokens: usize,
    /// Rounds, of which the best counts.
    pub rounds: u32,
    /// Multiply-adds from registers.
    pub peaks: Vec<PeakRow>,
    /// Matrix products.
    pub products: Vec<ProductRow>,
}

/// Speed of multiply-adds from registers.
#[derive(Clone, Debug, Serialize)]
pub struct PeakRow {
    /// Name of the loop.
    pub name: &'static str,
    /// Its instruction set.
    pub isa: &'static str,
    /// Threads.
    pub threads: usize,
    /// Billions of operations per second.
    pub gflops: f64,
}

/// Speed of a matrix product.
#[derive(Clone, Debug, Serialize)]
pub struct ProductRow {
    /// Name of the kernel.
    pub kernel: &'static str,
    /// ggml's name of the weights' type.
    #[serde(rename = "type")]
    pub ty: &'static str,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// Threads.
    pub threads: usize,
    /// Billions of operations per second.
    pub gflops: f64,
    /// Speed by that of the peak with the same instruction set, from 0 to 1.
    pub share_of_peak: f64,
    /// The same of the CPU time that this process got.
    pub share_of_peak_cpu_time: f64,
    /// Times the speed of the same product on one thread.
    pub scaling: f64,
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
        let (start, cpu_start) = (Instant::now(), os::process_cpu_seconds());
        let operations = work();
        let wall = start.elapsed().as_secs_f64();
        // A clock of CPU time that is missing or too coarse for this leaves wall time to stand for both.
        let cpu = match (cpu_start, os::process_cpu_seconds()) {
            (Some(start), Some(end)) if end - start > 1e-4 => (end - start) / threads as f64,
            _ => wall,
        };
        self.wall = self.wall.max(operations / wall);
        self.cpu = self.cpu.max(operations / cpu);
    }
}

/// Seconds of one sample of a peak: shorter than a scheduler's time slice, so that some sample is undisturbed.
const PEAK_SECONDS: f64 = 0.002;

impl KernelsBench {
    /// Measures. Types that cannot be measured are passed over with a warning.
    ///
    /// # Errors
    /// When a kernel is not known or not available here.
    pub fn run(&self, watch: &dyn Watch) -> Result<KernelsReport, BenchError> {
        let kernels = selected_kernels(&self.kernels)?;
        let pools = pools(self.threads)?;
        let mut report = KernelsReport {
            cpu: cpu::name(),
            isa: cpu::level().name(),
            bf16: cpu::bf16_products().describe(),
            tokens: self.tokens,
            rounds: self.rounds,
            peaks: measure_peaks(self.rounds, &pools),
            products: Vec::new(),
        };
        for shape in &self.shapes {
            for &ty in &self.types {
                let Some(bytes) = random_weights(ty, *shape)? else {
                    let cols = shape.cols;
                    watch.warn(&format!("{ty}: no encoder or rows of {cols} are not whole blocks; skipped"));
                    continue;
                };
                let weights = Matrix::new(ty, shape.rows, shape.cols, &bytes)?;
                let mut measure = |product| {
                    report.products.extend(measure_product(product, &weights, self.tokens, self.rounds, &pools));
                };
                kernels.iter().for_each(|kernel| measure(Product::Floats(kernel)));
                if self.kernels.is_empty() && multiplies_as_integers(ty) {
                    measure(Product::Integers);
                }
            }
        }
        Ok(report)
    }
}

fn selected_kernels(names: &[String]) -> Result<Vec<&'static Kernel>, BenchError> {
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
            let unknown = || BenchError::UnknownKernel { name: name.clone(), known: known() };
            let kernel = kernel.ok_or_else(unknown)?;
            if !kernel.level.is_available() {
                return Err(BenchError::KernelNotHere { name: name.clone(), lacks: kernel.level.name() });
            }
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
fn random_weights(ty: TensorType, shape: Shape) -> Result<Option<Vec<u8>>, BenchError> {
    const DISTINCT_ROWS: usize = 4;
    let Some(row_bytes) = ty.info().and_then(|info| info.row_bytes(shape.cols as u64)) else {
        return Ok(None);
    };
    if quant::codec(ty).and_then(|codec| codec.quantize).is_none() {
        return Ok(None);
    }
    let row_bytes = row_bytes as usize;
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

impl fmt::Display for KernelsReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&table(self))
    }
}

fn table(report: &KernelsReport) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "{}, {} ({} rounds, best of each)", report.cpu, report.isa, report.rounds);
    let _ = writeln!(out, "{}\n", report.bf16);
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
