//! What this machine offers, what is chosen of it and why, and in a few seconds how fast it is.

use std::fmt::{self, Write as _};
use std::path::Path;
use std::time::Instant;

use serde::Serialize;

use super::{BenchError, KernelsBench, KernelsReport, ProductRow, Shape};
use crate::compute::{Kernel, Precision, integer_engine};
use crate::cpu::{self, ISA_VARIABLE, Level};
use crate::display::{decimal_size, printable};
use crate::gguf::TensorType;
use crate::os;
use crate::progress::Watch;

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct DoctorReport {
    /// Version of this program.
    pub version: &'static str,
    /// Operating system and architecture that it was built for.
    pub system: String,
    /// Name of the CPU.
    pub cpu: String,
    /// Threads that commands use.
    pub threads: usize,
    /// Features of the CPU.
    pub features: Vec<Feature>,
    /// Instruction set that is used.
    pub isa: &'static str,
    /// Why.
    pub isa_reason: String,
    /// Kernels of matrix products in floats.
    pub kernels: Vec<KernelChoice>,
    /// What multiplies quantized weights with rounded activations.
    pub integer_kernel: &'static str,
    /// Memory in bytes, where the system tells.
    pub memory_bytes: Option<u64>,
    /// Memory that new work may take.
    pub available_memory_bytes: Option<u64>,
    /// Folders and the space that their disks have.
    pub disks: Vec<Disk>,
    /// Measured products; none if nothing was to be measured.
    pub products: Vec<ProductRow>,
}

/// A feature of the CPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Feature {
    /// As compilers name it.
    pub name: &'static str,
    /// Whether the CPU has it.
    pub present: bool,
}

/// A kernel, and why it is used or not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KernelChoice {
    /// Its name.
    pub name: &'static str,
    /// What it is used for; empty where it is not.
    pub used_for: Vec<&'static str>,
    /// Why.
    pub reason: String,
}

/// Space on a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Disk {
    /// A folder on it.
    pub folder: String,
    /// Bytes that may be written, where the system tells.
    pub free_bytes: Option<u64>,
    /// Whether outputs are written there.
    pub writable: bool,
}

/// What to look at.
#[derive(Clone, Copy, Debug)]
pub struct Doctor<'a> {
    /// Folders whose disks are looked at.
    pub folders: &'a [&'a Path],
    /// Threads that commands use.
    pub threads: usize,
    /// Seconds that measuring may take, about; 0 to measure nothing. One round is always done, which takes longer where
    /// only scalar code runs.
    pub seconds: f64,
}

impl Doctor<'_> {
    /// Looks, and measures.
    ///
    /// # Errors
    /// When threads cannot be started.
    pub fn run(&self, watch: &dyn Watch) -> Result<DoctorReport, BenchError> {
        let features = cpu::features().into_iter().map(|(name, present)| Feature { name, present }).collect();
        let products = if self.seconds > 0.0 { self.measure(watch)?.products } else { Vec::new() };
        Ok(DoctorReport {
            version: env!("CARGO_PKG_VERSION"),
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            cpu: cpu::name(),
            threads: self.threads,
            features,
            isa: cpu::level().name(),
            isa_reason: isa_reason(cpu::detected(), cpu::cap()),
            kernels: kernel_choices(),
            integer_kernel: integer_engine(),
            memory_bytes: os::total_memory(),
            available_memory_bytes: os::available_memory(),
            disks: self.folders.iter().map(|folder| disk(folder)).collect(),
            products,
        })
    }

    /// Products of f32 and bfloat16 weights beside the peak, as many rounds as the time allows.
    fn measure(&self, watch: &dyn Watch) -> Result<KernelsReport, BenchError> {
        const MOST_ROUNDS: f64 = 100.0;
        let bench = |rounds| KernelsBench {
            tokens: 256,
            shapes: vec![Shape { rows: 1024, cols: 2048 }],
            types: vec![TensorType::F32, TensorType::BF16],
            kernels: chosen_kernels().into_iter().map(str::to_owned).collect(),
            rounds,
            threads: self.threads,
        };
        let started = Instant::now();
        let first = bench(1).run(watch)?;
        let round = started.elapsed().as_secs_f64();
        let left = ((self.seconds - round) / round.max(1e-3)).clamp(0.0, MOST_ROUNDS);
        if left < 1.0 { Ok(first) } else { bench(left as u32).run(watch) }
    }
}

/// The names of the kernels that commands use.
fn chosen_kernels() -> Vec<&'static str> {
    let mut names = vec![Kernel::best(Precision::Accurate).name, Kernel::best(Precision::Fast).name];
    names.dedup();
    names
}

