//! Matrix products of the forward pass: `Y[t, o] = sum over i of X[t, i] * W[o, i]`.
//!
//! X is f32, row-major `[tokens, n_in]`; W holds rows of any storage type, row-major `[n_out, n_in]`, as mapped
//! bytes; Y is f32, row-major `[tokens, n_out]`.
//!
//! # Method
//! The blocking is that of Goto and van de Geijn ("Anatomy of High-Performance Matrix Multiplication", 2008)
//! with the weights as the packed panel: a tile of weight rows is decoded once per block of columns, transposed
//! into panels whose lanes are outputs, and used for all tokens. Activations are packed once per
//! [`PackedActivations`], which serves every matrix that reads them. The register tile is `tokens x outputs`,
//! one broadcast activation against whole vectors of weights.
//!
//! # Arithmetic
//! - [`Precision::Accurate`]: columns are cut into blocks of 256. Within a block every output is one
//!   chain of fused multiply-adds in ascending column order that starts from zero; block sums are added to the
//!   output in ascending order. That order belongs to the definition: every instruction set, scalar included,
//!   gives the same bytes, as do all thread counts, and a token's result does not depend on the tokens
//!   beside it. The error against exact arithmetic is at most `(256 + n_in / 256) * 2^-24` times
//!   `sum |x * w|`, to first order.
//! - [`Precision::Fast`]: both operands are rounded to bfloat16 (to nearest even) and multiplied by
//!   `vdpbf16ps` with f32 accumulation, in blocks of 512 columns and a fixed order; subnormal numbers count as
//!   zero. The error is at most `2^-7 + 2^-16` times `sum |x * w|` from the roundings, plus the accumulation's as
//!   above. Where the CPU lacks AVX512-BF16 or is slow at it (or `LWQ_ISA` forbids it) fast is the same as accurate, see
//!   [`bf16_products`](crate::cpu::bf16_products).
//!
//! Gradients go the other way, `X[t, i] = sum over o of Y[t, o] * W[o, i]` ([`matmul_transposed`]), with blocks of rows of W in
//! place of columns.
//!
//! Products of quantized weights with activations rounded to integers are a matter of their own ([`matmul_integer`]).
//!
//! All are deterministic: the same machine and `LWQ_ISA` give the same bytes for any number of threads, since
//! threads divide outputs and tokens and never the sum over columns.

mod activations;
mod aligned;
mod gemm;
mod integer;
mod matmul;
mod matrix;
mod micro;
pub mod peak;
mod second_moment;
#[cfg(test)]
mod tests;
mod transposed;

pub use activations::PackedActivations;
pub use gemm::{GemmOperand, gemm_f32};
pub use integer::{IntegerActivations, Steps, integer_engine, matmul_integer, multiplies_as_integers, round_to_steps};
pub use matmul::matmul;
pub use matrix::{Matrix, MatrixError};
pub use micro::Kernel;
pub use second_moment::accumulate_second_moment;
pub use transposed::matmul_transposed;

/// How the products are computed; see the module's documentation for bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// f32 throughout, fused multiply-adds, the same bytes on every instruction set.
    Accurate,
    /// Operands rounded to bfloat16 where the CPU multiplies those, otherwise the same as accurate.
    Fast,
}
