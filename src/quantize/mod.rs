//! The verb `quantize`.

pub mod feedback;
pub mod write;
