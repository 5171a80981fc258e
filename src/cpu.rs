//! Which instruction sets this process uses: detected once, cached, and capped by the environment variable
//! `LWQ_ISA`.
//!
//! `LWQ_ISA` takes one name of [`Level::name`]: `scalar` everywhere; `avx2`, `avx512`, `avx512bf16` on x86-64;
//! `neon` on aarch64. It caps the level and never raises it above what the CPU has. The kernels of the
//! quantizers and of the forward pass read the level from here and from nowhere else.
//!
//! # Choosing among instruction sets
//! There are three ways, and no code detects features by itself:
//!
//! - `vectorized!` compiles one loop for every vector width and picks at each call. For plain loops that the compiler
//!   makes vectors of, long enough to pay for a call.
//! - A proof token (`Avx2`, `Avx512`, `Avx512Vnni`, `Neon`) is a value that exists only where the CPU has the
//!   instructions. For intrinsics: functions that take one are safe to call from anywhere, and generic code is written
//!   once over a trait of tokens (`quant::kernels`, the lattices of `feedback`).
//! - A kernel row is an entry of a table with the [`Level`] that its functions need. For whole jobs that a test or a
//!   benchmark runs at each level: encoders and decoders (`quant::kernels`), register tiles and peaks
//!   ([`compute`](crate::compute)). The best row at or below [`level`] is picked once per job; whoever calls a row
//!   checks its level first, or the row's function asks for the proof itself.

use std::sync::OnceLock;

/// Name of the environment variable that caps the instruction set.
pub const ISA_VARIABLE: &str = "LWQ_ISA";

/// A set of instructions that kernels are written for. Greater levels include the lesser ones of the same
/// architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// Portable code only.
    Scalar,
    /// aarch64 Advanced SIMD with fused multiply-add (every aarch64 CPU).
    Neon,
    /// x86-64 AVX2, FMA and F16C.
    Avx2,
    /// x86-64 AVX-512 F, BW, CD, DQ and VL, on top of [`Level::Avx2`].
    Avx512,
    /// AVX-512 with BF16 dot products, on top of [`Level::Avx512`].
    Avx512Bf16,
}

impl Level {
    /// Every level of every architecture, ascending.
    pub const ALL: [Level; 5] = [Level::Scalar, Level::Neon, Level::Avx2, Level::Avx512, Level::Avx512Bf16];

    /// The name that `LWQ_ISA` takes and reports print.
    pub fn name(self) -> &'static str {
        match self {
            Level::Scalar => "scalar",
            Level::Neon => "neon",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
            Level::Avx512Bf16 => "avx512bf16",
        }
    }

    /// True where this build's target architecture has the level at all, whatever the CPU.
    pub fn is_of_this_architecture(self) -> bool {
        match self {
            Level::Scalar => true,
            Level::Neon => cfg!(target_arch = "aarch64"),
            Level::Avx2 | Level::Avx512 | Level::Avx512Bf16 => cfg!(target_arch = "x86_64"),
        }
    }

    /// True where the CPU has every feature of the level and `LWQ_ISA` does not forbid it.
    ///
    /// Code may rely on this for soundness: a level at or below [`level`] is one the CPU executes.
    pub fn is_available(self) -> bool {
        self.is_of_this_architecture() && self <= level()
    }
}

/// The value of `LWQ_ISA` is not a level of this architecture.
#[derive(Debug, thiserror::Error)]
#[error("{ISA_VARIABLE}={value}: not an instruction set of this build; use one of {known}, or unset it")]
pub struct IsaError {
    /// The value found, lossily decoded.
    pub value: String,
    /// The names that are accepted here.
    pub known: String,
}

/// Levels that this CPU has and `LWQ_ISA` allows, ascending; never empty, since scalar is always there.
pub fn available_levels() -> impl Iterator<Item = Level> {
    Level::ALL.into_iter().filter(|level| level.is_available())
}

/// The best level that this CPU has and `LWQ_ISA` allows. An invalid value of the variable is ignored here;
/// [`check_environment`] reports it.
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        let cap = requested_cap().ok().flatten().unwrap_or(Level::Avx512Bf16);
        detected().min(cap)
    })
}

