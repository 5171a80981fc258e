//! One loop body, compiled for every vector width that the machine may have.

/// Defines a function whose body is compiled for AVX-512F, AVX2 and the baseline, chosen at run time by
/// [`Level`](crate::cpu::Level).
///
/// The body must not use fused multiply-add, so that every instruction set gives the same bytes.
macro_rules! vectorized {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f")]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }
                if crate::cpu::Level::Avx512.is_available() {
                    // SAFETY: the CPU has AVX-512F, the only thing that the safe function above asks for.
                    return unsafe { avx512($($arg),*) };
                }
                if crate::cpu::Level::Avx2.is_available() {
                    // SAFETY: the CPU has AVX2, the only thing that the safe function above asks for.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body($($arg),*)
        }
    };
}

pub(crate) use vectorized;
