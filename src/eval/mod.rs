//! How good a model is: scores computed from logits.

mod perplexity;

pub use perplexity::{Perplexity, PerplexityOptions, perplexity, score_chunks};
