//! `lwq imatrix MODEL`: the run that collects importance.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;

use super::writing::FormatArg;
use crate::cli::Common;
use crate::cli::args::ModelArgs;
use crate::cli::output_name::wrong_extension;
use lwq::compute::Precision;
use lwq::gguf::Gguf;
use lwq::imatrix::{Collection, Form, Shard, default_path};
use lwq::text::{Set, Text};

/// Flags of a collecting run.
#[derive(Args, Debug)]
pub struct CollectArgs {
    /// Model to score: a GGUF file, or the first file of a split one
    #[arg(required = true)]
    model: Option<PathBuf>,
    /// Calibration text; repeatable, each file is cut into chunks of its own [default: a built-in mix]
    #[arg(long, short, value_name = "TEXT")]
    file: Vec<PathBuf>,
    /// File to write [default: MODEL.imatrix.gguf beside the model]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Form of the output [default: dat if its name ends in .dat, else gguf]
    #[arg(long, value_enum)]
    format: Option<FormatArg>,
    /// Tokens per chunk [default: 512, or the model's context if that is shorter]
    #[arg(long, short = 'c', value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(8..=1 << 20))]
    ctx: Option<u32>,
    /// Use at most this many chunks
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    chunks: Option<u32>,
    /// Leave out the first N chunks
    #[arg(long, value_name = "N", default_value_t = 0)]
    from_chunk: u32,
    /// Collect only part I of N of the chunks, to be added up with `lwq imatrix merge`
    #[arg(long, value_name = "I/N", value_parser = parse_shard)]
    shard: Option<Shard>,
    /// Collect the inputs of output.weight too
    #[arg(long)]
    process_output: bool,
    /// Mixtures of experts: send every token through all experts, those that it did not choose without weight in the
    /// output, so that each has data
    #[arg(long)]
    all_experts: bool,
    /// Do not compute the perplexity of the text
    #[arg(long)]
    no_ppl: bool,
    /// Recognize control tokens such as <|im_start|> in the text
    #[arg(long)]
    parse_special: bool,
    #[command(flatten)]
    loading: ModelArgs,
    /// Compute in 32-bit floats instead of bfloat16 products
    #[arg(long)]
    accurate: bool,
    /// Save the state after this many chunks; a stopped run goes on from there
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    save_every: u32,
}

fn parse_shard(text: &str) -> Result<Shard, String> {
    let parts = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
    match parts {
        Some((index, count)) if (1..=count).contains(&index) => Ok(Shard { index: index - 1, count }),
        _ => Err("give I/N with I from 1 to N, such as 2/8".into()),
    }
}

impl CollectArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// When the model, the text or the output is not usable, or a checkpoint belongs to another run.
    pub fn run(&self, common: &Common) -> Result<()> {
        let Some(path) = &self.model else { bail!("MODEL is needed") };
        let model = Gguf::open(path)?;
        let text = Text::read_or(&self.file, Set::Calibration, &common.watch())?;
        let output = match (&self.output, self.format) {
            (Some(output), _) => output.clone(),
            (None, Some(FormatArg::Dat)) => default_path(path).with_extension("dat"),
            (None, _) => default_path(path),
        };
        let form = self.format.map_or_else(|| Form::of_name(&output), Form::from);
        wrong_extension(&output, form == Form::Gguf).into_iter().for_each(|line| common.warn(line));
        let report = Collection::new(&model, &text)
            .n_ctx(self.ctx.map(|n| n as usize))
            .chunks(self.chunks.map(|n| n as usize))
            .from_chunk(self.from_chunk as usize)
            .shard(self.shard)
            .process_output(self.process_output)
            .all_experts(self.all_experts)
            .perplexity(!self.no_ppl)
            .parse_special(self.parse_special)
            .pre(self.loading.pre.clone())
            .precision(if self.accurate { Precision::Accurate } else { Precision::Fast })
            .memory(self.loading.memory)
            .save_every(self.save_every as usize)
            .write(&output, form, common.replace(), &common.watch())?;
        match (common.json, common.quiet) {
            (true, _) => common.result_json(&report),
            (false, true) => Ok(()),
            (false, false) => common.result(report.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_named_from_one() {
        assert_eq!(parse_shard("2/8"), Ok(Shard { index: 1, count: 8 }));
        for wrong in ["0/8", "9/8", "1", "a/b", "1/0", "-1/2"] {
            assert!(parse_shard(wrong).is_err(), "{wrong}");
        }
    }
}
