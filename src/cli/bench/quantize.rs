//! `lwq bench quantize`.

use clap::Args;

use super::kernels::tensor_type;
use crate::cli::Common;
use lwq::bench::CodecsBench;
use lwq::gguf::TensorType;

/// Arguments of `lwq bench quantize`.
#[derive(Args, Debug)]
pub struct CodecsArgs {
    /// Types to measure [default: all that can be written or read]
    #[arg(long = "type", value_name = "TYPE", value_parser = tensor_type, value_delimiter = ',')]
    types: Vec<TensorType>,
    /// Instruction sets to measure, such as avx2 [default: all that this CPU has and LWQ_ISA allows]
    #[arg(long = "isa", value_name = "NAME", value_delimiter = ',')]
    levels: Vec<String>,
    /// Rounds, of which the best counts
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=10000))]
    rounds: u32,
    /// Rows of 4096 weights for each thread; slow encoders get fewer
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65536))]
    rows: u32,
}

pub(super) fn run(args: &CodecsArgs, common: &Common) -> anyhow::Result<()> {
    let bench = CodecsBench {
        types: args.types.clone(),
        levels: args.levels.clone(),
        rounds: args.rounds,
        rows: args.rows as usize,
        threads: rayon::current_num_threads(),
    };
    let report = bench.run(&common.watch())?;
    if common.json { common.result_json(&report) } else { common.result(report.to_string()) }
}
