//! What this machine can do, and how much of it the kernels use.

mod codecs;
mod doctor;
mod kernels;

use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};

pub use codecs::{CodecRow, CodecsBench, CodecsReport, CopySpeed};
pub use doctor::{Disk, Doctor, DoctorReport, Feature, KernelChoice};
pub use kernels::{KernelsBench, KernelsReport, PeakRow, ProductRow, Shape};

use crate::compute::MatrixError;
use crate::gguf::TensorType;
use crate::quant::QuantError;

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// There is no kernel of this name.
    #[error("--kernel {name}: unknown; use one of {known}")]
    UnknownKernel {
        /// The name.
        name: String,
        /// All names.
        known: String,
    },
    /// The kernel needs another CPU.
    #[error("--kernel {name}: this CPU lacks {lacks}")]
    KernelNotHere {
        /// The kernel.
        name: String,
        /// The instruction set that it needs.
        lacks: &'static str,
    },
    /// The instruction set is unknown, missing or switched off.
    #[error("--isa {name}: not available here; use one of {known}")]
    LevelNotHere {
        /// The name.
        name: String,
        /// What is available.
        known: String,
    },
    /// A type has no encoder or no decoder.
    #[error("{0}: no encoder or no decoder")]
    NoCodec(TensorType),
    /// Weights could not be encoded.
    #[error(transparent)]
    Quant(#[from] QuantError),
    /// Weights are no matrix.
    #[error(transparent)]
    Matrix(#[from] MatrixError),
    /// Threads could not be started.
    #[error(transparent)]
    Threads(#[from] ThreadPoolBuildError),
}

/// A pool of one thread, and one of `threads` if that is more.
fn pools(threads: usize) -> Result<Vec<ThreadPool>, BenchError> {
    let mut counts = vec![1, threads.max(1)];
    counts.dedup();
    Ok(counts.iter().map(|&n| ThreadPoolBuilder::new().num_threads(n).build()).collect::<Result<_, _>>()?)
}

/// Uniform in [-1, 1): a linear congruential generator (Knuth's MMIX constants), the high bits of each state.
struct RandomFloats(u64);

impl Iterator for RandomFloats {
    type Item = f32;

    fn next(&mut self) -> Option<f32> {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        Some((self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0)
    }
}
