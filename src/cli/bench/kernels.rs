//! `lwq bench kernels`.

use clap::Args;

use crate::cli::Common;
use lwq::bench::{KernelsBench, Shape};
use lwq::gguf::TensorType;

/// Arguments of `lwq bench kernels`.
#[derive(Args, Debug)]
pub struct KernelsArgs {
    /// Tokens that share one pass over the weights
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65536))]
    tokens: u32,
    /// Shapes of the weights, outputs x inputs
    #[arg(long = "shape", value_name = "ROWSxCOLS", value_parser = shape, value_delimiter = ',', default_value = "2048x2048,2048x8192")]
    shapes: Vec<Shape>,
    /// Storage types of the weights
    #[arg(long = "type", value_name = "TYPE", value_parser = tensor_type, value_delimiter = ',', default_value = "f32,f16,bf16,q8_0,q4_K,q6_K,iq4_xs")]
    types: Vec<TensorType>,
    /// Kernels to measure, such as avx512-f32 [default: the best of each precision]
    #[arg(long = "kernel", value_name = "NAME", value_delimiter = ',')]
    kernels: Vec<String>,
    /// Rounds, of which the best counts
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=10000))]
    rounds: u32,
}

fn shape(text: &str) -> Result<Shape, String> {
    let parse = |part: &str| part.parse::<usize>().ok().filter(|&n| (1..=1 << 20).contains(&n));
    text.split_once('x')
        .and_then(|(rows, cols)| Some(Shape { rows: parse(rows)?, cols: parse(cols)? }))
        .ok_or_else(|| "expected ROWSxCOLS, such as 2048x8192, each at most 1048576".to_owned())
}

pub(super) fn tensor_type(name: &str) -> Result<TensorType, String> {
    TensorType::from_name(name).ok_or_else(|| "not a tensor type of ggml".to_owned())
}

pub(super) fn run(args: &KernelsArgs, common: &Common) -> anyhow::Result<()> {
    let bench = KernelsBench {
        tokens: args.tokens as usize,
        shapes: args.shapes.clone(),
        types: args.types.clone(),
        kernels: args.kernels.clone(),
        rounds: args.rounds,
        threads: rayon::current_num_threads(),
    };
    let report = bench.run(&common.watch())?;
    if common.json { common.result_json(&report) } else { common.result(report.to_string()) }
}
