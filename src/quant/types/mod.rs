//! One file per family of formats: block layout, encoder, decoder. Scalar and readable; faster kernels are
//! tested against these.

pub mod float;
