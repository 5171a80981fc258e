//! One loop body, compiled for every vector width that the machine may have.

/// Defines functions whose bodies are compiled for AVX-512F, for AVX2 with FMA, and for the baseline, chosen at each
/// call by [`Level`](crate::cpu::Level). With `at most avx2;` in front, AVX-512 is left out: for loops that it slows
/// down.
///
/// The compiler neither reorders nor contracts float operations, and `mul_add` is rounded once everywhere, so that
/// every instruction set gives the same bytes.
macro_rules! vectorized {
    (
        at most avx2;
        $($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block)+
    ) => {$(
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body
            $crate::vectorized::compiled_for! { Avx2, "avx2,fma", body($($arg: $ty),*) $(-> $ret)? }
            body($($arg),*)
        }
    )+};
    ($($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block)+) => {$(
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body
            $crate::vectorized::compiled_for! { Avx512, "avx512f", body($($arg: $ty),*) $(-> $ret)? }
            $crate::vectorized::compiled_for! { Avx2, "avx2,fma", body($($arg: $ty),*) $(-> $ret)? }
            body($($arg),*)
        }
    )+};
}
pub(crate) use vectorized;

/// Returns from the function around it with what `$body`, compiled with a feature, gives, where there is the proof of
/// it.
macro_rules! compiled_for {
    ($isa:ident, $feature:literal, $body:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)?) => {
        #[cfg(target_arch = "x86_64")]
        if $crate::cpu::$isa::new().is_some() {
            #[target_feature(enable = $feature)]
            fn compiled($($arg: $ty),*) $(-> $ret)? {
                $body($($arg),*)
            }
            // SAFETY: there is the proof of the features, the only thing that the safe function above asks for.
            return unsafe { compiled($($arg),*) };
        }
    };
}
pub(crate) use compiled_for;
