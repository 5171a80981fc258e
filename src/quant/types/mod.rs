//! One file per family of formats: block layout, encoder, decoder. Scalar and readable; faster kernels are
//! tested against these.

pub mod float;
pub mod iq1;
pub mod iq2;
pub mod iq3;
pub mod iq4;
mod superblock;

#[cfg(test)]
mod iq_tests;
