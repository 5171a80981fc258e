//! How models are run.

use clap::{Args, ValueEnum};
use lwq::model::Activations;

/// Flags of every run of a model.
#[derive(Args, Debug)]
pub struct ModelArgs {
    /// Use this pre-tokenizer instead of the one in the file
    #[arg(long, value_name = "NAME")]
    pub pre: Option<String>,
    /// Memory for activations, such as 2G [default: half of what is free]
    #[arg(long, value_name = "SIZE", value_parser = lwq::gguf::split::parse_size)]
    pub memory: Option<u64>,
}

/// How activations enter the products, as flags name it.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActivationsArg {
    /// Unrounded: the damage of the weights alone
    F32,
    /// Rounded as ggml's CPU backend does: the damage as users run the file
    Ggml,
}

impl From<ActivationsArg> for Activations {
    fn from(arg: ActivationsArg) -> Activations {
        match arg {
            ActivationsArg::F32 => Activations::Unrounded,
            ActivationsArg::Ggml => Activations::Ggml,
        }
    }
}
