//! `lwq dev logits`: raw logits for tests that compare with other programs.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};

use crate::compute::Precision;
use crate::gguf::Gguf;
use crate::model::{Activations, ForwardOptions, Model, NoTaps, Overrides, TokenGroup};

/// Write the logits of every token, little-endian f32 rows, to stdout
#[derive(Args, Debug)]
pub struct LogitsArgs {
    /// Model file
    model: PathBuf,
    /// File of little-endian i32 token ids
    #[arg(long)]
    tokens_file: PathBuf,
    /// Cut the tokens into sequences of N
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    ctx: Option<u32>,
    /// Rounding of the inputs of products
    #[arg(long, value_enum, default_value = "f32")]
    activations: ActivationsArg,
    /// Use bfloat16 products where the CPU has them
    #[arg(long)]
    fast: bool,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum ActivationsArg {
    F32,
    Ggml,
}

impl LogitsArgs {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let bytes = std::fs::read(&self.tokens_file)
            .with_context(|| format!("{}: cannot be read", self.tokens_file.display()))?;
        let (ids, rest) = bytes.as_chunks::<4>();
        ensure!(rest.is_empty(), "{}: {} bytes are not whole i32 values", self.tokens_file.display(), bytes.len());
        let tokens: Vec<u32> = ids.iter().map(|id| u32::from_le_bytes(*id)).collect();
        let gguf = Gguf::open(&self.model)?;
        let model = Model::open(&gguf).with_context(|| self.model.display().to_string())?;
        let options = ForwardOptions {
            precision: if self.fast { Precision::Fast } else { Precision::Accurate },
            activations: match self.activations {
                ActivationsArg::F32 => Activations::Unrounded,
                ActivationsArg::Ggml => Activations::Ggml,
            },
            ..ForwardOptions::default()
        };
        let pass = model.pass(options, Overrides::new())?;
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