fn isa_reason(detected: Level, cap: Option<Level>) -> String {
    match cap {
        Some(cap) if cap < detected => format!("{ISA_VARIABLE}={} forbids {}", cap.name(), detected.name()),
        _ => "the best that this CPU has and lwq knows".to_owned(),
    }
}

fn kernel_choices() -> Vec<KernelChoice> {
    let uses = [(Precision::Accurate, "accurate products"), (Precision::Fast, "fast products")];
    Kernel::all()
        .iter()
        .map(|kernel| {
            let chosen = |(precision, _): &&(Precision, &str)| Kernel::best(*precision).name == kernel.name;
            let used_for: Vec<&'static str> = uses.iter().filter(chosen).map(|(_, what)| *what).collect();
            let reason = if !used_for.is_empty() {
                "the best here".to_owned()
            } else if kernel.level > cpu::detected() {
                format!("this CPU lacks {}", kernel.level.name())
            } else if !kernel.level.is_available() {
                format!("{ISA_VARIABLE} forbids {}", kernel.level.name())
            } else if kernel.is_bf16() {
                cpu::bf16_products().describe().to_owned()
            } else {
                "a better one is here".to_owned()
            };
            KernelChoice { name: kernel.name, used_for, reason }
        })
        .collect()
}

fn disk(folder: &Path) -> Disk {
    Disk {
        folder: printable(&std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned()).display().to_string()),
        free_bytes: os::free_space(folder),
        writable: folder.is_dir() && os::is_writable(folder),
    }
}

impl fmt::Display for DoctorReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = |bytes: Option<u64>| bytes.map_or_else(|| "unknown".to_owned(), decimal_size);
        let names = |present: bool| {
            let of: Vec<_> = self.features.iter().filter(|of| of.present == present).map(|of| of.name).collect();
            if of.is_empty() { "none".to_owned() } else { of.join(" ") }
        };
        writeln!(f, "lwq {}, {}", self.version, self.system)?;
        writeln!(f, "{}, {} threads", printable(&self.cpu), self.threads)?;
        writeln!(f, "has      {}", names(true))?;
        writeln!(f, "lacks    {}", names(false))?;
        writeln!(f, "uses     {}: {}", self.isa, self.isa_reason)?;
        writeln!(f, "memory   {}, {} available", size(self.memory_bytes), size(self.available_memory_bytes))?;
        for disk in &self.disks {
            let writable = if disk.writable { "" } else { ", outputs are not written there" };
            writeln!(f, "disk     {} free in {}{writable}", size(disk.free_bytes), disk.folder)?;
        }
        writeln!(f, "\nkernels of matrix products")?;
        for kernel in &self.kernels {
            let used = if kernel.used_for.is_empty() { "not used".to_owned() } else { kernel.used_for.join(", ") };
            writeln!(f, "  {:<14} {used}: {}", kernel.name, kernel.reason)?;
        }
        writeln!(f, "  {:<14} products with rounded activations", self.integer_kernel)?;
        f.write_str(&products_text(&self.products))
    }
}

fn products_text(products: &[ProductRow]) -> String {
    let mut text = String::new();
    if products.is_empty() {
        return text;
    }
    let (kernel, weights, threads, speed, share) = ("kernel", "weights", "threads", "GFLOP/s", "of peak");
    let _ = writeln!(text, "\n{kernel:<14} {weights:<8} {threads:>7} {speed:>9} {share:>8}");
    for row in products {
        let (kernel, ty, threads) = (row.kernel, row.ty, row.threads);
        let (speed, share) = (row.gflops, 100.0 * row.share_of_peak);
        let _ = writeln!(text, "{kernel:<14} {ty:<8} {threads:>7} {speed:>9.1} {share:>7.1}%");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_use_has_one_kernel_and_each_other_kernel_a_reason() {
        let choices = kernel_choices();
        for what in ["accurate products", "fast products"] {
            assert_eq!(choices.iter().filter(|choice| choice.used_for.contains(&what)).count(), 1, "{choices:?}");
        }
        assert!(choices.iter().all(|choice| !choice.reason.is_empty()));
    }

    #[test]
    fn a_cap_is_named_only_where_it_forbids_something() {
        assert_eq!(isa_reason(Level::Avx512, Some(Level::Avx2)), "LWQ_ISA=avx2 forbids avx512");
        for cap in [None, Some(Level::Avx2), Some(Level::Avx512)] {
            assert!(isa_reason(Level::Avx2, cap).starts_with("the best"));
        }
    }

    #[test]
    fn a_missing_folder_is_not_writable() {
        let dir = tempfile::tempdir().unwrap();
        assert!(disk(dir.path()).writable);
        assert!(!disk(&dir.path().join("lost")).writable);
    }
}