/// Whether products of bfloat16 are made by `vdpbf16ps`, and why, as reports print it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bf16Products {
    /// The CPU has no such instruction, or `LWQ_ISA` forbids it.
    Missing,
    /// `LWQ_ISA` names it.
    Asked,
    /// It is faster than f32 on this maker's CPUs.
    Faster,
    /// It is slower than f32 on this maker's CPUs.
    Slower,
}

impl Bf16Products {
    /// True if they are used where precision allows it.
    pub fn are_used(self) -> bool {
        matches!(self, Bf16Products::Asked | Bf16Products::Faster)
    }

    /// A sentence for people.
    pub fn describe(self) -> &'static str {
        match self {
            Bf16Products::Missing => "products of bfloat16 are not available: fast is the same as accurate",
            Bf16Products::Asked => "products of bfloat16 are used for fast, as LWQ_ISA asks",
            Bf16Products::Faster => "products of bfloat16 are used for fast: on CPUs of this maker they take less time",
            Bf16Products::Slower => {
                "products of bfloat16 take more time than those of f32 on CPUs of this maker: fast is the same as \
                 accurate, unless LWQ_ISA=avx512bf16 is set"
            }
        }
    }
}

/// What products of bfloat16 are worth here.
///
/// It goes by the maker and not by a measurement, so that the bytes of fast passes stay the same from run to run. Products with
/// `vdpbf16ps` reached 80 GFLOP/s on one core of a Xeon (Emerald Rapids), those of f32 140 (`lwq bench kernels`); on an EPYC
/// (Zen 4) whole passes of a model took two thirds of the time with them.
pub fn bf16_products() -> Bf16Products {
    static FOUND: OnceLock<Bf16Products> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let asked = requested_cap().ok().flatten() == Some(Level::Avx512Bf16);
        bf16_products_of(level(), asked, maker().as_deref())
    })
}

fn bf16_products_of(level: Level, asked: bool, maker: Option<&str>) -> Bf16Products {
    match (level, asked, maker) {
        (Level::Avx512Bf16, true, _) => Bf16Products::Asked,
        (Level::Avx512Bf16, false, Some("GenuineIntel")) => Bf16Products::Slower,
        (Level::Avx512Bf16, false, _) => Bf16Products::Faster,
        _ => Bf16Products::Missing,
    }
}

/// The maker as the CPU names it, such as `AuthenticAMD`.
#[cfg(target_arch = "x86_64")]
fn maker() -> Option<String> {
    let leaf = std::arch::x86_64::__cpuid(0);
    let bytes = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat();
    String::from_utf8(bytes).ok()
}

#[cfg(not(target_arch = "x86_64"))]
fn maker() -> Option<String> {
    None
}

/// The best level that this CPU has, whatever `LWQ_ISA` says.
pub fn detected() -> Level {
    static DETECTED: OnceLock<Level> = OnceLock::new();
    *DETECTED.get_or_init(detected_level)
}

/// The cap that `LWQ_ISA` sets, if it is set to a level of this architecture.
pub fn cap() -> Option<Level> {
    requested_cap().ok().flatten()
}

/// Features of this CPU that matter to products and encoders here, or may one day, by the names that compilers give them,
/// and whether it has them.
pub fn features() -> Vec<(&'static str, bool)> {
    #[cfg(target_arch = "aarch64")]
    use std::arch::is_aarch64_feature_detected as detected;
    #[cfg(target_arch = "x86_64")]
    use std::arch::is_x86_feature_detected as detected;
    macro_rules! each {
        ($($name:tt)*) => { vec![$(($name, detected!($name))),*] };
    }
    #[cfg(target_arch = "x86_64")]
    return each!("avx2" "fma" "f16c" "avx512f" "avx512bw" "avx512cd" "avx512dq" "avx512vl" "avx512vnni" "avx512bf16");
    #[cfg(target_arch = "aarch64")]
    return each!("neon" "fp16" "dotprod" "bf16" "i8mm" "sve" "sve2");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    each!()
}

