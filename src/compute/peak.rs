//! The machine's own peak: multiply-adds from registers, per instruction set.

use crate::cpu::Level;
use std::hint::black_box;
use std::time::Instant;

/// A kind of multiply-add whose rate can be measured.
#[derive(Clone, Copy, Debug)]
pub struct Peak {
    /// Name for reports, such as `avx512 f32 fma`.
    pub name: &'static str,
    /// Instruction set that is needed.
    pub level: Level,
    /// True for products of bfloat16, false for f32.
    pub bf16: bool,
    /// Floating-point operations of a round.
    operations: u64,
    /// Only for a CPU with the level.
    run: unsafe fn(rounds: u64),
}

impl Peak {
    /// Runs `rounds` rounds on the calling thread and returns how many floating-point operations that were; a
    /// multiply-add counts as two.
    ///
    /// # Panics
    /// When the CPU lacks the level or `LWQ_ISA` forbids it.
    pub fn run(&self, rounds: u64) -> u64 {
        assert!(self.level.is_available(), "{} is not available", self.name);
        // SAFETY: the level was just checked, and the functions need no more.
        unsafe { (self.run)(rounds) };
        rounds * self.operations
    }

    /// Rounds that take about `seconds` on this machine.
    ///
    /// # Panics
    /// As [`Peak::run`].
    pub fn rounds_for(&self, seconds: f64) -> u64 {
        const TRIAL: u64 = 20_000;
        self.run(TRIAL);
        let start = Instant::now();
        self.run(TRIAL);
        (TRIAL as f64 * seconds / start.elapsed().as_secs_f64().max(1e-9)) as u64 + 1
    }

    /// The peaks of this architecture, those that the CPU lacks included.
    pub fn all() -> &'static [Peak] {
        PEAKS
    }
}

const SCALAR: Peak =
    Peak { name: "scalar f32", level: Level::Scalar, bf16: false, operations: SUMS as u64 * 2, run: scalar };

#[cfg(target_arch = "x86_64")]
static PEAKS: &[Peak] = &[SCALAR, x86_64::AVX2, x86_64::AVX512, x86_64::AVX512_BF16];
#[cfg(target_arch = "aarch64")]
static PEAKS: &[Peak] = &[SCALAR, aarch64::NEON];
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
static PEAKS: &[Peak] = &[SCALAR];

/// Independent sums in flight: more than latency times issue width of any CPU known to the author.
const SUMS: usize = 12;

/// `mul_add` as the scalar kernel uses it, be it an instruction or a call.
fn scalar(rounds: u64) {
    let (x, w) = (black_box(1.0f32), black_box(1e-9f32));
    let mut sums = [0f32; SUMS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = x.mul_add(w, *sum);
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use super::{Level, Peak, SUMS, black_box};
    use std::arch::x86_64::*;

    const fn peak(name: &'static str, level: Level, bf16: bool, per_step: u64, run: unsafe fn(u64)) -> Peak {
        Peak { name, level, bf16, operations: SUMS as u64 * per_step, run }
    }

    pub(super) const AVX2: Peak = peak("avx2 f32 fma", Level::Avx2, false, 16, avx2);
    pub(super) const AVX512: Peak = peak("avx512 f32 fma", Level::Avx512, false, 32, avx512);
    pub(super) const AVX512_BF16: Peak = peak("avx512 bf16 dot", Level::Avx512Bf16, true, 64, avx512_bf16);

    macro_rules! rounds {
        ($name:ident, $feature:literal, $zero:expr, $operand:expr, $step:expr) => {
            #[target_feature(enable = $feature)]
            fn $name(rounds: u64) {
                let (x, w) = (black_box($operand), black_box($operand));
                let mut sums = [$zero; SUMS];
                for _ in 0..rounds {
                    for sum in &mut sums {
                        *sum = $step(*sum, x, w);
                    }
                }
                black_box(sums);
            }
        };
    }

    rounds!(avx2, "avx2,fma", _mm256_setzero_ps(), _mm256_set1_ps(1e-5), |s, x, w| _mm256_fmadd_ps(x, w, s));
    rounds!(avx512, "avx512f", _mm512_setzero_ps(), _mm512_set1_ps(1e-5), |s, x, w| _mm512_fmadd_ps(x, w, s));
    rounds!(
        avx512_bf16,
        "avx512f,avx512bf16",
        _mm512_setzero_ps(),
        _mm512_cvtne2ps_pbh(_mm512_set1_ps(1e-5), _mm512_set1_ps(1e-5)),
        |s, x, w| _mm512_dpbf16_ps(s, x, w)
    );
}

#[cfg(target_arch = "aarch64")]
mod aarch64 {
    use super::{Level, Peak, SUMS, black_box};
    use std::arch::aarch64::*;

    pub(super) const NEON: Peak =
        Peak { name: "neon f32 fma", level: Level::Neon, bf16: false, operations: SUMS as u64 * 16, run: neon };

    #[target_feature(enable = "neon")]
    fn neon(rounds: u64) {
        let (x, w) = (black_box(vdupq_n_f32(1e-5)), black_box(vdupq_n_f32(1e-5)));
        let mut sums = [vdupq_n_f32(0.0); 2 * SUMS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = vfmaq_f32(*sum, x, w);
            }
        }
        black_box(sums);
    }
}
