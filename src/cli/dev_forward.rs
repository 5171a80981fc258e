//! `lwq dev logits` and `lwq dev perplexity`: the forward pass on token ids, for tests that compare with other
//! programs.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, ensure};
use clap::Args;

use super::Common;
use super::args::ActivationsArg;
use lwq::compute::Precision;
use lwq::eval::{Windows, perplexity_of};
use lwq::gguf::Gguf;
use lwq::model::{ForwardOptions, Model, NoTaps, Overrides, TokenGroup};

/// What both commands take.
#[derive(Args, Debug)]
struct RunArgs {
    /// Model file
    model: PathBuf,
    /// File of little-endian i32 token ids
    #[arg(long)]
    tokens_file: PathBuf,
    /// Rounding of the inputs of products
    #[arg(long, value_enum, default_value = "f32")]
    activations: ActivationsArg,
    /// Use bfloat16 products where the CPU has them
    #[arg(long)]
    fast: bool,
    /// GELU from a table of 16-bit floats
    #[arg(long)]
    tabled_gelu: bool,
}

/// Write the logits of every token, little-endian f32 rows, to stdout
#[derive(Args, Debug)]
pub struct LogitsArgs {
    #[command(flatten)]
    run: RunArgs,
    /// Cut the tokens into sequences of N
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    ctx: Option<u32>,
}

/// Score token ids with llama-perplexity's protocol
#[derive(Args, Debug)]
pub struct PerplexityArgs {
    #[command(flatten)]
    run: RunArgs,
    /// Tokens per chunk
    #[arg(long, value_name = "N")]
    ctx: usize,
    /// Chunks to score [default: all]
    #[arg(long, value_name = "N")]
    chunks: Option<usize>,
    /// Token that replaces the first of every chunk
    #[arg(long, value_name = "ID")]
    bos: Option<u32>,
    /// Megabytes for activations [default: half of what is free]
    #[arg(long, value_name = "MB")]
    memory: Option<u64>,
}

/// The token ids of a file.
pub(super) fn read_tokens(path: &std::path::Path) -> anyhow::Result<Vec<u32>> {
    let bytes = std::fs::read(path).with_context(|| format!("{}: cannot be read", path.display()))?;
    let (ids, rest) = bytes.as_chunks::<4>();
    ensure!(rest.is_empty(), "{}: {} bytes are not whole i32 values", path.display(), bytes.len());
    Ok(ids.iter().map(|id| u32::from_le_bytes(*id)).collect())
}

impl RunArgs {
    fn tokens(&self) -> anyhow::Result<Vec<u32>> {
        read_tokens(&self.tokens_file)
    }

    fn options(&self) -> ForwardOptions {
        ForwardOptions {
            precision: if self.fast { Precision::Fast } else { Precision::Accurate },
            activations: self.activations.into(),
            tabled_gelu: self.tabled_gelu,
            ..ForwardOptions::default()
        }
    }
}

impl LogitsArgs {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let tokens = self.run.tokens()?;
        let gguf = Gguf::open(&self.run.model)?;
        let model = Model::open(&gguf).with_context(|| self.run.model.display().to_string())?;
        let pass = model.pass(self.run.options(), Overrides::new())?;
        let ctx = self.ctx.map_or(tokens.len().max(1), |n| n as usize);
        let group = Arc::new(TokenGroup::from_sequences(tokens.chunks(ctx)).with_context(ctx));
        let mut hidden = pass.embed(group)?;
        pass.run_remaining(&mut hidden, &mut NoTaps)?;
        let mut out = io::BufWriter::with_capacity(1 << 20, io::stdout().lock());
        let mut written = Ok(());
        let rows: Vec<usize> = (0..tokens.len()).collect();
        pass.logits(&hidden, &rows, &mut NoTaps, |tile| {
            if written.is_ok() {
                written = tile.logits.iter().try_for_each(|v| out.write_all(&v.to_le_bytes()));
            }
            Ok(())
        })?;
        written?;
        Ok(out.flush()?)
    }
}

impl PerplexityArgs {
    pub(super) fn run(&self, common: &Common) -> anyhow::Result<()> {
        let tokens = self.run.tokens()?;
        let gguf = Gguf::open(&self.run.model)?;
        let model = Model::open(&gguf).with_context(|| self.run.model.display().to_string())?;
        model.check_predicts()?;
        let pass = model.pass(self.run.options(), Overrides::new())?;
        let windows = Windows::chunks(tokens, self.ctx, self.chunks, self.bos)?;
        let memory = self.memory.map(|mb| mb.saturating_mul(1_000_000));
        let total = perplexity_of(&pass, &windows, memory, &())?;
        common.result(format!("{:.6} {:.6} {}\n", total.ppl(), total.error(), total.tokens))
    }
}