/// Defines types whose values prove that this CPU has certain instructions.
macro_rules! proofs {
    ($($(#[$meta:meta])* $name:ident, $arch:literal, $available:expr;)*) => {$(
        $(#[$meta])*
        #[cfg(target_arch = $arch)]
        #[derive(Clone, Copy, Debug)]
        pub(crate) struct $name(());

        #[cfg(target_arch = $arch)]
        impl $name {
            /// The proof, if this CPU has the instructions and `LWQ_ISA` allows them.
            #[inline]
            pub(crate) fn new() -> Option<Self> {
                $available.then_some(Self(()))
            }
        }
    )*};
}

proofs! {
    /// Proof of AVX2, FMA and F16C.
    Avx2, "x86_64", Level::Avx2.is_available();
    /// Proof of AVX-512 F, BW, CD, DQ and VL, and of what [`Avx2`] proves.
    Avx512, "x86_64", Level::Avx512.is_available();
    /// Proof of AVX-512 VNNI, and of what [`Avx512`] proves.
    Avx512Vnni, "x86_64", Level::Avx512.is_available() && is_x86_feature_detected!("avx512vnni");
    /// Proof of Advanced SIMD with fused multiply-add.
    Neon, "aarch64", Level::Neon.is_available();
}

#[cfg(target_arch = "x86_64")]
impl Avx512 {
    /// The proof of the lesser level.
    #[inline]
    pub(crate) fn avx2(self) -> Avx2 {
        Avx2(())
    }
}

/// The CPU's own name for reports, or the architecture's where the system does not tell.
pub fn name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

/// Checks `LWQ_ISA`, for a program to call at its start.
///
/// # Errors
/// [`IsaError`] when the variable is set, not empty, and not the name of a level of this architecture.
pub fn check_environment() -> Result<(), IsaError> {
    requested_cap().map(|_| ())
}

fn requested_cap() -> Result<Option<Level>, IsaError> {
    let Some(value) = std::env::var_os(ISA_VARIABLE).filter(|value| !value.is_empty()) else {
        return Ok(None);
    };
    let value = value.to_string_lossy();
    parse_cap(&value).map(Some)
}

fn parse_cap(value: &str) -> Result<Level, IsaError> {
    let mut of_this_build = Level::ALL.into_iter().filter(|level| level.is_of_this_architecture());
    of_this_build.clone().find(|level| level.name().eq_ignore_ascii_case(value)).ok_or_else(|| IsaError {
        value: value.to_owned(),
        known: of_this_build.by_ref().map(Level::name).collect::<Vec<_>>().join(", "),
    })
}

#[cfg(target_arch = "x86_64")]
fn detected_level() -> Level {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
    if !avx2 {
        return Level::Scalar;
    }
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512cd")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    if !avx512 {
        return Level::Avx2;
    }
    if is_x86_feature_detected!("avx512bf16") { Level::Avx512Bf16 } else { Level::Avx512 }
}

#[cfg(target_arch = "aarch64")]
fn detected_level() -> Level {
    if std::arch::is_aarch64_feature_detected!("neon") { Level::Neon } else { Level::Scalar }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn detected_level() -> Level {
    Level::Scalar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalar_is_always_available() {
        assert_eq!(available_levels().next(), Some(Level::Scalar));
        assert!(level().is_available());
    }

    #[test]
    fn bf16_is_used_where_it_is_faster_or_asked_for() {
        use Bf16Products::{Asked, Faster, Missing, Slower};
        let of = |level, asked, maker| bf16_products_of(level, asked, Some(maker));
        assert_eq!(of(Level::Avx512Bf16, false, "GenuineIntel"), Slower);
        assert_eq!(of(Level::Avx512Bf16, true, "GenuineIntel"), Asked);
        assert_eq!(of(Level::Avx512Bf16, false, "AuthenticAMD"), Faster);
        assert_eq!(of(Level::Avx512, false, "AuthenticAMD"), Missing);
        assert!(Asked.are_used() && Faster.are_used() && !Slower.are_used() && !Missing.are_used());
    }

    #[test]
    fn levels_of_another_architecture_are_refused_by_name() {
        let foreign = if cfg!(target_arch = "x86_64") { "neon" } else { "avx2" };
        let message = parse_cap(foreign).unwrap_err().to_string();
        assert!(message.contains(foreign) && message.contains("scalar"), "{message}");
        assert!(parse_cap("avx9").is_err());
        assert_eq!(parse_cap("SCALAR").unwrap(), Level::Scalar);
    }
}
